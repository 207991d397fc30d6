//! Convolution and pooling of images `[batch, channels, height, width]`.
//!
//! [`cpu`] has the kernels of the flex backend. All of them, for any kernel, stride, padding and grouping, forward and backward,
//! are the two loops of `kernels` on planes that `layout` has laid out.

pub mod compose;
pub mod cpu;
mod grad;
mod kernels;
mod layout;
pub mod pool;

use burn::tensor::{Shape, Tensor};

pub use layout::Geometry;

use super::{build, host};

/// How a kernel moves over an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvSpec {
    /// Pixels from one window to the next, at least 1.
    pub stride: usize,
    /// Zeros above, below, left and right of the image.
    pub padding: [usize; 4],
    /// Groups of channels that do not see each other; divides inputs and outputs.
    pub groups: usize,
}

impl ConvSpec {
    /// The same padding on every side.
    pub fn new(stride: usize, padding: usize, groups: usize) -> Self {
        Self { stride, padding: [padding; 4], groups }
    }

    fn geometry(&self, x: [usize; 4], weight: [usize; 4]) -> Geometry {
        let [batch, inputs, height, width] = x;
        let [outputs, inner, kernel_height, kernel_width] = weight;
        assert!(
            self.stride > 0 && inner * self.groups == inputs && outputs % self.groups == 0,
            "a weight {weight:?} in {} groups does not fit images {x:?}",
            self.groups
        );
        Geometry {
            batch,
            inputs,
            outputs,
            groups: self.groups,
            size: [height, width],
            kernel: [kernel_height, kernel_width],
            stride: self.stride,
            padding: self.padding,
        }
    }
}

/// Convolution (cross-correlation, as everywhere in deep learning) with the same padding on every side.
///
/// `x [batch, in, height, width]`, `weight [out, in / groups, k, k]`, `bias [out]`; returns `[batch, out, height', width']` with
/// `height' = (height + 2 padding - k) / stride + 1`.
///
/// # Panics
/// Channels that do not match, and windows larger than the padded image.
pub fn conv2d(
    x: Tensor<4>,
    weight: Tensor<4>,
    bias: Option<Tensor<1>>,
    stride: usize,
    padding: usize,
    groups: usize,
) -> Tensor<4> {
    conv2d_with(x, weight, bias, &ConvSpec::new(stride, padding, groups))
}

/// As [`conv2d`], with a padding of its own on each side.
///
/// # Panics
/// As [`conv2d`].
pub fn conv2d_with(
    x: Tensor<4>,
    weight: Tensor<4>,
    bias: Option<Tensor<1>>,
    spec: &ConvSpec,
) -> Tensor<4> {
    let geometry = spec.geometry(x.dims(), weight.dims());
    let [height, width] = geometry.out();
    if let (Some(hx), Some(hw)) = (host(&x), host(&weight)) {
        let bias = bias.as_ref().and_then(host);
        let shape = Shape::from([geometry.batch, geometry.outputs, height, width]);
        return build(shape, |out| {
            cpu::conv2d(hx.slice(), hw.slice(), bias.as_ref().map(|b| b.slice()), out, &geometry);
        });
    }
    grad::conv2d(&x, &weight, bias.as_ref(), geometry)
        .unwrap_or_else(|| compose::conv2d(x, weight, bias, spec))
}

/// Largest value of each `k x k` window, stride `k`: `[batch, channels, height / k, width / k]`. Incomplete windows at the right
/// and bottom edge are dropped, as PyTorch does.
///
/// # Panics
/// Windows larger than the image or than 16 x 16.
pub fn max_pool2d(x: Tensor<4>, k: usize) -> Tensor<4> {
    let [batch, channels, height, width] = x.dims();
    assert!((1..=height.min(width).min(16)).contains(&k), "windows of {k} on {height} x {width}");
    if let Some(hx) = host(&x) {
        return build(Shape::from([batch, channels, height / k, width / k]), |out| {
            let mut which = vec![0; out.len()];
            pool::max_pool(hx.slice(), out, &mut which, [height, width], k);
        });
    }
    grad::max_pool2d(&x, k).unwrap_or_else(|| compose::max_pool2d(x, k))
}

/// Mean of each channel's plane: `[batch, channels, height, width]` to `[batch, channels]`.
pub fn global_avg_pool2d(x: Tensor<4>) -> Tensor<2> {
    let [batch, channels, height, width] = x.dims();
    if let Some(hx) = host(&x) {
        return build(Shape::from([batch, channels]), |out| {
            pool::mean(hx.slice(), out, height * width);
        });
    }
    grad::global_avg_pool2d(&x).unwrap_or_else(|| compose::global_avg_pool2d(x))
}

#[cfg(test)]
mod tests;
