//! AdamW, with moments in f32 or in 8 bits.

use rayon::prelude::*;

use super::eightbit::{BLOCK, Codes};
use super::{CHUNK, Optimizer, Slot, State, Update};

/// Tensors below this size keep f32 moments.
const SMALL: usize = 4096;

/// `m ← β₁ m + (1-β₁) g; v ← β₂ v + (1-β₂) g²; w ← w - η (m̂ / (√v̂ + ε) + λ w)`.
#[derive(Debug)]
pub(super) struct AdamW {
    pub betas: (f32, f32),
    pub eps: f32,
    pub eight_bit: bool,
    /// `ε` is added to `√v` before the bias correction, as in older Transformers and in GaLore's reference code.
    pub early_eps: bool,
}

/// The numbers of one step.
#[derive(Clone, Copy)]
struct Step {
    betas: (f32, f32),
    eps: f32,
    /// `η / (1 - β₁ᵗ)`.
    rate: f32,
    /// `1 / √(1 - β₂ᵗ)`.
    root: f32,
    /// `1 - η λ`.
    keep: f32,
}

impl Step {
    fn run(self, w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        let (b1, b2) = self.betas;
        for (((w, g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
            *m = b1 * *m + (1.0 - b1) * g;
            *v = b2 * *v + (1.0 - b2) * g * g;
            *w = self.keep * *w - self.rate * *m / (v.sqrt() * self.root + self.eps);
        }
    }
}

impl Optimizer for AdamW {
    fn update(&self, u: Update, state: &mut State) {
        state.step += 1;
        self.update_at(state.step, u, state);
    }
}

impl AdamW {
    /// Update number `age` (counted from 1) of the moments in `state`.
    pub(super) fn update_at(&self, age: u64, u: Update, state: &mut State) {
        let n = u.value.len();
        let power = |beta: f32| 1.0 - f64::from(beta).powf(age as f64);
        let (first, second) = (power(self.betas.0), power(self.betas.1).sqrt());
        let (rate, root) = match self.early_eps {
            true => (f64::from(u.rate) * second / first, 1.0),
            false => (f64::from(u.rate) / first, 1.0 / second),
        };
        let step = Step {
            betas: self.betas,
            eps: self.eps,
            rate: rate as f32,
            root: root as f32,
            keep: 1.0 - u.rate * u.decay,
        };
        if self.eight_bit && n >= SMALL {
            return eight_bit(step, u, state);
        }
        let (mut m, mut v) = (state.take("m", n), state.take("v", n));
        u.value
            .par_chunks_mut(CHUNK)
            .zip(u.grad.par_chunks(CHUNK))
            .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
            .for_each(|((w, g), (m, v))| step.run(w, g, m, v));
        state.put("m", m);
        state.put("v", v);
    }

    /// Both moments of `n` elements in f32; `None` before the first update.
    pub(super) fn moments(&self, n: usize, state: &State) -> Option<(Vec<f32>, Vec<f32>)> {
        if !(self.eight_bit && n >= SMALL) {
            let floats = |name: &str| match state.slots.get(name) {
                Some(Slot::F32(values)) if values.len() == n => Some(values.clone()),
                _ => None,
            };
            return Some((floats("m")?, floats("v")?));
        }
        let decoded = |book: &Codes, codes: &str, scales: &str| match (
            state.slots.get(codes),
            state.slots.get(scales),
        ) {
            (Some(Slot::U8(codes)), Some(Slot::F32(scales))) if codes.len() == n => {
                let mut out = vec![0.0; n];
                let blocks = out.chunks_mut(BLOCK).zip(codes.chunks(BLOCK)).zip(scales);
                blocks.for_each(|((out, codes), scale)| book.decode(codes, *scale, out));
                Some(out)
            }
            _ => None,
        };
        let m = decoded(Codes::signed(), "m.codes", "m.scale")?;
        Some((m, decoded(Codes::unsigned(), "v.codes", "v.scale")?))
    }

    /// Puts both moments in place.
    pub(super) fn set_moments(&self, m: Vec<f32>, v: Vec<f32>, state: &mut State) {
        if !(self.eight_bit && m.len() >= SMALL) {
            state.put("m", m);
            state.put("v", v);
            return;
        }
        let mut encode = |book: &Codes, values: &[f32], codes: &str, scales: &str| {
            let mut coded = vec![0; values.len()];
            let blocks = coded.chunks_mut(BLOCK).zip(values.chunks(BLOCK));
            let scale = blocks.map(|(codes, values)| book.encode(values, codes)).collect();
            state.slots.insert(codes.to_owned(), Slot::U8(coded));
            state.put(scales, scale);
        };
        encode(Codes::signed(), &m, "m.codes", "m.scale");
        encode(Codes::unsigned(), &v, "v.codes", "v.scale");
    }
}

/// The same step with moments that live in codes, one block at a time.
fn eight_bit(step: Step, u: Update, state: &mut State) {
    let n = u.value.len();
    let blocks = n.div_ceil(BLOCK);
    let (signed, unsigned) = (Codes::signed(), Codes::unsigned());
    let mut codes = |name: &str, zero: u8| match state.slots.remove(name) {
        Some(Slot::U8(codes)) if codes.len() == n => codes,
        _ => vec![zero; n],
    };
    let (mut mc, mut vc) = (codes("m.codes", signed.zero()), codes("v.codes", unsigned.zero()));
    let (mut ms, mut vs) = (state.take("m.scale", blocks), state.take("v.scale", blocks));
    u.value
        .par_chunks_mut(BLOCK)
        .zip(u.grad.par_chunks(BLOCK))
        .zip(mc.par_chunks_mut(BLOCK).zip(ms.par_iter_mut()))
        .zip(vc.par_chunks_mut(BLOCK).zip(vs.par_iter_mut()))
        .with_min_len(16)
        .for_each(|(((w, g), (mc, ms)), (vc, vs))| {
            let (mut m, mut v) = ([0.0; BLOCK], [0.0; BLOCK]);
            let (m, v) = (&mut m[..w.len()], &mut v[..w.len()]);
            signed.decode(mc, *ms, m);
            unsigned.decode(vc, *vs, v);
            step.run(w, g, m, v);
            *ms = signed.encode(m, mc);
            *vs = unsigned.encode(v, vc);
        });
    state.slots.insert("m.codes".into(), Slot::U8(mc));
    state.slots.insert("v.codes".into(), Slot::U8(vc));
    state.put("m.scale", ms);
    state.put("v.scale", vs);
}
