//! NearSwap: a model moves to another one where they are near. Element by element, with the base `a`:
//! `w = clamp(t / |a - b|, 0, 1)`, `w b + (1 - w) a`.

use std::sync::Arc;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::merge::group::Group;
use crate::merge::kernel::{About, Kernel, Map, Merge};
use crate::method::{Need, Paper};
use crate::rewrite::OutputType;

/// Parameters of NearSwap.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Nearswap {
    /// Distance up to which a weight is the other model's.
    #[arg(long, default_value_t = 1e-4)]
    pub t: f64,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Nearswap);

impl Merge for Nearswap {
    const ABOUT: About = About {
        name: "nearswap",
        title: "NearSwap",
        summary: "Takes another model's weights where they are near the base's",
        paper: Paper { title: "", reference: "mergekit", year: 2024 },
        base: Need::Required,
        models: (1, Some(1)),
        path: &["reuse", "merging", "interpolation"],
    };

    fn dtype(&self) -> OutputType {
        self.dtype
    }

    fn kernel(&self, _: usize) -> Result<Arc<dyn Kernel>> {
        if !(self.t >= 0.0 && self.t.is_finite()) {
            return Err(Error::range(Self::ABOUT.name, "t", self.t, "a distance, 0 or more"));
        }
        Ok(Arc::new(self.clone()))
    }
}

impl Kernel for Nearswap {
    fn looks(&self) -> bool {
        false
    }

    fn prepare<'k>(&'k self, _: &Group) -> Result<Map<'k>> {
        Ok(Box::new(|piece, out| {
            for ((out, a), b) in out.iter_mut().zip(piece.base).zip(piece.inputs[0]) {
                let (a, b) = (f64::from(*a), f64::from(*b));
                let w = (self.t / (a - b).abs().max(1e-6)).min(1.0);
                *out = (w * b + (1.0 - w) * a) as f32;
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::testing::{merge, normals};

    #[test]
    fn near_weights_swap_and_no_weight_moves_further_than_t() {
        let (a, b) = (normals(1, 500), normals(2, 500));
        let run = |t| {
            merge(
                &Nearswap { t, ..Nearswap::default() },
                std::slice::from_ref(&b),
                Some(a.clone()),
                &[500],
            )
        };
        assert_eq!(run(0.0), a);
        assert_eq!(run(1e9), b);
        for ((x, a), b) in run(0.5).iter().zip(&a).zip(&b) {
            assert!((x - a).abs() < 0.5 + 1e-6);
            assert!((a - b).abs() > 0.5 || x == b);
        }
    }
}
