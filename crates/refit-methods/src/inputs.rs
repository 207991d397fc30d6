//! What is handed to a method: opened models, text, labelled examples.

use std::path::Path;
use std::sync::Arc;

use refit_data::{Records, Tokenizer};
use refit_store::Artifact;
use refit_store::adapter::Adapter;

use crate::error::{Error, Result};
pub use crate::labelled::Labelled;
use crate::method::{Info, Need};

/// Everything that a method reads.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// The models, in the order given; the first one's configuration and tokenizer go along.
    pub models: Vec<ModelInput>,
    /// Which of the models is the base of the others, where the method takes one.
    pub base: Option<usize>,
    /// Plain text: calibration or held-out, as the method's description says.
    pub text: Vec<TextData>,
    /// Labelled examples.
    pub labelled: Option<Labelled>,
    /// What the model is to learn.
    pub data: Vec<TrainingData>,
    /// Adapters, in the order given.
    pub adapters: Vec<AdapterInput>,
}

/// One model.
#[derive(Clone, Debug)]
pub struct ModelInput {
    /// What the user typed: a path or a source string. Messages use it.
    pub source: String,
    /// The opened artifact.
    pub artifact: Arc<Artifact>,
}

impl ModelInput {
    /// Opens the artifact at `path`, to be called `source` in messages.
    ///
    /// # Errors
    /// Whatever is wrong with the files.
    pub fn open(source: impl Into<String>, path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self { source: source.into(), artifact: Arc::new(Artifact::open(path)?) })
    }
}

impl ModelInput {
    /// The tokenizer that travels with the model, checked against its embedding.
    ///
    /// # Errors
    /// No tokenizer, one that does not parse, or one with ids that the embedding has no rows for.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokenizer = Tokenizer::from_artifact(&self.artifact)?;
        if let Some(rows) = self.artifact.architecture().dims.vocab {
            tokenizer.check_embedding(rows)?;
        }
        Ok(tokenizer)
    }
}

/// One text.
#[derive(Clone, Debug)]
pub struct TextData {
    /// The file or source, for messages and lineage.
    pub source: String,
    /// Its content.
    pub text: String,
}

/// One adapter.
#[derive(Clone, Debug)]
pub struct AdapterInput {
    /// What the user typed.
    pub source: String,
    /// The opened adapter.
    pub adapter: Arc<Adapter>,
}

/// One file of training data.
#[derive(Clone, Debug)]
pub enum TrainingData {
    /// A table: one example per row.
    Records(Arc<Records>),
    /// Plain text.
    Text(TextData),
}

impl TrainingData {
    /// The file or source, for messages and lineage.
    pub fn source(&self) -> String {
        match self {
            Self::Records(records) => records.path().display().to_string(),
            Self::Text(text) => text.source.clone(),
        }
    }

    /// How much it is, in words.
    pub fn size(&self) -> String {
        match self {
            Self::Records(records) => format!("{} records", records.len()),
            Self::Text(text) => format!("{} bytes of text", text.text.len()),
        }
    }

    /// SHA-256 of the content as it was read.
    pub fn sha256(&self) -> String {
        match self {
            Self::Text(text) => refit_store::hash::hex(text.text.as_bytes()),
            Self::Records(records) => {
                let mut all = records.columns().join("\t");
                for row in records.rows() {
                    for value in &row.values {
                        all.push('\n');
                        all.push_str(&value.to_string());
                    }
                }
                refit_store::hash::hex(all.as_bytes())
            }
        }
    }
}

impl Inputs {
    /// The models beside the base, by their place.
    pub fn beside_base(&self) -> impl Iterator<Item = usize> {
        let base = self.base;
        (0..self.models.len()).filter(move |at| Some(*at) != base)
    }

    /// Checks the number of models and the presence of data against a method's description.
    ///
    /// # Errors
    /// [`Error::ModelCount`], [`Error::MissingData`] or [`Error::BadData`] for empty text.
    pub fn check(&self, info: &Info) -> Result<()> {
        let (spec, given) = (info.inputs, self.beside_base().count());
        match (spec.base, self.base) {
            (Need::Required, None) => {
                return Err(Error::MissingData {
                    method: info.name,
                    what: "the base that the models were fine-tuned from".to_owned(),
                    how: "--base MODEL (in a recipe, `base`)",
                });
            }
            (Need::No, Some(base)) => {
                let problem = format!(
                    "{} takes no base; give it among the models, or leave it out",
                    info.name
                );
                return Err(Error::BadData {
                    source_name: self.models[base].source.clone(),
                    problem,
                });
            }
            _ => {}
        }
        if let (Need::No, Some(adapter)) = (spec.adapters, self.adapters.first()) {
            let problem = format!(
                "this is an adapter, and {} takes models; merge it into its base first: refit apply merge-adapter MODEL {} \
                 -o OUT",
                info.name, adapter.source
            );
            return Err(Error::BadData { source_name: adapter.source.clone(), problem });
        }
        if given < spec.min_models || spec.max_models.is_some_and(|max| given > max) {
            let models = |count: usize| match count {
                0 => "no model".to_owned(),
                1 => "1 model".to_owned(),
                n => format!("{n} models"),
            };
            let beside = match spec.base {
                Need::No => "",
                _ => " beside the base",
            };
            let expected = match spec.max_models {
                Some(max) if max == spec.min_models => format!("exactly {}", models(max)),
                Some(max) => format!("{} to {}", spec.min_models, models(max)),
                None => format!("at least {}", models(spec.min_models)),
            } + beside;
            let given = models(given) + if given > 1 { " were" } else { " was" };
            return Err(Error::ModelCount { method: info.name, expected, given });
        }
        if spec.text == Need::Required && self.text.is_empty() {
            let what = spec.data_role.to_owned();
            return Err(Error::MissingData { method: info.name, what, how: "--text FILE" });
        }
        if spec.labelled == Need::Required && self.labelled.is_none() {
            let what = spec.data_role.to_owned();
            return Err(Error::MissingData { method: info.name, what, how: "--labelled PATH" });
        }
        if spec.data == Need::Required && self.data.is_empty() {
            let what = "examples to learn from".to_owned();
            return Err(Error::MissingData { method: info.name, what, how: "--data FILE" });
        }
        if spec.adapters == Need::Required && self.adapters.is_empty() {
            return Err(Error::MissingData {
                method: info.name,
                what: "an adapter beside the model".to_owned(),
                how: "its directory after the model",
            });
        }
        if let Some(empty) = self.text.iter().find(|text| text.text.trim().is_empty()) {
            let problem = "the text is empty; give a file with words in it".to_owned();
            return Err(Error::BadData { source_name: empty.source.clone(), problem });
        }
        Ok(())
    }
}
