//! Image classifiers.

mod cnn;
mod efficientnet;
mod mlp;
pub mod tokens;
mod vit;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use refit_store::artifact::Artifact;

pub use cnn::{Cnn, Stage};
pub use efficientnet::{Bottleneck, ConvNorm, EfficientNetLite};
pub use mlp::Mlp;
pub use vit::VisionTransformer;

use crate::error::{Error, Result};
use crate::operator::Linear;
use crate::run::Run;
use crate::scratch::{CnnShape, MlpShape};

/// An image classifier.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // one per run: the weights dwarf it
pub enum Vision {
    /// EfficientNet-Lite 0 to 4.
    EfficientNetLite(EfficientNetLite),
    /// Vision Transformer.
    Vit(VisionTransformer),
    /// Small convolutional network, trained by refit.
    Cnn(Cnn),
    /// Multilayer perceptron, trained by refit.
    Mlp(Mlp),
}

impl Vision {
    /// Loads an image classifier to `device`.
    ///
    /// # Errors
    /// Model types without a forward pass, missing or mis-shaped tensors.
    pub fn load(artifact: &Artifact, device: &Device) -> Result<Self> {
        let model_type = artifact
            .config()
            .model_type()
            .unwrap_or(&artifact.architecture().model_type)
            .to_owned();
        match model_type.as_str() {
            // Depths and widths are read off the tensors, so Lite 0 to 4 are one.
            lite if lite.replace('_', "-").starts_with("efficientnet-lite") => {
                Ok(Self::EfficientNetLite(EfficientNetLite::load(artifact, device)?))
            }
            "vit" => Ok(Self::Vit(VisionTransformer::load(artifact, device)?)),
            "refit-cnn" => Ok(Self::Cnn(CnnShape::load(artifact, device)?)),
            "refit-mlp" => Ok(Self::Mlp(MlpShape::load(artifact, device)?)),
            _ => {
                let reason = "no forward pass yet; image models with one are efficientnet-lite, vit, refit-cnn and \
                              refit-mlp"
                    .into();
                Err(Error::Unsupported { model_type, reason })
            }
        }
    }

    /// Loads what stands under the classifier: as [`Self::load`], where a ViT may have none.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_trunk(artifact: &Artifact, device: &Device) -> Result<Self> {
        match artifact.config().model_type() {
            Some("vit") => Ok(Self::Vit(VisionTransformer::load_trunk(artifact, device)?)),
            _ => Self::load(artifact, device),
        }
    }

    /// Images `[batch, channels, height, width]`, normalized as the model expects, to logits `[batch, classes]`.
    ///
    /// # Errors
    /// An image size or a number of channels that the model was not made for.
    pub fn forward(&self, images: Tensor<4>, run: &mut Run) -> Result<Tensor<2>> {
        match self {
            Self::EfficientNetLite(model) => Ok(model.forward(images)),
            Self::Vit(model) => model.forward(images, run),
            Self::Cnn(model) => model.forward(images, run),
            Self::Mlp(model) => model.forward(images, run),
        }
    }

    /// Images to what the classifier sees, `[batch, width]`: for linear probes.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn features(&self, images: Tensor<4>, run: &mut Run) -> Result<Tensor<2>> {
        match self {
            Self::EfficientNetLite(model) => Ok(model.features(images)),
            Self::Vit(model) => model.pooled(images, run),
            Self::Cnn(model) => model.features(images),
            Self::Mlp(model) => model.features(images, run),
        }
    }

    /// The linear that turns features into logits.
    pub fn classifier(&self) -> &Linear {
        match self {
            Self::EfficientNetLite(model) => &model.classifier,
            Self::Vit(model) => &model.classifier,
            Self::Cnn(model) => &model.classifier,
            Self::Mlp(model) => &model.classifier,
        }
    }
}

impl Vision {
    /// The linear that turns features into logits, to be replaced.
    pub fn classifier_mut(&mut self) -> &mut Linear {
        match self {
            Self::EfficientNetLite(model) => &mut model.classifier,
            Self::Vit(model) => &mut model.classifier,
            Self::Cnn(model) => &mut model.classifier,
            Self::Mlp(model) => &mut model.classifier,
        }
    }
}

/// Features `[batch, width]` to logits `[batch, classes]`.
fn classify(classifier: &Linear, features: Tensor<2>, run: &mut Run) -> Tensor<2> {
    let [batch, width] = features.dims();
    let logits = classifier.forward(features.reshape([batch, 1, width]), run);
    let classes = logits.dims()[2];
    logits.reshape([batch, classes])
}

/// Refuses images that a model was not made for.
fn check(images: &Tensor<4>, channels: usize, size: usize) -> Result<()> {
    let [_, found, height, width] = images.dims();
    if [found, height, width] == [channels, size, size] {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "images are {height} x {width} with {found} channels, the model takes {size} x {size} with {channels}"
    )))
}
