//! One tensor of every ingredient, read piece by piece.
//!
//! A piece is the same range of the base and of every input, whole rows of at most about [`PIECE`]
//! elements. Kernels see nothing else, so no merge ever needs a whole tensor in memory: what a method
//! must know of the tensor (norms, angles, thresholds) it finds by looking at the pieces, as often as it
//! must. Tensors whose pieces fit [`HELD`] together are read once and looked at in memory.

use std::sync::{Arc, OnceLock};

use half::{bf16, f16};
use rayon::prelude::*;
use refit_store::DType;

use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::rewrite::check_finite;

/// Elements per piece: small enough that a thread's buffers stay in its cache.
pub const PIECE: usize = 1 << 15;

/// Bytes of f32 values of one group that are kept between two looks.
pub const HELD: usize = 48 << 20;

/// Where an ingredient of an output tensor lies.
#[derive(Clone, Debug)]
pub struct Part {
    /// Index into the models.
    pub model: usize,
    /// The tensor's name there; slices take other layers than the output has.
    pub tensor: String,
    /// Rows that are put into the order of another vocabulary.
    pub rows: Option<Arc<RowMap>>,
}

impl Part {
    /// A tensor as it is stored.
    pub fn plain(model: usize, tensor: impl Into<String>) -> Self {
        Self { model, tensor: tensor.into(), rows: None }
    }
}

/// Where the rows of a vocabulary-indexed tensor come from.
#[derive(Debug)]
pub struct RowMap {
    /// One entry per output row.
    pub rows: Vec<Row>,
    /// The tensor of every model that rows are taken from.
    pub donors: Vec<(usize, String)>,
    /// How many rows belong to tokens; those after them are padding, filled with the mean of these.
    pub tokens: usize,
    /// The padding row, made when it is first needed.
    pub padding: OnceLock<Vec<f32>>,
}

/// One output row.
#[derive(Clone, Debug, PartialEq)]
pub enum Row {
    /// The model's own row of this number.
    Own(usize),
    /// The mean of these rows, `(donor, row)`; of none it is zero.
    Mean(Vec<(usize, usize)>),
    /// The mean of all token rows.
    Padding,
}

/// The same range of every ingredient, in f32.
#[derive(Debug)]
pub struct Piece<'a> {
    /// Number of the piece.
    pub index: usize,
    /// Element that it begins with.
    pub start: usize,
    /// The base's values; empty where there is no base.
    pub base: &'a [f32],
    /// The values of every model beside the base.
    pub inputs: Vec<&'a [f32]>,
}

impl Piece<'_> {
    /// Elements in the piece.
    pub fn len(&self) -> usize {
        self.inputs.first().map_or(self.base.len(), |input| input.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `inputs[k] - base`, or `inputs[k]` without a base, in f64.
    pub fn delta(&self, k: usize) -> Vec<f64> {
        let values = self.inputs[k].iter().map(|x| f64::from(*x));
        match self.base.is_empty() {
            true => values.collect(),
            false => values.zip(self.base).map(|(x, b)| x - f64::from(*b)).collect(),
        }
    }
}

/// One output tensor's ingredients.
pub struct Group<'a> {
    /// All models of the merge.
    pub models: &'a [ModelInput],
    /// The base's tensor.
    pub base: Option<&'a Part>,
    /// The tensors beside the base.
    pub inputs: &'a [Part],
    /// Name of the output tensor.
    pub name: &'a str,
    /// Its shape, which all ingredients have.
    pub shape: &'a [usize],
    /// Seed of random choices.
    pub seed: u64,
    /// A type that values are rounded to when they are read.
    pub rounding: Option<DType>,
    /// Whether all threads work on this tensor, or one.
    pub parallel: bool,
    held: Option<Vec<Vec<f32>>>,
}

impl<'a> Group<'a> {
    /// The ingredients of `name`; nothing is read yet.
    pub fn new(
        models: &'a [ModelInput],
        base: Option<&'a Part>,
        inputs: &'a [Part],
        name: &'a str,
        shape: &'a [usize],
    ) -> Self {
        Self {
            models,
            base,
            inputs,
            name,
            shape,
            seed: 0,
            rounding: None,
            parallel: true,
            held: None,
        }
    }

