//! TIES: *Resolving Interference When Merging Models* (arXiv:2306.01708). Trim every model's change to its largest
//! values, elect a sign per weight, and average the changes that agree.
//!
//! The paper trims over the whole model; here, as in mergekit, every tensor keeps `floor(density n)` of its own
//! values (at least one), so that a merge streams. Of equal values those with the higher index are kept.

use std::sync::Arc;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::merge::delta::{Common, Mask, Rescale, Sparsify};
use crate::merge::group::{Group, Piece};
use crate::merge::kernel::{About, Kernel, Merge, one_or_many};
use crate::merge::select::cuts;
use crate::method::{Need, Paper};
use crate::rewrite::OutputType;

/// Parameters of TIES.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Ties {
    /// Weight of every model's change, or one for all; 1 when left out.
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, value_name = "W,W,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub weight: Vec<f64>,
    /// Share of every model's change that is kept, or one for all; everything when left out.
    #[arg(long, value_delimiter = ',', value_name = "D,D,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub density: Vec<f64>,
    /// Divide by the weights that took part.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub normalize: bool,
    /// Factor of the whole change.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub lambda: f64,
    /// What becomes of the values that are kept.
    #[arg(long, value_enum, default_value_t)]
    pub rescale: Rescale,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Ties);

impl Merge for Ties {
    const ABOUT: About = About {
        name: "ties",
        title: "TIES",
        summary: "Adds the changes of fine-tuned models that are large and agree in sign to their base",
        paper: Paper {
            title: "TIES-Merging: Resolving Interference When Merging Models",
            reference: "arXiv:2306.01708",
            year: 2023,
        },
        base: Need::Required,
        models: (1, None),
        path: &["reuse", "merging", "task vectors"],
    };

    fn dtype(&self) -> OutputType {
        self.dtype
    }

    fn kernel(&self, count: usize) -> Result<Arc<dyn Kernel>> {
        let (method, weight) = (Self::ABOUT.name, &self.weight[..]);
        let (normalize, lambda, rescale) = (self.normalize, self.lambda, self.rescale);
        let common = Common { method, weight, normalize, lambda, elect: true, rescale };
        let density = common.densities(&self.density, count)?;
        common.kernel(count, Trim { band: density.into_iter().map(|d| (d, 0.0)).collect() })
    }
}

/// Keeps changes by rank of their absolute value, per tensor.
#[derive(Debug)]
pub struct Trim {
    /// Per model, the share that is kept and the share of the largest that is dropped before.
    pub band: Vec<(f64, f64)>,
}

impl Trim {
    /// The ranks that are kept of `n` values, in ascending order.
    fn ranks(&self, k: usize, n: usize) -> (usize, usize) {
        let (density, gamma) = self.band[k];
        let kept = match density {
            1.0.. => return (0, n),
            // A density above nought keeps something.
            d if d > 0.0 => ((d * n as f64) as usize).clamp(1.min(n), n),
            _ => 0,
        };
        let top = (gamma * n as f64) as usize;
        // What the band lacks at the top it takes from below, so that the density is kept.
        let low = n.saturating_sub(kept + top);
        (low, low + kept)
    }
}

/// Absolute changes of model `k`.
pub fn magnitudes(piece: &Piece, k: usize) -> Vec<f32> {
    piece.inputs[k].iter().zip(piece.base).map(|(x, b)| (x - b).abs()).collect()
}

impl Sparsify for Trim {
    fn looks(&self) -> bool {
        self.band.iter().any(|(density, _)| *density > 0.0 && *density < 1.0)
    }

