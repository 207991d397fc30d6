//! Artifacts: models on disk, opened by reading headers only.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::dtype::DType;
use crate::error::{Error, Result};

/// File format of an artifact's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// `.safetensors`, single or sharded.
    Safetensors,
    /// `.gguf`.
    Gguf,
    /// `.pth`, `.pt`, `.bin`: a pickle of tensors.
    Torch,
}

/// What is known of a tensor without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, as Hugging Face spells it.
    pub name: String,
    /// Shape, row-major, outermost dimension first.
    pub shape: Vec<usize>,
    /// Stored element type.
    pub dtype: DType,
    /// Stored size in bytes.
    pub nbytes: u64,
}

impl TensorInfo {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A file that travels with the weights untouched: `config.json`, `tokenizer.json`, ...
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SideFile {
    /// Path below the model directory, with `/`.
    pub name: String,
    /// Where its bytes come from.
    pub content: SideContent,
}

/// Where the bytes of a side file come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SideContent {
    /// A file on disk.
    File(PathBuf),
    /// Bytes made by refit (rebuilt from GGUF, or edited).
    Bytes(Arc<[u8]>),
}

impl SideFile {
    /// A side file with these bytes.
    pub fn from_bytes(name: impl Into<String>, bytes: impl Into<Arc<[u8]>>) -> Self {
        Self { name: name.into(), content: SideContent::Bytes(bytes.into()) }
    }

    /// A side file that is copied from `path`.
    pub fn from_path(name: impl Into<String>, path: impl AsRef<Path>) -> Self {
        Self { name: name.into(), content: SideContent::File(path.as_ref().to_owned()) }
    }

    /// Its bytes.
    pub fn read(&self) -> Result<Vec<u8>> {
        match &self.content {
            SideContent::Bytes(bytes) => Ok(bytes.to_vec()),
            SideContent::File(path) => {
                std::fs::read(path).map_err(|error| Error::io(path, "read", error))
            }
        }
    }
}
