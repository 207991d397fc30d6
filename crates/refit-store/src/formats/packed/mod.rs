//! Packed weights inside safetensors: compressed-tensors and GPTQ.
//!
//! | | tensors of a linear `X` `[out, in]` | a weight |
//! |---|---|---|
//! | compressed-tensors, `pack-quantized` | `X.weight_packed` i32 `[out, ceil(in bits/32)]`; `X.weight_scale` `[out, groups]`; `X.weight_zero_point` i32 `[ceil(out bits/32), groups]`, packed along `out`; `X.weight_shape` | `(q - z) s`; codes and zero points stored plus `2^(bits-1)` |
//! | compressed-tensors, `int-quantized` | `X.weight` i8, `X.weight_scale`, `X.weight_zero_point` i8 | `(q - z) s` |
//! | GPTQ | `X.qweight` i32 `[in bits/32, out]`, packed along `in`; `X.qzeros` i32 `[groups, out bits/32]`; `X.scales` f16 `[groups, out]`; `X.g_idx` i32 `[in]` | `(q - z) s`; version 1 stores `z - 1` |
//!
//! Codes are streams of bits that run on from word to word: 32 codes of 3 bits are three words. Older releases of
//! compressed-tensors leave the bits of a word unused that hold no whole code (10 codes of 3 bits); both are read, told apart by the
//! number of words. Opening presents every such linear as one `F32` tensor `X.weight`, decoded when it is read.

mod bits;
mod open;

use std::borrow::Cow;
use std::sync::Arc;

use crate::codes::{Coded, Zeros};
use crate::convert;
use crate::dtype::DType;
use crate::error::Result;
use crate::storage::{Entry, View};

pub use bits::{code_at, pack_stream, words_of};
pub use open::group_of;
pub(crate) use open::{Opened, open};

/// How the codes of a linear are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// Words along `in`: streams of bits, or (not `dense`) a whole number of codes to each.
    PackQuantized { dense: bool },
    /// One signed byte a code.
    IntQuantized,
    /// A stream of bits along `in`, one column of words per output. `less_one`: zero points are stored minus 1.
    Gptq { less_one: bool },
}

/// A linear in parts.
#[derive(Debug)]
pub(crate) struct Packed {
    pub scheme: Scheme,
    pub bits: u8,
    /// Consecutive inputs that share a scale, where `order` does not say otherwise.
    pub group: usize,
    /// `[out, in]`.
    pub shape: [usize; 2],
    pub codes: Entry,
    pub scales: Entry,
    /// None: symmetric.
    pub zeros: Option<Entry>,
    /// The group of every input (`g_idx`), where it is not `i / group`.
    pub order: Option<Arc<[u32]>>,
    /// Fixed scale and zero point of what the linear reads, where activations have one for all.
    pub input: Option<(f32, f32)>,
}

impl Packed {
    /// Every part, in file order of their names.
    pub fn parts(&self) -> impl Iterator<Item = &Entry> {
        [Some(&self.codes), Some(&self.scales), self.zeros.as_ref()].into_iter().flatten()
    }

    /// Stored bytes of all parts.
    pub fn nbytes(&self) -> u64 {
        self.parts().map(|part| part.info.nbytes).sum()
    }

    /// Whether every zero point is the middle of the codes. Reads all of them.
    pub fn is_symmetric(&self) -> Result<bool> {
        let zeros = self.zeros(0, self.shape[0], self.groups())?;
        let middle = f32::from(1u16 << (self.bits - 1));
        Ok(zeros.is_none_or(|zeros| zeros.iter().all(|&z| z == middle)))
    }

