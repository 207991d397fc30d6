//! Multinomial logistic regression on features: the head of a linear probe.
//!
//! ```text
//! min over W, b of  mean over i of CE(W z_i + b, y_i) + λ/2 |W|²,   z = (x - μ) / σ
//! ```
//!
//! Columns are standardized inside, so that one λ means the same for every encoder, and the result is folded back:
//! `W / σ` and `b - (W / σ) μ` see the features as they are. A head without bias cannot hold the mean: its columns are divided
//! by their root mean square alone. The problem is convex; [`lbfgs`] solves it until no component of the gradient exceeds
//! [`TOLERANCE`]. λ is chosen on a part of the examples that a seed holds out, by cross-entropy, and the head is then fitted to
//! all of them.

pub mod lbfgs;

use gemm::Parallelism;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::rng::SplitMix64;

/// The grid of penalties, strongest first: each fit starts where the one before ended.
pub const GRID: [f64; 7] = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6];
/// Largest component of the gradient at the end.
pub const TOLERANCE: f64 = 1e-6;
/// Most steps of one fit.
pub const ITERATIONS: usize = 2000;
/// Rows per product.
const CHUNK: usize = 256;
/// Parts whose sums are added in order: the same bits for any number of threads.
const PARTS: usize = 16;

/// Features and labels.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// `[examples, width]`.
    pub features: &'a [f32],
    /// One class each.
    pub labels: &'a [u32],
    /// Number of classes.
    pub classes: usize,
    /// Columns of the features.
    pub width: usize,
    /// Whether the head has a bias.
    pub bias: bool,
}

/// How a head is fitted.
#[derive(Debug, Clone)]
pub struct Options {
    /// λ; chosen among [`GRID`] when absent.
    pub l2: Option<f64>,
    /// Share of each class that is held out to choose it.
    pub dev_share: f64,
    /// Seed of that choice.
    pub seed: u64,
}

/// One λ on the held-out part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// λ.
    pub l2: f64,
    /// Share of the held-out examples that are right.
    pub accuracy: f64,
    /// Mean cross-entropy on them, nats.
    pub cross_entropy: f64,
}

/// A linear head.
#[derive(Debug, Clone)]
pub struct Head {
    /// `[classes, width]`.
    pub weight: Vec<f32>,
    /// `[classes]`.
    pub bias: Option<Vec<f32>>,
}

/// A fitted head and how it came about.
#[derive(Debug, Clone)]
pub struct Fit {
    /// The head, for features as they are.
    pub head: Head,
    /// λ.
    pub l2: f64,
    /// Mean cross-entropy of the examples under the head, nats.
    pub cross_entropy: f64,
    /// Share of the examples that it gets right.
    pub accuracy: f64,
    /// Steps of the last fit.
    pub iterations: usize,
    /// Whether it converged.
    pub converged: bool,
    /// The penalties that were tried.
    pub trials: Vec<Trial>,
    /// Examples that were held out for them.
    pub held_out: usize,
}

impl Head {
    /// Logits `[examples, classes]` of features `[examples, width]`.
    pub fn logits(&self, features: &[f32], width: usize) -> Vec<f32> {
        let row = |x: &[f32]| {
            let logit = |(class, w): (usize, &[f32])| {
                let dot: f64 = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                (dot + self.bias.as_ref().map_or(0.0, |b| f64::from(b[class]))) as f32
            };
            self.weight.chunks_exact(width).enumerate().map(logit).collect::<Vec<f32>>()
        };
        features.par_chunks_exact(width).flat_map_iter(row).collect()
    }
}

/// Fits a head.
///
/// # Errors
/// Features that are not finite or do not fit the labels, labels outside the classes, a class with fewer than two examples.
pub fn fit(problem: &Problem, options: &Options) -> Result<Fit> {
    check(problem)?;
    let all: Vec<usize> = (0..problem.labels.len()).collect();
    let (mut trials, mut held_out) = (Vec::new(), 0);
    let l2 = match options.l2 {
        Some(l2) => l2,
        None => {
            let (dev, train) = hold_out(problem, options.dev_share, options.seed);
            held_out = dev.len();
            let scale = Scale::of(problem, &train);
            let mut start = scale.start(problem);
            for l2 in GRID {
                let found = solve(problem, &train, &scale, l2, start);
                let head = scale.fold(problem, &found.x);
                let (cross_entropy, accuracy) = measure(problem, &dev, &head);
                trials.push(Trial { l2, accuracy, cross_entropy });
                start = found.x;
            }
            // The first of equals is the simpler head.
            let best = trials.iter().min_by(|a, b| a.cross_entropy.total_cmp(&b.cross_entropy));
            best.map_or(GRID[0], |trial| trial.l2)
        }
    };
    let scale = Scale::of(problem, &all);
    let found = solve(problem, &all, &scale, l2, scale.start(problem));
    let head = scale.fold(problem, &found.x);
    let (cross_entropy, accuracy) = measure(problem, &all, &head);
    let (iterations, converged) = (found.iterations, found.converged);
    Ok(Fit { head, l2, cross_entropy, accuracy, iterations, converged, trials, held_out })
}

