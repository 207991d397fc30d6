//! Stochastic gradient descent with momentum.

use super::{Optimizer, State, Update};

/// `b ← μ b + g; w ← w - η b`, or `w - η (g + μ b)` with Nesterov.
#[derive(Debug)]
pub(super) struct Sgd {
    pub momentum: f32,
    pub nesterov: bool,
}

impl Optimizer for Sgd {
    fn update(&self, u: Update, state: &mut State) {
        state.step += 1;
        if self.momentum == 0.0 {
            for (w, g) in u.value.iter_mut().zip(u.grad) {
                *w -= u.rate * (g + u.decay * *w);
            }
            return;
        }
        let mut buffer = state.take("momentum", u.value.len());
        for ((w, g), b) in u.value.iter_mut().zip(u.grad).zip(&mut buffer) {
            let g = g + u.decay * *w;
            *b = self.momentum * *b + g;
            *w -= u.rate * if self.nesterov { g + self.momentum * *b } else { *b };
        }
        state.put("momentum", buffer);
    }
}
