//! DSnoT: *Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs* (arXiv:2310.08915).
//!
//! Corrects the mask of another criterion by swaps, row by row, until what the mask takes away from the
//! expected output is small ([`refine`]). Weights are never changed, only which of them stay.
//!
//! Differences from the released code, all deliberate:
//! - its `sparsegpt` start never accumulates a Hessian; here it is the real one;
//! - when no candidate of the wanted sign is left, a row stops instead of walking into weights that
//!   contribute nothing;
//! - the threshold is in units of an output summed over 2048 tokens, and is scaled to the length of the
//!   calibration sequences: `eps L / 2048`;
//! - stopping when the error changes sign is a flag for unstructured patterns (the released default is
//!   not to stop) and always on for N:M.

use clap::Args;
use refit_store::SideFile;
use refit_store::architecture::{Role, Site};
use refit_train::observe::{ColumnStats, StatsRequest};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::calibrated::{self, Calibration, OneShot, narrow, solver_of};
use crate::error::{Error, Result};
use crate::method::{
    Claim, Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper,
    Plan, Taxonomy, Touches,
};
use crate::prune::mask::{Pattern, select};
use crate::prune::options::{self, Masks, check, check_calibrated};
use crate::prune::saliency::{self, Criterion};
use crate::rewrite::{self, OutputType, linears, shape_of};
use crate::solver::SolverOptions;

mod claim;
pub mod refine;

use refine::{InputStats, RefineOptions, Refined};

/// Which matrices keep the initial mask.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
pub enum SkipLayer {
    /// Those of the MLP: only attention is refined.
    #[default]
    #[value(name = "mlp")]
    #[serde(rename = "mlp")]
    Mlp,
    /// None.
    #[value(name = "no_skip", alias = "no-skip")]
    #[serde(rename = "no_skip", alias = "no-skip")]
    NoSkip,
}

/// Parameters of DSnoT.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Dsnot {
    /// Where the mask starts.
    #[arg(long, value_enum, default_value_t)]
    pub initial: Criterion,
    /// Share of weights to prune, from 0 up to but not including 1.
    #[arg(long, default_value_t = 0.5)]
    pub sparsity: f64,
    /// `row`, or N:M, by which N of every M inputs go.
    #[arg(long, default_value = "row")]
    pub pattern: Pattern,
    /// Most swaps per row.
    #[arg(long, value_name = "T", default_value_t = 50)]
    pub max_cycle: usize,
    /// Expected error of an output, summed over 2048 tokens, below which a row is done.
    #[arg(long, value_name = "EPS", default_value_t = 0.1)]
    pub update_threshold: f64,
    /// How much an input's variance counts against bringing its weight back: 0, 0.5 or 1.
    #[arg(long, value_name = "GAMMA", default_value_t = 1.0)]
    pub pow_of_var: f64,
    /// Stop a row before its error changes sign.
    #[arg(long)]
    pub same_sign: bool,
    /// Matrices that keep the initial mask.
    #[arg(long, value_enum, default_value_t)]
    pub skip_layer: SkipLayer,
    /// Calibration text.
    #[command(flatten)]
    #[serde(flatten)]
    pub calibration: Calibration,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Dsnot);

