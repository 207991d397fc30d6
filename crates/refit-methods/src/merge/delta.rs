//! What the task-vector methods share: `base + lambda sum_k w_k s(theta_k - base)`, with a sparsifier `s` and, for the
//! TIES kind, an election of signs.
//!
//! ```text
//! d_k = w_k s(theta_k - base)                       s: what a method keeps of a change
//! without election:  d = sum_k d_k                  / sum_k w_k                          if normalised
//! with election:     g = sign(sum_k d_k), 0 as +
//!                    d = sum over sign(d_k) = g     / sum of w_k over the same           if normalised
//! theta = base + lambda d
//! ```

use std::fmt::Debug;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::merge::group::{Group, Piece};
use crate::merge::kernel::{Kernel, Map, finite, per_model, within};

/// What becomes of the values that a sparsifier keeps.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Rescale {
    /// They stay.
    #[default]
    None,
    /// Divided by the probability with which they were kept, so that the expected change is the change.
    Unbiased,
    /// Scaled until their absolute sum over the tensor is what it was before, as mergekit does.
    L1,
}

/// Sets what is not kept of model `k`'s changes to zero.
pub type Mask<'k> = Box<dyn Fn(&Piece, usize, &mut [f64]) + Send + Sync + 'k>;

/// What a method keeps of a change.
pub trait Sparsify: Debug + Send + Sync {
    /// As [`Kernel::looks`].
    fn looks(&self) -> bool {
        true
    }

    /// Looks at the tensor and says what is dropped.
    ///
    /// # Errors
    /// As [`Kernel::prepare`].
    fn prepare<'k>(&'k self, group: &Group) -> Result<Mask<'k>>;
}

/// Everything is kept.
#[derive(Debug)]
pub struct Keep;

impl Sparsify for Keep {
    fn looks(&self) -> bool {
        false
    }

    fn prepare<'k>(&'k self, _: &Group) -> Result<Mask<'k>> {
        Ok(Box::new(|_, _, _| {}))
    }
}

/// How changes are put together.
#[derive(Debug)]
pub struct Blend {
    /// Factor of every model's change.
    pub weight: Vec<f64>,
    /// What is kept of a change.
    pub sparsify: Box<dyn Sparsify>,
    /// Models must agree on a sign.
    pub elect: bool,
    /// Divide by the weights that took part.
    pub normalize: bool,
    /// Factor of the whole change.
    pub lambda: f64,
    /// Restore the absolute sum of every change.
    pub restore_l1: bool,
}

/// What every method of the family has.
pub struct Common<'a> {
    /// Name of the method, for errors.
    pub method: &'static str,
    /// One weight per model.
    pub weight: &'a [f64],
    /// Divide by the weights that took part.
    pub normalize: bool,
    /// Factor of the whole change.
    pub lambda: f64,
    /// Models must agree on a sign.
    pub elect: bool,
    /// What becomes of the values that are kept.
    pub rescale: Rescale,
}

impl Common<'_> {
    /// The kernel, with a sparsifier.
    ///
    /// # Errors
    /// Weights that are no numbers or too many.
    pub fn kernel(
        self,
        count: usize,
        sparsify: impl Sparsify + 'static,
    ) -> Result<Arc<dyn Kernel>> {
        finite(self.method, "lambda", self.lambda)?;
        Ok(Arc::new(Blend {
            weight: per_model(self.method, "weight", self.weight, count, 1.0)?,
            sparsify: Box::new(sparsify),
            elect: self.elect,
            normalize: self.normalize,
            lambda: self.lambda,
            restore_l1: self.rescale == Rescale::L1,
        }))
    }

    /// One density per model, checked.
    ///
    /// # Errors
    /// Densities outside 0 to 1, or too many.
    pub fn densities(&self, given: &[f64], count: usize) -> Result<Vec<f64>> {
        let all = per_model(self.method, "density", given, count, 1.0)?;
        within(self.method, "density", &all, (0.0, 1.0))?;
        Ok(all)
    }
}

impl Kernel for Blend {
    fn looks(&self) -> bool {
        self.restore_l1 || self.sparsify.looks()
    }

    fn prepare<'k>(&'k self, group: &Group) -> Result<Map<'k>> {
        let sparse = self.sparsify.prepare(group)?;
        let count = self.weight.len();
        let mut scale = self.weight.clone();
        if self.restore_l1 {
            let sums = group.scan(|piece| -> Vec<[f64; 2]> {
                let absolute = |d: &[f64]| d.iter().map(|x| x.abs()).sum::<f64>();
                let both = |k| {
                    let mut d = piece.delta(k);
                    let before = absolute(&d);
                    sparse(piece, k, &mut d);
                    [before, absolute(&d)]
                };
                (0..count).map(both).collect()
            })?;
            for (k, scale) in scale.iter_mut().enumerate() {
                let sum = |side: usize| sums.iter().map(|s| s[k][side]).sum::<f64>();
                let (before, after) = (sum(0), sum(1));
                if before >= 1e-7 && after >= 1e-7 {
                    *scale *= before / after;
                }
            }
        }
        let total: f64 = self.weight.iter().sum();
        let divisor = if self.normalize && total.abs() >= 1e-8 { total } else { 1.0 };
        Ok(Box::new(move |piece, out| {
            let mut all: Vec<Vec<f64>> = (0..count).map(|k| piece.delta(k)).collect();
            for (k, d) in all.iter_mut().enumerate() {
                sparse(piece, k, d);
                d.iter_mut().for_each(|d| *d *= scale[k]);
            }
            match self.elect {
                true => self.elected(&mut all),
                false => {
                    let (first, rest) = all.split_at_mut(1);
                    for other in rest {
                        first[0].iter_mut().zip(other).for_each(|(a, b)| *a += *b);
                    }
                    first[0].iter_mut().for_each(|d| *d /= divisor);
                }
            }
            for ((out, base), d) in out.iter_mut().zip(piece.base).zip(&all[0]) {
                *out = (f64::from(*base) + self.lambda * d) as f32;
            }
        }))
    }
}

impl Blend {
    /// Leaves the sum of the changes that agree in `all[0]`. Block by block, so that sums stay near and every loop is one that
    /// vectorizes.
    fn elected(&self, all: &mut [Vec<f64>]) {
        const BLOCK: usize = 256;
        for start in (0..all[0].len()).step_by(BLOCK) {
            let range = start..(start + BLOCK).min(all[0].len());
            let n = range.len();
            let (mut sums, mut agreed, mut weights) = ([0f64; BLOCK], [0f64; BLOCK], [0f64; BLOCK]);
            for d in all.iter() {
                sums[..n].iter_mut().zip(&d[range.clone()]).for_each(|(sum, d)| *sum += d);
            }
            for (d, weight) in all.iter().zip(&self.weight) {
                let totals = agreed.iter_mut().zip(&mut weights).zip(&sums);
                for (((agreed, weights), sum), &d) in totals.zip(&d[range.clone()]) {
                    // What was dropped has no sign and no say; where the sum is nothing, plus wins.
                    let signed = if *sum >= 0.0 { d } else { -d };
                    *agreed += if signed > 0.0 { d } else { 0.0 };
                    *weights += if signed > 0.0 { *weight } else { 0.0 };
                }
            }
            for ((out, agreed), weights) in all[0][range].iter_mut().zip(&agreed).zip(&weights) {
                let divisor = if self.normalize && *weights != 0.0 { *weights } else { 1.0 };
                *out = agreed / divisor;
            }
        }
    }
}
