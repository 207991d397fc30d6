//! Columns to sums of scales: the rule that makes the column solver ShiftAddLLM.
//!
//! The solver's blocks are the patches' columns, one in mode `acc` and eight in mode `lat`, so that scales are fitted to the
//! columns as earlier errors have moved them. Within a patch of eight, later columns go to scales that were fitted before the
//! errors of the earlier ones moved them: that is the method. What the reference's blocks of 128 put off, the solver does at
//! once; the result is the same but for rounding.

use std::ops::Range;

use rayon::prelude::*;

use super::bcq::{Fitting, Nearest};
use super::packed::Scales;
use crate::solver::{ColumnRule, Decision};

/// Fits scales patch by patch and rounds columns to their sums.
#[derive(Debug)]
pub struct BcqRule {
    fitting: Fitting,
    inputs: usize,
    rows: usize,
    /// Columns of a patch.
    columns: usize,
    /// Patches in a column.
    patches: usize,
    /// Original index of each walked column.
    order: Vec<usize>,
    /// The sums of the patches under way.
    nearest: Vec<Nearest>,
    /// All scales, `[inputs / columns, patches, bits]` in the original order.
    scales: Scales,
}

impl BcqRule {
    /// A rule for a matrix whose columns are walked in `order`, patches of columns together.
    pub fn new(
        fitting: Fitting,
        (rows, inputs): (usize, usize),
        (columns, patches): (usize, usize),
        order: &[usize],
    ) -> Self {
        let scales = vec![0.0; inputs / columns * patches * usize::from(fitting.bits)];
        Self {
            fitting,
            inputs,
            rows,
            columns,
            patches,
            order: order.to_vec(),
            nearest: Vec::new(),
            scales,
        }
    }

    /// The scales, once all columns were walked.
    pub fn into_scales(self) -> Scales {
        self.scales
    }
}

impl ColumnRule for BcqRule {
    type Row = ();

    fn begin_block(&mut self, columns: Range<usize>, weights: &[f32], _: &[f32]) {
        let height = self.rows / self.patches;
        let fit = |patch: usize| {
            let rows =
                weights[patch * height * self.inputs..][..height * self.inputs].chunks(self.inputs);
            let values: Vec<f32> = rows.flat_map(|row| &row[columns.clone()]).copied().collect();
            self.fitting.fit(&values)
        };
        let fitted: Vec<Vec<f32>> = match self.patches {
            1 => vec![fit(0)],
            patches => (0..patches).into_par_iter().map(fit).collect(),
        };
        let bits = usize::from(self.fitting.bits);
        let block = self.order[columns.start] / self.columns;
        let place = &mut self.scales[block * self.patches * bits..][..self.patches * bits];
        place.copy_from_slice(&fitted.concat());
        self.nearest = fitted.iter().map(|alphas| Nearest::new(alphas)).collect();
    }

    fn begin_row(&self, _: usize) {}

    fn decide(
        &self,
        (): &mut (),
        row: usize,
        column: usize,
        weights: &[f32],
        _: &[f32],
    ) -> Decision {
        let nearest = &self.nearest[row * self.patches / self.rows];
        Decision { value: nearest.find(weights[column]).1, keep: true }
    }
}

/// Packed weights without any knowledge of inputs.
#[cfg(test)]
pub fn plain(
    weights: &[f32],
    inputs: usize,
    mode: super::Mode,
    group: Option<usize>,
    bits: u8,
) -> super::packed::Packed {
    let rows = weights.len() / inputs;
    let (columns, patches) = mode.patches(rows, group);
    let fitting = Fitting { bits, rounds: 20, terms: Some(3) };
    let order: Vec<usize> = (0..inputs).collect();
    let mut rule = BcqRule::new(fitting, (rows, inputs), (columns, patches), &order);
    let mut decided = weights.to_vec();
    for start in (0..inputs).step_by(columns) {
        rule.begin_block(start..start + columns, weights, &[]);
        for (row, decided) in decided.chunks_mut(inputs).enumerate() {
            let from = &weights[row * inputs..(row + 1) * inputs];
            for (i, decided) in decided[start..start + columns].iter_mut().enumerate() {
                let column = start + i;
                *decided = rule.decide(&mut (), row, column, from, &[]).value + 0.0;
            }
        }
    }
    let layout = (columns, patches, usize::from(bits), 3);
    super::packed::Packed::pack(&decided, inputs, layout, &rule.into_scales(), None).unwrap()
}
