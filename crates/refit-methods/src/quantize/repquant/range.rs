//! Ranges of values, from a few percentiles and the squared error that each would cost.

use rayon::prelude::*;
use refit_nn::rounding::Rounding;

use crate::quantize::grid::{Grid, Step};

/// Values per piece of a sum; fixed, so that the bits do not depend on the number of threads.
const PIECE: usize = 1 << 16;

/// A range `l ..= u`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Range {
    /// `l`.
    pub low: f32,
    /// `u`.
    pub high: f32,
}

/// The `q`-quantile of sorted values, linear between neighbours as in PyTorch.
pub fn quantile(sorted: &[f32], q: f64) -> f32 {
    let rank = q.clamp(0.0, 1.0) * (sorted.len().max(1) - 1) as f64;
    let (below, share) = (rank.floor() as usize, rank.fract() as f32);
    let Some(&first) = sorted.get(below) else { return 0.0 };
    let next = sorted.get(below + 1).copied().unwrap_or(first);
    first + (next - first) * share
}

/// Sorts by value.
pub fn sort(values: &mut [f32]) {
    values.par_sort_unstable_by(f32::total_cmp);
}

/// The sum of squared errors of `values` under a rounding.
fn error(values: &[f32], rounding: &Rounding) -> f64 {
    let part = |piece: &[f32]| -> f64 {
        let mut rounded = piece.to_vec();
        rounding.apply(&mut rounded, piece.len());
        piece.iter().zip(rounded).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    };
    let parts: Vec<f64> = values.par_chunks(PIECE).map(part).collect();
    parts.iter().sum()
}

/// Scale and zero point of a range; `None` for one without width. A symmetric grid puts its zero in the middle of the codes.
pub fn grid_of(range: Range, bits: u8, symmetric: bool) -> Option<(f32, f32)> {
    if symmetric {
        let most = range.low.abs().max(range.high.abs());
        let (scale, _) = refit_nn::rounding::step_of(-most, most, bits);
        return (scale > 0.0).then(|| (scale, f32::from(1u16 << (bits - 1))));
    }
    let (scale, zero) = refit_nn::rounding::step_of(range.low, range.high, bits);
    (scale > 0.0).then_some((scale, zero))
}

/// The range among the percentiles with the least squared error, for sorted values.
pub fn search(sorted: &[f32], percentiles: &[f64], bits: u8, symmetric: bool) -> Range {
    let candidates = percentiles
        .iter()
        .map(|p| Range { low: quantile(sorted, 1.0 - p), high: quantile(sorted, *p) });
    let cost = |range: &Range| match grid_of(*range, bits, symmetric) {
        Some((scale, zero)) => error(sorted, &Rounding::Tensor { bits, scale, zero }),
        // Without width only a constant is held: what is lost is what differs from it.
        None => sorted.iter().map(|x| f64::from(x - range.low).powi(2)).sum(),
    };
    let best = candidates.map(|range| (cost(&range), range)).min_by(|a, b| a.0.total_cmp(&b.0));
    best.map_or(Range { low: 0.0, high: 0.0 }, |(_, range)| range)
}

/// The scale of a grid of powers with the least squared error, among the percentiles of sorted values.
pub fn search_powers(
    sorted: &[f32],
    percentiles: &[f64],
    rounding: impl Fn(f32) -> Rounding,
) -> Rounding {
    let scales = percentiles.iter().map(|p| quantile(sorted, *p)).filter(|scale| *scale > 0.0);
    let best = scales
        .map(|scale| (error(sorted, &rounding(scale)), scale))
        .min_by(|a, b| a.0.total_cmp(&b.0));
    rounding(best.map_or(1.0, |(_, scale)| scale))
}

/// Steps of every row of `weights` `[rows, inputs]`, asymmetric, each from the range with the least squared error.
pub fn row_steps(weights: &[f32], inputs: usize, percentiles: &[f64], grid: &Grid) -> Vec<Step> {
    weights
        .par_chunks(inputs)
        .map(|row| {
            let mut sorted = row.to_vec();
            sorted.sort_unstable_by(f32::total_cmp);
            let steps = percentiles
                .iter()
                .map(|p| grid.fit_range(quantile(&sorted, 1.0 - p), quantile(&sorted, *p)));
            steps
                .map(|step| (grid.error(row, step), step))
                .min_by(|a, b| a.0.total_cmp(&b.0))
                .map_or_else(|| grid.fit(row), |(_, step)| step)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Stream;

    #[test]
    fn quantiles_are_those_of_pytorch() {
        let sorted = [0.0, 1.0, 2.0, 10.0];
        assert_eq!(quantile(&sorted, 0.0), 0.0);
        assert_eq!(quantile(&sorted, 1.0), 10.0);
        assert!((quantile(&sorted, 0.5) - 1.5).abs() < 1e-6);
        assert!((quantile(&sorted, 0.9) - 7.6).abs() < 1e-4);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    #[test]
    fn one_outlier_is_clipped_at_few_bits_and_kept_at_many() {
        let mut values = Stream::new(3).normals(20_000);
        values[0] = 60.0;
        sort(&mut values);
        let percentiles = [0.999, 0.9999, 1.0];
        assert!(search(&values, &percentiles, 4, false).high < 10.0);
        assert_eq!(search(&values, &percentiles, 8, false).high, 60.0);
    }

    #[test]
    fn the_search_is_no_worse_than_any_of_its_candidates() {
        let mut values = Stream::new(8).normals(5000);
        sort(&mut values);
        let cost = |range: Range| {
            let (scale, zero) = grid_of(range, 4, false).unwrap();
            error(&values, &Rounding::Tensor { bits: 4, scale, zero })
        };
        let percentiles = [0.99, 0.999, 0.9999];
        let best = cost(search(&values, &percentiles, 4, false));
        for p in percentiles {
            assert!(best <= cost(search(&values, &[p], 4, false)));
        }
    }

    #[test]
    fn constants_have_no_grid() {
        let range = search(&[3.0; 9], &[0.999], 4, false);
        assert_eq!(range, Range { low: 3.0, high: 3.0 });
        assert_eq!(grid_of(range, 4, false), None);
        assert!(grid_of(range, 4, true).is_some());
        assert_eq!(grid_of(Range { low: 0.0, high: 0.0 }, 4, true), None);
    }

    #[test]
    fn steps_of_rows_lie_on_the_lattice() {
        use refit_store::DType;
        use refit_store::lattice::Lattice;
        let grid = Grid::asymmetric(4);
        let mut weights = Stream::new(5).normals(8 * 64);
        let steps = row_steps(&weights, 64, &[0.99, 0.999, 0.9999], &grid);
        for (row, step) in weights.chunks_mut(64).zip(steps) {
            row.iter_mut().for_each(|w| *w = grid.snap(*w, step));
        }
        let lattice = Lattice { bits: 4, symmetric: false, group: 64 };
        assert!(lattice.find(&weights, DType::F32).is_ok());
    }
}
