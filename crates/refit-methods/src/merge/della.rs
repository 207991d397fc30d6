//! DELLA (arXiv:2406.11617): changes are dropped at random, the large ones of a row less often than the small ones. The
//! probability of staying rises with the rank from `density - epsilon` to `density + epsilon`; what stays is divided by its own
//! probability. `della` elects signs as TIES does, `della-linear` adds up.
//!
//! mergekit scales to the tensor's former absolute sum instead ([`Rescale::L1`]). A row is the last dimension.

use std::sync::Arc;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::merge::dare::{key, uniform};
use crate::merge::delta::{Common, Mask, Rescale, Sparsify};
use crate::merge::group::Group;
use crate::merge::kernel::{About, Kernel, Merge, one_or_many, per_model};
use crate::method::{Need, Paper};
use crate::rewrite::OutputType;

/// Parameters of DELLA.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Della {
    /// Weight of every model's change, or one for all; 1 when left out.
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, value_name = "W,W,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub weight: Vec<f64>,
    /// Share of every model's change that is kept, or one for all; everything when left out.
    #[arg(long, value_delimiter = ',', value_name = "D,D,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub density: Vec<f64>,
    /// How far the probability of the largest and of the smallest change of a row lies from the density; 0.15 when left
    /// out.
    #[arg(long, value_delimiter = ',', value_name = "E,E,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub epsilon: Vec<f64>,
    /// Divide by the weights that took part.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
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

crate::paper_defaults!(Della);

impl Merge for Della {
    const ABOUT: About = About {
        name: "della",
        title: "DELLA",
        summary: "Adds changes of fine-tuned models, the larger the likelier, where they agree in sign, to their base",
        paper: Paper {
            title: "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
            reference: "arXiv:2406.11617",
            year: 2024,
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
        let (normalize, lambda, rescale) = (self.normalize, self.lambda, self.rescale);
        let common = Common { method, weight, normalize, lambda, elect: true, rescale };
        let ranked = Ranked::new(&common, &self.density, &self.epsilon, count)?;
        common.kernel(count, ranked)
    }
}

/// Parameters of DELLA without an election.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct DellaLinear {
    /// Weight of every model's change, or one for all; 1 when left out.
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, value_name = "W,W,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub weight: Vec<f64>,
    /// Share of every model's change that is kept, or one for all; everything when left out.
    #[arg(long, value_delimiter = ',', value_name = "D,D,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub density: Vec<f64>,
    /// How far the probability of the largest and of the smallest change of a row lies from the density; 0.15 when left
    /// out.
    #[arg(long, value_delimiter = ',', value_name = "E,E,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub epsilon: Vec<f64>,
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

crate::paper_defaults!(DellaLinear);

impl Merge for DellaLinear {
    const ABOUT: About = About {
        name: "della-linear",
        title: "DELLA, linear",
        summary: "Adds changes of fine-tuned models, the larger the likelier, to their base",
        paper: Paper {
            title: "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
            reference: "arXiv:2406.11617",
            year: 2024,
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
        let (normalize, lambda, rescale) = (self.normalize, self.lambda, self.rescale);
        let common = Common { method, weight, normalize, lambda, elect: false, rescale };
        let ranked = Ranked::new(&common, &self.density, &self.epsilon, count)?;
        common.kernel(count, ranked)
    }
}

/// Keeps elements with a probability that rises with their rank in the row.
#[derive(Debug)]
struct Ranked {
    density: Vec<f64>,
    epsilon: Vec<f64>,
    unbiased: bool,
}

impl Ranked {
    fn new(common: &Common, density: &[f64], epsilon: &[f64], count: usize) -> Result<Self> {
        let density = common.densities(density, count)?;
        let epsilon = per_model(common.method, "epsilon", epsilon, count, 0.15)?;
        for (density, epsilon) in density.iter().zip(&epsilon) {
            let random = *density > 0.0 && *density < 1.0;
            if random && !(*epsilon >= 0.0 && density - epsilon > 0.0 && density + epsilon < 1.0) {
                let expected = format!(
                    "density - epsilon above 0 and density + epsilon below 1, with density = {density}"
                );
                return Err(Error::range(common.method, "epsilon", epsilon, expected));
            }
        }
        Ok(Self { density, epsilon, unbiased: common.rescale == Rescale::Unbiased })
    }
}

impl Sparsify for Ranked {
    fn looks(&self) -> bool {
        false
    }

