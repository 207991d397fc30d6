//! What values a quantized weight may take.
//!
//! A grid is fitted to one group: `group` consecutive inputs of one output row of `W [out, in]`.
//! Symmetric grids have a scale `s` per group, asymmetric ones also an integer zero point `z`:
//!
//! | | codes | value | scale |
//! |---|---|---|---|
//! | symmetric, `full` | `-2^(b-1) ..= 2^(b-1)-1` | `q s` | `2 max\|w\| / (2^b - 1)` (FineQuant, compressed-tensors) |
//! | symmetric, `absmax` | the same | `q s` | `max\|w\| / (2^(b-1) - 1)`: the largest weight is exact |
//! | asymmetric | `0 ..= 2^b - 1` | `(q - z) s` | `(max - min) / (2^b - 1)`, 0 inside the range |
//! | log2 | sign and exponent `1 - 2^(b-1) ..= 0` | `± s 2^q` | `max\|w\|` |
//!
//! Scales are rounded to f16 *before* the codes are chosen, because that is how they are stored:
//! what is measured here is what a packed file decodes to.

use half::f16;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::quantize::chain::Group;

/// How a symmetric scale follows from the largest magnitude of a group.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleRule {
    /// `2 max|w| / (2^b - 1)`: all codes are used, the largest weight may be clamped by half a step.
    #[default]
    Full,
    /// `max|w| / (2^(b-1) - 1)`: nothing is clamped, one code is lost.
    Absmax,
    /// Whichever of the two has the lower squared error, group by group.
    Best,
}

/// Which values lie between zero and the largest.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Scheme {
    /// Equal steps.
    #[default]
    Linear,
    /// Powers of two.
    Log2,
}

/// Everything that fixes a grid but the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Bits per code, 2 to 8.
    pub bits: u8,
    /// No zero point.
    pub symmetric: bool,
    /// How a symmetric scale is chosen.
    pub rule: ScaleRule,
    /// Linear or powers of two.
    pub scheme: Scheme,
}

/// What is stored for one group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The scale, exactly representable in f16. Zero only in a log2 group of zeros.
    pub scale: f32,
    /// The zero point; 0 for symmetric grids.
    pub zero: f32,
}

/// A quantized matrix: codes and what decodes them.
#[derive(Clone, Debug, PartialEq)]
pub struct Codes {
    /// One code per weight, row-major. Linear: two's complement for symmetric grids, unsigned for
    /// asymmetric ones. Log2: `exponent` negated, with the sign in bit 7.
    pub codes: Vec<u8>,
    /// One per group, row by row.
    pub steps: Vec<Step>,
    /// Weights per row.
    pub inputs: usize,
    /// Weights per group.
    pub group: usize,
}

impl Grid {
    /// A symmetric linear grid with FineQuant's scale.
    pub const fn symmetric(bits: u8) -> Self {
        Self { bits, symmetric: true, rule: ScaleRule::Full, scheme: Scheme::Linear }
    }

    /// An asymmetric linear grid.
    pub const fn asymmetric(bits: u8) -> Self {
        Self { bits, symmetric: false, rule: ScaleRule::Full, scheme: Scheme::Linear }
    }

    /// Bits per weight with everything counted: codes, f16 scales and `bits`-wide zero points, for
    /// groups of `group` weights.
    pub fn bits_per_weight(&self, group: usize) -> f64 {
        let zero = if self.symmetric { 0 } else { u32::from(self.bits) };
        f64::from(self.bits) + f64::from(16 + zero) / group as f64
    }

    /// Exact bytes of `rows` packed rows of `inputs` weights: a whole number of bytes per matrix
    /// for the codes, and for scales and zero points.
    pub fn packed_bytes(&self, rows: usize, inputs: usize, group: usize) -> u64 {
        let (weights, groups) = (rows * inputs, rows * inputs.div_ceil(group));
        let zeros = if self.symmetric { 0 } else { groups * usize::from(self.bits) };
        ((weights * usize::from(self.bits)).div_ceil(8) + 2 * groups + zeros.div_ceil(8)) as u64
    }

    /// The smallest and the largest code of a symmetric grid.
    fn range(&self) -> (f32, f32) {
        if self.symmetric {
            let half = f32::from(1u16 << (self.bits - 1));
            (-half, half - 1.0)
        } else {
            (0.0, f32::from((1u16 << self.bits) - 1))
        }
    }

    /// Fits scale and zero point to a group.
    pub fn fit(&self, group: &[f32]) -> Step {
        let levels = f32::from((1u16 << self.bits) - 1);
        if self.scheme == Scheme::Log2 {
            return Step { scale: to_f16(max_abs(group)), zero: 0.0 };
        }
        if !self.symmetric {
            let (min, max) =
                group.iter().fold((0f32, 0f32), |(min, max), &w| (min.min(w), max.max(w)));
            return self.fit_range(min, max);
        }
        let largest = max_abs(group);
        let full = Step { scale: stored_scale(2.0 * largest / levels), zero: 0.0 };
        let (_, top) = self.range();
        let absmax = Step { scale: stored_scale(largest / top), zero: 0.0 };
        match self.rule {
            ScaleRule::Full => full,
            ScaleRule::Absmax => absmax,
            ScaleRule::Best if self.error(group, absmax) < self.error(group, full) => absmax,
            ScaleRule::Best => full,
        }
    }

