//! HQQ, half-quadratic quantization (Badri and Shaji 2023, <https://mobiusml.github.io/hqq_blog/>): grids fitted to weights alone,
//! with a loss that forgives outliers.
//!
//! For a group `w` with scale `s` and zero point `z`, `q = clamp(round(w / s + z), 0, 2^b - 1)` and `w_hat = (q - z) s`, the loss
//! `|w - w_hat|_p^p` with `p < 1` is split by a variable `e` for the error, and both halves have a closed form:
//!
//! ```text
//! e <- shrink(w - w_hat, beta) = sign(x) max(0, |x| - |x|^(p-1) / beta)
//! z <- mean(q - (w - e) / s),   beta <- kappa beta
//! ```
//!
//! as in the reference (recalled: `p = 0.7, beta = 10, kappa = 1.01`, 20 rounds). There the zero point stays a fraction, which
//! formats with whole zero points cannot say. Decided here: zero points are whole by default, and the scale, which the reference
//! keeps, takes the closed form `s <- <w - e, n> / <n, n>` with `n = q - z`, so that the grid still moves; `--float-zero` is the
//! reference. Decided, too: every group keeps the best step that it met, where the reference stops all groups together when the
//! mean error of the whole matrix rises.

use clap::Args;
use rayon::prelude::*;
use refit_store::architecture::Site;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::method::{
    Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper, Plan,
    Taxonomy, Touches,
};
use crate::quantize::chain::Group;
use crate::quantize::grid::{Grid, Step};
use crate::quantize::options::{check_bits, mean_bits};
use crate::quantize::record::{QuantizedTensor, Record, grid_warnings};
use crate::rewrite::{self, OutputType, linears, shape_of};

/// Parameters of HQQ.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Hqq {
    /// Bits per weight, 2 to 8.
    #[arg(long, default_value_t = 4)]
    pub bits: u8,
    /// Consecutive inputs that share a scale and a zero point, or `row`.
    #[arg(long, default_value = "64")]
    pub group: Group,
    /// Exponent of the loss, above 0 and at most 1.
    #[arg(long, value_name = "P", default_value_t = 0.7)]
    pub lp_norm: f64,
    /// Weight of the quadratic half at the start.
    #[arg(long, default_value_t = 10.0)]
    pub beta: f64,
    /// Growth of that weight from round to round.
    #[arg(long, default_value_t = 1.01)]
    pub kappa: f64,
    /// Rounds.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub iterations: usize,
    /// Let zero points be fractions, as the reference does: closer, but on no grid of whole numbers, so that `refit export` can
    /// only write the weights decoded or quantize them again.
    #[arg(long)]
    pub float_zero: bool,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Hqq);

impl Hqq {
    fn grid(&self) -> Grid {
        Grid::asymmetric(self.bits)
    }

    fn bits_per_weight(&self, group: usize) -> f64 {
        match self.float_zero {
            true => f64::from(self.bits) + 32.0 / group as f64,
            false => self.grid().bits_per_weight(group),
        }
    }

    /// Replaces a group by its grid values.
    fn snap(&self, group: &mut [f32]) {
        let fitted = self.fit(group);
        let grid = self.grid();
        match self.float_zero {
            true => group.iter_mut().for_each(|w| *w = float_snap(*w, fitted, self.bits)),
            false => group.iter_mut().for_each(|w| *w = grid.snap(*w, fitted)),
        }
    }

    /// The best step that the rounds meet, by the loss that they lower.
    fn fit(&self, group: &[f32]) -> Step {
        let mut step = self.grid().fit(group);
        let mut best = (f64::INFINITY, step);
        let mut beta = self.beta;
        for round in 0..=self.iterations {
            let (loss, next) = self.round(group, step, beta);
            if loss < best.0 {
                best = (loss, step);
            }
            if round < self.iterations {
                (step, beta) = (next, beta * self.kappa);
            }
        }
        best.1
    }

