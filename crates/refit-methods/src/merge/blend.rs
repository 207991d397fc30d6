//! Linear combinations of ingredients, and the inner products that their factors follow from.
//!
//! Spherical means, SLERP and Model Stock differ only in the factors: all of them are a weighted sum of
//! the tensors, and the weights follow from the tensors' inner products. One look finds those.

use crate::error::Result;
use crate::merge::group::{Group, Piece};

/// Elements that are added up at a time: an accumulator that stays in registers and first-level cache.
const BLOCK: usize = 512;

/// `base_factor base + sum_k factors[k] inputs[k]`, added up in f64 and rounded once.
pub fn combine(piece: &Piece, base_factor: f64, factors: &[f64], out: &mut [f32]) {
    let mut sum = [0f64; BLOCK];
    for (at, out) in (0..).step_by(BLOCK).zip(out.chunks_mut(BLOCK)) {
        let sum = &mut sum[..out.len()];
        sum.fill(0.0);
        if base_factor != 0.0 && !piece.base.is_empty() {
            add(sum, base_factor, &piece.base[at..]);
        }
        for (factor, input) in factors.iter().zip(&piece.inputs) {
            if *factor != 0.0 {
                add(sum, *factor, &input[at..]);
            }
        }
        out.iter_mut().zip(sum).for_each(|(out, sum)| *out = *sum as f32);
    }
}

fn add(sum: &mut [f64], factor: f64, values: &[f32]) {
    sum.iter_mut().zip(values).for_each(|(sum, x)| *sum += factor * f64::from(*x));
}

/// Inner product with eight accumulators, in an order that does not depend on the machine.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0f64; 8];
    let (left, right) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = left.remainder().iter().zip(right.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in left.zip(right) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f64>() + rest
}

/// Inner products of `count` vectors.
#[derive(Clone, Debug, PartialEq)]
pub struct Gram {
    values: Vec<f64>,
    /// How many vectors.
    pub count: usize,
}

impl Gram {
    /// Of vectors of equal length.
    pub fn of(vectors: &[Vec<f64>]) -> Self {
        let count = vectors.len();
        let mut values = vec![0.0; count * count];
        for i in 0..count {
            for j in 0..=i {
                let product = dot(&vectors[i], &vectors[j]);
                values[i * count + j] = product;
                values[j * count + i] = product;
            }
        }
        Self { values, count }
    }

    /// Adds the products of further elements of the same vectors.
    pub fn add(&mut self, other: &Self) {
        self.values.iter_mut().zip(&other.values).for_each(|(a, b)| *a += b);
    }

    /// `<x_i, x_j>`.
    pub fn at(&self, i: usize, j: usize) -> f64 {
        self.values[i * self.count + j]
    }

    /// `||x_i||`.
    pub fn norm(&self, i: usize) -> f64 {
        self.at(i, i).sqrt()
    }

    /// `|| sum_i c_i x_i ||`.
    pub fn norm_of(&self, coefficients: &[f64]) -> f64 {
        let mut sum = 0.0;
        for (i, a) in coefficients.iter().enumerate() {
            for (j, b) in coefficients.iter().enumerate() {
                sum += a * b * self.at(i, j);
            }
        }
        sum.max(0.0).sqrt()
    }
}

/// Inner products of the inputs over a whole tensor, taken from the base where there is one.
///
/// # Errors
/// As [`Group::scan`].
pub fn gram(group: &Group) -> Result<Gram> {
    let count = group.inputs.len();
    let parts =
        group.scan(|piece| Gram::of(&(0..count).map(|k| piece.delta(k)).collect::<Vec<_>>()))?;
    let mut total = Gram { values: vec![0.0; count * count], count };
    parts.iter().for_each(|part| total.add(part));
    Ok(total)
}
