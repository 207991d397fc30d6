//! Convolution and pooling as plain Burn compositions: what devices without a fused kernel run, and the reference of the tests.

use burn::tensor::Tensor;
use burn::tensor::module;
use burn::tensor::ops::{ConvOptions, MaxPoolOptions};

use super::ConvSpec;

/// Convolution, see [`super::conv2d_with`].
pub fn conv2d(
    x: Tensor<4>,
    weight: Tensor<4>,
    bias: Option<Tensor<1>>,
    spec: &ConvSpec,
) -> Tensor<4> {
    let [top, bottom, left, right] = spec.padding;
    let (x, padding) = match top == bottom && left == right {
        true => (x, [top, left]),
        false => (x.pad((left, right, top, bottom), 0.0), [0, 0]),
    };
    let options = ConvOptions::new([spec.stride; 2], padding, [1, 1], spec.groups);
    module::conv2d(x, weight, bias, options)
}

/// Largest of each window, see [`super::max_pool2d`].
pub fn max_pool2d(x: Tensor<4>, k: usize) -> Tensor<4> {
    module::max_pool2d(x, MaxPoolOptions::new([k, k]))
}

/// Mean of each plane, see [`super::global_avg_pool2d`].
pub fn global_avg_pool2d(x: Tensor<4>) -> Tensor<2> {
    let [batch, channels, height, width] = x.dims();
    x.reshape([batch, channels, height * width]).mean_dim(2).reshape([batch, channels])
}
