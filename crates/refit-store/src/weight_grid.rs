//! Grid detection for a whole model: do its weights already lie on few levels per group? Quantizing such a model
//! again at the same bits and group measures nothing.

use serde::Serialize;

use crate::artifact::Artifact;
use crate::census::Grid;
use crate::error::Result;

/// The grid of a model's linears.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WeightGrid {
    /// Bits per level index; `None` when no grid shows.
    pub bits: Option<u32>,
    /// Inputs per group; `None` with bits: whole rows.
    pub group: Option<usize>,
    /// The levels are equally spaced.
    pub uniform: bool,
    /// Matrices that were sampled.
    pub matrices: usize,
    /// How many of them lie on a grid.
    pub on_grid: usize,
    /// Stored type when it is itself a block-quantized one.
    pub stored: Option<String>,
}

/// Matrices sampled, spread over the depth.
const MATRICES: usize = 8;

/// Samples linears over the depth. All must lie on a grid; the finest is what is said.
///
/// # Errors
/// Files that cannot be read.
pub fn detect(artifact: &Artifact) -> Result<WeightGrid> {
    let linears: Vec<_> =
        artifact.architecture().linears().filter(|site| site.shape.len() == 2).collect();
    let step = linears.len().div_ceil(MATRICES).max(1);
    let names: Vec<&str> = linears.iter().step_by(step).map(|site| site.name.as_str()).collect();
    let found = names.iter().map(|name| artifact.grid(name)).collect::<Result<Vec<_>>>()?;
    let stored = found.iter().flatten().find_map(|grid| grid.stored.clone());
    let on_grid = found.iter().flatten().count();
    let none = WeightGrid { matrices: names.len(), on_grid, stored, ..WeightGrid::default() };
    let Some(grids) = found.into_iter().collect::<Option<Vec<_>>>() else { return Ok(none) };
    Ok(WeightGrid {
        bits: grids.iter().map(Grid::bits).max(),
        group: grids.iter().filter_map(|grid| grid.group).min(),
        uniform: grids.iter().all(|grid| grid.uniform),
        ..none
    })
}

impl WeightGrid {
    /// What to say to someone who is about to quantize the model or to compare with it; `None` for a model off every grid.
    pub fn warning(&self) -> Option<String> {
        match self.bits {
            Some(bits) => Some(format!(
                "its weights were quantized before ({bits} bits per {}): differences to them are not differences to the \
                 original, and quantizing at {bits} bits or more in such groups changes nothing",
                self.span()
            )),
            None if self.on_grid > 0 => Some(format!(
                "{} of {} sampled matrices were quantized before: their weights lie on a grid",
                self.on_grid, self.matrices
            )),
            None => None,
        }
    }

    /// Bits and what shares a grid, in words.
    pub fn span_in_words(&self) -> String {
        match (self.bits, &self.stored) {
            (Some(bits), _) => format!("{bits}-bit codes per {}", self.span()),
            (None, Some(stored)) => format!("stored as {stored}"),
            (None, None) => format!("{} of {} sampled matrices", self.on_grid, self.matrices),
        }
    }

    /// What shares a grid, in words.
    pub fn span(&self) -> String {
        self.group.map_or_else(|| "whole rows".to_owned(), |group| format!("{group} inputs"))
    }
}

impl std::fmt::Display for WeightGrid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.bits {
            Some(bits) => write!(
                f,
                "{bits}-bit {} per {}; quantizing at {bits} bits or more in such groups measures nothing",
                if self.uniform { "grid" } else { "codebook" },
                self.span()
            )?,
            None if self.on_grid > 0 => {
                write!(f, "in {} of {} sampled matrices", self.on_grid, self.matrices)?;
            }
            None => write!(f, "none found in {} sampled matrices", self.matrices)?,
        }
        match &self.stored {
            Some(stored) => write!(f, "; stored as {stored}"),
            None => Ok(()),
        }
    }
}
