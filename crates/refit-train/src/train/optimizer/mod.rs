//! Optimizers on slices, one tensor at a time; the state of a tensor is opaque, serialisable, and keyed by the tensor's name.

mod adafactor;
mod adamw;
pub mod eightbit;
mod galore;
mod lion;
mod sgd;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::error::{Result, TrainError};
pub use galore::{Refresh, Side};

/// Elements that one task updates.
pub(super) const CHUNK: usize = 1 << 15;

/// One tensor's turn.
#[derive(Debug)]
pub struct Update<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// The tensor's values.
    pub value: &'a mut [f32],
    /// Its gradient, clipped.
    pub grad: &'a [f32],
    /// Its shape.
    pub shape: &'a [usize],
    /// Learning rate of this step.
    pub rate: f32,
    /// Weight decay of this tensor.
    pub decay: f32,
}

/// A piece of optimizer state.
#[derive(Debug, Clone, PartialEq)]
pub enum Slot {
    /// Floats.
    F32(Vec<f32>),
    /// Codes.
    U8(Vec<u8>),
}

/// The state of one tensor.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct State {
    /// Updates made.
    pub step: u64,
    /// Named pieces.
    pub slots: BTreeMap<String, Slot>,
}

impl State {
    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        let of = |slot: &Slot| match slot {
            Slot::F32(v) => 4 * v.len(),
            Slot::U8(v) => v.len(),
        };
        self.slots.values().map(of).sum()
    }

    /// The float slot `name` of `len` elements, zero at first; taken out while it is changed.
    pub fn take(&mut self, name: &str, len: usize) -> Vec<f32> {
        match self.slots.remove(name) {
            Some(Slot::F32(values)) if values.len() == len => values,
            _ => vec![0.0; len],
        }
    }

    /// Puts a float slot back.
    pub fn put(&mut self, name: &str, values: Vec<f32>) {
        self.slots.insert(name.to_owned(), Slot::F32(values));
    }
}

/// A rule that turns gradients into updates. Everything that it must remember of a tensor lies in that tensor's [`State`], so
/// wrappers (projections, low-bit states) nest.
pub trait Optimizer: Send + Sync + std::fmt::Debug {
    /// Changes `update.value` in place.
    fn update(&self, update: Update, state: &mut State);

    /// Does a low-rank form of this tensor's gradient suffice? Then [`Self::project`] and [`Self::update_projected`] together
    /// are [`Self::update`], and the gradient may be dropped between them.
    fn projects(&self, _name: &str, _shape: &[usize]) -> bool {
        false
    }

    /// What [`Self::update_projected`] needs of a gradient; `None` where [`Self::projects`] says no. Changes no state, so a
    /// step may still be given up.
    fn project(&self, _: &str, _: &[usize], _grad: &[f32], _: &State) -> Option<Projected> {
        None
    }

    /// As [`Self::update`], from the gradient's low-rank form; `update.grad` is not read.
    fn update_projected(&self, _update: Update, _projected: Projected, _state: &mut State) {}
}

/// The low-rank form of a gradient.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Projected {
    /// The gradient in the basis.
    pub low: Vec<f32>,
    /// A new basis, under the names of its slots, when this step changes it.
    pub basis: BTreeMap<String, Vec<f32>>,
}

impl Projected {
    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        4 * (self.low.len() + self.basis.values().map(Vec::len).sum::<usize>())
    }
}

/// Which optimizer, with its numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum OptimizerConfig {
    /// Stochastic gradient descent; decay is coupled (added to the gradient), as in PyTorch.
    Sgd {
        /// Momentum.
        momentum: f32,
        /// Nesterov's form of it.
        nesterov: bool,
    },
    /// Adam with decoupled decay (Loshchilov and Hutter 2019).
    AdamW {
        /// Decay rates of the moments.
        betas: (f32, f32),
        /// Added to the root of the second moment.
        eps: f32,
        /// Moments in 8 bits by blocks (Dettmers et al. 2022); tensors below 4096 elements stay in f32.
        eight_bit: bool,
    },
    /// Adafactor (Shazeer and Stern 2018) with a given rate: second moments of matrices as row and column means, no momentum.
    Adafactor {
        /// Exponent of the second moment's decay, `1 - t^-exponent`.
        exponent: f32,
        /// Largest root mean square of an update.
        clip: f32,
        /// The rate is relative to the root mean square of the tensor.
        relative: bool,
    },
    /// Lion (Chen et al. 2023): the sign of an interpolated momentum, decoupled decay.
    Lion {
        /// Interpolation for the update, and decay of the momentum.
        betas: (f32, f32),
    },
    /// GaLore (Zhao et al. 2024): Adam whose moments live in a low-rank projection of each target's gradient; every other
    /// tensor gets plain AdamW with the same numbers.
    #[serde(rename = "galore")]
    GaLore {
        /// Rank of the projection; above a target's smaller extent it is that extent.
        rank: usize,
        /// Updates between two bases.
        gap: u64,
        /// Factor on the projected-back update.
        scale: f32,
        /// Which side of the gradient is projected.
        side: Side,
        /// Decay rates of the moments.
        betas: (f32, f32),
        /// Added to the root of the second moment.
        eps: f32,
        /// Moments in 8 bits by blocks; those below 4096 elements stay in f32.
        eight_bit: bool,
        /// What becomes of the moments when the basis changes.
        on_refresh: Refresh,
        /// Spreads the changes of basis over the gap, layer by layer, instead of changing all at once.
        stagger: bool,
        /// Globs on names; the matrices among the matches are the targets.
        targets: Vec<String>,
    },
}

