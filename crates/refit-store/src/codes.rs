//! The codes of a quantized matrix, whatever the format that stores them: what runs packed, and what is packed again.

use half::f16;
use serde::Deserialize;

use crate::artifact::Artifact;
use crate::convert::f16_to_f32;
use crate::dtype::{DType, GgmlType};
use crate::error::Result;
use crate::lattice::Lattice;
use crate::storage::{Entry, View};

/// The file in which refit says what it quantized; the weights beside it are decoded.
pub const RECORD: &str = "refit.quantization.json";

/// What is added to a code before its scale multiplies it, or to the product.
#[derive(Debug, Clone, PartialEq)]
pub enum Zeros {
    /// `w = (q - z) s`, one zero point for all groups.
    Constant(u8),
    /// `w = (q - z) s`, a zero point for every group, `[rows, groups]`.
    Integer(Vec<u8>),
    /// `w = q s + m`, a smallest value for every group, `[rows, groups]`.
    Float(Vec<f32>),
}

/// A matrix `[rows, inputs]` of codes.
#[derive(Debug, Clone, PartialEq)]
pub struct Coded {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub inputs: usize,
    /// Bits that a code needs, 1 to 8.
    pub bits: u8,
    /// Consecutive inputs that share a scale; divides `inputs`.
    pub group: usize,
    /// Row-major, each below `2^bits`.
    pub codes: Vec<u8>,
    /// `[rows, groups]`.
    pub scales: Vec<f32>,
    /// What stands beside the scales.
    pub zeros: Zeros,
}

impl Coded {
    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.inputs / self.group
    }

    /// The weights, row-major.
    pub fn decode(&self) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.codes.len());
        for (at, codes) in self.codes.chunks_exact(self.group).enumerate() {
            let scale = self.scales[at];
            let value = |q: u8| match &self.zeros {
                Zeros::Constant(z) => f32::from(i16::from(q) - i16::from(*z)) * scale,
                Zeros::Integer(zeros) => f32::from(i16::from(q) - i16::from(zeros[at])) * scale,
                Zeros::Float(least) => f32::from(q) * scale + least[at],
            };
            out.extend(codes.iter().map(|&q| value(q)));
        }
        out
    }

    /// From codes that are whole multiples of a step.
    fn of_lattice(
        lattice: Lattice,
        shape: [usize; 2],
        weights: &[f32],
        stored: DType,
    ) -> Option<Self> {
        let found = lattice.find(weights, stored).ok()?;
        let [rows, inputs] = shape;
        let middle = 1i16 << (lattice.bits - 1);
        let (mut codes, mut zeros) = (Vec::with_capacity(found.codes.len()), Vec::new());
        for group in found.codes.chunks_exact(lattice.group) {
            let zero = match lattice.symmetric {
                true => middle,
                false => -group.iter().copied().min().unwrap_or(0).min(0),
            };
            codes.extend(group.iter().map(|q| (q + zero) as u8));
            zeros.push(zero as u8);
        }
        let zeros = match lattice.symmetric {
            true => Zeros::Constant(middle as u8),
            false => Zeros::Integer(zeros),
        };
        Some(Self {
            rows,
            inputs,
            bits: lattice.bits,
            group: lattice.group,
            codes,
            scales: found.steps,
            zeros,
        })
    }
}

impl Artifact {
    /// The codes of the matrix `name`: of GGUF's 32-element blocks, of compressed-tensors and GPTQ, and of weights that refit
    /// quantized and wrote decoded. `None` for everything else: floats, blocks with scales of scales, weights that left the grid
    /// that is claimed for them.
    ///
    /// # Errors
    /// A tensor that is not there or cannot be read.
    pub fn coded(&self, name: &str) -> Result<Option<Coded>> {
        match self.entry(name)?.view {
            View::Factored(_) => Ok(None),
            _ => self.coded_beneath(name),
        }
    }

