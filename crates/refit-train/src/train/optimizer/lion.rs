//! Lion.

use super::{Optimizer, State, Update};

/// `w ← w - η (sign(β₁ m + (1-β₁) g) + λ w); m ← β₂ m + (1-β₂) g`.
#[derive(Debug)]
pub(super) struct Lion {
    pub betas: (f32, f32),
}

impl Optimizer for Lion {
    fn update(&self, u: Update, state: &mut State) {
        let (b1, b2) = self.betas;
        state.step += 1;
        let mut m = state.take("momentum", u.value.len());
        for ((w, &g), m) in u.value.iter_mut().zip(u.grad).zip(&mut m) {
            let c = b1 * *m + (1.0 - b1) * g;
            // signum of 0 is 1 in Rust; Lion's is 0.
            let sign = if c == 0.0 { 0.0 } else { c.signum() };
            *w -= u.rate * (sign + u.decay * *w);
            *m = b2 * *m + (1.0 - b2) * g;
        }
        state.put("momentum", m);
    }
}
