//! Artifacts on disk: formats, architectures, sources, lineage, cards, scan.
//!
//! `Artifact::open` reads headers only; tensors are read when asked for, by position, so that no
//! page of a large file stays in memory. [`writer`] is the one way to write a model.

pub mod architecture;
pub mod artifact;
pub mod config;
pub mod dtype;
pub mod error;
pub mod formats;
pub mod writer;

pub use artifact::{Format, SideContent, SideFile, TensorInfo};
pub use config::Config;
pub use dtype::{DType, GgmlType};
pub use error::{Error, Result, ShardFault, TensorFault};
pub use writer::{TensorSpec, WritePlan};
