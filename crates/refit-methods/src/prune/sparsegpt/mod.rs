//! SparseGPT: *Massive Language Models Can Be Accurately Pruned in One-Shot* (arXiv:2301.00774).
//!
//! Columns are walked from left to right ([`crate::solver`]). Per block of columns, over all rows, the
//! weights with the smallest `w^2 / U_jj^2` go (or the `N` smallest of every `M` of a row), and every
//! weight that goes moves the later ones of its row so that the layer's output changes least.

use clap::Args;
use refit_store::SideFile;
use refit_store::architecture::Site;
use refit_train::observe::{ColumnStats, StatsRequest};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::calibrated::{self, Calibration, OneShot, solver_of};
use crate::error::{Error, Result};
use crate::method::{
    Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper, Plan,
    Taxonomy, Touches,
};
use crate::prune::mask::Pattern;
use crate::prune::options::{self, Masks, check, check_calibrated};
use crate::rewrite::{self, OutputType, linears, shape_of};
use crate::solver::{ColumnSolver, SolverOptions};

pub mod rule;

use rule::DropRule;

/// Parameters of SparseGPT.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct SparseGpt {
    /// Share of weights to prune, from 0 up to but not including 1.
    #[arg(long, default_value_t = 0.5)]
    pub sparsity: f64,
    /// Which weights compete: those of a block of columns (`tensor`), the same number from every `row`
    /// and block, or N:M, by which N of every M inputs go.
    #[arg(long, default_value = "tensor")]
    pub pattern: Pattern,
    /// Added to the diagonal of the Hessian, as a share of its mean.
    #[arg(long, default_value_t = 0.01)]
    pub percdamp: f64,
    /// Columns per block.
    #[arg(long, value_name = "COLUMNS", default_value_t = 128)]
    pub block_size: usize,
    /// Calibration text.
    #[command(flatten)]
    #[serde(flatten)]
    pub calibration: Calibration,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(SparseGpt);

impl Method for SparseGpt {
    const INFO: Info = Info {
        name: "sparsegpt",
        title: "SparseGPT",
        summary: "Zeroes weights and moves the others so that every layer's output changes least",
        family: Family::Prune,
        paper: Paper {
            title: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
            reference: "arXiv:2301.00774",
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
        let name = Self::INFO.name;
        let model = &inputs.models[0];
        let sites = linears(model)?;
        check(name, &model.source, &sites, self.sparsity, self.pattern)?;
        check_calibrated(name, self.pattern)?;
        self.calibration.check(name)?;
        check_solver(name, self.percdamp, self.block_size)?;
        if let Pattern::Grouped { of, .. } = self.pattern
            && !self.block_size.is_multiple_of(of)
        {
            let expected = format!("a multiple of M = {of}, so that groups lie within blocks");
            return Err(Error::range(name, "block_size", self.block_size, expected));
        }
        let mut plan = rewrite::plan(self, model, &sites, self.dtype);
        self.calibration.describe(&mut plan, model);
        options::describe(&mut plan, &sites, self.sparsity, self.pattern);
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let mut method = Run { parameters: self, masks: Masks::default(), solver: None };
        calibrated::run(inputs, plan, cx, &self.calibration, &mut method)
    }
}

/// Checks the parameters of a column solver.
///
/// # Errors
/// [`Error::Range`].
pub(crate) fn check_solver(method: &'static str, percdamp: f64, block: usize) -> Result<()> {
    if !(0.0..=10.0).contains(&percdamp) {
        return Err(Error::range(
            method,
            "percdamp",
            percdamp,
            "a share from 0 to 10, usually .01",
        ));
    }
    if block == 0 {
        return Err(Error::range(method, "block_size", block, "at least 1 column"));
    }
    Ok(())
}

struct Run<'a> {
    parameters: &'a SparseGpt,
    masks: Masks,
    solver: Option<ColumnSolver>,
}

impl OneShot for Run<'_> {
    fn request(&self) -> StatsRequest {
        StatsRequest::GRAM
    }

    fn prepare(&mut self, site: &Site, stats: &ColumnStats) -> Result<()> {
        let (percdamp, block) = (self.parameters.percdamp, self.parameters.block_size);
        let options = SolverOptions { percdamp, act_order: false, block };
        self.solver = Some(solver_of(site, stats, options)?);
        Ok(())
    }

    fn apply(&mut self, site: &Site, weights: &mut [f32], _: &ColumnStats) -> Result<()> {
        let solver = self.solver.as_ref().expect("invariant: prepare() comes first");
        let SparseGpt { pattern, sparsity, .. } = self.parameters;
        let mut rule = DropRule::new(shape_of(site).1, *pattern, *sparsity);
        let mask = solver.solve(weights, &mut rule);
        self.masks.add(&site.name, mask);
        Ok(())
    }

    fn finish(&mut self, _: &Inputs) -> Result<(Vec<SideFile>, Value)> {
        self.masks.finish()
    }
}
