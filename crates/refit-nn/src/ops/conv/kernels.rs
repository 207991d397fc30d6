//! The two inner loops that every convolution comes down to.
//!
//! [`correlate`]: `out[m][p] = start[m] + Σₜ w[t][m] · src[offset[t] + p]`, a tile of outputs in registers while all taps pass.
//! [`products`]: `out[m][t] = Σₚ g[m][p] · src[offset[t] + p]`, a tile of sums in registers while all positions pass.

use super::super::cpu::SendPtr;
use super::super::simd::{Level, fma, level, simd};

/// Output channels of one tile of [`correlate`].
pub(super) const TILE: usize = 6;
/// Rows of one tile of [`products`].
const ROWS: usize = 4;

/// Where a kernel writes: rows at a stride.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub at: SendPtr,
    pub stride: usize,
    pub rows: usize,
}

/// # Safety
/// `src` holds `N` elements at every offset; `out` has `N` elements in each of its rows.
#[inline(always)]
unsafe fn tile<const FMA: bool, const M: usize, const N: usize>(
    weights: &[[f32; M]],
    start: &[f32; M],
    offsets: &[usize],
    src: *const f32,
    out: Target,
) {
    let mut sums: [[f32; N]; M] = std::array::from_fn(|m| [start[m]; N]);
    for (w, &offset) in weights.iter().zip(offsets) {
        // SAFETY: promised by the caller.
        let x = unsafe { &*src.add(offset).cast::<[f32; N]>() };
        for m in 0..M {
            for n in 0..N {
                sums[m][n] = fma::<FMA>(w[m], x[n], sums[m][n]);
            }
        }
    }
    for (m, sums) in sums.iter().enumerate() {
        // A bound known to the compiler, so that the sums stay in registers.
        if m < out.rows {
            // SAFETY: promised by the caller.
            unsafe { out.at.0.add(m * out.stride).cast::<[f32; N]>().write_unaligned(*sums) }
        }
    }
}

/// All positions for all tiles of `M` channels.
///
/// # Safety
/// As [`tile`], for all `len` positions.
#[inline(always)]
unsafe fn sweep<const FMA: bool, const M: usize, const WIDE: usize, const MIDDLE: usize>(
    weights: &[f32],
    start: &[f32],
    offsets: &[usize],
    src: &[f32],
    out: Target,
    len: usize,
) {
    let (weights, start) = (weights.as_chunks::<M>().0, start.as_chunks::<M>().0);
    let widest = match level() {
        Level::Avx512 => WIDE,
        Level::Avx2 => MIDDLE,
        Level::Baseline => 8,
    };
    let mut at = 0;
    while at < len {
        let left = len - at;
        let (from, width) = match left {
            _ if left >= widest => (at, widest),
            _ if left >= MIDDLE && widest >= MIDDLE => (at, MIDDLE),
            _ if left >= 8 => (at, 8),
            // Fewer than a vector is left: some positions are computed twice.
            _ if len >= 8 => (len - 8, 8),
            _ => (at, 1),
        };
        for (i, (w, start)) in weights.chunks_exact(offsets.len()).zip(start).enumerate() {
            let row = i * M;
            // SAFETY: `from + width <= len`, and the caller promised `len` positions.
            unsafe {
                let out = Target {
                    at: SendPtr(out.at.0.add(row * out.stride + from)),
                    rows: out.rows - row,
                    ..out
                };
                let src = src.as_ptr().add(from);
                match width {
                    _ if width == WIDE => tile::<FMA, M, WIDE>(w, start, offsets, src, out),
                    _ if width == MIDDLE => tile::<FMA, M, MIDDLE>(w, start, offsets, src, out),
                    8 => tile::<FMA, M, 8>(w, start, offsets, src, out),
                    _ => tile::<FMA, M, 1>(w, start, offsets, src, out),
                }
            }
        }
        at = from + width;
    }
}

