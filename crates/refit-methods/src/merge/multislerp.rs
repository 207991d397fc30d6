//! Multi-SLERP: a barycentre on the sphere (Goddard, *Multi-SLERP*), of models or of what they changed in a base.
//!
//! The directions `u_k = x_k / ||x_k||` are averaged, the mean is pushed back to the sphere along the weighted sum of the
//! directions' tangents there, and scaled by the weighted mean norm. At the normalised weighted mean that sum of tangents is
//! `sum_k w_k (u_k - <u_k, m> m) = 0`, so the push is none, whatever the models (mergekit computes it and gets rounding
//! errors): the result is the direction of the mean with the mean's norm, a linear combination.

use std::sync::Arc;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::merge::blend::{combine, gram};
use crate::merge::group::Group;
use crate::merge::kernel::{About, Kernel, Map, Merge, one_or_many, per_model};
use crate::method::{Need, Paper};
use crate::rewrite::OutputType;

/// Parameters of Multi-SLERP.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Multislerp {
    /// Weight of every model, or one for all; 1 when left out.
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, value_name = "W,W,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub weight: Vec<f64>,
    /// Divide the weights by their sum.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub normalize_weights: bool,
    /// Norms below this count as nought.
    #[arg(long, default_value_t = 1e-8)]
    pub eps: f64,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Multislerp);

impl Merge for Multislerp {
    const ABOUT: About = About {
        name: "multislerp",
        title: "Multi-SLERP",
        summary: "Averages the directions of models, or of what they changed in a base, and keeps the mean norm",
        paper: Paper { title: "", reference: "mergekit", year: 2025 },
        base: Need::Optional,
        models: (1, None),
        path: &["reuse", "merging", "interpolation"],
    };

    fn dtype(&self) -> OutputType {
        self.dtype
    }

    fn kernel(&self, count: usize) -> Result<Arc<dyn Kernel>> {
        let method = Self::ABOUT.name;
        let mut weight = per_model(method, "weight", &self.weight, count, 1.0)?;
        if !(self.eps > 0.0 && self.eps < 1.0) {
            return Err(Error::range(method, "eps", self.eps, "a small positive number"));
        }
        if self.normalize_weights {
            let sum: f64 = weight.iter().sum();
            if sum == 0.0 {
                let expected = "weights whose sum is not zero; or normalize_weights = false";
                return Err(Error::range(method, "weight", format!("{weight:?}"), expected));
            }
            weight.iter_mut().for_each(|w| *w /= sum);
        }
        Ok(Arc::new(Barycentre { weight, eps: self.eps }))
    }
}

#[derive(Debug)]
struct Barycentre {
    weight: Vec<f64>,
    eps: f64,
}

impl Kernel for Barycentre {
    fn prepare<'k>(&'k self, group: &Group) -> Result<Map<'k>> {
        // Of one model there is nothing to average.
        if self.weight.len() == 1 {
            return Ok(Box::new(|piece, out| out.copy_from_slice(piece.inputs[0])));
        }
        let gram = gram(group)?;
        let norms: Vec<f64> = (0..gram.count).map(|k| gram.norm(k)).collect();
        let directions: Vec<f64> =
            self.weight.iter().zip(&norms).map(|(w, norm)| w / (norm + self.eps)).collect();
        let length = gram.norm_of(&directions);
        let mean: f64 = self.weight.iter().zip(&norms).map(|(w, norm)| w * norm).sum();
        let factors: Vec<f64> = match length < self.eps {
            false => directions.iter().map(|d| mean * d / length).collect(),
            // Tensors of zeros, or nothing changed: their weighted sum is as good as any.
            true if norms.iter().all(|norm| *norm < self.eps) || gram.count == 2 => {
                self.weight.clone()
            }
            true => {
                return Err(group.error(
                    "the weighted directions cancel out, so there is no mean; use other weights, or another method",
                ));
            }
        };
        let rest = if group.base.is_some() { 1.0 - factors.iter().sum::<f64>() } else { 0.0 };
        Ok(Box::new(move |piece, out| combine(piece, rest, &factors, out)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::testing::{merge, normals};

    #[test]
    fn copies_are_themselves_and_the_norm_is_the_mean_norm() {
        let (a, b, base) = (normals(1, 400), normals(2, 400), normals(3, 400));
        let same =
            merge(&Multislerp::default(), &[a.clone(), a.clone(), a.clone()], None, &[20, 20]);
        assert!(same.iter().zip(&a).all(|(x, y)| (x - y).abs() <= 1e-6));
        let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let mixed = merge(&Multislerp::default(), &[a.clone(), b.clone()], None, &[20, 20]);
        assert!((norm(&mixed) - 0.5 * (norm(&a) + norm(&b))).abs() < 1e-4);
        // Nothing changed, so nothing changes.
        assert_eq!(
            merge(
                &Multislerp::default(),
                &[base.clone(), base.clone(), base.clone()],
                Some(base.clone()),
                &[400]
            ),
            base
        );
    }

    #[test]
    fn directions_that_cancel_out_are_an_error() {
        let a = normals(4, 30);
        let scaled = |by: f32| a.iter().map(|x| by * x).collect::<Vec<_>>();
        let error = crate::merge::testing::attempt(
            &Multislerp { weight: vec![0.5, 0.25, 0.25], ..Multislerp::default() },
            &[a.clone(), scaled(-1.0), scaled(-2.0)],
            None,
            &[30],
        );
        assert!(error.unwrap_err().to_string().contains("cancel out"));
    }
}
