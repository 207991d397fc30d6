//! Backward CPU kernels: gradients of the operations in [`super::cpu`].
//!
//! Sums over rows are taken in fixed groups that are added in order, so that results do not depend on the number of threads.

use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

use super::cpu::{SendPtr, dot, softmax_row};
use super::simd::{erf, exp, fma, simd};
use super::{Activation, AttentionSpec, Precision, bf16};

/// Rows whose column sums one task takes.
const ROW_GROUP: usize = 64;
/// Elements of one task of an elementwise kernel.
const CHUNK: usize = 1 << 14;
/// Query rows that one attention step handles.
const QUERY_BLOCK: usize = 64;
/// Logits that one step of [`head_loss`] holds (16 MB).
const LOGIT_BUDGET: usize = 1 << 22;

/// A matrix operand: values, row stride, column stride.
type Operand<'a> = (&'a [f32], usize, usize);

/// `out[m, n] = a[m, k] · b[k, n]`, added to what `out` holds when `add`.
#[allow(clippy::too_many_arguments)] // two operands, where the product goes, three extents, and how
fn product(
    a: Operand,
    b: Operand,
    out: &mut [f32],
    m: usize,
    k: usize,
    n: usize,
    add: bool,
    precision: Precision,
) {
    debug_assert!(out.len() >= m * n);
    if precision == Precision::Bf16 && bf16::worth(m, k, n) {
        return bf16::product(a, b, out, m, k, n, add);
    }
    let threads = if m * n * k < 1 << 20 { Parallelism::None } else { Parallelism::Rayon(0) };
    // SAFETY: the callers pass slices that hold all elements their strides reach; checked in debug builds by the tests.
    unsafe { raw_product(a, b, out.as_mut_ptr(), n, m, k, n, add, 1.0, threads) }
}

/// # Safety
/// The operands hold every element that their strides reach, `out` has `m` rows of `out_stride >= n`.
#[allow(clippy::too_many_arguments)] // as gemm itself
unsafe fn raw_product(
    a: Operand,
    b: Operand,
    out: *mut f32,
    out_stride: usize,
    m: usize,
    k: usize,
    n: usize,
    add: bool,
    scale: f32,
    threads: Parallelism,
) {
    // SAFETY: promised by the caller.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            out_stride as isize,
            add,
            a.0.as_ptr(),
            a.2 as isize,
            a.1 as isize,
            b.0.as_ptr(),
            b.2 as isize,
            b.1 as isize,
            1.0,
            scale,
            false,
            false,
            false,
            threads,
        );
    }
}

/// Gradient of the input of `x · wᵀ`: `g[m, n] · w[n, k]`.
pub fn linear_x(g: &[f32], w: &[f32], k: usize, n: usize, precision: Precision) -> Vec<f32> {
    let m = g.len() / n;
    let mut out = vec![0.0; m * k];
    product((g, n, 1), (w, k, 1), &mut out, m, n, k, false, precision);
    out
}

/// Gradient of the weight of `x · wᵀ`: `gᵀ[n, m] · x[m, k]`.
pub fn linear_w(g: &[f32], x: &[f32], k: usize, n: usize, precision: Precision) -> Vec<f32> {
    let m = g.len() / n;
    let mut out = vec![0.0; n * k];
    product((g, 1, n), (x, k, 1), &mut out, n, m, k, false, precision);
    out
}

/// Sums over rows in groups, added in order: `f` adds one row of index `i` to a sum of `width` elements.
fn grouped(rows: usize, width: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let parts: Vec<Vec<f32>> = (0..rows.div_ceil(ROW_GROUP))
        .into_par_iter()
        .map(|group| {
            let mut sum = vec![0.0; width];
            for row in group * ROW_GROUP..((group + 1) * ROW_GROUP).min(rows) {
                f(row, &mut sum);
            }
            sum
        })
        .collect();
    let mut total = vec![0.0; width];
    for part in parts {
        for (t, p) in total.iter_mut().zip(part) {
            *t += p;
        }
    }
    total
}

/// Sum of the rows of `g [rows, width]`.
pub fn column_sums(g: &[f32], width: usize) -> Vec<f32> {
    grouped(g.len() / width, width, |row, sum| {
        for (s, g) in sum.iter_mut().zip(&g[row * width..]) {
            *s += g;
        }
    })
}

