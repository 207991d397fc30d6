//! FineQuant: *FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs*
//! (arXiv:2308.09723).
//!
//! One outlier sets the scale of everything that shares it, so per-channel int4 rounds most weights of
//! some rows to zero, and a few such matrices ruin a model. FineQuant gives every matrix the coarsest
//! groups that do not suffer from this, found from the weights alone:
//!
//! ```text
//! g <- g_max;   R(g) = mean over groups of (max - min)
//! for the next smaller g' of the chain:
//!     if R(g') > (1 - alpha)^(log2 g/g') R(g): keep g       else g <- g'
//! ```
//!
//! The abstract states that the choice is made per matrix from the weights, driven by outliers. The
//! rest is refit's reading, since no code was published: the chain of sizes when a row is no power of
//! two, the mean over groups, and `alpha`. Two variants of our own go further: `--criterion mse` asks
//! for the drop of the actual squared error (which goes with the square of the range, so the same
//! `alpha` means the same), and `--target-bpw` spends a given number of stored bits where they buy most.
//!
//! Embeddings, norms, the head and routers stay as they are; every expert of a mixture is a matrix of
//! its own.

use std::collections::BTreeMap;

use clap::Args;
use rayon::prelude::*;
use refit_store::architecture::Site;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::method::{
    Claim, Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper,
    Plan, Taxonomy, Touches, Unit,
};
use crate::quantize::chain::{Group, nested};
use crate::quantize::grid::{Grid, ScaleRule, Scheme};
use crate::quantize::options::check_bits;
use crate::quantize::record::{Record, grid_warnings};
use crate::quantize::rtn::check_scheme;
use crate::rewrite::{self, OutputType, linears, shape_of};

pub mod choose;
mod claim;

use choose::{Profile, allocate, walk};

/// What must fall for groups to be worth halving.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Halving {
    /// The mean range of a group, as in the paper.
    #[default]
    Range,
    /// The squared error of the quantized weights.
    Mse,
}

/// Parameters of FineQuant.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct FineQuant {
    /// Bits per weight, 2 to 8.
    #[arg(long, default_value_t = 4)]
    pub bits: u8,
    /// Shrink tolerance: groups are halved while the criterion falls by more than this share per
    /// halving. 1 gives whole rows everywhere, 0 the smallest groups.
    #[arg(long, default_value_t = 0.1)]
    pub alpha: f64,
    /// What must fall for groups to be worth halving.
    #[arg(long, value_enum, default_value_t)]
    pub criterion: Halving,
    /// Smallest group.
    #[arg(long, value_name = "SIZE", default_value_t = 32)]
    pub g_min: usize,
    /// Largest group, or `row`.
    #[arg(long, value_name = "SIZE", default_value = "row")]
    pub g_max: Group,
    /// Spend this many bits per weight, scales included, where they buy most; replaces alpha and
    /// criterion.
    #[arg(long, value_name = "BITS")]
    pub target_bpw: Option<f64>,
    /// How a symmetric scale follows from the largest weight.
    #[arg(long, value_enum, default_value_t)]
    pub scale_rule: ScaleRule,
    /// Equal steps or powers of two (which the paper finds inferior).
    #[arg(long, value_enum, default_value_t)]
    pub scheme: Scheme,
    /// Give every group a zero point of its own.
    #[arg(long)]
    pub asymmetric: bool,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(FineQuant);

impl FineQuant {
    fn grid(&self) -> Grid {
        Grid {
            bits: self.bits,
            symmetric: !self.asymmetric,
            rule: self.scale_rule,
            scheme: self.scheme,
        }
    }

    /// Group sizes that a matrix may get, ascending.
    fn chain(&self, site: &Site) -> Result<Vec<usize>> {
        let inputs = shape_of(site).1;
        let mut chain = nested(&site.name, inputs, self.g_min)?;
        if let Group::Size(largest) = self.g_max {
            chain.retain(|size| *size <= largest);
        }
        Ok(chain)
    }

