//! Changed weights of a quantized model, put back on its grid: same bits, same groups, new steps where they fit better.

use std::collections::BTreeMap;

use refit_store::architecture::{Layout, Site};
use refit_store::lattice::Lattice;
use refit_store::{DType, SideFile};
use serde_json::Value;

use super::activations;
use super::grid::{Grid, ScaleRule, Scheme, Step};
use super::record::{self, QuantizedTensor, Record};
use crate::error::Result;
use crate::inputs::ModelInput;

/// The grids of a model's matrices, as refit recorded them or as a packed file states them. Grids that only the values
/// show are not looked for: a model that was never called quantized stays a float model.
#[derive(Debug)]
pub struct Grids {
    known: BTreeMap<String, (u64, QuantizedTensor)>,
    changed: Record,
}

impl Grids {
    /// What is known of a model.
    ///
    /// # Errors
    /// Packed tensors that cannot be read.
    pub fn of(model: &ModelInput) -> Result<Self> {
        let recorded = record::read(model);
        let mut known = BTreeMap::new();
        for site in model.artifact.architecture().linears() {
            let Some((rows, inputs)) = site.out_in().filter(|_| site.layout == Layout::OutIn)
            else {
                continue;
            };
            let stated = match recorded.get(&site.name) {
                Some(entry) => Some(*entry),
                None => model.artifact.stored_lattice(&site.name)?.map(
                    |Lattice { bits, symmetric, group }| {
                        stated(bits, symmetric, group, rows, inputs)
                    },
                ),
            };
            if let Some(entry) = stated
                && (2..=8).contains(&entry.bits)
                && entry.group > 0
                && inputs.is_multiple_of(entry.group)
            {
                known.insert(site.name.clone(), (site.numel() as u64, entry));
            }
        }
        Ok(Self { known, changed: Record::default() })
    }

    /// Nothing is known, or nothing shall be kept.
    pub fn none() -> Self {
        Self { known: BTreeMap::new(), changed: Record::default() }
    }

    /// How many of these sites have a grid.
    pub fn count(&self, sites: &[&Site]) -> usize {
        sites.iter().filter(|site| self.known.contains_key(&site.name)).count()
    }

    /// Puts `after` `[out, in]` on the grid that `before`, stored as `dtype`, lies on, and records it. Groups that did not
    /// change stay as they are. Says whether it did: a matrix without a grid, or off the one stated, stays as it is.
    pub fn snap(&self, site: &Site, dtype: DType, before: &[f32], after: &mut [f32]) -> bool {
        let Some((_, entry)) = self.known.get(&site.name) else { return false };
        let QuantizedTensor { bits, symmetric, group, .. } = *entry;
        let Ok(found) = (Lattice { bits, symmetric, group }).find(before, dtype) else {
            return false;
        };
        let grid = grid_of(bits, symmetric);
        let wanted = after.to_vec();
        let groups = before.chunks_exact(group).zip(after.chunks_exact_mut(group));
        for ((before, after), (step, codes)) in
            groups.zip(found.steps.iter().zip(found.codes.chunks_exact(group)))
        {
            if before == after {
                continue;
            }
            // The step that it had keeps small changes from moving everything else.
            let lowest = codes.iter().copied().min().unwrap_or(0).min(0);
            let zero = if symmetric { 0.0 } else { -f32::from(lowest) };
            let had = Step { scale: *step, zero };
            let fitted = grid.fit(after);
            let best = match grid.error(after, had) <= grid.error(after, fitted) {
                true => had,
                false => fitted,
            };
            after.iter_mut().for_each(|weight| *weight = grid.snap(*weight, best));
        }
        let inputs = site.out_in().map_or(group, |(_, inputs)| inputs);
        self.changed.add(&site.name, &grid, inputs, group, &wanted, after);
        true
    }

    /// The record of the whole model and its summary; none where no matrix was put on a grid.
    ///
    /// # Errors
    /// None in practice: plain data always serializes.
    pub fn finish(
        &self,
        model: &ModelInput,
        left: &[&str],
    ) -> Result<Option<(Vec<SideFile>, Value)>> {
        if self.known.is_empty() {
            return Ok(None);
        }
        let record = self.changed.take();
        for (name, (weights, entry)) in &self.known {
            if !record.contains(name) && !left.contains(&name.as_str()) {
                record.put(name, *weights, *entry);
            }
        }
        record.with_activations(&activations::stated(&model.artifact)?).finish(model).map(Some)
    }
}

fn grid_of(bits: u8, symmetric: bool) -> Grid {
    Grid { bits, symmetric, rule: ScaleRule::Best, scheme: Scheme::Linear }
}

/// The entry of a matrix that a packed file describes: nothing is lost, as far as that file can tell.
fn stated(bits: u8, symmetric: bool, group: usize, rows: usize, inputs: usize) -> QuantizedTensor {
    let grid = grid_of(bits, symmetric);
    QuantizedTensor {
        bits,
        symmetric,
        group,
        bits_per_weight: grid.bits_per_weight(group),
        packed_bytes: grid.packed_bytes(rows, inputs, group),
        relative_error: 0.0,
    }
}
