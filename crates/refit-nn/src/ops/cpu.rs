//! CPU kernels on plain slices: what the flex backend runs for the hot operations.
//!
//! Each has a slow twin in the tests of [`super`]. Work is split over rows, heads or output columns, never over a sum, so
//! results do not depend on the number of threads.

use gemm::Parallelism;
use rayon::prelude::*;

use super::simd::{erf, exp, fma, simd};
use super::{Activation, AttentionSpec, Precision, bf16, decode};

/// Rows up to which a product is a handful of dot products (decoding) rather than a matrix product.
const MATVEC_ROWS: usize = 6;
/// Query rows that one attention task handles.
const QUERY_BLOCK: usize = 64;
/// Elements below which threads cost more than they bring.
const PARALLEL_ELEMENTS: usize = 1 << 14;

simd! {
    /// Dot product of two slices of equal length.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        const LANES: usize = 64;
        let mut sums = [0.0f32; LANES];
        let (a_blocks, a_tail) = a.as_chunks::<LANES>();
        let (b_blocks, b_tail) = b.as_chunks::<LANES>();
        for (x, y) in a_blocks.iter().zip(b_blocks) {
            for i in 0..LANES {
                sums[i] = fma::<FMA>(x[i], y[i], sums[i]);
            }
        }
        let mut total: f32 = sums.iter().sum();
        for (x, y) in a_tail.iter().zip(b_tail) {
            total += x * y;
        }
        total
    }
}

/// `out[m, n] = x[m, k] · w[n, k]ᵀ + bias[n]`.
pub fn linear(
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    out: &mut [f32],
    k: usize,
    n: usize,
    precision: Precision,
) {
    let m = x.len() / k;
    if m <= MATVEC_ROWS {
        return matvec(x, w, bias, out, k, n);
    }
    if let Some(bias) = bias {
        out.par_chunks_exact_mut(n).for_each(|row| row.copy_from_slice(bias));
    }
    if precision == Precision::Bf16 && bf16::worth(m, k, n) {
        return bf16::product((x, k, 1), (w, 1, k), out, m, k, n, bias.is_some());
    }
    // SAFETY: the three slices hold m*k, n*k and m*n elements, as the strides say.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            bias.is_some(),
            x.as_ptr(),
            1,
            k as isize,
            w.as_ptr(),
            k as isize,
            1,
            1.0,
            1.0,
            false,
            false,
            false,
            if m * n * k < 1 << 20 { Parallelism::None } else { Parallelism::Rayon(0) },
        );
    }
}

fn matvec(x: &[f32], w: &[f32], bias: Option<&[f32]>, out: &mut [f32], k: usize, n: usize) {
    let m = x.len() / k;
    let column = |j: usize, put: &mut dyn FnMut(usize, f32)| {
        let row = &w[j * k..(j + 1) * k];
        let add = bias.map_or(0.0, |b| b[j]);
        for i in 0..m {
            put(i, dot(&x[i * k..(i + 1) * k], row) + add);
        }
    };
    if m == 1 {
        let chunk =
            (n.div_ceil(4 * rayon::current_num_threads())).max(PARALLEL_ELEMENTS.div_ceil(k));
        out.par_chunks_mut(chunk).enumerate().for_each(|(c, out)| {
            for (j, slot) in out.iter_mut().enumerate() {
                column(c * chunk + j, &mut |_, value| *slot = value);
            }
        });
        return;
    }
    // Column-major scratch keeps the writes of one task together.
    let mut scratch = vec![0.0; m * n];
    scratch.par_chunks_mut(m * 64).enumerate().for_each(|(c, block)| {
        for (j, slots) in block.chunks_exact_mut(m).enumerate() {
            column(c * 64 + j, &mut |i, value| slots[i] = value);
        }
    });
    for (j, values) in scratch.chunks_exact(m).enumerate() {
        for (i, value) in values.iter().enumerate() {
            out[i * n + j] = *value;
        }
    }
}

/// Runs `f` on every row of width `width`, on several threads when there is enough to do.
fn rows(x: &[f32], out: &mut [f32], width: usize, f: impl Fn(&[f32], &mut [f32]) + Sync) {
    if x.len() < PARALLEL_ELEMENTS {
        x.chunks_exact(width).zip(out.chunks_exact_mut(width)).for_each(|(x, o)| f(x, o));
    } else {
        let group = (PARALLEL_ELEMENTS / width).max(1) * width;
        x.par_chunks(group).zip(out.par_chunks_mut(group)).for_each(|(x, o)| {
            x.chunks_exact(width).zip(o.chunks_exact_mut(width)).for_each(|(x, o)| f(x, o));
        });
    }
}

