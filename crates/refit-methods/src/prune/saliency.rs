//! How much a weight matters: scores `[out, in]`, the smallest go first.

use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The criteria that start a mask.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Criterion {
    /// `|W|`.
    Magnitude,
    /// `|W_rj| ||x_j||_2` (arXiv:2306.11695).
    #[default]
    Wanda,
    /// `W_rj^2 / U_jj^2`, the price of dropping a weight when the others may move (arXiv:2301.00774).
    #[value(name = "sparsegpt")]
    #[serde(rename = "sparsegpt")]
    SparseGpt,
}

/// `|W|`.
pub fn magnitude(weights: &[f32]) -> Vec<f32> {
    weights.par_iter().map(|w| w.abs()).collect()
}

/// `|W_rj| norms_j`, with `norms_j = ||x_j||_2` over the calibration tokens; any common factor of
/// the norms is harmless.
pub fn wanda(weights: &[f32], norms: &[f32]) -> Vec<f32> {
    by_column(weights, norms, |w, norm| w.abs() * norm)
}

/// `W_rj^2 / U_jj^2`.
pub fn sparsegpt(weights: &[f32], diagonal: &[f32]) -> Vec<f32> {
    by_column(weights, diagonal, |w, u| (w / u).powi(2))
}

fn by_column(weights: &[f32], columns: &[f32], score: impl Fn(f32, f32) -> f32 + Sync) -> Vec<f32> {
    let mut scores = weights.to_vec();
    scores.par_chunks_mut(columns.len().max(1)).for_each(|row| {
        for (w, column) in row.iter_mut().zip(columns) {
            *w = score(*w, *column);
        }
    });
    scores
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_what_the_formulas_say() {
        let weights = [1.0, -2.0, 3.0, -4.0];
        assert_eq!(magnitude(&weights), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(wanda(&weights, &[10.0, 1.0]), [10.0, 2.0, 30.0, 4.0]);
        assert_eq!(sparsegpt(&weights, &[0.5, 2.0]), [4.0, 1.0, 36.0, 4.0]);
    }
}
