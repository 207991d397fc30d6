//! The optimal-brain-surgeon walk over columns that GPTQ (arXiv:2210.17323) and SparseGPT
//! (arXiv:2301.00774) share.
//!
//! For a layer `Y = W X` with `H = X X^T`, changing column `j` of `W` by `q - w` is best repaired by
//! moving the columns that come later. With `U` the upper triangle of `U^T U = H^{-1}`:
//!
//! ```text
//! for each column j:   q_j = rule(w_j);   e = (w_j - q_j) / U_jj;   w_k -= e U_jk  for k > j
//! ```
//!
//! Columns go in blocks: inside a block every row walks alone, and what the block's errors mean for
//! the columns after it is one matrix product. Rows never meet, so threads share them, and products
//! run in strips of fixed height, so the bits do not depend on the number of threads. What is done to
//! a column is the [`ColumnRule`]: round it to a grid, or drop some of it.

use std::ops::Range;

use rayon::prelude::*;

use crate::linalg::{Strided, inverse_factor, multiply_add};
use crate::prune::mask::Mask;

/// Rows per thread-sized piece of a product.
const STRIP: usize = 64;
/// How much more damping is tried when `H` is not positive definite, and how often.
const DAMP_STEP: f64 = 0.0015;
const DAMP_TRIES: usize = 40;

/// How the walk goes.
#[derive(Clone, Copy, Debug)]
pub struct SolverOptions {
    /// Added to the diagonal of `H`, as a share of its mean.
    pub percdamp: f64,
    /// Walk the columns by falling `H_jj` instead of left to right.
    pub act_order: bool,
    /// Columns per block.
    pub block: usize,
}

/// What a rule decides about one weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// The weight's final value.
    pub value: f32,
    /// Whether it stays; a pruned weight's value is 0.
    pub keep: bool,
}

/// What is done to a column. `order[j]` of the solver is the original index of the `j`-th column that
/// is walked; rules get positions in walking order.
pub trait ColumnRule: Sync {
    /// What a row remembers from one column to the next.
    type Row: Send;

    /// Sees a block of columns before it is walked: `weights` `[rows, inputs]` as they are now.
    fn begin_block(&mut self, _columns: Range<usize>, _weights: &[f32], _diagonal: &[f32]) {}

    /// A row's state at the start of a block.
    fn begin_row(&self, row: usize) -> Self::Row;

    /// Decides on `weights[column]`, where `weights` is the row as it is now.
    fn decide(
        &self,
        state: &mut Self::Row,
        row: usize,
        column: usize,
        weights: &[f32],
        diagonal: &[f32],
    ) -> Decision;
}

/// Everything about the inputs of a layer that a walk needs; serves every matrix that reads them.
#[derive(Debug)]
pub struct ColumnSolver {
    inputs: usize,
    block: usize,
    /// `U`, row-major, in walking order.
    factor: Vec<f32>,
    /// `U_jj`.
    diagonal: Vec<f32>,
    /// Original index of each walked column.
    order: Vec<usize>,
    /// Columns whose input is always zero, in walking order.
    dead: Vec<bool>,
    /// The damping that was needed, as a share of the mean diagonal.
    pub damping: f64,
}

impl ColumnSolver {
    /// Factors `H` `[inputs, inputs]`, row-major. The scale of `H` does not matter.
    ///
    /// Columns that saw nothing (`H_jj = 0`) get `H_jj = 1` and weights of zero. When the damped
    /// matrix is not positive definite, damping grows by 0.15 % of the mean diagonal at a time.
    ///
    /// # Errors
    /// A sentence that says what is wrong with `H`; the caller adds the tensor's name.
    pub fn new(h: Vec<f64>, inputs: usize, options: SolverOptions) -> Result<Self, String> {
        let mut order: Vec<usize> = (0..inputs).collect();
        if options.act_order {
            let size = |j: usize| match h[j * inputs + j] {
                dead if dead <= 0.0 => 1.0,
                size => size,
            };
            order.sort_by(|&a, &b| size(b).total_cmp(&size(a)).then(a.cmp(&b)));
        }
        Self::in_order(h, inputs, options, order)
    }

