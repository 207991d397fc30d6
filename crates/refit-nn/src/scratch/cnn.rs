//! Shape of a small convolutional classifier.

use burn::tensor::Device;
use refit_store::{Artifact, Config};
use serde_json::{Value, json};

use super::values::{PLAIN, Values, check, classes, number, numbers};
use crate::error::{Error, Result};
use crate::ops::ConvSpec;
use crate::vision::{Cnn, Stage};

/// How a stage halves the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Downsample {
    /// Largest of each 2 x 2 window.
    MaxPool,
    /// The stage's last convolution has stride 2.
    Stride,
}

/// Shape of a convolutional classifier without normalization, so that weights of several may be averaged: stages of 3 x 3
/// convolutions with ReLU, each halving the image, then the mean of each channel and a linear classifier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CnnShape {
    /// Height and width of the images.
    pub image_size: usize,
    /// Colour channels of the images.
    pub inputs: usize,
    /// Channels of each stage.
    pub channels: Vec<usize>,
    /// Convolutions of each stage.
    pub convs: usize,
    /// Convolutions after the first are a depthwise and a pointwise one (Howard et al. 2017).
    pub separable: bool,
    /// How a stage halves the image.
    pub downsample: Downsample,
    /// Classes.
    pub classes: usize,
}

impl Default for CnnShape {
    /// For Fashion-MNIST: 28 x 28 grey pixels, six convolutions, 288 thousand parameters.
    fn default() -> Self {
        Self {
            image_size: 28,
            inputs: 1,
            channels: vec![32, 64, 128],
            convs: 2,
            separable: false,
            downsample: Downsample::MaxPool,
            classes: 10,
        }
    }
}

impl CnnShape {
    /// Checks that such a model can be.
    ///
    /// # Errors
    /// Zero sizes, no stages, more halvings than the image has room for.
    pub fn check(&self) -> Result<()> {
        check(&[
            ("image_size", self.image_size),
            ("num_channels", self.inputs),
            ("convs_per_stage", self.convs),
            ("num_labels", self.classes),
            ("channels", self.channels.len()),
        ])?;
        self.channels.iter().try_for_each(|&c| check(&[("channels", c)]))?;
        if self.image_size >> self.channels.len().min(63) == 0 {
            let problem = format!(
                "has {} stages, and {} pixels can be halved {} times",
                self.channels.len(),
                self.image_size,
                self.image_size.ilog2()
            );
            return Err(Error::Config { key: "channels".into(), problem });
        }
        Ok(())
    }

    /// Reads the shape from a `config.json` of model type `refit-cnn`.
    ///
    /// # Errors
    /// Missing keys and values of another kind, and what [`Self::check`] says.
    pub fn read(config: &Config) -> Result<Self> {
        let downsample = match config.str("downsample").unwrap_or("max_pool") {
            "max_pool" => Downsample::MaxPool,
            "stride" => Downsample::Stride,
            other => {
                let problem = format!("is `{other}`; known are max_pool and stride");
                return Err(Error::Config { key: "downsample".into(), problem });
            }
        };
        let shape = Self {
            image_size: number(config, "image_size", None)?,
            inputs: number(config, "num_channels", Some(1))?,
            channels: numbers(config, "channels")?,
            convs: number(config, "convs_per_stage", Some(1))?,
            separable: config.bool("separable").unwrap_or(false),
            downsample,
            classes: classes(config)?,
        };
        shape.check()?;
        Ok(shape)
    }

    /// The `config.json` that belongs beside the weights.
    pub fn to_config_json(&self) -> Value {
        json!({
            "model_type": "refit-cnn",
            "image_size": self.image_size,
            "num_channels": self.inputs,
            "channels": self.channels,
            "convs_per_stage": self.convs,
            "separable": self.separable,
            "downsample": match self.downsample {
                Downsample::MaxPool => "max_pool",
                Downsample::Stride => "stride",
            },
            "num_labels": self.classes,
        })
    }

    /// A model of this shape: weights by Kaiming (He et al. 2015), biases zero, fixed by `seed`. Tensors are named
    /// `features.N.weight` and `classifier.weight`, `N` counting convolutions (`features.N.depthwise` and `.pointwise` where
    /// those are two).
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn init(&self, seed: u64, device: &Device) -> Result<Cnn> {
        self.build(&Values::Seed(seed, device))
    }

    /// A model with the weights of an artifact.
    ///
    /// # Errors
    /// As [`Self::read`]; missing or mis-shaped tensors.
    pub fn load(artifact: &Artifact, device: &Device) -> Result<Cnn> {
        Self::read(artifact.config())?.build(&Values::Artifact(artifact, device))
    }

    fn build(&self, values: &Values) -> Result<Cnn> {
        self.check()?;
        let mut inputs = self.inputs;
        let mut site = 0;
        let mut stages = Vec::new();
        for &outputs in &self.channels {
            let mut convs = Vec::new();
            for i in 0..self.convs {
                let halve = self.downsample == Downsample::Stride && i + 1 == self.convs;
                let spec = ConvSpec::new(if halve { 2 } else { 1 }, 1, 1);
                let name = format!("features.{site}");
                if self.separable && site > 0 {
                    let thin = ConvSpec { groups: inputs, ..spec };
                    convs.push(values.conv(
                        format!("{name}.depthwise"),
                        [inputs, 1, 3, 3],
                        thin,
                    )?);
                    let (name, shape) = (format!("{name}.pointwise"), [outputs, inputs, 1, 1]);
                    convs.push(values.conv(name, shape, ConvSpec::new(1, 0, 1))?);
                } else {
                    convs.push(values.conv(name, [outputs, inputs, 3, 3], spec)?);
                }
                inputs = outputs;
                site += 1;
            }
            stages.push(Stage { convs, pool: self.downsample == Downsample::MaxPool });
        }
        let classifier = values.linear("classifier", [self.classes, inputs], PLAIN)?;
        Ok(Cnn { stages, classifier, image_size: self.image_size })
    }
}
