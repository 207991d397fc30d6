//! Learnable dual clipping: how far each channel's range is cut, learned through the linears behind it.
//!
//! ```text
//! u_c = sigmoid(a_c) max_c,   l_c = sigmoid(e_c) min_c,   minimize |W x_hat - W x|^2
//! ```
//!
//! by Adam, where rounding passes gradients straight through: inside the range `x_hat` follows `s` with `round(t) - t`
//! (`t = (x - l) / s`), beyond it follows the bound that cut it (LSQ, arXiv:1902.08153). That bounds are learned, and two of
//! them, is in the abstract of RepQuant; their form and the objective are inferred.

use rayon::prelude::*;

use super::range::Range;
use crate::linalg::{Strided, multiply_add};
use crate::quantize::output_error::total_error;

/// Rows that one step sees.
const BATCH: usize = 256;
/// The logit of 0.99, where factors start.
const START: f64 = 4.595_119_850_134_59;

/// How it is learned.
#[derive(Clone, Copy, Debug)]
pub struct Learning {
    /// Steps of Adam.
    pub steps: usize,
    /// Learning rate.
    pub rate: f64,
    /// Bits of the activations.
    pub bits: u8,
    /// Ranges are symmetric: one factor for both sides.
    pub symmetric: bool,
}

/// `x_hat` of one value, and its slopes by the lower and the upper bound. A symmetric grid has its zero in the middle of the
/// codes, and only the upper bound.
#[inline]
fn quantize(x: f32, range: Range, levels: f32, symmetric: bool) -> (f32, f32, f32) {
    let scale = (range.high - range.low) / levels;
    if scale <= 0.0 {
        return (range.low, 0.0, 0.0);
    }
    if symmetric {
        let zero = (levels + 1.0) / 2.0;
        let t = x / scale;
        let code = t.round_ties_even().clamp(-zero, levels - zero);
        let inside = code > -zero && code < levels - zero;
        let by_scale = if inside { code - t } else { code };
        return (code * scale, 0.0, 2.0 * by_scale / levels);
    }
    let t = (x - range.low) / scale;
    if t >= levels {
        (range.high, 0.0, 1.0)
    } else if t <= 0.0 {
        (range.low, 1.0, 0.0)
    } else {
        let code = t.round_ties_even();
        let off = (code - t) / levels;
        (code * scale + range.low, -off, off)
    }
}

/// `x_hat - x` of rows.
fn errors(rows: &[f32], ranges: &[Range], levels: f32, symmetric: bool) -> Vec<f32> {
    let mut errors = rows.to_vec();
    errors.par_chunks_mut(ranges.len()).for_each(|row| {
        for (x, range) in row.iter_mut().zip(ranges) {
            *x = quantize(*x, *range, levels, symmetric).0 - *x;
        }
    });
    errors
}

/// `sum over rows of e M e^T` for the errors `e` of `rows` under `ranges`, with `M = W^T W`.
fn loss(rows: &[f32], ranges: &[Range], metric: &[f32], learning: Learning) -> f64 {
    let levels = f32::from((1u16 << learning.bits) - 1);
    let errors = errors(rows, ranges, levels, learning.symmetric);
    total_error(&errors, ranges.len(), metric)
}

/// Learns ranges for the columns of `rows` `[tokens, width]`, within `extremes`; `metric` is `W^T W` of all linears that read
/// them. The result is `start` when that is better.
pub fn learn(
    rows: &[f32],
    extremes: &[Range],
    start: &[Range],
    metric: &[f32],
    learning: Learning,
) -> Vec<Range> {
    let Learning { steps, rate, bits, symmetric } = learning;
    let width = extremes.len();
    let count = rows.len() / width.max(1);
    if count == 0 || steps == 0 {
        return start.to_vec();
    }
    let levels = f32::from((1u16 << bits) - 1);
    let mut logits = vec![[START; 2]; width];
    let mut moments = vec![[[0f64; 2]; 2]; width];
    let ranges_of = |logits: &[[f64; 2]]| -> Vec<Range> {
        logits.iter().zip(extremes).map(|(at, whole)| range_of(*at, *whole, symmetric)).collect()
    };
    let batch = BATCH.min(count);
    for step in 0..steps {
        let from = (step * batch) % (count - batch + 1).max(1);
        let rows = &rows[from * width..(from + batch) * width];
        let ranges = ranges_of(&logits);
        let errors = errors(rows, &ranges, levels, symmetric);
        let mut pull = vec![0f32; errors.len()];
        pull.par_chunks_mut(32 * width).zip(errors.par_chunks(32 * width)).for_each(
            |(pull, errors)| {
                let a = Strided { data: errors, row: width, column: 1 };
                let b = Strided { data: metric, row: width, column: 1 };
                multiply_add((errors.len() / width, width, width), 2.0, a, b, pull, width);
            },
        );
        let mut slopes = vec![[0f64; 2]; width];
        for (row, pull) in rows.chunks(width).zip(pull.chunks(width)) {
            for (((slope, x), range), pull) in slopes.iter_mut().zip(row).zip(&ranges).zip(pull) {
                let (_, low, high) = quantize(*x, *range, levels, symmetric);
                slope[0] += f64::from(pull * low);
                slope[1] += f64::from(pull * high);
            }
        }
        // Adam forgets the size of a gradient, so sums do as well as means.
        let corrections =
            [1.0 - 0.9f64.powi(step as i32 + 1), 1.0 - 0.999f64.powi(step as i32 + 1)];
        for (c, at) in logits.iter_mut().enumerate() {
            let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
            let slope_of = |x: f64| sigmoid(x) * (1.0 - sigmoid(x));
            let (low, high) = (f64::from(extremes[c].low), f64::from(extremes[c].high));
            let gradients = match symmetric {
                true => {
                    let most = low.abs().max(high.abs());
                    [0.0, slopes[c][1] * most * slope_of(at[1])]
                }
                false => {
                    [slopes[c][0] * low * slope_of(at[0]), slopes[c][1] * high * slope_of(at[1])]
                }
            };
            for side in 0..2 {
                let [m, v] = &mut moments[c][side];
                let g = gradients[side];
                *m = 0.9 * *m + 0.1 * g;
                *v = 0.999 * *v + 0.001 * g * g;
                let size = (*v / corrections[1]).sqrt() + 1e-12;
                at[side] -= rate * (*m / corrections[0]) / size;
            }
        }
    }
    let learned = ranges_of(&logits);
    match loss(rows, &learned, metric, learning) < loss(rows, start, metric, learning) {
        true => learned,
        false => start.to_vec(),
    }
}

