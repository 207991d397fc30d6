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
    keep: bool,
    changed: Record,
}

impl Grids {
    /// What is known of a model; unless `keep`, nothing goes back, and what changes is known no more.
    ///
    /// # Errors
    /// Packed tensors that cannot be read.
    pub fn of(model: &ModelInput, keep: bool) -> Result<Self> {
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
                    // As far as a packed file can tell, nothing is lost.
                    |Lattice { bits, symmetric, group }| {
                        QuantizedTensor::of(&grid_of(bits, symmetric), rows, inputs, group)
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
        Ok(Self { known, keep, changed: Record::default() })
    }

    /// How many of these sites have a grid to go back to.
    pub fn count(&self, sites: &[&Site]) -> usize {
        sites
            .iter()
            .filter(|_| self.keep)
            .filter(|site| self.known.contains_key(&site.name))
            .count()
    }

    /// Puts `after` `[out, in]` on the grid that `before`, stored as `dtype`, lies on, and records it. Groups that did not
    /// change stay as they are. Says whether it did: a matrix without a grid, or off the one stated, stays as it is.
    pub fn snap(&self, site: &Site, dtype: DType, before: &[f32], after: &mut [f32]) -> bool {
        let Some((_, entry)) = self.known.get(&site.name).filter(|_| self.keep) else {
            return false;
        };
        let QuantizedTensor { bits, symmetric, group, .. } = *entry;
        let wanted = after.to_vec();
        if !snap(Lattice { bits, symmetric, group }, dtype, before, after) {
            return false;
        }
        let inputs = site.out_in().map_or(group, |(_, inputs)| inputs);
        self.changed.add(&site.name, &grid_of(bits, symmetric), inputs, group, &wanted, after);
        true
    }

    /// The record of the whole model, without the matrices that were `left` as floats, and its summary; none where the model was
    /// not quantized.
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

/// The groups of `after` that differ from those of `before`, on the grid of the latter: `false`, and nothing changes, where
/// that is on none.
fn snap(lattice: Lattice, dtype: DType, before: &[f32], after: &mut [f32]) -> bool {
    let Ok(found) = lattice.find(before, dtype) else { return false };
    let grid = grid_of(lattice.bits, lattice.symmetric);
    let groups = before.chunks_exact(lattice.group).zip(after.chunks_exact_mut(lattice.group));
    let steps = found.steps.iter().zip(found.codes.chunks_exact(lattice.group));
    for ((before, after), (step, codes)) in groups.zip(steps) {
        if before == after {
            continue;
        }
        // The step that it had keeps small changes from moving everything else.
        let lowest = codes.iter().copied().min().unwrap_or(0).min(0);
        let zero = if lattice.symmetric { 0.0 } else { -f32::from(lowest) };
        let had = Step { scale: *step, zero };
        let fitted = grid.fit(after);
        let best = match grid.error(after, had) <= grid.error(after, fitted) {
            true => had,
            false => fitted,
        };
        after.iter_mut().for_each(|weight| *weight = grid.snap(*weight, best));
    }
    true
}

fn grid_of(bits: u8, symmetric: bool) -> Grid {
    Grid { bits, symmetric, rule: ScaleRule::Best, scheme: Scheme::Linear }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Stream;

    /// Weights as a quantizer leaves them, those weights changed a little, and the grid.
    fn example(bits: u8, symmetric: bool, by: f32) -> (Vec<f32>, Vec<f32>, Lattice) {
        let mut stream = Stream::new(u64::from(bits) + 10);
        // Not centred on zero, so that zero points matter.
        let mut before: Vec<f32> = stream.normals(32 * 24).iter().map(|w| w + 0.7).collect();
        grid_of(bits, symmetric).snap_row(&mut before, 32);
        let after = before.iter().map(|w| w + by * stream.normal()).collect();
        (before, after, Lattice { bits, symmetric, group: 32 })
    }

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    #[test]
    fn changes_go_back_on_the_grid_no_worse_than_a_new_quantization() {
        for (bits, symmetric) in
            [(2, true), (3, true), (4, true), (3, false), (4, false), (8, false)]
        {
            let (before, wanted, lattice) = example(bits, symmetric, 0.2);
            let mut after = wanted.clone();
            assert!(snap(lattice, DType::F32, &before, &mut after));
            assert!(lattice.find(&after, DType::F32).is_ok(), "{lattice:?}");
            let mut anew = wanted.clone();
            grid_of(bits, symmetric).snap_row(&mut anew, 32);
            let (found, plain) = (distance(&after, &wanted), distance(&anew, &wanted));
            assert!(found <= plain * (1.0 + 1e-9), "{lattice:?}: {found} {plain}");
        }
    }

    #[test]
    fn what_did_not_change_stays_to_the_bit_and_faint_changes_vanish() {
        for symmetric in [true, false] {
            let (before, mut after, lattice) = example(4, symmetric, 0.3);
            after[..32 * 12].copy_from_slice(&before[..32 * 12]);
            assert!(snap(lattice, DType::F32, &before, &mut after));
            assert_eq!(after[..32 * 12], before[..32 * 12]);
            assert_ne!(after[32 * 12..], before[32 * 12..]);
            let (before, mut faint, lattice) = example(4, symmetric, 1e-5);
            assert!(snap(lattice, DType::F32, &before, &mut faint));
            assert_eq!(faint, before);
        }
    }

    #[test]
    fn weights_that_are_on_no_grid_stay_as_they_are() {
        let (mut before, wanted, lattice) = example(4, true, 0.2);
        before[40] += 0.01;
        let mut after = wanted.clone();
        assert!(!snap(lattice, DType::F32, &before, &mut after));
        assert_eq!(after, wanted);
    }
}
