//! Model cards: `README.md` with a YAML head that the Hugging Face hub reads, machine sections between markers,
//! and whatever people wrote around them.
//!
//! Machine facts live in the head (under `refit:`), the sections are drawn from it, and everything outside the
//! markers belongs to people and survives a new rendering. A fact that cannot be known is listed as unknown
//! with the reason; nothing is filled in with prose that says nothing.

mod licence;
mod render;
mod yaml;

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

pub use licence::{HUB_LICENCES, licence_union};

use crate::architecture::Architecture;
use crate::artifact::Format;
use crate::error::{Error, Result};
use crate::lineage::{DataUse, FileRecord, Lineage, Measurement};

/// Name of the card in a model directory.
pub const FILE_NAME: &str = "README.md";

/// A fact, or the reason why it is not known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fact<T> {
    /// Known.
    Known(T),
    /// Not known, and why.
    Unknown(String),
}

impl<T> Fact<T> {
    /// The value, if known.
    pub fn known(&self) -> Option<&T> {
        match self {
            Self::Known(value) => Some(value),
            Self::Unknown(_) => None,
        }
    }

    /// Known if there is a value, else unknown for this reason.
    pub fn or_unknown(value: Option<T>, reason: impl Into<String>) -> Self {
        value.map_or_else(|| Self::Unknown(reason.into()), Self::Known)
    }
}

/// How an artifact relates to the one it was made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Relation {
    /// Low-rank or other adapter on top of the base.
    Adapter,
    /// Merge of several models.
    Merge,
    /// Fewer bits per weight.
    Quantized,
    /// Tuned further.
    Finetune,
    /// Weights removed.
    Pruned,
    /// Full matrices replaced by thin factors.
    Factorized,
    /// Records or concepts removed.
    Unlearned,
    /// The same weights in another file format.
    Converted,
}

impl Relation {
    /// The hub's word; it has none of its own for pruned, factorized, unlearned and converted models.
    pub fn hub(self) -> &'static str {
        match self {
            Self::Adapter => "adapter",
            Self::Merge => "merge",
            Self::Quantized => "quantized",
            Self::Finetune
            | Self::Pruned
            | Self::Factorized
            | Self::Unlearned
            | Self::Converted => "finetune",
        }
    }
}

/// What it took to make the artifact.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Resources {
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Largest resident memory in bytes.
    pub peak_memory: u64,
    /// Device and number of threads, in words.
    pub machine: String,
}

/// Everything that refit says about an artifact.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// Name of the artifact; the title.
    pub name: String,
    /// Licence, as the hub spells it.
    pub license: Fact<String>,
    /// Why the licences of the parents do not go together, one sentence each.
    #[serde(default)]
    pub license_conflicts: Vec<String>,
    /// Sources or hub names of the parents.
    #[serde(default)]
    pub base_models: Vec<String>,
    /// How it relates to them; `None` for a model made from nothing.
    #[serde(default)]
    pub relation: Option<Relation>,
    /// Library that opens it.
    pub library: String,
    /// Tags for search.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Family and kind, in words.
    pub architecture: Fact<String>,
    /// File format of the weights.
    pub format: Fact<String>,
    /// Parameters by element type.
    pub parameters: Fact<BTreeMap<String, u64>>,
    /// Weight files with their hashes.
    #[serde(default)]
    pub files: Vec<FileRecord>,
    /// Method that made it.
    pub method: Fact<String>,
    /// Its parameters.
    #[serde(default)]
    pub method_parameters: Map<String, Json>,
    /// Version of refit.
    pub refit_version: String,
    /// Data that was used, or why there is none.
    pub data: Fact<Vec<DataUse>>,
    /// What was measured, before and after.
    pub measurements: Fact<Vec<Measurement>>,
    /// What it took.
    pub resources: Fact<Resources>,
    /// What it is meant for.
    pub intended_use: Fact<String>,
    /// What it is known not to do, or what it must not be used for.
    pub limits: Fact<String>,
    /// Checks that ran, with their outcome, one line each.
    #[serde(default)]
    pub checks: Vec<String>,
    /// One command that makes it again.
    pub reproduce: Fact<String>,
    /// Keys of the head that refit does not know; people's or other tools'.
    #[serde(skip)]
    pub extra: Map<String, Json>,
    /// Text outside the markers, by the section that it follows (empty name: before the first).
    #[serde(skip)]
    pub human: BTreeMap<String, String>,
}

/// How much of a card is filled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Completeness {
    /// Required fields with a value.
    pub filled: usize,
    /// Required fields.
    pub required: usize,
    /// The others, with the reason.
    pub unknown: Vec<(String, String)>,
}

impl Completeness {
    /// Filled fields over required ones.
    pub fn score(&self) -> f64 {
        self.filled as f64 / self.required as f64
    }
}

