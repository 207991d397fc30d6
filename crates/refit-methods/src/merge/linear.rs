//! The weighted mean, as *Model soups* (arXiv:2203.05482) has it: `theta = sum_k w_k theta_k / sum_k w_k`.

use std::sync::Arc;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::merge::blend::combine;
use crate::merge::group::Group;
use crate::merge::kernel::{About, Kernel, Map, Merge, one_or_many, per_model};
use crate::method::{Need, Paper};
use crate::rewrite::OutputType;

/// Parameters of the weighted mean.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Linear {
    /// Weight of every model, or one for all; 1 when left out.
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, value_name = "W,W,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub weight: Vec<f64>,
    /// Divide by the sum of the weights.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub normalize: bool,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Linear);

impl Merge for Linear {
    const ABOUT: About = About {
        name: "linear",
        title: "Linear merge",
        summary: "Averages models of one architecture, each with a weight of its own",
        paper: Paper {
            title: "Model soups: averaging weights of multiple fine-tuned models improves accuracy \
                    without increasing inference time",
            reference: "arXiv:2203.05482",
            year: 2022,
        },
        base: Need::No,
        models: (1, None),
        path: &["reuse", "merging", "averaging"],
    };

    fn dtype(&self) -> OutputType {
        self.dtype
    }

    fn kernel(&self, count: usize) -> Result<Arc<dyn Kernel>> {
        let method = Self::ABOUT.name;
        let weight = per_model(method, "weight", &self.weight, count, 1.0)?;
        let sum = if self.normalize { weight.iter().sum() } else { 1.0 };
        if sum == 0.0 {
            let expected = "weights whose sum is not zero; or normalize = false";
            return Err(Error::range(method, "weight", format!("{weight:?}"), expected));
        }
        Ok(Arc::new(Sum(weight.iter().map(|weight| weight / sum).collect())))
    }
}

/// A sum of the inputs with these factors.
#[derive(Debug)]
pub struct Sum(pub Vec<f64>);

impl Kernel for Sum {
    fn looks(&self) -> bool {
        false
    }

    fn prepare<'k>(&'k self, _: &Group) -> Result<Map<'k>> {
        Ok(Box::new(|piece, out| combine(piece, 0.0, &self.0, out)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::testing::{merge, normals};

    #[test]
    fn copies_of_a_model_are_that_model_and_one_weight_picks_one() {
        let x = normals(1, 1000);
        let same = [x.clone(), x.clone(), x.clone()];
        let weights = Linear { weight: vec![0.3, 0.5, 0.9], ..Linear::default() };
        assert_eq!(merge(&weights, &same, None, &[10, 100]), x);
        let pick = Linear { weight: vec![0.0, 1.0], ..Linear::default() };
        assert_eq!(merge(&pick, &[normals(2, 9), normals(3, 9)], None, &[9]), normals(3, 9));
    }

    #[test]
    fn weights_must_fit_the_models() {
        let error = |weight: &[f64]| {
            let linear = Linear { weight: weight.to_vec(), ..Linear::default() };
            linear.kernel(2).unwrap_err().to_string()
        };
        assert!(error(&[1.0, 2.0, 3.0]).contains("each of the 2 models"));
        assert!(error(&[1.0, -1.0]).contains("not zero"));
        assert!(error(&[f64::NAN]).contains("a number"));
    }
}
