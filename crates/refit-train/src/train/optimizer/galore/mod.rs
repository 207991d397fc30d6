//! GaLore: Adam in a low-rank projection of the gradient (Zhao et al. 2024, arXiv 2403.03507, algorithm 2).
//!
//! For a target `W [m, n]` with gradient `G`, every `gap` updates the basis becomes `G`'s leading singular vectors; then
//!
//! ```text
//! R = G Qᵀ [m, r] (right)   or   P G [r, n] (left)   or   P G Qᵀ [r, r] (full)
//! M ← β₁ M + (1-β₁) R;   V ← β₂ V + (1-β₂) R²;   N = M / (√V + ε)
//! W ← W - η √(1-β₂ᵗ)/(1-β₁ᵗ) α (N Q  or  Pᵀ N  or  Pᵀ N Q);   W ← (1 - η λ) W
//! ```
//! with orthonormal rows in `P` and `Q`. The moments stay as they are when the basis changes, which is what the reference code
//! does; [`Refresh`] offers two other ways. Where the card is silent: "full" takes the two sets of singular vectors
//! independently of each other's signs, and staggered layers are spread by the golden ratio, so that their number need not be
//! known.
//!
//! Everything that an update needs lies in the tensor's [`State`] as plain slots (`basis.left`, `basis.right`, the moments): a
//! checkpoint in the middle of a gap goes on to the bit.

mod linalg;
mod subspace;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::adamw::AdamW;
use super::{CHUNK, Optimizer, Projected, Slot, State, Update};
use crate::train::scope::glob;
use linalg::product;
use subspace::{Axis, leading};

/// Which side of a gradient `[m, n]` GaLore projects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The smaller extent: columns when `m >= n`, rows otherwise.
    #[default]
    Std,
    /// The larger extent.
    ReverseStd,
    /// Rows: the state is `[r, n]`.
    Left,
    /// Columns: the state is `[m, r]`.
    Right,
    /// Both: the state is `[r, r]`.
    Full,
}

impl Side {
    /// Are rows, are columns projected?
    fn of(self, m: usize, n: usize) -> (bool, bool) {
        match self {
            Self::Std => (m < n, m >= n),
            Self::ReverseStd => (m >= n, m < n),
            Self::Left => (true, false),
            Self::Right => (false, true),
            Self::Full => (true, true),
        }
    }
}

/// What becomes of the moments when GaLore's basis changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Refresh {
    /// They stay as they are, as in the reference code.
    #[default]
    Keep,
    /// They start again at zero, and so does the bias correction.
    Reset,
    /// They are carried over: the first moment by the change of basis, the second by its squares.
    Rotate,
}

const LEFT: &str = "basis.left";
const RIGHT: &str = "basis.right";
/// Updates since the moments were reset; only [`Refresh::Reset`] needs it.
const AGE: &str = "age";

/// See the [module](self).
#[derive(Debug)]
pub(super) struct GaLore {
    pub rank: usize,
    pub gap: u64,
    pub scale: f32,
    pub side: Side,
    pub on_refresh: Refresh,
    pub stagger: bool,
    pub targets: Vec<String>,
    /// Adam on the projected gradients.
    pub inner: AdamW,
    /// Adam on everything that is no target.
    pub rest: AdamW,
    /// The rank has been found too large, and a warning given.
    pub clamped: AtomicBool,
}

/// A projection: rows of `left [r, m]` and `right [r, n]`, whichever are there.
#[derive(Clone, Copy)]
struct Basis<'a> {
    left: Option<&'a [f32]>,
    right: Option<&'a [f32]>,
    rank: usize,
}