fn range_of(logits: [f64; 2], whole: Range, symmetric: bool) -> Range {
    let cut = |logit: f64, bound: f32| ((1.0 / (1.0 + (-logit).exp())) * f64::from(bound)) as f32;
    match symmetric {
        true => {
            let most = cut(logits[1], whole.low.abs().max(whole.high.abs()));
            Range { low: -most, high: most }
        }
        false => {
            let (low, high) = (cut(logits[0], whole.low), cut(logits[1], whole.high));
            // Bounds on the same side of 0 may cross when they are cut.
            Range { low: low.min(high), high: high.max(low) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Stream;

    #[test]
    fn slopes_are_those_of_the_rounding() {
        let range = Range { low: -1.0, high: 2.0 };
        assert_eq!(quantize(9.0, range, 3.0, false), (2.0, 0.0, 1.0));
        assert_eq!(quantize(-9.0, range, 3.0, false), (-1.0, 1.0, 0.0));
        let (value, low, high) = quantize(0.3, range, 3.0, false);
        assert_eq!(value, 0.0);
        assert!((high + 0.1).abs() < 1e-6 && (low - 0.1).abs() < 1e-6, "{low} {high}");
        // 2 bits around a zero of 2: codes -2 to 1, a step of 4 / 3.
        let range = Range { low: -2.0, high: 2.0 };
        let (value, _, by_bound) = quantize(9.0, range, 3.0, true);
        assert!((value - 4.0 / 3.0).abs() < 1e-6 && (by_bound - 2.0 / 3.0).abs() < 1e-6);
        let (value, _, by_bound) = quantize(-9.0, range, 3.0, true);
        assert!((value + 8.0 / 3.0).abs() < 1e-6 && (by_bound + 4.0 / 3.0).abs() < 1e-6);
    }

    #[test]
    fn learned_ranges_cut_outliers_and_are_never_worse() {
        let (width, count) = (12, 600);
        let mut stream = Stream::new(2);
        let mut rows = stream.normals(width * count);
        rows.iter_mut().step_by(501).for_each(|x| *x *= 9.0);
        let weights = stream.normals(20 * width);
        let mut metric = vec![0f32; width * width];
        for row in weights.chunks(width) {
            for i in 0..width {
                (0..width).for_each(|j| metric[i * width + j] += row[i] * row[j]);
            }
        }
        let extremes: Vec<Range> = (0..width)
            .map(|c| {
                let column = rows.iter().skip(c).step_by(width);
                let low = column.clone().fold(0f32, |a, b| a.min(*b));
                Range { low, high: column.fold(0f32, |a, b| a.max(*b)) }
            })
            .collect();
        for symmetric in [false, true] {
            let start: Vec<Range> =
                extremes.iter().map(|r| range_of([40.0; 2], *r, symmetric)).collect();
            let learning = Learning { steps: 300, rate: 0.05, bits: 4, symmetric };
            let learned = learn(&rows, &extremes, &start, &metric, learning);
            let (found, plain) =
                (loss(&rows, &learned, &metric, learning), loss(&rows, &start, &metric, learning));
            assert!(found < 0.9 * plain, "symmetric {symmetric}: {found} against {plain}");
            assert_eq!(learned, learn(&rows, &extremes, &start, &metric, learning));
        }
        let none = Learning { steps: 0, rate: 0.01, bits: 4, symmetric: false };
        assert_eq!(learn(&rows, &extremes, &extremes, &metric, none), extremes);
    }
}
