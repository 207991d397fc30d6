//! GPTQ: *Accurate Post-Training Quantization for Generative Pre-trained Transformers*
//! (arXiv:2210.17323).
//!
//! Columns are rounded from left to right ([`crate::solver`]), and every rounding error moves the later
//! weights of its row so that the layer's output changes least:
//!
//! ```text
//! H = X X^T + damp mean(diag) I,   U^T U = H^{-1},   e = (w_j - q_j) / U_jj,   w_k -= e U_jk
//! ```
//!
//! Linears of a block are calibrated in the order in which they run, each behind those that were
//! quantized before it. With `--act-order`, columns go by falling `H_jj`; scales then belong to groups of
//! the original order and are fitted beforehand, so that no permutation needs to be stored.

use clap::Args;
use refit_store::SideFile;
use refit_store::architecture::Site;
use refit_train::calibrate::Order;
use refit_train::observe::{ColumnStats, StatsRequest};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::calibrated::{self, Calibration, OneShot, solver_of};
use crate::error::Result;
use crate::method::{
    Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper, Plan,
    Taxonomy, Touches,
};
use crate::prune::sparsegpt::check_solver;
use crate::quantize::chain::Group;
use crate::quantize::grid::{Grid, ScaleRule, Scheme};
use crate::quantize::options::check_bits;
use crate::quantize::record::{Record, grid_warnings};
use crate::rewrite::{self, OutputType, linears, shape_of};
use crate::solver::{ColumnSolver, SolverOptions};

pub mod rule;

use rule::GridRule;

/// Parameters of GPTQ.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Gptq {
    /// Bits per weight, 2 to 8.
    #[arg(long, default_value_t = 4)]
    pub bits: u8,
    /// Consecutive inputs that share a scale, or `row`.
    #[arg(long, default_value = "row")]
    pub group: Group,
    /// Give every group a zero point of its own.
    #[arg(long)]
    pub asymmetric: bool,
    /// Round the columns with the largest inputs first.
    #[arg(long)]
    pub act_order: bool,
    /// Added to the diagonal of the Hessian, as a share of its mean.
    #[arg(long, default_value_t = 0.01)]
    pub percdamp: f64,
    /// Columns per block; rounded to whole groups.
    #[arg(long, value_name = "COLUMNS", default_value_t = 128)]
    pub block_size: usize,
    /// How a symmetric scale follows from the largest weight.
    #[arg(long, value_enum, default_value_t)]
    pub scale_rule: ScaleRule,
    /// Calibration text.
    #[command(flatten)]
    #[serde(flatten)]
    pub calibration: Calibration,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Gptq);

impl Gptq {
    fn grid(&self) -> Grid {
        Grid {
            bits: self.bits,
            symmetric: !self.asymmetric,
            rule: self.scale_rule,
            scheme: Scheme::Linear,
        }
    }

    /// Columns per block for rows of `inputs`.
    fn block(&self, inputs: usize) -> usize {
        whole_groups(self.block_size, self.group.size().unwrap_or(inputs), inputs)
    }
}

/// Columns per block in whole groups, so that a group is complete when the walk enters it. Whole rows are fitted before the walk
/// and ask for nothing.
pub(crate) fn whole_groups(block: usize, group: usize, inputs: usize) -> usize {
    if group < inputs { (block / group).max(1) * group } else { block }
}

impl Method for Gptq {
    const INFO: Info = Info {
        name: "gptq",
        title: "GPTQ",
        summary: "Rounds weights to a few bits and moves the others so that outputs change least",
        family: Family::Quantize,
        paper: Paper {
            title: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
            reference: "arXiv:2210.17323",
            year: 2022,
        },
        inputs: InputSpec::CALIBRATED,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["quantization", "post-training", "weight-only"],
            needs: Effort::Calibration,
            touches: &[Touches::Weights],
            composes_with: &[],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        let name = Self::INFO.name;
        check_bits(name, self.bits)?;
        check_solver(name, self.percdamp, self.block_size)?;
        self.calibration.check(name)?;
        let model = &inputs.models[0];
        let sites = linears(model)?;
        for site in &sites {
            self.group.resolve(&site.name, shape_of(site).1)?;
        }
        let mut plan = rewrite::plan(self, model, &sites, self.dtype);
        plan.warnings = grid_warnings(model, &self.grid(), self.group.size());
        self.calibration.describe(&mut plan, model);
        plan.steps.push(format!(
            "round {} matrices to {} bits, group {}, repairing as it goes",
            sites.len(),
            self.bits,
            self.group
        ));
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let mut method = Run { parameters: self, record: Record::default(), solver: None };
        calibrated::run(inputs, plan, cx, &self.calibration, &mut method)
    }
}

struct Run<'a> {
    parameters: &'a Gptq,
    record: Record,
    solver: Option<ColumnSolver>,
}

impl OneShot for Run<'_> {
    fn request(&self) -> StatsRequest {
        StatsRequest::GRAM
    }

    fn order(&self) -> Order {
        Order::WithinBlock
    }

    fn prepare(&mut self, site: &Site, stats: &ColumnStats) -> Result<()> {
        let (percdamp, act_order) = (self.parameters.percdamp, self.parameters.act_order);
        let block = self.parameters.block(stats.columns());
        let options = SolverOptions { percdamp, act_order, block };
        self.solver = Some(solver_of(site, stats, options)?);
        Ok(())
    }

    fn apply(&mut self, site: &Site, weights: &mut [f32], _: &ColumnStats) -> Result<()> {
        let solver = self.solver.as_ref().expect("invariant: prepare() comes first");
        let (grid, inputs) = (self.parameters.grid(), shape_of(site).1);
        let group = self.parameters.group.resolve(&site.name, inputs)?;
        let before = weights.to_vec();
        let on_the_way = !self.parameters.act_order;
        let mut rule = GridRule::new(grid, weights, inputs, group, solver.order(), on_the_way);
        solver.solve(weights, &mut rule);
        self.record.add(&site.name, &grid, inputs, group, &before, weights);
        Ok(())
    }

    fn finish(&mut self, inputs: &Inputs) -> Result<(Vec<SideFile>, Value)> {
        self.record.take().finish(&inputs.models[0])
    }
}
