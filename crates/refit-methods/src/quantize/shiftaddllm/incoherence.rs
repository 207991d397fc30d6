//! Incoherence processing of QuIP (arXiv:2307.13304), which the accurate mode of ShiftAddLLM borrows: columns are scaled so that
//! weights and inputs share the burden, and both sides are turned by random orthogonal matrices, so that no weight sticks out.
//!
//! ```text
//! H <- H / max |H|,   s_j = (H_jj / (W^T W)_jj)^(1/4),   W <- W diag(s),   H <- diag(1/s) H diag(1/s)
//! H <- H n / tr H + 0.01 I,   W <- P W Q^T,   H <- Q H Q^T
//! ```
//!
//! `P` and `Q` are Kronecker products of two random orthogonal matrices, whose sizes are the divisors next to the square root. They
//! follow from a seed, so that undoing them needs the seed and the scales alone.

use rayon::prelude::*;
use refit_data::rng::Rng;

/// What undoes the processing.
#[derive(Clone, Debug, PartialEq)]
pub struct Incoherence {
    /// `s`, `[in]`.
    pub scales: Vec<f32>,
    /// Seed of both turns.
    pub seed: u64,
}

/// `A ⊗ B`, both orthogonal.
struct Turn {
    a: Vec<f64>,
    b: Vec<f64>,
    size: (usize, usize),
}

impl Turn {
    fn new(n: usize, seed: u64, side: &str) -> Self {
        let small =
            (1..=n).take_while(|d| d * d <= n).filter(|d| n.is_multiple_of(*d)).last().unwrap_or(1);
        let size = (n / small, small);
        let mut rng = Rng::named(seed, side);
        Self { a: orthogonal(size.0, &mut rng), b: orthogonal(size.1, &mut rng), size }
    }

    /// Turns a vector, or turns it back.
    fn apply(&self, x: &[f64], back: bool) -> Vec<f64> {
        let (m, n) = self.size;
        let at = |matrix: &[f64], width: usize, i: usize, j: usize| match back {
            false => matrix[i * width + j],
            true => matrix[j * width + i],
        };
        let mut half = vec![0f64; m * n];
        for k in 0..m {
            for j in 0..n {
                half[k * n + j] = (0..n).map(|l| at(&self.b, n, j, l) * x[k * n + l]).sum();
            }
        }
        let mut out = vec![0f64; m * n];
        for i in 0..m {
            for k in 0..m {
                let factor = at(&self.a, m, i, k);
                for j in 0..n {
                    out[i * n + j] += factor * half[k * n + j];
                }
            }
        }
        out
    }

    /// Turns every row of `[rows, n]`.
    fn rows(&self, matrix: &mut [f64], back: bool) {
        matrix.par_chunks_mut(self.size.0 * self.size.1).for_each(|row| {
            let turned = self.apply(row, back);
            row.copy_from_slice(&turned);
        });
    }
}

/// A random orthogonal matrix: Gaussian rows made orthonormal one after the other, twice for precision.
fn orthogonal(n: usize, rng: &mut Rng) -> Vec<f64> {
    let mut matrix: Vec<f64> = (0..n * n).map(|_| rng.normal()).collect();
    for i in 0..n {
        let (before, rest) = matrix.split_at_mut(i * n);
        let row = &mut rest[..n];
        for _ in 0..2 {
            for other in before.chunks(n) {
                let along: f64 = row.iter().zip(other).map(|(x, y)| x * y).sum();
                row.iter_mut().zip(other).for_each(|(x, y)| *x -= along * y);
            }
        }
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter_mut().for_each(|x| *x /= norm);
    }
    matrix
}

fn transposed(matrix: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    let mut out = vec![0.0; matrix.len()];
    for i in 0..rows {
        for j in 0..columns {
            out[j * rows + i] = matrix[i * columns + j];
        }
    }
    out
}

/// Turns rows and columns of `[rows, columns]`.
fn turn_both(
    matrix: &mut Vec<f64>,
    rows: usize,
    columns: usize,
    sides: (&Turn, &Turn),
    back: bool,
) {
    sides.1.rows(matrix, back);
    let mut other = transposed(matrix, rows, columns);
    sides.0.rows(&mut other, back);
    *matrix = transposed(&other, columns, rows);
}

