//! Evaluators, calibration, losses, optimizers and the claim harness.

pub mod calibrate;
pub mod claim;
pub mod differential;
pub mod error;
pub mod eval;
pub mod features;
pub mod heap;
pub mod logistic;
pub mod measure;
pub mod observe;
pub mod rng;
pub mod stats;
pub mod train;

pub use error::{BoxError, Error, Result};
