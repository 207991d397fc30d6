//! One way to write a model directory: declared first, filled in any order, resumable, renamed when
//! complete.

use crate::artifact::SideFile;
use crate::dtype::DType;

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the output.
    pub name: String,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
    /// Its element type (any that safetensors has).
    pub dtype: DType,
}

/// Everything that an output will hold, fixed before the first byte is written.
#[derive(Debug, Clone, Default)]
pub struct WritePlan {
    /// Tensors, in any order; they are stored sorted by name.
    pub tensors: Vec<TensorSpec>,
    /// Largest size of one file in bytes; more than that becomes shards with an index. `None`: one file.
    pub max_shard_bytes: Option<u64>,
    /// Files that go beside the weights untouched.
    pub side_files: Vec<SideFile>,
    /// Hash over inputs and parameters: only a run with the same identity resumes another's work.
    pub identity: String,
    /// Replace an output directory that exists.
    pub force: bool,
}
