//! Matrices that stay in codes of a few bits while the model runs.
//!
//! ```text
//! y_r = sum_c d_c ( s_rc sum_i q_ri p_i  +  m_rc sum_i p_i ),   x_i ~ d_c p_i
//! ```
//!
//! `q` are the codes of row `r`, `s` and `m` the scale and the smallest value of the group that chunk `c` of 32 inputs lies in,
//! `p` the inputs rounded to 8 bits with a scale `d` for every chunk, as llama.cpp does. The result is that of the dense matrix
//! on the rounded inputs, but for the order of sums: what is lost is half a step of the inputs, `max|x| / 254` in each chunk.
//!
//! Codes of eight rows lie together, chunk after chunk, so that a vector of sums has a row in every lane and nothing is added
//! across lanes. Codes of up to 2 bits take 2, of up to 4 bits 4, all others 8.

mod kernels;

use std::sync::Arc;

use half::f16;
use rayon::prelude::*;
use refit_store::codes::{Coded, Zeros, all_halves};

pub use kernels::{Kernel, kernels};

/// Rows that lie together.
pub(crate) const ROWS: usize = 8;
/// Inputs that share a scale of activations.
pub(crate) const CHUNK: usize = 32;
/// Tokens that are multiplied while a chunk of codes is in registers.
pub(crate) const TOKENS: usize = 4;
/// Tokens whose rounded inputs stay in a core's cache.
const TOKEN_BLOCK: usize = 64;

/// Scales or smallest values, `[tile, group, 8]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Factors {
    /// Exact in half precision.
    Half(Vec<f16>),
    /// As they are.
    Single(Vec<f32>),
}

/// What stands beside the scales.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Offsets {
    /// One zero point.
    Constant(i32),
    /// Zero points `[tile, group, 8]`.
    Integer(Vec<u8>),
    /// Smallest values `[tile, group, 8]`.
    Float(Factors),
}

/// A matrix `[rows, inputs]` of codes, in the order in which kernels read them.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedMatrix {
    rows: usize,
    inputs: usize,
    /// Chunks of a row, the last one padded with zeros.
    chunks: usize,
    /// Bits that a code takes here: 2, 4 or 8.
    width: u8,
    /// Bits that a code needs.
    bits: u8,
    /// Chunks that share a scale.
    span: usize,
    /// `[tile, chunk, 32 * width]` bytes.
    codes: Vec<u8>,
    scales: Factors,
    offsets: Offsets,
}

impl Factors {
    fn of(values: Vec<f32>) -> Self {
        match all_halves(&values) {
            true => Self::Half(values.into_iter().map(f16::from_f32).collect()),
            false => Self::Single(values),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Half(values) => 2 * values.len(),
            Self::Single(values) => 4 * values.len(),
        }
    }

    fn at(&self, index: usize) -> f32 {
        match self {
            Self::Half(values) => values[index].to_f32(),
            Self::Single(values) => values[index],
        }
    }
}

/// `[rows, groups]` to `[tile, group, 8]`, missing rows 0.
fn tiled<T: Copy + Default>(values: &[T], rows: usize, groups: usize) -> Vec<T> {
    let mut out = vec![T::default(); rows.div_ceil(ROWS) * groups * ROWS];
    for (r, row) in values.chunks_exact(groups).enumerate() {
        for (g, value) in row.iter().enumerate() {
            out[((r / ROWS) * groups + g) * ROWS + r % ROWS] = *value;
        }
    }
    out
}

/// Where the code of input `i` of a chunk, in row `r` of a tile, lies: byte, and shift in it.
fn place(width: u8, r: usize, i: usize) -> (usize, u32) {
    // A vector of 32 bytes holds 4 inputs of 8 rows; a byte holds 8 / width inputs that lie far apart.
    let fields = 8 / usize::from(width);
    let run = CHUNK / fields;
    let (field, within) = (i / run, i % run);
    (within / 4 * CHUNK + r * 4 + within % 4, (field * usize::from(width)) as u32)
}

/// Puts a chunk of row `r` where [`place`] says.
fn put<const WIDTH: usize>(row: &[u8; CHUNK], r: usize, out: &mut [u8]) {
    let fields = 8 / WIDTH;
    let run = CHUNK / fields;
    for (v, out) in out.chunks_exact_mut(CHUNK).enumerate() {
        for k in 0..4 {
            let field = |f: usize| row[f * run + 4 * v + k] << (f * WIDTH);
            out[4 * r + k] = (0..fields).fold(0, |byte, f| byte | field(f));
        }
    }
}