    /// The loss of a step, and the step that follows from the errors that it leaves: both need `|e|^(p-1)`, which is what a round
    /// costs.
    fn round(&self, group: &[f32], step: Step, beta: f64) -> (f64, Step) {
        let top = f32::from((1u16 << self.bits) - 1);
        let (scale, zero) = (f64::from(step.scale), f64::from(step.zero));
        let (mut loss, mut inner, mut norm, mut zeros) = (0f64, 0f64, 0f64, 0f64);
        for &w in group {
            // Rounding before a whole zero point is added is the same but for ties.
            let code = (w / step.scale + step.zero).round_ties_even().clamp(0.0, top);
            let (w, n) = (f64::from(w), f64::from(code) - zero);
            let error = w - n * scale;
            let power = if error == 0.0 { 0.0 } else { steepness(error, self.lp_norm) };
            loss += error.abs() * power;
            let target = w - shrink(error, power / beta);
            inner += target * n;
            norm += n * n;
            zeros += f64::from(code) - target / scale;
        }
        let zero = (zeros / group.len() as f64) as f32;
        let next = if self.float_zero {
            Step { scale: step.scale, zero: half::f16::from_f32(zero).to_f32() }
        } else {
            let fitted = if norm > 0.0 && inner > 0.0 { (inner / norm) as f32 } else { step.scale };
            self.grid().stored(fitted, zero)
        };
        (loss, next)
    }
}

/// `|e|^(p-1)`: single precision is plenty for a weight between errors.
fn steepness(error: f64, p: f64) -> f64 {
    f64::from((error.abs() as f32).powf((p - 1.0) as f32))
}

/// The proximal operator of `|e|^p` (Badri and Shaji 2023; generalized soft thresholding), given `|e|^(p-1) / beta`.
fn shrink(error: f64, by: f64) -> f64 {
    error.signum() * (error.abs() - by).max(0.0)
}

/// The nearest value of a grid whose zero point is a fraction.
fn float_snap(w: f32, step: Step, bits: u8) -> f32 {
    let top = f32::from((1u16 << bits) - 1);
    ((w / step.scale + step.zero).round_ties_even().clamp(0.0, top) - step.zero) * step.scale
}

