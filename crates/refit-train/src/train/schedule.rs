//! Learning rates as pure functions of the step: nothing to save, nothing that can drift on resume.

use serde::{Deserialize, Serialize};

use super::error::{Result, TrainError};

/// How a decay goes from 1 to its floor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    /// `1 - x`.
    Linear,
    /// `(1 + cos πx) / 2`.
    Cosine,
    /// `1 - √x` (Hägele et al. 2024).
    Sqrt,
}

impl Decay {
    fn at(self, x: f64) -> f64 {
        let x = x.clamp(0.0, 1.0);
        match self {
            Self::Linear => 1.0 - x,
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * x).cos()),
            Self::Sqrt => 1.0 - x.sqrt(),
        }
    }
}

/// A learning-rate schedule; [`Self::factor`] multiplies the peak rate. Warm-ups are in steps, floors are fractions of the peak.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Schedule {
    /// Warm up, then stay.
    Constant {
        /// Steps of warm-up.
        warmup: u64,
    },
    /// Warm up, then decay over the rest of the run.
    Decaying {
        /// Steps of warm-up.
        warmup: u64,
        /// Shape of the decay.
        decay: Decay,
        /// Lowest factor.
        floor: f64,
    },
    /// Warm up, then `√(warmup / step)` (Vaswani et al. 2017).
    InverseSqrt {
        /// Steps of warm-up.
        warmup: u64,
    },
    /// Warm-up, stable, decay (MiniCPM, Hu et al. 2024); with a period it restarts at the peak after every decay (WSD-S, Wen et
    /// al. 2024; re-warm and re-decay, Ibrahim et al. 2024, when `rewarm` is not 0).
    Wsd {
        /// Steps of the first warm-up.
        warmup: u64,
        /// Fraction of each period that decays.
        decay_fraction: f64,
        /// Shape of the decay.
        decay: Decay,
        /// Lowest factor.
        floor: f64,
        /// Steps of one period; the whole run when absent.
        period: Option<u64>,
        /// Steps of warm-up at the start of later periods.
        rewarm: u64,
    },
    /// Infinite schedule (Ibrahim et al. 2024): warm-up, cool-down to a constant rate, constant for as long as wanted,
    /// exponential anneal at the end.
    Infinite {
        /// Steps of warm-up.
        warmup: u64,
        /// Steps of the cosine cool-down that follows.
        cooldown: u64,
        /// Factor of the constant phase.
        constant: f64,
        /// First step of the anneal.
        anneal_from: u64,
        /// Factor at the end of the run.
        floor: f64,
    },
}

impl Schedule {
    /// Warm-up and cosine decay to `floor`: the usual choice.
    pub fn cosine(warmup: u64, floor: f64) -> Self {
        Self::Decaying { warmup, decay: Decay::Cosine, floor }
    }

    /// Warm-up and linear decay to `floor`.
    pub fn linear(warmup: u64, floor: f64) -> Self {
        Self::Decaying { warmup, decay: Decay::Linear, floor }
    }

    /// Checks the numbers against a run of `steps`.
    ///
    /// # Errors
    /// Floors and fractions outside `[0, 1]`, a period of 0, a warm-up longer than the run.
    pub fn check(&self, steps: u64) -> Result<()> {
        let fail = |setting, found: String, expected| {
            Err(TrainError::Setting { setting, found, expected })
        };
        let unit = |x: f64| (0.0..=1.0).contains(&x);
        let (warmup, fractions, period) = match *self {
            Self::Constant { warmup } | Self::InverseSqrt { warmup } => (warmup, vec![], None),
            Self::Decaying { warmup, floor, .. } => (warmup, vec![floor], None),
            Self::Wsd { warmup, decay_fraction, floor, period, .. } => {
                (warmup, vec![decay_fraction, floor], period)
            }
            Self::Infinite { warmup, constant, floor, .. } => (warmup, vec![constant, floor], None),
        };
        if let Some(bad) = fractions.into_iter().find(|&x| !unit(x)) {
            return fail("schedule", bad.to_string(), "floors and fractions lie between 0 and 1");
        }
        if period == Some(0) {
            return fail("schedule.period", "0".into(), "a period has at least one step");
        }
        if warmup > steps {
            return fail("schedule.warmup", warmup.to_string(), "no longer than the run");
        }
        Ok(())
    }

