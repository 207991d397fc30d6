//! Carries decisions out: reads each tensor in pieces, says it in its new type, writes it.

use rayon::prelude::*;
use refit_store::DType;
use refit_store::formats::gguf::{self, write::Naming};
use refit_store::formats::packed::pack_stream;
use refit_store::lattice::{Codes, Lattice};

use super::decide::{Decision, How, Packing, Parts};
use super::lattices::rounding;
use super::{CheckpointFormat, Export, Target};
use crate::emit::Emitter;
use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::method::Context;
use crate::rewrite::check_finite;

/// Elements that are read at a time, rounded to whole rows and heads.
pub const PIECE: usize = 1 << 20;

/// Writes every tensor.
///
/// # Errors
/// Files that cannot be read or written, values that a type cannot hold, weights that changed since the plan.
pub fn all(
    export: &Export,
    model: &ModelInput,
    decisions: &[Decision],
    emitter: &Emitter,
    cx: &Context,
) -> Result<()> {
    let naming = match export.to {
        Target::Gguf => gguf::write::naming(model.artifact.config()).ok(),
        _ => None,
    };
    decisions.par_iter().with_max_len(1).try_for_each(|decision| {
        let parts = decision.parts();
        if !parts.iter().all(|(name, ..)| emitter.is_done(name)) {
            match (&decision.packed, &decision.source) {
                (Some(packing), Some(source)) => {
                    packed(export, model, decision, source, *packing, emitter)?
                }
                (None, Some(source)) => rows(model, decision, source, naming.as_ref(), emitter)?,
                (_, None) => {
                    if let How::Made(values) = &decision.how {
                        emitter.write_f32(&decision.name, 0, values)?;
                    }
                }
            }
            parts.iter().try_for_each(|(name, ..)| emitter.done(name))?;
        }
        let bytes: u64 = parts.iter().filter_map(|(_, shape, dtype)| dtype.bytes_of(shape)).sum();
        cx.progress.advance(bytes);
        Ok(())
    })
}

/// One tensor, some rows at a time.
fn rows(
    model: &ModelInput,
    decision: &Decision,
    source: &str,
    naming: Option<&Naming>,
    emitter: &Emitter,
) -> Result<()> {
    let artifact = &model.artifact;
    let info = artifact.tensor(source)?;
    let rows = info.shape.first().copied().unwrap_or(1);
    if info.numel() == 0 {
        return Ok(());
    }
    let columns = info.numel() / rows;
    let head = naming.and_then(|naming| naming.head_rows(source, rows));
    let unit = head.unwrap_or(1);
    let step = (PIECE / columns / unit).max(1) * unit;
    let dtype = decision.dtype();
    let row_bytes = info.nbytes as usize / rows;
    for first in (0..rows).step_by(step) {
        let count = step.min(rows - first);
        if dtype == info.dtype && matches!(decision.how, How::Raw | How::Plain) {
            let mut bytes = vec![0; count * row_bytes];
            artifact.read_raw_into(source, (first * row_bytes) as u64, &mut bytes)?;
            let bytes = interleave(bytes, row_bytes, head);
            emitter.write_raw(&decision.name, (first * row_bytes) as u64, &bytes)?;
            continue;
        }
        let mut values = vec![0.0; count * columns];
        artifact.read_f32_into(source, first * columns, &mut values)?;
        check_finite(&model.source, source, &values, first * columns)?;
        let values = interleave(values, columns, head);
        match decision.how {
            How::Codes(lattice) => {
                let found = codes(model, source, &values, lattice, rounding(info.dtype))?;
                let bytes = say(dtype, &found, lattice.group);
                let start = first * bytes.len() / count;
                emitter.write_raw(&decision.name, start as u64, &bytes)?;
            }
            _ => emitter.write_f32(&decision.name, first * columns, &values)?,
        }
    }
    Ok(())
}

/// Rows in the order in which llama.cpp wants those of a head: row `2 j + p` is row `p d/2 + j`.
pub fn interleave<T: Copy>(rows: Vec<T>, width: usize, head: Option<usize>) -> Vec<T> {
    let Some(head) = head else { return rows };
    let mut out = Vec::with_capacity(rows.len());
    for rows in rows.chunks_exact(head * width) {
        for stored in 0..head {
            let row = stored % 2 * (head / 2) + stored / 2;
            out.extend_from_slice(&rows[row * width..(row + 1) * width]);
        }
    }
    out
}

