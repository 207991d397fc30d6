//! Karcher mean: the point of the sphere with the least sum of squared angles to the models' directions
//! (arXiv:2603.04972), scaled by the mean norm.
//!
//! Every iterate is a linear combination of the directions, so the iteration runs on its coefficients and the
//! directions' inner products: one look at the tensors, however many iterations.

use std::sync::Arc;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::merge::blend::{Gram, combine, gram};
use crate::merge::group::Group;
use crate::merge::kernel::{About, Kernel, Map, Merge};
use crate::method::{Need, Paper};
use crate::rewrite::OutputType;

/// Parameters of the Karcher mean.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Karcher {
    /// Most iterations.
    #[arg(long, default_value_t = 10)]
    pub max_iter: usize,
    /// Stop when the mean moves by less than this angle.
    #[arg(long, default_value_t = 1e-5)]
    pub tol: f64,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Karcher);

impl Merge for Karcher {
    const ABOUT: About = About {
        name: "karcher",
        title: "Karcher mean",
        summary: "Averages the directions of models on the sphere, and keeps the mean norm",
        paper: Paper { title: "", reference: "arXiv:2603.04972", year: 2026 },
        base: Need::No,
        models: (1, None),
        path: &["reuse", "merging", "averaging"],
    };

    fn dtype(&self) -> OutputType {
        self.dtype
    }

    fn kernel(&self, _: usize) -> Result<Arc<dyn Kernel>> {
        if !(self.tol > 0.0 && self.tol < 1.0) {
            return Err(Error::range(Self::ABOUT.name, "tol", self.tol, "a small positive angle"));
        }
        Ok(Arc::new(self.clone()))
    }
}

impl Kernel for Karcher {
    fn prepare<'k>(&'k self, group: &Group) -> Result<Map<'k>> {
        if group.inputs.len() == 1 {
            return Ok(Box::new(|piece, out| out.copy_from_slice(piece.inputs[0])));
        }
        let factors = self.factors(&gram(group)?);
        Ok(Box::new(move |piece, out| combine(piece, 0.0, &factors, out)))
    }
}

impl Karcher {
    fn factors(&self, gram: &Gram) -> Vec<f64> {
        let count = gram.count;
        let norms: Vec<f64> = (0..count).map(|k| gram.norm(k)).collect();
        // Tensors of zeros have no direction.
        let valid: Vec<bool> = norms.iter().map(|norm| *norm > self.tol).collect();
        let alpha = 1.0 / valid.iter().filter(|valid| **valid).count().max(1) as f64;
        // Coefficients are those of the inputs: a direction is its input over its norm.
        let unit = |k: usize| if valid[k] { 1.0 / norms[k] } else { 0.0 };
        let mut mean: Vec<f64> = (0..count).map(|k| alpha * unit(k)).collect();
        let length = gram.norm_of(&mean);
        if length < self.tol {
            let first = valid.iter().position(|valid| *valid);
            mean = (0..count).map(|k| if Some(k) == first { unit(k) } else { 0.0 }).collect();
        } else {
            mean.iter_mut().for_each(|m| *m /= length);
        }
        for _ in 0..self.max_iter {
            let mut tangent = vec![0.0; count];
            for k in (0..count).filter(|k| valid[*k]) {
                let along: f64 = (0..count).map(|j| mean[j] * gram.at(j, k)).sum::<f64>() * unit(k);
                let angle = along.clamp(-1.0, 1.0).acos();
                if angle < self.tol {
                    continue;
                }
                let pull = alpha * angle / angle.sin();
                tangent.iter_mut().zip(&mean).for_each(|(t, m)| *t -= pull * along * m);
                tangent[k] += pull * unit(k);
            }
            let step = gram.norm_of(&tangent);
            if step < self.tol {
                break;
            }
            mean.iter_mut()
                .zip(&tangent)
                .for_each(|(m, t)| *m = step.cos() * *m + step.sin() * t / step);
            let length = gram.norm_of(&mean);
            if length > self.tol {
                mean.iter_mut().for_each(|m| *m /= length);
            }
        }
        let scale = norms.iter().sum::<f64>() / count as f64;
        mean.iter().map(|m| scale * m).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::testing::{merge, normals};

    #[test]
    fn the_mean_of_three_has_equal_pulls_and_copies_are_themselves() {
        let models = [normals(1, 300), normals(2, 300), normals(3, 300)];
        let mean = merge(
            &Karcher { max_iter: 50, tol: 1e-9, ..Karcher::default() },
            &models,
            None,
            &[300],
        );
        let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let unit = |x: &[f32]| {
            let wide: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            let norm = norm(&wide);
            wide.into_iter().map(|x| x / norm).collect::<Vec<_>>()
        };
        let m = unit(&mean);
        // The sum of the logarithms at the mean is zero.
        let mut pull = vec![0f64; 300];
        for model in &models {
            let u = unit(model);
            let along: f64 = u.iter().zip(&m).map(|(u, m)| u * m).sum();
            let angle = along.acos();
            for (pull, (u, m)) in pull.iter_mut().zip(u.iter().zip(&m)) {
                *pull += angle / angle.sin() * (u - along * m);
            }
        }
        assert!(norm(&pull) < 1e-5, "{}", norm(&pull));
        let a = normals(7, 64);
        let same = merge(&Karcher::default(), &[a.clone(), a.clone()], None, &[8, 8]);
        assert!(same.iter().zip(&a).all(|(x, y)| (x - y).abs() < 1e-6));
        let zeros = merge(&Karcher::default(), &[vec![0.0; 8], vec![0.0; 8]], None, &[8]);
        assert_eq!(zeros, vec![0.0; 8]);
    }
}
