//! SmoothQuant (arXiv:2211.10438): outliers of activations move into the weights, and both are rounded to 8 bits.
//!
//! A few channels of what a norm gives out are a hundred times larger than the rest, in every token, and take the grid of 8 bits
//! for themselves. Dividing channel `j` by
//!
//! ```text
//! s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)
//! ```
//!
//! in the norm, and multiplying the columns of the linears behind it ([`super::fold`]), leaves the model as it is and shares the
//! difficulty between both. Weights are then rounded symmetrically per output channel, with the largest weight exact;
//! activations are rounded per token while the model runs (`refit.quantization.json` says so, `refit eval` simulates it, and
//! `refit export --to compressed-tensors --activations int8` writes it).
//!
//! As in the reference, only inputs of linears behind norms are smoothed, `max|W_j|` is taken over all linears that read the
//! channel, and scales below 1e-5 are raised to it. Decided: statistics of a block come from the blocks before it as they were
//! written, in the order of the stream; the reference collects them on the float model, which is the same but for the rounding
//! of weights.

use clap::Args;
use refit_nn::block::Block;
use refit_nn::ops;
use refit_nn::rounding::{Rounder, Rounding};
use refit_store::SideFile;
use refit_train::calibrate::{self, BlockStats};
use refit_train::observe::StatsRequest;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::blockwise::{self, BlockMethod, Data, Stored};
use crate::calibrated::Calibration;
use crate::error::{Error, Result};
use crate::method::{
    Context, Effort, Family, Info, Inputs, Method, Output, OutputKind, Paper, Plan, Taxonomy,
    Touches,
};
use crate::quantize::fold::{self, Fold};
use crate::quantize::grid::{Grid, ScaleRule};
use crate::quantize::options::check_bits;
use crate::quantize::record::{Record, grid_warnings};
use crate::rewrite::{self, OutputType, linears};

/// Parameters of SmoothQuant.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct SmoothQuant {
    /// How much of the difficulty moves into the weights: 0 none, 1 all.
    #[arg(long, default_value_t = 0.5)]
    pub alpha: f64,
    /// Bits per weight, 2 to 8.
    #[arg(long, default_value_t = 8)]
    pub bits: u8,
    /// Bits of activations, 2 to 8, rounded per token while the model runs.
    #[arg(long, default_value_t = 8)]
    pub activation_bits: u8,
    /// Only move the scales: weights and activations stay as they are, for another method to round.
    #[arg(long)]
    pub fold_only: bool,
    /// Calibration data.
    #[command(flatten)]
    #[serde(flatten)]
    pub calibration: Calibration,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(SmoothQuant);

/// Smallest scale.
const LEAST: f32 = 1e-5;

/// `s_j` from the largest magnitudes of inputs and weights.
fn smoothing(inputs: &[f32], weights: &[f32], alpha: f64) -> Vec<f32> {
    let scale = |(x, w): (&f32, &f32)| {
        let (x, w) = (f64::from(x.max(LEAST)), f64::from(w.max(LEAST)));
        let scale = (x.powf(alpha) / w.powf(1.0 - alpha)) as f32;
        scale.max(LEAST)
    };
    inputs.iter().zip(weights).map(scale).collect()
}

