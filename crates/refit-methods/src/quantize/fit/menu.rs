//! Which grids each matrix may get, and what each takes.
//!
//! What is counted is what `refit export --to compressed-tensors` writes. A size in bytes is that of its weight files, headers
//! included: codes in 32-bit words row by row, scales in half precision, zero points, shapes, and every tensor that is not
//! quantized in the element type that it is written in. Bits per weight are the same parts of the quantized matrices alone, over
//! their weights. Configuration and tokenizer lie in files of their own and are not counted.

use refit_store::DType;
use refit_store::architecture::{Layout, Site};
use refit_store::lattice::Lattice;
use serde::Serialize;
use serde_json::json;

use super::Fit;
use crate::emit::{SHARD, file_bytes};
use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::quantize::chain::{Group, nested};
use crate::quantize::export::{float_of, packed_parts};
use crate::quantize::grid::{Grid, ScaleRule, Scheme};
use crate::rewrite::{OutputType, linears, shape_of};

/// An offset no shorter than any that a header holds.
const LONG_OFFSET: u64 = 999_999_999_999;
/// What a file of tensors has beside their entries: length, padding, `{"__metadata__":{"format":"pt"}}`.
const FILE_OVERHEAD: u64 = 8 + 8 + 34;

/// A grid that a matrix may get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Choice {
    /// Bits per code.
    pub bits: u8,
    /// Whether there is no zero point.
    pub symmetric: bool,
    /// Consecutive inputs that share a scale.
    pub group: usize,
}

impl Choice {
    /// The grid.
    pub fn grid(&self, rule: ScaleRule) -> Grid {
        Grid { bits: self.bits, symmetric: self.symmetric, rule, scheme: Scheme::Linear }
    }

    fn lattice(&self) -> Lattice {
        Lattice { bits: self.bits, symmetric: self.symmetric, group: self.group }
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// Bytes of the weight files.
    Files,
    /// Bytes of the parts of quantized matrices.
    Parts,
}

/// The same grid for all matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Uniform {
    /// Bits per code.
    pub bits: u8,
    /// Whether there is no zero point.
    pub symmetric: bool,
    /// Consecutive inputs that share a scale, or whole rows.
    pub group: Group,
}

impl Uniform {
    /// What it means for rows of `inputs` weights.
    pub fn of(&self, inputs: usize) -> Choice {
        let group = self.group.size().unwrap_or(inputs);
        Choice { bits: self.bits, symmetric: self.symmetric, group }
    }
}

/// Every matrix with its choices.
pub struct Menu<'a> {
    model: &'a ModelInput,
    dtype: OutputType,
    /// The matrices.
    pub sites: Vec<&'a Site>,
    /// What each may get.
    pub choices: Vec<Vec<Choice>>,
}

impl<'a> Menu<'a> {
    /// The choices of parameters that were checked.
    ///
    /// # Errors
    /// A model without linears, no group size that divides a row.
    pub fn of(fit: &Fit, model: &'a ModelInput) -> Result<Self> {
        let sites = linears(model)?;
        let choices = sites
            .iter()
            .map(|site| {
                let groups = groups(fit, site)?;
                let mut all = Vec::new();
                for &bits in &fit.bits {
                    for symmetric in [true, false] {
                        if symmetric || !fit.symmetric {
                            all.extend(groups.iter().map(|&group| Choice {
                                bits,
                                symmetric,
                                group,
                            }));
                        }
                    }
                }
                Ok(all)
            })
            .collect::<Result<_>>()?;
        Ok(Self { model, dtype: fit.dtype, sites, choices })
    }

    /// Weights of all matrices.
    pub fn weights(&self) -> u64 {
        self.sites.iter().map(|site| site.numel() as u64).sum()
    }

    /// What a choice takes.
    pub fn cost(&self, site: &Site, choice: Choice, count: Count) -> u64 {
        let (out, inputs) = shape_of(site);
        let parts = packed_parts(&site.name, [out, inputs], choice.lattice());
        parts.iter().map(|part| bytes_of(part, count)).sum()
    }

    /// What the tensors that are not quantized take, and the files themselves.
    pub fn fixed(&self, count: Count) -> u64 {
        match count {
            Count::Parts => 0,
            Count::Files => {
                let others: u64 = self.others().iter().map(|part| bytes_of(part, count)).sum();
                // Two files that follow on each other hold more than one may.
                let files = 2 + 2 * (others + 8 * self.weights()) / SHARD;
                others + files * FILE_OVERHEAD
            }
        }
    }

    /// Bytes of data of the tensors that are not quantized.
    pub fn others_bytes(&self) -> u64 {
        self.others().iter().filter_map(|(_, shape, dtype)| dtype.bytes_of(shape)).sum()
    }

