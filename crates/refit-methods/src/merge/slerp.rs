//! SLERP: the shortest way between two models over the sphere (Shoemake, *Animating rotation with quaternion
//! curves*, SIGGRAPH 1985), tensor by tensor: `(sin((1-t) o) a + sin(t o) b) / sin(o)` with the angle `o` between
//! `a` and `b`. Norms are not normalised; tensors that are nearly parallel (`|cos o| > 0.9995`) are mixed linearly,
//! since there the quotient is nought by nought. `a` is the base.

use std::sync::Arc;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::merge::blend::{combine, dot};
use crate::merge::group::Group;
use crate::merge::kernel::{About, Kernel, Map, Merge, within};
use crate::method::{Need, Paper};
use crate::rewrite::OutputType;

/// Cosine from which on tensors count as parallel.
const PARALLEL: f64 = 0.9995;

/// Parameters of SLERP.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Slerp {
    /// How far to go from the base (0) to the other model (1).
    #[arg(long, default_value_t = 0.5)]
    pub t: f64,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Slerp);

impl Merge for Slerp {
    const ABOUT: About = About {
        name: "slerp",
        title: "SLERP",
        summary: "Goes part of the way from a base to another model, over the sphere",
        paper: Paper {
            title: "Animating rotation with quaternion curves",
            reference: "doi:10.1145/325165.325242",
            year: 1985,
        },
        base: Need::Required,
        models: (1, Some(1)),
        path: &["reuse", "merging", "interpolation"],
    };

    fn dtype(&self) -> OutputType {
        self.dtype
    }

    fn kernel(&self, _: usize) -> Result<Arc<dyn Kernel>> {
        within(Self::ABOUT.name, "t", &[self.t], (0.0, 1.0))?;
        Ok(Arc::new(self.clone()))
    }
}

impl Kernel for Slerp {
    fn prepare<'k>(&'k self, group: &Group) -> Result<Map<'k>> {
        let products = group.scan(|piece| {
            let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
            let (a, b) = (wide(piece.base), wide(piece.inputs[0]));
            [dot(&a, &a), dot(&b, &b), dot(&a, &b)]
        })?;
        let [aa, bb, ab] =
            products.iter().fold([0.0; 3], |s, p| [s[0] + p[0], s[1] + p[1], s[2] + p[2]]);
        // A tensor of zeros has no direction.
        let norm = |square: f64| if square.sqrt() > 1e-8 { square.sqrt() } else { 1.0 };
        let (a, b) = factors(self.t, ab / (norm(aa) * norm(bb)), PARALLEL);
        Ok(Box::new(move |piece, out| combine(piece, a, &[b], out)))
    }
}

/// Factors of both ends at `t`, for vectors with this cosine; linear above `parallel`.
pub fn factors(t: f64, cosine: f64, parallel: f64) -> (f64, f64) {
    let cosine = cosine.clamp(-1.0, 1.0);
    if cosine.abs() > parallel {
        return (1.0 - t, t);
    }
    let angle = cosine.acos();
    (((1.0 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::testing::{merge, normals};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// The ends are the models, bit for bit; equal norms stay; a model with itself is itself.
        #[test]
        fn ends_middles_and_copies(seed in 0u64..1000, t in 0.0f64..1.0) {
            let (a, b) = (normals(seed, 300), normals(seed + 5000, 300));
            let at = |t: f64, a: &[f32], b: &[f32]| {
                merge(&Slerp { t, ..Slerp::default() }, &[b.to_vec()], Some(a.to_vec()), &[3, 100])
            };
            prop_assert_eq!(at(0.0, &a, &b), a.clone());
            prop_assert_eq!(at(1.0, &a, &b), b.clone());
            prop_assert_eq!(at(t, &a, &a), a.clone());
            let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            let unit: Vec<f32> = b.iter().map(|x| (f64::from(*x) * norm(&a) / norm(&b)) as f32).collect();
            prop_assert!((norm(&at(t, &a, &unit)) / norm(&a) - 1.0).abs() < 1e-6);
            // From the other end it is the same way.
            for (x, y) in at(t, &a, &b).iter().zip(at(1.0 - t, &b, &a)) {
                prop_assert!((x - y).abs() <= 1e-6 * (1.0 + x.abs()));
            }
        }
    }

    #[test]
    fn zeros_are_mixed_and_t_is_checked() {
        let half = merge(&Slerp::default(), &[vec![2.0; 4]], Some(vec![0.0; 4]), &[4]);
        let expected = 2.0 * (0.25 * std::f64::consts::PI).sin();
        assert!(half.iter().all(|x| (f64::from(*x) - expected).abs() < 1e-6), "{half:?}");
        assert!(Slerp { t: 1.5, ..Slerp::default() }.kernel(1).is_err());
    }
}
