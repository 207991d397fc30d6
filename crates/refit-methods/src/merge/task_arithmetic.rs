//! *Editing Models with Task Arithmetic* (arXiv:2212.04089): what models changed in their base is added up,
//! `base + lambda sum_k w_k (theta_k - base)`. A negative weight forgets.

use std::sync::Arc;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::merge::delta::{Common, Keep, Rescale};
use crate::merge::kernel::{About, Kernel, Merge, one_or_many};
use crate::method::{Need, Paper};
use crate::rewrite::OutputType;

/// Parameters of task arithmetic.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TaskArithmetic {
    /// Weight of every model's change, or one for all; 1 when left out.
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, value_name = "W,W,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub weight: Vec<f64>,
    /// Divide by the sum of the weights.
    #[arg(long)]
    pub normalize: bool,
    /// Factor of the whole change.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub lambda: f64,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(TaskArithmetic);

impl Merge for TaskArithmetic {
    const ABOUT: About = About {
        name: "task-arithmetic",
        title: "Task arithmetic",
        summary: "Adds what fine-tuned models changed to their base, each with a weight",
        paper: Paper {
            title: "Editing Models with Task Arithmetic",
            reference: "arXiv:2212.04089",
            year: 2022,
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
        let (normalize, lambda) = (self.normalize, self.lambda);
        let rescale = Rescale::None;
        Common { method, weight, normalize, lambda, elect: false, rescale }.kernel(count, Keep)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::testing::{merge, normals};

    #[test]
    fn a_change_added_and_taken_away_is_none() {
        let (base, a) = (normals(1, 90), normals(2, 90));
        let run = |weight: Vec<f64>, models: &[Vec<f32>]| {
            let method = TaskArithmetic { weight, ..TaskArithmetic::default() };
            merge(&method, models, Some(base.clone()), &[9, 10])
        };
        assert_eq!(run(vec![1.0], std::slice::from_ref(&a)), a);
        assert_eq!(run(vec![1.0, -1.0], &[a.clone(), a.clone()]), base);
        // Forgetting is the mirror image of learning.
        for ((x, b), a) in run(vec![-1.0], std::slice::from_ref(&a)).iter().zip(&base).zip(&a) {
            assert!((x - (2.0 * b - a)).abs() < 1e-6);
        }
        let lambda = TaskArithmetic { lambda: 0.0, ..TaskArithmetic::default() };
        assert_eq!(merge(&lambda, &[a], Some(base.clone()), &[90]), base);
    }
}
