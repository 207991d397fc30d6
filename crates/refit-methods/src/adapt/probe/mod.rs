//! Classification heads: a linear probe (Alain and Bengio 2016, *Understanding intermediate layers using linear classifier
//! probes*, arXiv:1610.01644; the baseline of Kornblith et al. 2019) and fine-tuning that starts from one ([`LpFt`]).
//!
//! A probe is multinomial logistic regression on frozen features:
//!
//! ```text
//! min over W, b of  mean over i of CE(W f(x_i) + b, y_i) + λ/2 |W σ|²
//! ```
//!
//! `f(x)` is exactly what the head of the architecture's classification class in transformers sees
//! ([`refit_nn::classifier`]), so the result is a model that `AutoModelForSequenceClassification` or
//! `AutoModelForImageClassification` opens. BERT's class puts its pooler between encoder and head, RoBERTa's and DistilBERT's a
//! dense layer. The model's own layer is used where it has one; where it has none, a diagonal one lets the first token's vector
//! pass nearly unbent (`--pooler pass-through` asks for it), since a fresh random layer would mix what the encoder says.
//!
//! Features are computed once per model and example and kept on disk ([`refit_train::features`]); the fit is convex and runs to
//! convergence ([`refit_train::logistic`]).

mod data;
mod features;
mod lpft;
mod options;
mod write;

use clap::Args;
use refit_data::Rng;
use refit_nn::ops;
use refit_train::logistic::{self, Fit, Head, Problem};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub(crate) use features::images;
pub use lpft::{FromHead, LpFt};
pub use options::{Pooler, ProbeOptions};

use crate::error::{Error, Result};
use crate::method::{
    Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper, Plan,
    Taxonomy, Touches,
};
use crate::rewrite::OutputType;
use data::{Examples, Limits};
use features::Trunk;
use write::{Layout, Values};

/// Parameters of a linear probe.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct LinearProbe {
    /// Labels, head and penalty.
    #[command(flatten)]
    #[serde(flatten)]
    pub probe: ProbeOptions,
    /// Most tokens of a text. By default 512, or the model's context where that is less.
    #[arg(long, value_name = "TOKENS")]
    pub max_length: Option<usize>,
    /// Cut texts that are longer instead of refusing them.
    #[arg(long)]
    pub truncate: bool,
    /// Element type of the weights that are written; `auto` keeps the model's own, and the head is f32.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(LinearProbe);

impl Method for LinearProbe {
    const INFO: Info = Info {
        name: "linear-probe",
        title: "Linear probe",
        summary: "Puts a classification head on a frozen model, fitted to labelled texts or images",
        family: Family::Adapt,
        paper: Paper {
            title: "Understanding intermediate layers using linear classifier probes",
            reference: "arXiv:1610.01644",
            year: 2016,
        },
        inputs: InputSpec::CLASSIFIED,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["adaptation", "classification", "head"],
            needs: Effort::Calibration,
            touches: &[Touches::Architecture],
            composes_with: &["model-soups", "rtn", "finequant", "magnitude"],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        let name = Self::INFO.name;
        self.probe.check(name)?;
        let model = &inputs.models[0];
        let examples = data::examples(name, inputs, &self.probe, self.limits())?;
        let layout = Layout::of(name, model, self.probe.pooler.into())?;
        let classes = examples.classes.len();
        let mut plan = layout.plan(self, model, classes, self.dtype, false)?;
        describe(&mut plan, inputs, &layout, &examples, &self.probe);
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let name = Self::INFO.name;
        let model = &inputs.models[0];
        let layout = Layout::of(name, model, self.probe.pooler.into())?;
        let examples = data::examples(name, inputs, &self.probe, self.limits())?
            .sample(self.probe.max_examples, cx.seed);
        let trunk = Trunk::load(model, self.probe.pooler.into())?;
        let Fitted { head, report, warnings } =
            fit(&layout, &trunk, inputs, &examples, &self.probe, cx)?;
        let mut values = Values::default();
        if let (Trunk::Text(text), true) = (&trunk, layout.new_dense) {
            text.dense.iter().for_each(|dense| values.linear(dense));
        }
        values.head(layout.form.site, head);
        let beside = (&report, Vec::new());
        let path = write::write(&layout, &examples.classes, inputs, plan, cx, &values, beside)?;
        Ok(Output { artifact: Some(path), report, warnings })
    }
}

impl LinearProbe {
    fn limits(&self) -> Limits {
        Limits { max: self.max_length, truncate: self.truncate }
    }
}

