//! Shape of a multilayer perceptron on images.

use burn::tensor::Device;
use refit_store::{Artifact, Config};
use serde_json::{Value, json};

use super::values::{PLAIN, RELU, Values, check, classes, number, numbers};
use crate::error::Result;
use crate::vision::Mlp;

/// Shape of a classifier of flattened images: linear layers with ReLU, then a linear classifier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MlpShape {
    /// Height and width of the images.
    pub image_size: usize,
    /// Colour channels of the images.
    pub inputs: usize,
    /// Width of each hidden layer.
    pub hidden: Vec<usize>,
    /// Classes.
    pub classes: usize,
}

impl Default for MlpShape {
    /// For Fashion-MNIST: 28 x 28 grey pixels, two hidden layers, 235 thousand parameters.
    fn default() -> Self {
        Self { image_size: 28, inputs: 1, hidden: vec![256, 128], classes: 10 }
    }
}

impl MlpShape {
    /// Checks that such a model can be.
    ///
    /// # Errors
    /// Zero sizes, no hidden layer.
    pub fn check(&self) -> Result<()> {
        check(&[
            ("image_size", self.image_size),
            ("num_channels", self.inputs),
            ("num_labels", self.classes),
            ("hidden_sizes", self.hidden.len()),
        ])?;
        self.hidden.iter().try_for_each(|&h| check(&[("hidden_sizes", h)]))?;
        let pixels = self.image_size.saturating_mul(self.image_size).saturating_mul(self.inputs);
        check(&[("image_size * image_size * num_channels", pixels)])
    }

    /// Reads the shape from a `config.json` of model type `refit-mlp`.
    ///
    /// # Errors
    /// Missing keys and values of another kind, and what [`Self::check`] says.
    pub fn read(config: &Config) -> Result<Self> {
        let shape = Self {
            image_size: number(config, "image_size", None)?,
            inputs: number(config, "num_channels", Some(1))?,
            hidden: numbers(config, "hidden_sizes")?,
            classes: classes(config)?,
        };
        shape.check()?;
        Ok(shape)
    }

    /// The `config.json` that belongs beside the weights.
    pub fn to_config_json(&self) -> Value {
        json!({
            "model_type": "refit-mlp",
            "image_size": self.image_size,
            "num_channels": self.inputs,
            "hidden_sizes": self.hidden,
            "num_labels": self.classes,
        })
    }

    /// A model of this shape: weights by Kaiming (He et al. 2015), biases zero, fixed by `seed`. Tensors are named
    /// `features.N.weight` and `classifier.weight`, `N` counting hidden layers.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn init(&self, seed: u64, device: &Device) -> Result<Mlp> {
        self.build(&Values::Seed(seed, device))
    }

    /// A model with the weights of an artifact.
    ///
    /// # Errors
    /// As [`Self::read`]; missing or mis-shaped tensors.
    pub fn load(artifact: &Artifact, device: &Device) -> Result<Mlp> {
        Self::read(artifact.config())?.build(&Values::Artifact(artifact, device))
    }

    fn build(&self, values: &Values) -> Result<Mlp> {
        self.check()?;
        let mut inputs = self.inputs * self.image_size * self.image_size;
        let mut layers = Vec::new();
        for (i, &width) in self.hidden.iter().enumerate() {
            layers.push(values.linear(&format!("features.{i}"), [width, inputs], RELU)?);
            inputs = width;
        }
        let classifier = values.linear("classifier", [self.classes, inputs], PLAIN)?;
        let (image_size, channels) = (self.image_size, self.inputs);
        Ok(Mlp { layers, classifier, image_size, channels })
    }
}