    /// Elements `start..` of the matrix, row-major.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) -> Result<()> {
        let inputs = self.shape[1];
        if out.is_empty() {
            return Ok(());
        }
        let (first, last) = (start / inputs, (start + out.len()).div_ceil(inputs));
        let skip = start - first * inputs;
        if skip == 0 && out.len() == (last - first) * inputs {
            return self.read_rows(first, out);
        }
        let mut rows = vec![0.0; (last - first) * inputs];
        self.read_rows(first, &mut rows)?;
        out.copy_from_slice(&rows[skip..skip + out.len()]);
        Ok(())
    }

    /// Codes of whole rows from `first` on, as they are stored; the middle of the codes is the zero point of a symmetric grid.
    fn read_codes(&self, first: usize, out: &mut [f32]) -> Result<()> {
        let [outputs, inputs] = self.shape;
        let rows = out.len() / inputs;
        let offset = 1i32 << (self.bits - 1);
        match self.scheme {
            Scheme::PackQuantized { dense } => {
                let words = self.codes.info.shape[1];
                let bytes = read(&self.codes, first * words * 4, rows * words * 4)?;
                for (row, words) in out.chunks_exact_mut(inputs).zip(bytes.chunks_exact(words * 4))
                {
                    for (i, x) in row.iter_mut().enumerate() {
                        *x = match dense {
                            true => code_at(words, i, self.bits, 1, 0),
                            false => bits::word_code(words, i, self.bits),
                        } as f32;
                    }
                }
            }
            Scheme::IntQuantized => {
                let bytes = read(&self.codes, first * inputs, rows * inputs)?;
                for (x, &byte) in out.iter_mut().zip(&bytes) {
                    *x = f32::from(byte as i8) + offset as f32;
                }
            }
            Scheme::Gptq { .. } => {
                // A row is a column of words: it lies all over the tensor.
                let all = whole(&self.codes)?;
                for i in 0..inputs {
                    for (r, row) in out.chunks_exact_mut(inputs).enumerate() {
                        row[i] = code_at(&all, i, self.bits, outputs, first + r) as f32;
                    }
                }
            }
        }
        Ok(())
    }

    /// The whole matrix in codes; `None` where inputs are in no order of groups.
    pub fn coded(&self) -> Result<Option<Coded>> {
        let [rows, inputs] = self.shape;
        if self.order.is_some() || self.group == 0 || !inputs.is_multiple_of(self.group) {
            return Ok(None);
        }
        let mut codes = vec![0.0; rows * inputs];
        self.read_codes(0, &mut codes)?;
        let groups = self.groups();
        let zeros = match self.zeros(0, rows, groups)? {
            Some(zeros) => Zeros::Integer(zeros.into_iter().map(|z| z as u8).collect()),
            None => Zeros::Constant(1 << (self.bits - 1)),
        };
        let codes = codes.into_iter().map(|code| code as u8).collect();
        let (bits, group) = (self.bits, self.group);
        let scales = self.scales(0, rows, groups)?;
        Ok(Some(Coded { rows, inputs, bits, group, codes, scales, zeros }))
    }

    /// Whole rows from `first` on.
    fn read_rows(&self, first: usize, out: &mut [f32]) -> Result<()> {
        let inputs = self.shape[1];
        let rows = out.len() / inputs;
        let offset = 1i32 << (self.bits - 1);
        self.read_codes(first, out)?;
        let groups = self.groups();
        let scales = self.scales(first, rows, groups)?;
        let zeros = self.zeros(first, rows, groups)?;
        for (r, row) in out.chunks_exact_mut(inputs).enumerate() {
            for (i, x) in row.iter_mut().enumerate() {
                let group = match &self.order {
                    Some(order) => order[i] as usize,
                    None => i / self.group,
                };
                let at = r * groups + group;
                *x = (*x - zeros.as_ref().map_or(offset as f32, |zeros| zeros[at])) * scales[at];
            }
        }
        Ok(())
    }

    fn groups(&self) -> usize {
        self.shape[1].div_ceil(self.group)
    }

    /// Scales of some rows, `[rows, groups]`.
    fn scales(&self, first: usize, rows: usize, groups: usize) -> Result<Vec<f32>> {
        let mut scales = vec![0.0; rows * groups];
        match self.scheme {
            Scheme::Gptq { .. } => {
                let outputs = self.shape[0];
                let mut part = vec![0.0; rows];
                for group in 0..groups {
                    self.scales.read_f32(group * outputs + first, &mut part)?;
                    part.iter().enumerate().for_each(|(r, s)| scales[r * groups + group] = *s);
                }
            }
            _ if self.scales.info.numel() == 1 => {
                let mut one = [0.0];
                self.scales.read_f32(0, &mut one)?;
                scales.fill(one[0]);
            }
            _ => self.scales.read_f32(first * groups, &mut scales)?,
        }
        Ok(scales)
    }

    /// Zero points of some rows in the units of the stored codes, `[rows, groups]`.
    fn zeros(&self, first: usize, rows: usize, groups: usize) -> Result<Option<Vec<f32>>> {
        let Some(zeros) = &self.zeros else { return Ok(None) };
        let mut values = vec![0.0; rows * groups];
        match self.scheme {
            Scheme::IntQuantized => {
                zeros.read_f32(first * groups, &mut values)?;
                let offset = f32::from(1u8 << (self.bits - 1));
                values.iter_mut().for_each(|z| *z += offset);
            }
            Scheme::PackQuantized { dense } => {
                let all = whole(zeros)?;
                let per = bits::per_word(self.bits);
                for r in 0..rows {
                    for group in 0..groups {
                        let place = first + r;
                        let zero = match dense {
                            true => code_at(&all, place, self.bits, groups, group),
                            false => {
                                let word = &all[(place / per * groups + group) * 4..][..4];
                                bits::word_code(word, place % per, self.bits)
                            }
                        };
                        values[r * groups + group] = zero as f32;
                    }
                }
            }
            Scheme::Gptq { less_one } => {
                let row = zeros.info.nbytes as usize / groups;
                let words = read(zeros, 0, row * groups)?;
                let mask = (1u32 << self.bits) - 1;
                for group in 0..groups {
                    for r in 0..rows {
                        let z = code_at(&words[group * row..][..row], first + r, self.bits, 1, 0);
                        // Adding one wraps, as in the readers of version 1.
                        let z = if less_one { (z + 1) & mask } else { z };
                        values[r * groups + group] = z as f32;
                    }
                }
            }
        }
        Ok(Some(values))
    }
}

