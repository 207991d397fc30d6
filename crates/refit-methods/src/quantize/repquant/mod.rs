//! RepQuant: *Towards Accurate Post-Training Quantization of Large Transformer Models via Scale Reparameterization*
//! (arXiv:2402.05628), which extends RepQ-ViT (arXiv:2212.08254).
//!
//! Weights *and* activations get few bits, with one scale for a whole activation while the model runs. What a norm gives out has
//! channels whose ranges differ by orders of magnitude: it is fitted channel by channel, and the scales then move into the norm
//! and the linears behind it ([`reparam`], [`super::fold`]), so that one scale is left. The softmax, whose values crowd near 0,
//! is rounded to powers of the root of two, which integer units multiply by with shifts.
//!
//! | activation | grid |
//! |---|---|
//! | input of linears behind a norm | per channel, then reparameterized |
//! | softmax | `t 2^(-q / 2)` |
//! | q, k, v, inputs of other linears | per tensor, asymmetric |
//! | weights | per output row, asymmetric |
//!
//! Ranges are percentiles, the one with the least squared error among three. Observation follows the model: what comes before is
//! rounded already. Nothing of the residual stream, the norms and the softmax itself is rounded. The result holds ordinary
//! weights; `refit.quantization.json` holds the scales of activations, and `refit eval` and `refit classify` run the model
//! through them.
//!
//! Two parts are optional: bounds that are learned (`--clip`, [`clip`]) and weights that make up for the rounding of their
//! inputs (`--reconstruct`, [`reconstruct`]). They are in RepQuant's abstract; their form is inferred, since neither code nor
//! full text could be had, as are their defaults. Everything else was read from RepQ-ViT's code.
//!
//! Decided here: the shared zero point is rounded before channels move, so that integer arithmetic is exact (the reference leaves
//! it a fraction). An RMSNorm, or a linear without bias, takes no shift: then grids are symmetric, with their zero in the middle
//! of the codes, and only scales move; a bias in an RMSNorm is in no runtime that reads the result. Models with norms after the
//! residual sum are refused. Scales move by what the norm's stored type leaves of them. A ViT's patch projection gets 8 bits per
//! row; images come from 8 bits and are not rounded again. Embeddings and heads stay as they are.

use clap::Args;
use refit_store::architecture::Kind;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::blockwise::{self, Data};
use crate::calibrated::Calibration;
use crate::error::{Error, Result};
use crate::method::{
    Action, Context, Effort, Family, Info, Inputs, Method, Output, OutputKind, Paper, Plan,
    Taxonomy, Touches,
};
use crate::quantize::fold::{self, Producer};
use crate::quantize::grid::Grid;
use crate::quantize::record::grid_warnings;
use crate::rewrite::{self, OutputType, linears};

mod claim;
pub mod clip;
pub mod range;
pub mod reconstruct;
pub mod reparam;
mod run;

/// Name in messages.
const NAME: &str = "repquant";
/// Bits of a ViT's patch projection.
const PATCH_BITS: u8 = 8;

/// How inputs of linears behind a norm are fitted.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum NormScales {
    /// Per channel, moved into the norm: one scale is left.
    #[default]
    Reparam,
    /// One scale from the start: the rival.
    Tensor,
    /// Per channel while the model runs, which no integer unit does: what reparameterization is measured against.
    Channel,
}

/// Which activations are rounded.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Rounded {
    /// Inputs of all linears of the blocks, and within attention q, k, v and softmax.
    #[default]
    All,
    /// Inputs of all linears of the blocks.
    Linears,
    /// Inputs of linears behind a norm.
    Norms,
}

/// Grid of the softmax.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Softmax {
    /// Powers of the root of two.
    #[default]
    LogSqrt2,
    /// Powers of two.
    Log2,
    /// Equal steps.
    Uniform,
}

/// Parameters of RepQuant.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RepQuant {
    /// Bits per weight, 2 to 8.
    #[arg(long, default_value_t = 4)]
    pub w_bits: u8,
    /// Bits of activations, 2 to 8.
    #[arg(long, default_value_t = 4)]
    pub a_bits: u8,
    /// How inputs of linears behind a norm are fitted.
    #[arg(long, value_enum, default_value_t)]
    pub norm_scales: NormScales,
    /// Which activations are rounded.
    #[arg(long, value_enum, default_value_t)]
    pub rounded: Rounded,
    /// Grid of the softmax.
    #[arg(long, value_enum, default_value_t)]
    pub softmax: Softmax,
    /// Percentiles that ranges are chosen among, above 0.5 and at most 1.
    #[arg(long, value_delimiter = ',', default_values_t = [0.999, 0.9999, 0.99999])]
    pub percentiles: Vec<f64>,
    /// Learn the bounds of the channels behind norms.
    #[arg(long)]
    pub clip: bool,
    /// Steps of that learning.
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub clip_steps: usize,
    /// Learning rate of the bounds.
    #[arg(long, value_name = "RATE", default_value_t = 1e-2)]
    pub clip_rate: f64,
    /// Let weights make up for the rounding of their inputs and of each other.
    #[arg(long)]
    pub reconstruct: bool,
    /// Damping of that, as a share of the mean diagonal.
    #[arg(long, default_value_t = 0.01)]
    pub damping: f64,
    /// Calibration sequences, or images.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub samples: usize,
    /// Tokens per calibration sequence.
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub sequence_length: usize,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(RepQuant);