impl Basis<'_> {
    /// Extents of the projection of an `[m, n]` matrix.
    fn extents(&self, m: usize, n: usize) -> (usize, usize) {
        (self.left.map_or(m, |_| self.rank), self.right.map_or(n, |_| self.rank))
    }

    /// `P x Qᵀ` of `x [m, n]`.
    fn down(&self, x: &[f32], m: usize, n: usize) -> Vec<f32> {
        let (rows, columns) = self.extents(m, n);
        let mut half = Vec::new();
        let mut x = (x, n);
        if let Some(right) = self.right {
            half = vec![0.0; m * columns];
            product((m, n, columns), (x.0, n, 1), (right, 1, n), &mut half, false, 1.0);
            x = (&half, columns);
        }
        let Some(left) = self.left else { return half };
        let mut out = vec![0.0; rows * x.1];
        product((rows, m, x.1), (left, m, 1), (x.0, x.1, 1), &mut out, false, 1.0);
        out
    }

    /// `w += scale Pᵀ low Q` on `w [m, n]`.
    fn up(&self, low: &[f32], w: &mut [f32], m: usize, n: usize, scale: f32) {
        let (rows, columns) = self.extents(m, n);
        match (self.left, self.right) {
            (None, Some(right)) => {
                product((m, columns, n), (low, columns, 1), (right, n, 1), w, true, scale);
            }
            (Some(left), None) => {
                product((m, rows, n), (left, 1, m), (low, n, 1), w, true, scale);
            }
            (Some(left), Some(right)) => {
                let mut half = vec![0.0; rows * n];
                product(
                    (rows, columns, n),
                    (low, columns, 1),
                    (right, n, 1),
                    &mut half,
                    false,
                    1.0,
                );
                product((m, rows, n), (left, 1, m), (&half, n, 1), w, true, scale);
            }
            (None, None) => unreachable!("every side projects rows, columns or both"),
        }
    }
}

impl Optimizer for GaLore {
    fn update(&self, u: Update, state: &mut State) {
        match self.project(u.name, u.shape, u.grad, state) {
            Some(projected) => self.update_projected(u, projected, state),
            None => self.rest.update(u, state),
        }
    }

    fn projects(&self, name: &str, shape: &[usize]) -> bool {
        shape.len() == 2
            && !shape.contains(&0)
            && self.targets.iter().any(|pattern| glob(pattern, name))
    }

    fn project(&self, name: &str, shape: &[usize], g: &[f32], state: &State) -> Option<Projected> {
        if !self.projects(name, shape) {
            return None;
        }
        let (m, n, rank) = (shape[0], shape[1], self.rank_of(shape));
        let (left, right) = self.side.of(m, n);
        let mut basis = BTreeMap::new();
        for (axis, slot, width, used) in
            [(Axis::Left, LEFT, m, left), (Axis::Right, RIGHT, n, right)]
        {
            let old = floats(state, slot, rank * width);
            if !used || (old.is_some() && !self.due(name, state.step)) {
                continue;
            }
            let found = leading(g, m, n, rank, axis);
            if found.is_none() {
                tracing::warn!(
                    tensor = name,
                    update = state.step,
                    "the gradient is zero or not finite where a new basis is due: {}",
                    if old.is_some() { "the old one stays" } else { "the first axes are taken" }
                );
            }
            match (found, old) {
                (Some(new), _) => basis.insert(slot.to_owned(), new),
                (None, Some(_)) => None,
                (None, None) => basis.insert(slot.to_owned(), axes(rank, width)),
            };
        }
        let of = |slot: &str, width: usize, used: bool| {
            let new = basis.get(slot).map(Vec::as_slice);
            new.or_else(|| floats(state, slot, rank * width)).filter(|_| used)
        };
        let low = Basis { left: of(LEFT, m, left), right: of(RIGHT, n, right), rank }.down(g, m, n);
        Some(Projected { low, basis })
    }

