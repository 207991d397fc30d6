//! Matrix products in bfloat16 with sums in f32: twice the speed of f32 on processors with `avx512_bf16`.
//!
//! Both operands are rounded to bfloat16 (8 bits of mantissa, to nearest even) while they are packed; every product is exact and
//! is added up in f32. Panels hold pairs of consecutive `k`, as `vdpbf16ps` wants them. Processors without the instruction run
//! the same panels through plain loops: the same numbers to the order of the sum, and slower than f32.
//!
//! Work is split over tiles of the output, never over a sum, so results do not depend on the number of threads.

use std::sync::OnceLock;

use rayon::prelude::*;

use super::cpu::SendPtr;
use super::simd::{fma, simd};

/// Rows of a tile.
const ROWS: usize = 12;
/// Columns of a tile: two registers of 16 sums.
const COLUMNS: usize = 32;
/// Pairs of `k` in one pass over a tile: a panel of the right operand then fills half of a first-level cache.
const PAIRS: usize = 128;
/// Tiles down and across that one task computes.
const TASK: (usize, usize) = (4, 16);
/// Pairs that are rounded together before they are written apart.
const STRETCH: usize = 64;
/// Extents from which rounding and packing pay: fewer rows, columns or terms stay in f32.
const WORTH: (usize, usize, usize) = (16, 32, 32);

/// A matrix operand: values, row stride, column stride.
type Operand<'a> = (&'a [f32], usize, usize);

/// Does a product of `[m, k]` and `[k, n]` gain from bfloat16?
pub fn worth(m: usize, k: usize, n: usize) -> bool {
    m >= WORTH.0 && k >= WORTH.1 && n >= WORTH.2
}

/// Does this processor multiply bfloat16 itself?
pub fn native() -> bool {
    static NATIVE: OnceLock<bool> = OnceLock::new();
    *NATIVE.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512f")
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            false
        }
    })
}

/// `out[m, n] = a[m, k] · b[k, n]`, added to what `out` holds when `add`.
///
/// # Panics
/// When a slice is shorter than its strides reach: a bug in the caller.
pub fn product(a: Operand, b: Operand, out: &mut [f32], m: usize, k: usize, n: usize, add: bool) {
    run(a, b, out, (m, k, n), add, native());
}

fn run(
    a: Operand,
    b: Operand,
    out: &mut [f32],
    (m, k, n): (usize, usize, usize),
    add: bool,
    native: bool,
) {
    assert!(out.len() >= m * n, "invariant: the output holds m rows of n");
    if m == 0 || n == 0 {
        return;
    }
    let pairs = k.div_ceil(2);
    let left = pack::<ROWS>((a.0, a.1, a.2), m, k);
    let right = pack::<COLUMNS>((b.0, b.2, b.1), n, k);
    let (down, across) = (m.div_ceil(ROWS), n.div_ceil(COLUMNS));
    let (tasks_down, tasks_across) = (down.div_ceil(TASK.0), across.div_ceil(TASK.1));
    let target = SendPtr(out.as_mut_ptr());
    (0..tasks_down * tasks_across).into_par_iter().for_each(|task| {
        let target = &target;
        let (i, j) = (task / tasks_across * TASK.0, task % tasks_across * TASK.1);
        let mut sums = [0.0f32; ROWS * COLUMNS];
        // Without terms there is still an output to write.
        for first in (0..pairs.max(1)).step_by(PAIRS) {
            let last = (first + PAIRS).min(pairs);
            for j in j..(j + TASK.1).min(across) {
                let right = &right[(j * pairs + first) * COLUMNS..(j * pairs + last) * COLUMNS];
                for i in i..(i + TASK.0).min(down) {
                    let left = &left[(i * pairs + first) * ROWS..(i * pairs + last) * ROWS];
                    tile(left, right, &mut sums, native);
                    let width = COLUMNS.min(n - j * COLUMNS);
                    for (r, sums) in sums.chunks_exact(COLUMNS).take(m - i * ROWS).enumerate() {
                        // SAFETY: row i * ROWS + r < m and the columns end at n; no other task writes this tile.
                        let row = unsafe {
                            let at = (i * ROWS + r) * n + j * COLUMNS;
                            std::slice::from_raw_parts_mut(target.0.add(at), width)
                        };
                        if add || first > 0 {
                            row.iter_mut().zip(sums).for_each(|(o, s)| *o += s);
                        } else {
                            row.copy_from_slice(&sums[..width]);
                        }
                    }
                }
            }
        }
    });
}

