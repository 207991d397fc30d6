//! Arcee Fusion: of the other model's change the most important weights are taken. A change matters as much as it is large,
//! times the divergence between the rows' softmax: `|b - a| KL(softmax(b) || softmax(a))`. Important is what reaches the median
//! and one and a half times the distance between the quartiles.
//!
//! mergekit estimates the quartiles of tensors of more than a million weights from an unseeded sample; here they are exact.

use std::sync::Arc;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::merge::group::{Group, Piece};
use crate::merge::kernel::{About, Kernel, Map, Merge};
use crate::merge::select::cuts;
use crate::method::{Need, Paper};
use crate::rewrite::OutputType;

/// Parameters of Arcee Fusion: it has none but the type that is written.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ArceeFusion {
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(ArceeFusion);

impl Merge for ArceeFusion {
    const ABOUT: About = About {
        name: "arcee-fusion",
        title: "Arcee Fusion",
        summary: "Takes the most important of another model's changes into a base",
        paper: Paper { title: "", reference: "mergekit", year: 2025 },
        base: Need::Required,
        models: (1, Some(1)),
        path: &["reuse", "merging", "task vectors"],
    };

    fn dtype(&self) -> OutputType {
        self.dtype
    }

    fn kernel(&self, _: usize) -> Result<Arc<dyn Kernel>> {
        Ok(Arc::new(self.clone()))
    }
}

impl Kernel for ArceeFusion {
    fn prepare<'k>(&'k self, group: &Group) -> Result<Map<'k>> {
        let (columns, n) = (group.columns(), group.numel());
        if n == 0 {
            return Ok(Box::new(|_, _| {}));
        }
        let divergence = group.scan(|piece| divergences(piece, columns))?;
        let importance = move |piece: &Piece| -> Vec<f32> {
            let rows = &divergence[piece.index];
            let both = piece.inputs[0].iter().zip(piece.base).enumerate();
            let value = |(i, (b, a)): (usize, (&f32, &f32))| {
                ((f64::from(*b) - f64::from(*a)).abs() * rows[i / columns]) as f32
            };
            both.map(value).collect()
        };
        let rank = |share: f64| (share * (n - 1) as f64) as u64;
        let ranks = vec![vec![rank(0.25), rank(0.5), rank(0.75)]];
        let cuts = cuts(group, &ranks, |piece, _| importance(piece))?;
        let value = |at: usize| f64::from(cuts[0][at].value());
        let threshold = value(1) + 1.5 * (value(2) - value(0));
        Ok(Box::new(move |piece, out| {
            let taken = importance(piece);
            for (i, out) in out.iter_mut().enumerate() {
                let important = f64::from(taken[i]) >= threshold;
                *out = if important { piece.inputs[0][i] } else { piece.base[i] };
            }
        }))
    }
}

/// `KL(softmax(b) || softmax(a))` of every row of a piece.
fn divergences(piece: &Piece, columns: usize) -> Vec<f64> {
    /// Keeps logarithms finite.
    const EPS: f64 = 1e-8;
    let softmax = |row: &[f32]| -> Vec<f64> {
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let powers: Vec<f64> = row.iter().map(|x| f64::from(x - most).exp()).collect();
        let sum: f64 = powers.iter().sum();
        powers.into_iter().map(|x| x / sum + EPS).collect()
    };
    let rows = piece.inputs[0].chunks(columns).zip(piece.base.chunks(columns));
    rows.map(|(b, a)| softmax(b).iter().zip(softmax(a)).map(|(p, q)| p * (p / q).ln()).sum())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::testing::{merge, normals};

    #[test]
    fn every_weight_is_one_of_both_and_the_largest_changes_are_taken() {
        let a = normals(1, 400);
        let mut b = a.clone();
        (0..400).for_each(|i| b[i] += 0.001 * (i % 7) as f32);
        b[33] += 2.0;
        let fused = merge(&ArceeFusion::default(), &[b.clone()], Some(a.clone()), &[20, 20]);
        assert!((0..400).all(|i| fused[i] == a[i] || fused[i] == b[i]));
        assert_eq!(fused[33], b[33]);
        let taken = (0..400).filter(|i| fused[*i] != a[*i]).count();
        assert!(taken > 0 && taken < 200, "{taken}");
        assert_eq!(
            merge(&ArceeFusion::default(), std::slice::from_ref(&a), Some(a.clone()), &[20, 20]),
            a
        );
    }
}
