//! Losses: weighted terms, and the parts that they are made of.
//!
//! Losses on logits are [`LogitLoss`]es for [`Frame::head_loss`](refit_nn::Frame::head_loss): they see a few rows of logits at a
//! time and leave their gradient in place, so the logits of a batch never exist at once.

use std::ops::Range;

use burn::tensor::{Int, Tensor, TensorData};
use refit_nn::ops::LogitLoss;
use refit_nn::ops::back::softmax_in_place;
use refit_nn::{Decoder, Run};

/// One term of a loss.
#[derive(Debug, Clone)]
pub struct Term {
    /// Its name in reports.
    pub name: &'static str,
    /// Its weight in the sum.
    pub weight: f64,
    /// Its value, one element.
    pub value: Tensor<1>,
}

/// The loss of one micro-batch: a weighted sum of named terms.
#[derive(Debug, Clone, Default)]
pub struct Terms {
    /// The terms.
    pub terms: Vec<Term>,
    /// Tokens or examples that the batch held, for reports.
    pub items: usize,
}

impl Terms {
    /// A loss of one term of weight 1.
    pub fn one(name: &'static str, value: Tensor<1>, items: usize) -> Self {
        Self { terms: vec![Term { name, weight: 1.0, value }], items }
    }

    /// Adds a term.
    pub fn with(mut self, name: &'static str, weight: f64, value: Tensor<1>) -> Self {
        self.terms.push(Term { name, weight, value });
        self
    }

    /// The weighted sum; `None` without terms.
    pub fn total(&self) -> Option<Tensor<1>> {
        let weighted = self.terms.iter().map(|t| t.value.clone() * t.weight);
        weighted.reduce(|a, b| a + b)
    }
}

/// Mean cross-entropy of rows of logits against `targets` (`None`: not scored), with label smoothing `smoothing`
/// (Szegedy et al. 2016: that share of the target goes to all classes evenly).
pub fn cross_entropy(
    targets: &[Option<u32>],
    smoothing: f32,
) -> impl Fn(Range<usize>, &mut [f32]) -> f64 + Sync + '_ {
    let scored = targets.iter().flatten().count().max(1);
    move |rows, logits| {
        let vocab = logits.len() / rows.len().max(1);
        let share = 1.0 / scored as f32;
        let mut total = 0.0;
        for (row, logits) in rows.zip(logits.chunks_exact_mut(vocab)) {
            let Some(target) = targets[row].map(|t| t as usize) else {
                logits.fill(0.0);
                continue;
            };
            let chosen = logits[target];
            let mean =
                if smoothing > 0.0 { logits.iter().sum::<f32>() / vocab as f32 } else { 0.0 };
            let normalizer = softmax_in_place(logits);
            let expected = (1.0 - smoothing) * chosen + smoothing * mean;
            total += f64::from(normalizer - expected);
            let rest = smoothing / vocab as f32;
            for g in logits.iter_mut() {
                *g = (*g - rest) * share;
            }
            logits[target] -= (1.0 - smoothing) * share;
        }
        total / scored as f64
    }
}

/// Distillation on logits (Hinton et al. 2015): `T² KL(teacher ‖ student)` at temperature `T`, mean over rows. `teacher` writes
/// the teacher's logits of a range of rows.
pub fn distill<'a>(
    teacher: impl Fn(Range<usize>, &mut [f32]) + Sync + 'a,
    rows: usize,
    temperature: f32,
) -> impl Fn(Range<usize>, &mut [f32]) -> f64 + Sync + 'a {
    move |range, logits| {
        let vocab = logits.len() / range.len().max(1);
        let mut wanted = vec![0.0; logits.len()];
        teacher(range, &mut wanted);
        let mut total = 0.0;
        for (s, t) in logits.chunks_exact_mut(vocab).zip(wanted.chunks_exact_mut(vocab)) {
            s.iter_mut().chain(t.iter_mut()).for_each(|x| *x /= temperature);
            let (raw_s, raw_t) = (s.to_vec(), t.to_vec());
            let (zs, zt) = (softmax_in_place(s), softmax_in_place(t));
            let mut divergence = 0.0f64;
            for (p, (a, b)) in t.iter().zip(raw_t.iter().zip(&raw_s)) {
                divergence += f64::from(p * ((a - zt) - (b - zs)));
            }
            total += divergence * f64::from(temperature).powi(2) / rows as f64;
            for (g, p) in s.iter_mut().zip(t.iter()) {
                *g = (*g - p) * temperature / rows as f32;
            }
        }
        total
    }
}

