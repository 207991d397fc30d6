//! Model Breadcrumbs (arXiv:2312.06795): of every change the largest values (outliers) and the smallest (noise) are dropped,
//! and the rest added up; `breadcrumbs-ties` elects signs as TIES does.

use std::sync::Arc;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::merge::delta::{Common, Rescale};
use crate::merge::kernel::{About, Kernel, Merge, one_or_many, per_model, within};
use crate::merge::ties::Trim;
use crate::method::{Need, Paper};
use crate::rewrite::OutputType;

/// Parameters of Model Breadcrumbs.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Breadcrumbs {
    /// Weight of every model's change, or one for all; 1 when left out.
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, value_name = "W,W,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub weight: Vec<f64>,
    /// Share of every model's change that is kept, or one for all; everything when left out.
    #[arg(long, value_delimiter = ',', value_name = "D,D,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub density: Vec<f64>,
    /// Share of the largest changes that is dropped as outliers; 0.01 when left out.
    #[arg(long, value_delimiter = ',', value_name = "G,G,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub gamma: Vec<f64>,
    /// Divide by the weights that took part.
    #[arg(long)]
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

crate::paper_defaults!(Breadcrumbs);

impl Breadcrumbs {
    /// The kernel of `method`, with an election of signs or without.
    fn elected(&self, method: &'static str, elect: bool, count: usize) -> Result<Arc<dyn Kernel>> {
        let weight = &self.weight[..];
        let (normalize, lambda, rescale) = (self.normalize, self.lambda, self.rescale);
        let common = Common { method, weight, normalize, lambda, elect, rescale };
        let band = band(&common, &self.density, &self.gamma, count)?;
        common.kernel(count, Trim { band })
    }
}

impl Merge for Breadcrumbs {
    const ABOUT: About = About {
        name: "breadcrumbs",
        title: "Model Breadcrumbs",
        summary: "Adds what fine-tuned models changed to their base, without outliers and without noise",
        paper: Paper {
            title: "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
            reference: "arXiv:2312.06795",
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
        self.elected(Self::ABOUT.name, false, count)
    }
}

/// Parameters of Model Breadcrumbs with an election of signs.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct BreadcrumbsTies {
    /// Those of the method without one.
    #[command(flatten)]
    #[serde(flatten)]
    pub all: Breadcrumbs,
}

crate::paper_defaults!(BreadcrumbsTies);

impl Merge for BreadcrumbsTies {
    const ABOUT: About = About {
        name: "breadcrumbs-ties",
        title: "Model Breadcrumbs with TIES",
        summary: "Adds the changes of fine-tuned models that are no outliers, no noise, and agree in sign, to their base",
        paper: Paper {
            title: "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
            reference: "arXiv:2312.06795",
            year: 2023,
        },
        base: Need::Required,
        models: (1, None),
        path: &["reuse", "merging", "task vectors"],
    };

    fn dtype(&self) -> OutputType {
        self.all.dtype
    }

    fn kernel(&self, count: usize) -> Result<Arc<dyn Kernel>> {
        self.all.elected(Self::ABOUT.name, true, count)
    }
}

/// Density and share of outliers per model.
fn band(common: &Common, density: &[f64], gamma: &[f64], count: usize) -> Result<Vec<(f64, f64)>> {
    let density = common.densities(density, count)?;
    let gamma = per_model(common.method, "gamma", gamma, count, 0.01)?;
    within(common.method, "gamma", &gamma, (0.0, 1.0))?;
    Ok(density.into_iter().zip(gamma).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::testing::merge;

    #[test]
    fn the_largest_and_the_smallest_go_and_the_density_stays() {
        let theta: Vec<f32> = (1..=100).map(|i| i as f32).collect();
        let run = |density: f64, gamma: f64| {
            let (density, gamma) = (vec![density], vec![gamma]);
            let method = Breadcrumbs { density, gamma, ..Breadcrumbs::default() };
            let merged =
                merge(&method, std::slice::from_ref(&theta), Some(vec![0.0; 100]), &[10, 10]);
            let kept: Vec<usize> = (0..100).filter(|i| merged[*i] != 0.0).map(|i| i + 1).collect();
            (kept.first().copied(), kept.last().copied(), kept.len())
        };
        assert_eq!(run(0.5, 0.1), (Some(41), Some(90), 50));
        // No outliers to drop: the largest stay, and not nothing.
        assert_eq!(run(0.5, 0.0), (Some(51), Some(100), 50));
        assert_eq!(run(0.5, 0.001), (Some(51), Some(100), 50));
        // A band that is too wide keeps its width.
        assert_eq!(run(0.95, 0.2), (Some(1), Some(95), 95));
    }

    #[test]
    fn with_ties_the_sign_decides() {
        let (a, b) = (vec![4.0f32, 4.0, -1.0], vec![-1.0f32, 2.0, -3.0]);
        let merged = merge(&BreadcrumbsTies::default(), &[a, b], Some(vec![0.0; 3]), &[3]);
        assert_eq!(merged, [4.0, 6.0, -4.0]);
    }
}