    /// Scale and zero point of an asymmetric grid over a range, widened to hold 0.
    pub fn fit_range(&self, min: f32, max: f32) -> Step {
        let (min, max) = (min.min(0.0), max.max(0.0));
        let levels = f32::from((1u16 << self.bits) - 1);
        let scale = stored_scale((max - min) / levels);
        Step { scale, zero: round(-min / scale).clamp(0.0, levels) }
    }

    /// A step as it is stored: the scale in half precision, the zero point a code.
    pub fn stored(&self, scale: f32, zero: f32) -> Step {
        let (low, high) = self.range();
        let zero = if self.symmetric { 0.0 } else { round(zero).clamp(low, high) };
        Step { scale: stored_scale(scale), zero }
    }

    /// The nearest grid value to `weight`.
    #[inline]
    pub fn snap(&self, weight: f32, step: Step) -> f32 {
        if self.scheme == Scheme::Log2 {
            let code = self.log2_code(weight, step);
            return step.scale * exp2_of(-i32::from(code & 0x7f)) * weight.signum();
        }
        let (low, high) = self.range();
        // Adding zero turns -0 into 0: a code has no sign of its own.
        round((weight / step.scale).clamp(low - step.zero, high - step.zero)) * step.scale + 0.0
    }

    fn log2_code(&self, weight: f32, step: Step) -> u8 {
        let deepest = f32::from((1u16 << (self.bits - 1)) - 1);
        let ratio = weight.abs() / step.scale;
        let exponent =
            if ratio > 0.0 { (-ratio.log2()).round().clamp(0.0, deepest) } else { deepest };
        exponent as u8 | if weight.is_sign_negative() { 0x80 } else { 0 }
    }

    /// Squared error of a group under a step, summed.
    pub fn error(&self, group: &[f32], step: Step) -> f64 {
        group.iter().map(|&w| f64::from(w - self.snap(w, step)).powi(2)).sum()
    }

    /// Replaces every weight of a row by its grid value, group by group.
    ///
    /// # Panics
    /// When `group` is 0.
    pub fn snap_row(&self, row: &mut [f32], group: usize) {
        for group in row.chunks_mut(group) {
            let step = self.fit(group);
            for weight in group {
                *weight = self.snap(*weight, step);
            }
        }
    }

    /// Squared error of a row with groups of that size, summed.
    pub fn row_error(&self, row: &[f32], group: usize) -> f64 {
        row.chunks(group).map(|group| self.error(group, self.fit(group))).sum()
    }

    /// Encodes a matrix with rows of `inputs` weights.
    ///
    /// # Errors
    /// [`Error::Divisibility`](crate::Error::Divisibility) when the group does not divide a row.
    pub fn encode(
        &self,
        tensor: &str,
        weights: &[f32],
        inputs: usize,
        group: Group,
    ) -> Result<Codes> {
        let group = group.resolve(tensor, inputs)?;
        let mut codes = Vec::with_capacity(weights.len());
        let mut steps = Vec::with_capacity(weights.len() / group);
        for group in weights.chunks(group) {
            let step = self.fit(group);
            steps.push(step);
            codes.extend(group.iter().map(|&weight| match self.scheme {
                Scheme::Log2 => self.log2_code(weight, step),
                Scheme::Linear => {
                    let (low, high) = self.range();
                    let code =
                        round((weight / step.scale).clamp(low - step.zero, high - step.zero));
                    (code + step.zero) as i16 as u8
                }
            }));
        }
        Ok(Codes { codes, steps, inputs, group })
    }

    /// Decodes a matrix: bit for bit what [`snap_row`](Self::snap_row) leaves.
    pub fn decode(&self, codes: &Codes) -> Vec<f32> {
        codes
            .codes
            .chunks(codes.group)
            .zip(&codes.steps)
            .flat_map(|(group, step)| group.iter().map(|&code| self.value(code, *step)))
            .collect()
    }

    fn value(&self, code: u8, step: Step) -> f32 {
        match self.scheme {
            Scheme::Log2 => {
                let sign = if code & 0x80 != 0 { -1.0 } else { 1.0 };
                step.scale * exp2_of(-i32::from(code & 0x7f)) * sign
            }
            Scheme::Linear if self.symmetric => f32::from(code as i8) * step.scale,
            Scheme::Linear => (f32::from(code) - step.zero) * step.scale,
        }
    }
}

/// Rounds to the nearest integer, ties to even, for magnitudes below 2^22; unlike the library call
/// it vectorizes on every processor.
#[inline]
fn round(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23
    (x + SHIFT) - SHIFT
}

/// 2^exponent for small non-positive exponents, exactly.
fn exp2_of(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127).max(1) as u32) << 23)
}