simd! {
    fn correlate_tiles(weights: &[f32], start: &[f32], offsets: &[usize], src: &[f32], out: Target, len: usize) {
        // SAFETY: checked by `correlate`.
        unsafe { sweep::<FMA, TILE, 32, 16>(weights, start, offsets, src, out, len) }
    }
}

simd! {
    fn correlate_single(weights: &[f32], start: &[f32], offsets: &[usize], src: &[f32], out: Target, len: usize) {
        // SAFETY: checked by `correlate`.
        unsafe { sweep::<FMA, 1, 128, 64>(weights, start, offsets, src, out, len) }
    }
}

/// Channels of one tile when a group has `outputs` of them.
pub(super) fn tile_rows(outputs: usize) -> usize {
    if outputs == 1 { 1 } else { TILE }
}

/// `weights [tiles][taps][tile]`, `start [tiles][tile]`, `tile` by [`tile_rows`].
///
/// # Safety
/// `out` points to `out.rows` rows of `len` elements that nobody else touches.
pub(super) unsafe fn correlate(
    tile: usize,
    weights: &[f32],
    start: &[f32],
    offsets: &[usize],
    src: &[f32],
    out: Target,
    len: usize,
) {
    let furthest = offsets.iter().max().map_or(0, |o| o + len);
    assert!(furthest <= src.len(), "invariant: the layout has room for every tap");
    assert!(start.len() < out.rows + tile, "invariant: no tile without a row");
    if tile == 1 {
        correlate_single(weights, start, offsets, src, out, len);
    } else {
        correlate_tiles(weights, start, offsets, src, out, len);
    }
}

/// # Safety
/// `g` holds `len` elements at every row, `src` at every offset; `len` is a multiple of `L`.
#[inline(always)]
unsafe fn sums<const FMA: bool, const M: usize, const T: usize, const L: usize>(
    g: &[f32],
    rows: [usize; M],
    src: &[f32],
    offsets: [usize; T],
    len: usize,
) -> [[f32; T]; M] {
    let mut sums = [[[0.0f32; L]; T]; M];
    let (g, src) = (g.as_ptr(), src.as_ptr());
    for at in (0..len).step_by(L) {
        // SAFETY: promised by the caller.
        unsafe {
            let g: [&[f32; L]; M] =
                std::array::from_fn(|m| &*g.add(rows[m] + at).cast::<[f32; L]>());
            let x: [&[f32; L]; T] =
                std::array::from_fn(|t| &*src.add(offsets[t] + at).cast::<[f32; L]>());
            for m in 0..M {
                for t in 0..T {
                    for l in 0..L {
                        sums[m][t][l] = fma::<FMA>(g[m][l], x[t][l], sums[m][t][l]);
                    }
                }
            }
        }
    }
    // Halves are added to halves, so that the sum vectorizes.
    sums.map(|row| {
        row.map(|mut lanes| {
            let mut half = L / 2;
            while half > 0 {
                for l in 0..half {
                    lanes[l] += lanes[l + half];
                }
                half /= 2;
            }
            lanes[0]
        })
    })
}

/// [`sums`] with registers named: left to itself the compiler takes sixteen lanes apart.
///
/// # Safety
/// As [`sums`] for `L = 16`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn sums_avx512<const M: usize, const T: usize>(
    g: *const f32,
    rows: [usize; M],
    src: *const f32,
    offsets: [usize; T],
    len: usize,
) -> [[f32; T]; M] {
    use std::arch::x86_64::*;
    let mut sums = [[_mm512_setzero_ps(); T]; M];
    for at in (0..len).step_by(16) {
        let mut x = [_mm512_setzero_ps(); T];
        for t in 0..T {
            // SAFETY: promised by the caller.
            x[t] = unsafe { _mm512_loadu_ps(src.add(offsets[t] + at)) };
        }
        for m in 0..M {
            // SAFETY: promised by the caller.
            let g = unsafe { _mm512_loadu_ps(g.add(rows[m] + at)) };
            for t in 0..T {
                sums[m][t] = _mm512_fmadd_ps(g, x[t], sums[m][t]);
            }
        }
    }
    let mut out = [[0.0; T]; M];
    for m in 0..M {
        for t in 0..T {
            out[m][t] = _mm512_reduce_add_ps(sums[m][t]);
        }
    }
    out
}

