//! Codes and steps of weights that lie on a grid of equal steps: found in the values themselves, so that weights which
//! were quantized once, by whatever tool, can be said in another format without changing one of them.
//!
//! A group of weights lies on the grid when `w = round(n s)` for whole numbers `n` within bounds and one step `s` that half
//! precision holds; `round` is to the type in which the weights are stored (none for `f32`: 11 bits of step times 8 of
//! code fit). The step need not be the one that the quantizer used: half of it with twice the codes says the same.

use half::f16;
use serde::{Deserialize, Serialize};

use crate::convert::{f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::dtype::{DType, GgmlType};

/// Which codes a grid has, and how many weights share a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lattice {
    /// Bits of a code, 2 to 8.
    pub bits: u8,
    /// Codes are `-2^(bits-1) ..= 2^(bits-1) - 1`; otherwise `-z ..= 2^bits - 1 - z` with a zero point `z` of its own
    /// for every group, from 0 to `2^bits - 1`.
    pub symmetric: bool,
    /// Consecutive inputs that share a step.
    pub group: usize,
}

/// The grid of a GGML block type that stores plain multiples of a step.
pub(crate) fn of_blocks(ggml: GgmlType) -> Option<Lattice> {
    let (bits, group) = match ggml {
        GgmlType::TQ1_0 | GgmlType::TQ2_0 => (2, 256),
        GgmlType::Q4_0 => (4, 32),
        GgmlType::Q5_0 => (5, 32),
        GgmlType::Q8_0 => (8, 32),
        _ => return None,
    };
    Some(Lattice { bits, symmetric: true, group })
}

/// The codes of some groups.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Codes {
    /// One whole number for every weight.
    pub codes: Vec<i16>,
    /// One step for every group, exact in half precision; negative where only that fits.
    pub steps: Vec<f32>,
}

impl Lattice {
    /// Lowest and highest code, and how far the codes of one group (and 0) may lie apart.
    fn bounds(&self) -> (i32, i32, i32) {
        let levels = (1i32 << self.bits) - 1;
        match self.symmetric {
            true => (-(levels + 1) / 2, levels / 2, levels),
            false => (-levels, levels, levels),
        }
    }

    /// The codes of `weights`, whole groups one after the other, stored as `dtype`; `Err` with the index of the first
    /// group that is not on the grid.
    ///
    /// # Panics
    /// If `weights` are no whole groups.
    pub fn find(&self, weights: &[f32], dtype: DType) -> Result<Codes, usize> {
        assert!(weights.len().is_multiple_of(self.group), "invariant: whole groups");
        let mut found = Codes {
            codes: Vec::with_capacity(weights.len()),
            steps: Vec::with_capacity(weights.len() / self.group),
        };
        let mut codes = vec![0; self.group];
        for (index, group) in weights.chunks_exact(self.group).enumerate() {
            let step = self.find_group(group, dtype, &mut codes).ok_or(index)?;
            found.codes.extend_from_slice(&codes);
            found.steps.push(step);
        }
        Ok(found)
    }

