//! Several ranks that train one model: losses weighted, gradients summed, everything else the same on all.

use std::collections::BTreeMap;

use burn::module::ParamId;
use refit_nn::Trainable;

use super::resume::recipe_json;
use super::{Found, Trainer};
use crate::train::error::{Result, TrainError};
use crate::train::ranks::Ranks;
use crate::train::update;

/// Gradients of small tensors are summed together, this many values at a time: a message costs as much as some thousand values.
const BUCKET: usize = 1 << 20;

impl<M: Trainable> Trainer<M> {
    /// Trains together with other ranks, which hold the same model and the same recipe.
    ///
    /// # Errors
    /// Per-layer updates: they project a rank's own gradient before it could be summed.
    pub fn with_ranks(mut self, ranks: Ranks) -> Result<Self> {
        if self.recipe.per_layer && !ranks.alone() {
            return Err(TrainError::Setting {
                setting: "per_layer",
                found: "true".into(),
                expected: "false where several ranks train: the basis follows from the gradient of the whole batch",
            });
        }
        self.ranks = ranks;
        Ok(self)
    }

    /// The factor of this rank's loss in that of the micro-batch, and the items of all ranks. Known before the backward pass,
    /// so that what is summed afterwards needs no more scaling.
    pub(super) fn weigh(&self, found: Result<Found>) -> Result<(Found, f64, usize)> {
        let counted = found.map(|found| {
            let items = found.items as u64;
            (found, items)
        });
        let (found, counts) = self.ranks.gather(counted)?;
        let all: u64 = counts.iter().sum();
        // Nothing to learn in any row: the loss is 0 everywhere.
        let weight = if self.ranks.alone() { 1.0 } else { found.items as f64 / all.max(1) as f64 };
        Ok((found, weight, all as usize))
    }

    /// Sums what the ranks found in a step.
    pub(super) fn reduce(
        &self,
        loss: &mut f64,
        terms: &mut BTreeMap<String, f64>,
        gradients: &mut update::Host,
    ) {
        if self.ranks.alone() {
            return;
        }
        let trained: Vec<_> =
            self.parameters.iter().filter(|p| self.groups.contains_key(&p.id)).collect();
        // A parameter may be without gradient on one rank (an expert that none of its rows chose) and not on another.
        let present = trained.iter().map(|p| f64::from(u8::from(gradients.contains_key(&p.id))));
        let mut figures: Vec<f64> =
            std::iter::once(*loss).chain(terms.values().copied()).chain(present).collect();
        self.ranks.sum_f64(&mut figures);
        let mut figures = figures.into_iter();
        *loss = figures.next().unwrap_or(*loss);
        terms.values_mut().zip(&mut figures).for_each(|(term, sum)| *term = sum);
        let (mut bucket, mut inside) = (Vec::new(), Vec::new());
        let empty = |bucket: &mut Vec<f32>, inside: &mut Vec<ParamId>, all: &mut update::Host| {
            self.ranks.sum_f32(bucket);
            let mut rest = bucket.as_slice();
            for id in inside.drain(..) {
                let grad = all.get_mut(&id).expect("invariant: put there below");
                let (sum, behind) = rest.split_at(grad.len());
                grad.copy_from_slice(sum);
                rest = behind;
            }
            bucket.clear();
        };
        for (parameter, _) in trained.iter().zip(figures).filter(|(_, ranks)| *ranks > 0.0) {
            let len = parameter.shape.iter().product();
            let grad = gradients.entry(parameter.id).or_insert_with(|| vec![0.0; len]);
            if len >= BUCKET {
                self.ranks.sum_f32(grad);
                continue;
            }
            bucket.extend_from_slice(grad);
            inside.push(parameter.id);
            if bucket.len() >= BUCKET {
                empty(&mut bucket, &mut inside, gradients);
            }
        }
        if !bucket.is_empty() {
            empty(&mut bucket, &mut inside, gradients);
        }
    }

    /// Before anything is read or written: all ranks follow one recipe, and go by the identity that rank 0 sees.
    pub(super) fn agree(&self, identity: &mut String) -> Result<()> {
        if self.ranks.alone() {
            return Ok(());
        }
        let recipe = recipe_json(&self.recipe).to_string();
        let words = recipe.bytes().fold(0, |hash, byte| update::mix(hash, byte.into()));
        self.ranks.same("recipe", words)?;
        let theirs = self.ranks.broadcast(identity.clone().into_bytes());
        *identity = String::from_utf8_lossy(&theirs).into_owned();
        Ok(())
    }

    /// Before the first update: rank 0's values of what trains go to all, and what is frozen must be the same everywhere.
    /// Afterwards ranks only make the same updates from the same sums.
    pub(super) fn align(&mut self) -> Result<()> {
        let ranks = self.ranks.clone();
        if ranks.alone() {
            return Ok(());
        }
        let (groups, mut digest) = (&self.groups, 0);
        update::read(self.model(), |id, shape, values| {
            let own = if groups.contains_key(&id) { 0 } else { update::digest(&values()) };
            digest = shape
                .iter()
                .fold(update::mix(digest, own), |hash, &extent| update::mix(hash, extent as u64));
        });
        ranks.same("weights", digest)?;
        let model = self.model.take().expect("invariant: put back below");
        let copy = &mut |_, _: &[usize], value: &mut Vec<f32>| ranks.broadcast_f32(value);
        self.model = Some(update::change(model, copy, &|id| groups.contains_key(&id)));
        Ok(())
    }
}
