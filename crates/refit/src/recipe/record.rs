//! `run.json`: everything a run measured, in one file that programs read and `refit report` draws.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::failure::{Failure, Result};

/// The layout of `run.json`; a file with another number is refused by name.
pub const SCHEMA: u32 = 1;

/// One finished (or interrupted) run of a recipe.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RunRecord {
    /// Layout of this file, [`SCHEMA`].
    pub schema: u32,
    /// Version of refit that wrote it.
    pub refit: String,
    /// Name of the recipe and of its run directory.
    pub name: String,
    /// Heading of the report.
    pub title: String,
    /// What the recipe does, in a sentence or two.
    #[serde(default)]
    pub summary: String,
    /// Path of the recipe as it was given.
    pub recipe: String,
    /// SHA-256 of the recipe's text.
    pub recipe_sha256: String,
    /// Seed of every random choice.
    pub seed: u64,
    /// What a reader must know, such as a fallback that was taken.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Where it ran.
    pub machine: Machine,
    /// Steps in order.
    pub steps: Vec<StepRecord>,
    /// Models that were read or written.
    pub artifacts: Vec<ArtifactRecord>,
    /// Tables of measurements.
    pub evaluations: Vec<Evaluation>,
    /// Pairs that the recipe asks to set side by side.
    #[serde(default)]
    pub contests: Vec<Contest>,
    /// Wall time of all steps, those that were skipped counted with the time they once took.
    pub seconds: f64,
    /// Largest resident memory of the process, in bytes.
    pub peak_memory: Option<u64>,
}

/// The machine of a run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Machine {
    /// Processor name.
    pub cpu: String,
    /// Instruction sets that kernels can use, such as `avx2`.
    pub features: Vec<String>,
    /// Logical processors.
    pub cores: usize,
    /// Worker threads used.
    pub threads: usize,
    /// Installed memory, in bytes.
    pub memory: Option<u64>,
    /// Operating system and processor family.
    pub system: String,
    /// Device that ran the models.
    pub device: String,
}

/// One step of a run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StepRecord {
    /// Name of its output.
    pub name: String,
    /// `pull`, `apply`, `eval` or `report`.
    pub kind: String,
    /// Hash of inputs and parameters: a step with the same one is not done again.
    pub identity: String,
    /// Wall time in seconds, when it was last really done.
    pub seconds: f64,
    /// True when this run found it finished.
    pub reused: bool,
    /// The same thing as a command line.
    pub command: String,
}

/// A model of a run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ArtifactRecord {
    /// Name in the recipe.
    pub name: String,
    /// Label in tables and charts.
    pub label: String,
    /// Arms of one group are drawn together.
    pub group: String,
    /// Where it lies; relative to the run directory when refit wrote it there.
    pub path: String,
    /// The source it was pulled from, for originals.
    #[serde(default)]
    pub source: Option<String>,
    /// The method that made it.
    #[serde(default)]
    pub method: Option<String>,
    /// All parameters of the method.
    #[serde(default)]
    pub parameters: Value,
    /// Names of the models it was made from.
    #[serde(default)]
    pub parents: Vec<String>,
    /// BLAKE3 over names, types, shapes and bytes of all tensors.
    pub content_hash: String,
    /// Number of parameters.
    pub parameter_count: u64,
    /// Bytes of the tensors on disk.
    pub bytes: u64,
    /// Bytes that the weights need in their packed form (codes and scales, or non-zeros and mask).
    #[serde(default)]
    pub packed_bytes: Option<u64>,
    /// Average bits per weight over the tensors that the method changed.
    #[serde(default)]
    pub bits_per_weight: Option<f64>,
    /// Share of zeros in the tensors that the method changed.
    #[serde(default)]
    pub sparsity: Option<f64>,
    /// Seconds that making it took.
    pub seconds: f64,
    /// What the method reported.
    #[serde(default)]
    pub report: Value,
}

/// One table of measurements: several models on the same text.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Evaluation {
    /// Name in the recipe.
    pub name: String,
    /// The text, in words.
    pub text: String,
    /// SHA-256 of the text.
    pub text_sha256: String,
    /// Tokens per window.
    pub window: usize,
    /// Name of the model that KL is measured against.
    pub reference: Option<String>,
    /// One row per model.
    pub arms: Vec<Arm>,
}

/// One model's row.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Arm {
    /// Name of the model in the recipe.
    pub artifact: String,
    /// exp(mean negative log-likelihood).
    pub perplexity: f64,
    /// Mean negative log-likelihood per scored token, in nats.
    pub nll: f64,
    /// 95 % interval of the perplexity over windows.
    #[serde(default)]
    pub interval: Option<[f64; 2]>,
    /// Mean KL(reference || model) per token, in nats.
    pub kl_to_reference: Option<f64>,
    /// Share of tokens where both models put the same token first.
    #[serde(default)]
    pub top1_agreement: Option<f64>,
    /// Scored tokens.
    pub tokens: u64,
    /// Tokens per second of the forward pass.
    pub tokens_per_second: f64,
    /// Mean negative log-likelihood of each window, for paired comparisons.
    #[serde(default)]
    pub window_nll: Vec<f64>,
}

/// Two arms side by side.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Contest {
    /// What is held equal, such as "3.25 bits per weight".
    pub title: String,
    /// The rival's name.
    pub baseline: String,
    /// The method's name.
    pub candidate: String,
    /// 95 % interval of the difference of mean negative log-likelihoods (candidate - baseline).
    #[serde(default)]
    pub difference: Option<[f64; 2]>,
}

impl RunRecord {
    /// Reads `run.json` from a run directory, or the file itself.
    pub fn read(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { path.join("run.json") } else { path.to_owned() };
        let text = std::fs::read_to_string(&file).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => Failure::usage(format!(
                "{}: no run here, nor a model or adapter that a method wrote; `refit run RECIPE` writes run.json into its run directory",
                file.display()
            )),
            _ => Failure::io(&file, "read", &source),
        })?;
        let bad = |reason: String| Failure::usage(format!("{}: {reason}", file.display()));
        let value: Value = serde_json::from_str(&text)
            .map_err(|e| bad(format!("line {}: not valid JSON: {e}", e.line())))?;
        match value["schema"].as_u64() {
            Some(found) if found == u64::from(SCHEMA) => {}
            Some(found) => {
                let known = format!("this refit reads schema {SCHEMA}");
                return Err(bad(format!(
                    "run.json has schema {found}; {known}; run the recipe again"
                )));
            }
            None => return Err(bad("not a run.json: it has no `schema` number".into())),
        }
        serde_json::from_value(value).map_err(|e| bad(format!("not a complete run.json: {e}")))
    }

    /// The model of that name.
    pub fn artifact(&self, name: &str) -> Option<&ArtifactRecord> {
        self.artifacts.iter().find(|artifact| artifact.name == name)
    }

    /// A model's row in the first table that has one.
    pub fn arm(&self, name: &str) -> Option<&Arm> {
        self.evaluations.iter().flat_map(|e| &e.arms).find(|arm| arm.artifact == name)
    }

    /// Label of a model, or its name when it has none.
    pub fn label<'a>(&'a self, name: &'a str) -> &'a str {
        match self.artifact(name) {
            Some(artifact) if !artifact.label.is_empty() => &artifact.label,
            _ => name,
        }
    }
}
