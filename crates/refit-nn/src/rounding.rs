//! Activations rounded to a few bits while a model runs, as integer hardware would see them: what W8A8 and its kin are measured
//! by.
//!
//! A [`Rounder`] is a [`Tap`]: it replaces named activations (`SITE:in`, `layers.N.attn.probs`) by what their codes decode to.
//! Values stay f32, so this tells what rounding costs in quality and nothing about speed.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::ops;
use crate::run::Tap;

/// Values per thread-sized piece, rounded to whole rows.
const PIECE: usize = 1 << 15;

/// How one activation `[rows, width]` is rounded. `bits` are 2 to 8.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Rounding {
    /// A symmetric scale for every row, from its largest magnitude while the model runs: `s = max|x| / (2^(b-1) - 1)`. What
    /// compressed-tensors calls a dynamic scale per token.
    Token {
        /// Bits of a code.
        bits: u8,
    },
    /// One scale and zero point for all values, fixed: `q = clamp(round(x / s) + z, 0, 2^b - 1)`, `x_hat = (q - z) s`.
    Tensor {
        /// Bits of a code.
        bits: u8,
        /// Step between neighbouring values.
        scale: f32,
        /// The code of 0; may lie outside the codes.
        zero: f32,
    },
    /// A fixed scale and zero point for every column.
    Channel {
        /// Bits of a code.
        bits: u8,
        /// One per column.
        scales: Vec<f32>,
        /// One per column.
        zeros: Vec<f32>,
    },
    /// A scale and zero point for every column, from its range in this very activation: no hardware does it, comparisons do.
    ChannelDynamic {
        /// Bits of a code.
        bits: u8,
    },
    /// Powers of two below `scale`, for values from 0 to 1: `q = clamp(round(-log2(x / t)), 0, 2^b)`, and 0 beyond the last code.
    Log2 {
        /// Bits of a code.
        bits: u8,
        /// `t`, the value of code 0.
        scale: f32,
    },
    /// Powers of the root of two (RepQ-ViT, arXiv:2212.08254): `q = round(-2 log2(x / t))`, decoded as
    /// `t 2^(-ceil(q / 2)) (sqrt 2 if q is odd)`, which an integer unit does with shifts.
    LogSqrt2 {
        /// Bits of a code.
        bits: u8,
        /// `t`, the value of code 0.
        scale: f32,
    },
}

/// `2^b - 1`.
fn levels(bits: u8) -> f32 {
    f32::from((1u16 << bits.min(15)) - 1)
}

/// An affine grid's nearest value.
#[inline]
fn affine(x: f32, scale: f32, zero: f32, top: f32) -> f32 {
    (((x / scale).round_ties_even() + zero).clamp(0.0, top) - zero) * scale
}

/// Scale and zero point of a range, 0 scale standing for a range without width.
pub fn step_of(low: f32, high: f32, bits: u8) -> (f32, f32) {
    let scale = (high - low) / levels(bits);
    if scale > 0.0 && scale.is_finite() {
        (scale, (-low / scale).round_ties_even())
    } else {
        (0.0, 0.0)
    }
}

impl Rounding {
    /// Bits of a code.
    pub fn bits(&self) -> u8 {
        match self {
            Self::Token { bits }
            | Self::Tensor { bits, .. }
            | Self::Channel { bits, .. }
            | Self::ChannelDynamic { bits }
            | Self::Log2 { bits, .. }
            | Self::LogSqrt2 { bits, .. } => *bits,
        }
    }

    /// The columns that it was made for, where it matters.
    pub fn width(&self) -> Option<usize> {
        match self {
            Self::Channel { scales, .. } => Some(scales.len()),
            _ => None,
        }
    }

    /// Rounds `values` `[rows, width]` in place.
    ///
    /// # Panics
    /// When there is one scale for each of another number of columns.
    pub fn apply(&self, values: &mut [f32], width: usize) {
        if width == 0 {
            return;
        }
        let piece = (PIECE / width).max(1) * width;
        match self {
            Self::Token { bits } => {
                let top = f32::from((1u16 << (bits - 1)) - 1);
                values.par_chunks_mut(piece).for_each(|rows| {
                    for row in rows.chunks_mut(width) {
                        let most = row.iter().fold(0f32, |most, x| most.max(x.abs()));
                        let scale = most / top;
                        if scale > 0.0 && scale.is_finite() {
                            let snap =
                                |x: f32| (x / scale).round_ties_even().clamp(-top, top) * scale;
                            row.iter_mut().for_each(|x| *x = snap(*x));
                        }
                    }
                });
            }
            Self::Tensor { bits, scale, zero } => {
                let top = levels(*bits);
                values.par_chunks_mut(piece).for_each(|rows| {
                    rows.iter_mut().for_each(|x| *x = affine(*x, *scale, *zero, top));
                });
            }
            Self::Channel { bits, scales, zeros } => {
                assert!(
                    scales.len() == width && zeros.len() == width,
                    "invariant: a scale for each of {width} columns"
                );
                let top = levels(*bits);
                values.par_chunks_mut(piece).for_each(|rows| {
                    for row in rows.chunks_mut(width) {
                        for ((x, &scale), &zero) in row.iter_mut().zip(scales).zip(zeros) {
                            if scale > 0.0 {
                                *x = affine(*x, scale, zero, top);
                            }
                        }
                    }
                });
            }
            Self::ChannelDynamic { bits } => {
                let mut ranges = vec![(0f32, 0f32); width];
                for row in values.chunks(width) {
                    for ((low, high), &x) in ranges.iter_mut().zip(row) {
                        (*low, *high) = (low.min(x), high.max(x));
                    }
                }
                let (scales, zeros) =
                    ranges.into_iter().map(|(low, high)| step_of(low, high, *bits)).unzip();
                Self::Channel { bits: *bits, scales, zeros }.apply(values, width);
            }
            Self::Log2 { bits, scale } => {
                let codes = f32::from(1u16 << bits);
                values.par_chunks_mut(piece).for_each(|rows| {
                    for x in rows {
                        let code = (-(*x / scale).log2()).round_ties_even().max(0.0);
                        // NaN and infinity of a zero fail the comparison as codes beyond the last do.
                        *x = if code < codes { scale * (-code).exp2() } else { 0.0 };
                    }
                });
            }
            Self::LogSqrt2 { bits, scale } => {
                let codes = f32::from(1u16 << bits);
                values.par_chunks_mut(piece).for_each(|rows| {
                    for x in rows {
                        let code = (-2.0 * (*x / scale).log2()).round_ties_even().max(0.0);
                        *x = if code < codes {
                            let odd = code % 2.0 == 1.0;
                            let shifted = scale * (-(code / 2.0).ceil()).exp2();
                            if odd { shifted * std::f32::consts::SQRT_2 } else { shifted }
                        } else {
                            0.0
                        };
                    }
                });
            }
        }
    }

