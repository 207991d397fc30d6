//! What an export looks at: the tensors as they are stored, and the grids that they lie on. A model that a quantizer has not
//! written yet is seen through the grids that it would write, so that the export's own decisions say what its file would take.

use std::collections::BTreeMap;

use refit_store::TensorInfo;
use refit_store::lattice::Lattice;

use super::lattices::{self, Found};
use crate::error::Result;
use crate::inputs::ModelInput;
use crate::rewrite::OutputType;

/// Tensors and grids of a model.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Every tensor, with the type in which it is stored.
    pub tensors: Vec<TensorInfo>,
    /// Grids of the linears that lie on one, by tensor.
    pub grids: BTreeMap<String, Found>,
}

impl Seen {
    /// A model as it is.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub fn of(model: &ModelInput) -> Result<Self> {
        Ok(Self { grids: lattices::find(model)?, ..Self::without_grids(model) })
    }

    /// A model as it is, its grids not looked for.
    pub fn without_grids(model: &ModelInput) -> Self {
        Self { tensors: model.artifact.tensors().to_vec(), grids: BTreeMap::new() }
    }

    /// A model as it will be when a method has put these linears on these grids and written it as `dtype`. Codes are taken to
    /// use all of a grid without zero points; of one with zero points, which are rarely at its ends, all but the outermost code.
    pub fn after(
        model: &ModelInput,
        dtype: OutputType,
        grids: impl IntoIterator<Item = (String, Lattice)>,
    ) -> Self {
        let stored = |info: &TensorInfo| {
            let dtype = dtype.of(info.dtype);
            let nbytes = dtype.bytes_of(&info.shape).unwrap_or(info.nbytes);
            TensorInfo { dtype, nbytes, ..info.clone() }
        };
        let found = |lattice: Lattice| {
            let levels = 1i16 << lattice.bits;
            let range = match lattice.symmetric {
                true => (-levels / 2, levels / 2 - 1),
                false => (2 - levels, levels - 2),
            };
            Found { lattice, range }
        };
        Self {
            tensors: model.artifact.tensors().iter().map(stored).collect(),
            grids: grids.into_iter().map(|(name, lattice)| (name, found(lattice))).collect(),
        }
    }
}
