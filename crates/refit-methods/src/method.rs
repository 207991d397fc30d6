//! The seam between refit and the literature: what a method is.
//!
//! A method is one struct of parameters that answers three questions, in this order:
//!
//! 1. [`Method::plan`]: can this be done, and what will be written? Every error that a user can
//!    cause is found here, before the work starts.
//! 2. [`Method::run`]: do it. Progress, seed, threads and resumption come from the [`Context`].
//! 3. [`Method::claim`]: how would anyone check the paper's central result, in minutes?
//!
//! The struct derives `clap::Args`, `serde` and `schemars`, so that flags, recipe fields and
//! documentation cannot drift apart; [`paper_defaults!`](crate::paper_defaults) makes clap's
//! defaults the only ones. Adding a method is one file and one line in its family's `mod.rs`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use refit_train::claim::Claim;
use refit_train::train::Ranks;

use crate::error::{Error, Result};
pub use crate::inputs::{AdapterInput, Inputs, Labelled, ModelInput, TextData, TrainingData};

/// One paper's technique: parameters in, an artifact (or a report) out.
///
/// `Default` must come from [`paper_defaults!`](crate::paper_defaults), never be written by hand.
pub trait Method:
    clap::Args
    + Serialize
    + DeserializeOwned
    + JsonSchema
    + Default
    + Clone
    + std::fmt::Debug
    + Send
    + Sync
    + 'static
{
    /// Who wrote it, what it takes, what it gives.
    const INFO: Info;

    /// Checks parameters against inputs and says what [`run`](Method::run) will do.
    ///
    /// # Errors
    /// Everything a user can get wrong: shapes, divisibility, missing data, ranges.
    fn plan(&self, inputs: &Inputs) -> Result<Plan>;

    /// Does what `plan` said.
    ///
    /// # Errors
    /// Failing files, non-finite numbers met on the way, cancelled work.
    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output>;

    /// The paper's central result as a runnable experiment, when there is one.
    fn claim() -> Option<Claim> {
        None
    }
}

/// What is known about a method without running it: one constant per method, from which listings,
/// documentation pages and the advisor follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Info {
    /// What people type, in kebab case (`model-soups`).
    pub name: &'static str,
    /// The name as the paper writes it.
    pub title: &'static str,
    /// What a user gets, in one sentence.
    pub summary: &'static str,
    /// Which folder of this crate it belongs to.
    pub family: Family,
    /// Where it comes from.
    pub paper: Paper,
    /// What must be handed in.
    pub inputs: InputSpec,
    /// What is written.
    pub output: OutputKind,
    /// Its place in the map of the field.
    pub taxonomy: Taxonomy,
}

/// The family of methods, which is also the folder of this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Fewer bits per weight.
    Quantize,
    /// Thin factors instead of full matrices.
    Factorize,
    /// Fewer weights.
    Prune,
    /// One model out of several.
    Merge,
    /// A model that has learned from examples.
    Adapt,
}

impl Family {
    /// The name of the folder.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Quantize => "quantize",
            Self::Factorize => "factorize",
            Self::Prune => "prune",
            Self::Merge => "merge",
            Self::Adapt => "adapt",
        }
    }
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A reference to the literature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Paper {
    /// Full title; empty for folklore that has no paper.
    pub title: &'static str,
    /// Identifier as the field writes it, such as `arXiv:2308.09723`.
    pub reference: &'static str,
    /// Year of the first public version.
    pub year: u16,
}

impl Paper {
    /// Where it can be read, when the reference is an arXiv number.
    pub fn url(&self) -> Option<String> {
        self.reference.strip_prefix("arXiv:").map(|id| format!("https://arxiv.org/abs/{id}"))
    }
}

/// How many models, and which data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct InputSpec {
    /// Fewest models.
    pub min_models: usize,
    /// Most models; `None` means any number.
    pub max_models: Option<usize>,
    /// Plain text: calibration or held-out, as `data_role` says.
    pub text: Need,
    /// Labelled examples.
    pub labelled: Need,
    /// Training data.
    pub data: Need,
    /// Adapters, given among the models.
    pub adapters: Need,
    /// A base model beside the models; its configuration and tokenizer go along.
    pub base: Need,
    /// What the data are for; empty when none are taken.
    pub data_role: &'static str,
}

impl Info {
    /// Does it share its work between ranks? Language models that learn do, as [`adapt::frame`](crate::adapt::frame) has it.
    pub fn trains(&self) -> bool {
        self.inputs.data == Need::Required
    }
}