simd! {
    /// One row of the backward pass of RMSNorm: `dx = r (g w - x̂ mean(g w x̂))`, `dw += g x̂`.
    fn rms_row(x: &[f32], w: &[f32], g: &[f32], eps: f32, dx: &mut [f32], dw: &mut [f32]) {
        let n = x.len();
        let r = 1.0 / (dot(x, x) / n as f32 + eps).sqrt();
        for (((d, x), w), g) in dx.iter_mut().zip(x).zip(w).zip(g) {
            *d = g * w * (x * r);
        }
        let mean = sum(dx) / n as f32;
        for i in 0..n {
            let hat = x[i] * r;
            dx[i] = r * fma::<FMA>(-hat, mean, g[i] * w[i]);
        }
        for ((d, x), g) in dw.iter_mut().zip(x).zip(g) {
            *d += g * (x * r);
        }
    }
}

simd! {
    /// One row of the backward pass of LayerNorm: `dx = r (g w - mean(g w) - x̂ mean(g w x̂))`, `dw += g x̂`.
    fn layer_row(x: &[f32], w: &[f32], g: &[f32], eps: f32, dx: &mut [f32], dw: &mut [f32]) {
        let n = x.len();
        let centre = sum(x) / n as f32;
        for (d, x) in dx.iter_mut().zip(x) {
            *d = x - centre;
        }
        let r = 1.0 / (dot(dx, dx) / n as f32 + eps).sqrt();
        for ((d, c), g) in dw.iter_mut().zip(dx.iter()).zip(g) {
            *d += g * (c * r);
        }
        for ((d, w), g) in dx.iter_mut().zip(w).zip(g) {
            *d = g * w * (*d * r);
        }
        let along = sum(dx) / n as f32;
        for ((d, w), g) in dx.iter_mut().zip(w).zip(g) {
            *d = g * w;
        }
        let mean = sum(dx) / n as f32;
        for (d, x) in dx.iter_mut().zip(x) {
            *d = r * (*d - mean - (x - centre) * r * along);
        }
    }
}

simd! {
    /// Sum of a slice in a fixed order that vectorizes.
    fn sum(x: &[f32]) -> f32 {
        let mut sums = [0.0f32; 32];
        let (blocks, tail) = x.as_chunks::<32>();
        for block in blocks {
            for i in 0..32 {
                sums[i] = fma::<FMA>(1.0, block[i], sums[i]);
            }
        }
        sums.iter().sum::<f32>() + tail.iter().sum::<f32>()
    }
}

type NormRow = fn(&[f32], &[f32], &[f32], f32, &mut [f32], &mut [f32]);

fn norm(
    row: NormRow,
    x: &[f32],
    w: &[f32],
    g: &[f32],
    eps: f32,
    weight: bool,
) -> (Vec<f32>, Option<Vec<f32>>) {
    let n = w.len();
    let mut dx = vec![0.0; x.len()];
    let target = SendPtr(dx.as_mut_ptr());
    let dw = grouped(x.len() / n, n, |i, sum| {
        let target = &target;
        // SAFETY: row `i` is written by this call alone and lies inside `dx`.
        let dx = unsafe { std::slice::from_raw_parts_mut(target.0.add(i * n), n) };
        row(&x[i * n..(i + 1) * n], w, &g[i * n..(i + 1) * n], eps, dx, sum);
    });
    (dx, weight.then_some(dw))
}

/// Gradients of RMSNorm's input and, when `weight`, of its scale.
pub fn rms_norm(
    x: &[f32],
    w: &[f32],
    g: &[f32],
    eps: f32,
    weight: bool,
) -> (Vec<f32>, Option<Vec<f32>>) {
    norm(rms_row, x, w, g, eps, weight)
}

/// Gradients of LayerNorm's input and, when `weight`, of its scale.
pub fn layer_norm(
    x: &[f32],
    w: &[f32],
    g: &[f32],
    eps: f32,
    weight: bool,
) -> (Vec<f32>, Option<Vec<f32>>) {
    norm(layer_row, x, w, g, eps, weight)
}