impl Method for Dsnot {
    const INFO: Info = Info {
        name: "dsnot",
        title: "DSnoT",
        summary: "Repairs a pruning mask by swapping weights, without training and without changing any",
        family: Family::Prune,
        paper: Paper {
            title: "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
            reference: "arXiv:2310.08915",
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
        if self.pattern == Pattern::Tensor {
            let expected = "row or N:M: swaps are made within a row and keep its count";
            return Err(Error::range(name, "pattern", self.pattern, expected));
        }
        if self.update_threshold.is_nan() || self.update_threshold < 0.0 {
            let expected = "a number from 0 on";
            return Err(Error::range(name, "update_threshold", self.update_threshold, expected));
        }
        if !(0.0..=8.0).contains(&self.pow_of_var) {
            return Err(Error::range(name, "pow_of_var", self.pow_of_var, "0, 0.5 or 1"));
        }
        self.calibration.check(name)?;
        let mut plan = rewrite::plan(self, model, &sites, self.dtype);
        self.calibration.describe(&mut plan, model);
        options::describe(&mut plan, &sites, self.sparsity, self.pattern);
        let refined = sites.iter().filter(|site| self.refines(site)).count();
        plan.steps.push(format!(
            "refine the masks of {refined} of {} matrices by at most {} swaps per row",
            sites.len(),
            self.max_cycle
        ));
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let mut method = Run {
            parameters: self,
            masks: Masks::default(),
            diagonal: Vec::new(),
            total: Refined::default(),
            matrices: 0,
            seconds: 0.0,
        };
        let mut output = calibrated::run(inputs, plan, cx, &self.calibration, &mut method)?;
        output.report["refinement"]["seconds"] = json!(method.seconds);
        Ok(output)
    }

    fn claim() -> Option<Claim> {
        Some(claim::CLAIM)
    }
}

impl Dsnot {
    fn refines(&self, site: &Site) -> bool {
        self.skip_layer == SkipLayer::NoSkip
            || !matches!(site.role, Role::Gate | Role::Up | Role::GateUp | Role::Down)
    }
}

struct Run<'a> {
    parameters: &'a Dsnot,
    masks: Masks,
    /// `U_jj`, for the SparseGPT start.
    diagonal: Vec<f32>,
    total: Refined,
    matrices: usize,
    seconds: f64,
}

impl OneShot for Run<'_> {
    fn request(&self) -> StatsRequest {
        let moments = StatsRequest::SUM | StatsRequest::SUM_SQUARES | StatsRequest::VARIANCE;
        match self.parameters.initial {
            Criterion::SparseGpt => moments | StatsRequest::GRAM,
            _ => moments,
        }
    }

    fn prepare(&mut self, site: &Site, stats: &ColumnStats) -> Result<()> {
        if self.parameters.initial == Criterion::SparseGpt {
            let options = SolverOptions { percdamp: 0.01, act_order: false, block: 128 };
            self.diagonal = solver_of(site, stats, options)?.diagonal();
        }
        Ok(())
    }

    fn apply(&mut self, site: &Site, weights: &mut [f32], stats: &ColumnStats) -> Result<()> {
        let parameters = self.parameters;
        let roots: Vec<f64> = stats.sequence_mean_squares().iter().map(|q| q.sqrt()).collect();
        let norms = narrow(&roots);
        let scores = match parameters.initial {
            Criterion::Magnitude => saliency::magnitude(weights),
            Criterion::Wanda => saliency::wanda(weights, &norms),
            Criterion::SparseGpt => saliency::sparsegpt(weights, &self.diagonal),
        };
        let mut mask = select(&scores, shape_of(site).1, parameters.pattern, parameters.sparsity);
        if parameters.refines(site) {
            let started = std::time::Instant::now();
            let length = stats.rows() as f64 / stats.sequences().max(1) as f64;
            let options = RefineOptions {
                max_cycle: parameters.max_cycle,
                epsilon: (parameters.update_threshold * length / 2048.0) as f32,
                gamma: parameters.pow_of_var as f32,
                same_sign: parameters.same_sign,
            };
            let (sums, variances) =
                (narrow(&stats.sequence_mean_sum()), narrow(&stats.within_variance()));
            let inputs = InputStats { sums: &sums, norms: &norms, variances: &variances };
            let done =
                refine::refine(weights, inputs, &scores, &mut mask, parameters.pattern, options);
            self.total.swaps += done.swaps;
            self.total.error_before += done.error_before;
            self.total.error_after += done.error_after;
            self.matrices += 1;
            self.seconds += started.elapsed().as_secs_f64();
        }
        mask.apply(weights);
        self.masks.add(&site.name, mask);
        Ok(())
    }

    fn finish(&mut self, _: &Inputs) -> Result<(Vec<SideFile>, Value)> {
        let (files, mut report) = self.masks.finish()?;
        let count = self.matrices.max(1) as f64;
        report["refinement"] = json!({
            "matrices": self.matrices,
            "swaps": self.total.swaps,
            "mean_error_before": self.total.error_before / count,
            "mean_error_after": self.total.error_after / count,
        });
        Ok((files, report))
    }
}