fn max_abs(group: &[f32]) -> f32 {
    group.iter().fold(0.0, |largest: f32, w| largest.max(w.abs()))
}

fn to_f16(value: f32) -> f32 {
    f16::from_f32(value.min(f16::MAX.to_f32())).to_f32()
}

/// A scale as it will be stored. A group of zeros gets 1; a scale too small for f16 gets the
/// smallest that f16 has.
fn stored_scale(scale: f32) -> f32 {
    if scale == 0.0 { 1.0 } else { to_f16(scale).max(f16::from_bits(1).to_f32()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::Stream;

    const LOG2: Grid =
        Grid { bits: 4, symmetric: true, rule: ScaleRule::Full, scheme: Scheme::Log2 };

    #[test]
    fn decoding_gives_exactly_the_snapped_weights() {
        let weights = Stream::new(1).normals(64 * 8);
        let best = Grid { rule: ScaleRule::Best, ..Grid::symmetric(3) };
        for grid in [Grid::symmetric(4), Grid::asymmetric(4), Grid::symmetric(8), best, LOG2] {
            let codes = grid.encode("w", &weights, 64, Group::Size(16)).unwrap();
            let mut snapped = weights.clone();
            grid.snap_row(&mut snapped, 16);
            assert_eq!(grid.decode(&codes), snapped, "{grid:?}");
        }
    }

    #[test]
    fn errors_stay_within_half_a_step() {
        let weights = Stream::new(2).normals(4096);
        for bits in [2, 3, 4, 8] {
            for grid in [Grid::symmetric(bits), Grid::asymmetric(bits)] {
                for group in weights.chunks(64) {
                    let step = grid.fit(group);
                    let (low, high) = grid.range();
                    for &w in group {
                        let code = w / step.scale + step.zero;
                        if code >= low && code <= high {
                            let slack = step.scale * 0.5 * 1.0001;
                            assert!((w - grid.snap(w, step)).abs() <= slack);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn eight_bits_of_a_gaussian_row_lose_less_than_a_percent() {
        let row = Stream::new(3).normals(1536);
        let norm: f64 = row.iter().map(|w| f64::from(*w).powi(2)).sum();
        let relative = (Grid::symmetric(8).row_error(&row, 1536) / norm).sqrt();
        assert!(relative < 0.01, "{relative}");
    }

    #[test]
    fn zeros_stay_zeros_and_count_as_one() {
        for grid in [Grid::symmetric(4), Grid::asymmetric(4), LOG2] {
            let mut row = [0.0; 32];
            grid.snap_row(&mut row, 32);
            assert_eq!(row, [0.0; 32]);
        }
        assert_eq!(Grid::symmetric(4).fit(&[0.0; 4]), Step { scale: 1.0, zero: 0.0 });
    }

    #[test]
    fn a_row_that_lies_on_the_grid_is_left_alone() {
        let step = 0.0625;
        let row: Vec<f32> = (0..16).map(|q| q as f32 * step - 5.0 * step).collect();
        let mut snapped = row.clone();
        Grid::asymmetric(4).snap_row(&mut snapped, 16);
        assert_eq!(row, snapped);
    }

    #[test]
    fn everything_is_counted() {
        assert_eq!(Grid::symmetric(4).bits_per_weight(64), 4.25);
        assert_eq!(Grid::asymmetric(4).bits_per_weight(32), 4.625);
        assert!((Grid::symmetric(4).bits_per_weight(576) - 4.03).abs() < 0.003);
        assert_eq!(Grid::symmetric(4).packed_bytes(2, 64, 32), 64 + 8);
        assert_eq!(Grid::asymmetric(4).packed_bytes(2, 64, 32), 64 + 8 + 2);
    }

    #[test]
    fn extreme_magnitudes_stay_finite() {
        for grid in [Grid::symmetric(4), Grid::asymmetric(4), LOG2] {
            for scale in [1e-30f32, 1e30] {
                let mut row = [scale, -scale, 0.5 * scale, 0.0];
                grid.snap_row(&mut row, 4);
                assert!(row.iter().all(|w| w.is_finite()), "{grid:?} {row:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn best_is_never_worse_than_either_rule(
            row in prop::collection::vec(-8f32..8.0, 32), bits in 2u8..=8
        ) {
            let error = |rule| Grid { rule, ..Grid::symmetric(bits) }.row_error(&row, 16);
            let least = error(ScaleRule::Full).min(error(ScaleRule::Absmax));
            prop_assert!(error(ScaleRule::Best) <= least + 1e-9);
        }

        #[test]
        fn snapping_twice_changes_nothing_for_absmax(
            row in prop::collection::vec(-8f32..8.0, 32)
        ) {
            let grid = Grid { rule: ScaleRule::Absmax, ..Grid::symmetric(4) };
            let step = grid.fit(&row);
            for w in row {
                let once = grid.snap(w, step);
                prop_assert_eq!(once, grid.snap(once, step));
            }
        }
    }
}
