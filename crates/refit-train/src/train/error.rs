//! Errors of training.

use std::path::PathBuf;

use thiserror::Error;

/// Shorthand for results of training.
pub type Result<T, E = TrainError> = std::result::Result<T, E>;

/// What can go wrong while a model is trained.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A setting that cannot work.
    #[error("{setting} = {found}: {expected}")]
    Setting {
        /// The setting's name.
        setting: &'static str,
        /// Its value.
        found: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// A pattern that matches no parameter.
    #[error("no parameter matches `{pattern}`; the nearest names are {}", nearest.join(", "))]
    Pattern {
        /// The pattern.
        pattern: String,
        /// Similar names.
        nearest: Vec<String>,
    },
    /// Everything is frozen.
    #[error("the scope freezes all {parameters} parameters; let at least one pattern train")]
    NothingTrains {
        /// Parameters of the model.
        parameters: usize,
    },
    /// Two parameters of one name.
    #[error(
        "two parameters are called `{name}`; names key the optimizer's state and must be unique"
    )]
    Duplicate {
        /// The name.
        name: String,
    },
    /// The objective failed.
    #[error("step {step}: {source}")]
    Objective {
        /// Step, counted from 0.
        step: u64,
        /// What it said.
        source: crate::BoxError,
    },
    /// The objective gave no loss.
    #[error("step {step}: the objective returned no loss term")]
    NoTerms {
        /// Step, counted from 0.
        step: u64,
    },
    /// A gradient that comes in parts while gradients are consumed one by one.
    #[error(
        "step {step}: the objective uses `{name}` more than once, so that its gradient comes in parts, which `per_layer` cannot \
         project one by one; nothing was updated: train without `per_layer`"
    )]
    Parts {
        /// Step, counted from 0.
        step: u64,
        /// The parameter.
        name: String,
    },
    /// A loss or gradient that is not a number.
    #[error("step {step}: {what} is {value}; nothing was updated{}", go_on(last_good))]
    NonFinite {
        /// Step, counted from 0.
        step: u64,
        /// Which loss term, or "the gradient of TENSOR".
        what: String,
        /// The value.
        value: f64,
        /// The newest checkpoint.
        last_good: Option<PathBuf>,
    },
    /// The loss runs away.
    #[error(
        "step {step}: the loss has been above {limit:.4} for {patience} steps (now {loss:.4}, best {best:.4}): \
         training diverges; lower the learning rate or lengthen the warm-up{}",
        go_on(last_good)
    )]
    Diverged {
        /// Step, counted from 0.
        step: u64,
        /// Loss of that step.
        loss: f64,
        /// Best smoothed loss so far.
        best: f64,
        /// The limit that was passed.
        limit: f64,
        /// Steps above it.
        patience: u64,
        /// The newest checkpoint.
        last_good: Option<PathBuf>,
    },
    /// Another rank failed: its own error says why.
    #[error("process {rank} failed, and this one ended with it")]
    Peer {
        /// The lowest rank that failed.
        rank: usize,
    },
    /// Ranks that do not hold the same.
    #[error(
        "process {rank} does not have the {what} of process 0: all must run the same refit on the same files with the same \
         arguments"
    )]
    Replica {
        /// What differs.
        what: &'static str,
        /// The first rank where it does.
        rank: usize,
    },
    /// Ranks that cannot be connected.
    #[error("the processes cannot be connected: {problem}")]
    Launch {
        /// What is wrong.
        problem: String,
    },
    /// A checkpoint of another run.
    #[error("{path}: {problem}")]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What does not fit, and what to do.
        problem: String,
    },
    /// A file that cannot be read or written.
    #[error("{path}: {source}; the last complete checkpoint is untouched")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

fn go_on(last_good: &Option<PathBuf>) -> String {
    match last_good {
        Some(path) => format!("; the last good state is {}", path.display()),
        None => "; no checkpoint had been written yet".into(),
    }
}

impl TrainError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
