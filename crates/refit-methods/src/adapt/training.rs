//! How a method trains: the parameters that all of them share, and what follows from them.

use clap::Args;
use refit_data::examples::{self, Example, Length};
use refit_nn::config::TransformerConfig;
use refit_nn::ops::{Precision, bf16};
use refit_store::architecture::Kind;
use refit_train::train::schedule::Decay;
use refit_train::train::{OptimizerConfig, Recipe, Schedule};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::inputs::{Inputs, ModelInput, TrainingData};
use crate::method::Plan;

/// The run of a training, whatever is trained.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Training {
    /// Passes over the data.
    #[arg(long, value_name = "N", default_value_t = 1.0)]
    pub epochs: f64,
    /// Updates to make, in place of `epochs`.
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Examples per forward pass.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub batch: usize,
    /// Forward passes whose gradients make one update.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub accumulate: usize,
    /// Learning rate over the run.
    #[arg(long, value_enum, default_value_t)]
    pub schedule: Curve,
    /// Share of the run in which the learning rate rises.
    #[arg(long, value_name = "SHARE", default_value_t = 0.03)]
    pub warmup: f64,
    /// Decoupled weight decay of matrices that train; frozen tensors never decay.
    #[arg(long, default_value_t = 0.0)]
    pub weight_decay: f64,
    /// Rule that turns gradients into updates.
    #[arg(long, value_enum, default_value_t)]
    pub optimizer: Rule,
    /// Largest norm of all gradients together; 0 does not clip.
    #[arg(long, value_name = "NORM", default_value_t = 1.0)]
    pub clip: f64,
    /// Most tokens of one example; plain text is cut into windows of this size. By default 512, or what the model's context
    /// leaves where that is less.
    #[arg(long, value_name = "TOKENS")]
    pub max_length: Option<usize>,
    /// Keep only the inputs of blocks for the backward pass and run each block again there: less memory, more time.
    #[arg(long)]
    pub checkpoint_activations: bool,
    /// Operands of the large matrix products: `bf16` rounds them to bfloat16, which is faster on processors with AVX-512 BF16
    /// (slower elsewhere); sums, weights and optimizer states stay in f32.
    #[arg(long, value_enum, default_value_t)]
    pub precision: Numbers,
    /// Cut records that are longer instead of refusing them.
    #[arg(long)]
    pub truncate: bool,
    /// Updates between checkpoints; an interrupted run goes on from the newest. 0 writes one at the end only.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub checkpoint_every: u64,
}

crate::paper_defaults!(Training);

/// Tokens of an example where nothing else is asked for.
const MAX_LENGTH: usize = 512;

/// Shape of the learning rate.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Curve {
    /// Falls along a straight line to 0.
    #[default]
    Linear,
    /// Falls along half a cosine to 0.
    Cosine,
    /// Stays.
    Constant,
    /// Stays, and falls to 0 in the last fifth.
    Wsd,
    /// Falls as one over the root of the step.
    InverseSqrt,
}

/// Operands of matrix products.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Numbers {
    /// As they are.
    #[default]
    F32,
    /// Rounded to bfloat16.
    Bf16,
}

impl Numbers {
    /// As kernels call it.
    pub fn precision(self) -> Precision {
        match self {
            Self::F32 => Precision::F32,
            Self::Bf16 => Precision::Bf16,
        }
    }
}

/// Optimizer.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// AdamW.
    #[default]
    #[value(name = "adamw")]
    #[serde(rename = "adamw")]
    AdamW,
    /// AdamW with its moments in 8 bits.
    #[value(name = "adamw-8bit")]
    #[serde(rename = "adamw-8bit")]
    AdamW8bit,
    /// Adafactor: moments of matrices as row and column means.
    Adafactor,
    /// Lion: the sign of a momentum.
    Lion,
    /// Gradient descent with momentum 0.9.
    Sgd,
}

impl Rule {
    fn config(self) -> OptimizerConfig {
        match self {
            Self::AdamW => OptimizerConfig::adamw(),
            Self::AdamW8bit => {
                OptimizerConfig::AdamW { betas: (0.9, 0.999), eps: 1e-8, eight_bit: true }
            }
            Self::Adafactor => {
                OptimizerConfig::Adafactor { exponent: 0.8, clip: 1.0, relative: false }
            }
            Self::Lion => OptimizerConfig::Lion { betas: (0.9, 0.99) },
            Self::Sgd => OptimizerConfig::Sgd { momentum: 0.9, nesterov: false },
        }
    }
}

impl Training {
    /// Checks the numbers that no data are needed for.
    ///
    /// # Errors
    /// [`Error::Range`].
    pub fn check(&self, method: &'static str, rate: f64) -> Result<()> {
        let range = |name, value: String, expected: &str| {
            Err(Error::range(method, name, value, expected.to_owned()))
        };
        if !(rate > 0.0 && rate.is_finite()) {
            return range("learning_rate", rate.to_string(), "a number above 0");
        }
        if self.steps == Some(0) {
            return range("steps", "0".into(), "at least 1 update");
        }
        if !(self.epochs > 0.0 && self.epochs.is_finite()) {
            return range("epochs", self.epochs.to_string(), "a number above 0");
        }
        if self.batch == 0 || self.accumulate == 0 {
            return range("batch, accumulate", "0".into(), "at least 1");
        }
        if !(0.0..1.0).contains(&self.warmup) {
            return range(
                "warmup",
                self.warmup.to_string(),
                "a share from 0 up to but not including 1",
            );
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return range("weight_decay", self.weight_decay.to_string(), "0 or more");
        }
        if !(self.clip >= 0.0 && self.clip.is_finite()) {
            return range("clip", self.clip.to_string(), "a norm above 0, or 0 for none");
        }
        if let Some(few @ 0..2) = self.max_length {
            return range("max_length", few.to_string(), "at least 2 tokens");
        }
        Ok(())
    }