impl RepQuant {
    fn grid(&self) -> Grid {
        Grid::asymmetric(self.w_bits)
    }

    fn calibration(&self) -> Calibration {
        Calibration { samples: self.samples, sequence_length: self.sequence_length }
    }

    fn check(&self) -> Result<()> {
        for (key, bits) in [("w_bits", self.w_bits), ("a_bits", self.a_bits)] {
            if !(2..=8).contains(&bits) {
                return Err(Error::range(NAME, key, bits, "a whole number from 2 to 8"));
            }
        }
        if let Some(p) = self.percentiles.iter().find(|p| !(**p > 0.5 && **p <= 1.0)) {
            return Err(Error::range(NAME, "percentiles", p, "above 0.5 and at most 1"));
        }
        if self.percentiles.is_empty() {
            return Err(Error::range(NAME, "percentiles", "none", "at least one percentile"));
        }
        let positive = |key, value: f64| match value > 0.0 && value.is_finite() {
            true => Ok(()),
            false => Err(Error::range(NAME, key, value, "a positive number")),
        };
        positive("damping", self.damping)?;
        positive("clip_rate", self.clip_rate)?;
        if self.clip && self.norm_scales == NormScales::Tensor {
            let problem = "--clip learns bounds of channels; --norm-scales tensor has none".into();
            return Err(Error::Conflict { method: NAME, problem });
        }
        self.calibration().check(NAME)
    }
}

impl Method for RepQuant {
    const INFO: Info = Info {
        name: NAME,
        title: "RepQuant",
        summary: "Rounds weights and activations to a few bits, with the scales of channels moved into norms",
        family: Family::Quantize,
        paper: Paper {
            title: "RepQuant: Towards Accurate Post-Training Quantization of Large Transformer Models via Scale Reparameterization",
            reference: "arXiv:2402.05628",
            year: 2024,
        },
        inputs: blockwise::INPUTS,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["quantization", "post-training", "weights and activations"],
            needs: Effort::Calibration,
            touches: &[Touches::Weights, Touches::Activations],
            composes_with: &[],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        self.check()?;
        let model = &inputs.models[0];
        let sites = linears(model)?;
        let folds = fold::of_norms(model)?;
        Data::check(NAME, inputs)?;
        let mut plan = rewrite::plan(self, model, &sites, self.dtype);
        let calibration = self.calibration();
        calibration.describe(&mut plan, model);
        if self.norm_scales == NormScales::Reparam {
            fold::mark(&mut plan, model, &folds);
            let shifting =
                |fold: &&fold::Fold| matches!(fold.producer, Producer::Norm { shifts: true, .. });
            let shifts = folds.iter().filter(shifting).count();
            plan.steps.push(format!(
                "move scales of channels through {} norms, with zero points through {shifts} of them",
                folds.len()
            ));
            if shifts < folds.len() {
                plan.notes.push(format!(
                    "{} norms, or linears behind them, have no bias to take a shift: grids there are symmetric",
                    folds.len() - shifts
                ));
            }
        }
        if model.artifact.architecture().kind == Kind::Vision {
            for tensor in plan.tensors.iter_mut().filter(|tensor| is_patch(&tensor.name)) {
                tensor.action = Action::Transform;
            }
        }
        plan.warnings = grid_warnings(model, &self.grid(), None);
        plan.steps.push(format!(
            "round {} matrices to {} bits per row, activations ({}) to {} bits",
            sites.len(),
            self.w_bits,
            match self.rounded {
                Rounded::All => "inputs of linears, q, k, v, softmax",
                Rounded::Linears => "inputs of linears",
                Rounded::Norms => "outputs of norms",
            },
            self.a_bits
        ));
        // Inputs of a block's linears are kept beside their statistics.
        let tokens = (self.samples * self.sequence_length) as u64;
        let widest = sites.iter().filter_map(|site| site.out_in()).map(|(_, inputs)| inputs).max();
        plan.peak_memory += 16 * tokens * widest.unwrap_or(0) as u64;
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let folds = fold::of_norms(&inputs.models[0])?;
        let mut method = run::Run::new(self, folds);
        blockwise::run(inputs, plan, cx, &self.calibration(), &mut method)
    }

    fn claim() -> Option<refit_train::claim::Claim> {
        Some(claim::CLAIM)
    }
}

/// Whether a tensor is a ViT's patch projection.
fn is_patch(name: &str) -> bool {
    name.ends_with("patch_embeddings.projection.weight")
}