    /// The factor on the peak rate for step `step` (from 0) of a run of `steps`. The first step of a warm-up of `w` has
    /// factor `1 / w`.
    pub fn factor(&self, step: u64, steps: u64) -> f64 {
        let rise = |at: u64, warmup: u64| (at + 1) as f64 / warmup as f64;
        let share = |at: u64, of: u64| at as f64 / of.max(1) as f64;
        match *self {
            Self::Constant { warmup } if step < warmup => rise(step, warmup),
            Self::Constant { .. } => 1.0,
            Self::InverseSqrt { warmup } if step < warmup => rise(step, warmup),
            Self::InverseSqrt { warmup } => (warmup.max(1) as f64 / (step + 1) as f64).sqrt(),
            Self::Decaying { warmup, .. } if step < warmup => rise(step, warmup),
            Self::Decaying { warmup, decay, floor } => {
                let x = share(step - warmup, steps.saturating_sub(warmup));
                floor + (1.0 - floor) * decay.at(x)
            }
            Self::Wsd { warmup, decay_fraction, decay, floor, period, rewarm } => {
                let period = period.unwrap_or(steps).max(1);
                let (round, at) = (step / period, step % period);
                let warmup = if round == 0 { warmup } else { rewarm };
                let tail = (decay_fraction * period as f64).round() as u64;
                let stable = period - tail.min(period);
                if at < warmup {
                    // A later period rises from where the last one ended.
                    let from = if round == 0 { 0.0 } else { floor };
                    from + (1.0 - from) * rise(at, warmup)
                } else if at < stable {
                    1.0
                } else {
                    floor + (1.0 - floor) * decay.at(share(at - stable, tail))
                }
            }
            Self::Infinite { warmup, .. } if step < warmup => rise(step, warmup),
            Self::Infinite { warmup, cooldown, constant, anneal_from, floor } => {
                if step < anneal_from {
                    let x = if cooldown == 0 { 1.0 } else { share(step - warmup, cooldown) };
                    constant + (1.0 - constant) * Decay::Cosine.at(x)
                } else {
                    let x = share(step - anneal_from, steps.saturating_sub(anneal_from)).min(1.0);
                    // An exponential cannot reach 0: the floor is kept above it.
                    constant * (floor.max(1e-6) / constant.max(1e-6)).powf(x)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_warms_up_and_ends_at_its_floor() {
        let s = Schedule::cosine(10, 0.1);
        assert_eq!(s.factor(0, 110), 0.1);
        assert_eq!(s.factor(9, 110), 1.0);
        assert_eq!(s.factor(10, 110), 1.0);
        assert!((s.factor(60, 110) - 0.55).abs() < 1e-12);
        assert!((s.factor(110, 110) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn wsd_is_stable_until_the_tail_and_restarts() {
        let s = Schedule::Wsd {
            warmup: 5,
            decay_fraction: 0.2,
            decay: Decay::Linear,
            floor: 0.0,
            period: Some(50),
            rewarm: 2,
        };
        assert_eq!(s.factor(39, 100), 1.0);
        assert!((s.factor(45, 100) - 0.5).abs() < 1e-12);
        assert_eq!(s.factor(50, 100), 0.5);
        assert_eq!(s.factor(52, 100), 1.0);
        assert!((s.factor(95, 100) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn infinite_holds_its_constant_and_anneals() {
        let s = Schedule::Infinite {
            warmup: 10,
            cooldown: 40,
            constant: 0.5,
            anneal_from: 80,
            floor: 0.05,
        };
        assert_eq!(s.factor(10, 100), 1.0);
        assert!((s.factor(60, 100) - 0.5).abs() < 1e-12);
        assert!((s.factor(100, 100) - 0.05).abs() < 1e-12);
        let jump = (s.factor(80, 100) - s.factor(79, 100)).abs();
        assert!(jump < 1e-12, "the anneal starts where the constant phase ends, not {jump} away");
    }

    #[test]
    fn other_shapes_and_bad_numbers() {
        assert!((Schedule::InverseSqrt { warmup: 4 }.factor(15, 99) - 0.5).abs() < 1e-12);
        assert_eq!(Schedule::Constant { warmup: 0 }.factor(7, 9), 1.0);
        assert_eq!(Schedule::linear(0, 0.0).factor(5, 10), 0.5);
        assert!(Schedule::cosine(5, 1.5).check(10).is_err());
        assert!(Schedule::cosine(50, 0.0).check(10).is_err());
        let text = serde_json::to_string(&Schedule::cosine(3, 0.1)).unwrap();
        assert_eq!(serde_json::from_str::<Schedule>(&text).unwrap(), Schedule::cosine(3, 0.1));
    }
}
