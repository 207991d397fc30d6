//! Learned soups: mixing weights found by gradient steps on held-out data.
//!
//! ```text
//! min over a, b of  CE(b f(x; sum_k w_k theta_k), y),   w = softmax(a)
//! ```
//!
//! The gradient needs no differentiation through the average. With `G = dL/dtheta` at the mix,
//! `dL/dw_k = <G, theta_k>`, and then the softmax: `dL/da_k = w_k (dL/dw_k - sum_j w_j dL/dw_j)`. The inner
//! products are sums over tensors, so the ingredients can be read one tensor at a time. With one set of
//! weights per tensor, the products of that tensor alone go into its softmax.

/// The coefficients of a learned soup and the state of their optimizer (AdamW without decay).
#[derive(Clone, Debug)]
pub struct Mixture {
    models: usize,
    /// Logits `a`, one row of `models` per group of tensors (one row: the same for all).
    logits: Vec<f64>,
    /// Temperature `b`, used in training only.
    pub temperature: f64,
    first: Vec<f64>,
    second: Vec<f64>,
    steps: i32,
}

impl Mixture {
    /// The uniform soup of `models`, with `rows` independent sets of weights.
    pub fn uniform(models: usize, rows: usize) -> Self {
        let parameters = models * rows + 1;
        Self {
            models,
            logits: vec![1.0; models * rows],
            temperature: 1.0,
            first: vec![0.0; parameters],
            second: vec![0.0; parameters],
            steps: 0,
        }
    }

    /// The weights of one row: positive, summing to 1.
    pub fn weights(&self, row: usize) -> Vec<f64> {
        softmax(&self.logits[row * self.models..(row + 1) * self.models])
    }

    /// One AdamW step from `dL/dw` `[rows, models]` and `dL/db`.
    ///
    /// # Panics
    /// When the gradient has another shape than the weights.
    pub fn step(&mut self, by_weight: &[f64], by_temperature: f64, rate: f64) {
        assert_eq!(by_weight.len(), self.logits.len(), "one derivative per weight");
        let mut gradient: Vec<f64> = by_weight
            .chunks(self.models)
            .enumerate()
            .flat_map(|(row, by_weight)| through_softmax(&self.weights(row), by_weight))
            .collect();
        gradient.push(by_temperature);
        self.steps += 1;
        let (beta1, beta2) = (0.9f64, 0.999f64);
        let (correct1, correct2) = (1.0 - beta1.powi(self.steps), 1.0 - beta2.powi(self.steps));
        for (index, g) in gradient.into_iter().enumerate() {
            let (m, v) = (&mut self.first[index], &mut self.second[index]);
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            let step = rate * (*m / correct1) / ((*v / correct2).sqrt() + 1e-8);
            match self.logits.get_mut(index) {
                Some(logit) => *logit -= step,
                None => self.temperature -= step,
            }
        }
    }
}