    fn prepare<'k>(&'k self, group: &Group) -> Result<Mask<'k>> {
        let n = group.numel();
        let bands: Vec<(usize, usize)> = (0..self.band.len()).map(|k| self.ranks(k, n)).collect();
        let inner = move |rank: &usize| *rank > 0 && *rank < n;
        let ranks: Vec<Vec<u64>> = bands
            .iter()
            .map(|(low, high)| {
                let both = [*low, *high];
                // Nothing to find where all or nothing is kept.
                let wanted = both.iter().filter(|rank| inner(rank) && low < high);
                wanted.map(|rank| *rank as u64).collect()
            })
            .collect();
        let found = match ranks.iter().all(Vec::is_empty) {
            true => vec![Vec::new(); ranks.len()],
            false => cuts(group, &ranks, magnitudes)?,
        };
        Ok(Box::new(move |piece, k, delta| {
            let (low, high) = bands[k];
            if low >= high {
                return delta.fill(0.0);
            }
            let mut cuts = found[k].iter();
            let keys = if found[k].is_empty() { Vec::new() } else { magnitudes(piece, k) };
            if let Some(cut) = cuts.next().filter(|_| inner(&low)) {
                cut.zero(piece.index, &keys, false, delta);
            }
            if let Some(cut) = found[k].last().filter(|_| inner(&high)) {
                cut.zero(piece.index, &keys, true, delta);
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::testing::{merge, normals};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// TIES as its paper's algorithm box has it, written out naively.
        #[test]
        fn ties_is_trim_elect_and_disjoint_mean(seed in 0u64..500, density in 0.05f64..1.0, models in 1usize..4) {
            let base = normals(seed, 120);
            let thetas: Vec<Vec<f32>> = (1..=models).map(|k| normals(seed + 1000 * k as u64, 120)).collect();
            let method = Ties { density: vec![density], ..Ties::default() };
            let merged = merge(&method, &thetas, Some(base.clone()), &[12, 10]);
            let mut deltas: Vec<Vec<f64>> = Vec::new();
            for theta in &thetas {
                let mut delta: Vec<f64> = theta.iter().zip(&base).map(|(t, b)| f64::from(*t) - f64::from(*b)).collect();
                let mut order: Vec<usize> = (0..120).collect();
                order.sort_by(|a, b| delta[*a].abs().total_cmp(&delta[*b].abs()));
                let keep = ((density * 120.0) as usize).max(1);
                order[..120 - keep].iter().for_each(|i| delta[*i] = 0.0);
                deltas.push(delta);
            }
            for i in 0..120 {
                let sum: f64 = deltas.iter().map(|d| d[i]).sum();
                let agree: Vec<f64> = deltas.iter().map(|d| d[i]).filter(|d| *d != 0.0 && (*d > 0.0) == (sum >= 0.0)).collect();
                let mean = agree.iter().sum::<f64>() / agree.len().max(1) as f64;
                prop_assert!((f64::from(merged[i]) - (f64::from(base[i]) + mean)).abs() < 1e-6);
            }
        }

        /// Exactly `floor(density n)` values change, however many of them are equal.
        #[test]
        fn the_density_is_kept_with_ties(values in proptest::collection::vec(1i8..4, 20..200), density in 0.01f64..0.99) {
            let n = values.len();
            let theta: Vec<f32> = values.iter().map(|v| f32::from(*v)).collect();
            let method = Ties { density: vec![density], ..Ties::default() };
            let merged = merge(&method, &[theta], Some(vec![0.0; n]), &[n, 1]);
            let changed = merged.iter().filter(|x| **x != 0.0).count();
            prop_assert_eq!(changed, ((density * n as f64) as usize).max(1));
        }
    }

    #[test]
    fn copies_are_themselves_and_density_nought_is_the_base() {
        let (base, a) = (normals(1, 77), normals(2, 77));
        let run = |density: f64| {
            let method = Ties { density: vec![density], ..Ties::default() };
            merge(&method, &[a.clone(), a.clone()], Some(base.clone()), &[7, 11])
        };
        assert_eq!(run(1.0), a);
        assert_eq!(run(0.0), base);
        assert!(Ties { density: vec![1.2], ..Ties::default() }.kernel(1).is_err());
    }
}
