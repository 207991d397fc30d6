//! GGUF, the file format of llama.cpp (versions 2 and 3, little endian).

mod types;

pub use types::GgmlType;