impl OptimizerConfig {
    /// AdamW with betas 0.9 and 0.999.
    pub fn adamw() -> Self {
        Self::AdamW { betas: (0.9, 0.999), eps: 1e-8, eight_bit: false }
    }

    /// GaLore of rank `rank` with the reference's settings for pretraining: a new basis every 200 updates, scale 0.25, the
    /// smaller side, moments kept as they are. The targets are the reference's guess from names, with `attention` spelt out
    /// besides; whoever knows the architecture names the matrices instead.
    pub fn galore(rank: usize) -> Self {
        Self::GaLore {
            rank,
            gap: 200,
            scale: 0.25,
            side: Side::Std,
            betas: (0.9, 0.999),
            eps: 1e-6,
            eight_bit: false,
            on_refresh: Refresh::Keep,
            stagger: false,
            targets: vec!["*attn*".into(), "*attention*".into(), "*mlp*".into()],
        }
    }

    /// Builds it.
    ///
    /// # Errors
    /// Decay rates outside `[0, 1)`; epsilons, clips, ranks, gaps and scales that are not positive; no targets.
    pub fn build(&self) -> Result<Box<dyn Optimizer>> {
        let unit = |setting, x: f32| match (0.0..1.0).contains(&x) {
            true => Ok(()),
            false => Err(TrainError::Setting {
                setting,
                found: x.to_string(),
                expected: "at least 0 and below 1",
            }),
        };
        let positive = |setting, x: f32| match x > 0.0 && x.is_finite() {
            true => Ok(()),
            false => Err(TrainError::Setting {
                setting,
                found: x.to_string(),
                expected: "a number above 0",
            }),
        };
        Ok(match self {
            &Self::Sgd { momentum, nesterov } => {
                unit("momentum", momentum)?;
                Box::new(sgd::Sgd { momentum, nesterov })
            }
            &Self::AdamW { betas, eps, eight_bit } => {
                unit("betas.0", betas.0)?;
                unit("betas.1", betas.1)?;
                positive("eps", eps)?;
                Box::new(adamw::AdamW { betas, eps, eight_bit, early_eps: false })
            }
            &Self::Adafactor { exponent, clip, relative } => {
                positive("exponent", exponent)?;
                positive("clip", clip)?;
                Box::new(adafactor::Adafactor { exponent, clip, relative })
            }
            &Self::Lion { betas } => {
                unit("betas.0", betas.0)?;
                unit("betas.1", betas.1)?;
                Box::new(lion::Lion { betas })
            }
            Self::GaLore {
                rank,
                gap,
                scale,
                side,
                betas,
                eps,
                eight_bit,
                on_refresh,
                stagger,
                targets,
            } => {
                unit("betas.0", betas.0)?;
                unit("betas.1", betas.1)?;
                positive("eps", *eps)?;
                positive("scale", *scale)?;
                let fail = |setting, found: &str, expected| {
                    Err(TrainError::Setting { setting, found: found.into(), expected })
                };
                if *rank == 0 {
                    return fail("rank", "0", "at least 1");
                }
                if *gap == 0 {
                    return fail("gap", "0", "at least 1 update between two bases");
                }
                if targets.is_empty() {
                    return fail("targets", "[]", "at least one pattern, such as `*mlp*`");
                }
                let (betas, eps, eight_bit) = (*betas, *eps, *eight_bit);
                let adam = |early_eps| adamw::AdamW { betas, eps, eight_bit, early_eps };
                Box::new(galore::GaLore {
                    rank: *rank,
                    gap: *gap,
                    scale: *scale,
                    side: *side,
                    on_refresh: *on_refresh,
                    stagger: *stagger,
                    targets: targets.clone(),
                    inner: adam(true),
                    rest: adam(false),
                    clamped: Default::default(),
                })
            }
        })
    }
}

#[cfg(test)]
mod tests;
