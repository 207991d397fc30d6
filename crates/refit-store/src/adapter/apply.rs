//! The effective weight of a form: base weight in, base weight with the change taken in out.
//!
//! Sums run in `f64` within one row, and rows are spread over the threads: the result does not depend on how many
//! there are.

use rayon::prelude::*;

use super::form::{Factor, Form, Side, Values};
use crate::architecture::Layout;
use crate::error::{Error, Result};

impl Form {
    /// Takes the change into `weight`, row-major `[out, inputs]` (a kernel flattened, a norm `[n, 1]`, an embedding
    /// `[vocab, dim]`). A DoRA row of norm zero stays zero.
    ///
    /// # Errors
    /// [`Error::AdapterForm`] when the form cannot be merged or its shapes are not those of the weight.
    pub fn apply(&self, weight: &mut [f32], out: usize, inputs: usize) -> Result<()> {
        self.check(weight.len(), out, inputs)?;
        if weight.is_empty() {
            return Ok(());
        }
        match self {
            Self::Lora { a, b, scale, magnitude, .. } => {
                weight.par_chunks_mut(inputs).enumerate().for_each_init(
                    Vec::new,
                    |sum, (row, weight)| {
                        product_row(b, row, a, sum);
                        match magnitude {
                            None => add_row(weight, sum, *scale),
                            Some(magnitude) => dora_row(weight, sum, *scale, magnitude[row]),
                        }
                    },
                );
            }
            Self::EmbeddingLora { a, b, scale } => {
                let (rank, vocab) = (a.rows(), a.columns());
                weight.par_chunks_mut(inputs).enumerate().for_each(|(token, weight)| {
                    for (x, b) in weight.iter_mut().zip(b.values.chunks_exact(rank.max(1))) {
                        let column = a.values[token..].iter().step_by(vocab);
                        let sum: f64 =
                            b.iter().zip(column).map(|(&b, &a)| f64::from(b) * f64::from(a)).sum();
                        *x = (f64::from(*x) + f64::from(*scale) * sum) as f32;
                    }
                });
            }
            Self::Ia3 { factors, side: Side::Output } => {
                weight
                    .par_chunks_mut(inputs)
                    .enumerate()
                    .for_each(|(row, weight)| weight.iter_mut().for_each(|x| *x *= factors[row]));
            }
            Self::Ia3 { factors, side: Side::Input } => weight
                .par_chunks_mut(inputs)
                .enumerate()
                .for_each(|(_, weight)| weight.iter_mut().zip(factors).for_each(|(x, f)| *x *= f)),
            Self::Loha { w1_a, w1_b, w2_a, w2_b, scale } => {
                let buffers = || (Vec::new(), Vec::new());
                weight.par_chunks_mut(inputs).enumerate().for_each_init(
                    buffers,
                    |(first, second), (row, weight)| {
                        product_row(w1_a, row, w1_b, first);
                        product_row(w2_a, row, w2_b, second);
                        first.iter_mut().zip(&*second).for_each(|(x, y)| *x *= y);
                        add_row(weight, first, *scale);
                    },
                );
            }
            Self::Lokr { w1, w2, scale } => {
                let ((rows2, columns2), columns1) = (w2.dims(), w1.dims().1);
                let (w1, w2) = (dense(w1), dense(w2));
                weight.par_chunks_mut(inputs).enumerate().for_each_init(
                    Vec::new,
                    |sum, (row, weight)| {
                        let outer = &w1[row / rows2 * columns1..][..columns1];
                        let inner = &w2[row % rows2 * columns2..][..columns2];
                        sum.clear();
                        sum.extend(outer.iter().flat_map(|x| inner.iter().map(move |y| x * y)));
                        add_row(weight, sum, *scale);
                    },
                );
            }
            Self::LayerNorm { weight: new, .. } => weight.copy_from_slice(new),
            Self::Full { values, .. } => weight.copy_from_slice(&values.values),
            Self::Delta { values, .. } => {
                let add = |(x, d): (&mut f32, &f32)| *x = (f64::from(*x) + f64::from(*d)) as f32;
                weight.iter_mut().zip(&values.values).for_each(add);
            }
            Self::Bottleneck { .. } | Self::Heads { .. } => {
                unreachable!("invariant: refused by the check")
            }
        }
        Ok(())
    }

