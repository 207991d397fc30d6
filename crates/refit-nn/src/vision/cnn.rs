//! A small convolutional classifier without normalization: see [`CnnShape`](crate::scratch::CnnShape).

use burn::module::Module;
use burn::tensor::Tensor;

use crate::error::{Error, Result};
use crate::operator::{Conv2d, Linear};
use crate::ops::{self, Activation};
use crate::run::Run;

/// Convolutions with a ReLU after each, at one size of the image.
#[derive(Module, Debug)]
pub struct Stage {
    /// The convolutions, in order.
    pub convs: Vec<Conv2d>,
    /// Whether the largest of each 2 x 2 window goes on.
    #[module(skip)]
    pub pool: bool,
}

impl Stage {
    /// `[batch, in, height, width]` to `[batch, out, height / 2, width / 2]`.
    pub fn forward(&self, mut x: Tensor<4>) -> Tensor<4> {
        for (i, conv) in self.convs.iter().enumerate() {
            x = conv.forward(x);
            // ReLU keeps the order of values: after the pooling it gives the same result with a quarter of the work.
            if self.pool && i + 1 == self.convs.len() {
                x = ops::max_pool2d(x, 2);
            }
            x = Activation::Relu.apply(x);
        }
        x
    }
}

/// A convolutional classifier.
#[derive(Module, Debug)]
pub struct Cnn {
    /// The stages, in order.
    pub stages: Vec<Stage>,
    /// Class logits.
    pub classifier: Linear,
    /// Height and width of the images.
    #[module(skip)]
    pub image_size: usize,
}

impl Cnn {
    /// Images `[batch, channels, height, width]` to the mean of each channel after the last stage, `[batch, width]`.
    ///
    /// # Errors
    /// Images of another size or with other channels.
    pub fn features(&self, images: Tensor<4>) -> Result<Tensor<2>> {
        let channels = match self.stages.first().and_then(|s| s.convs.first()) {
            Some(conv) => conv.weight.shape()[1] * conv.spec.groups,
            None => return Err(Error::Invalid("a Cnn needs a stage with a convolution".into())),
        };
        super::check(&images, channels, self.image_size)?;
        let x = self.stages.iter().fold(images, |x, stage| stage.forward(x));
        Ok(ops::global_avg_pool2d(x))
    }

    /// Images `[batch, channels, height, width]` to logits `[batch, classes]`.
    ///
    /// # Errors
    /// As [`Self::features`].
    pub fn forward(&self, images: Tensor<4>, run: &mut Run) -> Result<Tensor<2>> {
        Ok(super::classify(&self.classifier, self.features(images)?, run))
    }
}