/// One tile's sums `[ROWS, COLUMNS]` over the pairs of two panels.
fn tile(left: &[u32], right: &[u32], sums: &mut [f32; ROWS * COLUMNS], native: bool) {
    debug_assert_eq!(left.len() / ROWS, right.len() / COLUMNS);
    #[cfg(target_arch = "x86_64")]
    if native {
        // SAFETY: `native` says that the processor has the instructions.
        return unsafe { tile_native(left, right, sums) };
    }
    let _ = native;
    tile_plain(left, right, sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn tile_native(left: &[u32], right: &[u32], sums: &mut [f32; ROWS * COLUMNS]) {
    use std::arch::x86_64::*;
    let mut total = [[_mm512_setzero_ps(); 2]; ROWS];
    let panels = left.as_chunks::<ROWS>().0.iter().zip(right.as_chunks::<COLUMNS>().0);
    for (left, right) in panels {
        // SAFETY: 32 words are two registers of 16; a register of bits is a register of pairs.
        let b: [__m512bh; 2] = unsafe {
            [
                std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(right.as_ptr().cast())),
                std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(
                    right.as_ptr().add(16).cast(),
                )),
            ]
        };
        for (total, &pair) in total.iter_mut().zip(left) {
            // SAFETY: as above.
            let a = unsafe {
                std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(pair.cast_signed()))
            };
            total[0] = _mm512_dpbf16_ps(total[0], a, b[0]);
            total[1] = _mm512_dpbf16_ps(total[1], a, b[1]);
        }
    }
    for (row, total) in sums.as_chunks_mut::<COLUMNS>().0.iter_mut().zip(total) {
        // SAFETY: a row holds 32 sums.
        unsafe {
            _mm512_storeu_ps(row.as_mut_ptr(), total[0]);
            _mm512_storeu_ps(row.as_mut_ptr().add(16), total[1]);
        }
    }
}

simd! {
    fn tile_plain(left: &[u32], right: &[u32], sums: &mut [f32; ROWS * COLUMNS]) {
        let mut total = [[0.0f32; COLUMNS]; ROWS];
        let low = |pair: u32| f32::from_bits(pair << 16);
        let high = |pair: u32| f32::from_bits(pair & 0xffff_0000);
        for (left, right) in left.as_chunks::<ROWS>().0.iter().zip(right.as_chunks::<COLUMNS>().0) {
            for (total, &a) in total.iter_mut().zip(left) {
                for (t, &b) in total.iter_mut().zip(right) {
                    *t = fma::<FMA>(low(a), low(b), *t);
                    *t = fma::<FMA>(high(a), high(b), *t);
                }
            }
        }
        sums.copy_from_slice(total.as_flattened());
    }
}

/// The bits of `x` rounded to bfloat16, in the low half.
#[inline(always)]
fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let even = (bits >> 16) & 1;
    let rounded = bits.wrapping_add(0x7fff + even) >> 16;
    if x.is_nan() { (bits >> 16) | 0x40 } else { rounded }
}

/// A matrix of `count` vectors of `k` elements (strides: between vectors, between elements) as panels of `W` vectors:
/// `[panel][pair][vector]`, two bfloat16 a word, zeros where there is nothing.
fn pack<const W: usize>((values, vector, element): Operand, count: usize, k: usize) -> Vec<u32> {
    let pairs = k.div_ceil(2);
    let mut packed = vec![0u32; count.div_ceil(W) * pairs * W];
    if packed.is_empty() {
        return packed;
    }
    assert!(
        values.len() > (count - 1) * vector + (k - 1) * element,
        "invariant: operand too short"
    );
    packed.par_chunks_exact_mut(pairs * W).enumerate().for_each(|(panel, out)| {
        let first = panel * W;
        let here = W.min(count - first);
        if element == 1 {
            for r in 0..here {
                let at = (first + r) * vector;
                pack_row(&values[at..at + k], out, r, W);
            }
        } else if vector == 1 && here == W {
            match W {
                ROWS => pack_rows_across(&values[first..], element, k, out),
                _ => pack_columns_across(&values[first..], element, k, out),
            }
        } else {
            for (i, out) in out.iter_mut().enumerate() {
                let (p, r) = (i / W, i % W);
                let value = |e: usize| match r < here && e < k {
                    true => values[(first + r) * vector + e * element],
                    false => 0.0,
                };
                *out = round(value(2 * p)) | round(value(2 * p + 1)) << 16;
            }
        }
    });
    packed
}