/// Mean next-token cross-entropy of `ids` (`batch` rows) under `decoder`; where `scored` is given, only tokens marked there
/// are predicted. Returns the loss and the number of scored tokens.
///
/// # Errors
/// As [`Decoder::hidden`].
pub fn next_token(
    decoder: &Decoder,
    ids: &[u32],
    batch: usize,
    scored: Option<&[bool]>,
    run: &mut Run,
) -> refit_nn::Result<(Tensor<1>, usize)> {
    let targets = next_targets(ids, batch, scored);
    let hidden = decoder.hidden(ids, batch, run)?;
    let count = targets.iter().flatten().count();
    let loss = cross_entropy(&targets, 0.0);
    Ok((decoder.frame.head_loss(hidden, &loss as &LogitLoss, run), count))
}

/// What each position is to predict: the next token of its row, `None` at the end of a row and where it is not scored.
pub fn next_targets(ids: &[u32], batch: usize, scored: Option<&[bool]>) -> Vec<Option<u32>> {
    let seq = ids.len() / batch.max(1);
    (0..ids.len())
        .map(|i| {
            let last = (i + 1).is_multiple_of(seq);
            (!last && scored.is_none_or(|s| s[i + 1])).then(|| ids[i + 1])
        })
        .collect()
}

/// Log-probability of each row of `ids` under `decoder`, summed over the scored tokens: `[batch]`. What DPO, NPO and other
/// pair losses are made of; unlike [`next_token`] it holds the logits of the batch.
///
/// # Errors
/// As [`Decoder::forward`].
pub fn log_probability(
    decoder: &Decoder,
    ids: &[u32],
    batch: usize,
    scored: Option<&[bool]>,
) -> refit_nn::Result<Tensor<1>> {
    let logits = decoder.forward(ids, batch, &mut Run::plain())?;
    let [_, seq, vocab] = logits.dims();
    let device = logits.device();
    let targets = next_targets(ids, batch, scored);
    let chosen: Vec<i32> = targets.iter().map(|t| t.unwrap_or(0) as i32).collect();
    let weights: Vec<f32> = targets.iter().map(|t| f32::from(u8::from(t.is_some()))).collect();
    let chosen = Tensor::<2, Int>::from_data(TensorData::new(chosen, [batch * seq, 1]), &device);
    let weights = Tensor::<2>::from_data(TensorData::new(weights, [batch, seq]), &device);
    let scores = burn::tensor::activation::log_softmax(logits.reshape([batch * seq, vocab]), 1);
    let scores = scores.gather(1, chosen).reshape([batch, seq]) * weights;
    Ok(scores.sum_dim(1).reshape([batch]))
}

/// DPO (Rafailov et al. 2023): `-log σ(β [(chosen - chosen₀) - (rejected - rejected₀)])`, mean over pairs; arguments are
/// log-probabilities `[pairs]`, those of the reference without gradient.
pub fn dpo(
    chosen: Tensor<1>,
    rejected: Tensor<1>,
    chosen_reference: Tensor<1>,
    rejected_reference: Tensor<1>,
    beta: f64,
) -> Tensor<1> {
    let margin = (chosen - chosen_reference) - (rejected - rejected_reference);
    -burn::tensor::activation::log_sigmoid(margin * beta).mean()
}

