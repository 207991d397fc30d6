//! Model soups: *averaging weights of multiple fine-tuned models improves accuracy without increasing
//! inference time* (arXiv:2203.05482), and WiSE-FT (arXiv:2109.01903).
//!
//! Models that were fine-tuned from one pretrained model lie in one basin, and the mean of their weights
//! often does better than the best of them.
//!
//! | mode | result |
//! |---|---|
//! | `uniform` | `(1/K) sum_k theta_k` |
//! | `greedy` | the mean of a subset: best first, each of the others kept if the soup does not get worse |
//! | `maximum` | the mean of the `p` that score best alone (POINTS, arXiv:2409.04828, for models tuned on one data set each) |
//! | `learned` | `sum_k w_k theta_k`, `w = softmax(a)` found on held-out data |
//! | `learned-by-tensor` | the same with weights of their own for every tensor |
//! | `wise-ft` | `(1 - alpha) theta_1 + alpha theta_2` |
//!
//! Candidates are scored on held-out examples: labelled images or texts by accuracy, as the paper does, or text by its likelihood
//! under a language model. Greedy accepts a candidate of equal score, as the paper's recipe does; `--strict` asks for a better
//! one, as the released code does.
//!
//! Learned soups lower the mean cross-entropy of the held-out examples. With one set of weights the derivative is taken by central
//! differences, which needs forward passes only. By tensor, which is what the released `learned_bylayer.py` does, the exact
//! gradient is taken by a backward pass; weights start at `1/K`, and the temperature `b` of a classifier's logits
//! trains along and is dropped. [`learn`] holds the arithmetic of both.

use std::path::PathBuf;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::emit::Emitter;
use crate::error::{Error, Result};
use crate::inputs::{Inputs, ModelInput};
use crate::merge::fold::{Weights, compare, duplicates, fold};
use crate::method::{
    Claim, Context, Effort, Family, Info, InputSpec, Method, Need, Output, OutputKind, Paper, Plan,
    Quiet, Taxonomy, Touches, Unit,
};
use crate::rewrite::OutputType;

mod claim;
pub mod greedy;
mod heldout;
pub mod learn;
mod tensors;

use greedy::greedy;
use heldout::{HeldOut, Scored};
use learn::Mixture;

/// How the mixing weights are found.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// All models alike.
    #[default]
    Uniform,
    /// The mean of those that do not make the soup worse on held-out data.
    Greedy,
    /// The mean of those that score best alone on held-out data.
    Maximum,
    /// Softmax weights fitted to held-out data.
    Learned,
    /// Softmax weights of every tensor by itself, fitted to held-out data.
    LearnedByTensor,
    /// Between two models: the first is the base, the second the fine-tuned one.
    WiseFt,
}

/// Parameters of model soups.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ModelSoups {
    /// How the mixing weights are found.
    #[arg(long, value_enum, default_value_t)]
    pub mode: Mode,
    /// Greedy: accept an ingredient only if the soup gets better, not if it stays as good.
    #[arg(long)]
    pub strict: bool,
    /// Maximum: how many of the best are averaged.
    #[arg(long, default_value_t = 3)]
    pub best: usize,
    /// WiSE-FT: share of the second model, 0 to 1.
    #[arg(long, default_value_t = 0.75)]
    pub alpha: f64,
    /// Learned: optimizer steps.
    #[arg(long, default_value_t = 10)]
    pub steps: usize,
    /// Learned: learning rate.
    #[arg(long, default_value_t = 0.05)]
    pub learning_rate: f64,
    /// Greedy and learned: score on at most this many tokens of the held-out text.
    #[arg(long, value_name = "TOKENS")]
    pub max_tokens: Option<usize>,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(ModelSoups);

