//! Errors of evaluation, calibration and claims.

use std::path::PathBuf;

use thiserror::Error;

use crate::observe::NonFinite;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of any kind, as experiments return it.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What can go wrong while a model is measured or calibrated.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The model could not be loaded or run.
    #[error(transparent)]
    Model(#[from] refit_nn::Error),
    /// An artifact could not be read.
    #[error(transparent)]
    Store(#[from] refit_store::Error),
    /// No text to evaluate on.
    #[error("nothing to evaluate: {what}; perplexity needs at least two tokens in a window")]
    EmptyText {
        /// What was handed in.
        what: String,
    },
    /// A window that the model cannot hold or that cannot score anything.
    #[error(
        "window of {window} tokens: it must lie between 2 and the model's context of {context}"
    )]
    Window {
        /// Tokens per window asked for.
        window: usize,
        /// Context of the model.
        context: usize,
    },
    /// Two models that cannot be compared token by token.
    #[error(
        "the model has {model} logits per position and the reference {reference}: \
         they do not share a vocabulary, so KL divergence between them means nothing"
    )]
    Vocabulary {
        /// Logits per position of the model.
        model: usize,
        /// Logits per position of the reference.
        reference: usize,
    },
    /// A reference cache that was filled from other text or windows.
    #[error("the reference was cached for other text or another window; fill a new cache")]
    StaleReference,
    /// A logit that is not a number, or an infinite loss.
    #[error(
        "{who} produces logits that are not finite, first at window {window}, position {position} \
         (token id {token}): its weights or an operation overflow"
    )]
    Logits {
        /// "the model" or "the reference".
        who: &'static str,
        /// Window, counted from 0.
        window: usize,
        /// Position in the window, counted from 0.
        position: usize,
        /// Token at that position.
        token: u32,
    },
    /// No calibration data.
    #[error("calibration needs text: {what}")]
    EmptyCalibration {
        /// What is missing.
        what: String,
    },
    /// A calibration sequence that does not fit.
    #[error(
        "calibration sequence {sequence} has {tokens} tokens, but the model's context holds \
         {context}; cut the sequences to at most {context} tokens"
    )]
    SequenceTooLong {
        /// Index of the sequence.
        sequence: usize,
        /// Its length.
        tokens: usize,
        /// What the model can hold.
        context: usize,
    },
    /// A calibration activation that is not finite.
    #[error("input of `{site}` is not finite in calibration sequence {sequence}: {found}")]
    Activation {
        /// The linear whose input it is, or the block.
        site: String,
        /// Index of the sequence.
        sequence: usize,
        /// Where in the activation.
        found: NonFinite,
    },
    /// A model type without a block-wise stream.
    #[error(
        "{what}; block-wise calibration works for decoders, text encoders and Vision Transformers"
    )]
    NotCalibratable {
        /// What was handed in.
        what: String,
    },
    /// Lengths that should agree.
    #[error("{what}: {left} against {right}")]
    Length {
        /// What is compared.
        what: String,
        /// First length.
        left: usize,
        /// Second length.
        right: usize,
    },
    /// A label outside the classes.
    #[error("label {label} of item {item} lies outside the {classes} classes of the model")]
    Label {
        /// Item, counted from 0.
        item: usize,
        /// The label.
        label: usize,
        /// Number of classes.
        classes: usize,
    },
    /// A class that cannot be learned and held out.
    #[error("class {class} has {examples} examples; a head needs at least two of every class")]
    FewExamples {
        /// The class.
        class: usize,
        /// How many there are.
        examples: usize,
    },
    /// A feature that is not finite.
    #[error("feature {column} of item {item} is not finite: the weights or an operation overflow")]
    Feature {
        /// Item, counted from 0.
        item: usize,
        /// Column, counted from 0.
        column: usize,
    },
    /// Two models that share no activation to compare.
    #[error("nothing to compare: {what}")]
    NothingShared {
        /// Why.
        what: String,
    },
    /// A file that cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file with unexpected content.
    #[error("{path}: {problem}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
}

impl Error {
    /// Wraps an I/O error with the path that it concerns.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