/// NPO (Zhang et al. 2024): `-2/β log σ(-β (log p - log p₀))`, mean: unlearning that DPO's rejected half leaves.
pub fn npo(rejected: Tensor<1>, reference: Tensor<1>, beta: f64) -> Tensor<1> {
    let ratio = (rejected - reference) * -beta;
    burn::tensor::activation::log_sigmoid(ratio).mean() * (-2.0 / beta)
}

/// Mean squared difference.
pub fn mse<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Tensor<1> {
    (a - b).powi_scalar(2).mean()
}

/// Mean of one minus the cosine along the last dimension.
pub fn cosine<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Tensor<1> {
    let dot = (a.clone() * b.clone()).sum_dim(D - 1);
    let norm = |x: Tensor<D>| (x.powi_scalar(2).sum_dim(D - 1) + 1e-12).sqrt();
    (dot / (norm(a) * norm(b))).mean().neg() + 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Value and analytic slope of a logit loss against finite differences.
    fn check(loss: &LogitLoss, logits: &[f32], rows: usize) {
        let mut slope = logits.to_vec();
        loss(0..rows, &mut slope);
        for i in 0..logits.len() {
            let at = |h: f32| {
                let mut moved = logits.to_vec();
                moved[i] += h;
                loss(0..rows, &mut moved)
            };
            let measured = (at(1e-2) - at(-1e-2)) / 2e-2;
            assert!((measured - f64::from(slope[i])).abs() < 1e-3, "{i}: {measured} {}", slope[i]);
        }
    }

    fn logits() -> Vec<f32> {
        (0..15).map(|i| (i as f32 * 1.3).sin() * 2.0).collect()
    }

    #[test]
    fn logit_losses_follow_finite_differences() {
        let targets = [Some(4), None, Some(0)];
        check(&cross_entropy(&targets, 0.0), &logits(), 3);
        check(&cross_entropy(&targets, 0.2), &logits(), 3);
        let teacher = |rows: Range<usize>, out: &mut [f32]| {
            for (i, o) in out.iter_mut().enumerate() {
                *o = ((rows.start * 5 + i) as f32 * 0.7).cos();
            }
        };
        check(&distill(teacher, 3, 2.0), &logits(), 3);
    }

    #[test]
    fn a_teacher_of_itself_has_no_divergence() {
        let own = logits();
        let loss =
            distill(|rows, out| out.copy_from_slice(&own[rows.start * 5..rows.end * 5]), 3, 1.5);
        let mut slope = own.clone();
        assert!(loss(0..3, &mut slope).abs() < 1e-6);
        assert!(slope.iter().all(|g| g.abs() < 1e-6));
    }

    #[test]
    fn targets_are_the_next_tokens_of_the_row() {
        assert_eq!(next_targets(&[1, 2, 3, 4], 2, None), [Some(2), None, Some(4), None]);
        let scored = [true, false, true, true];
        assert_eq!(next_targets(&[1, 2, 3, 4], 1, Some(&scored)), [None, Some(3), Some(4), None]);
    }

    #[test]
    fn small_losses_have_known_values() {
        let device = burn::tensor::Device::flex();
        let (a, b) = (
            Tensor::<1>::from_floats([3.0, 4.0], &device),
            Tensor::from_floats([4.0, 3.0], &device),
        );
        assert_eq!(mse(a.clone(), b.clone()).into_scalar::<f32>(), 1.0);
        assert!((cosine(a.clone(), b.clone()).into_scalar::<f32>() - 0.04).abs() < 1e-6);
        // Equal margins: log 2.
        let even = dpo(a.clone(), b.clone(), a.clone(), b.clone(), 0.1).into_scalar::<f32>();
        assert!((even - std::f32::consts::LN_2).abs() < 1e-6);
        assert!(
            (npo(a.clone(), a, 0.5).into_scalar::<f32>() - 4.0 * std::f32::consts::LN_2).abs()
                < 1e-5
        );
    }
}