impl InputSpec {
    /// One model and no data.
    pub const WEIGHTS: Self = Self {
        min_models: 1,
        max_models: Some(1),
        text: Need::No,
        labelled: Need::No,
        data: Need::No,
        adapters: Need::No,
        base: Need::No,
        data_role: "",
    };
    /// One model and calibration text.
    pub const CALIBRATED: Self = Self {
        text: Need::Required,
        data_role: "calibration text: a few thousand tokens like those the model will see",
        ..Self::WEIGHTS
    };
    /// One model and labelled examples: texts as training data, or images.
    pub const CLASSIFIED: Self = Self {
        labelled: Need::Optional,
        data: Need::Optional,
        data_role: "labelled images to learn from",
        ..Self::WEIGHTS
    };
    /// One language model and what it is to learn.
    pub const TUNED: Self = Self {
        text: Need::Optional,
        data: Need::Required,
        data_role: "held-out text: perplexity is measured on it before and after training",
        ..Self::WEIGHTS
    };
}

/// Whether an input is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Need {
    /// Not read.
    No,
    /// Read when given; some parameter values require it.
    Optional,
    /// An error when absent.
    Required,
}

/// What a method leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutputKind {
    /// A model directory in Hugging Face layout.
    Model,
    /// An adapter directory in PEFT layout.
    Adapter,
    /// A report, and nothing on disk unless asked.
    Report,
}

/// A method's place in the compression survey's map (arXiv:2402.09748), and what the advisor must
/// know to rank it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Taxonomy {
    /// From the general to the particular: `["quantization", "post-training", "weight-only"]`.
    pub path: &'static [&'static str],
    /// What it costs beyond reading the weights.
    pub needs: Effort,
    /// What it changes.
    pub touches: &'static [Touches],
    /// Methods that it composes with, by name, applied after this one.
    pub composes_with: &'static [&'static str],
}

/// The cost classes of the survey, cheapest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Effort {
    /// Weights alone.
    None,
    /// Forward passes over a little data.
    Calibration,
    /// Evaluations on held-out data.
    Evaluation,
    /// Gradient steps on a pretrained model.
    FineTuning,
    /// Training from the beginning.
    Retraining,
}

/// What part of a model a method changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Touches {
    /// Values of weights.
    Weights,
    /// Activations at run time.
    Activations,
    /// The decoding cache.
    Cache,
    /// Shapes or wiring.
    Architecture,
}

/// What a run will do, found without doing it. `--dry-run` prints it and lineage records it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Plan {
    /// Name of the method.
    pub method: String,
    /// All parameters, defaults included.
    pub parameters: serde_json::Value,
    /// Tensors of the output, in name order.
    pub tensors: Vec<PlannedTensor>,
    /// Bytes of the tensors that will be written.
    pub output_bytes: u64,
    /// Upper estimate of resident memory, in bytes.
    pub peak_memory: u64,
    /// What the run does, step by step, in plain words.
    pub steps: Vec<String>,
    /// What the method found out about single tensors while it planned, kept for its run.
    #[serde(skip)]
    pub decided: serde_json::Value,
    /// Things that are worth knowing.
    pub notes: Vec<String>,
    /// Things that are probably not what the user wants.
    pub warnings: Vec<String>,
    /// The command line that does this, where it is not `refit apply` with the parameters as flags.
    #[serde(skip)]
    pub command: Option<Vec<String>>,
}

impl Plan {
    /// An empty plan for a method, with its parameters recorded.
    pub fn of<M: Method>(method: &M) -> Self {
        Self {
            method: M::INFO.name.to_owned(),
            parameters: serde_json::to_value(method)
                .expect("invariant: parameters are plain data and always serialize"),
            ..Self::default()
        }
    }

    /// How many tensors are transformed rather than copied.
    pub fn changed(&self) -> usize {
        self.tensors.iter().filter(|tensor| tensor.action != Action::Copy).count()
    }
}

/// One tensor of the output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PlannedTensor {
    /// Name in the Hugging Face layout.
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Element type in the output, as safetensors or GGML spell it.
    pub dtype: String,
    /// Bytes in the output.
    pub bytes: u64,
    /// What happens to it.
    pub action: Action,
}

/// What happens to a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Its bytes are copied, or its values re-encoded in the output's float type.
    Copy,
    /// Its values change.
    Transform,
}

/// Where and how a run happens: everything that is not a parameter of the method and not a model.
#[derive(Clone)]
pub struct Context {
    /// Where the artifact goes; `None` for methods that only report.
    pub out: Option<PathBuf>,
    /// The seed of every random choice.
    pub seed: u64,
    /// Worker threads; 0 means all cores.
    pub threads: usize,
    /// Replace an existing output.
    pub force: bool,
    /// Continue an interrupted run where its journal ends.
    pub resume: bool,
    /// Scratch space for what must not sit in memory.
    pub temp_dir: PathBuf,
    /// Where what is worth computing once is kept: frozen forward passes, in `features`.
    pub cache: PathBuf,
    /// Where progress goes.
    pub progress: Arc<dyn Progress>,
    /// The processes that train together; only methods that train look at it.
    pub ranks: Ranks,
}

