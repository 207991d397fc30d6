//! Pooling on plain slices.

use rayon::prelude::*;

use super::super::simd::simd;

/// Largest of each `k x k` window, stride `k`; incomplete windows at the edges are dropped. `which` gets the place of the
/// largest in its window (the first of equals); NaN counts as largest.
pub fn max_pool(x: &[f32], out: &mut [f32], which: &mut [u8], size: [usize; 2], k: usize) {
    let [height, width] = size;
    let (rows, columns) = (height / k, width / k);
    let planes =
        out.par_chunks_exact_mut(rows * columns).zip(which.par_chunks_exact_mut(rows * columns));
    planes.zip(x.par_chunks_exact(height * width)).for_each(|((out, which), x)| {
        let lines = out.chunks_exact_mut(columns).zip(which.chunks_exact_mut(columns));
        for ((out, which), x) in lines.zip(x.chunks_exact(k * width)) {
            if k == 2 {
                let (upper, lower) = x.split_at(width);
                pairs(upper, lower, out, which);
                continue;
            }
            for (column, (out, which)) in out.iter_mut().zip(which).enumerate() {
                (*out, *which) = (x[column * k], 0);
                for place in 1..k * k {
                    let value = x[place / k * width + column * k + place % k];
                    if value > *out || value.is_nan() {
                        (*out, *which) = (value, place as u8);
                    }
                }
            }
        }
    });
}

simd! {
    /// One row of 2 x 2 windows, without branches.
    fn pairs(upper: &[f32], lower: &[f32], out: &mut [f32], which: &mut [u8]) {
        let (upper, lower) = (upper.as_chunks::<2>().0, lower.as_chunks::<2>().0);
        for (((out, which), u), l) in out.iter_mut().zip(which).zip(upper).zip(lower) {
            let (mut best, mut place) = (u[0], 0u32);
            for (value, at) in [(u[1], 1), (l[0], 2), (l[1], 3)] {
                let larger = (value > best) | value.is_nan();
                best = if larger { value } else { best };
                place = if larger { at } else { place };
            }
            (*out, *which) = (best, place as u8);
        }
    }
}

simd! {
    /// One row of the gradient under a row of 2 x 2 windows; `first` is the place of its left pixels.
    fn spread(grad: &[f32], which: &[u8], first: u8, out: &mut [f32]) {
        for ((pair, g), place) in out.as_chunks_mut::<2>().0.iter_mut().zip(grad).zip(which) {
            *pair = [
                if *place == first { *g } else { 0.0 },
                if *place == first + 1 { *g } else { 0.0 },
            ];
        }
    }
}

/// Gradient of [`max_pool`]'s input: each window's gradient goes to its largest.
pub fn max_pool_x(grad: &[f32], which: &[u8], size: [usize; 2], k: usize) -> Vec<f32> {
    let [height, width] = size;
    let (rows, columns) = (height / k, width / k);
    let mut out = vec![0.0; grad.len() / (rows * columns).max(1) * height * width];
    let planes = grad.par_chunks_exact(rows * columns).zip(which.par_chunks_exact(rows * columns));
    planes.zip(out.par_chunks_exact_mut(height * width)).for_each(|((grad, which), out)| {
        let lines = grad.chunks_exact(columns).zip(which.chunks_exact(columns));
        for ((grad, which), out) in lines.zip(out.chunks_exact_mut(k * width)) {
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                if k == 2 {
                    spread(grad, which, 2 * row as u8, out);
                    continue;
                }
                for ((window, g), place) in out.chunks_exact_mut(k).zip(grad).zip(which) {
                    for (column, slot) in window.iter_mut().enumerate() {
                        *slot = if usize::from(*place) == row * k + column { *g } else { 0.0 };
                    }
                }
            }
        }
    });
    out
}

/// Mean of each plane of `plane` elements.
pub fn mean(x: &[f32], out: &mut [f32], plane: usize) {
    let scale = 1.0 / plane as f32;
    let means = out.par_iter_mut().zip(x.par_chunks_exact(plane)).with_min_len(64);
    means.for_each(|(out, x)| *out = super::kernels::total(x) * scale);
}

/// Gradient of [`mean`]'s input.
pub fn mean_x(grad: &[f32], plane: usize) -> Vec<f32> {
    let scale = 1.0 / plane as f32;
    let mut out = vec![0.0; grad.len() * plane];
    let planes = out.par_chunks_exact_mut(plane).zip(grad).with_min_len(64);
    planes.for_each(|(out, g)| out.fill(g * scale));
    out
}