impl Method for ModelSoups {
    const INFO: Info = Info {
        name: "model-soups",
        title: "Model soups",
        summary: "Averages models that were fine-tuned from one pretrained model into one of the same size",
        family: Family::Merge,
        paper: Paper {
            title: "Model soups: averaging weights of multiple fine-tuned models improves accuracy \
                    without increasing inference time",
            reference: "arXiv:2203.05482",
            year: 2022,
        },
        inputs: InputSpec {
            min_models: 1,
            max_models: None,
            text: Need::Optional,
            labelled: Need::Optional,
            data_role: "held-out text that scores candidates (greedy and learned soups)",
            ..InputSpec::WEIGHTS
        },
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["reuse", "merging", "averaging"],
            needs: Effort::Evaluation,
            touches: &[Touches::Weights],
            composes_with: &["rtn", "finequant", "magnitude", "wanda"],
        },
    };

    fn claim() -> Option<Claim> {
        Some(claim::CLAIM)
    }

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        let name = Self::INFO.name;
        let count = inputs.models.len();
        let mut plan = Plan::of(self);
        match self.mode {
            Mode::WiseFt if count != 2 => {
                return Err(Error::ModelCount {
                    method: name,
                    expected: "exactly 2 models in mode wise-ft: the base, then the fine-tuned one"
                        .into(),
                    given: format!("{count} were"),
                });
            }
            Mode::WiseFt if !(0.0..=1.0).contains(&self.alpha) => {
                return Err(Error::range(name, "alpha", self.alpha, "a share from 0 to 1"));
            }
            Mode::Maximum if !(1..=count).contains(&self.best) => {
                let expected = format!("1 to {count}, the number of models");
                return Err(Error::range(name, "best", self.best, expected));
            }
            Mode::Greedy | Mode::Maximum | Mode::Learned | Mode::LearnedByTensor => {
                HeldOut::check(inputs, self.max_tokens)?
            }
            _ => {}
        }
        let learned = matches!(self.mode, Mode::Learned | Mode::LearnedByTensor);
        if learned && !(self.learning_rate > 0.0 && self.learning_rate < 10.0) {
            let expected = "a positive number, usually .05";
            return Err(Error::range(name, "learning_rate", self.learning_rate, expected));
        }
        compare(&inputs.models, self.dtype, &mut plan)?;
        for (first, second) in duplicates(&inputs.models)? {
            let (first, second) = (&inputs.models[first].source, &inputs.models[second].source);
            plan.warnings.push(format!(
                "{first} and {second} look identical: a duplicate counts twice in the average"
            ));
        }
        let statistics = plan.tensors.iter().filter(|t| t.name.ends_with("running_mean")).count();
        if statistics > 0 && count > 1 {
            plan.warnings.push(format!(
                "{statistics} batch normalizations: averaged running statistics are not those of the \
                 averaged weights; recompute them on data before use"
            ));
        }
        plan.steps.push(match self.mode {
            Mode::Uniform => format!("average {count} models"),
            Mode::Greedy => format!("score {count} models and {} candidate soups", count - 1),
            Mode::Maximum => format!("score {count} models and average the best {}", self.best),
            Mode::Learned => {
                format!("{} steps of {} evaluations each", self.steps, 2 * count)
            }
            Mode::LearnedByTensor => {
                format!("{} steps of a gradient over all held-out examples each", self.steps)
            }
            Mode::WiseFt => {
                format!("mix {} of the first and {} of the second", 1.0 - self.alpha, self.alpha)
            }
        });
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let count = inputs.models.len();
        let (weights, report) = match self.mode {
            Mode::Uniform => (Weights::Mean((0..count).collect()), json!({})),
            Mode::WiseFt => {
                let alpha = self.alpha as f32;
                (Weights::Global(vec![1.0 - alpha, alpha]), json!({}))
            }
            Mode::Greedy => self.greedy(inputs, plan, cx)?,
            Mode::Maximum => self.maximum(inputs, cx)?,
            Mode::Learned => self.learned(inputs, plan, cx)?,
            Mode::LearnedByTensor => tensors::learn(self, inputs, plan, cx)?,
        };
        let coefficients: Vec<f64> = match &weights {
            Weights::Mean(kept) => (0..count)
                .map(|k| if kept.contains(&k) { 1.0 / kept.len() as f64 } else { 0.0 })
                .collect(),
            Weights::Global(factors) => factors.iter().map(|f| f64::from(*f)).collect(),
            Weights::ByTensor(_) => Vec::new(),
        };
        let sources: Vec<&str> = inputs.models.iter().map(|model| model.source.as_str()).collect();
        let mut report: Value = report;
        report["ingredients"] = json!(sources);
        report["coefficients"] = json!(coefficients);
        let emitter = Emitter::begin(inputs, plan, cx)?;
        fold(&inputs.models, &weights, &emitter, plan, cx)?;
        let artifact = emitter.finish(inputs, plan, cx, Vec::new(), &report)?;
        Ok(Output { artifact: Some(artifact), report, warnings: Vec::new() })
    }
}

impl ModelSoups {
    fn greedy(&self, inputs: &Inputs, plan: &Plan, cx: &Context) -> Result<(Weights, Value)> {
        let held_out = HeldOut::new(inputs, self.max_tokens)?;
        let count = inputs.models.len();
        let kitchen = Kitchen::new(inputs, plan, cx)?;
        cx.progress.begin("tasting", 2 * count as u64 - 1, Unit::Steps);
        let mut score = |ingredients: &[usize]| {
            let score = match ingredients {
                // A single model need not be written to be scored.
                [only] => held_out.score(&inputs.models[*only].artifact)?.score,
                several => kitchen.taste(&Weights::Mean(several.to_vec()), &held_out)?.score,
            };
            cx.progress.advance(1);
            Ok(score)
        };
        let recipe = greedy(count, self.strict, &mut score);
        cx.progress.end();
        let recipe = recipe?;
        let report = json!({ "recipe": recipe, "score": held_out.meaning() });
        Ok((Weights::Mean(recipe.kept), report))
    }

