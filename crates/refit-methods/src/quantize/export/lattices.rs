//! Which matrices of a model lie on a grid, and on which.

use std::collections::BTreeMap;

use rayon::prelude::*;
use refit_store::DType;
use refit_store::architecture::{Layout, Site};
use refit_store::lattice::Lattice;

use crate::error::Result;
use crate::inputs::ModelInput;
use crate::quantize::record::{self, QuantizedTensor};

/// Weights that are looked at at a time, rounded to whole groups.
const PIECE: usize = 1 << 20;

/// A grid and the codes that are used of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The grid.
    pub lattice: Lattice,
    /// Lowest and highest code.
    pub range: (i16, i16),
}

/// The grid of every linear of the model's blocks that lies on one: as refit recorded it, as the source stores it, or
/// as its values show. Each is confirmed by finding the codes of all weights.
///
/// # Errors
/// Files that cannot be read.
pub fn find(model: &ModelInput) -> Result<BTreeMap<String, Found>> {
    let recorded = record::read(model);
    let sites: Vec<&Site> = model.artifact.architecture().linears().collect();
    let found: Vec<Option<(String, Found)>> = sites
        .par_iter()
        .with_max_len(1)
        .map(|site| {
            for lattice in candidates(model, site, &recorded)? {
                if let Some(range) = confirm(model, &site.name, lattice)? {
                    return Ok(Some((site.name.clone(), Found { lattice, range })));
                }
            }
            Ok(None)
        })
        .collect::<Result<_>>()?;
    Ok(found.into_iter().flatten().collect())
}

/// Grids that a matrix may lie on, most trusted first.
fn candidates(
    model: &ModelInput,
    site: &Site,
    recorded: &BTreeMap<String, QuantizedTensor>,
) -> Result<Vec<Lattice>> {
    let Some((_, inputs)) = site.out_in().filter(|_| site.layout == Layout::OutIn) else {
        return Ok(Vec::new());
    };
    let mut candidates = Vec::new();
    if let Some(entry) = recorded.get(&site.name) {
        let QuantizedTensor { bits, symmetric, group, .. } = *entry;
        candidates.push(Lattice { bits, symmetric, group });
    }
    candidates.extend(model.artifact.stored_lattice(&site.name)?);
    if candidates.is_empty()
        && let Some(grid) = model.artifact.grid(&site.name)?
        && grid.uniform
    {
        let group = grid.group.unwrap_or(inputs);
        // A symmetric quantizer may leave its outermost level unused.
        let bits = (grid.bits() as u8).clamp(2, 8);
        for (bits, symmetric) in [(bits, true), (bits, false), (bits + 1, true)] {
            candidates.push(Lattice { bits, symmetric, group });
        }
    }
    let sane = |lattice: &Lattice| {
        (2..=8).contains(&lattice.bits) && lattice.group > 0 && inputs.is_multiple_of(lattice.group)
    };
    candidates.retain(sane);
    Ok(candidates)
}

/// The type whose rounding the values of a tensor went through: blocks and packed codes decode to exact products.
pub fn rounding(dtype: DType) -> DType {
    match dtype {
        DType::Ggml(_) => DType::F32,
        plain => plain,
    }
}

/// Finds the codes of a whole matrix; `None` if a group is not on the grid.
fn confirm(model: &ModelInput, name: &str, lattice: Lattice) -> Result<Option<(i16, i16)>> {
    let info = model.artifact.tensor(name)?;
    let (numel, dtype) = (info.numel(), rounding(info.dtype));
    let piece = (PIECE / lattice.group).max(1) * lattice.group;
    let mut buffer = vec![0.0; piece.min(numel)];
    let mut range = (0, 0);
    for start in (0..numel).step_by(piece) {
        let values = &mut buffer[..piece.min(numel - start)];
        model.artifact.read_f32_into(name, start, values)?;
        let Ok(found) = lattice.find(values, dtype) else { return Ok(None) };
        let least = found.codes.iter().copied().min().unwrap_or(0);
        let most = found.codes.iter().copied().max().unwrap_or(0);
        range = (range.0.min(least), range.1.max(most));
    }
    Ok(Some(range))
}