/// What planning adds for every head: words, memory, notes.
fn describe(
    plan: &mut Plan,
    inputs: &Inputs,
    layout: &Layout,
    examples: &Examples,
    options: &ProbeOptions,
) {
    let model = &inputs.models[0];
    let count = options.max_examples.unwrap_or(usize::MAX).min(examples.len());
    let classes = examples.classes.len();
    plan.steps.push(format!(
        "run the frozen model on {count} examples, or take what an earlier run kept of them"
    ));
    plan.steps.push(format!("fit a head of {classes} classes on {} features", layout.width));
    plan.notes.extend(layout.notes(model));
    if examples.cut > 0 {
        plan.warnings.push(format!("{} of {} texts are cut", examples.cut, examples.len()));
    }
    let weights: u64 = model.artifact.tensors().iter().map(|info| 4 * info.numel() as u64).sum();
    let features = 4 * (count * layout.width) as u64;
    // Each part of a sum has a gradient of its own, and the solver remembers 24 vectors.
    let solver = 8 * 48 * (classes * layout.width) as u64;
    plan.peak_memory = weights + 2 * features + solver + (128 << 20);
}

/// A head on frozen features, and what is known of it.
struct Fitted {
    head: Head,
    report: Value,
    warnings: Vec<String>,
}

/// Fits the head.
///
/// # Errors
/// As [`features::features`] and [`logistic::fit`].
fn fit(
    layout: &Layout,
    trunk: &Trunk,
    inputs: &Inputs,
    examples: &Examples,
    options: &ProbeOptions,
    cx: &Context,
) -> Result<Fitted> {
    let dense = options.pooler.into();
    let (rows, store) = features::features(trunk, &inputs.models[0], dense, examples, cx)?;
    let problem = Problem {
        features: &rows,
        labels: &examples.labels,
        classes: examples.classes.len(),
        width: trunk.width(),
        bias: layout.form.bias,
    };
    cx.progress.begin("fitting the head", 0, crate::method::Unit::Steps);
    let found = cx.install(|| Ok(logistic::fit(&problem, &options.logistic(cx.seed))?));
    cx.progress.end();
    let Fit { head, l2, cross_entropy, accuracy, iterations, converged, trials, held_out } = found?;
    let chosen = trials.iter().find(|trial| trial.l2 == l2);
    let mut warnings = Vec::new();
    if !converged {
        warnings.push(format!("the head did not converge in {iterations} steps; raise --l2"));
    }
    let report = json!({
        "classes": examples.classes.len(),
        "labels": examples.classes,
        "examples": examples.len(),
        "l2": l2,
        "held_out_examples": held_out,
        "held_out_accuracy": chosen.map(|trial| trial.accuracy),
        "held_out_cross_entropy": chosen.map(|trial| trial.cross_entropy),
        "accuracy_on_examples": accuracy,
        "cross_entropy_on_examples": cross_entropy,
        "iterations": iterations,
        "converged": converged,
        "penalties": trials,
        "features": store,
    });
    Ok(Fitted { head, report, warnings })
}

/// A fresh head as transformers makes one: N(0, 0.02²), no shift.
fn random_head(layout: &Layout, classes: usize, seed: u64) -> Head {
    let mut rng = Rng::named(seed, "head");
    let weight = (0..classes * layout.width).map(|_| 0.02 * rng.normal() as f32).collect();
    Head { weight, bias: layout.form.bias.then(|| vec![0.0; classes]) }
}

/// Values of a whole trunk under the names of the artifact's tensors, as the artifact stores them.
fn trained_values(trunk: &Trunk, model: &crate::inputs::ModelInput) -> Result<Values> {
    let mut values = Values::default();
    match trunk {
        Trunk::Text(text) => {
            let config = text.config();
            let _ = refit_nn::named::edit(text.clone(), |name, shape, read| {
                let stored = refit_nn::load::stored(config, name, shape, &read());
                values.0.insert(name.to_owned(), stored);
                None
            });
        }
        Trunk::Image(vision, _) => {
            let _ = refit_nn::named::edit(vision.clone(), |name, _, read| {
                values.0.insert(name.to_owned(), read());
                None
            });
            if let refit_nn::vision::Vision::EfficientNetLite(net) = vision {
                for conv in net.convs() {
                    let read = |part: &str| -> Result<Vec<f32>> {
                        Ok(model.artifact.read_f32(&format!("{}.{part}", conv.norm()))?)
                    };
                    let (mean, variance) = (read("running_mean")?, read("running_var")?);
                    let [weight, bias] = conv.unfold(&mean, &variance);
                    values.0.insert(format!("{}.weight", conv.norm()), weight);
                    values.0.insert(format!("{}.bias", conv.norm()), bias);
                }
            }
        }
    }
    Ok(values)
}

/// Logits `[rows, classes]` of a batch under mean cross-entropy with its labels.
fn batch_loss(logits: burn::tensor::Tensor<2>, labels: &[u32]) -> burn::tensor::Tensor<1> {
    let targets: Vec<Option<u32>> = labels.iter().copied().map(Some).collect();
    let loss = refit_train::train::loss::cross_entropy(&targets, 0.0);
    ops::logit_loss(logits, &loss)
}

/// An error of examples that have another kind than the model.
fn mixed_kinds() -> Error {
    Error::Conflict {
        method: "lp-ft",
        problem: "invariant: examples are of the model's kind".into(),
    }
}