    /// Updates for `examples` examples.
    pub fn steps(&self, examples: usize) -> u64 {
        let per_update = (self.batch * self.accumulate) as f64;
        let passes = (examples as f64 * self.epochs / per_update).ceil() as u64;
        self.steps.unwrap_or(passes).max(1)
    }

    /// The trainer's recipe.
    pub fn recipe(&self, examples: usize, rate: f64, seed: u64) -> Recipe {
        let steps = self.steps(examples);
        let warmup = ((self.warmup * steps as f64).round() as u64).min(steps - 1);
        let schedule = match self.schedule {
            Curve::Linear => Schedule::linear(warmup, 0.0),
            Curve::Cosine => Schedule::cosine(warmup, 0.0),
            Curve::Constant => Schedule::Constant { warmup },
            Curve::Wsd => Schedule::Wsd {
                warmup,
                decay_fraction: 0.2,
                decay: Decay::Linear,
                floor: 0.0,
                period: None,
                rewarm: 0,
            },
            Curve::InverseSqrt => Schedule::InverseSqrt { warmup },
        };
        Recipe {
            accumulate: self.accumulate,
            seed,
            decay: self.weight_decay,
            optimizer: self.optimizer.config(),
            schedule,
            clip: (self.clip > 0.0).then_some(self.clip),
            // A tuned model starts near its best: twice that loss, for as long as the guard waits, is no noise.
            divergence: 2.0,
            ..Recipe::new(steps, rate)
        }
    }
}

/// The examples of a language model.
///
/// # Errors
/// A model that is no language model or has no forward pass, a tokenizer that does not fit, a limit above the context, data
/// that cannot be used (each with file and line).
pub fn examples(
    method: &'static str,
    inputs: &Inputs,
    training: &Training,
    reserved: usize,
) -> Result<Vec<Example>> {
    let model = &inputs.models[0];
    let config = language_model(method, model)?;
    let room = config.context.saturating_sub(reserved);
    let most = training.max_length.unwrap_or(MAX_LENGTH.min(room));
    if most > room || room < 2 {
        let expected = match reserved {
            0 => format!("at most the model's context of {room} tokens"),
            _ => format!(
                "at most {room} tokens: the context of {} less {reserved} virtual ones",
                config.context
            ),
        };
        return Err(Error::range(method, "max_length", most, expected));
    }
    let tokenizer = model.tokenizer()?;
    let length = Length { max: most, truncate: training.truncate };
    let mut all = Vec::new();
    for data in &inputs.data {
        all.extend(match data {
            TrainingData::Records(records) => examples::from_records(&tokenizer, records, length)?,
            TrainingData::Text(text) => {
                examples::from_text(&tokenizer, &text.source, &text.text, length)?
            }
        });
    }
    if all.is_empty() {
        return Err(Error::MissingData {
            method,
            what: "training data".into(),
            how: "--data FILE",
        });
    }
    Ok(all)
}

/// The config of a language model that can be run.
///
/// # Errors
/// Other kinds of models, and model types without a forward pass.
pub fn language_model(method: &'static str, model: &ModelInput) -> Result<TransformerConfig> {
    let architecture = model.artifact.architecture();
    if architecture.kind != Kind::Decoder {
        return Err(Error::Conflict {
            method,
            problem: format!("{} is no language model, and `{method}` trains one", model.source),
        });
    }
    Ok(TransformerConfig::read(model.artifact.config())?)
}

/// What training adds to a plan: memory and words.
pub fn describe(
    plan: &mut Plan,
    model: &ModelInput,
    config: &TransformerConfig,
    training: &Training,
    examples: &[Example],
    trained: u64,
) {
    let tokens: usize = examples.iter().map(|example| example.ids.len()).sum();
    let longest = examples.iter().map(|example| example.ids.len()).max().unwrap_or(0);
    let steps = training.steps(examples.len());
    plan.steps.push(format!(
        "train {trained} parameters for {steps} updates of {} examples ({} examples, {tokens} tokens in all)",
        training.batch * training.accumulate,
        examples.len()
    ));
    if training.precision == Numbers::Bf16 && !bf16::native() {
        plan.warnings.push(
            "this processor has no bfloat16 instructions: --precision bf16 gives the same result as where it has, and is \
             slower than f32"
                .into(),
        );
    }
    let weights: u64 = model.artifact.tensors().iter().map(|info| info.numel() as u64).sum();
    let rows = (training.batch * longest) as u64;
    // Per token and block: residual, two norms, q, k, v, heads, gate, up, their product, and what the backward pass adds.
    let width = (8 * config.hidden + 4 * config.intermediate) as u64;
    let activations = 4 * rows * width * config.layers as u64;
    let states = match training.optimizer {
        Rule::AdamW => 8,
        Rule::AdamW8bit => 2,
        Rule::Lion | Rule::Sgd => 4,
        Rule::Adafactor => 1,
    };
    let logits = 16 << 20;
    plan.peak_memory = 4 * weights + activations + (8 + states) * trained + logits + (64 << 20);
}