simd! {
    /// Elements that lie together become every `width`-th word of `out`, from the `r`-th on.
    fn pack_row(row: &[f32], out: &mut [u32], r: usize, width: usize) {
        let mut words = [0u32; STRETCH];
        for (stretch, out) in row.chunks(2 * STRETCH).zip(out.chunks_mut(STRETCH * width)) {
            let (whole, rest) = stretch.as_chunks::<2>();
            for (word, pair) in words.iter_mut().zip(whole) {
                *word = round(pair[0]) | round(pair[1]) << 16;
            }
            if let Some(last) = rest.first() {
                words[whole.len()] = round(*last);
            }
            for (out, word) in out.chunks_exact_mut(width).zip(&words) {
                out[r] = *word;
            }
        }
    }
}

/// A whole panel of `W` vectors whose elements lie `element` apart: two rows of memory become the halves of a row of words.
#[inline(always)]
fn across<const W: usize>(values: &[f32], element: usize, k: usize, out: &mut [u32]) {
    let row =
        |e: usize| values[e * element..].first_chunk::<W>().expect("invariant: a whole panel");
    let (rows, _) = out.as_chunks_mut::<W>();
    for (p, out) in rows.iter_mut().enumerate() {
        let low = row(2 * p);
        let high = if 2 * p + 1 < k { row(2 * p + 1) } else { &[0.0; W] };
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            *out = round(*low) | round(*high) << 16;
        }
    }
}

simd! {
    fn pack_rows_across(values: &[f32], element: usize, k: usize, out: &mut [u32]) {
        across::<ROWS>(values, element, k, out);
    }
}

simd! {
    fn pack_columns_across(values: &[f32], element: usize, k: usize, out: &mut [u32]) {
        across::<COLUMNS>(values, element, k, out);
    }
}

#[cfg(test)]
mod tests {
    use refit_data::Rng;

    use super::*;

    fn values(count: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::named(seed, "bf16");
        (0..count).map(|_| rng.normal() as f32).collect()
    }

    fn rounded(x: f32) -> f64 {
        f64::from(f32::from_bits(round(x) << 16))
    }

    /// Every layout of the operands, sizes that fill no tile, sums that continue.
    #[test]
    fn products_are_those_of_the_rounded_operands() {
        for (m, k, n) in [(1, 1, 1), (12, 2, 32), (13, 257, 33), (50, 600, 70), (5, 3, 100)] {
            let (a, b) = (values(m * k, 1), values(k * n, 2));
            let start = values(m * n, 3);
            let exact = |i: usize, j: usize| -> f64 {
                (0..k).map(|e| rounded(a[i * k + e]) * rounded(b[e * n + j])).sum()
            };
            let turned = |x: &[f32], rows: usize, columns: usize| -> Vec<f32> {
                (0..x.len()).map(|i| x[i % rows * columns + i / rows]).collect()
            };
            let (a_turned, b_turned) = (turned(&a, m, k), turned(&b, k, n));
            // Every other element of a wider matrix: neither stride is 1.
            let spread: Vec<f32> = a.iter().flat_map(|x| [*x, f32::NAN]).collect();
            for native in [false, native()] {
                for left in [(&a[..], k, 1), (&a_turned[..], 1, m), (&spread[..], 2 * k, 2)] {
                    for right in [(&b[..], n, 1), (&b_turned[..], 1, k)] {
                        for add in [false, true] {
                            let mut out = start.clone();
                            run(left, right, &mut out, (m, k, n), add, native);
                            for (at, value) in out.iter().enumerate() {
                                let base = if add { f64::from(start[at]) } else { 0.0 };
                                let expected = base + exact(at / n, at % n);
                                let gap = (f64::from(*value) - expected).abs();
                                assert!(gap < 1e-4 * (k as f64).sqrt(), "{m} {k} {n}: {gap}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn rounding_goes_to_the_nearest_and_keeps_what_is_not_finite() {
        for (x, expected) in [
            (1.0f32, 1.0f32),
            (1.0 + 1.0 / 256.0, 1.0), // a tie goes to the even neighbour
            (1.0 + 3.0 / 256.0, 1.0 + 4.0 / 256.0),
            (-0.1, -0.100_097_656),
            (f32::MAX, f32::INFINITY),
            (f32::NEG_INFINITY, f32::NEG_INFINITY),
        ] {
            assert_eq!(f32::from_bits(round(x) << 16), expected, "{x}");
        }
        assert!(f32::from_bits(round(f32::NAN) << 16).is_nan());
        assert!(f32::from_bits(round(f32::from_bits(0x7f80_0001)) << 16).is_nan());
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let (m, k, n) = (100, 300, 200);
        let (a, b) = (values(m * k, 4), values(k * n, 5));
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![0.0; m * n];
            pool.install(|| product((&a, k, 1), (&b, n, 1), &mut out, m, k, n, false));
            out
        };
        assert_eq!(with(1), with(3));
    }
}
