//! The training engine: one loop for every objective.
//!
//! | module | what |
//! |---|---|
//! | [`trainer`] | the loop: accumulate, clip, update, guard, checkpoint, resume |
//! | [`loss`] | weighted terms; cross-entropy and distillation that never hold all logits |
//! | [`scope`] | which parameters train, at which rate and decay, by pattern |
//! | [`optimizer`] | SGD, AdamW, Adafactor, Lion, GaLore, 8-bit states; state is keyed by tensor name |
//! | [`schedule`] | learning rates as pure functions of the step |
//! | [`order`] | the order of examples as a pure function of (seed, step) |
//! | [`ranks`] | the processes that train one model together |
//! | [`checkpoint`] | atomic files that hold everything a run needs to go on |
//!
//! An update runs on the host, on slices, one fused pass per tensor; on the CPU nothing is copied for it.

pub mod checkpoint;
pub mod error;
pub mod loss;
mod metrics;
pub mod optimizer;
pub mod order;
mod per_layer;
pub mod ranks;
mod recipe;
pub mod schedule;
pub mod scope;
pub mod trainer;
mod update;

pub use error::{Result, TrainError};
pub use loss::Terms;
pub use optimizer::{Optimizer, OptimizerConfig};
pub use order::Order;
pub use ranks::{Ranks, Share};
pub use recipe::{PATIENCE, Recipe};
pub use schedule::Schedule;
pub use scope::{Rule, Scope};
pub use trainer::{At, Hook, Objective, RunOptions, StepReport, Trainer};
