//! The literature as code: one folder per family, one file per method, each with its parameters,
//! what it does, and its paper's claim as a runnable experiment.
//!
//! [`method`] is the seam that every method implements, [`registry`] the list of them all.

pub mod adapt;
pub mod advise;
pub mod blockwise;
pub mod calibrated;
pub mod emit;
pub mod error;
pub mod factorize;
pub mod inputs;
mod lab;
pub mod labelled;
pub mod linalg;
pub mod merge;
pub mod method;
pub mod prune;
pub mod quantize;
pub mod registry;
pub mod rewrite;
pub mod solver;
pub mod suggest;
pub mod survey;
pub mod svd;
#[cfg(test)]
pub mod testing;

pub use error::{Error, Result};