impl PackedMatrix {
    /// The matrix in the order of the kernels; `None` where groups are no whole chunks of 32 inputs.
    pub fn new(coded: &Coded) -> Option<Self> {
        let Coded { rows, inputs, bits, group, .. } = *coded;
        let whole = group == inputs || group.is_multiple_of(CHUNK);
        if !whole || rows == 0 || inputs == 0 {
            return None;
        }
        let chunks = inputs.div_ceil(CHUNK);
        let span = if group == inputs { chunks } else { group / CHUNK };
        let width: u8 = match bits {
            0..=2 => 2,
            3..=4 => 4,
            _ => 8,
        };
        let bytes = CHUNK * usize::from(width);
        let mut codes = vec![0u8; rows.div_ceil(ROWS) * chunks * bytes];
        codes.par_chunks_mut(chunks * bytes).enumerate().for_each(|(tile, out)| {
            for r in 0..ROWS.min(rows - tile * ROWS) {
                let row = &coded.codes[(tile * ROWS + r) * inputs..][..inputs];
                for (row, out) in row.chunks(CHUNK).zip(out.chunks_exact_mut(bytes)) {
                    let mut whole = [0u8; CHUNK];
                    whole[..row.len()].copy_from_slice(row);
                    match width {
                        2 => put::<2>(&whole, r, out),
                        4 => put::<4>(&whole, r, out),
                        _ => put::<8>(&whole, r, out),
                    }
                }
            }
        });
        let groups = coded.groups();
        let offsets = match &coded.zeros {
            Zeros::Constant(z) => Offsets::Constant(i32::from(*z)),
            Zeros::Integer(zeros) => Offsets::Integer(tiled(zeros, rows, groups)),
            Zeros::Float(least) => Offsets::Float(Factors::of(tiled(least, rows, groups))),
        };
        let scales = Factors::of(tiled(&coded.scales, rows, groups));
        Some(Self { rows, inputs, chunks, width, bits, span, codes, scales, offsets })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bits that a code needs.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Bytes that it takes in memory.
    pub fn bytes(&self) -> usize {
        let offsets = match &self.offsets {
            Offsets::Constant(_) => 0,
            Offsets::Integer(zeros) => zeros.len(),
            Offsets::Float(least) => least.bytes(),
        };
        self.codes.len() + self.scales.bytes() + offsets
    }

    fn groups(&self) -> usize {
        self.chunks.div_ceil(self.span)
    }

    /// Decodes row `r` into `out` `[inputs]`.
    pub fn decode_row(&self, r: usize, out: &mut [f32]) {
        let (tile, lane) = (r / ROWS, r % ROWS);
        let bytes = CHUNK * usize::from(self.width);
        let mask = ((1u16 << self.width) - 1) as u8;
        for (c, out) in out.chunks_mut(CHUNK).enumerate() {
            let codes = &self.codes[(tile * self.chunks + c) * bytes..][..bytes];
            let at = (tile * self.groups() + c / self.span) * ROWS + lane;
            let scale = self.scales.at(at);
            for (i, x) in out.iter_mut().enumerate() {
                let (byte, shift) = place(self.width, lane, i);
                let q = (codes[byte] >> shift) & mask;
                *x = match &self.offsets {
                    Offsets::Constant(z) => (i32::from(q) - z) as f32 * scale,
                    Offsets::Integer(zeros) => {
                        f32::from(i16::from(q) - i16::from(zeros[at])) * scale
                    }
                    Offsets::Float(least) => f32::from(q) * scale + least.at(at),
                };
            }
        }
    }

    /// The whole matrix, row-major.
    pub fn decode(&self) -> Vec<f32> {
        let mut out = vec![0f32; self.rows * self.inputs];
        out.par_chunks_mut(self.inputs).enumerate().for_each(|(r, row)| self.decode_row(r, row));
        out
    }

    /// `x [m, inputs]` times the transpose, plus `bias [rows]`, into `out` `[m, rows]`, by the fastest kernel of this processor.
    ///
    /// # Panics
    /// When slices are not of these shapes: a bug in the caller.
    pub fn multiply(&self, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
        self.multiply_rounded(&Rounded::new(x, self.inputs), bias, out, kernels::best());
    }

    /// As [`multiply`](Self::multiply), with inputs that are rounded already, by a kernel of choice.
    ///
    /// # Panics
    /// As [`multiply`](Self::multiply).
    pub fn multiply_rounded(
        &self,
        x: &Rounded,
        bias: Option<&[f32]>,
        out: &mut [f32],
        kernel: Kernel,
    ) {
        multiply_by(x, &mut [Product { matrix: self, bias, out }], kernel);
    }

    fn tiles(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }
}

/// One of several products with the same inputs.
#[derive(Debug)]
pub struct Product<'a> {
    /// The weight, `[rows, inputs]`.
    pub matrix: &'a PackedMatrix,
    /// Added to every output, `[rows]`.
    pub bias: Option<&'a [f32]>,
    /// Where the result goes, `[tokens, rows]`.
    pub out: &'a mut [f32],
}

/// Carries out several products with the same inputs, by all threads together.
///
/// # Panics
/// When shapes do not fit: a bug in the caller.
pub fn multiply_all(x: &Rounded, products: &mut [Product]) {
    multiply_by(x, products, kernels::best());
}

