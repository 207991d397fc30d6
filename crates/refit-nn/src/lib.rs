//! Running models: sites, operators, mixers, caches, taps, kernels, generation.
//!
//! [`Model::load`] brings an artifact to life. A model is code-free of methods: whatever a method changes is an
//! [`operator::Operator`] at a named site. Decoding state ([`cache::Cache`]) and observation ([`run::Tap`]) belong to the caller.

pub mod adapt;
pub mod adapter;
pub mod block;
pub mod cache;
pub mod checkpoint;
pub mod classifier;
pub mod config;
pub mod decoder;
pub mod device;
pub mod encoder;
pub mod error;
pub mod generate;
pub mod load;
pub mod named;
mod names;
pub mod operator;
pub mod ops;
pub mod packed;
pub mod rounding;
pub mod run;
pub mod scratch;
pub mod side;
pub mod vision;

use burn::tensor::Device;
use refit_store::architecture::Kind;
use refit_store::artifact::Artifact;

pub use burn::tensor::Device as BurnDevice;
pub use cache::Cache;
pub use classifier::TextClassifier;
pub use decoder::{Decoder, Frame};
pub use device::device;
pub use encoder::{Encoder, Pooling};
pub use error::{Error, Result};
pub use named::{Parameter, Trainable};
pub use run::{Dropout, Run, Tap};

/// A model that can be run.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // one at a time: the weights dwarf it
pub enum Model {
    /// A language model.
    Decoder(Decoder),
    /// A text encoder.
    Encoder(Encoder),
    /// An image classifier.
    Vision(vision::Vision),
}

impl Model {
    /// Brings `artifact` to life on `device`.
    ///
    /// # Errors
    /// Model types without a forward pass, incomplete configs, missing or mis-shaped tensors.
    pub fn load(artifact: &Artifact, device: &Device) -> Result<Self> {
        Ok(match artifact.architecture().kind {
            Kind::Encoder => Self::Encoder(Encoder::load(artifact, device)?),
            Kind::Vision => Self::Vision(vision::Vision::load(artifact, device)?),
            _ => Self::Decoder(Decoder::load(artifact, device)?),
        })
    }
}
