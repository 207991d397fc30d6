//! A multilayer perceptron on flattened images: see [`MlpShape`](crate::scratch::MlpShape).

use burn::module::Module;
use burn::tensor::Tensor;

use crate::error::Result;
use crate::operator::Linear;
use crate::ops::Activation;
use crate::run::Run;

/// A classifier of flattened images.
#[derive(Module, Debug)]
pub struct Mlp {
    /// Hidden layers, with a ReLU after each.
    pub layers: Vec<Linear>,
    /// Class logits.
    pub classifier: Linear,
    /// Height and width of the images.
    #[module(skip)]
    pub image_size: usize,
    /// Colour channels of the images.
    #[module(skip)]
    pub channels: usize,
}

impl Mlp {
    /// Images `[batch, channels, height, width]` to the last hidden layer, `[batch, width]`.
    ///
    /// # Errors
    /// Images of another size or with other channels.
    pub fn features(&self, images: Tensor<4>, run: &mut Run) -> Result<Tensor<2>> {
        super::check(&images, self.channels, self.image_size)?;
        let batch = images.dims()[0];
        let pixels = self.channels * self.image_size * self.image_size;
        let mut x = images.reshape([batch, 1, pixels]);
        for layer in &self.layers {
            x = Activation::Relu.apply(layer.forward(x, run));
        }
        let width = x.dims()[2];
        Ok(x.reshape([batch, width]))
    }

    /// Images `[batch, channels, height, width]` to logits `[batch, classes]`.
    ///
    /// # Errors
    /// As [`Self::features`].
    pub fn forward(&self, images: Tensor<4>, run: &mut Run) -> Result<Tensor<2>> {
        let features = self.features(images, run)?;
        Ok(super::classify(&self.classifier, features, run))
    }
}