fn multiply_by(x: &Rounded, products: &mut [Product], kernel: Kernel) {
    for product in products.iter() {
        assert_eq!(x.chunks, product.matrix.chunks, "invariant: inputs of this matrix");
        assert_eq!(product.out.len(), x.tokens * product.matrix.rows, "invariant: [tokens, rows]");
    }
    // Enough work for a task, enough tasks for the threads.
    let tiles: usize = products.iter().map(|product| product.matrix.tiles()).sum();
    let work = x.chunks * CHUNK * ROWS * x.tokens;
    let least = (1usize << 18).div_ceil(work.max(1));
    let size = tiles.div_ceil(4 * rayon::current_num_threads()).max(least).max(1);
    let mut tasks = Vec::new();
    for product in products.iter_mut() {
        let (matrix, bias) = (product.matrix, product.bias);
        for from in (0..matrix.tiles()).step_by(size) {
            let tiles = from..(from + size).min(matrix.tiles());
            tasks.push(Task { matrix, bias, out: Shared(product.out.as_mut_ptr()), tiles });
        }
    }
    match tiles <= size {
        true => tasks.iter().for_each(|task| task.run(x, kernel)),
        false => tasks.par_iter().with_max_len(1).for_each(|task| task.run(x, kernel)),
    }
}

/// Some tiles of a product.
struct Task<'a> {
    matrix: &'a PackedMatrix,
    bias: Option<&'a [f32]>,
    out: Shared,
    tiles: std::ops::Range<usize>,
}

impl Task<'_> {
    fn run(&self, x: &Rounded, kernel: Kernel) {
        let rows = self.matrix.rows;
        let mut sums = [[0f32; ROWS]; TOKENS];
        for first in (0..x.tokens).step_by(TOKEN_BLOCK) {
            let end = (first + TOKEN_BLOCK).min(x.tokens);
            for tile in self.tiles.clone() {
                let row = tile * ROWS;
                let lanes = ROWS.min(rows - row);
                for token in (first..end).step_by(TOKENS) {
                    let count = TOKENS.min(end - token);
                    kernel.tile(self.matrix, tile, x, token, count, &mut sums);
                    for (t, sums) in sums[..count].iter().enumerate() {
                        // SAFETY: a task owns its tiles, and so these columns of every row of `out`, whose length was checked.
                        let out = unsafe {
                            std::slice::from_raw_parts_mut(
                                self.out.0.add((token + t) * rows + row),
                                lanes,
                            )
                        };
                        out.copy_from_slice(&sums[..lanes]);
                        if let Some(bias) = self.bias {
                            out.iter_mut().zip(&bias[row..]).for_each(|(o, b)| *o += b);
                        }
                    }
                }
            }
        }
    }
}

/// A pointer that tasks write disjoint ranges through.
struct Shared(*mut f32);
// SAFETY: every task writes its own columns; see `Task::run`.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

/// Inputs rounded to 8 bits, chunk by chunk.
#[derive(Debug, Clone, PartialEq)]
pub struct Rounded {
    tokens: usize,
    chunks: usize,
    /// `[tokens, chunks * 32]`, from -127 to 127.
    codes: Vec<i8>,
    /// `[tokens, chunks]`.
    scales: Vec<f32>,
    /// Sum of the codes of every chunk, `[tokens, chunks]`.
    sums: Vec<i32>,
}

impl Rounded {
    /// Rounds `x` `[tokens, inputs]`.
    ///
    /// # Panics
    /// When `x` is no whole number of rows: a bug in the caller.
    pub fn new(x: &[f32], inputs: usize) -> Self {
        assert!(x.len().is_multiple_of(inputs), "invariant: whole rows");
        let (tokens, chunks) = (x.len() / inputs, inputs.div_ceil(CHUNK));
        let mut codes = vec![0i8; tokens * chunks * CHUNK];
        let (mut scales, mut sums) = (vec![0f32; tokens * chunks], vec![0i32; tokens * chunks]);
        let row = |x: &[f32], codes: &mut [i8], scales: &mut [f32], sums: &mut [i32]| {
            for (c, x) in x.chunks(CHUNK).enumerate() {
                (scales[c], sums[c]) = kernels::round_chunk(x, &mut codes[c * CHUNK..][..CHUNK]);
            }
        };
        let parts = x.par_chunks(inputs).zip(codes.par_chunks_mut(chunks * CHUNK));
        let beside = scales.par_chunks_mut(chunks).zip(sums.par_chunks_mut(chunks));
        match tokens {
            0 => {}
            1 => row(x, &mut codes, &mut scales, &mut sums),
            _ => parts.zip(beside).with_min_len(16).for_each(|((x, codes), (scales, sums))| {
                row(x, codes, scales, sums);
            }),
        }
        Self { tokens, chunks, codes, scales, sums }
    }

    /// What the codes stand for, `[tokens, inputs]`.
    pub fn decode(&self, inputs: usize) -> Vec<f32> {
        let row = self.chunks * CHUNK;
        (0..self.tokens * inputs)
            .map(|at| {
                let (token, i) = (at / inputs, at % inputs);
                f32::from(self.codes[token * row + i])
                    * self.scales[token * self.chunks + i / CHUNK]
            })
            .collect()
    }
}

/// A matrix that modules share.
pub type SharedMatrix = Arc<PackedMatrix>;

#[cfg(test)]
mod tests;