simd! {
    /// Value and slope of an activation.
    fn slopes(x: &[f32], value: &mut [f32], slope: &mut [f32], kind: Activation) {
        let all = value.iter_mut().zip(slope.iter_mut()).zip(x);
        match kind {
            Activation::Silu => for ((v, d), &x) in all {
                let s = 1.0 / (1.0 + exp::<FMA>(-x));
                *v = x * s;
                *d = s * fma::<FMA>(x, 1.0 - s, 1.0);
            },
            Activation::Gelu => for ((v, d), &x) in all {
                let cdf = 0.5 * (1.0 + erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2));
                *v = x * cdf;
                *d = fma::<FMA>(x * 0.398_942_3, exp::<FMA>(-0.5 * x * x), cdf);
            },
            Activation::GeluTanh => for ((v, d), &x) in all {
                let u = 2.0 * 0.797_884_6 * fma::<FMA>(0.044_715 * x * x, x, x);
                let s = 1.0 / (1.0 + exp::<FMA>(-u));
                let du = 2.0 * 0.797_884_6 * fma::<FMA>(3.0 * 0.044_715 * x, x, 1.0);
                *v = x * s;
                *d = fma::<FMA>(x * s * (1.0 - s), du, s);
            },
            Activation::QuickGelu => for ((v, d), &x) in all {
                let s = 1.0 / (1.0 + exp::<FMA>(-1.702 * x));
                *v = x * s;
                *d = fma::<FMA>(1.702 * x * s, 1.0 - s, s);
            },
            Activation::Relu => for ((v, d), &x) in all {
                *v = x.max(0.0);
                *d = if x > 0.0 { 1.0 } else { 0.0 };
            },
            Activation::Relu6 => for ((v, d), &x) in all {
                *v = x.clamp(0.0, 6.0);
                *d = if x > 0.0 && x < 6.0 { 1.0 } else { 0.0 };
            },
            Activation::Tanh => for ((v, d), &x) in all {
                let t = 2.0 / (1.0 + exp::<FMA>(-2.0 * x)) - 1.0;
                *v = t;
                *d = 1.0 - t * t;
            },
        }
    }
}

/// `g · activation'(x)`.
pub fn activation(x: &[f32], g: &[f32], kind: Activation) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).zip(g.par_chunks(CHUNK)).for_each_init(
        || vec![0.0; CHUNK],
        |scratch, ((out, x), g)| {
            slopes(x, &mut scratch[..x.len()], out, kind);
            out.iter_mut().zip(g).for_each(|(o, g)| *o *= g);
        },
    );
    out
}

/// Gradients of `activation(gate) * up`.
pub fn gated(gate: &[f32], up: &[f32], g: &[f32], kind: Activation) -> (Vec<f32>, Vec<f32>) {
    let (mut dgate, mut dup) = (vec![0.0; gate.len()], vec![0.0; gate.len()]);
    dgate
        .par_chunks_mut(CHUNK)
        .zip(dup.par_chunks_mut(CHUNK))
        .zip(gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)).zip(g.par_chunks(CHUNK)))
        .for_each(|((dgate, dup), ((gate, up), g))| {
            slopes(gate, dup, dgate, kind);
            for (((dg, du), up), g) in dgate.iter_mut().zip(dup).zip(up).zip(g) {
                *dg *= up * g;
                *du *= g;
            }
        });
    (dgate, dup)
}

simd! {
    /// Turns `dp` (gradients of one row of probabilities `p`) into gradients of the scaled scores: `p (dp - Σ p dp)`.
    fn softmax_back(p: &[f32], dp: &mut [f32]) {
        let mean = dot(p, dp);
        for (d, p) in dp.iter_mut().zip(p) {
            *d = p * (*d - mean);
        }
    }
}

