//! AWQ: *Activation-aware Weight Quantization for LLM Compression and Acceleration* (arXiv:2306.00978).
//!
//! Few channels carry what matters, and the activations tell which. Multiplying their weights before rounding and dividing
//! their inputs leaves the model as it is and makes their relative error smaller:
//!
//! ```text
//! s = mean|x|^a,   s <- s / sqrt(max s min s),   a* = argmin over a in {0, 1/20, ..., 19/20} of |f(Q(W diag(s)) diag(s)^-1; x) - f(W; x)|^2
//! ```
//!
//! `f` is the part of the block behind the linears: attention for q, k and v, the ffn for gate and up, the linear itself for the
//! output and down projections. The division goes into the norm or the linear before ([`super::fold`]). Then a symmetric clip of
//! every group is searched for all linears but q and k, by the error of the linear's own outputs: 10 of 20 shrinkages, as in
//! the reference (defaults recalled from `mit-han-lab/llm-awq`). `--duo-scaling` divides by the weights' own size, too:
//! `s = mean|x|^a / mean|w|^(1-a)`, as AutoAWQ and llm-compressor do.
//!
//! Decided here: errors of single linears are taken from the correlations of all calibration inputs, where the reference samples
//! 512 tokens for the clip. Query heads that share a value head share its scale, the mean of theirs, where the reference leaves
//! the output projection of grouped-query models alone. Where nothing can be moved (a nonlinearity in between) a linear keeps
//! its scale of 1, and the plan says so; models with norms after the residual sum are refused.

use clap::Args;
use refit_nn::block::Block;
use refit_nn::ops;
use refit_store::SideFile;
use refit_store::architecture::Role;
use refit_train::calibrate::{self, BlockStats};
use refit_train::observe::StatsRequest;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::blockwise::{self, BlockMethod, Data, Stored};
use crate::calibrated::{Calibration, narrow};
use crate::error::{Error, Result};
use crate::method::{
    Context, Effort, Family, Info, Inputs, Method, Output, OutputKind, Paper, Plan, Taxonomy,
    Touches,
};
use crate::quantize::chain::Group;
use crate::quantize::fold::{self, Fold};
use crate::quantize::grid::Grid;
use crate::quantize::options::check_bits;
use crate::quantize::record::{Record, grid_warnings};
use crate::rewrite::{self, OutputType, linears, shape_of};

mod search;

use search::{Search, clip};

/// Parameters of AWQ.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Awq {
    /// Bits per weight, 2 to 8.
    #[arg(long, default_value_t = 4)]
    pub bits: u8,
    /// Consecutive inputs that share a scale, or `row`.
    #[arg(long, default_value = "128")]
    pub group: Group,
    /// No zero points.
    #[arg(long)]
    pub symmetric: bool,
    /// Exponents that are tried, from 0 up to and without 1; twice the shrinkages of the clip.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub grid: usize,
    /// Let scales depend on the weights' own size, too.
    #[arg(long)]
    pub duo_scaling: bool,
    /// Search no clip.
    #[arg(long)]
    pub no_clip: bool,
    /// Calibration data.
    #[command(flatten)]
    #[serde(flatten)]
    pub calibration: Calibration,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Awq);

impl Awq {
    fn grid(&self) -> Grid {
        if self.symmetric { Grid::symmetric(self.bits) } else { Grid::asymmetric(self.bits) }
    }
}

impl Method for Awq {
    const INFO: Info = Info {
        name: "awq",
        title: "AWQ",
        summary: "Scales the channels that activations show to matter, clips, and rounds to a few bits",
        family: Family::Quantize,
        paper: Paper {
            title: "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
            reference: "arXiv:2306.00978",
            year: 2023,
        },
        inputs: blockwise::INPUTS,
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
        if !(1..=1000).contains(&self.grid) {
            return Err(Error::range(name, "grid", self.grid, "from 1 to 1000 exponents"));
        }
        self.calibration.check(name)?;
        let model = &inputs.models[0];
        let sites = linears(model)?;
        for site in &sites {
            self.group.resolve(&site.name, shape_of(site).1)?;
        }
        let (folds, fixed) = folds(model)?;
        Data::check(name, inputs)?;
        let mut plan = rewrite::plan(self, model, &sites, self.dtype);
        fold::mark(&mut plan, model, &folds);
        let size = match self.group {
            Group::Row => None,
            Group::Size(size) => Some(size),
        };
        plan.warnings = grid_warnings(model, &self.grid(), size);
        self.calibration.describe(&mut plan, model);
        plan.steps.push(format!(
            "search scales for the inputs of {} groups of linears among {} exponents{}",
            folds.len(),
            self.grid,
            if self.no_clip { "" } else { ", then clips" }
        ));
        plan.steps.push(format!(
            "round {} matrices to {} bits, group {}",
            sites.len(),
            self.bits,
            self.group
        ));
        if let Some(first) = fixed.first() {
            plan.notes.push(format!(
                "inputs of {} linears keep a scale of 1: nothing can be moved before them (the first: {first})",
                fixed.len()
            ));
        }
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let (folds, _) = folds(&inputs.models[0])?;
        let mut method =
            Run { parameters: self, folds, record: Record::default(), gains: Vec::new() };
        blockwise::run(inputs, plan, cx, &self.calibration, &mut method)
    }
}

