//! The two searches of AWQ: scales of channels, and clips of groups.

use burn::tensor::Tensor;
use rayon::prelude::*;
use refit_nn::block::Block;
use refit_nn::{Run, ops};
use refit_train::calibrate::{BlockStats, Group};

use crate::quantize::grid::Grid;
use crate::quantize::output_error::{block_of, row_errors, total_error};

/// Smallest scale before normalization.
const LEAST: f64 = 1e-4;
/// Share of the shrinkages that is tried.
const MAX_SHRINK: f64 = 0.5;

/// Scales for every exponent `i / count`, `i < count`, normalized so that their extremes lie evenly around 1.
pub fn candidates(magnitudes: &[f32], sizes: Option<&[f32]>, count: usize) -> Vec<Vec<f32>> {
    (0..count)
        .map(|i| {
            let ratio = i as f64 / count as f64;
            let scale = |(j, x): (usize, &f32)| {
                let x = f64::from(*x).powf(ratio);
                let w = sizes.map_or(1.0, |w| f64::from(w[j]).powf(1.0 - ratio) + LEAST);
                (x / w).max(LEAST)
            };
            let scales: Vec<f64> = magnitudes.iter().enumerate().map(scale).collect();
            let (least, most) = scales
                .iter()
                .fold((f64::INFINITY, 0f64), |(least, most), s| (least.min(*s), most.max(*s)));
            let middle = (least * most).sqrt();
            let sane = |s: f64| if s.is_finite() && s > 0.0 { s as f32 } else { 1.0 };
            scales.iter().map(|s| sane(s / middle)).collect()
        })
        .collect()
}

/// One search for scales.
pub struct Search<'a> {
    /// Number of the block.
    pub index: usize,
    /// The block as it is.
    pub block: &'a Block,
    /// What its linears read.
    pub stats: &'a BlockStats,
    /// The linears.
    pub group: &'a Group,
    /// Correlations of their input.
    pub h: &'a [f32],
    /// Weights per scale.
    pub size: usize,
    /// What they are rounded to.
    pub grid: Grid,
}

impl Search<'_> {
    /// Mean over outputs of the weights' magnitudes, each relative to the largest of its group: AutoAWQ's `w_mean`.
    pub fn weight_sizes(&self) -> Vec<f32> {
        let width = self.group.stats.columns();
        let (mut sums, mut rows) = (vec![0f64; width], 0usize);
        for linear in self.block.linears() {
            if !self.group.sites.contains(&linear.site) {
                continue;
            }
            for row in ops::to_vec(&linear.weight()).chunks(width) {
                rows += 1;
                for (sums, group) in sums.chunks_mut(self.size).zip(row.chunks(self.size)) {
                    let most = group.iter().fold(0f32, |most, w| most.max(w.abs()));
                    for (sum, w) in sums.iter_mut().zip(group) {
                        *sum += f64::from(w.abs()) / (f64::from(most) + 1e-6);
                    }
                }
            }
        }
        sums.iter().map(|sum| (sum / rows.max(1) as f64) as f32).collect()
    }

    /// The index of the scales with the least error, and that error over the one of the first.
    pub fn best(&self, candidates: &[Vec<f32>]) -> (usize, f64) {
        let alone = self.group.sites.len() == 1 && !self.in_the_middle();
        let outputs = if alone { Vec::new() } else { self.outputs(self.block) };
        let errors: Vec<f64> = candidates
            .iter()
            .map(|scales| match alone {
                true => self.linear_error(scales),
                false => self.block_error(scales, &outputs),
            })
            .collect();
        let mut best = 0;
        for (at, error) in errors.iter().enumerate() {
            if *error < errors[best] {
                best = at;
            }
        }
        (best, if errors[0] > 0.0 { errors[best] / errors[0] } else { 1.0 })
    }

    /// Whether these linears begin a part of the block, and its output is what counts.
    fn in_the_middle(&self) -> bool {
        let last = self.block.ffn.down_site();
        let site = &self.group.sites[0];
        site != last && *site != self.block.mixer.o.site
    }

    /// `W -> Q(W diag(s)) diag(s)^-1`.
    fn rounded(&self, weights: &[f32], scales: &[f32]) -> Vec<f32> {
        let mut rounded = weights.to_vec();
        rounded.par_chunks_mut(scales.len()).for_each(|row| {
            row.iter_mut().zip(scales).for_each(|(w, s)| *w *= s);
            self.grid.snap_row(row, self.size);
            row.iter_mut().zip(scales).for_each(|(w, s)| *w /= s);
        });
        rounded
    }

    fn linear_error(&self, scales: &[f32]) -> f64 {
        let linears = self.block.linears();
        let linear = linears.iter().find(|linear| linear.site == self.group.sites[0]);
        let weights = ops::to_vec(&linear.expect("invariant: observed sites exist").weight());
        let mut change = self.rounded(&weights, scales);
        change.iter_mut().zip(&weights).for_each(|(c, w)| *c -= w);
        total_error(&change, scales.len(), self.h)
    }

    fn block_error(&self, scales: &[f32], outputs: &[Tensor<3>]) -> f64 {
        let mut trial = self.block.clone();
        for site in &self.group.sites {
            let linear = trial.linear_mut(site).expect("invariant: observed sites exist");
            let device = linear.weight().device();
            let rounded = self.rounded(&ops::to_vec(&linear.weight()), scales);
            linear.set_weight(rounded, &device);
        }
        let square = |(a, b): (&Tensor<3>, Tensor<3>)| -> f64 {
            ops::with_values(a, |a| {
                ops::with_values(&b, |b| {
                    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
                })
            })
        };
        outputs.iter().zip(self.outputs(&trial)).map(square).sum()
    }

    /// What the part of `block` behind the linears gives out for every input.
    fn outputs(&self, block: &Block) -> Vec<Tensor<3>> {
        let mixer = block
            .linears()
            .iter()
            .take_while(|l| l.site != block.mixer.o.site)
            .any(|l| l.site == self.group.sites[0]);
        let run = |x: &Tensor<3>| match mixer {
            true => {
                block.mixer.forward(x.clone(), self.stats.context(x), self.index, &mut Run::plain())
            }
            false => block.ffn.forward(x.clone(), &mut Run::plain()),
        };
        self.group.inputs.iter().map(run).collect()
    }
}