/// Processes `weights` `[rows, n]` and `h` `[n, n]` in place.
pub fn process(weights: &mut [f32], h: &mut Vec<f64>, n: usize, seed: u64) -> Incoherence {
    let rows = weights.len() / n;
    let largest = h.iter().fold(0f64, |most, x| most.max(x.abs())).max(f64::MIN_POSITIVE);
    h.iter_mut().for_each(|x| *x /= largest);
    let mut squares = vec![0f64; n];
    for row in weights.chunks(n) {
        squares.iter_mut().zip(row).for_each(|(s, w)| *s += f64::from(*w).powi(2));
    }
    let scale =
        |j: usize| (h[j * n + j].max(1e-8) / squares[j].max(1e-8)).powf(0.25).max(1e-8) as f32;
    let scales: Vec<f32> = (0..n).map(scale).collect();
    let mut wide: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
    wide.chunks_mut(n).for_each(|row| {
        row.iter_mut().zip(&scales).for_each(|(w, s)| *w *= f64::from(*s));
    });
    for i in 0..n {
        for j in 0..n {
            h[i * n + j] /= f64::from(scales[i]) * f64::from(scales[j]);
        }
    }
    let trace: f64 = (0..n).map(|j| h[j * n + j]).sum();
    let factor = n as f64 / trace.max(f64::MIN_POSITIVE);
    h.iter_mut().for_each(|x| *x *= factor);
    (0..n).for_each(|j| h[j * n + j] += 1e-2);
    let (p, q) = (Turn::new(rows, seed, "left"), Turn::new(n, seed, "right"));
    turn_both(&mut wide, rows, n, (&p, &q), false);
    turn_both(h, n, n, (&q, &q), false);
    weights.iter_mut().zip(wide).for_each(|(w, turned)| *w = turned as f32);
    Incoherence { scales, seed }
}

impl Incoherence {
    /// Undoes the processing of weights `[rows, n]`.
    pub fn undo(&self, weights: &mut [f32]) {
        let n = self.scales.len();
        let rows = weights.len() / n;
        let (p, q) = (Turn::new(rows, self.seed, "left"), Turn::new(n, self.seed, "right"));
        let mut wide: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
        turn_both(&mut wide, rows, n, (&p, &q), true);
        for (row, turned) in weights.chunks_mut(n).zip(wide.chunks(n)) {
            for ((w, x), s) in row.iter_mut().zip(turned).zip(&self.scales) {
                *w = (x / f64::from(*s)) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Stream, correlated_gram, output_error};

    #[test]
    fn undoing_gives_the_weights_back_and_errors_keep_their_size() {
        let (n, rows) = (48, 30);
        let gram = correlated_gram(n, 300, 1);
        let mut weights = Stream::new(2).normals(rows * n);
        weights[7] = 25.0;
        let (mut turned, mut h) = (weights.clone(), gram.clone());
        let incoherence = process(&mut turned, &mut h, n, 9);
        let peak = |w: &[f32]| {
            let norm = w.iter().map(|x| x * x).sum::<f32>().sqrt();
            w.iter().fold(0f32, |most, x| most.max(x.abs())) / norm
        };
        assert!(peak(&turned) < 0.5 * peak(&weights), "the outlier still sticks out");
        let mut back = turned.clone();
        incoherence.undo(&mut back);
        for (a, b) in weights.iter().zip(&back) {
            assert!((a - b).abs() < 1e-5 * (1.0 + a.abs()), "{a} {b}");
        }
        // An error in the turned space costs the same, up to one factor and the 0.01 that was added.
        let mut ratios = Vec::new();
        for seed in 0..3 {
            let noise = Stream::new(10 + seed).normals(rows * n);
            let moved: Vec<f32> = turned.iter().zip(&noise).map(|(w, e)| w + 0.01 * e).collect();
            let mut undone = moved.clone();
            incoherence.undo(&mut undone);
            ratios.push(
                output_error(&turned, &moved, &h, n) / output_error(&back, &undone, &gram, n),
            );
        }
        assert!(ratios.iter().all(|r| (r / ratios[0] - 1.0).abs() < 0.05), "{ratios:?}");
    }
}
