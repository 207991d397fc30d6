//! Rounding a column to a grid, group by group: the rule that makes a column solver GPTQ.

use crate::quantize::grid::{Grid, Step};
use crate::solver::{ColumnRule, Decision};

/// Rounds every weight to its group's grid.
///
/// Walking left to right, a group's step is fitted when the walk enters it, to the weights as earlier
/// errors have already moved them; whole rows are fitted before the walk. Walking in another order,
/// all steps are fitted before the walk ("static groups"), so that the stored groups stay those of
/// consecutive inputs and no permutation needs to be stored.
#[derive(Debug)]
pub struct GridRule {
    grid: Grid,
    inputs: usize,
    group: usize,
    /// Steps fitted before the walk, `[rows, inputs / group]`; empty when fitted on the way.
    fixed: Vec<Step>,
    /// Group of each walked column when the steps are fixed.
    group_of: Vec<usize>,
}

impl GridRule {
    /// A rule for `weights` `[rows, inputs]` walked in `order`. `on_the_way` fits groups as the walk
    /// enters them; it needs the natural order and solver blocks that are whole groups.
    pub fn new(
        grid: Grid,
        weights: &[f32],
        inputs: usize,
        group: usize,
        order: &[usize],
        on_the_way: bool,
    ) -> Self {
        let fixed = if on_the_way && group < inputs {
            Vec::new()
        } else {
            weights.chunks(group).map(|group| grid.fit(group)).collect()
        };
        let group_of = order.iter().map(|j| j / group).collect();
        Self { grid, inputs, group, fixed, group_of }
    }

    /// A rule with steps `[rows, inputs / group]` that were fitted before.
    pub fn fixed(
        grid: Grid,
        inputs: usize,
        group: usize,
        steps: Vec<Step>,
        order: &[usize],
    ) -> Self {
        let group_of = order.iter().map(|j| j / group).collect();
        Self { grid, inputs, group, fixed: steps, group_of }
    }
}

impl ColumnRule for GridRule {
    type Row = Step;

    fn begin_row(&self, _row: usize) -> Step {
        Step { scale: 1.0, zero: 0.0 }
    }

    fn decide(
        &self,
        step: &mut Step,
        row: usize,
        column: usize,
        weights: &[f32],
        _: &[f32],
    ) -> Decision {
        if !self.fixed.is_empty() {
            *step = self.fixed[row * (self.inputs / self.group) + self.group_of[column]];
        } else if column.is_multiple_of(self.group) {
            *step = self.grid.fit(&weights[column..column + self.group]);
        }
        Decision { value: self.grid.snap(weights[column], *step), keep: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::grid::Grid;
    use crate::solver::{ColumnSolver, SolverOptions};
    use crate::testing::{Stream, correlated_gram, output_error};

    fn run(group: usize, act_order: bool) -> (f64, f64) {
        let (n, rows) = (128, 24);
        let h = correlated_gram(n, 600, 1);
        let weights = Stream::new(2).normals(rows * n);
        let grid = Grid::symmetric(3);
        let mut rounded = weights.clone();
        rounded.chunks_mut(n).for_each(|row| grid.snap_row(row, group));
        let options = SolverOptions { percdamp: 0.01, act_order, block: 64 };
        let solver = ColumnSolver::new(h.clone(), n, options).unwrap();
        let mut rule = GridRule::new(grid, &weights, n, group, solver.order(), !act_order);
        let mut solved = weights.clone();
        solver.solve(&mut solved, &mut rule);
        for group in solved.chunks(group) {
            let mut levels: Vec<u32> = group.iter().map(|w| w.to_bits()).collect();
            levels.sort_unstable();
            levels.dedup();
            assert!(levels.len() <= 8, "more than 2^3 values in a group");
        }
        (output_error(&weights, &solved, &h, n), output_error(&weights, &rounded, &h, n))
    }

    #[test]
    fn repairing_beats_rounding_for_groups_and_rows_in_either_order() {
        for (group, act_order) in [(32, false), (128, false), (32, true), (128, true)] {
            let (solved, rounded) = run(group, act_order);
            assert!(solved < 0.75 * rounded, "g{group} {act_order}: {solved} against {rounded}");
        }
    }
}
