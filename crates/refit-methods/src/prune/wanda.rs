//! Wanda: *A Simple and Effective Pruning Approach for Large Language Models* (arXiv:2306.11695).
//!
//! A weight matters as much as what flows through it: `S_ij = |W_ij| ||x_j||_2`, with the norm taken
//! over the calibration tokens. Weights compete within an output row, and those that stay keep their
//! values.

use clap::Args;
use refit_store::SideFile;
use refit_store::architecture::Site;
use refit_train::observe::{ColumnStats, StatsRequest};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::calibrated::{self, Calibration, OneShot, narrow};
use crate::error::Result;
use crate::method::{
    Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper, Plan,
    Taxonomy, Touches,
};
use crate::prune::mask::{Pattern, select};
use crate::prune::options::{self, Masks, check, check_calibrated};
use crate::prune::saliency::wanda;
use crate::rewrite::{self, OutputType, linears, shape_of};

/// Parameters of Wanda.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Wanda {
    /// Share of weights to prune, from 0 up to but not including 1.
    #[arg(long, default_value_t = 0.5)]
    pub sparsity: f64,
    /// Which weights compete: those of a `row`, of a `tensor`, or N:M, by which N of every M inputs go.
    #[arg(long, default_value = "row")]
    pub pattern: Pattern,
    /// Calibration text.
    #[command(flatten)]
    #[serde(flatten)]
    pub calibration: Calibration,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Wanda);

impl Method for Wanda {
    const INFO: Info = Info {
        name: "wanda",
        title: "Wanda",
        summary: "Zeroes the weights that matter least given what flows through them",
        family: Family::Prune,
        paper: Paper {
            title: "A Simple and Effective Pruning Approach for Large Language Models",
            reference: "arXiv:2306.11695",
            year: 2023,
        },
        inputs: InputSpec::CALIBRATED,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["pruning", "unstructured"],
            needs: Effort::Calibration,
            touches: &[Touches::Weights],
            composes_with: &["rtn", "finequant"],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        let model = &inputs.models[0];
        let sites = linears(model)?;
        check(Self::INFO.name, &model.source, &sites, self.sparsity, self.pattern)?;
        check_calibrated(Self::INFO.name, self.pattern)?;
        self.calibration.check(Self::INFO.name)?;
        let mut plan = rewrite::plan(self, model, &sites, self.dtype);
        self.calibration.describe(&mut plan, model);
        options::describe(&mut plan, &sites, self.sparsity, self.pattern);
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let mut method = Run { parameters: self, masks: Masks::default() };
        calibrated::run(inputs, plan, cx, &self.calibration, &mut method)
    }
}

struct Run<'a> {
    parameters: &'a Wanda,
    masks: Masks,
}

impl OneShot for Run<'_> {
    fn request(&self) -> StatsRequest {
        StatsRequest::SUM_SQUARES
    }

    fn apply(&mut self, site: &Site, weights: &mut [f32], stats: &ColumnStats) -> Result<()> {
        let scores = wanda(weights, &narrow(&stats.norms()));
        let Wanda { pattern, sparsity, .. } = self.parameters;
        let mask = select(&scores, shape_of(site).1, *pattern, *sparsity);
        mask.apply(weights);
        self.masks.add(&site.name, mask);
        Ok(())
    }

    fn finish(&mut self, _: &Inputs) -> Result<(Vec<SideFile>, Value)> {
        self.masks.finish()
    }
}