fn check(problem: &Problem) -> Result<()> {
    let Problem { features, labels, classes, width, .. } = *problem;
    if labels.is_empty() || width == 0 {
        return Err(Error::EmptyText { what: "no labelled examples".into() });
    }
    if features.len() != labels.len() * width {
        let what = "features do not match examples × width".into();
        return Err(Error::Length { what, left: features.len(), right: labels.len() * width });
    }
    let mut counts = vec![0usize; classes];
    for (item, &label) in labels.iter().enumerate() {
        let label = label as usize;
        *counts.get_mut(label).ok_or(Error::Label { item, label, classes })? += 1;
    }
    if let Some(class) = counts.iter().position(|&count| count < 2) {
        return Err(Error::FewExamples { class, examples: counts[class] });
    }
    if let Some(at) = features.iter().position(|x| !x.is_finite()) {
        return Err(Error::Feature { item: at / width, column: at % width });
    }
    Ok(())
}

/// `share` of each class, at least one example and never all, and the rest; both in the order of the examples.
fn hold_out(problem: &Problem, share: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let mut by_class = vec![Vec::new(); problem.classes];
    problem.labels.iter().enumerate().for_each(|(i, &label)| by_class[label as usize].push(i));
    let mut dev = Vec::new();
    for (class, mut examples) in by_class.into_iter().enumerate() {
        let mut rng = SplitMix64::stream(seed, class as u64);
        for i in (1..examples.len()).rev() {
            examples.swap(i, rng.below(i + 1));
        }
        let wanted = (share * examples.len() as f64).round() as usize;
        let count = wanted.clamp(1, (examples.len() - 1).max(1));
        dev.extend(examples.into_iter().take(count));
    }
    dev.sort_unstable();
    let held: std::collections::HashSet<usize> = dev.iter().copied().collect();
    let train = (0..problem.labels.len()).filter(|i| !held.contains(i)).collect();
    (dev, train)
}

/// Mean and deviation of every column.
struct Scale {
    mean: Vec<f64>,
    deviation: Vec<f64>,
}

impl Scale {
    fn of(problem: &Problem, rows: &[usize]) -> Self {
        let width = problem.width;
        let n = rows.len() as f64;
        let row = |i: usize| &problem.features[i * width..(i + 1) * width];
        let mut mean = vec![0.0; width];
        if problem.bias {
            for &i in rows {
                mean.iter_mut().zip(row(i)).for_each(|(m, x)| *m += f64::from(*x) / n);
            }
        }
        let mut deviation = vec![0.0; width];
        for &i in rows {
            let centred = row(i).iter().zip(&mean).map(|(x, m)| f64::from(*x) - m);
            deviation.iter_mut().zip(centred).for_each(|(d, x)| *d += x * x / n);
        }
        for (d, m) in deviation.iter_mut().zip(&mean) {
            *d = d.sqrt();
            // A constant column says nothing, and dividing by its rounding would: its weight stays 0.
            if *d <= 1e-7 * m.abs().max(1e-30) {
                *d = f64::INFINITY;
            }
        }
        Self { mean, deviation }
    }

    /// Zeros: all classes alike.
    fn start(&self, problem: &Problem) -> Vec<f64> {
        vec![0.0; problem.classes * (problem.width + usize::from(problem.bias))]
    }

    /// The head on features as they are, from one on standardized ones, `[classes, width]` and then biases.
    fn fold(&self, problem: &Problem, x: &[f64]) -> Head {
        let (weights, biases) = x.split_at(problem.classes * problem.width);
        let scaled = |row: &[f64]| -> Vec<f64> {
            row.iter().zip(&self.deviation).map(|(w, d)| w / d).collect()
        };
        let rows: Vec<Vec<f64>> = weights.chunks_exact(problem.width).map(scaled).collect();
        let bias = problem.bias.then(|| {
            let shifted = |(b, row): (&f64, &Vec<f64>)| {
                let shift: f64 = row.iter().zip(&self.mean).map(|(w, m)| w * m).sum();
                (b - shift) as f32
            };
            biases.iter().zip(&rows).map(shifted).collect()
        });
        Head { weight: rows.concat().into_iter().map(|w| w as f32).collect(), bias }
    }
}

fn solve(
    problem: &Problem,
    rows: &[usize],
    scale: &Scale,
    l2: f64,
    start: Vec<f64>,
) -> lbfgs::Minimum {
    let matrix = problem.classes * problem.width;
    lbfgs::minimize(
        |x| {
            let (mut value, mut gradient) = loss(problem, rows, scale, x);
            for (g, w) in gradient[..matrix].iter_mut().zip(x) {
                value += 0.5 * l2 * w * w;
                *g += l2 * w;
            }
            (value, gradient)
        },
        start,
        TOLERANCE,
        ITERATIONS,
    )
}

