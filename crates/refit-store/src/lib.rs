//! Artifacts on disk: formats, architectures, sources, lineage, cards, scan.
//!
//! [`Artifact::open`] reads headers only; tensors are read when asked for, by position, so that no
//! page of a large file stays in memory. [`writer`] is the one way to write a model.

pub mod adapter;
pub mod architecture;
pub mod artifact;
pub mod card;
pub mod census;
pub mod codes;
pub mod config;
pub mod convert;
pub mod dtype;
pub mod error;
pub mod formats;
pub mod hash;
pub mod lattice;
mod layout;
pub mod lineage;
pub mod scan;
pub mod source;
mod storage;
pub mod weight_grid;
pub mod writer;
pub mod yaml;

pub use adapter::Adapter;
pub use architecture::Architecture;
pub use artifact::{Artifact, FileHash, Format, SideContent, SideFile, TensorInfo};
pub use card::Card;
pub use census::{Finding, Grid, TypeCount};
pub use config::Config;
pub use dtype::{DType, GgmlType};
pub use error::{Error, Result, ShardFault, TensorFault};
pub use lineage::Lineage;
pub use weight_grid::WeightGrid;
pub use writer::{ArtifactWriter, TensorSpec, WritePlan};

#[cfg(test)]
mod testing {
    /// So many cases of a property, or as many as `PROPTEST_CASES` asks for.
    pub fn cases(usual: u32) -> proptest::test_runner::Config {
        let asked = std::env::var_os("PROPTEST_CASES").is_some();
        let usual = proptest::test_runner::Config::with_cases(usual);
        if asked { proptest::test_runner::Config::default() } else { usual }
    }
}
