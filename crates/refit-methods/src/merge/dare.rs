//! DARE: *Language Models are Super Mario* (arXiv:2311.03099). Every change is dropped with probability `1 - density`, and the
//! rest divided by the density, so that the expected change stays; `dare-ties` elects signs as TIES does.
//!
//! mergekit scales to the tensor's former absolute sum instead ([`Rescale::L1`]). Whether an element is kept follows from seed,
//! tensor, model and index alone: the same seed drops the same elements, whatever the number of threads.

use std::sync::Arc;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::merge::delta::{Common, Mask, Rescale, Sparsify};
use crate::merge::group::Group;
use crate::merge::kernel::{About, Kernel, Merge, one_or_many};
use crate::method::{Need, Paper};
use crate::rewrite::OutputType;

/// Parameters of DARE.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct DareLinear {
    /// Weight of every model's change, or one for all; 1 when left out.
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, value_name = "W,W,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub weight: Vec<f64>,
    /// Share of every model's change that is kept, or one for all; everything when left out.
    #[arg(long, value_delimiter = ',', value_name = "D,D,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub density: Vec<f64>,
    /// Divide by the weights that took part.
    #[arg(long)]
    pub normalize: bool,
    /// Factor of the whole change.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub lambda: f64,
    /// What becomes of the values that are kept.
    #[arg(long, value_enum, default_value_t = Rescale::Unbiased)]
    pub rescale: Rescale,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(DareLinear);

impl DareLinear {
    /// The kernel of `method`, with an election of signs or without.
    fn elected(&self, method: &'static str, elect: bool, count: usize) -> Result<Arc<dyn Kernel>> {
        let weight = &self.weight[..];
        let (normalize, lambda, rescale) = (self.normalize, self.lambda, self.rescale);
        let common = Common { method, weight, normalize, lambda, elect, rescale };
        let density = common.densities(&self.density, count)?;
        common.kernel(count, Bernoulli { density, unbiased: self.rescale == Rescale::Unbiased })
    }
}

impl Merge for DareLinear {
    const ABOUT: About = About {
        name: "dare-linear",
        title: "DARE",
        summary: "Adds a random part of what fine-tuned models changed to their base, scaled up",
        paper: Paper {
            title: "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
            reference: "arXiv:2311.03099",
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

/// Parameters of DARE with an election of signs.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct DareTies {
    /// Those of the method without one.
    #[command(flatten)]
    #[serde(flatten)]
    pub all: DareLinear,
}

crate::paper_defaults!(DareTies);

impl Merge for DareTies {
    const ABOUT: About = About {
        name: "dare-ties",
        title: "DARE-TIES",
        summary: "Adds a random part of what fine-tuned models changed, where they agree in sign, to their base",
        paper: Paper {
            title: "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
            reference: "arXiv:2311.03099",
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

/// Keeps every element with the same probability.
#[derive(Debug)]
struct Bernoulli {
    density: Vec<f64>,
    unbiased: bool,
}

impl Sparsify for Bernoulli {
    fn looks(&self) -> bool {
        false
    }

    fn prepare<'k>(&'k self, group: &Group) -> Result<Mask<'k>> {
        let keys: Vec<u64> = (0..self.density.len()).map(|k| key(group, k)).collect();
        Ok(Box::new(move |piece, k, delta| {
            let density = self.density[k];
            if density >= 1.0 {
                return;
            }
            let scale = if self.unbiased && density > 0.0 { 1.0 / density } else { 1.0 };
            for (i, delta) in delta.iter_mut().enumerate() {
                let kept = uniform(keys[k], piece.start + i) < density;
                *delta = if kept { *delta * scale } else { 0.0 };
            }
        }))
    }
}

/// What random choices about a model's tensor follow from.
pub fn key(group: &Group, k: usize) -> u64 {
    refit_data::rng::hash(group.seed, format!("{k} {}", group.name).as_bytes())
}

/// Element `index` of the random numbers in [0, 1) of a key: SplitMix64's output function on a counter.
pub fn uniform(key: u64, index: usize) -> f64 {
    let mut z = key.wrapping_add((index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::testing::{merge, merge_seeded};

    const N: usize = 200_000;

    fn run(density: f64, rescale: Rescale, seed: u64) -> Vec<f32> {
        let method = DareLinear { density: vec![density], rescale, ..DareLinear::default() };
        merge_seeded(&method, &[vec![1.0; N]], Some(vec![0.0; N]), &[N / 100, 100], seed)
    }

    #[test]
    fn the_share_is_the_density_and_the_mean_is_the_change() {
        for density in [0.1, 0.5, 0.9] {
            let merged = run(density, Rescale::Unbiased, 1);
            let kept: Vec<f32> = merged.iter().copied().filter(|x| *x != 0.0).collect();
            // Five standard deviations of a binomial share.
            let slack = 5.0 * (density * (1.0 - density) / N as f64).sqrt();
            assert!((kept.len() as f64 / N as f64 - density).abs() < slack);
            assert!(kept.iter().all(|x| (f64::from(*x) - 1.0 / density).abs() < 1e-6));
            // mergekit's rescaling restores the absolute sum exactly.
            let sum: f64 = run(density, Rescale::L1, 1).iter().map(|x| f64::from(*x)).sum();
            assert!((sum / N as f64 - 1.0).abs() < 1e-6);
        }
        assert_eq!(run(1.0, Rescale::Unbiased, 1), vec![1.0; N]);
        assert_eq!(run(0.0, Rescale::Unbiased, 1), vec![0.0; N]);
    }

    #[test]
    fn a_seed_is_one_choice_and_models_choose_apart() {
        assert_eq!(run(0.3, Rescale::None, 7), run(0.3, Rescale::None, 7));
        assert_ne!(run(0.3, Rescale::None, 7), run(0.3, Rescale::None, 8));
        let method =
            DareLinear { density: vec![0.5], rescale: Rescale::None, ..DareLinear::default() };
        let both =
            merge(&method, &[vec![1.0; 4000], vec![1.0; 4000]], Some(vec![0.0; 4000]), &[40, 100]);
        let count = |value: f32| both.iter().filter(|x| **x == value).count();
        assert!(count(1.0) > 1800 && count(0.0) > 850 && count(2.0) > 850);
    }

    #[test]
    fn with_ties_signs_are_elected_among_what_is_left() {
        let all =
            DareLinear { density: vec![0.5], rescale: Rescale::None, ..DareLinear::default() };
        let method = DareTies { all };
        let merged =
            merge(&method, &[vec![3.0; 4000], vec![-1.0; 4000]], Some(vec![0.0; 4000]), &[40, 100]);
        assert!(merged.iter().all(|x| [3.0, -1.0, 0.0].contains(x)));
        let count = |value: f32| merged.iter().filter(|x| **x == value).count();
        // 3 wins whenever it is kept, -1 when it is alone.
        assert!(count(3.0).abs_diff(2000) < 160 && count(-1.0).abs_diff(1000) < 140);
    }
}