/// Mean cross-entropy of `rows` and its gradient.
fn loss(problem: &Problem, rows: &[usize], scale: &Scale, x: &[f64]) -> (f64, Vec<f64>) {
    let part = rows.len().div_ceil(PARTS).next_multiple_of(CHUNK);
    let sums: Vec<(f64, Vec<f64>)> = rows
        .par_chunks(part)
        .map(|part| {
            let (mut value, mut gradient) = (0.0, vec![0.0; x.len()]);
            for chunk in part.chunks(CHUNK) {
                value += chunk_loss(problem, chunk, scale, x, &mut gradient);
            }
            (value, gradient)
        })
        .collect();
    let n = rows.len() as f64;
    let mut total = (0.0, vec![0.0; x.len()]);
    for (value, gradient) in sums {
        total.0 += value / n;
        total.1.iter_mut().zip(gradient).for_each(|(t, g)| *t += g / n);
    }
    total
}

/// Adds the gradient of some rows' summed cross-entropy; returns that sum.
fn chunk_loss(
    problem: &Problem,
    rows: &[usize],
    scale: &Scale,
    x: &[f64],
    gradient: &mut [f64],
) -> f64 {
    let Problem { features, labels, classes, width, bias, .. } = *problem;
    let (weights, biases) = x.split_at(classes * width);
    let mut z = Vec::with_capacity(rows.len() * width);
    for &i in rows {
        let row = features[i * width..(i + 1) * width].iter();
        let moments = scale.mean.iter().zip(&scale.deviation);
        z.extend(row.zip(moments).map(|(x, (m, d))| (f64::from(*x) - m) / d));
    }
    let mut logits = vec![0.0; rows.len() * classes];
    // logits [rows, classes] = z [rows, width] · Wᵀ
    product(
        &mut logits,
        classes,
        &z,
        (width, 1),
        weights,
        (1, width),
        [rows.len(), classes, width],
    );
    let mut value = 0.0;
    for (logits, &i) in logits.chunks_exact_mut(classes).zip(rows) {
        logits.iter_mut().zip(biases).for_each(|(l, b)| *l += b);
        let label = labels[i] as usize;
        let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let own = logits[label] - top;
        logits.iter_mut().for_each(|l| *l = (*l - top).exp());
        let sum: f64 = logits.iter().sum();
        value += sum.ln() - own;
        logits.iter_mut().for_each(|l| *l /= sum);
        logits[label] -= 1.0;
    }
    let (by_weight, by_bias) = gradient.split_at_mut(classes * width);
    // dW [classes, width] += (p - y)ᵀ · z
    product(by_weight, width, &logits, (1, classes), &z, (width, 1), [classes, width, rows.len()]);
    if bias {
        for row in logits.chunks_exact(classes) {
            by_bias.iter_mut().zip(row).for_each(|(b, g)| *b += g);
        }
    }
    value
}

/// `out [m, n] += a [m, k] · b [k, n]`, where `a` and `b` are given with their strides between rows and columns.
fn product(
    out: &mut [f64],
    out_row: usize,
    a: &[f64],
    (a_row, a_column): (usize, usize),
    b: &[f64],
    (b_row, b_column): (usize, usize),
    [m, n, k]: [usize; 3],
) {
    assert!(m > 0 && n > 0 && k > 0, "invariant: no empty products");
    assert!((m - 1) * out_row + n <= out.len(), "invariant: the result fits");
    assert!((m - 1) * a_row + (k - 1) * a_column < a.len(), "invariant: a is whole");
    assert!((k - 1) * b_row + (n - 1) * b_column < b.len(), "invariant: b is whole");
    // SAFETY: every index that the sizes and strides give lies inside its slice, as asserted above; `out` is borrowed
    // mutably and overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_row as isize,
            true,
            a.as_ptr(),
            a_column as isize,
            a_row as isize,
            b.as_ptr(),
            b_column as isize,
            b_row as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// Mean cross-entropy and accuracy of a head on some rows.
fn measure(problem: &Problem, rows: &[usize], head: &Head) -> (f64, f64) {
    let width = problem.width;
    let one = |&i: &usize| {
        let logits = head.logits(&problem.features[i * width..(i + 1) * width], width);
        let label = problem.labels[i] as usize;
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|l| f64::from(l - top).exp()).sum();
        let right = logits.iter().position(|l| *l == top) == Some(label);
        (sum.ln() - f64::from(logits[label] - top), right)
    };
    let found: Vec<(f64, bool)> = rows.par_iter().map(one).collect();
    let n = rows.len().max(1) as f64;
    let right = found.iter().filter(|(_, right)| *right).count();
    (found.iter().map(|(loss, _)| loss).sum::<f64>() / n, right as f64 / n)
}

#[cfg(test)]
mod tests;