    /// As [`new`](Self::new), walking the columns in this order, a permutation of `0..inputs`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn in_order(
        mut h: Vec<f64>,
        inputs: usize,
        options: SolverOptions,
        order: Vec<usize>,
    ) -> Result<Self, String> {
        assert_eq!(h.len(), inputs * inputs, "H must be square");
        assert_eq!(order.len(), inputs, "every column is walked once");
        if h.iter().any(|value| !value.is_finite()) {
            return Err("its calibration statistics hold NaN or infinity: the model produces \
                        non-finite activations on this text"
                .into());
        }
        let mut is_dead = vec![false; inputs];
        for j in 0..inputs {
            if h[j * inputs + j] <= 0.0 {
                h[j * inputs + j] = 1.0;
                is_dead[j] = true;
            }
        }
        if !order.is_sorted() {
            let source = h.clone();
            h.par_chunks_mut(inputs).zip(&order).for_each(|(row, &i)| {
                for (value, &j) in row.iter_mut().zip(&order) {
                    *value = source[i * inputs + j];
                }
            });
        }
        let mean = (0..inputs).map(|j| h[j * inputs + j]).sum::<f64>() / inputs.max(1) as f64;
        for attempt in 0..DAMP_TRIES {
            let damping = options.percdamp + attempt as f64 * DAMP_STEP;
            let mut damped = h.clone();
            for j in 0..inputs {
                damped[j * inputs + j] += damping * mean;
            }
            let Ok(factor) = inverse_factor(&damped, inputs) else { continue };
            let factor: Vec<f32> = factor.into_iter().map(|value| value as f32).collect();
            return Ok(Self {
                inputs,
                block: options.block.max(1),
                diagonal: (0..inputs).map(|j| factor[j * inputs + j]).collect(),
                factor,
                dead: order.iter().map(|&j| is_dead[j]).collect(),
                order,
                damping,
            });
        }
        Err(format!(
            "its input correlations are not positive definite even with damping {:.3}; \
             give more calibration text or a larger --percdamp",
            options.percdamp + (DAMP_TRIES - 1) as f64 * DAMP_STEP
        ))
    }

    /// Sets the columns per block: matrices that read the same inputs may have groups of different sizes.
    pub fn set_block(&mut self, columns: usize) {
        self.block = columns.max(1);
    }

    /// Original index of each walked column.
    pub fn order(&self) -> &[usize] {
        &self.order
    }

    /// `U_jj` by original column: `w^2 / U_jj^2` is the price of dropping a weight.
    pub fn diagonal(&self) -> Vec<f32> {
        let mut diagonal = vec![0.0; self.inputs];
        for (&j, &value) in self.order.iter().zip(&self.diagonal) {
            diagonal[j] = value;
        }
        diagonal
    }

    /// Walks the columns of `weights` `[rows, inputs]` under a rule, in place. The mask tells which
    /// weights stayed.
    pub fn solve<R: ColumnRule>(&self, weights: &mut [f32], rule: &mut R) -> Mask {
        let n = self.inputs;
        let rows = weights.len() / n.max(1);
        let mut kept = Mask::dense(rows, n);
        let mut work = vec![0f32; weights.len()];
        work.par_chunks_mut(n).zip(weights.par_chunks(n)).for_each(|(to, from)| {
            for ((value, &j), dead) in to.iter_mut().zip(&self.order).zip(&self.dead) {
                *value = if *dead { 0.0 } else { from[j] };
            }
        });
        for start in (0..n).step_by(self.block) {
            let end = (start + self.block).min(n);
            rule.begin_block(start..end, &work, &self.diagonal);
            let rule = &*rule;
            work.par_chunks_mut(STRIP * n).enumerate().for_each(|(strip, weights)| {
                let mut errors = vec![0f32; weights.len() / n * (end - start)];
                for ((at, row), errors) in
                    weights.chunks_mut(n).enumerate().zip(errors.chunks_mut(end - start))
                {
                    self.walk(rule, strip * STRIP + at, start..end, row, errors);
                }
                let (rows, width) = (weights.len() / n, end - start);
                let errors = Strided { data: &errors, row: width, column: 1 };
                if end < n {
                    let later =
                        Strided { data: &self.factor[start * n + end..], row: n, column: 1 };
                    let shape = (rows, n - end, width);
                    multiply_add(shape, -1.0, errors, later, &mut weights[end..], n);
                }
            });
        }
        // What was pruned was set to exactly 0 with its sign bit set: see `walk`.
        let from_work =
            |(mut mask, (to, from)): (crate::prune::mask::RowMask<'_>, (&mut [f32], &[f32]))| {
                for (&value, &j) in from.iter().zip(&self.order) {
                    let keep = value.to_bits() != PRUNED;
                    mask.set(j, keep);
                    to[j] = if keep { value } else { 0.0 };
                }
            };
        kept.rows_mut().zip(weights.par_chunks_mut(n).zip(work.par_chunks(n))).for_each(from_work);
        kept
    }

    /// One row through one block.
    fn walk<R: ColumnRule>(
        &self,
        rule: &R,
        row: usize,
        columns: Range<usize>,
        weights: &mut [f32],
        errors: &mut [f32],
    ) {
        let n = self.inputs;
        let mut state = rule.begin_row(row);
        for j in columns.clone() {
            let Decision { value, keep } = rule.decide(&mut state, row, j, weights, &self.diagonal);
            let error = (weights[j] - value) / self.diagonal[j];
            errors[j - columns.start] = error;
            weights[j] = if keep { value + 0.0 } else { f32::from_bits(PRUNED) };
            let factor = &self.factor[j * n + j + 1..j * n + columns.end];
            for (weight, u) in weights[j + 1..columns.end].iter_mut().zip(factor) {
                *weight -= error * u;
            }
        }
    }
}