    /// Elements of the tensor.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements of a row: the last dimension.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1).max(1)
    }

    /// Elements of an entry of the first dimension: a token's row.
    fn width(&self) -> usize {
        self.numel() / self.shape.first().copied().unwrap_or(1).max(1)
    }

    /// Elements of every piece but the last: whole rows.
    fn step(&self) -> usize {
        (PIECE / self.columns()).max(1) * self.columns()
    }

    /// How many pieces there are.
    pub fn pieces(&self) -> usize {
        self.numel().div_ceil(self.step())
    }

    /// Base first.
    fn parts(&self) -> impl Iterator<Item = &'a Part> {
        self.base.into_iter().chain(self.inputs)
    }

    /// Reads the tensors whole, where they are small: what looks twice reads once then.
    ///
    /// # Errors
    /// Files that cannot be read, and values that are not finite.
    pub fn hold(&mut self) -> Result<()> {
        let (numel, parts) = (self.numel(), self.parts().count());
        if parts.saturating_mul(numel).saturating_mul(4) > HELD {
            return Ok(());
        }
        let mut all = Vec::with_capacity(parts);
        for part in self.parts() {
            let mut values = vec![0f32; numel];
            let step = self.step();
            let read = |(at, out): (usize, &mut [f32])| self.read(part, at * step, out);
            match self.parallel {
                true => values.par_chunks_mut(step).enumerate().try_for_each(read)?,
                false => values.chunks_mut(step).enumerate().try_for_each(read)?,
            }
            all.push(values);
        }
        self.held = Some(all);
        Ok(())
    }

    /// Gives the group its values.
    #[cfg(test)]
    pub fn hold_values(&mut self, values: Vec<Vec<f32>>) {
        self.held = Some(values);
    }

    /// Looks at every piece; answers in the order of the pieces, whatever the number of threads.
    ///
    /// # Errors
    /// Files that cannot be read, and values that are not finite.
    pub fn scan<T: Send>(&self, look: impl Fn(&Piece) -> T + Sync) -> Result<Vec<T>> {
        self.each(|piece| Ok(look(piece)))
    }

    /// As [`scan`](Self::scan), with a look that can fail.
    ///
    /// # Errors
    /// As [`scan`](Self::scan), and whatever `look` fails with.
    pub fn each<T: Send>(&self, look: impl Fn(&Piece) -> Result<T> + Sync) -> Result<Vec<T>> {
        let work = |buffers: &mut Vec<Vec<f32>>, index| self.with(index, buffers, &look);
        match self.parallel {
            true => (0..self.pieces()).into_par_iter().map_init(Vec::new, work).collect(),
            false => {
                let mut buffers = Vec::new();
                (0..self.pieces()).map(|index| work(&mut buffers, index)).collect()
            }
        }
    }

    /// Counts over every piece: one tally per thread, joined at the end. Only for sums that do not depend on
    /// their order, such as those of integers.
    ///
    /// # Errors
    /// As [`scan`](Self::scan).
    pub fn tally<T: Send>(
        &self,
        new: impl Fn() -> T + Sync,
        add: impl Fn(&mut T, &Piece) + Sync,
        join: impl Fn(&mut T, T),
    ) -> Result<T> {
        let pieces = self.pieces();
        let stripes = if self.parallel { rayon::current_num_threads().clamp(1, 64) } else { 1 };
        let stripe = |at: usize| -> Result<T> {
            let (mut sum, mut buffers) = (new(), Vec::new());
            for index in pieces * at / stripes..pieces * (at + 1) / stripes {
                self.with(index, &mut buffers, |piece| {
                    add(&mut sum, piece);
                    Ok(())
                })?;
            }
            Ok(sum)
        };
        let sums: Vec<T> = match stripes {
            1 => vec![stripe(0)?],
            _ => (0..stripes).into_par_iter().map(stripe).collect::<Result<_>>()?,
        };
        let mut sums = sums.into_iter();
        let mut total = sums.next().unwrap_or_else(&new);
        sums.for_each(|sum| join(&mut total, sum));
        Ok(total)
    }

    fn with<T>(
        &self,
        index: usize,
        buffers: &mut Vec<Vec<f32>>,
        look: impl FnOnce(&Piece) -> Result<T>,
    ) -> Result<T> {
        let start = index * self.step();
        let len = self.step().min(self.numel() - start);
        let all: Vec<&[f32]> = match &self.held {
            Some(held) => held.iter().map(|values| &values[start..start + len]).collect(),
            None => {
                buffers.resize_with(self.parts().count(), || vec![0f32; self.step()]);
                for (part, buffer) in self.parts().zip(buffers.iter_mut()) {
                    self.read(part, start, &mut buffer[..len])?;
                }
                buffers.iter().map(|buffer| &buffer[..len]).collect()
            }
        };
        let (base, inputs) = all.split_at(usize::from(self.base.is_some()));
        let base = base.first().copied().unwrap_or_default();
        look(&Piece { index, start, base, inputs: inputs.to_vec() })
    }

    /// Reads whole rows of one ingredient.
    fn read(&self, part: &Part, start: usize, out: &mut [f32]) -> Result<()> {
        let model = &self.models[part.model];
        match &part.rows {
            None => model.artifact.read_f32_into(&part.tensor, start, out)?,
            Some(map) => self.read_rows(part, map, start / self.width().max(1), out)?,
        }
        check_finite(&model.source, &part.tensor, out, start)?;
        if let Some(dtype) = self.rounding {
            round(out, dtype);
        }
        Ok(())
    }

    fn read_rows(&self, part: &Part, map: &RowMap, first: usize, out: &mut [f32]) -> Result<()> {
        let columns = self.width().max(1);
        let own = &self.models[part.model].artifact;
        for (row, out) in (first..).zip(out.chunks_mut(columns)) {
            match &map.rows[row] {
                Row::Own(from) => own.read_f32_into(&part.tensor, from * columns, out)?,
                Row::Mean(donors) => {
                    let (mut sum, mut term) = (vec![0f64; columns], vec![0f32; columns]);
                    for (donor, from) in donors {
                        let (model, tensor) = &map.donors[*donor];
                        let artifact = &self.models[*model].artifact;
                        artifact.read_f32_into(tensor, from * columns, &mut term)?;
                        sum.iter_mut().zip(&term).for_each(|(s, x)| *s += f64::from(*x));
                    }
                    let count = donors.len().max(1) as f64;
                    out.iter_mut().zip(&sum).for_each(|(out, s)| *out = (s / count) as f32);
                }
                Row::Padding => {
                    if map.padding.get().is_none() {
                        let mean = self.mean_row(part, map)?;
                        // Another thread may have been first, with the same values.
                        let _ = map.padding.set(mean);
                    }
                    out.copy_from_slice(map.padding.get().map_or(&[][..], Vec::as_slice));
                }
            }
        }
        Ok(())
    }

    /// The mean of all rows that belong to tokens.
    fn mean_row(&self, part: &Part, map: &RowMap) -> Result<Vec<f32>> {
        let columns = self.width().max(1);
        let (mut sum, mut row) = (vec![0f64; columns], vec![0f32; columns]);
        for at in 0..map.tokens {
            self.read_rows(part, map, at, &mut row)?;
            sum.iter_mut().zip(&row).for_each(|(s, x)| *s += f64::from(*x));
        }
        Ok(sum.iter().map(|s| (s / map.tokens.max(1) as f64) as f32).collect())
    }

    /// An error about this tensor.
    pub fn error(&self, problem: impl Into<String>) -> Error {
        Error::tensor("the merge", self.name, problem)
    }
}

/// Rounds values to a narrower type and back.
fn round(values: &mut [f32], dtype: DType) {
    match dtype {
        DType::F16 => values.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
        DType::BF16 => values.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
        _ => {}
    }
}
