//! GGUF, the file format of llama.cpp (versions 2 and 3, little endian).

mod dequantize;
mod header;
mod names;
mod quantize;
mod tokenizer;
mod translate;
mod types;
pub mod write;

use std::path::Path;

pub use dequantize::dequantize;
pub use header::{Header, Numbers, Strings, Tensor, Value, parse};
pub use quantize::{WRITABLE, exact, holds, quantize};
pub(crate) use tokenizer::{generation_config, tokenizer_config, tokenizer_json};
pub use types::GgmlType;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::storage::{Entry, Source};

/// Opens one file: parses its header, translates names and configuration.
pub(crate) fn open(path: &Path) -> Result<(Vec<Entry>, Config, Header)> {
    let source = Source::open(path)?;
    if source.len == 0 {
        return Err(source.truncated("the magic", 4));
    }
    let bytes = source.map().ok_or_else(|| {
        Error::io(path, "map", std::io::Error::other("the file system does not support it"))
    })?;
    let header = parse(path, bytes, source.len)?;
    let entries = translate::entries(&header, &source)?;
    let config = translate::config(&header, &source);
    Ok((entries, config, header))
}