/// Marks a pruned weight until the walk is over: negative zero, which `value + 0.0` never is.
const PRUNED: u32 = 0x8000_0000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Stream, correlated_gram, output_error};

    const OPTIONS: SolverOptions = SolverOptions { percdamp: 0.01, act_order: false, block: 128 };

    struct RoundToInteger;

    impl ColumnRule for RoundToInteger {
        type Row = ();
        fn begin_row(&self, _: usize) {}
        fn decide(&self, (): &mut (), _: usize, j: usize, w: &[f32], _: &[f32]) -> Decision {
            Decision { value: w[j].round(), keep: true }
        }
    }

    #[test]
    fn repairing_beats_rounding_and_blocks_do_not_matter() {
        let n = 96;
        let h = correlated_gram(n, 400, 1);
        let weights: Vec<f32> = Stream::new(2).normals(20 * n).iter().map(|w| w * 3.0).collect();
        let rounded: Vec<f32> = weights.iter().map(|w| w.round()).collect();
        let mut results = Vec::new();
        for (block, act_order) in [(128, false), (32, false), (7, false), (32, true)] {
            let solver =
                ColumnSolver::new(h.clone(), n, SolverOptions { block, act_order, ..OPTIONS })
                    .unwrap();
            let mut solved = weights.clone();
            let mask = solver.solve(&mut solved, &mut RoundToInteger);
            assert_eq!(mask.kept(), weights.len());
            assert!(solved.iter().all(|w| w.fract() == 0.0));
            let error = output_error(&weights, &solved, &h, n);
            assert!(error < 0.6 * output_error(&weights, &rounded, &h, n), "{block} {error}");
            results.push(solved);
        }
        let differing = results[0].iter().zip(&results[2]).filter(|(a, b)| a != b).count();
        assert!(differing * 50 < results[0].len(), "blocks changed {differing} weights");
    }

    #[test]
    fn an_identity_gram_makes_it_plain_rounding() {
        let n = 40;
        let mut h = vec![0.0; n * n];
        (0..n).for_each(|i| h[i * n + i] = 2.0);
        let solver = ColumnSolver::new(h, n, OPTIONS).unwrap();
        let weights = Stream::new(3).normals(4 * n);
        let mut solved = weights.clone();
        solver.solve(&mut solved, &mut RoundToInteger);
        assert_eq!(solved, weights.iter().map(|w| w.round() + 0.0).collect::<Vec<_>>());
    }

    #[test]
    fn dead_columns_become_zero_and_dependent_ones_are_damped() {
        let n = 16;
        // Rank one, column 3 dead.
        let x: Vec<f64> = (0..n).map(|j| if j == 3 { 0.0 } else { 1.0 + j as f64 }).collect();
        let h: Vec<f64> = (0..n * n).map(|k| x[k / n] * x[k % n]).collect();
        let solver = ColumnSolver::new(h.clone(), n, OPTIONS).unwrap();
        let mut weights = vec![0.9; n];
        solver.solve(&mut weights, &mut RoundToInteger);
        assert_eq!(weights[3], 0.0);
        let undamped = SolverOptions { percdamp: 0.0, ..OPTIONS };
        assert!(ColumnSolver::new(h, n, undamped).unwrap().damping >= 0.0);
        let error = ColumnSolver::new(vec![f64::NAN; 4], 2, OPTIONS).unwrap_err();
        assert!(error.contains("non-finite"), "{error}");
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let n = 64;
        let h = correlated_gram(n, 200, 5);
        let weights = Stream::new(6).normals(150 * n);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let solver = ColumnSolver::new(h.clone(), n, OPTIONS).unwrap();
                let mut weights = weights.clone();
                solver.solve(&mut weights, &mut RoundToInteger);
                weights
            })
        };
        assert_eq!(run(1), run(3));
    }
}