    /// Whether some of them have 32 bits where 16 would do.
    pub fn others_are_wide(&self) -> bool {
        self.others().iter().any(|(_, shape, dtype)| *dtype == DType::F32 && shape.len() > 1)
    }

    fn others(&self) -> Vec<(String, Vec<usize>, DType)> {
        let infos = self.model.artifact.tensors().iter();
        infos
            .filter(|info| !self.sites.iter().any(|site| site.name == info.name))
            .map(|info| {
                (info.name.clone(), info.shape.clone(), float_of(self.dtype.of(info.dtype)))
            })
            .collect()
    }

    /// The least and the most that all choices take together, what is fixed included.
    pub fn range(&self, count: Count) -> (u64, u64) {
        let sum = |pick: fn(u64, u64) -> u64| {
            let costs = self.sites.iter().zip(&self.choices).map(|(site, choices)| {
                let costs = choices.iter().map(|choice| self.cost(site, *choice, count));
                costs.reduce(pick).unwrap_or(0)
            });
            costs.sum::<u64>() + self.fixed(count)
        };
        (sum(u64::min), sum(u64::max))
    }

    /// Bytes of the weight files with these choices, exactly.
    ///
    /// # Errors
    /// Tensors that safetensors cannot hold.
    pub fn file_bytes(&self, chosen: &[Choice]) -> Result<u64> {
        let packed = self.sites.iter().zip(chosen).flat_map(|(site, choice)| {
            let (out, inputs) = shape_of(site);
            packed_parts(&site.name, [out, inputs], choice.lattice())
        });
        file_bytes(packed.chain(self.others()).collect(), None)
    }

    /// Bytes of the weight files of the model as it would be written without being quantized.
    ///
    /// # Errors
    /// Tensors that safetensors cannot hold.
    pub fn float_bytes(&self) -> Result<u64> {
        let infos = self.model.artifact.tensors().iter();
        let kept = infos.map(|info| {
            (info.name.clone(), info.shape.clone(), float_of(self.dtype.of(info.dtype)))
        });
        file_bytes(kept.collect(), None)
    }

    /// Grids that all matrices may share.
    pub fn uniform(&self) -> Vec<Uniform> {
        let mut all = Vec::new();
        let Some((first, rest)) = self.choices.split_first() else { return all };
        for choice in first {
            let row = choice.group == shape_of(self.sites[0]).1;
            let group = if row { Group::Row } else { Group::Size(choice.group) };
            let uniform = Uniform { bits: choice.bits, symmetric: choice.symmetric, group };
            let offered = |(site, choices): (&&Site, &Vec<Choice>)| {
                choices.contains(&uniform.of(shape_of(site).1))
            };
            if self.sites[1..].iter().zip(rest).all(offered) {
                all.push(uniform);
            }
        }
        all
    }

    /// What a uniform grid takes.
    pub fn uniform_cost(&self, uniform: Uniform, count: Count) -> u64 {
        let costs =
            self.sites.iter().map(|site| self.cost(site, uniform.of(shape_of(site).1), count));
        costs.sum::<u64>() + self.fixed(count)
    }

    /// The first matrix that compressed-tensors cannot hold, because it is stored transposed.
    pub fn transposed(&self) -> Option<&Site> {
        self.sites.iter().copied().find(|site| site.layout != Layout::OutIn)
    }
}

/// Group sizes of a matrix: the chain from `g_min`, or whole rows where `g_min` does not divide them.
fn groups(fit: &Fit, site: &Site) -> Result<Vec<usize>> {
    let inputs = shape_of(site).1;
    let smallest = if inputs.is_multiple_of(fit.g_min) { fit.g_min } else { inputs };
    let mut chain = nested(&site.name, inputs, smallest)?;
    if let Group::Size(largest) = fit.g_max {
        chain.retain(|size| *size <= largest);
    }
    if chain.is_empty() {
        let problem = format!(
            "its rows of {inputs} weights have no group size from {} to {}; take --g-max row or another --g-min",
            fit.g_min, fit.g_max
        );
        return Err(Error::tensor("fit", &site.name, problem));
    }
    Ok(chain)
}

/// Bytes of a tensor; of its entry in the header, too, at its longest, where files are counted.
fn bytes_of((name, shape, dtype): &(String, Vec<usize>, DType), count: Count) -> u64 {
    let data = dtype.bytes_of(shape).unwrap_or(0);
    match count {
        Count::Parts => data,
        Count::Files => {
            let entry = json!({ name: {
                "dtype": dtype.safetensors_name(), "shape": shape, "data_offsets": [LONG_OFFSET, LONG_OFFSET],
            }});
            // The braces around it make room for the comma.
            data + entry.to_string().len() as u64
        }
    }
}