/// Gradients of softmax attention, see [`super::attention`]. One task per batch row and key head: nobody else adds to its
/// keys and values.
#[allow(clippy::too_many_arguments)] // four operands, their three extents, and how
pub fn attention(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    g: &[f32],
    batch: usize,
    seq: usize,
    keys: usize,
    spec: &AttentionSpec,
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let (dim, heads, kv_heads) = (spec.head_dim, spec.heads, spec.kv_heads);
    let (q_width, kv_width) = (heads * dim, kv_heads * dim);
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    let (dq_at, dk_at, dv_at) =
        (SendPtr(dq.as_mut_ptr()), SendPtr(dk.as_mut_ptr()), SendPtr(dv.as_mut_ptr()));
    let group = heads / kv_heads;
    (0..batch * kv_heads).into_par_iter().for_each(|task| {
        let (dq_at, dk_at, dv_at) = (&dq_at, &dk_at, &dv_at);
        let (b, kv_head) = (task / kv_heads, task % kv_heads);
        let kv_from = b * keys * kv_width + kv_head * dim;
        let (k, v) = (&k[kv_from..], &v[kv_from..]);
        let mut probabilities = vec![0.0f32; QUERY_BLOCK * keys];
        let mut slopes = vec![0.0f32; QUERY_BLOCK * keys];
        for head in kv_head * group..(kv_head + 1) * group {
            for first in (0..seq).step_by(QUERY_BLOCK) {
                let count = QUERY_BLOCK.min(seq - first);
                let limit = spec.visible(b, first + count - 1, keys).end;
                let q_from = (b * seq + first) * q_width + head * dim;
                let (q, g) = (&q[q_from..], &g[q_from..]);
                let p = &mut probabilities[..count * limit];
                let d = &mut slopes[..count * limit];
                let none = Parallelism::None;
                // SAFETY: the slices start at this head's columns and hold `count` or `limit` rows of their width; what is
                // written belongs to this task: its batch row, its key head and the query heads of that key head.
                unsafe {
                    let (qs, ks) = ((q, q_width, 1), (k, 1, kv_width));
                    raw_product(qs, ks, p.as_mut_ptr(), limit, count, dim, limit, false, 1.0, none);
                    let cap = spec.softcap.unwrap_or(0.0);
                    let capped = (cap > 0.0).then(|| {
                        let slope = |s: &f32| 1.0 - (s * spec.scale / cap).tanh().powi(2);
                        p.iter().map(slope).collect::<Vec<f32>>()
                    });
                    for (i, row) in p.chunks_exact_mut(limit).enumerate() {
                        let visible = spec.visible(b, first + i, keys);
                        softmax_row(row, visible.start, visible.end, spec.scale, cap);
                    }
                    let vs = (v, 1, kv_width);
                    raw_product(
                        (g, q_width, 1),
                        vs,
                        d.as_mut_ptr(),
                        limit,
                        count,
                        dim,
                        limit,
                        false,
                        1.0,
                        none,
                    );
                    for (p, d) in p.chunks_exact(limit).zip(d.chunks_exact_mut(limit)) {
                        softmax_back(p, d);
                    }
                    if let Some(slope) = capped {
                        d.iter_mut().zip(slope).for_each(|(d, s)| *d *= s);
                    }
                    let (p, d): (&[f32], &[f32]) = (p, d);
                    let scale = spec.scale;
                    let out = dq_at.0.add(q_from);
                    raw_product(
                        (d, limit, 1),
                        (k, kv_width, 1),
                        out,
                        q_width,
                        count,
                        limit,
                        dim,
                        false,
                        scale,
                        none,
                    );
                    let out = dk_at.0.add(kv_from);
                    raw_product(
                        (d, 1, limit),
                        (q, q_width, 1),
                        out,
                        kv_width,
                        limit,
                        count,
                        dim,
                        true,
                        scale,
                        none,
                    );
                    let out = dv_at.0.add(kv_from);
                    raw_product(
                        (p, 1, limit),
                        (g, q_width, 1),
                        out,
                        kv_width,
                        limit,
                        count,
                        dim,
                        true,
                        1.0,
                        none,
                    );
                }
            }
        }
    });
    (dq, dk, dv)
}

/// Loss and gradients of a loss on the logits `x · wᵀ`; a few rows of logits exist at a time.
pub fn head_loss(
    x: &[f32],
    w: &[f32],
    k: usize,
    needs: [bool; 2],
    loss: &super::LogitLoss,
    precision: Precision,
) -> (f64, Option<Vec<f32>>, Option<Vec<f32>>) {
    let (rows, vocab) = (x.len() / k, w.len() / k);
    let mut dx = needs[0].then(|| vec![0.0; x.len()]);
    let mut dw = needs[1].then(|| vec![0.0; w.len()]);
    let chunk = (LOGIT_BUDGET / vocab).clamp(1, rows.max(1));
    let mut logits = vec![0.0; chunk * vocab];
    let mut total = 0.0;
    for first in (0..rows).step_by(chunk) {
        let range: Range<usize> = first..(first + chunk).min(rows);
        let m = range.len();
        let (x, logits) = (&x[first * k..range.end * k], &mut logits[..m * vocab]);
        product((x, k, 1), (w, 1, k), logits, m, k, vocab, false, precision);
        total += loss(range.clone(), logits);
        let g: &[f32] = logits;
        if let Some(dx) = &mut dx {
            product(
                (g, vocab, 1),
                (w, k, 1),
                &mut dx[first * k..range.end * k],
                m,
                vocab,
                k,
                false,
                precision,
            );
        }
        if let Some(dw) = &mut dw {
            product((g, 1, vocab), (x, k, 1), dw, vocab, m, k, true, precision);
        }
    }
    (total, dx, dw)
}

simd! {
    /// Turns a row of logits into probabilities and returns `log Σ exp`.
    pub fn softmax_in_place(row: &mut [f32]) -> f32 {
        let mut top = f32::NEG_INFINITY;
        for &x in row.iter() {
            top = if x > top { x } else { top };
        }
        for x in row.iter_mut() {
            *x = exp::<FMA>(*x - top);
        }
        let total = sum(row);
        let inverse = 1.0 / total;
        for x in row.iter_mut() {
            *x *= inverse;
        }
        top + total.ln()
    }
}
