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
        let n = u.value.len();
        let power = |beta: f32| 1.0 - f64::from(beta).powf(state.step as f64);
        let step = Step {
            betas: self.betas,
            eps: self.eps,
            rate: (f64::from(u.rate) / power(self.betas.0)) as f32,
            root: (1.0 / power(self.betas.1).sqrt()) as f32,
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