fn codes(
    model: &ModelInput,
    source: &str,
    values: &[f32],
    lattice: Lattice,
    dtype: DType,
) -> Result<Codes> {
    lattice.find(values, dtype).map_err(|group| {
        let problem = format!(
            "group {group} is no longer on the grid that was found while planning; run again when nothing writes to \
             the model"
        );
        Error::tensor(&model.source, source, problem)
    })
}

/// Blocks of a type that holds the codes exactly.
fn say(dtype: DType, found: &Codes, group: usize) -> Vec<u8> {
    let DType::Ggml(ggml) = dtype else { unreachable!("invariant: only block types hold codes") };
    let (len, size) = (ggml.block_len(), ggml.block_bytes());
    let mut bytes = vec![0; found.codes.len() / len * size];
    for (at, (codes, block)) in
        found.codes.chunks_exact(len).zip(bytes.chunks_exact_mut(size)).enumerate()
    {
        gguf::exact(ggml, codes, found.steps[at * len / group], block);
    }
    bytes
}

/// A linear as the parts of its format.
fn packed(
    export: &Export,
    model: &ModelInput,
    decision: &Decision,
    source: &str,
    Packing { parts, lattice }: Packing,
    emitter: &Emitter,
) -> Result<()> {
    let How::Codes(own) = decision.how else { unreachable!("invariant: only codes are packed") };
    let values = model.artifact.read_f32(source)?;
    check_finite(&model.source, source, &values, 0)?;
    let dtype = rounding(model.artifact.tensor(source)?.dtype);
    let found = codes(model, source, &values, own, dtype)?;
    drop(values);
    let table = Table::new(&found, own.group, lattice, [decision.shape[0], decision.shape[1]]);
    let put = |part: &str, bytes: &[u8]| {
        emitter.write_raw(&format!("{}.{part}", decision.name), 0, bytes)
    };
    match parts {
        Parts::Words => {
            put("weight_packed", &table.words())?;
            put("weight_shape", &table.shape.map(|n| (n as i64).to_le_bytes()).concat())?;
            put("weight_scale", &table.scales(false))?;
            if !lattice.symmetric {
                put("weight_zero_point", &table.zero_words())?;
            }
        }
        Parts::Bytes => {
            put("weight", &table.bytes())?;
            put("weight_scale", &table.scales(false))?;
            if !lattice.symmetric {
                put("weight_zero_point", &table.zero_bytes())?;
            }
        }
        Parts::Gptq => {
            let less_one = export.checkpoint_format == CheckpointFormat::Gptq;
            put("qweight", &table.columns())?;
            put("qzeros", &table.zero_columns(less_one))?;
            put("scales", &table.scales(true))?;
            let groups = (0..table.shape[1]).map(|i| (i / lattice.group) as i32);
            put("g_idx", &groups.flat_map(i32::to_le_bytes).collect::<Vec<u8>>())?;
        }
    }
    Ok(())
}

/// A matrix of stored codes: whole numbers from 0 on, with steps and zero points in the groups that are written.
struct Table {
    /// `[out, in]`, row by row.
    stored: Vec<u8>,
    /// `[out, groups]`.
    steps: Vec<f32>,
    /// `[out, groups]`: the stored code that means 0.
    zeros: Vec<u8>,
    shape: [usize; 2],
    groups: usize,
    bits: u8,
}

impl Table {
    /// `own` is the group of the source, which the written one divides.
    fn new(found: &Codes, own: usize, lattice: Lattice, shape: [usize; 2]) -> Self {
        let levels = (1i16 << lattice.bits) - 1;
        let groups = shape[1] / lattice.group;
        let mut stored = Vec::with_capacity(found.codes.len());
        let (mut steps, mut zeros) = (Vec::new(), Vec::new());
        for (at, codes) in found.codes.chunks_exact(lattice.group).enumerate() {
            let least = codes.iter().copied().min().unwrap_or(0).min(0);
            let most = codes.iter().copied().max().unwrap_or(0).max(0);
            let zero = match lattice.symmetric {
                true => 1 << (lattice.bits - 1),
                // Not 0 if that can be: version 1 of GPTQ has no word for it.
                false => (-least).max(1).min(levels - most),
            };
            steps.push(found.steps[at * lattice.group / own]);
            zeros.push(zero as u8);
            stored.extend(codes.iter().map(|code| (code + zero) as u8));
        }
        Self { stored, steps, zeros, shape, groups, bits: lattice.bits }
    }