/// `softmax(a)`.
fn softmax(logits: &[f64]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = logits.iter().map(|a| (a - largest).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}

/// `dL/da` from `w = softmax(a)` and `dL/dw`.
fn through_softmax(weights: &[f64], by_weight: &[f64]) -> Vec<f64> {
    let mean: f64 = weights.iter().zip(by_weight).map(|(w, g)| w * g).sum();
    weights.iter().zip(by_weight).map(|(w, g)| w * (g - mean)).collect()
}

/// `dL/dw_k = <G, theta_k>` for the values of one tensor.
pub fn by_weight(gradient: &[f32], ingredient: &[f32]) -> f64 {
    gradient.iter().zip(ingredient).map(|(g, t)| f64::from(*g) * f64::from(*t)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Stream;

    const CLASSES: usize = 3;
    const INPUTS: usize = 5;

    /// A linear classifier with two "tensors", weight and bias, and its data.
    struct Toy {
        ingredients: Vec<Vec<f32>>,
        x: Vec<f32>,
        y: Vec<usize>,
    }

    impl Toy {
        fn new(models: usize) -> Self {
            let mut stream = Stream::new(7);
            let size = CLASSES * INPUTS + CLASSES;
            Self {
                ingredients: (0..models).map(|_| stream.normals(size)).collect(),
                x: stream.normals(40 * INPUTS),
                y: (0..40).map(|_| stream.bits() as usize % CLASSES).collect(),
            }
        }

        /// Range of the parameters that form a tensor.
        fn tensors() -> [std::ops::Range<usize>; 2] {
            [0..CLASSES * INPUTS, CLASSES * INPUTS..CLASSES * INPUTS + CLASSES]
        }

        fn mix(&self, mixture: &Mixture, rows: usize) -> Vec<f32> {
            let mut theta = vec![0f32; CLASSES * INPUTS + CLASSES];
            for (tensor, range) in Self::tensors().into_iter().enumerate() {
                let weights = mixture.weights(if rows == 1 { 0 } else { tensor });
                for (weight, model) in weights.iter().zip(&self.ingredients) {
                    for j in range.clone() {
                        theta[j] += *weight as f32 * model[j];
                    }
                }
            }
            theta
        }

        /// Loss, dL/dtheta, dL/db.
        fn loss(&self, theta: &[f32], temperature: f64) -> (f64, Vec<f32>, f64) {
            let (mut loss, mut by_theta, mut by_b) = (0.0, vec![0f64; theta.len()], 0.0);
            for (x, &y) in self.x.chunks(INPUTS).zip(&self.y) {
                let z: Vec<f64> = (0..CLASSES)
                    .map(|c| {
                        let row = &theta[c * INPUTS..(c + 1) * INPUTS];
                        let dot: f64 =
                            row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                        dot + f64::from(theta[CLASSES * INPUTS + c])
                    })
                    .collect();
                let p = softmax(&z.iter().map(|z| temperature * z).collect::<Vec<_>>());
                loss -= p[y].ln();
                for c in 0..CLASSES {
                    let by_logit = p[c] - f64::from(u8::from(c == y));
                    by_b += by_logit * z[c];
                    let by_z = by_logit * temperature;
                    for (j, x) in x.iter().enumerate() {
                        by_theta[c * INPUTS + j] += by_z * f64::from(*x);
                    }
                    by_theta[CLASSES * INPUTS + c] += by_z;
                }
            }
            let n = self.y.len() as f64;
            (loss / n, by_theta.iter().map(|g| (g / n) as f32).collect(), by_b / n)
        }

        fn derivatives(&self, gradient: &[f32], rows: usize) -> Vec<f64> {
            let part = |tensor: &std::ops::Range<usize>, model: &Vec<f32>| {
                by_weight(&gradient[tensor.clone()], &model[tensor.clone()])
            };
            let tensors = Self::tensors();
            if rows == 1 {
                return self
                    .ingredients
                    .iter()
                    .map(|model| tensors.iter().map(|tensor| part(tensor, model)).sum())
                    .collect();
            }
            tensors
                .iter()
                .flat_map(|tensor| self.ingredients.iter().map(move |model| part(tensor, model)))
                .collect()
        }
    }

    #[test]
    fn it_starts_as_the_uniform_soup() {
        for rows in [1, 4] {
            let mixture = Mixture::uniform(5, rows);
            for row in 0..rows {
                assert!(mixture.weights(row).iter().all(|w| (w - 0.2).abs() < 1e-15));
            }
        }
    }

    #[test]
    fn derivatives_are_those_of_finite_differences() {
        let toy = Toy::new(4);
        for rows in [1, 2] {
            let mixture = Mixture::uniform(4, rows);
            let (_, gradient, by_b) = toy.loss(&toy.mix(&mixture, rows), 1.0);
            let derivatives = toy.derivatives(&gradient, rows);
            let step = 1e-3;
            for index in 0..4 * rows {
                // Moving a logit moves all weights of its row: compare after the softmax.
                let nudge = |by: f64| {
                    let mut moved = mixture.clone();
                    moved.logits[index] += by;
                    toy.loss(&toy.mix(&moved, rows), 1.0).0
                };
                let numeric = (nudge(step) - nudge(-step)) / (2.0 * step);
                let row = index / 4;
                let analytic =
                    through_softmax(&mixture.weights(row), &derivatives[row * 4..(row + 1) * 4])
                        [index % 4];
                assert!((numeric - analytic).abs() < 1e-3, "{rows} {index}: {numeric} {analytic}");
            }
            let theta = toy.mix(&mixture, rows);
            let numeric =
                (toy.loss(&theta, 1.0 + step).0 - toy.loss(&theta, 1.0 - step).0) / (2.0 * step);
            assert!((numeric - by_b).abs() < 1e-3);
        }
    }

    #[test]
    fn learning_lowers_the_loss_and_weights_stay_on_the_simplex() {
        let toy = Toy::new(4);
        for rows in [1, 2] {
            let mut mixture = Mixture::uniform(4, rows);
            let (before, ..) = toy.loss(&toy.mix(&mixture, rows), 1.0);
            for _ in 0..100 {
                let (_, gradient, by_b) = toy.loss(&toy.mix(&mixture, rows), mixture.temperature);
                let derivatives = toy.derivatives(&gradient, rows);
                mixture.step(&derivatives, by_b, 0.05);
            }
            let (after, ..) = toy.loss(&toy.mix(&mixture, rows), mixture.temperature);
            assert!(after < 0.9 * before, "{rows}: {before} to {after}");
            for row in 0..rows {
                let weights = mixture.weights(row);
                assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                assert!(weights.iter().all(|w| *w >= 0.0));
            }
        }
    }
}