impl Method for Hqq {
    const INFO: Info = Info {
        name: "hqq",
        title: "HQQ",
        summary: "Fits grids to the weights alone with a loss that forgives outliers",
        family: Family::Quantize,
        paper: Paper {
            title: "Half-Quadratic Quantization of Large Machine Learning Models",
            reference: "mobiusml.github.io/hqq_blog",
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
        if !(self.lp_norm > 0.0 && self.lp_norm <= 1.0) {
            return Err(Error::range(name, "lp_norm", self.lp_norm, "above 0 and at most 1"));
        }
        for (key, value) in [("beta", self.beta), ("kappa", self.kappa)] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::range(name, key, value, "a positive number"));
            }
        }
        let model = &inputs.models[0];
        let sites = linears(model)?;
        let bits = mean_bits(&sites, self.group, |group| self.bits_per_weight(group))?;
        let mut plan = rewrite::plan(self, model, &sites, self.dtype);
        plan.warnings = grid_warnings(model, &self.grid(), self.group.size());
        if self.float_zero {
            plan.notes.push(
                "zero points are fractions: the result lies on no grid of whole numbers, and refit export keeps no codes of it"
                    .into(),
            );
        }
        plan.steps.push(format!(
            "fit {} matrices to {} bits, group {}, in {} rounds: {:.3} bits per weight with scales and zero points",
            sites.len(),
            self.bits,
            self.group,
            self.iterations,
            bits
        ));
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let record = Record::default();
        let edit = |site: &Site, weights: &mut [f32]| {
            let columns = shape_of(site).1;
            let group = self.group.resolve(&site.name, columns)?;
            let before = weights.to_vec();
            weights.par_chunks_mut(columns).for_each(|row| {
                row.chunks_mut(group).for_each(|group| self.snap(group));
            });
            let rows = before.len() / columns.max(1);
            let mut entry = QuantizedTensor::of(&self.grid(), rows, columns, group);
            if self.float_zero {
                // Zero points take 16 bits, not as many as a code.
                let extra =
                    before.len() as f64 * (self.bits_per_weight(group) - entry.bits_per_weight);
                entry.packed_bytes += (extra / 8.0) as u64;
                entry.bits_per_weight = self.bits_per_weight(group);
            }
            record.measure(&site.name, entry, &before, weights);
            Ok(())
        };
        rewrite::rewrite(inputs, plan, cx, &edit, || record.take().finish(&inputs.models[0]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Stream;

    fn loss(before: &[f32], after: &[f32], p: f64) -> f64 {
        before.iter().zip(after).map(|(a, b)| f64::from((a - b).abs()).powf(p)).sum()
    }

    /// Gaussian weights with a few far outliers.
    fn weights(seed: u64) -> Vec<f32> {
        let mut weights = Stream::new(seed).normals(64 * 32);
        for (i, w) in weights.iter_mut().enumerate() {
            if i % 97 == 0 {
                *w *= 6.0;
            }
        }
        weights
    }

    #[test]
    fn shrinking_pulls_towards_zero_and_forgets_what_is_small() {
        let prox = |e: f64, p: f64| shrink(e, steepness(e, p) / 10.0);
        assert_eq!(prox(1e-3, 0.7), 0.0);
        let found = prox(-2.0, 0.7);
        assert!((found + 2.0 - 2f64.powf(-0.3) / 10.0).abs() < 1e-7, "{found}");
        assert_eq!(prox(3.0, 1.0), 2.9);
        assert_eq!(shrink(0.0, 0.0), 0.0);
    }

    #[test]
    fn no_group_is_worse_than_rounding_and_the_whole_is_better() {
        for (bits, float_zero) in [(2, false), (3, false), (4, false), (3, true)] {
            let hqq = Hqq { bits, float_zero, ..Hqq::default() };
            let weights = weights(bits.into());
            let (mut fitted, mut rounded) = (weights.clone(), weights.clone());
            for (a, b) in fitted.chunks_mut(64).zip(rounded.chunks_mut(64)) {
                let before = a.to_vec();
                hqq.snap(a);
                hqq.grid().snap_row(b, 64);
                let (found, plain) = (loss(&before, a, 0.7), loss(&before, b, 0.7));
                assert!(found <= plain * (1.0 + 1e-6), "{bits} {float_zero}: {found} {plain}");
                let mut levels: Vec<u32> = a.iter().map(|w| w.to_bits()).collect();
                levels.sort_unstable();
                levels.dedup();
                assert!(levels.len() <= 1 << bits);
            }
            let (found, plain) = (loss(&weights, &fitted, 0.7), loss(&weights, &rounded, 0.7));
            assert!(found < 0.97 * plain, "{bits} {float_zero}: {found} against {plain}");
        }
    }

    #[test]
    fn whole_zero_points_lie_on_the_lattice() {
        use refit_store::DType;
        use refit_store::lattice::Lattice;
        let hqq = Hqq { bits: 3, ..Hqq::default() };
        let mut weights = weights(9);
        weights.chunks_mut(64).for_each(|group| hqq.snap(group));
        let lattice = Lattice { bits: 3, symmetric: false, group: 64 };
        assert!(lattice.find(&weights, DType::F32).is_ok());
    }

    #[test]
    fn zeros_and_no_rounds_are_plain_rounding() {
        let hqq = Hqq { iterations: 0, ..Hqq::default() };
        let (mut a, mut b) = (weights(3), weights(3));
        a.chunks_mut(64).for_each(|group| hqq.snap(group));
        hqq.grid().snap_row(&mut b, 64);
        assert_eq!(a, b);
        let mut zeros = [0.0; 64];
        Hqq::default().snap(&mut zeros);
        assert_eq!(zeros, [0.0; 64]);
    }
}
