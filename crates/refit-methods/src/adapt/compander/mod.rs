//! Weight Compander: *Weight Compander: A Simple Weight Reparameterization for Regularization* (arXiv:2306.16993).
//!
//! ```text
//! w = a arctan(v / b)        |w| < a π/2,  slope a/b at zero
//! ```
//! Every weight of the linears is such a function of a free parameter `v` while it trains, with one learned pair `a, b` per
//! tensor: large weights are held back, small ones pushed out. What is written is `w`, an ordinary model. The paper's body was
//! not at hand: the curve is recalled, its scope, starting values (slope 1.1, bound three times the largest weight) and the
//! tenth of the rate for `a` and `b` are inferred. Weight decay acts on `v`.

mod claim;

use clap::Args;
use refit_nn::adapt::{Compander, CompanderOptions, Curve};
use refit_train::train::{Rule, Scope};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::finetune::model_plan;
use super::frame::Session;
use super::training::{self, Training};
use crate::error::{Error, Result};
use crate::method::{
    Claim, Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper,
    Plan, Taxonomy, Touches,
};
use crate::rewrite::OutputType;

/// The function that weights are passed through.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Function {
    /// a arctan(v / b).
    #[default]
    Arctan,
    /// a tanh(v / a): a bound without expansion.
    Tanh,
    /// slope · v: expansion without a bound.
    Factor,
}

/// Parameters of the weight compander.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct WeightCompander {
    /// Function of the weights.
    #[arg(long, value_enum, default_value_t)]
    pub function: Function,
    /// Slope at zero; above 1 small weights are enlarged.
    #[arg(long, default_value_t = 1.1)]
    pub slope: f64,
    /// Bound on the weights, as a multiple of each tensor's largest.
    #[arg(long, default_value_t = 3.0)]
    pub bound: f64,
    /// Keep a and b as they are.
    #[arg(long)]
    pub fixed: bool,
    /// Peak learning rate; a and b get a tenth of it.
    #[arg(long, default_value_t = 2e-5)]
    pub learning_rate: f64,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
    /// The run.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

crate::paper_defaults!(WeightCompander);

/// What trains, and how, in a model whose weights are companded: `a` and `b` at a tenth of the rate, without decay.
pub fn scope(learn: bool) -> Scope {
    let ab = Rule {
        pattern: "*.compander.*".into(),
        train: Some(learn),
        rate: Some(0.1),
        decay: Some(0.0),
    };
    Scope { rules: vec![Rule::train("@all"), ab] }
}

/// Largest absolute value, and the share of values below a tenth of their root mean square.
pub fn shape_of_weights(values: &[f32]) -> (f64, f64) {
    let top = values.iter().fold(0.0f32, |top, w| top.max(w.abs()));
    let squares: f64 = values.iter().map(|w| f64::from(*w).powi(2)).sum();
    let limit = 0.1 * (squares / values.len().max(1) as f64).sqrt();
    let small = values.iter().filter(|w| f64::from(w.abs()) < limit).count();
    (f64::from(top), small as f64 / values.len().max(1) as f64)
}

impl WeightCompander {
    fn options(&self, largest: f64) -> CompanderOptions {
        CompanderOptions {
            curve: match self.function {
                Function::Arctan => Curve::Arctan,
                Function::Tanh => Curve::Tanh,
                Function::Factor => Curve::Factor,
            },
            slope: self.slope,
            bound: Some(self.bound * largest),
            learn: !self.fixed,
        }
    }
}

impl Method for WeightCompander {
    const INFO: Info = Info {
        name: "weight-compander",
        title: "Weight Compander",
        summary: "Fine-tunes with weights passed through a bounded curve, a regularizer that costs nothing afterwards",
        family: Family::Adapt,
        paper: Paper {
            title: "Weight Compander: A Simple Weight Reparameterization for Regularization",
            reference: "arXiv:2306.16993",
            year: 2023,
        },
        inputs: InputSpec::TUNED,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["adaptation", "regularization"],
            needs: Effort::FineTuning,
            touches: &[Touches::Weights],
            composes_with: &["model-soups"],
        },
    };

    fn claim() -> Option<Claim> {
        Some(claim::CLAIM)
    }

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        let name = Self::INFO.name;
        self.training.check(name, self.learning_rate)?;
        if !(self.slope > 0.0 && self.slope.is_finite()) {
            return Err(Error::range(name, "slope", self.slope, "a number above 0"));
        }
        if !(self.bound > 1.0 && self.bound.is_finite()) {
            let expected = "a number above 1: the largest weight must lie within the bound";
            return Err(Error::range(name, "bound", self.bound, expected));
        }
        crate::factorize::layout::refuse_factored(Self::INFO.name, &inputs.models[0])?;
        model_plan(self, inputs, &self.training, self.dtype, &Scope::default())
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let training = &self.training;
        let examples = training::examples(Self::INFO.name, inputs, training, 0)?;
        let rate = self.learning_rate;
        let session = Session { inputs, plan, cx, training, rate, dropout: 0.0 };
        let mut before = Vec::new();
        let mut trained = session.train(
            &examples,
            |decoder, _| {
                for linear in decoder.blocks.iter_mut().flat_map(|block| block.linears_mut()) {
                    let values = refit_nn::ops::to_vec(&linear.weight());
                    let (largest, small) = shape_of_weights(&values);
                    before.push((largest, small));
                    if largest > 0.0 {
                        linear.compand(&self.options(largest))?;
                    }
                }
                Ok(scope(!self.fixed))
            },
            |_| {},
        )?;
        let mut saturated = 0;
        for linear in trained.model.blocks.iter().flat_map(|block| block.linears()) {
            if let (Some(form), refit_nn::operator::Operator::Dense(dense)) =
                (linear.form::<Compander>(), &linear.op)
            {
                saturated += usize::from(form.saturated(&dense.weight.base()) > 0.2);
            }
        }
        if saturated > 0 {
            trained.warn(format!(
                "in {saturated} tensors more than a fifth of the weights lie where the curve is flat and hardly train; raise \
                 --bound"
            ));
        }
        trained.fold();
        let linears = trained.model.blocks.iter().flat_map(|block| block.linears());
        let after: Vec<(f64, f64)> = linears
            .map(|linear| shape_of_weights(&refit_nn::ops::to_vec(&linear.weight())))
            .collect();
        let mean = |all: &[(f64, f64)], f: fn(&(f64, f64)) -> f64| {
            all.iter().map(f).sum::<f64>() / all.len().max(1) as f64
        };
        trained.report["largest_weight_before"] = json!(mean(&before, |s| s.0));
        trained.report["largest_weight_after"] = json!(mean(&after, |s| s.0));
        trained.report["near_zero_share_before"] = json!(mean(&before, |s| s.1));
        trained.report["near_zero_share_after"] = json!(mean(&after, |s| s.1));
        trained.write_model(&session)
    }
}
