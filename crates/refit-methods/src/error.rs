//! What can go wrong between a method and its inputs. Each message names the tensor, the parameter
//! or the model, says what was expected, and what to do.

use std::path::PathBuf;

/// This crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// This crate's errors.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No method of that name.
    #[error("there is no method `{name}`{}; methods: {known}", did_you_mean(.suggestion))]
    UnknownMethod {
        /// What was asked for.
        name: String,
        /// The nearest name.
        suggestion: Option<String>,
        /// All names.
        known: String,
    },
    /// A recipe key that the method does not have.
    #[error("{method}: unknown parameter `{key}`{}; parameters: {known}", did_you_mean(.suggestion))]
    UnknownParameter {
        /// The method.
        method: &'static str,
        /// The key as written.
        key: String,
        /// The nearest parameter.
        suggestion: Option<String>,
        /// All parameters.
        known: String,
    },
    /// A recipe key given twice, once with `-` and once with `_`.
    #[error("{method}: parameter `{key}` is given twice (once with `-`, once with `_`); keep one")]
    DuplicateParameter {
        /// The method.
        method: &'static str,
        /// The parameter.
        key: String,
    },
    /// A model that another process wrote to while it was read.
    #[error(
        "{model}: its weight files changed while they were read, so the output is of no use; run again when nothing \
         writes to them"
    )]
    Changed {
        /// The model's source.
        model: String,
    },
    /// A recipe gives something else than `key: value` pairs.
    #[error("{method}: expected parameters as `name: value` pairs, found `{found}`")]
    NotAMapping {
        /// The method.
        method: &'static str,
        /// What was there.
        found: String,
    },
    /// A parameter of the wrong type.
    #[error("{method}: {source}; `refit show {method}` lists parameters and types")]
    Parameters {
        /// The method.
        method: &'static str,
        /// What serde says.
        source: serde_json::Error,
    },
    /// Flags that clap does not accept.
    #[error("{method}: {source}")]
    Flags {
        /// The method.
        method: &'static str,
        /// What clap says.
        source: Box<clap::Error>,
    },
    /// A parameter outside its range.
    #[error("{method}: {name} = {value} is not possible: {expected}")]
    Range {
        /// The method.
        method: &'static str,
        /// The parameter.
        name: &'static str,
        /// Its value.
        value: String,
        /// What would be.
        expected: String,
    },
    /// Two parameters that contradict each other.
    #[error("{method}: {problem}")]
    Conflict {
        /// The method.
        method: &'static str,
        /// Which, and how to decide.
        problem: String,
    },
    /// Too few or too many models.
    #[error("{method} takes {expected}, but {given} given")]
    ModelCount {
        /// The method.
        method: &'static str,
        /// In words.
        expected: String,
        /// In words.
        given: String,
    },
    /// Data that the method needs and did not get.
    #[error("{method} needs {what}: give {how}")]
    MissingData {
        /// The method.
        method: &'static str,
        /// What for.
        what: String,
        /// How to give it.
        how: &'static str,
    },
    /// Data that cannot be used.
    #[error("{source_name}: {problem}")]
    BadData {
        /// The file or source.
        source_name: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// The model has nothing that the method could change.
    #[error("{model}: no {what} found ({advice})")]
    NothingToDo {
        /// The model.
        model: String,
        /// What was looked for.
        what: &'static str,
        /// What to do.
        advice: String,
    },
    /// A group size that does not divide a row.
    #[error(
        "tensor `{tensor}`: in = {inputs} is not divisible by group = {group}; \
         group sizes that divide it: {divisors}, or `row`"
    )]
    Divisibility {
        /// The tensor.
        tensor: String,
        /// Length of a row.
        inputs: usize,
        /// The group size asked for.
        group: usize,
        /// What would work.
        divisors: String,
    },
    /// A tensor whose values or shape cannot be used.
    #[error("{model}: tensor `{tensor}`: {problem}")]
    Tensor {
        /// The model.
        model: String,
        /// The tensor.
        tensor: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// A scale that cannot move out of a linear's input.
    #[error(
        "{model}: no scale can be moved from the input of `{site}` into what produces it: {problem}"
    )]
    CannotFold {
        /// The model.
        model: String,
        /// The linear.
        site: String,
        /// Why, and what to do.
        problem: String,
    },
    /// A recipe of mergekit that cannot be carried out.
    #[error("mergekit recipe: {at}: {problem}")]
    Recipe {
        /// The key or the entry.
        at: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// Two models that do not fit together.
    #[error("{first} and {second} do not fit together: {problem}")]
    Mismatch {
        /// One model.
        first: String,
        /// The other.
        second: String,
        /// Which tensor or file differs, and how.
        problem: String,
    },
    /// A method that writes an artifact was given no path.
    #[error("no output path: say where the result goes (-o DIR)")]
    NoOutput,
    /// No worker threads.
    #[error("cannot start {wanted} threads: {source}; ask for fewer")]
    Threads {
        /// How many.
        wanted: usize,
        /// What the system says.
        source: rayon::ThreadPoolBuildError,
    },
    /// A file that cannot be read or written.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// From the data crate.
    #[error(transparent)]
    Data(#[from] refit_data::Error),
    /// From running models.
    #[error(transparent)]
    Model(#[from] refit_nn::Error),
    /// From calibration and evaluation.
    #[error(transparent)]
    Train(#[from] refit_train::Error),
    /// From training.
    #[error(transparent)]
    Training(#[from] refit_train::train::TrainError),
    /// From the store.
    #[error(transparent)]
    Store(#[from] refit_store::Error),
}

impl Error {
    /// A parameter outside its range.
    pub fn range(
        method: &'static str,
        name: &'static str,
        value: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::Range { method, name, value: value.to_string(), expected: expected.into() }
    }

    /// A mergekit recipe that cannot be carried out.
    pub fn recipe(at: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Recipe { at: at.into(), problem: problem.into() }
    }

    /// A tensor that cannot be used.
    pub fn tensor(
        model: impl ToString,
        tensor: impl Into<String>,
        problem: impl Into<String>,
    ) -> Self {
        Self::Tensor { model: model.to_string(), tensor: tensor.into(), problem: problem.into() }
    }
}

fn did_you_mean(suggestion: &Option<String>) -> String {
    suggestion.as_ref().map(|name| format!(" (did you mean `{name}`?)")).unwrap_or_default()
}