    /// Chooses the group size of every matrix.
    fn choose(&self, model: &ModelInput, cx: &Context) -> Result<BTreeMap<String, usize>> {
        let (grid, sites) = (self.grid(), linears(model)?);
        let with_error = self.target_bpw.is_some() || self.criterion == Halving::Mse;
        cx.progress.begin("choosing group sizes", sites.len() as u64, Unit::Tensors);
        let profiles: Result<Vec<Profile>> = cx.install(|| {
            sites
                .par_iter()
                .with_max_len(1)
                .map(|site| {
                    let weights = rewrite::read_matrix(model, site)?;
                    let (inputs, chain) = (shape_of(site).1, self.chain(site)?);
                    cx.progress.advance(1);
                    Ok(Profile::measure(&grid, &weights, inputs, &chain, with_error))
                })
                .collect()
        });
        cx.progress.end();
        let profiles = profiles?;
        let positions = match self.target_bpw {
            Some(target) => allocate(&grid, &profiles, target).0,
            None => profiles
                .iter()
                .map(|profile| match self.criterion {
                    Halving::Range => walk(&profile.chain, &profile.range, self.alpha, 1.0),
                    Halving::Mse => walk(&profile.chain, &profile.error, self.alpha, 2.0),
                })
                .collect(),
        };
        Ok(sites
            .iter()
            .zip(profiles.iter().zip(positions))
            .map(|(site, (profile, at))| (site.name.clone(), profile.chain[at]))
            .collect())
    }
}

impl Method for FineQuant {
    const INFO: Info = Info {
        name: "finequant",
        title: "FineQuant",
        summary: "Rounds weights to a few bits with group sizes chosen per matrix, with no data",
        family: Family::Quantize,
        paper: Paper {
            title: "FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs",
            reference: "arXiv:2308.09723",
            year: 2023,
        },
        inputs: InputSpec::WEIGHTS,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["quantization", "post-training", "weight-only"],
            needs: Effort::None,
            touches: &[Touches::Weights],
            composes_with: &[],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        let name = Self::INFO.name;
        check_bits(name, self.bits)?;
        check_scheme(name, self.asymmetric, self.scheme)?;
        if !self.alpha.is_finite() {
            return Err(Error::range(name, "alpha", self.alpha, "a number, sanely .02 to .3"));
        }
        if self.g_min == 0 {
            return Err(Error::range(name, "g_min", 0, "a positive whole number"));
        }
        if let Group::Size(largest) = self.g_max
            && largest < self.g_min
        {
            return Err(Error::range(
                name,
                "g_max",
                largest,
                format!("at least g_min = {}", self.g_min),
            ));
        }
        let model = &inputs.models[0];
        let sites = linears(model)?;
        // The bits that the coarsest and the finest choice would take.
        let (mut weights, mut least, mut most) = (0.0, 0.0, 0.0);
        for site in &sites {
            let chain = self.chain(site)?;
            let numel = site.numel() as f64;
            weights += numel;
            least += numel * self.grid().bits_per_weight(chain[chain.len() - 1]);
            most += numel * self.grid().bits_per_weight(chain[0]);
        }
        let (least, most) = (least / weights, most / weights);
        let mut plan = rewrite::plan(self, model, &sites, self.dtype);
        plan.warnings = grid_warnings(
            model,
            &self.grid(),
            (self.g_max == Group::Size(self.g_min)).then_some(self.g_min),
        );
        if let Some(target) = self.target_bpw {
            if target.is_nan() || target < least {
                let expected = format!(
                    "at least {least:.4} bits per weight with {}-bit codes and the largest groups; \
                     take fewer bits for less",
                    self.bits
                );
                return Err(Error::range(name, "target_bpw", target, expected));
            }
            if target > most + 0.01 {
                plan.warnings.push(format!(
                    "target_bpw = {target} is more than the smallest groups take ({most:.4}); \
                     groups of {} everywhere",
                    self.g_min
                ));
            }
        }
        plan.steps
            .push(format!("choose the group size of {} matrices from their weights", sites.len()));
        plan.steps.push(format!(
            "round them to {} bits: {least:.3} to {most:.3} bits per weight with scales",
            self.bits
        ));
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let model = &inputs.models[0];
        let groups = self.choose(model, cx)?;
        let (grid, record) = (self.grid(), Record::default());
        let edit = |site: &Site, weights: &mut [f32]| {
            let (columns, group) = (shape_of(site).1, groups[&site.name]);
            let before = weights.to_vec();
            weights.chunks_mut(columns).for_each(|row| grid.snap_row(row, group));
            record.add(&site.name, &grid, columns, group, &before, weights);
            Ok(())
        };
        rewrite::rewrite(inputs, plan, cx, &edit, || {
            let (files, mut report) = record.take().finish(model)?;
            report["groups"] = json!(groups);
            Ok((files, report))
        })
    }

    fn claim() -> Option<Claim> {
        Some(claim::CLAIM)
    }
}