    /// As [`apply`](Self::apply), for a tensor as the base stores it: GPT-2's `[in, out]` matrices are transposed on
    /// the way, kernels flattened. Tensors that replace the base's are in its layout already.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn apply_stored(&self, weight: &mut [f32], shape: &[usize], layout: Layout) -> Result<()> {
        match (layout, shape) {
            (Layout::InOut, &[inputs, out])
                if !matches!(self, Self::Full { .. } | Self::Delta { .. }) =>
            {
                self.check(weight.len(), out, inputs)?;
                let mut turned = transposed(weight, inputs, out);
                self.apply(&mut turned, out, inputs)?;
                weight.copy_from_slice(&transposed(&turned, out, inputs));
                Ok(())
            }
            _ => {
                let out = shape.first().copied().unwrap_or(1);
                self.apply(weight, out, shape.iter().skip(1).product())
            }
        }
    }

    /// Takes the change into the site's bias `[out]`, where the form has one; false where it leaves the bias alone.
    ///
    /// # Errors
    /// [`Error::AdapterForm`] when the lengths differ.
    pub fn apply_bias(&self, bias: &mut [f32]) -> Result<bool> {
        let check = |found: usize| match found == bias.len() {
            true => Ok(()),
            false => Err(Error::AdapterForm {
                form: self.name(),
                reason: format!("{found} values for a bias of {}", bias.len()),
            }),
        };
        match self {
            Self::Lora { bias: Some(new), scale, .. } => {
                check(new.len())?;
                let add = |(x, new): (&mut f32, &f32)| {
                    *x = (f64::from(*x) + f64::from(*scale) * f64::from(*new)) as f32;
                };
                bias.iter_mut().zip(new).for_each(add);
            }
            Self::Ia3 { factors, side: Side::Output } => {
                check(factors.len())?;
                bias.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor);
            }
            Self::LayerNorm { bias: Some(new), .. } => {
                check(new.len())?;
                bias.copy_from_slice(new);
            }
            Self::Full { tensor, values } if tensor == ".bias" => {
                check(values.values.len())?;
                bias.copy_from_slice(&values.values);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// True where the form also changes the site's bias, if the base has one.
    pub fn changes_bias(&self) -> bool {
        match self {
            Self::Lora { bias, .. } | Self::LayerNorm { bias, .. } => bias.is_some(),
            Self::Ia3 { side, .. } => *side == Side::Output,
            Self::Full { tensor, .. } => tensor == ".bias",
            _ => false,
        }
    }

    fn check(&self, len: usize, out: usize, inputs: usize) -> Result<()> {
        let bad = |reason: String| Error::AdapterForm { form: self.name(), reason };
        if !self.mergeable() {
            return Err(bad(
                "depends on the input and cannot become part of a weight; keep the adapter beside its base"
                    .to_owned(),
            ));
        }
        if out.checked_mul(inputs) != Some(len) {
            return Err(bad(format!("a weight of {len} elements is not [{out}, {inputs}]")));
        }
        let (rows, columns) = self.dims();
        let fits = rows.is_none_or(|rows| rows == out) && columns.is_none_or(|n| n == inputs);
        if !fits || !self.consistent(out) {
            let show = |dim: Option<usize>| dim.map_or("any".to_owned(), |dim| dim.to_string());
            return Err(bad(format!(
                "made for a weight [{}, {}], not [{out}, {inputs}]",
                show(rows),
                show(columns)
            )));
        }
        Ok(())
    }

    /// Inner dimensions agree and every tensor is as long as its shape says.
    fn consistent(&self, out: usize) -> bool {
        let whole = |v: &Values| v.rows().checked_mul(v.columns()) == Some(v.values.len());
        let pair = |left: &Values, right: &Values| {
            whole(left) && whole(right) && left.columns() == right.rows()
        };
        let factor = |factor: &Factor| match factor {
            Factor::Full(full) => whole(full),
            Factor::LowRank(a, b) => pair(a, b),
        };
        match self {
            Self::Lora { a, b, magnitude, .. } => {
                pair(b, a) && magnitude.as_ref().is_none_or(|magnitude| magnitude.len() == out)
            }
            Self::EmbeddingLora { a, b, .. } => pair(b, a),
            Self::Loha { w1_a, w1_b, w2_a, w2_b, .. } => {
                pair(w1_a, w1_b)
                    && pair(w2_a, w2_b)
                    && (w1_a.rows(), w1_b.columns()) == (w2_a.rows(), w2_b.columns())
            }
            Self::Lokr { w1, w2, .. } => factor(w1) && factor(w2),
            Self::Full { values, .. } | Self::Delta { values, .. } => whole(values),
            Self::Heads { keys, values, .. } => keys.shape == values.shape,
            Self::Ia3 { .. } | Self::LayerNorm { .. } | Self::Bottleneck { .. } => true,
        }
    }
}

/// `sum = left[row, :] right`, in `f64`.
fn product_row(left: &Values, row: usize, right: &Values, sum: &mut Vec<f64>) {
    let columns = right.columns();
    sum.clear();
    sum.resize(columns, 0.0);
    let rank = left.columns();
    let factors = &left.values[row * rank..(row + 1) * rank];
    for (&factor, right) in factors.iter().zip(right.values.chunks_exact(columns.max(1))) {
        let factor = f64::from(factor);
        sum.iter_mut().zip(right).for_each(|(x, &y)| *x += factor * f64::from(y));
    }
}

fn add_row(weight: &mut [f32], sum: &[f64], scale: f32) {
    let scale = f64::from(scale);
    weight.iter_mut().zip(sum).for_each(|(x, y)| *x = (f64::from(*x) + scale * y) as f32);
}

fn dora_row(weight: &mut [f32], sum: &mut [f64], scale: f32, magnitude: f32) {
    let mut squares = 0.0;
    for (x, y) in weight.iter().zip(sum.iter_mut()) {
        *y = f64::from(*x) + f64::from(scale) * *y;
        squares += *y * *y;
    }
    let factor = if squares > 0.0 { f64::from(magnitude) / squares.sqrt() } else { 0.0 };
    weight.iter_mut().zip(sum).for_each(|(x, y)| *x = (factor * *y) as f32);
}

/// A Kronecker factor as a dense matrix.
fn dense(factor: &Factor) -> Vec<f64> {
    match factor {
        Factor::Full(full) => full.values.iter().map(|&x| f64::from(x)).collect(),
        Factor::LowRank(a, b) => {
            let mut sum = Vec::new();
            let rows = (0..a.rows()).flat_map(|row| {
                product_row(a, row, b, &mut sum);
                sum.clone()
            });
            rows.collect()
        }
    }
}

fn transposed(matrix: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut turned = vec![0.0; matrix.len()];
    for (row, line) in matrix.chunks_exact(columns.max(1)).enumerate() {
        for (column, &x) in line.iter().enumerate() {
            turned[column * rows + row] = x;
        }
    }
    turned
}
