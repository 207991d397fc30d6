//! Adafactor.

use super::{Optimizer, State, Update};

/// Keeps the statistics away from zero.
const EPS: f32 = 1e-30;
/// Smallest root mean square that a relative rate multiplies.
const SMALLEST: f64 = 1e-3;

/// `v ≈ r cᵀ / mean(r)`; `u = g / √v`, clipped to a root mean square; `w ← w - η u - η λ w`.
#[derive(Debug)]
pub(super) struct Adafactor {
    pub exponent: f32,
    pub clip: f32,
    pub relative: bool,
}

impl Optimizer for Adafactor {
    fn update(&self, u: Update, state: &mut State) {
        state.step += 1;
        let n = u.value.len();
        let keep = (1.0 - (state.step as f64).powf(-f64::from(self.exponent))) as f32;
        let mut step = vec![0.0; n];
        let columns = u.shape.last().copied().unwrap_or(1).max(1);
        if u.shape.len() >= 2 && columns > 1 && n / columns > 1 {
            let rows = n / columns;
            let (mut r, mut c) = (state.take("rows", rows), state.take("columns", columns));
            let mut sums = vec![0.0f32; columns];
            for (r, g) in r.iter_mut().zip(u.grad.chunks_exact(columns)) {
                let mut sum = 0.0;
                for (s, g) in sums.iter_mut().zip(g) {
                    *s += g * g + EPS;
                    sum += g * g + EPS;
                }
                *r = keep * *r + (1.0 - keep) * sum / columns as f32;
            }
            for (c, s) in c.iter_mut().zip(&sums) {
                *c = keep * *c + (1.0 - keep) * s / rows as f32;
            }
            let mean = r.iter().sum::<f32>() / rows as f32;
            let by_column: Vec<f32> = c.iter().map(|c| 1.0 / c.sqrt()).collect();
            let all = step.chunks_exact_mut(columns).zip(u.grad.chunks_exact(columns));
            for ((s, g), r) in all.zip(&r) {
                let by_row = (mean / r).sqrt();
                for ((s, g), c) in s.iter_mut().zip(g).zip(&by_column) {
                    *s = g * by_row * c;
                }
            }
            state.put("rows", r);
            state.put("columns", c);
        } else {
            let mut v = state.take("v", n);
            for ((s, g), v) in step.iter_mut().zip(u.grad).zip(&mut v) {
                *v = keep * *v + (1.0 - keep) * (g * g + EPS);
                *s = g / v.sqrt();
            }
            state.put("v", v);
        }
        let size = |x: &[f32]| {
            (x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n.max(1) as f64).sqrt()
        };
        let clip = (size(&step) / f64::from(self.clip)).max(1.0);
        let relative = if self.relative { size(u.value).max(SMALLEST) } else { 1.0 };
        let rate = (f64::from(u.rate) * relative / clip) as f32;
        for (w, s) in u.value.iter_mut().zip(&step) {
            *w -= rate * s + u.rate * u.decay * *w;
        }
    }
}
