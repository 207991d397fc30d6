//! One module per file format; each turns a file into tensor entries and nothing more.

pub mod factored;
pub mod gguf;
pub mod packed;
pub mod safetensors;
pub mod torch;