/// `x / sqrt(mean(x²) + eps) * weight`, row by row.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let n = weight.len();
    rows(x, out, n, |x, out| {
        let scale = 1.0 / (dot(x, x) / n as f32 + eps).sqrt();
        for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
            *o = x * scale * w;
        }
    });
}

/// `(x - mean) / sqrt(var + eps) * weight + bias`, row by row.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    let n = weight.len();
    rows(x, out, n, |x, out| {
        let mean = x.iter().sum::<f32>() / n as f32;
        for (o, x) in out.iter_mut().zip(x) {
            *o = x - mean;
        }
        let scale = 1.0 / (dot(out, out) / n as f32 + eps).sqrt();
        match bias {
            Some(bias) => {
                for ((o, w), b) in out.iter_mut().zip(weight).zip(bias) {
                    *o = *o * scale * w + b;
                }
            }
            None => {
                for (o, w) in out.iter_mut().zip(weight) {
                    *o = *o * scale * w;
                }
            }
        }
    });
}

simd! {
    fn activate(x: &[f32], out: &mut [f32], kind: Activation) {
        match kind {
            Activation::Silu => for (o, &x) in out.iter_mut().zip(x) {
                *o = x / (1.0 + exp::<FMA>(-x));
            },
            Activation::Gelu => for (o, &x) in out.iter_mut().zip(x) {
                *o = 0.5 * x * (1.0 + erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2));
            },
            Activation::GeluTanh => for (o, &x) in out.iter_mut().zip(x) {
                // 0.5 (1 + tanh u) = 1 / (1 + e^(-2u))
                let u = 0.797_884_6 * (x + 0.044_715 * x * x * x);
                *o = x / (1.0 + exp::<FMA>(-2.0 * u));
            },
            Activation::QuickGelu => for (o, &x) in out.iter_mut().zip(x) {
                *o = x / (1.0 + exp::<FMA>(-1.702 * x));
            },
            Activation::Relu => for (o, &x) in out.iter_mut().zip(x) {
                *o = x.max(0.0);
            },
            Activation::Relu6 => for (o, &x) in out.iter_mut().zip(x) {
                *o = x.clamp(0.0, 6.0);
            },
            Activation::Tanh => for (o, &x) in out.iter_mut().zip(x) {
                *o = 2.0 / (1.0 + exp::<FMA>(-2.0 * x)) - 1.0;
            },
        }
    }
}

/// Elementwise activation.
pub fn activation(x: &[f32], out: &mut [f32], kind: Activation) {
    out.par_chunks_mut(PARALLEL_ELEMENTS)
        .zip(x.par_chunks(PARALLEL_ELEMENTS))
        .for_each(|(out, x)| activate(x, out, kind));
}

/// `activation(gate) * up`, elementwise.
pub fn gated(gate: &[f32], up: &[f32], out: &mut [f32], kind: Activation) {
    let piece = |gate: &[f32], up: &[f32], out: &mut [f32]| {
        activate(gate, out, kind);
        for (o, u) in out.iter_mut().zip(up) {
            *o *= u;
        }
    };
    out.par_chunks_mut(PARALLEL_ELEMENTS)
        .zip(gate.par_chunks(PARALLEL_ELEMENTS))
        .zip(up.par_chunks(PARALLEL_ELEMENTS))
        .for_each(|((out, gate), up)| piece(gate, up, out));
}

/// Copies the rows `ids` of `table [rows, width]` to `out`.
pub fn embedding(table: &[f32], ids: &[u32], out: &mut [f32], width: usize) {
    for (row, &id) in out.chunks_exact_mut(width).zip(ids) {
        row.copy_from_slice(&table[id as usize * width..(id as usize + 1) * width]);
    }
}

/// Rotary position embedding on `x [batch, seq, heads * head_dim]` with tables `cos`, `sin` `[seq, rotary_dim / 2]`.
pub fn rope(x: &mut [f32], cos: &[f32], sin: &[f32], heads: usize, head_dim: usize, seq: usize) {
    let half = cos.len() / seq;
    let row = |position: usize, row: &mut [f32]| {
        let cos = &cos[position * half..(position + 1) * half];
        let sin = &sin[position * half..(position + 1) * half];
        for head in row.chunks_exact_mut(head_dim) {
            let (a, b) = head[..2 * half].split_at_mut(half);
            for i in 0..half {
                let (x, y) = (a[i], b[i]);
                a[i] = x * cos[i] - y * sin[i];
                b[i] = y * cos[i] + x * sin[i];
            }
        }
    };
    let width = heads * head_dim;
    if x.len() < PARALLEL_ELEMENTS {
        x.chunks_exact_mut(width).enumerate().for_each(|(i, r)| row(i % seq, r));
    } else {
        x.par_chunks_exact_mut(width).enumerate().for_each(|(i, r)| row(i % seq, r));
    }
}

