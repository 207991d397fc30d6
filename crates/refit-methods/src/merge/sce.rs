//! SCE of *FuseChat: Knowledge Fusion of Chat Models* (arXiv:2408.07990): select the weights on which the models' changes
//! vary most, weigh the models by the mean square of what is selected, erase the changes of the minority sign.

use std::sync::Arc;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::merge::group::{Group, Piece};
use crate::merge::kernel::{About, Kernel, Map, Merge, within};
use crate::merge::select::cuts;
use crate::method::{Need, Paper};
use crate::rewrite::OutputType;

/// Parameters of SCE.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Sce {
    /// Share of the weights with a variance that is selected.
    #[arg(long, default_value_t = 1.0)]
    pub select_topk: f64,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Sce);

impl Merge for Sce {
    const ABOUT: About = About {
        name: "sce",
        title: "SCE",
        summary: "Adds what fine-tuned models changed to their base where they vary most, weighed by how much they changed",
        paper: Paper {
            title: "FuseChat: Knowledge Fusion of Chat Models",
            reference: "arXiv:2408.07990",
            year: 2024,
        },
        base: Need::Required,
        models: (1, None),
        path: &["reuse", "merging", "task vectors"],
    };

    fn dtype(&self) -> OutputType {
        self.dtype
    }

    fn kernel(&self, _: usize) -> Result<Arc<dyn Kernel>> {
        within(Self::ABOUT.name, "select_topk", &[self.select_topk], (0.0, 1.0))?;
        Ok(Arc::new(self.clone()))
    }
}

impl Kernel for Sce {
    fn prepare<'k>(&'k self, group: &Group) -> Result<Map<'k>> {
        let count = group.inputs.len();
        // How many weights are selected; `None` is all.
        let chosen = match self.select_topk < 1.0 {
            false => None,
            true => {
                let varied =
                    group.scan(|piece| variances(piece).iter().filter(|v| **v != 0.0).count())?;
                Some((varied.iter().sum::<usize>() as f64 * self.select_topk) as usize)
            }
        };
        let n = group.numel();
        let cut = match chosen {
            Some(k) if k > 0 && k < n => {
                let keys = |piece: &Piece, _: usize| {
                    variances(piece).into_iter().map(|v| v as f32).collect()
                };
                cuts(group, &[vec![(n - k) as u64]], keys)?.remove(0).pop()
            }
            _ => None,
        };
        let none = chosen == Some(0);
        let select = move |piece: &Piece| -> Vec<Vec<f64>> {
            let mut deltas: Vec<Vec<f64>> = (0..count).map(|k| piece.delta(k)).collect();
            if none {
                deltas.iter_mut().for_each(|d| d.fill(0.0));
            }
            if let Some(cut) = &cut {
                let keys: Vec<f32> = variances(piece).into_iter().map(|v| v as f32).collect();
                deltas.iter_mut().for_each(|d| cut.zero(piece.index, &keys, false, d));
            }
            deltas
        };
        let squares = group.scan(|piece| -> Vec<f64> {
            select(piece).iter().map(|d| d.iter().map(|x| x * x).sum()).collect()
        })?;
        let mut weight: Vec<f64> = (0..count)
            .map(|k| squares.iter().map(|s| s[k]).sum::<f64>() / n.max(1) as f64)
            .collect();
        let total: f64 = weight.iter().sum();
        match total < 1e-6 {
            true => weight.fill(1.0 / count as f64),
            false => weight.iter_mut().for_each(|w| *w /= total),
        }
        Ok(Box::new(move |piece, out| {
            let deltas = select(piece);
            for (i, out) in out.iter_mut().enumerate() {
                let positive = deltas.iter().map(|d| d[i]).sum::<f64>() >= 0.0;
                let (mut sum, mut weights) = (0.0, 0.0);
                for (d, w) in deltas.iter().zip(&weight) {
                    let agrees = if positive { d[i] > 0.0 } else { d[i] < 0.0 };
                    sum += if agrees { w * d[i] } else { 0.0 };
                    weights += if agrees { *w } else { 0.0 };
                }
                *out = (f64::from(piece.base[i]) + sum / weights.max(1e-6)) as f32;
            }
        }))
    }
}

/// Variance of the models' changes, weight by weight.
fn variances(piece: &Piece) -> Vec<f64> {
    let count = piece.inputs.len() as f64;
    let at = |i: usize| {
        let changes = || piece.inputs.iter().map(|x| f64::from(x[i]) - f64::from(piece.base[i]));
        let mean = changes().sum::<f64>() / count;
        changes().map(|d| (d - mean) * (d - mean)).sum::<f64>() / count
    };
    (0..piece.len()).map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::testing::{merge, normals};

    #[test]
    fn only_what_varies_most_changes() {
        let base = normals(1, 100);
        let (a, b) = (normals(2, 100), normals(3, 100));
        let run = |select_topk| {
            let method = Sce { select_topk, ..Sce::default() };
            merge(&method, &[a.clone(), b.clone()], Some(base.clone()), &[10, 10])
        };
        let changed = |merged: &[f32]| merged.iter().zip(&base).filter(|(x, b)| x != b).count();
        assert_eq!(changed(&run(0.3)), 30);
        assert_eq!(changed(&run(1.0)), 100);
        assert_eq!(run(0.0), base);
        // Copies do not vary: with everything selected they are themselves.
        let same = merge(&Sce::default(), &[a.clone(), a.clone()], Some(base.clone()), &[100]);
        assert!(same.iter().zip(&a).all(|(x, y)| (x - y).abs() < 1e-6));
    }

    #[test]
    fn the_model_that_changed_more_weighs_more() {
        let merged =
            merge(&Sce::default(), &[vec![1.0; 4], vec![3.0; 4]], Some(vec![0.0; 4]), &[4]);
        assert!(merged.iter().all(|x| (x - 2.8).abs() < 1e-6), "{merged:?}");
    }
}
