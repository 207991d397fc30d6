//! What decides a run's result besides model and data.

use serde::{Deserialize, Serialize};

use super::error::{Result, TrainError};
use super::optimizer::OptimizerConfig;
use super::schedule::Schedule;
use super::scope::Scope;

/// Everything that decides a run's result besides model and data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Updates to make.
    pub steps: u64,
    /// Micro-batches whose gradients are averaged into one update.
    pub accumulate: usize,
    /// Seed of everything random.
    pub seed: u64,
    /// Peak learning rate.
    pub rate: f64,
    /// Weight decay of matrices; vectors (norms, biases) are decayed only where the scope says so.
    pub decay: f64,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// Learning rate over the run.
    pub schedule: Schedule,
    /// Which parameters train.
    pub scope: Scope,
    /// Largest norm of all gradients together.
    pub clip: Option<f64>,
    /// Decay of the exponential moving average of the parameters, if one is kept.
    pub average: Option<f64>,
    /// A loss above `divergence` times the best smoothed loss for [`PATIENCE`] steps stops the run.
    pub divergence: f64,
    /// Projects each target's gradient as soon as the backward pass has computed it, instead of keeping all gradients until the
    /// end: for optimizers that need no more than a low-rank form ([`OptimizerConfig::GaLore`]), on the CPU. Gives the same
    /// weights to the bit; excludes accumulation, clipping by the global norm and hooks.
    #[serde(default)]
    pub per_layer: bool,
}

/// Steps that a loss may stay above the limit of divergence.
pub const PATIENCE: u64 = 20;

impl Recipe {
    /// AdamW at `rate`, cosine schedule with 5 % warm-up, decay 0.01, clipping at 1.
    pub fn new(steps: u64, rate: f64) -> Self {
        Self {
            steps,
            accumulate: 1,
            seed: 0,
            rate,
            decay: 0.01,
            optimizer: OptimizerConfig::adamw(),
            schedule: Schedule::cosine(steps / 20, 0.0),
            scope: Scope::default(),
            clip: Some(1.0),
            average: None,
            divergence: 3.0,
            per_layer: false,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        let fail = |setting, found: String, expected| {
            Err(TrainError::Setting { setting, found, expected })
        };
        let positive = |x: f64| x > 0.0 && x.is_finite();
        if self.steps == 0 || self.accumulate == 0 {
            return fail("steps, accumulate", "0".into(), "at least 1");
        }
        if !(self.rate >= 0.0 && self.rate.is_finite()) {
            return fail("rate", self.rate.to_string(), "a learning rate of at least 0");
        }
        if !(self.decay >= 0.0 && self.decay.is_finite()) {
            return fail("decay", self.decay.to_string(), "a weight decay of at least 0");
        }
        if self.clip.is_some_and(|c| !positive(c)) {
            return fail("clip", format!("{:?}", self.clip), "a norm above 0, or none");
        }
        if self.average.is_some_and(|a| !(0.0..1.0).contains(&a)) {
            return fail("average", format!("{:?}", self.average), "at least 0 and below 1");
        }
        if self.divergence.is_nan() || self.divergence <= 1.0 {
            return fail("divergence", self.divergence.to_string(), "a factor above 1");
        }
        if self.per_layer && self.accumulate > 1 {
            return fail(
                "accumulate",
                self.accumulate.to_string(),
                "1 with per_layer: gradients that are consumed at once cannot be added up",
            );
        }
        if self.per_layer && self.clip.is_some() {
            return fail(
                "clip",
                format!("{:?}", self.clip),
                "none with per_layer: the norm of all gradients is known only when they are gone",
            );
        }
        self.schedule.check(self.steps)
    }
}
