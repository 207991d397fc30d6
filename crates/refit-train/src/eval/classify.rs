//! Accuracy of classifiers and agreement of embeddings.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::stats::{self, Interval};

/// Anything that scores classes for numbered items: an image classifier over a data set, a probe on
/// features, a language model over answer options.
pub trait Scorer {
    /// Number of classes.
    fn classes(&self) -> usize;
    /// Scores of some items, `items × classes`, larger is better.
    ///
    /// # Errors
    /// Whatever reading or running the items meets.
    fn scores(&self, items: Range<usize>) -> Result<Vec<f32>>;
}

/// Accuracy with its uncertainty.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Share of items whose label has the best score, with the 95 % Wilson interval.
    pub top1: Interval,
    /// Share of items whose label is among the best five; absent for fewer than six classes.
    pub top5: Option<Interval>,
    /// Mean of the accuracies of the classes that occur.
    pub balanced: f64,
    /// Number of items.
    pub items: usize,
    /// Whether each item is right, for paired tests between models.
    #[serde(skip)]
    pub correct: Vec<bool>,
}

/// Accuracy of scores, `items × classes`. Ties go to the class with the smaller index, and a NaN
/// never wins.
///
/// # Errors
/// No items, a number of scores that does not fit, labels outside the classes.
pub fn accuracy(scores: &[f32], classes: usize, labels: &[usize]) -> Result<Accuracy> {
    if labels.is_empty() || classes == 0 {
        return Err(Error::EmptyText { what: "no labelled items".into() });
    }
    if scores.len() != labels.len() * classes {
        let what = "scores do not match items × classes".into();
        return Err(Error::Length { what, left: scores.len(), right: labels.len() * classes });
    }
    if let Some((item, &label)) = labels.iter().enumerate().find(|&(_, &label)| label >= classes) {
        return Err(Error::Label { item, label, classes });
    }
    let ranks: Vec<usize> =
        scores.chunks_exact(classes).zip(labels).map(|(s, &l)| rank(s, l)).collect();
    let share = |k: usize| {
        let hits = ranks.iter().filter(|&&rank| rank < k).count() as u64;
        stats::wilson_interval(hits, ranks.len() as u64, 0.95).expect("invariant: items exist")
    };
    let correct: Vec<bool> = ranks.iter().map(|&rank| rank == 0).collect();
    let mut by_class = vec![(0usize, 0usize); classes];
    for (&label, &right) in labels.iter().zip(&correct) {
        by_class[label].0 += usize::from(right);
        by_class[label].1 += 1;
    }
    let recalls: Vec<f64> =
        by_class.iter().filter(|c| c.1 > 0).map(|c| c.0 as f64 / c.1 as f64).collect();
    Ok(Accuracy {
        top1: share(1),
        top5: (classes > 5).then(|| share(5)),
        balanced: recalls.iter().sum::<f64>() / recalls.len() as f64,
        items: labels.len(),
        correct,
    })
}

/// How many classes come before `label`; a label whose own score is NaN comes last.
fn rank(scores: &[f32], label: usize) -> usize {
    let mine = scores[label];
    if mine.is_nan() {
        return scores.len();
    }
    let ahead = |i: &usize| scores[*i] > mine || (scores[*i] == mine && *i < label);
    (0..scores.len()).filter(ahead).count()
}

/// Accuracy of a scorer on items `0..labels.len()`, `batch` of them at a time.
///
/// # Errors
/// As [`accuracy`], and whatever the scorer meets.
pub fn score(
    scorer: &dyn Scorer,
    labels: &[usize],
    batch: usize,
    progress: &dyn Fn(u64, u64),
) -> Result<Accuracy> {
    let mut scores = Vec::with_capacity(labels.len() * scorer.classes());
    for from in (0..labels.len()).step_by(batch.max(1)) {
        let to = (from + batch.max(1)).min(labels.len());
        scores.extend(scorer.scores(from..to)?);
        progress(to as u64, labels.len() as u64);
    }
    accuracy(&scores, scorer.classes(), labels)
}

/// How close two sets of embeddings of the same texts are.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EmbeddingAgreement {
    /// Mean cosine between embeddings of the same text.
    pub mean_cosine: f64,
    /// Smallest cosine.
    pub min_cosine: f64,
    /// Largest difference of any coordinate.
    pub max_abs_difference: f64,
    /// Number of texts.
    pub items: usize,
}