    /// Scales in half precision, `[out, groups]` or transposed.
    fn scales(&self, transposed: bool) -> Vec<u8> {
        let half = |step: f32| half::f16::from_f32(step).to_le_bytes();
        match transposed {
            false => self.steps.iter().flat_map(|&step| half(step)).collect(),
            true => (0..self.groups)
                .flat_map(|group| self.steps.iter().skip(group).step_by(self.groups))
                .flat_map(|&step| half(step))
                .collect(),
        }
    }

    /// `[out, in bits/32]`: every output is a row of words.
    fn words(&self) -> Vec<u8> {
        let rows = self.stored.chunks_exact(self.shape[1]);
        rows.flat_map(|row| pack_stream(row.iter().map(|&code| u32::from(code)), self.bits))
            .flat_map(u32::to_le_bytes)
            .collect()
    }

    /// `[out bits/32, groups]`: the zero points of a group are a column of words.
    fn zero_words(&self) -> Vec<u8> {
        let columns: Vec<Vec<u32>> =
            (0..self.groups).map(|group| self.zero_stream(group, 0)).collect();
        let words = columns.first().map_or(0, Vec::len);
        (0..words)
            .flat_map(|word| columns.iter().map(move |column| column[word]))
            .flat_map(u32::to_le_bytes)
            .collect()
    }

    /// The zero points of one group of all outputs, less a number, as a stream.
    fn zero_stream(&self, group: usize, less: u32) -> Vec<u32> {
        let mask = (1u32 << self.bits) - 1;
        let zeros = self.zeros.iter().skip(group).step_by(self.groups);
        pack_stream(zeros.map(|&zero| u32::from(zero).wrapping_sub(less) & mask), self.bits)
    }

    /// Codes around 0, as signed bytes.
    fn bytes(&self) -> Vec<u8> {
        let middle = 1u8 << (self.bits - 1);
        self.stored.iter().map(|code| code.wrapping_sub(middle)).collect()
    }

    fn zero_bytes(&self) -> Vec<u8> {
        let middle = 1u8 << (self.bits - 1);
        self.zeros.iter().map(|zero| zero.wrapping_sub(middle)).collect()
    }

    /// `[in bits/32, out]`: every output is a column of words.
    fn columns(&self) -> Vec<u8> {
        let out = self.shape[0];
        let count = self.shape[1] * usize::from(self.bits) / 32;
        let mut bytes = vec![0; count * out * 4];
        for (o, row) in self.stored.chunks_exact(self.shape[1]).enumerate() {
            let words = pack_stream(row.iter().map(|&code| u32::from(code)), self.bits);
            for (w, word) in words.into_iter().enumerate() {
                bytes[(w * out + o) * 4..][..4].copy_from_slice(&word.to_le_bytes());
            }
        }
        bytes
    }

    /// `[groups, out bits/32]`.
    fn zero_columns(&self, less_one: bool) -> Vec<u8> {
        (0..self.groups)
            .flat_map(|group| self.zero_stream(group, u32::from(less_one)))
            .flat_map(u32::to_le_bytes)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_interleaved_as_llama_cpp_reads_them() {
        let rows: Vec<u8> = (0..8).collect();
        assert_eq!(interleave(rows.clone(), 1, Some(4)), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(interleave(rows.clone(), 2, Some(4)), [0, 1, 4, 5, 2, 3, 6, 7]);
        assert_eq!(interleave(rows.clone(), 1, None), rows);
    }

    #[test]
    fn zero_points_stay_in_reach_of_every_code() {
        let found = Codes { codes: vec![-3, 4, 0, 7, 5, 1, -7, -2], steps: vec![1.0; 4] };
        let lattice = Lattice { bits: 3, symmetric: false, group: 2 };
        let table = Table::new(&found, 2, lattice, [2, 4]);
        // Codes up to 7 leave only zero point 0; the others are at least 1.
        assert_eq!(table.zeros, [3, 0, 1, 7]);
        assert_eq!(table.stored, [0, 7, 0, 7, 6, 2, 0, 5]);
        let symmetric = Lattice { bits: 4, symmetric: true, group: 1 };
        let table = Table::new(&found, 2, symmetric, [2, 4]);
        assert_eq!((table.zeros, table.steps.len()), (vec![8; 8], 8));
        assert_eq!(table.stored[0], 5);
    }
}