/// All bytes of a stored tensor, without copying where the file can be mapped.
fn whole(entry: &Entry) -> Result<Cow<'_, [u8]>> {
    let range = entry.offset as usize..(entry.offset + entry.info.nbytes) as usize;
    match entry.source.map().and_then(|map| map.get(range)) {
        Some(bytes) if matches!(entry.view, View::Plain) => Ok(Cow::Borrowed(bytes)),
        _ => read(entry, 0, entry.info.nbytes as usize).map(Cow::Owned),
    }
}

fn read(entry: &Entry, start: usize, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    entry.read_raw(start as u64, &mut bytes)?;
    Ok(bytes)
}

/// The only value of a tensor.
fn single(entry: &Entry) -> Result<Option<f32>> {
    let dtype = entry.info.dtype;
    if entry.info.numel() != 1 || matches!(dtype, DType::Ggml(_)) {
        return Ok(None);
    }
    let mut value = [0.0];
    convert::decode(dtype, &read(entry, 0, entry.info.nbytes as usize)?, &mut value);
    Ok(Some(value[0]))
}

/// Integers of a small tensor.
fn integers(entry: &Entry) -> Result<Vec<i64>> {
    let mut bytes = vec![0; entry.info.nbytes as usize];
    entry.read_raw(0, &mut bytes)?;
    if entry.info.dtype == DType::I64 {
        return Ok(bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect());
    }
    let mut values = vec![0.0; entry.info.numel()];
    convert::decode(entry.info.dtype, &bytes, &mut values);
    Ok(values.into_iter().map(|x| x as i64).collect())
}