simd! {
    /// Turns one row of scores into probabilities: `softmax(softcap(scale * s))` over the visible range, zero elsewhere.
    pub(super) fn softmax_row(scores: &mut [f32], visible_from: usize, visible_to: usize, scale: f32, softcap: f32) {
        let (head, rest) = scores.split_at_mut(visible_from);
        let (live, tail) = rest.split_at_mut(visible_to - visible_from);
        head.fill(0.0);
        tail.fill(0.0);
        let mut top = f32::NEG_INFINITY;
        for s in live.iter_mut() {
            *s *= scale;
            if softcap > 0.0 {
                *s = softcap * (2.0 / (1.0 + exp::<FMA>(-2.0 * *s / softcap)) - 1.0);
            }
        }
        for s in live.iter() {
            top = if *s > top { *s } else { top };
        }
        let mut sums = [0.0f32; 32];
        let (blocks, rest) = live.as_chunks_mut::<32>();
        for block in blocks {
            for i in 0..32 {
                block[i] = exp::<FMA>(block[i] - top);
                sums[i] += block[i];
            }
        }
        let mut sum: f32 = sums.iter().sum();
        for s in rest {
            *s = exp::<FMA>(*s - top);
            sum += *s;
        }
        let inverse = 1.0 / sum;
        for s in live.iter_mut() {
            *s *= inverse;
        }
    }
}

/// Softmax attention on `q [batch, seq, heads*dim]`, `k`, `v` `[batch, keys, kv_heads*dim]`; see [`super::attention`].
#[allow(clippy::too_many_arguments)] // three operands, their three extents, where it goes and how
pub fn attention(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
    batch: usize,
    seq: usize,
    keys: usize,
    spec: &AttentionSpec,
) {
    let (dim, heads, kv_heads) = (spec.head_dim, spec.heads, spec.kv_heads);
    let (q_width, kv_width) = (heads * dim, kv_heads * dim);
    let blocks = seq.div_ceil(QUERY_BLOCK);
    let out = SendPtr(out.as_mut_ptr());
    let task = |index: usize| {
        let (b, rest) = (index / (heads * blocks), index % (heads * blocks));
        let (head, block) = (rest / blocks, rest % blocks);
        let first = block * QUERY_BLOCK;
        let count = QUERY_BLOCK.min(seq - first);
        let kv_head = head / (heads / kv_heads);
        let q = &q[(b * seq + first) * q_width + head * dim..];
        let k = &k[b * keys * kv_width + kv_head * dim..(b + 1) * keys * kv_width];
        let v = &v[b * keys * kv_width + kv_head * dim..(b + 1) * keys * kv_width];
        let limit = spec.visible(b, first + count - 1, keys).end;
        let mut scores = vec![0.0f32; count * limit];
        let out = &out;
        // SAFETY: every task writes its own rows and columns of `out`; the strides stay inside the slices
        // because limit <= keys and the head offsets are below the row widths.
        unsafe {
            if count == 1 {
                decode::scores(&q[..dim], k, kv_width, &mut scores);
            } else {
                gemm::gemm(
                    count,
                    limit,
                    dim,
                    scores.as_mut_ptr(),
                    1,
                    limit as isize,
                    false,
                    q.as_ptr(),
                    1,
                    q_width as isize,
                    k.as_ptr(),
                    kv_width as isize,
                    1,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    Parallelism::None,
                );
            }
            for (i, row) in scores.chunks_exact_mut(limit).enumerate() {
                let visible = spec.visible(b, first + i, keys);
                softmax_row(
                    row,
                    visible.start,
                    visible.end,
                    spec.scale,
                    spec.softcap.unwrap_or(0.0),
                );
            }
            let target = out.0.add((b * seq + first) * q_width + head * dim);
            if count == 1 {
                let target = std::slice::from_raw_parts_mut(target, dim);
                return decode::weighted(&scores, v, kv_width, target);
            }
            gemm::gemm(
                count,
                dim,
                limit,
                target,
                1,
                q_width as isize,
                false,
                scores.as_ptr(),
                1,
                limit as isize,
                v.as_ptr(),
                1,
                kv_width as isize,
                0.0,
                1.0,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    };
    let tasks = batch * heads * blocks;
    if tasks * count_work(seq, keys, dim) < PARALLEL_ELEMENTS {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().for_each(task);
    }
}

fn count_work(seq: usize, keys: usize, dim: usize) -> usize {
    seq.min(QUERY_BLOCK) * keys * dim / 8
}

/// A pointer whose disjoint parts are written by several threads.
#[derive(Clone, Copy)]
pub(super) struct SendPtr(pub(super) *mut f32);
// SAFETY: users write disjoint ranges only (see `attention`).
unsafe impl Send for SendPtr {}
// SAFETY: as above.
unsafe impl Sync for SendPtr {}