impl Method for SmoothQuant {
    const INFO: Info = Info {
        name: "smoothquant",
        title: "SmoothQuant",
        summary: "Moves outliers of activations into the weights and rounds both to 8 bits",
        family: Family::Quantize,
        paper: Paper {
            title: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
            reference: "arXiv:2211.10438",
            year: 2022,
        },
        inputs: blockwise::INPUTS,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["quantization", "post-training", "weights and activations"],
            needs: Effort::Calibration,
            touches: &[Touches::Weights, Touches::Activations],
            composes_with: &["gptq"],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        let name = Self::INFO.name;
        check_bits(name, self.bits)?;
        if !(2..=8).contains(&self.activation_bits) {
            let expected = "a whole number from 2 to 8";
            return Err(Error::range(name, "activation_bits", self.activation_bits, expected));
        }
        if !(0.0..=1.0).contains(&self.alpha) {
            return Err(Error::range(name, "alpha", self.alpha, "from 0 to 1"));
        }
        self.calibration.check(name)?;
        let model = &inputs.models[0];
        let sites = linears(model)?;
        let folds = fold::of_norms(model)?;
        Data::check(name, inputs)?;
        let mut plan = rewrite::plan(self, model, &sites, self.dtype);
        fold::mark(&mut plan, model, &folds);
        self.calibration.describe(&mut plan, model);
        plan.steps.push(format!("move a scale per channel through {} norms", folds.len()));
        if !self.fold_only {
            plan.warnings = grid_warnings(model, &self.grid(), None);
            plan.steps.push(format!(
                "round {} matrices to {} bits per row; activations are to be rounded to {} bits per token",
                sites.len(),
                self.bits,
                self.activation_bits
            ));
        }
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let folds = fold::of_norms(&inputs.models[0])?;
        let mut method =
            Run { parameters: self, folds, record: Record::default(), rounder: Rounder::default() };
        blockwise::run(inputs, plan, cx, &self.calibration, &mut method)
    }
}

impl SmoothQuant {
    fn grid(&self) -> Grid {
        Grid { rule: ScaleRule::Absmax, ..Grid::symmetric(self.bits) }
    }
}

struct Run<'a> {
    parameters: &'a SmoothQuant,
    folds: Vec<Fold>,
    record: Record,
    rounder: Rounder,
}

impl BlockMethod for Run<'_> {
    fn options(&self) -> calibrate::Options {
        calibrate::Options::new(StatsRequest::ABS_MAX)
    }

    fn change(
        &mut self,
        _: usize,
        block: &mut Block,
        stats: &BlockStats,
        stored: &Stored,
    ) -> Result<()> {
        for group in stats.groups() {
            let Some(fold) = self.folds.iter().find(|fold| fold.consumers == group.sites) else {
                continue;
            };
            let mut largest = vec![0f32; group.stats.columns()];
            for linear in block.linears().iter().filter(|l| group.sites.contains(&l.site)) {
                for row in ops::to_vec(&linear.weight()).chunks(largest.len()) {
                    largest.iter_mut().zip(row).for_each(|(m, w)| *m = m.max(w.abs()));
                }
            }
            let scales = smoothing(group.stats.abs_max(), &largest, self.parameters.alpha);
            fold.apply(block, &scales, None, stored)?;
        }
        if self.parameters.fold_only {
            return Ok(());
        }
        let grid = self.parameters.grid();
        for linear in block.linears_mut() {
            let weight = linear.weight();
            let (inputs, device) = (weight.dims()[1], weight.device());
            let before = ops::to_vec(&weight);
            let mut after = before.clone();
            after.chunks_mut(inputs).for_each(|row| grid.snap_row(row, inputs));
            self.record.add(
                &format!("{}.weight", linear.site),
                &grid,
                inputs,
                inputs,
                &before,
                &after,
            );
            let bits = self.parameters.activation_bits;
            self.rounder.insert(format!("{}:in", linear.site), Rounding::Token { bits });
            linear.set_weight(after, &device);
        }
        Ok(())
    }

    fn finish(&mut self, inputs: &Inputs) -> Result<(Vec<SideFile>, Value)> {
        if self.parameters.fold_only {
            return Ok((Vec::new(), serde_json::json!({ "folded": self.folds.len() })));
        }
        let record = self.record.take().with_activations(&self.rounder);
        let (files, mut report) = record.finish(&inputs.models[0])?;
        report["activation_bits"] = self.parameters.activation_bits.into();
        Ok((files, report))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn difficulty_is_shared_as_alpha_says() {
        let (x, w) = ([100.0, 1.0, 0.0], [0.5, 0.5, 0.0]);
        let half = smoothing(&x, &w, 0.5);
        // After smoothing, the ranges of inputs and weights agree.
        for j in 0..2 {
            assert!((x[j] / half[j] - w[j] * half[j]).abs() < 1e-4, "{half:?}");
        }
        assert!(half.iter().all(|s| s.is_finite() && *s > 0.0));
        let all = smoothing(&x, &w, 1.0);
        assert!((all[0] - 100.0).abs() < 1e-3 && (all[1] - 1.0).abs() < 1e-5);
    }
}