impl Context {
    /// A quiet context that writes to `out`, with seed 0 and all cores.
    pub fn new(out: impl Into<PathBuf>) -> Self {
        Self { out: Some(out.into()), ..Self::default() }
    }

    /// The output path.
    ///
    /// # Errors
    /// [`Error::NoOutput`] when the method writes an artifact and no path was given.
    pub fn out(&self) -> Result<&Path> {
        self.out.as_deref().ok_or(Error::NoOutput)
    }

    /// Runs `work` on a pool of [`threads`](Self::threads) workers.
    ///
    /// # Errors
    /// [`Error::Threads`] when the system refuses to start them, or whatever `work` returns.
    pub fn install<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        if self.threads == 0 || self.threads == rayon::current_num_threads() {
            return work();
        }
        rayon::ThreadPoolBuilder::new()
            .num_threads(self.threads)
            .build()
            .map_err(|source| Error::Threads { wanted: self.threads, source })?
            .install(work)
    }
}

impl Default for Context {
    fn default() -> Self {
        Self {
            out: None,
            seed: 0,
            threads: 0,
            force: false,
            resume: true,
            temp_dir: std::env::temp_dir(),
            cache: refit_store::source::cache_root(),
            progress: Arc::new(Quiet),
            ranks: Ranks::default(),
        }
    }
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context")
            .field("out", &self.out)
            .field("seed", &self.seed)
            .field("threads", &self.threads)
            .field("force", &self.force)
            .field("resume", &self.resume)
            .finish_non_exhaustive()
    }
}

/// What a stage of work counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes read or written.
    Bytes,
    /// Tensors finished.
    Tensors,
    /// Blocks of a model finished.
    Blocks,
    /// Tokens seen.
    Tokens,
    /// Models evaluated, steps taken: anything else.
    Steps,
}

/// Receives progress; implemented by the binary as bars, by tests as a log. Calls may come from
/// several threads; stages do not nest.
pub trait Progress: Send + Sync {
    /// A stage begins that will count to `total`.
    fn begin(&self, stage: &str, total: u64, unit: Unit);
    /// `by` more are done.
    fn advance(&self, by: u64);
    /// The stage is over.
    fn end(&self);
    /// What happened in the stage under way, which is a training.
    fn training(&self, _event: &TrainingEvent) {}
    /// A line worth showing now.
    fn note(&self, _message: &str) {}
}

/// What a training says of itself while it runs, between the beginning and the end of its stage.
#[derive(Clone, Debug, PartialEq)]
pub enum TrainingEvent {
    /// It begins, or goes on where an interrupted run stopped.
    Begin {
        /// Updates of the whole run.
        updates: u64,
        /// Parameters that train.
        parameters: u64,
        /// Perplexity of the model on held-out text before the first update, where there is such a text.
        held_out: Option<f64>,
    },
    /// One update was made.
    Update {
        /// Its number, counted from 1.
        update: u64,
        /// Loss before it, mean over its examples, in nats per learned token.
        loss: f64,
        /// Learning rate.
        rate: f64,
        /// Norm of all gradients before clipping.
        grad_norm: f64,
        /// Tokens or examples that were learned from.
        items: usize,
        /// What `items` are: tokens, examples.
        unit: &'static str,
        /// Wall time, in seconds.
        seconds: f64,
    },
    /// Everything up to this update, counted from 1, lies on disk: an interrupted run goes on from there.
    Checkpoint {
        /// The update.
        update: u64,
    },
}

/// Progress that goes nowhere.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn begin(&self, _stage: &str, _total: u64, _unit: Unit) {}
    fn advance(&self, _by: u64) {}
    fn end(&self) {}
}

/// What a run gives back.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Output {
    /// The artifact that was written.
    pub artifact: Option<PathBuf>,
    /// The method's own measurements: a JSON object, saved with the lineage.
    pub report: serde_json::Value,
    /// What was learned on the way that the plan could not know.
    pub warnings: Vec<String>,
}

/// Parses an empty command line, so that clap's `default_value_t` are the only defaults there are.
///
/// Used by [`paper_defaults!`](crate::paper_defaults); a parameter without a default must be an
/// `Option` or a `bool`.
#[doc(hidden)]
pub fn defaults_from_clap<A: clap::Args>() -> A {
    let command = A::augment_args(clap::Command::new("defaults").no_binary_name(true));
    let matches = command
        .try_get_matches_from(std::iter::empty::<&str>())
        .expect("invariant: every parameter has a default, so an empty command line parses");
    A::from_arg_matches(&matches).expect("invariant: clap filled every parameter")
}

/// Implements `Default` for parameter structs from their clap defaults. With a container-level
/// `#[serde(default)]` a recipe then takes the same defaults as the command line.
#[macro_export]
macro_rules! paper_defaults {
    ($($parameters:ty),+ $(,)?) => {$(
        impl Default for $parameters {
            fn default() -> Self {
                $crate::method::defaults_from_clap()
            }
        }
    )+};
}
