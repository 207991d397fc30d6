//! Dropping weights column by column: the rule that makes a column solver SparseGPT.

use std::ops::Range;

use rayon::prelude::*;

use crate::prune::mask::{Mask, Pattern, pruned_count, select, smallest};
use crate::solver::{ColumnRule, Decision};

/// Drops the weights with the smallest `w^2 / U_jj^2`, as they are when their turn comes: over rows
/// times block for unstructured patterns, over each group of a row for grouped ones.
#[derive(Debug)]
pub struct DropRule {
    inputs: usize,
    sparsity: f64,
    pattern: Pattern,
    /// Mask of the current block `[rows, columns of the block]`, for unstructured patterns.
    block: Mask,
    start: usize,
}

impl DropRule {
    /// A rule for rows of `inputs` weights. [`Pattern::Row`] drops the same number from every row
    /// and block; the other unstructured patterns let the rows of a block compete, as the paper does.
    pub fn new(inputs: usize, pattern: Pattern, sparsity: f64) -> Self {
        Self { inputs, sparsity, pattern, block: Mask::dense(0, 0), start: 0 }
    }
}

impl ColumnRule for DropRule {
    /// Which weights of the current group go, one bit each.
    type Row = u64;

    fn begin_block(&mut self, columns: Range<usize>, weights: &[f32], diagonal: &[f32]) {
        if matches!(self.pattern, Pattern::Grouped { .. }) {
            return;
        }
        let width = columns.len();
        let mut scores = vec![0f32; weights.len() / self.inputs * width];
        scores.par_chunks_mut(width).zip(weights.par_chunks(self.inputs)).for_each(
            |(scores, row)| {
                for (score, j) in scores.iter_mut().zip(columns.clone()) {
                    *score = (row[j] / diagonal[j]).powi(2);
                }
            },
        );
        // What earlier blocks rounded away is made up for here: the whole row ends up exact.
        let target = pruned_count(self.inputs, self.sparsity);
        let through = |column: usize| target * column / self.inputs;
        let share = (through(columns.end) - through(columns.start)) as f64 / width as f64;
        self.block = select(&scores, width, self.pattern, share);
        self.start = columns.start;
    }

    fn begin_row(&self, _row: usize) -> u64 {
        0
    }

    fn decide(
        &self,
        going: &mut u64,
        row: usize,
        column: usize,
        weights: &[f32],
        diagonal: &[f32],
    ) -> Decision {
        let keep = match self.pattern {
            Pattern::Grouped { pruned, of } => {
                if column.is_multiple_of(of) {
                    let scores: Vec<f32> =
                        (column..column + of).map(|j| (weights[j] / diagonal[j]).powi(2)).collect();
                    *going = smallest(&scores, pruned).into_iter().fold(0, |bits, k| bits | 1 << k);
                }
                *going >> (column % of) & 1 == 0
            }
            _ => self.block.keeps(row, column - self.start),
        };
        Decision { value: if keep { weights[column] } else { 0.0 }, keep }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prune::saliency;
    use crate::solver::{ColumnSolver, SolverOptions};
    use crate::testing::{Stream, correlated_gram, output_error};

    const OPTIONS: SolverOptions = SolverOptions { percdamp: 0.01, act_order: false, block: 32 };

    #[test]
    fn moving_the_rest_beats_masking_and_counts_are_exact() {
        let (n, rows) = (96, 40);
        let h = correlated_gram(n, 500, 3);
        let weights = Stream::new(4).normals(rows * n);
        let norms: Vec<f32> = (0..n).map(|j| h[j * n + j].sqrt() as f32).collect();
        let solver = ColumnSolver::new(h.clone(), n, OPTIONS).unwrap();
        for (pattern, sparsity) in
            [(Pattern::Tensor, 0.6), (Pattern::Row, 0.6), ("2:4".parse().unwrap(), 0.5)]
        {
            let mut masked = weights.clone();
            let scores = saliency::wanda(&weights, &norms);
            select(&scores, n, pattern, sparsity).apply(&mut masked);
            let mut solved = weights.clone();
            let mask = solver.solve(&mut solved, &mut DropRule::new(n, pattern, sparsity));
            let expected = rows * if sparsity == 0.5 { n / 2 } else { pruned_count(n, sparsity) };
            assert_eq!(rows * n - mask.kept(), expected, "{pattern}");
            for (index, w) in solved.iter().enumerate() {
                assert!(mask.keeps(index / n, index % n) || w.to_bits() == 0);
            }
            if let Pattern::Grouped { pruned, of } = pattern {
                assert_eq!(mask.violations(pruned, of), 0);
            }
            let (after, before) =
                (output_error(&weights, &solved, &h, n), output_error(&weights, &masked, &h, n));
            assert!(after < 0.8 * before, "{pattern}: {after} against {before}");
        }
    }

    #[test]
    fn no_sparsity_changes_nothing() {
        let n = 32;
        let solver = ColumnSolver::new(correlated_gram(n, 100, 5), n, OPTIONS).unwrap();
        let weights = Stream::new(6).normals(4 * n);
        let mut solved = weights.clone();
        let mask = solver.solve(&mut solved, &mut DropRule::new(n, Pattern::Tensor, 0.0));
        assert_eq!(mask, Mask::dense(4, n));
        assert_eq!(solved, weights);
    }
}
