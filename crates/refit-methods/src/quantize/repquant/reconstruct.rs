//! Quantized weight reconstruction: weights that make up for the rounding of their inputs, then of each other.
//!
//! ```text
//! W* = W X X_hat^T (X_hat X_hat^T + lambda I)^-1,   lambda = 0.01 mean diag
//! W_hat = GPTQ(W*, H = X_hat X_hat^T)
//! ```
//!
//! The abstract of RepQuant only says that reconstruction is integrated; this form is inferred from ERQ and GPTQ.

use rayon::prelude::*;
use refit_store::architecture::Site;
use refit_train::observe::{ColumnStats, StatsRequest};

use super::range::row_steps;
use crate::calibrated::solver_of;
use crate::error::{Error, Result};
use crate::linalg::{Strided, cholesky, invert_lower, multiply_add};
use crate::quantize::gptq::rule::GridRule;
use crate::quantize::grid::Grid;
use crate::solver::SolverOptions;

/// Columns per block of the walk.
const BLOCK: usize = 128;
/// Rows of activations that are multiplied at once.
const ROWS: usize = 512;
/// Rows of a product per thread-sized piece.
const STRIP: usize = 96;

/// What linears with one input share: the correlations of what they read with what they should have read.
pub struct Reconstruction {
    width: usize,
    /// `(X - X_hat) X_hat^T (X_hat X_hat^T + lambda I)^-1`, less what damping takes: `W* = W + W D`.
    correction: Vec<f64>,
    rounded: ColumnStats,
}

impl Reconstruction {
    /// From rows as they are and as they are rounded, `[tokens, width]`.
    ///
    /// # Errors
    /// Rows that are not finite.
    pub fn new(
        site: &Site,
        rows: &[f32],
        rounded: &[f32],
        width: usize,
        damping: f64,
    ) -> Result<Self> {
        let fault = |problem: String| Error::tensor("calibration", &site.name, problem);
        let mut stats = ColumnStats::new(width, StatsRequest::GRAM);
        stats.observe(rounded).map_err(|found| fault(found.to_string()))?;
        let mut h = stats.gram().expect("invariant: it was asked for");
        let mut cross = vec![0f64; width * width];
        for (x, x_hat) in rows.chunks(ROWS * width).zip(rounded.chunks(ROWS * width)) {
            let off: Vec<f64> = x.iter().zip(x_hat).map(|(a, b)| f64::from(a - b)).collect();
            let wide: Vec<f64> = x_hat.iter().map(|b| f64::from(*b)).collect();
            let a = Strided { data: &off, row: 1, column: width };
            let b = Strided { data: &wide, row: width, column: 1 };
            add_product((width, off.len() / width), a, b, &mut cross);
        }
        let mean = (0..width).map(|j| h[j * width + j]).sum::<f64>() / width.max(1) as f64;
        let lambda = (damping * mean).max(f64::MIN_POSITIVE);
        for j in 0..width {
            h[j * width + j] += lambda;
        }
        cholesky(&mut h, width).map_err(|_| {
            fault(
                "its rounded inputs are too alike to be inverted; give more calibration data"
                    .into(),
            )
        })?;
        let inverse = invert_lower(&h, width);
        // D = (cross - lambda I) L^-T L^-1.
        for j in 0..width {
            cross[j * width + j] -= lambda;
        }
        let mut half = vec![0f64; width * width];
        let transposed = Strided { data: &inverse, row: 1, column: width };
        let view = |data| Strided { data, row: width, column: 1 };
        add_product((width, width), view(&cross), transposed, &mut half);
        let mut correction = vec![0f64; width * width];
        add_product((width, width), view(&half), view(&inverse), &mut correction);
        Ok(Self { width, correction, rounded: stats })
    }

    /// `W*`.
    pub fn target(&self, weights: &[f32]) -> Vec<f32> {
        let wide: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
        let mut target = wide.clone();
        let a = Strided { data: &wide, row: self.width, column: 1 };
        let b = Strided { data: &self.correction, row: self.width, column: 1 };
        add_product((self.width, self.width), a, b, &mut target);
        target.iter().map(|w| *w as f32).collect()
    }