    /// One group: tries every code that its largest weight may have, largest first.
    fn find_group(&self, group: &[f32], dtype: DType, codes: &mut [i16]) -> Option<f32> {
        let largest =
            group.iter().fold(0f32, |most, &x| if x.abs() > most.abs() { x } else { most });
        if !largest.is_finite() || group.iter().any(|x| x.is_nan()) {
            return None;
        }
        if largest == 0.0 {
            codes.fill(0);
            return Some(1.0);
        }
        let (low, high, width) = self.bounds();
        let fits = |step: f32, codes: &mut [i16]| {
            let (mut least, mut most) = (0, 0);
            for (code, &x) in codes.iter_mut().zip(group) {
                let nearest = (x / step).round_ties_even();
                // Rounding to 16 bits moves large codes by almost half a step: the nearest code may be a neighbour's.
                let around = [0.0, -1.0, 1.0].map(|by| nearest + by);
                let tried = if dtype == DType::F32 { &around[..1] } else { &around };
                let Some(n) = tried.iter().find(|&&n| stored(n * step, dtype) == x) else {
                    return false;
                };
                let n = *n as i32;
                (least, most) = (least.min(n), most.max(n));
                // An end that lies one outside may be the one inside, too: see below.
                if least < low - 1 || most > high + 1 || most - least > width + 2 {
                    return false;
                }
                *code = n as i16;
            }
            let mut inward = |end: i32, by: i32| {
                let to = (end + by) as f32 * step;
                let moved = dtype != DType::F32
                    && end != 0
                    && codes
                        .iter()
                        .zip(group)
                        .all(|(code, &x)| i32::from(*code) != end || stored(to, dtype) == x);
                if moved {
                    let ends = codes.iter_mut().filter(|code| i32::from(**code) == end);
                    ends.for_each(|code| *code += by as i16);
                }
                i32::from(moved)
            };
            if most > high || most - least > width {
                most -= inward(most, -1);
            }
            if least < low || most - least > width {
                least += inward(least, 1);
            }
            if most - least > width {
                most -= inward(most, -1);
            }
            least >= low && most <= high && most - least <= width
        };
        for negative in [false, true] {
            let end = if (largest > 0.0) == negative { -low } else { high };
            for n in (1..=end).rev() {
                let best = steps(largest.abs() / n as f32, dtype)
                    .map(|step| if negative { -step } else { step })
                    .filter(|&step| fits(step, codes))
                    .map(|step| {
                        let off = |x: f32| f64::from((x / step).round_ties_even() * step - x);
                        (group.iter().map(|&x| off(x).powi(2)).sum::<f64>(), step)
                    })
                    .min_by(|a, b| a.0.total_cmp(&b.0));
                if let Some((_, step)) = best {
                    // The codes of the last candidate may be another's.
                    return fits(step, codes).then_some(step);
                }
            }
        }
        None
    }
}

/// A value as a type stores it.
fn stored(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => f32::from_bits(u32::from(f32_to_bf16(value)) << 16),
        DType::F16 => f16_to_f32(f32_to_f16(value)),
        _ => value,
    }
}

