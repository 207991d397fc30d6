//! Passthrough: a model as it is, or scaled. Alone it is a copy; in a mergekit recipe with slices it stacks layers
//! of several models into one (a frankenmerge).

use std::sync::Arc;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::merge::kernel::{About, Kernel, Merge, one_or_many, per_model};
use crate::merge::linear::Sum;
use crate::method::{Need, Paper};
use crate::rewrite::OutputType;

/// Parameters of passthrough.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Passthrough {
    /// Factor of every weight; 1 when left out.
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, value_name = "S")]
    #[serde(deserialize_with = "one_or_many")]
    pub scale: Vec<f64>,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Passthrough);

impl Merge for Passthrough {
    const ABOUT: About = About {
        name: "passthrough",
        title: "Passthrough",
        summary: "Copies a model, scaled or not; in a mergekit recipe, stacks layers of several models",
        paper: Paper { title: "", reference: "mergekit", year: 2023 },
        base: Need::No,
        models: (1, Some(1)),
        path: &["reuse", "merging", "stacking"],
    };

    fn dtype(&self) -> OutputType {
        self.dtype
    }

    fn kernel(&self, count: usize) -> Result<Arc<dyn Kernel>> {
        Ok(Arc::new(Sum(per_model(Self::ABOUT.name, "scale", &self.scale, count, 1.0)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::testing::{merge, normals};

    #[test]
    fn a_copy_is_exact_and_a_scale_scales() {
        let a = normals(1, 70);
        assert_eq!(merge(&Passthrough::default(), std::slice::from_ref(&a), None, &[7, 10]), a);
        let half = Passthrough { scale: vec![0.5], ..Passthrough::default() };
        let expected: Vec<f32> = a.iter().map(|x| 0.5 * x).collect();
        assert_eq!(merge(&half, &[a], None, &[7, 10]), expected);
    }
}
