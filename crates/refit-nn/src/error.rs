//! Errors of running models.

use thiserror::Error;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong while a model is brought to life or run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The artifact could not be read.
    #[error(transparent)]
    Store(#[from] refit_store::Error),
    /// The tokenizer or data could not be read.
    #[error(transparent)]
    Data(#[from] refit_data::Error),
    /// No forward pass exists for this model type.
    #[error(
        "model type `{model_type}` cannot be run: {reason}; methods that only touch weights still work on it"
    )]
    Unsupported {
        /// `model_type` of the config.
        model_type: String,
        /// What is missing.
        reason: String,
    },
    /// A key of the config is missing or has a value that the forward pass does not know.
    #[error("config key `{key}`: {problem}")]
    Config {
        /// The key in config.json.
        key: String,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// A tensor has another shape than the config promises.
    #[error("tensor `{name}` has shape {found:?}, but the config promises {expected:?}")]
    Shape {
        /// Tensor name in the artifact.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape computed from the config.
        expected: Vec<usize>,
    },
    /// A required tensor is not in the artifact.
    #[error("tensor `{name}` is missing from the artifact")]
    Missing {
        /// Tensor name that was looked for.
        name: String,
    },
    /// More tokens than the model's context holds.
    #[error(
        "{requested} tokens do not fit into the model's context of {context}; shorten the input or choose a smaller window"
    )]
    Context {
        /// Tokens asked for.
        requested: usize,
        /// `max_position_embeddings` of the model.
        context: usize,
    },
    /// A token id lies outside the embedding table.
    #[error(
        "token id {id} lies outside the vocabulary of {vocab}: the tokenizer does not belong to this model"
    )]
    Token {
        /// The offending id.
        id: u32,
        /// Rows of the embedding table.
        vocab: usize,
    },
    /// The device is unknown or was not built in.
    #[error("device `{device}` is not available: {reason}")]
    Device {
        /// Name given by the user.
        device: String,
        /// Why, and how to get it.
        reason: String,
    },
    /// The request makes no sense for this model.
    #[error("{0}")]
    Invalid(String),
}