    fn maximum(&self, inputs: &Inputs, cx: &Context) -> Result<(Weights, Value)> {
        let held_out = HeldOut::new(inputs, self.max_tokens)?;
        let count = inputs.models.len();
        cx.progress.begin("tasting", count as u64, Unit::Steps);
        let score = |model: &ModelInput| {
            let score = held_out.score(&model.artifact)?.score;
            cx.progress.advance(1);
            Ok(score)
        };
        let scores: Result<Vec<f64>> = inputs.models.iter().map(score).collect();
        cx.progress.end();
        let scores = scores?;
        let mut order: Vec<usize> = (0..count).collect();
        // A score that is not a number goes last; equal ones keep their order.
        let rank = |k: usize| if scores[k].is_nan() { f64::NEG_INFINITY } else { scores[k] };
        order.sort_by(|&a, &b| rank(b).total_cmp(&rank(a)));
        order.truncate(self.best);
        let report = json!({ "scores": scores, "kept": order, "score": held_out.meaning() });
        Ok((Weights::Mean(order), report))
    }

    fn learned(&self, inputs: &Inputs, plan: &Plan, cx: &Context) -> Result<(Weights, Value)> {
        /// Change of a weight for a difference quotient: large enough for f32 losses.
        const NUDGE: f32 = 0.02;
        let held_out = HeldOut::new(inputs, self.max_tokens)?;
        let count = inputs.models.len();
        let kitchen = Kitchen::new(inputs, plan, cx)?;
        let mut mixture = Mixture::uniform(count, 1);
        let global = |mixture: &Mixture| -> Vec<f32> {
            mixture.weights(0).into_iter().map(|weight| weight as f32).collect()
        };
        let mut losses = Vec::new();
        cx.progress.begin("learning", (self.steps * (2 * count + 1) + 1) as u64, Unit::Steps);
        let mut work = || -> Result<()> {
            for step in 0..=self.steps {
                let weights = global(&mixture);
                losses.push(kitchen.taste(&Weights::Global(weights.clone()), &held_out)?.loss);
                cx.progress.advance(1);
                if step == self.steps {
                    break;
                }
                let mut by_weight = Vec::new();
                for model in 0..count {
                    let loss = |by: f32| -> Result<f64> {
                        let mut moved = weights.clone();
                        moved[model] += by;
                        let loss = kitchen.taste(&Weights::Global(moved), &held_out)?.loss;
                        cx.progress.advance(1);
                        Ok(loss)
                    };
                    by_weight.push((loss(NUDGE)? - loss(-NUDGE)?) / (2.0 * f64::from(NUDGE)));
                }
                mixture.step(&by_weight, 0.0, self.learning_rate);
            }
            Ok(())
        };
        let done = work();
        cx.progress.end();
        done?;
        Ok((Weights::Global(global(&mixture)), json!({ "losses": losses })))
    }
}

/// Writes candidates to a scratch directory to have them scored.
struct Kitchen<'a> {
    /// The models; without the examples, which would be hashed for every candidate.
    inputs: Inputs,
    plan: &'a Plan,
    cx: Context,
    scratch: tempfile::TempDir,
}

impl<'a> Kitchen<'a> {
    fn new(inputs: &Inputs, plan: &'a Plan, cx: &Context) -> Result<Self> {
        let inputs = Inputs { models: inputs.models.clone(), ..Inputs::default() };
        let scratch = tempfile::Builder::new()
            .prefix("refit-soup-")
            .tempdir_in(&cx.temp_dir)
            .map_err(|source| Error::Io { path: cx.temp_dir.clone(), source })?;
        let cx = Context {
            out: Some(scratch.path().join("candidate")),
            force: true,
            progress: std::sync::Arc::new(Quiet),
            ..cx.clone()
        };
        Ok(Self { inputs, plan, cx, scratch })
    }

    fn taste(&self, weights: &Weights, held_out: &HeldOut) -> Result<Scored> {
        held_out.score(&refit_store::Artifact::open(self.mix(weights)?)?)
    }

    /// Writes a candidate and says where.
    fn mix(&self, weights: &Weights) -> Result<PathBuf> {
        let emitter = Emitter::begin(&self.inputs, self.plan, &self.cx)?;
        fold(&self.inputs.models, weights, &emitter, self.plan, &self.cx)?;
        let path = emitter.finish_scratch(&self.inputs, self.plan, &self.cx)?;
        debug_assert!(path.starts_with(self.scratch.path()));
        Ok(path)
    }
}