    /// [`coded`](Self::coded), of the matrix that a compensation is added to where there is one.
    ///
    /// # Errors
    /// As [`coded`](Self::coded).
    pub fn coded_beneath(&self, name: &str) -> Result<Option<Coded>> {
        let entry = self.beneath(name)?;
        let info = &entry.info;
        let &[rows, inputs] = &info.shape[..] else { return Ok(None) };
        if inputs == 0 || rows == 0 {
            return Ok(None);
        }
        match (info.dtype, &entry.view) {
            (DType::Ggml(ggml), _) => return coded_blocks(entry, ggml, rows, inputs),
            (_, View::Packed(packed)) => return packed.coded(),
            (_, View::Factored(_)) => return Ok(None),
            _ => {}
        }
        let Some(lattice) = self.recorded_lattice(name) else { return Ok(None) };
        if lattice.group == 0 || !inputs.is_multiple_of(lattice.group) {
            return Ok(None);
        }
        let mut weights = vec![0.0; info.numel()];
        entry.read_f32(0, &mut weights)?;
        Ok(Coded::of_lattice(lattice, [rows, inputs], &weights, info.dtype))
    }

    /// What refit's own record says of a tensor's grid. A claim: whoever relies on it looks at the weights.
    pub fn recorded_lattice(&self, name: &str) -> Option<Lattice> {
        #[derive(Deserialize)]
        struct Record {
            tensors: std::collections::BTreeMap<String, Lattice>,
        }
        let file = self.side_files().iter().find(|file| file.name == RECORD)?;
        let record: Record = serde_json::from_slice(&file.read().ok()?).ok()?;
        record.tensors.get(name).copied().filter(|lattice| (2..=8).contains(&lattice.bits))
    }
}

/// The codes of GGUF's 32-element blocks.
fn coded_blocks(
    entry: &Entry,
    ggml: GgmlType,
    rows: usize,
    inputs: usize,
) -> Result<Option<Coded>> {
    let (bits, zero) = match ggml {
        GgmlType::Q4_0 => (4, Some(8)),
        GgmlType::Q5_0 => (5, Some(16)),
        GgmlType::Q8_0 => (8, Some(128)),
        GgmlType::Q4_1 => (4, None),
        GgmlType::Q5_1 => (5, None),
        _ => return Ok(None),
    };
    let mut raw = vec![0; entry.info.nbytes as usize];
    entry.read_raw(0, &mut raw)?;
    let count = rows * inputs / 32;
    let (mut codes, mut scales, mut least) =
        (vec![0u8; rows * inputs], Vec::with_capacity(count), Vec::new());
    let half = |block: &[u8], at: usize| f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]));
    for (block, codes) in raw.chunks_exact(ggml.block_bytes()).zip(codes.chunks_exact_mut(32)) {
        scales.push(half(block, 0));
        let mut rest = &block[2..];
        if zero.is_none() {
            least.push(half(block, 2));
            rest = &block[4..];
        }
        if bits == 8 {
            codes.iter_mut().zip(rest).for_each(|(code, byte)| *code = byte ^ 0x80);
            continue;
        }
        let mut high = 0;
        if bits == 5 {
            high = u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]);
            rest = &rest[4..];
        }
        for (j, byte) in rest[..16].iter().enumerate() {
            codes[j] = (byte & 15) | (((high >> j) & 1) << 4) as u8;
            codes[j + 16] = (byte >> 4) | (((high >> (j + 16)) & 1) << 4) as u8;
        }
    }
    let zeros = match zero {
        Some(zero) => Zeros::Constant(zero),
        None => Zeros::Float(least),
    };
    Ok(Some(Coded { rows, inputs, bits, group: 32, codes, scales, zeros }))
}

/// Whether every scale is exact in half precision.
pub fn all_halves(values: &[f32]) -> bool {
    values.iter().all(|x| f16::from_f32(*x).to_f32() == *x)
}