impl Card {
    /// A card on which nothing is known yet but the name.
    pub fn new(name: impl Into<String>) -> Self {
        fn unknown<T>(reason: &str) -> Fact<T> {
            Fact::Unknown(reason.to_owned())
        }
        Self {
            name: name.into(),
            license: unknown("no parent states a licence"),
            license_conflicts: Vec::new(),
            base_models: Vec::new(),
            relation: None,
            library: "transformers".to_owned(),
            tags: vec!["refit".to_owned()],
            architecture: unknown("the artifact was not inspected"),
            format: unknown("the artifact was not inspected"),
            parameters: unknown("the artifact was not inspected"),
            files: Vec::new(),
            method: unknown("not made by a refit method"),
            method_parameters: Map::new(),
            refit_version: env!("CARGO_PKG_VERSION").to_owned(),
            data: unknown("no data use was recorded"),
            measurements: unknown("nothing was measured; `refit eval` measures"),
            resources: unknown("time and memory were not recorded"),
            intended_use: unknown("only the author can say; write it below"),
            limits: unknown("only the author can say; write it below"),
            checks: Vec::new(),
            reproduce: unknown("no command was recorded"),
            extra: Map::new(),
            human: BTreeMap::new(),
        }
    }

    /// Takes over what a manifest says: method, parameters, parents, data, measurements, files, command.
    pub fn from_lineage(name: impl Into<String>, lineage: &Lineage) -> Self {
        let mut card = Self::new(name);
        card.take_lineage(lineage);
        card
    }

    /// Replaces the facts that a manifest carries.
    pub fn take_lineage(&mut self, lineage: &Lineage) {
        self.method = Fact::Known(lineage.method.clone());
        self.method_parameters = lineage.parameters.as_object().cloned().unwrap_or_default();
        self.refit_version.clone_from(&lineage.refit);
        self.base_models = lineage.parents.iter().map(|parent| parent.source.clone()).collect();
        self.data = Fact::Known(lineage.data.clone());
        if !lineage.measurements.is_empty() {
            self.measurements = Fact::Known(lineage.measurements.clone());
        }
        self.files.clone_from(&lineage.outputs);
        if let Some(command) = &lineage.command {
            self.reproduce = Fact::Known(command.clone());
        }
    }

    /// Fills in what the weights show: architecture, file format, and the number of elements by element type,
    /// from each tensor's type and number of elements.
    pub fn take_weights(
        &mut self,
        architecture: &Architecture,
        format: Format,
        tensors: impl IntoIterator<Item = (String, u64)>,
    ) {
        let inferred = if architecture.inferred { " (inferred)" } else { "" };
        let summary = architecture.summary.trim();
        self.architecture =
            Fact::Known(format!("{}{inferred}: {summary}", architecture.model_type));
        self.format = Fact::Known(format!("{format:?}").to_lowercase());
        let mut census = BTreeMap::new();
        for (dtype, elements) in tensors {
            *census.entry(dtype).or_default() += elements;
        }
        self.parameters = Fact::Known(census);
    }

    /// The whole `README.md`. The same card gives the same bytes.
    pub fn render(&self) -> String {
        render::render(self)
    }

    /// Reads a card. A `README.md` that refit did not write gives a card on which only its head and text are
    /// known.
    ///
    /// # Errors
    /// When the head is not plain YAML (anchors, aliases and tags are refused) or `refit:` in it is not a card.
    pub fn parse(text: &str) -> Result<Self> {
        render::parse(Path::new(FILE_NAME), text)
    }

    /// The card of a model directory; `None` where there is none.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE_NAME);
        match std::fs::read_to_string(&path) {
            Ok(text) => render::parse(&path, &text).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(&path, "read", error)),
        }
    }

    /// Takes over what people wrote in an older card: text outside the markers, unknown keys of the head, and
    /// facts that only people can know.
    pub fn merge_human(&mut self, older: &Self) {
        fn keep<T: Clone>(mine: &mut Fact<T>, theirs: &Fact<T>) {
            if mine.known().is_none() && theirs.known().is_some() {
                *mine = theirs.clone();
            }
        }
        self.human.clone_from(&older.human);
        for (key, value) in &older.extra {
            self.extra.entry(key.clone()).or_insert_with(|| value.clone());
        }
        keep(&mut self.license, &older.license);
        keep(&mut self.intended_use, &older.intended_use);
        keep(&mut self.limits, &older.limits);
    }

    /// Which required fields are filled.
    pub fn completeness(&self) -> Completeness {
        fn state<T>(fact: &Fact<T>) -> Option<String> {
            match fact {
                Fact::Known(_) => None,
                Fact::Unknown(reason) => Some(reason.clone()),
            }
        }
        let listed = |empty: bool, reason: &str| empty.then(|| reason.to_owned());
        let fields = [
            ("license", state(&self.license)),
            ("base_models", listed(self.base_models.is_empty(), "no parent was recorded")),
            ("relation", listed(self.relation.is_none(), "no relation to a parent was recorded")),
            ("architecture", state(&self.architecture)),
            ("format", state(&self.format)),
            ("parameters", state(&self.parameters)),
            ("files", listed(self.files.is_empty(), "no file was hashed")),
            ("method", state(&self.method)),
            ("data", state(&self.data)),
            ("measurements", state(&self.measurements)),
            ("resources", state(&self.resources)),
            ("intended_use", state(&self.intended_use)),
            ("limits", state(&self.limits)),
            ("reproduce", state(&self.reproduce)),
        ];
        let required = fields.len();
        let unknown: Vec<_> = fields
            .into_iter()
            .filter_map(|(name, reason)| Some((name.to_owned(), reason?)))
            .collect();
        Completeness { filled: required - unknown.len(), required, unknown }
    }
}