/// What can be moved, and why the rest cannot.
fn folds(model: &crate::inputs::ModelInput) -> Result<(Vec<Fold>, Vec<String>)> {
    let mut folds = fold::of_norms(model)?;
    let mut fixed = Vec::new();
    for fold in fold::of_linears(model)? {
        match fold {
            Ok(fold) => folds.push(fold),
            Err(why) => fixed.push(why),
        }
    }
    Ok((folds, fixed))
}

struct Run<'a> {
    parameters: &'a Awq,
    folds: Vec<Fold>,
    record: Record,
    /// Error at the best exponent over that at exponent 0, for every search.
    gains: Vec<f64>,
}

impl BlockMethod for Run<'_> {
    fn options(&self) -> calibrate::Options {
        let mut options = calibrate::Options::new(StatsRequest::ABS_SUM | StatsRequest::GRAM);
        options.keep_inputs = true;
        options
    }

    fn change(
        &mut self,
        index: usize,
        block: &mut Block,
        stats: &BlockStats,
        stored: &Stored,
    ) -> Result<()> {
        let grid = self.parameters.grid();
        for group in stats.groups() {
            let width = group.stats.columns();
            let mut h = narrow(&group.stats.gram().expect("invariant: it was asked for"));
            let fold = self.folds.iter().find(|fold| fold.consumers == group.sites).cloned();
            if let Some(fold) = fold {
                let scales = self.scales(index, block, stats, group, &fold, &h)?;
                let moved = fold.apply(block, &scales, None, stored)?;
                for (row, a) in h.chunks_mut(width).zip(&moved) {
                    row.iter_mut().zip(&moved).for_each(|(h, b)| *h /= a * b);
                }
            }
            let architecture = stored.model.artifact.architecture();
            for site in &group.sites {
                // q and k meet in a product, where a clip of either shows twice: the reference leaves them alone.
                let role = architecture.site(&format!("{site}.weight")).map(|site| site.role);
                let attends = matches!(role, Some(Role::Q | Role::K | Role::Qkv));
                if self.parameters.no_clip || attends {
                    continue;
                }
                let linear = block.linear_mut(site).expect("invariant: its inputs were observed");
                let device = linear.weight().device();
                let mut weights = ops::to_vec(&linear.weight());
                let size = self.parameters.group.resolve(site, width)?;
                clip(&mut weights, width, size, &h, &grid, self.parameters.grid);
                linear.set_weight(weights, &device);
            }
        }
        for linear in block.linears_mut() {
            let weight = linear.weight();
            let (width, device) = (weight.dims()[1], weight.device());
            let before = ops::to_vec(&weight);
            let size = self.parameters.group.resolve(&linear.site, width)?;
            let mut after = before.clone();
            after.chunks_mut(width).for_each(|row| grid.snap_row(row, size));
            self.record.add(
                &format!("{}.weight", linear.site),
                &grid,
                width,
                size,
                &before,
                &after,
            );
            linear.set_weight(after, &device);
        }
        Ok(())
    }

    fn finish(&mut self, inputs: &Inputs) -> Result<(Vec<SideFile>, Value)> {
        let (files, mut report) = self.record.take().finish(&inputs.models[0])?;
        let mean = self.gains.iter().sum::<f64>() / self.gains.len().max(1) as f64;
        report["scaling"] = json!({ "searches": self.gains.len(), "mean_error_ratio": mean });
        Ok((files, report))
    }
}

impl Run<'_> {
    /// The best scales of one group, tied where channels must agree.
    fn scales(
        &mut self,
        index: usize,
        block: &Block,
        stats: &BlockStats,
        group: &calibrate::Group,
        fold: &Fold,
        h: &[f32],
    ) -> Result<Vec<f32>> {
        let width = group.stats.columns();
        let magnitudes = fold.tie(&narrow(&group.stats.abs_mean()));
        let size = self.parameters.group.resolve(&group.sites[0], width)?;
        let search = Search { index, block, stats, group, h, size, grid: self.parameters.grid() };
        let sizes = match self.parameters.duo_scaling {
            true => Some(fold.tie(&search.weight_sizes())),
            false => None,
        };
        let candidates = search::candidates(&magnitudes, sizes.as_deref(), self.parameters.grid);
        let (best, gain) = search.best(&candidates);
        self.gains.push(gain);
        Ok(candidates[best].clone())
    }
}