    /// `W_hat`: `W*` walked column by column, on grids fitted to its rows.
    ///
    /// # Errors
    /// Correlations that cannot be factored.
    pub fn round(
        &self,
        site: &Site,
        weights: &[f32],
        percentiles: &[f64],
        grid: &Grid,
        percdamp: f64,
    ) -> Result<Vec<f32>> {
        let mut target = self.target(weights);
        let options = SolverOptions { percdamp, act_order: false, block: BLOCK };
        let solver = solver_of(site, &self.rounded, options)?;
        let steps = row_steps(&target, self.width, percentiles, grid);
        let mut rule = GridRule::fixed(*grid, self.width, self.width, steps, solver.order());
        solver.solve(&mut target, &mut rule);
        Ok(target)
    }
}

/// `c += a b` for `c` `[rows, width]`, in strips of rows that threads share.
fn add_product(
    (width, depth): (usize, usize),
    a: Strided<'_, f64>,
    b: Strided<'_, f64>,
    c: &mut [f64],
) {
    c.par_chunks_mut(STRIP * width).enumerate().for_each(|(strip, c)| {
        let a = Strided { data: &a.data[strip * STRIP * a.row..], ..a };
        multiply_add((c.len() / width, width, depth), 1.0, a, b, c, width);
    });
}

#[cfg(test)]
mod tests {
    use refit_nn::rounding::Rounding;
    use refit_store::architecture::{Layout, Role};

    use super::*;
    use crate::testing::Stream;

    fn site() -> Site {
        Site {
            name: "w".into(),
            role: Role::Up,
            layer: Some(0),
            shape: vec![10, 24],
            norm: None,
            tied_to: None,
            layout: Layout::OutIn,
            stack: None,
            expert: None,
            fused: Vec::new(),
            interleaved: false,
            stored: true,
        }
    }

    /// `|W X - V X_hat|^2`.
    fn error(w: &[f32], v: &[f32], x: &[f32], x_hat: &[f32], n: usize) -> f64 {
        let mut total = 0.0;
        for (x, x_hat) in x.chunks(n).zip(x_hat.chunks(n)) {
            for (w, v) in w.chunks(n).zip(v.chunks(n)) {
                let dot = |a: &[f32], b: &[f32]| -> f64 {
                    a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum()
                };
                total += (dot(w, x) - dot(v, x_hat)).powi(2);
            }
        }
        total
    }

    #[test]
    fn weights_make_up_for_rounded_inputs_and_then_for_their_own_rounding() {
        let (n, rows, tokens) = (24, 10, 500);
        let mut stream = Stream::new(4);
        let mixing = stream.normals(n * n);
        let x: Vec<f32> = (0..tokens)
            .flat_map(|_| {
                let z = stream.normals(n);
                (0..n)
                    .map(|i| {
                        let common: f32 = (0..6).map(|j| mixing[i * n + j] * z[j]).sum();
                        common + 0.2 * z[i]
                    })
                    .collect::<Vec<f32>>()
            })
            .collect();
        let mut x_hat = x.clone();
        Rounding::Tensor { bits: 3, scale: 1.4, zero: 4.0 }.apply(&mut x_hat, n);
        let weights = Stream::new(7).normals(rows * n);
        let part = Reconstruction::new(&site(), &x, &x_hat, n, 0.01).unwrap();
        let target = part.target(&weights);
        let (plain, better) =
            (error(&weights, &weights, &x, &x_hat, n), error(&weights, &target, &x, &x_hat, n));
        assert!(better < 0.9 * plain, "{better} against {plain}");
        let grid = Grid::asymmetric(4);
        let percentiles = [0.999, 0.9999, 0.99999];
        let solved = part.round(&site(), &weights, &percentiles, &grid, 0.01).unwrap();
        let mut rounded = weights.clone();
        for (row, step) in rounded.chunks_mut(n).zip(row_steps(&weights, n, &percentiles, &grid)) {
            row.iter_mut().for_each(|w| *w = grid.snap(*w, step));
        }
        let (solved, rounded) =
            (error(&weights, &solved, &x, &x_hat, n), error(&weights, &rounded, &x, &x_hat, n));
        assert!(solved < 0.9 * rounded, "{solved} against {rounded}");
        // Without rounding and with hardly any damping there is nothing to make up for.
        let same = Reconstruction::new(&site(), &x, &x, n, 1e-9).unwrap().target(&weights);
        assert!(same.iter().zip(&weights).all(|(a, b)| (a - b).abs() < 1e-3));
    }
}