/// Clips the weights of every group of every row where that lowers the error of the outputs: magnitudes are cut to
/// `1 - i / steps` of the largest, for `i` up to half of the steps.
pub fn clip(weights: &mut [f32], width: usize, size: usize, h: &[f32], grid: &Grid, steps: usize) {
    let rows = weights.len() / width;
    for from in (0..width).step_by(size) {
        let h = block_of(h, width, from, size);
        let group: Vec<f32> =
            weights.chunks(width).flat_map(|row| row[from..from + size].iter().copied()).collect();
        let largest: Vec<f32> = group
            .chunks(size)
            .map(|row| row.iter().fold(0f32, |most, w| most.max(w.abs())))
            .collect();
        let mut best = vec![(f64::INFINITY, f32::INFINITY); rows];
        for i in 0..((MAX_SHRINK * steps as f64) as usize).max(1) {
            let share = 1.0 - i as f32 / steps as f32;
            let mut change = group.clone();
            change.par_chunks_mut(size).zip(&largest).for_each(|(row, most)| {
                let limit = most * share;
                let original = row.to_vec();
                row.iter_mut().for_each(|w| *w = w.clamp(-limit, limit));
                grid.snap_row(row, size);
                row.iter_mut().zip(original).for_each(|(w, o)| *w -= o);
            });
            for ((best, error), most) in
                best.iter_mut().zip(row_errors(&change, size, &h)).zip(&largest)
            {
                if error < best.0 {
                    *best = (error, most * share);
                }
            }
        }
        for (row, (_, limit)) in weights.chunks_mut(width).zip(best) {
            row[from..from + size].iter_mut().for_each(|w| *w = w.clamp(-limit, limit));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Stream, correlated_gram};

    #[test]
    fn exponent_zero_leaves_channels_alone_and_extremes_lie_around_one() {
        let magnitudes = [0.1, 4.0, 1.0, 0.0];
        let all = candidates(&magnitudes, None, 20);
        assert_eq!(all.len(), 20);
        assert_eq!(all[0], [1.0; 4]);
        let half = &all[10];
        let (least, most) = half.iter().fold((f32::MAX, 0f32), |(a, b), s| (a.min(*s), b.max(*s)));
        assert!((least * most - 1.0).abs() < 1e-5, "{half:?}");
        assert!((half[1] / half[2] - 2.0).abs() < 1e-5);
        let duo = candidates(&magnitudes, Some(&[1.0, 1.0, 4.0, 1.0]), 2);
        assert!((duo[0][0] / duo[0][2] - 4.0).abs() < 1e-2, "{duo:?}");
    }

    #[test]
    fn clips_never_raise_the_error_of_the_outputs() {
        let (n, rows, size) = (64, 40, 32);
        let h: Vec<f32> = correlated_gram(n, 300, 4).iter().map(|x| *x as f32).collect();
        let mut weights = Stream::new(5).normals(rows * n);
        weights.iter_mut().step_by(53).for_each(|w| *w *= 5.0);
        let grid = Grid::asymmetric(3);
        let original = weights.clone();
        clip(&mut weights, n, size, &h, &grid, 20);
        let errors = |clipped: &[f32], from: usize| {
            let part = |w: &[f32]| -> Vec<f32> {
                w.chunks(n).flat_map(|row| row[from..from + size].to_vec()).collect()
            };
            let mut change = part(clipped);
            change.chunks_mut(size).for_each(|row| grid.snap_row(row, size));
            change.iter_mut().zip(part(&original)).for_each(|(c, o)| *c -= o);
            row_errors(&change, size, &block_of(&h, n, from, size))
        };
        let mut lower = 0;
        for from in [0, 32] {
            for (clipped, plain) in errors(&weights, from).iter().zip(errors(&original, from)) {
                assert!(*clipped <= plain * (1.0 + 1e-9), "{clipped} {plain}");
                lower += usize::from(*clipped < 0.99 * plain);
            }
        }
        assert!(lower > rows / 4, "{lower} groups gained");
    }
}
