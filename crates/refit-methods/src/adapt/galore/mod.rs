//! GaLore: *GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection* (arXiv:2403.03507).
//!
//! Full-parameter training whose Adam moments live in a rank-`r` projection of each gradient; the projection follows the
//! gradient's singular vectors and is renewed every `T` updates. The rule itself is
//! [`refit_train`'s optimizer](refit_train::train::OptimizerConfig::GaLore), where the equations stand; this method trains a
//! language model with it and writes the whole model.
//!
//! As in the reference, the moments are kept when the basis changes, and embeddings, head, norms and biases get plain Adam. The
//! reference's doubling of `T` in per-layer mode, which works around its hooks firing twice, is not copied.

mod claim;

use clap::Args;
use refit_train::train::optimizer::Side;
use refit_train::train::{OptimizerConfig, Scope};
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

/// Which side of a gradient is projected, for a weight `[m, n]`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Projection {
    /// The shorter one.
    #[default]
    Std,
    /// The longer one.
    ReverseStd,
    /// Outputs.
    Left,
    /// Inputs.
    Right,
    /// Both.
    Full,
}

/// Parameters of GaLore.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct GaLore {
    /// Rank of the projection.
    #[arg(long, default_value_t = 128)]
    pub rank: usize,
    /// Updates between two projections (T).
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub update_proj_gap: u64,
    /// Factor on the projected update (alpha).
    #[arg(long, default_value_t = 0.25)]
    pub scale: f64,
    /// Side that is projected.
    #[arg(long, value_enum, default_value_t)]
    pub proj_type: Projection,
    /// Moments in 8 bits.
    #[arg(long)]
    pub eight_bit: bool,
    /// Project every gradient as soon as it is there, so that never more than one is held; excludes accumulation and
    /// clipping by the norm of all gradients.
    #[arg(long)]
    pub per_layer: bool,
    /// Peak learning rate.
    #[arg(long, default_value_t = 1e-4)]
    pub learning_rate: f64,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
    /// The run; its optimizer is GaLore's Adam.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

crate::paper_defaults!(GaLore);

impl GaLore {
    fn optimizer(&self) -> OptimizerConfig {
        let mut config = OptimizerConfig::galore(self.rank);
        if let OptimizerConfig::GaLore { gap, scale, side, eight_bit, .. } = &mut config {
            *gap = self.update_proj_gap;
            *scale = self.scale as f32;
            *eight_bit = self.eight_bit;
            *side = match self.proj_type {
                Projection::Std => Side::Std,
                Projection::ReverseStd => Side::ReverseStd,
                Projection::Left => Side::Left,
                Projection::Right => Side::Right,
                Projection::Full => Side::Full,
            };
        }
        config
    }

    fn check(&self) -> Result<()> {
        let name = Self::INFO.name;
        if self.rank == 0 {
            return Err(Error::range(name, "rank", 0, "at least 1"));
        }
        if self.update_proj_gap == 0 {
            return Err(Error::range(name, "update_proj_gap", 0, "at least 1 update"));
        }
        if !(self.scale > 0.0 && self.scale.is_finite()) {
            return Err(Error::range(name, "scale", self.scale, "a number above 0"));
        }
        if self.per_layer && (self.training.accumulate > 1 || self.training.clip > 0.0) {
            return Err(Error::Conflict {
                method: name,
                problem: "--per-layer drops each gradient as soon as it is used, so there is nothing to accumulate and no norm \
                          of all gradients: take --accumulate 1 and --clip 0"
                    .into(),
            });
        }
        Ok(())
    }
}

impl Method for GaLore {
    const INFO: Info = Info {
        name: "galore",
        title: "GaLore",
        summary: "Trains all parameters with optimizer state of low rank",
        family: Family::Adapt,
        paper: Paper {
            title: "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
            reference: "arXiv:2403.03507",
            year: 2024,
        },
        inputs: InputSpec::TUNED,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["adaptation", "full", "memory-efficient"],
            needs: Effort::FineTuning,
            touches: &[Touches::Weights],
            composes_with: &["model-soups", "rtn", "finequant"],
        },
    };

    fn claim() -> Option<Claim> {
        Some(claim::CLAIM)
    }

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        self.training.check(Self::INFO.name, self.learning_rate)?;
        self.check()?;
        model_plan(self, inputs, &self.training, self.dtype, &Scope::default())
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let training = &self.training;
        let examples = training::examples(Self::INFO.name, inputs, training, 0)?;
        let rate = self.learning_rate;
        let session = Session { inputs, plan, cx, training, rate, dropout: 0.0 };
        let mut trained = session.train(
            &examples,
            |_, _| Ok(Scope::default()),
            |recipe| {
                recipe.optimizer = self.optimizer();
                recipe.per_layer = self.per_layer;
            },
        )?;
        trained.report["adamw_state_bytes"] = json!(8 * count(&trained.report));
        trained.write_model(&session)
    }
}

fn count(report: &serde_json::Value) -> u64 {
    report["trained_parameters"].as_u64().unwrap_or(0)
}