    /// Rounds an activation.
    pub fn round(&self, x: Tensor<3>) -> Tensor<3> {
        let (shape, device) = (x.dims(), x.device());
        let mut values = ops::to_vec(&x);
        self.apply(&mut values, shape[2]);
        Tensor::from_data(TensorData::new(values, shape), &device)
    }
}

/// Rounds named activations in every run that it taps.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rounder {
    /// By the name of the tap.
    pub roundings: BTreeMap<String, Rounding>,
}

impl Rounder {
    /// Nothing is rounded.
    pub fn is_empty(&self) -> bool {
        self.roundings.is_empty()
    }

    /// Rounds the activation `name` from now on.
    pub fn insert(&mut self, name: impl Into<String>, rounding: Rounding) {
        self.roundings.insert(name.into(), rounding);
    }
}

impl Tap for Rounder {
    fn visit(&mut self, name: &str, value: Tensor<3>) -> Tensor<3> {
        (&*self).visit(name, value)
    }

    fn attention(&self) -> bool {
        self.roundings.keys().any(|name| name.contains(".attn."))
    }
}

/// For runs of several models, or threads, through the same roundings.
impl Tap for &Rounder {
    fn visit(&mut self, name: &str, value: Tensor<3>) -> Tensor<3> {
        match self.roundings.get(name) {
            Some(rounding) => rounding.round(value),
            None => value,
        }
    }

    fn attention(&self) -> bool {
        (**self).attention()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(rounding: &Rounding, values: &[f32], width: usize) -> Vec<f32> {
        let mut values = values.to_vec();
        rounding.apply(&mut values, width);
        values
    }

    #[test]
    fn tokens_keep_their_largest_value_and_err_by_half_a_step() {
        let values = [0.1, -2.0, 0.7, 0.0, 30.0, 1.0, 0.4, -0.2];
        let found = rounded(&Rounding::Token { bits: 8 }, &values, 4);
        assert_eq!((found[1], found[4]), (-2.0, 30.0));
        for (row, found) in values.chunks(4).zip(found.chunks(4)) {
            let step = row.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
            assert!(row.iter().zip(found).all(|(a, b)| (a - b).abs() <= 0.5001 * step));
        }
        assert_eq!(rounded(&Rounding::Token { bits: 4 }, &[0.0; 3], 3), [0.0; 3]);
    }

    #[test]
    fn fixed_grids_clamp_and_hold_zero() {
        let grid = Rounding::Tensor { bits: 4, scale: 0.5, zero: 3.0 };
        assert_eq!(rounded(&grid, &[0.0, 0.6, -9.0, 99.0], 2), [0.0, 0.5, -1.5, 6.0]);
        let both = Rounding::Channel { bits: 4, scales: vec![0.5, 0.0], zeros: vec![3.0, 0.0] };
        assert_eq!(rounded(&both, &[0.6, 0.6, 99.0, 99.0], 2), [0.5, 0.6, 6.0, 99.0]);
        let range = rounded(&Rounding::ChannelDynamic { bits: 2 }, &[0.0, 5.0, 3.0, 5.0], 2);
        assert_eq!(range, [0.0, 5.0, 3.0, 5.0]);
    }

    #[test]
    fn roots_of_two_err_by_less_than_a_fifth() {
        for (bits, scale) in [(4, 1.0f32), (4, 0.37), (8, 0.9)] {
            let grid = Rounding::LogSqrt2 { bits, scale };
            assert_eq!(rounded(&grid, &[scale, 0.0], 1), [scale, 0.0]);
            let floor = scale * (-levels(bits) / 2.0).exp2();
            let worst = (0..=4000)
                .map(|i| floor * (scale / floor).powf(i as f32 / 4000.0))
                .map(|x| (rounded(&grid, &[x], 1)[0] - x).abs() / x)
                .fold(0f32, f32::max);
            assert!(worst <= 2f32.powf(0.25) - 1.0 + 1e-3, "{bits} {scale}: {worst}");
        }
        // What lies deeper than the last code is 0, what lies above t is t.
        assert_eq!(
            rounded(&Rounding::LogSqrt2 { bits: 2, scale: 1.0 }, &[0.1, 3.0], 1),
            [0.0, 1.0]
        );
    }

    #[test]
    fn powers_of_two_are_coarser() {
        let grid = Rounding::Log2 { bits: 4, scale: 1.0 };
        assert_eq!(rounded(&grid, &[1.0, 0.5, 0.3, 0.0, 1e-9], 1), [1.0, 0.5, 0.25, 0.0, 0.0]);
    }
}