    fn prepare<'k>(&'k self, group: &Group) -> Result<Mask<'k>> {
        let keys: Vec<u64> = (0..self.density.len()).map(|k| key(group, k)).collect();
        let columns = group.columns();
        Ok(Box::new(move |piece, k, delta| {
            let (density, epsilon) = (self.density[k], self.epsilon[k]);
            if density >= 1.0 {
                return;
            }
            if density <= 0.0 {
                return delta.fill(0.0);
            }
            let mut order: Vec<u32> = Vec::with_capacity(columns);
            for (row, delta) in delta.chunks_mut(columns).enumerate() {
                let start = piece.start + row * columns;
                order.clear();
                order.extend(0..delta.len() as u32);
                order.sort_unstable_by(|a, b| {
                    let magnitude = |i: &u32| delta[*i as usize].abs();
                    magnitude(a).total_cmp(&magnitude(b)).then(a.cmp(b))
                });
                for (rank, i) in order.iter().enumerate() {
                    // A row of one element has no rank.
                    let place = match delta.len() {
                        1 => 0.5,
                        len => rank as f64 / (len - 1) as f64,
                    };
                    let probability = density - epsilon + 2.0 * epsilon * place;
                    let kept = uniform(keys[k], start + *i as usize) < probability;
                    let scale = if self.unbiased { 1.0 / probability } else { 1.0 };
                    let delta = &mut delta[*i as usize];
                    *delta = if kept { *delta * scale } else { 0.0 };
                }
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::testing::merge_seeded;

    #[test]
    fn large_changes_stay_more_often_and_the_mean_is_the_change() {
        const ROWS: usize = 4000;
        let theta: Vec<f32> = (0..ROWS).flat_map(|_| (1..=10).map(|i| i as f32)).collect();
        let run = |rescale, seed| {
            let (density, epsilon) = (vec![0.5], vec![0.3]);
            let method = DellaLinear { density, epsilon, rescale, ..DellaLinear::default() };
            merge_seeded(
                &method,
                std::slice::from_ref(&theta),
                Some(vec![0.0; 10 * ROWS]),
                &[ROWS, 10],
                seed,
            )
        };
        let plain = run(Rescale::None, 1);
        for column in 0..10 {
            let kept = (0..ROWS).filter(|row| plain[row * 10 + column] != 0.0).count() as f64;
            let probability = 0.2 + 0.6 * column as f64 / 9.0;
            let slack = 5.0 * (probability * (1.0 - probability) / ROWS as f64).sqrt();
            assert!((kept / ROWS as f64 - probability).abs() < slack, "column {column}: {kept}");
        }
        let unbiased = run(Rescale::Unbiased, 2);
        for column in 0..10 {
            let mean = (0..ROWS).map(|row| f64::from(unbiased[row * 10 + column])).sum::<f64>()
                / ROWS as f64;
            let value = column as f64 + 1.0;
            let probability = 0.2 + 0.6 * column as f64 / 9.0;
            let slack = 5.0 * value * ((1.0 - probability) / probability / ROWS as f64).sqrt();
            assert!((mean - value).abs() < slack, "column {column}: {mean}");
        }
        let sum = |x: &[f32]| x.iter().map(|x| f64::from(*x)).sum::<f64>();
        assert!((sum(&run(Rescale::L1, 3)) / sum(&theta) - 1.0).abs() < 1e-6);
        assert_eq!(run(Rescale::None, 4), run(Rescale::None, 4));
    }

    #[test]
    fn probabilities_stay_probabilities() {
        let error = |density: f64, epsilon: f64| {
            let (density, epsilon) = (vec![density], vec![epsilon]);
            Della { density, epsilon, ..Della::default() }.kernel(1).err().map(|e| e.to_string())
        };
        assert!(error(0.9, 0.15).is_some_and(|e| e.contains("epsilon")));
        assert!(error(0.1, 0.1).is_some());
        assert_eq!(error(1.0, 0.15), None);
        assert_eq!(error(0.5, 0.15), None);
    }
}