/// Positions that [`products`] takes at a time; its `len` is a multiple of this.
pub(super) fn lanes() -> usize {
    if level() == Level::Avx512 { 16 } else { 8 }
}

/// # Safety
/// As [`sums`].
#[inline(always)]
unsafe fn grid<const FMA: bool, const M: usize, const T: usize>(
    g: &[f32],
    [row_step, rows]: [usize; 2],
    src: &[f32],
    offsets: &[usize],
    len: usize,
    out: &mut [f32],
) {
    for row in (0..rows).step_by(M) {
        // What is missing at the edges repeats the last row or tap, and is dropped.
        let starts = std::array::from_fn(|m| (row + m).min(rows - 1) * row_step);
        for (i, some) in offsets.chunks(T).enumerate() {
            let taps = std::array::from_fn(|t| some[t.min(some.len() - 1)]);
            // SAFETY: promised by the caller.
            let tile = unsafe {
                #[cfg(target_arch = "x86_64")]
                if lanes() == 16 {
                    sums_avx512(g.as_ptr(), starts, src.as_ptr(), taps, len)
                } else {
                    sums::<FMA, M, T, 8>(g, starts, src, taps, len)
                }
                #[cfg(not(target_arch = "x86_64"))]
                sums::<FMA, M, T, 8>(g, starts, src, taps, len)
            };
            for (m, values) in tile.iter().enumerate().take(rows - row) {
                let out = &mut out[(row + m) * offsets.len() + i * T..][..some.len()];
                out.iter_mut().zip(values).for_each(|(o, v)| *o += v);
            }
        }
    }
}

simd! {
    fn products_tiles(g: &[f32], rows: [usize; 2], src: &[f32], offsets: &[usize], len: usize, out: &mut [f32]) {
        // SAFETY: checked by `products`.
        unsafe { grid::<FMA, ROWS, 3>(g, rows, src, offsets, len, out) }
    }
}

simd! {
    fn products_single(g: &[f32], rows: [usize; 2], src: &[f32], offsets: &[usize], len: usize, out: &mut [f32]) {
        // SAFETY: checked by `products`.
        unsafe { grid::<FMA, 1, 3>(g, rows, src, offsets, len, out) }
    }
}

/// Adds the products of `rows` rows of `g`, `row_step` apart, with every shifted `src` to `out [rows, taps]`.
pub(super) fn products(
    g: &[f32],
    row_step: usize,
    rows: usize,
    src: &[f32],
    offsets: &[usize],
    len: usize,
    out: &mut [f32],
) {
    assert!(len.is_multiple_of(lanes()), "invariant: rows are padded to whole vectors");
    assert!((rows - 1) * row_step + len <= g.len(), "invariant: room for every row");
    let furthest = offsets.iter().max().map_or(0, |o| o + len);
    assert!(furthest <= src.len(), "invariant: room for every tap");
    if rows == 1 {
        products_single(g, [row_step, rows], src, offsets, len, out);
    } else {
        products_tiles(g, [row_step, rows], src, offsets, len, out);
    }
}

simd! {
    /// Sum of a slice, lane by lane.
    pub(super) fn total(x: &[f32]) -> f32 {
        let mut lanes = [0.0f32; 32];
        let (blocks, tail) = x.as_chunks::<32>();
        for block in blocks {
            for i in 0..32 {
                lanes[i] = fma::<FMA>(1.0, block[i], lanes[i]);
            }
        }
        lanes.iter().sum::<f32>() + tail.iter().sum::<f32>()
    }
}