/// Half-precision steps that may have given `wanted` (positive): the value itself, or those within the rounding of the
/// stored type.
fn steps(wanted: f32, dtype: DType) -> impl Iterator<Item = f32> {
    let slack = match dtype {
        DType::BF16 => 1.0 / 256.0,
        DType::F16 => 1.0 / 2048.0,
        _ => 0.0,
    };
    let from = f16::from_f32(wanted * (1.0 - slack)).to_bits();
    let to = f16::from_f32(wanted * (1.0 + slack)).to_bits();
    let finite = f16::MAX.to_bits();
    (from.max(1)..=to.min(finite)).map(f16_to_f32)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Weights on a grid: every group has a step and codes.
    fn weights(lattice: Lattice, seed: u64, count: usize) -> (Vec<f32>, Vec<i16>) {
        let mut state = seed | 1;
        let mut next = |below: i32| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as i32 % below
        };
        let (low, _, width) = lattice.bounds();
        let (mut values, mut codes) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let step = f16::from_f32((next(1000) + 1) as f32 * 7.3e-5).to_f32();
            let start = if lattice.symmetric { low } else { -next(width + 1) };
            for _ in 0..lattice.group {
                let n = start + next(width + 1);
                values.push(n as f32 * step);
                codes.push(n as i16);
            }
        }
        (values, codes)
    }

    proptest! {
        #![proptest_config(crate::testing::cases(64))]

        #[test]
        fn every_grid_is_found_and_says_the_same_values(
            seed in any::<u64>(), bits in 2u8..=8, symmetric in any::<bool>(), wide in any::<bool>(),
        ) {
            let lattice = Lattice { bits, symmetric, group: if wide { 64 } else { 32 } };
            let (exact, _) = weights(lattice, seed, 4);
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let stored: Vec<f32> = exact.iter().map(|&x| super::stored(x, dtype)).collect();
                let found = lattice.find(&stored, dtype);
                prop_assert!(found.is_ok(), "{lattice:?} {dtype}");
                let found = found.unwrap();
                let (low, high, width) = lattice.bounds();
                for ((codes, step), group) in
                    found.codes.chunks(lattice.group).zip(&found.steps).zip(stored.chunks(lattice.group))
                {
                    prop_assert_eq!(f16::from_f32(*step).to_f32(), *step);
                    for (&code, &x) in codes.iter().zip(group) {
                        prop_assert_eq!(super::stored(f32::from(code) * step, dtype), x);
                    }
                    let least = i32::from(*codes.iter().min().unwrap()).min(0);
                    let most = i32::from(*codes.iter().max().unwrap()).max(0);
                    prop_assert!(low <= least && most <= high && most - least <= width);
                }
            }
        }
    }

    /// Draws in which dividing by the step gives a neighbour's code: one that rounds to another value, or one that lies outside.
    #[test]
    fn codes_that_sixteen_bits_blur_are_found() {
        for (seed, group) in [
            (15_328_380_623_235_795_726, 32),
            (15_328_381_080_064_148_656, 64),
            (14_254_797_425_211_937_432, 32),
        ] {
            let lattice = Lattice { bits: 8, symmetric: false, group };
            let (exact, _) = weights(lattice, seed, 4);
            let stored: Vec<f32> = exact.iter().map(|&x| super::stored(x, DType::BF16)).collect();
            let found = lattice.find(&stored, DType::BF16).unwrap();
            let steps = found.steps.iter().flat_map(|step| std::iter::repeat_n(step, group));
            for ((code, step), x) in found.codes.iter().zip(steps).zip(&stored) {
                assert_eq!(super::stored(f32::from(*code) * step, DType::BF16), *x);
            }
        }
    }

    #[test]
    fn codes_that_use_the_whole_range_are_the_quantizers_own() {
        let lattice = Lattice { bits: 4, symmetric: true, group: 32 };
        let (values, codes) = weights(lattice, 5, 64);
        let found = lattice.find(&values, DType::F32).unwrap();
        let mut same = 0;
        for (ours, theirs) in found.codes.chunks(32).zip(codes.chunks(32)) {
            same += usize::from(theirs.iter().any(|n| n.abs() >= 7) && ours == theirs);
        }
        assert!(same >= 60, "{same} of 64");
    }

    #[test]
    fn what_is_on_no_grid_is_named() {
        let lattice = Lattice { bits: 4, symmetric: true, group: 32 };
        let (mut values, _) = weights(lattice, 9, 3);
        values[40] *= 1.01;
        assert_eq!(lattice.find(&values, DType::F32), Err(1));
        values[40] = f32::NAN;
        assert_eq!(lattice.find(&values, DType::F32), Err(1));
        // Eight bits hold what four do not.
        let wide = Lattice { bits: 8, ..lattice };
        let (values, _) = weights(wide, 9, 1);
        assert!(
            wide.find(&values, DType::F32).is_ok() && lattice.find(&values, DType::F32).is_err()
        );
        assert_eq!(lattice.find(&[0.0; 32], DType::BF16).unwrap().steps, [1.0]);
    }

    #[test]
    fn a_positive_end_takes_a_negative_step() {
        // GGUF's Q4_0 puts the largest weight on code -8 whatever its sign.
        let lattice = Lattice { bits: 4, symmetric: true, group: 32 };
        let values: Vec<f32> = (0..32).map(|j| f32::from(8 - (j % 16) as i16) * 0.25).collect();
        let found = lattice.find(&values, DType::F32).unwrap();
        assert_eq!((found.steps[0], found.codes[0], found.codes[15]), (-0.25, -8, 7));
    }
}