    fn update_projected(&self, u: Update, projected: Projected, state: &mut State) {
        let (m, n, rank) = (u.shape[0], u.shape[1], self.rank_of(u.shape));
        let Projected { low, basis } = projected;
        if !basis.is_empty() {
            self.refresh(&basis, (m, n, rank), low.len(), state);
            basis.into_iter().for_each(|(slot, rows)| state.put(&slot, rows));
        }
        state.step += 1;
        let age = match self.on_refresh {
            Refresh::Reset => {
                let mut age = state.take(AGE, 1);
                age[0] += 1.0;
                let counted = age[0] as u64;
                state.put(AGE, age);
                counted
            }
            Refresh::Keep | Refresh::Rotate => state.step,
        };
        // Adam on zeros leaves minus the update there.
        let mut step = vec![0.0; low.len()];
        let shape = [low.len()];
        let inner = Update {
            name: u.name,
            value: &mut step,
            grad: &low,
            shape: &shape,
            rate: u.rate,
            decay: 0.0,
        };
        self.inner.update_at(age, inner, state);
        let (left, right) = self.side.of(m, n);
        let of = |slot, width, used| floats(state, slot, rank * width).filter(|_| used);
        let basis = Basis { left: of(LEFT, m, left), right: of(RIGHT, n, right), rank };
        basis.up(&step, u.value, m, n, self.scale);
        let keep = 1.0 - u.rate * u.decay;
        if keep != 1.0 {
            u.value.par_chunks_mut(CHUNK).for_each(|w| w.iter_mut().for_each(|w| *w *= keep));
        }
    }
}

impl GaLore {
    fn rank_of(&self, shape: &[usize]) -> usize {
        let most = shape[0].min(shape[1]);
        if self.rank > most && !self.clamped.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                rank = self.rank,
                "the rank exceeds the smaller extent of some targets, whose gradients are then projected at full rank"
            );
        }
        self.rank.min(most)
    }

    /// Is a new basis due before update `step`, counted from 0?
    fn due(&self, name: &str, step: u64) -> bool {
        let shift = match self.stagger {
            true => {
                // The golden ratio's multiples fill the gap evenly, however many layers there are.
                let layer = name.split('.').find_map(|part| part.parse::<u32>().ok()).unwrap_or(0);
                let share = (f64::from(layer) * 0.618_033_988_749_894_9).fract();
                (share * self.gap as f64) as u64
            }
            false => 0,
        };
        (step + shift).is_multiple_of(self.gap)
    }

    /// Does to the moments of `len` elements what the change to the bases in `new` asks for.
    fn refresh(
        &self,
        new: &BTreeMap<String, Vec<f32>>,
        (m, n, rank): (usize, usize, usize),
        len: usize,
        state: &mut State,
    ) {
        match self.on_refresh {
            Refresh::Keep => {}
            Refresh::Reset => {
                self.inner.set_moments(vec![0.0; len], vec![0.0; len], state);
                state.put(AGE, vec![0.0]);
            }
            Refresh::Rotate => {
                let Some((first, second)) = self.inner.moments(len, state) else { return };
                let turn = |slot: &str, width: usize| {
                    let (new, old) = (new.get(slot)?, floats(state, slot, rank * width)?);
                    let mut turn = vec![0.0; rank * rank];
                    let extents = (rank, width, rank);
                    product(extents, (new, width, 1), (old, 1, width), &mut turn, false, 1.0);
                    Some(turn)
                };
                let (left, right) = (turn(LEFT, m), turn(RIGHT, n));
                // The moments' own extents, which a turn does not change.
                let (on_left, on_right) = self.side.of(m, n);
                let (rows, columns) =
                    (if on_left { rank } else { m }, if on_right { rank } else { n });
                let apply = |left: &Option<Vec<f32>>, right: &Option<Vec<f32>>, x: Vec<f32>| {
                    let basis = Basis { left: left.as_deref(), right: right.as_deref(), rank };
                    match (left, right) {
                        (None, None) => x,
                        _ => basis.down(&x, rows, columns),
                    }
                };
                let squares = |turn: &Option<Vec<f32>>| -> Option<Vec<f32>> {
                    turn.as_ref().map(|turn| turn.iter().map(|x| x * x).collect())
                };
                let second = apply(&squares(&left), &squares(&right), second);
                self.inner.set_moments(apply(&left, &right, first), second, state);
            }
        }
    }
}

/// The float slot `name`, if it has `len` elements.
fn floats<'a>(state: &'a State, name: &str, len: usize) -> Option<&'a [f32]> {
    match state.slots.get(name) {
        Some(Slot::F32(values)) if values.len() == len => Some(values),
        _ => None,
    }
}

/// The first `rank` unit vectors as rows.
fn axes(rank: usize, width: usize) -> Vec<f32> {
    let mut rows = vec![0.0; rank * width];
    (0..rank).for_each(|i| rows[i * width + i] = 1.0);
    rows
}
