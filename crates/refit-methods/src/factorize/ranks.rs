//! Which linears become pairs, and at which rank.

use clap::Args;
use refit_store::architecture::Site;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::rewrite::{self, shape_of};

/// Linears with fewer outputs stay as they are, as in PELA's code.
const FEWEST_OUTPUTS: usize = 10;

/// How thin the pairs are.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Thinness {
    /// A replaced linear has one over this of its weights: the rank is `floor(in out / (ratio (in + out)))`.
    #[arg(long, default_value_t = 2.0)]
    pub ratio: f64,
    /// Instead: the smallest rank that keeps this share of a matrix's squared singular values; matrices for which that saves
    /// nothing stay whole.
    #[arg(long, value_name = "SHARE")]
    pub energy: Option<f64>,
    /// Linears that stay whole: parts of their names.
    #[arg(long, value_delimiter = ',', value_name = "PART,...")]
    pub omit: Vec<String>,
}

crate::paper_defaults!(Thinness);

/// A linear that becomes a pair.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair<'a> {
    /// The linear.
    pub site: &'a Site,
    /// Outputs.
    pub out: usize,
    /// Inputs.
    pub inputs: usize,
    /// Inner dimension.
    pub rank: usize,
}

impl Pair<'_> {
    /// Weights of the pair.
    pub fn weights(&self) -> usize {
        self.rank * (self.out + self.inputs)
    }

    /// Name of the linear.
    pub fn module(&self) -> &str {
        module(self.site)
    }

    /// Names of the tensors that it is stored in: the right factor, then the left one.
    pub fn names(&self) -> [String; 2] {
        [format!("{}.0.weight", self.module()), format!("{}.1.weight", self.module())]
    }

    /// Rows and columns of the matrix as it is stored.
    pub fn stored(&self) -> (usize, usize) {
        (self.site.shape[0], self.site.shape[1])
    }
}

/// The tensor's name without `.weight`.
fn module(site: &Site) -> &str {
    site.name.strip_suffix(".weight").unwrap_or(&site.name)
}

impl Thinness {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Range`].
    pub fn check(&self, method: &'static str) -> Result<()> {
        if !(self.ratio.is_finite() && self.ratio > 0.0) {
            return Err(Error::range(
                method,
                "ratio",
                self.ratio,
                "a number above 0; 2 halves a linear",
            ));
        }
        match self.energy {
            Some(share) if !(share > 0.0 && share <= 1.0) => {
                Err(Error::range(method, "energy", share, "a share above 0 and at most 1"))
            }
            _ => Ok(()),
        }
    }

    /// The linears that may become pairs.
    ///
    /// # Errors
    /// A model without any; a part of a name that none has.
    pub fn candidates<'a>(&self, model: &'a ModelInput) -> Result<Vec<&'a Site>> {
        let all = rewrite::linears(model)?;
        for part in &self.omit {
            if !all.iter().any(|site| module(site).contains(part.as_str())) {
                return Err(Error::NothingToDo {
                    model: model.source.clone(),
                    what: "linear layer whose name has the part that --omit names",
                    advice: format!("`{part}` is in none; `refit inspect --tensors` lists them"),
                });
            }
        }
        let whole = |site: &&Site| {
            shape_of(site).0 < FEWEST_OUTPUTS
                || self.omit.iter().any(|part| module(site).contains(part.as_str()))
        };
        Ok(all.into_iter().filter(|site| !whole(site)).collect())
    }

    /// The pairs, by name. `spectrum` gives a matrix's singular values, in descending order, where ranks follow from them.
    ///
    /// # Errors
    /// As [`candidates`](Self::candidates), a ratio that leaves a matrix no rank, and whatever `spectrum` meets.
    pub fn pairs<'a>(
        &self,
        method: &'static str,
        model: &'a ModelInput,
        mut spectrum: impl FnMut(&[&'a Site]) -> Result<Vec<Vec<f32>>>,
    ) -> Result<Vec<Pair<'a>>> {
        let sites = self.candidates(model)?;
        let spectra = match self.energy {
            Some(_) => spectrum(&sites)?,
            None => vec![Vec::new(); sites.len()],
        };
        let mut pairs = Vec::new();
        for (site, values) in sites.iter().zip(&spectra) {
            let (out, inputs) = shape_of(site);
            let (full, most) = (out.min(inputs), (out * inputs) as f64 / (out + inputs) as f64);
            let rank = match self.energy {
                Some(share) => kept(values, share),
                None => (most / self.ratio).floor() as usize,
            };
            if rank == 0 {
                return Err(Error::range(
                    method,
                    "ratio",
                    self.ratio,
                    format!(
                        "`{}` is [{out}, {inputs}] and keeps no rank; at most {most:.1} here",
                        site.name
                    ),
                ));
            }
            // A pair of full rank is larger than what it replaces, and a share that needs it is not low rank.
            let saves = rank * (out + inputs) < out * inputs;
            if rank < full && (saves || self.energy.is_none()) {
                pairs.push(Pair { site, out, inputs, rank });
            }
        }
        Ok(pairs)
    }
}

/// The smallest rank that keeps `share` of the squares.
fn kept(values: &[f32], share: f64) -> usize {
    let squares = || values.iter().map(|s| f64::from(*s).powi(2));
    let (total, mut sum) = (squares().sum::<f64>(), 0.0);
    let least = squares().position(|square| {
        sum += square;
        sum >= share * total
    });
    least.map_or(values.len(), |at| at + 1).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_keep_a_share_are_the_smallest() {
        let values = [3.0, 2.0, 1.0, 0.0];
        assert_eq!(kept(&values, 9.0 / 14.0), 1);
        assert_eq!(kept(&values, 0.65), 2);
        assert_eq!(kept(&values, 1.0), 3);
        assert_eq!(kept(&[0.0, 0.0], 0.9), 1);
    }
}
