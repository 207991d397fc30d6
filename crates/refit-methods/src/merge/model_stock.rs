//! Model Stock: *All we need is just a few fine-tuned models* (arXiv:2403.19522).
//!
//! Fine-tuned models lie on a shell around a centre that is better than any of them. With the mean cosine `c` between what
//! `N` models changed in the base, the mean of the models is pulled to the base: `t mean + (1 - t) base`,
//! `t = N c / (1 + (N - 1) c)`, per tensor or per row (`filter_wise`).

use std::sync::Arc;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::merge::blend::{Gram, combine, gram};
use crate::merge::group::Group;
use crate::merge::kernel::{About, Kernel, Map, Merge};
use crate::method::{Need, Paper};
use crate::rewrite::OutputType;

/// Parameters of Model Stock.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ModelStock {
    /// One ratio per row instead of one per tensor.
    #[arg(long)]
    pub filter_wise: bool,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(ModelStock);

impl Merge for ModelStock {
    const ABOUT: About = About {
        name: "model-stock",
        title: "Model Stock",
        summary: "Pulls the mean of fine-tuned models to their base, as far as they disagree",
        paper: Paper {
            title: "Model Stock: All we need is just a few fine-tuned models",
            reference: "arXiv:2403.19522",
            year: 2024,
        },
        base: Need::Required,
        models: (2, None),
        path: &["reuse", "merging", "averaging"],
    };

    fn dtype(&self) -> OutputType {
        self.dtype
    }

    fn kernel(&self, _: usize) -> Result<Arc<dyn Kernel>> {
        Ok(Arc::new(self.clone()))
    }
}

impl Kernel for ModelStock {
    fn looks(&self) -> bool {
        !self.filter_wise
    }

    fn prepare<'k>(&'k self, group: &Group) -> Result<Map<'k>> {
        let count = group.inputs.len();
        if !self.filter_wise {
            let t = ratio(&gram(group)?);
            let factors = vec![t / count as f64; count];
            return Ok(Box::new(move |piece, out| combine(piece, 1.0 - t, &factors, out)));
        }
        let columns = group.columns();
        Ok(Box::new(move |piece, out| {
            let deltas: Vec<Vec<f64>> = (0..count).map(|k| piece.delta(k)).collect();
            for at in (0..out.len()).step_by(columns) {
                let rows: Vec<Vec<f64>> =
                    deltas.iter().map(|d| d[at..at + columns].to_vec()).collect();
                let t = ratio(&Gram::of(&rows));
                for i in 0..columns {
                    let mean = rows.iter().map(|row| row[i]).sum::<f64>() / count as f64;
                    out[at + i] = (f64::from(piece.base[at + i]) + t * mean) as f32;
                }
            }
        }))
    }
}

/// `t` of what the models changed.
fn ratio(gram: &Gram) -> f64 {
    let count = gram.count;
    let mut cosines = Vec::new();
    for i in 0..count {
        for j in i + 1..count {
            let norms = (gram.norm(i) * gram.norm(j)).max(1e-6);
            cosines.push((gram.at(i, j) / norms).clamp(-1.0, 1.0));
        }
    }
    let cosine = cosines.iter().sum::<f64>() / cosines.len().max(1) as f64;
    let below = 1.0 + (count as f64 - 1.0) * cosine;
    // Changes that cancel out say nothing about the centre: the base stays.
    if below.abs() < 1e-6 { 0.0 } else { count as f64 * cosine / below }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::testing::{merge, normals};

    #[test]
    fn agreeing_models_are_their_mean_and_orthogonal_ones_the_base() {
        let base = normals(1, 60);
        let moved = |by: &[f32]| base.iter().zip(by).map(|(b, d)| b + d).collect::<Vec<_>>();
        let d = normals(2, 60);
        for filter_wise in [false, true] {
            let stock = ModelStock { filter_wise, ..ModelStock::default() };
            let same = merge(&stock, &[moved(&d), moved(&d)], Some(base.clone()), &[6, 10]);
            assert!(same.iter().zip(moved(&d)).all(|(x, y)| (x - y).abs() < 1e-6));
        }
        let half = |keep: usize| {
            (0..60).map(|i| if i % 2 == keep { d[i] } else { 0.0 }).collect::<Vec<_>>()
        };
        let stock = merge(
            &ModelStock::default(),
            &[moved(&half(0)), moved(&half(1))],
            Some(base.clone()),
            &[60],
        );
        assert!(stock.iter().zip(&base).all(|(x, y)| (x - y).abs() < 1e-6));
        let minus: Vec<f32> = d.iter().map(|d| -d).collect();
        let stock =
            merge(&ModelStock::default(), &[moved(&d), moved(&minus)], Some(base.clone()), &[60]);
        assert!(stock.iter().zip(&base).all(|(x, y)| (x - y).abs() < 1e-5));
    }
}
