//! Image classifiers.

mod efficientnet;
mod vit;

use burn::tensor::{Device, Tensor};
use refit_store::artifact::Artifact;

pub use efficientnet::EfficientNetLite;
pub use vit::VisionTransformer;

use crate::error::{Error, Result};
use crate::run::Run;

/// An image classifier.
#[derive(Debug)]
pub enum Vision {
    /// EfficientNet-Lite 0 to 4.
    EfficientNetLite(EfficientNetLite),
    /// Vision Transformer.
    Vit(VisionTransformer),
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
            "efficientnet-lite" | "efficientnet_lite" | "efficientnet-lite0" => {
                Ok(Self::EfficientNetLite(EfficientNetLite::load(artifact, device)?))
            }
            "vit" => Ok(Self::Vit(VisionTransformer::load(artifact, device)?)),
            _ => {
                let reason =
                    "no forward pass yet; image models with one are efficientnet-lite and vit"
                        .into();
                Err(Error::Unsupported { model_type, reason })
            }
        }
    }

    /// Images `[batch, 3, height, width]`, normalized as the model expects, to logits `[batch, classes]`.
    ///
    /// # Errors
    /// An image size that the model was not made for.
    pub fn forward(&self, images: Tensor<4>, run: &mut Run) -> Result<Tensor<2>> {
        match self {
            Self::EfficientNetLite(model) => Ok(model.forward(images)),
            Self::Vit(model) => model.forward(images, run),
        }
    }
}
