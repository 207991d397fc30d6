//! Evaluators, calibration, losses, optimizers and the claim harness.

pub mod measure;
pub mod observe;
pub mod rng;
pub mod stats;