/// Compares embeddings of the same texts by two models. A zero vector has cosine 0 with anything.
///
/// # Errors
/// No texts, or numbers of texts or widths that differ.
pub fn embedding_agreement(a: &[Vec<f32>], b: &[Vec<f32>]) -> Result<EmbeddingAgreement> {
    if a.is_empty() {
        return Err(Error::EmptyText { what: "no embeddings".into() });
    }
    if a.len() != b.len() {
        return Err(Error::Length {
            what: "numbers of embeddings".into(),
            left: a.len(),
            right: b.len(),
        });
    }
    let (mut sum, mut smallest, mut largest_gap) = (0.0, f64::INFINITY, 0.0f64);
    for (item, (x, y)) in a.iter().zip(b).enumerate() {
        if x.len() != y.len() {
            let what = format!("widths of embedding {item}");
            return Err(Error::Length { what, left: x.len(), right: y.len() });
        }
        let dot = |p: &[f32], q: &[f32]| -> f64 {
            p.iter().zip(q).map(|(&p, &q)| f64::from(p) * f64::from(q)).sum()
        };
        let lengths = (dot(x, x) * dot(y, y)).sqrt();
        let cosine = if lengths > 0.0 { dot(x, y) / lengths } else { 0.0 };
        sum += cosine;
        smallest = smallest.min(cosine);
        let gaps = x.iter().zip(y).map(|(p, q)| f64::from((p - q).abs()));
        largest_gap = gaps.fold(largest_gap, f64::max);
    }
    Ok(EmbeddingAgreement {
        mean_cosine: sum / a.len() as f64,
        min_cosine: smallest,
        max_abs_difference: largest_gap,
        items: a.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accuracy_of_a_small_table() {
        let scores = [0.9, 0.1, 0.0, 0.2, 0.2, 0.1, 0.0, 0.3, 0.6];
        let result = accuracy(&scores, 3, &[0, 1, 2]).unwrap();
        // The second item is a tie between 0 and 1, which the smaller index wins.
        assert_eq!(result.correct, [true, false, true]);
        assert!((result.top1.estimate - 2.0 / 3.0).abs() < 1e-12 && result.top5.is_none());
        assert!((result.balanced - 2.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn top_five_and_nan() {
        let scores = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, f32::NAN];
        let result = accuracy(&scores, 7, &[1]).unwrap();
        assert_eq!((result.top1.estimate, result.top5.unwrap().estimate), (0.0, 1.0));
        let lost = accuracy(&[f32::NAN, f32::NAN], 2, &[0]).unwrap();
        assert_eq!(lost.top1.estimate, 0.0);
    }

    #[test]
    fn bad_input_is_named() {
        assert!(matches!(accuracy(&[0.0; 4], 2, &[0, 2]), Err(Error::Label { item: 1, .. })));
        assert!(matches!(accuracy(&[0.0; 3], 2, &[0, 1]), Err(Error::Length { .. })));
        assert!(accuracy(&[], 2, &[]).is_err());
    }

    #[test]
    fn a_scorer_is_asked_in_batches() {
        struct Parity;
        impl Scorer for Parity {
            fn classes(&self) -> usize {
                2
            }
            fn scores(&self, items: Range<usize>) -> Result<Vec<f32>> {
                assert!(items.len() <= 4);
                Ok(items.flat_map(|i| [(i % 2 == 0) as u8 as f32, (i % 2) as f32]).collect())
            }
        }
        let labels: Vec<usize> = (0..10).map(|i| i % 2).collect();
        assert_eq!(score(&Parity, &labels, 4, &|_, _| {}).unwrap().top1.estimate, 1.0);
    }

    #[test]
    fn embeddings_are_compared_pairwise() {
        let a = vec![vec![1.0, 0.0], vec![0.0, 2.0]];
        let b = vec![vec![1.0, 0.0], vec![2.0, 0.0]];
        let result = embedding_agreement(&a, &b).unwrap();
        assert_eq!((result.mean_cosine, result.min_cosine), (0.5, 0.0));
        assert_eq!(result.max_abs_difference, 2.0);
        assert!(embedding_agreement(&a, &b[..1]).is_err());
        assert!(embedding_agreement(&[vec![1.0]], &[vec![1.0, 2.0]]).is_err());
    }
}
