//! Scales of a sub-block of the K types: closed-form least squares for given codes, tried for several codes.
//!
//! All sums run in the order of the elements and in single precision, so that the result is GGML's to the last bit.

/// A magnitude below which a sub-block counts as zero.
const NEGLIGIBLE: f32 = 1e-15;

/// The nearest whole number, ties to even, for magnitudes below 2^22.
#[inline(always)]
pub fn nearest(x: f32) -> i32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: the sum's last bits are the integer
    ((x + SHIFT).to_bits() & 0x007f_ffff) as i32 - 0x0040_0000
}

/// Which trial scales [`affine`] tries: the range is divided by `top + first + step i`, `i = 0 ..= steps`.
#[derive(Debug, Clone, Copy)]
pub struct Trials {
    pub first: f32,
    pub step: f32,
    pub steps: u8,
    /// Compare by absolute instead of squared error.
    pub absolute: bool,
}

/// `x ≈ scale q + min` with codes `0 ..= top` and `min <= 0`, for weighted least squares. Codes come from trial
/// scales and the best minimum so far; for each of them scale and minimum are solved for. Returns `(scale, -min)` of
/// the best.
pub fn affine<const N: usize>(
    x: &[f32; N],
    weights: &[f32; N],
    top: i32,
    trials: Trials,
    codes: &mut [u8],
) -> (f32, f32) {
    let (mut min, mut max) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (0.0, 0.0);
    for (&x, &w) in x.iter().zip(weights) {
        min = if x < min { x } else { min };
        max = if x > max { x } else { max };
        sum_w += w;
        sum_x += w * x;
    }
    min = min.min(0.0);
    if max == min {
        codes.fill(0);
        return (0.0, -min);
    }
    let code = |x: f32, inverse: f32, min: f32| nearest(inverse * (x - min)).clamp(0, top);
    let error = |scale: f32, min: f32, codes: &[u8]| {
        let mut sum = 0.0;
        for ((&x, &w), &q) in x.iter().zip(weights).zip(codes) {
            let off = scale * f32::from(q) + min - x;
            sum += w * if trials.absolute { off.abs() } else { off * off };
        }
        sum
    };
    let inverse = top as f32 / (max - min);
    let mut scale = 1.0 / inverse;
    for (q, &x) in codes.iter_mut().zip(x) {
        *q = code(x, inverse, min) as u8;
    }
    let mut best = error(scale, min, codes);
    let mut trial = [0u8; N];
    for i in 0..=trials.steps {
        let inverse = (trials.first + trials.step * f32::from(i) + top as f32) / (max - min);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0, 0.0, 0.0);
        for ((q, &x), &w) in trial.iter_mut().zip(x).zip(weights) {
            let l = code(x, inverse, min);
            *q = l as u8;
            let l = l as f32;
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant > 0.0 {
            let mut new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut new_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if new_min > 0.0 {
                new_min = 0.0;
                new_scale = sum_xl / sum_l2;
            }
            let found = error(new_scale, new_min, &trial);
            if found < best {
                codes.copy_from_slice(&trial);
                (best, scale, min) = (found, new_scale, new_min);
            }
        }
    }
    (scale, -min)
}

/// Sums `Σ w x q` and `Σ w q²` with weights `x²`, over which a least-squares scale is the quotient.
fn moments<const N: usize>(x: &[f32; N], inverse: f32, top: i32) -> (f32, f32) {
    let (mut xl, mut l2) = (0.0, 0.0);
    for &x in x {
        let l = nearest(inverse * x).clamp(-top, top - 1) as f32;
        let w = x * x;
        xl += w * x * l;
        l2 += w * l * l;
    }
    (xl, l2)
}

/// `x ≈ scale q` with `q` in `-top ..= top - 1`, weighted by `x²`: the best of 19 trial scales around the one that puts
/// the largest magnitude on the last code. `codes` are stored plus `top`.
pub fn symmetric<const N: usize>(x: &[f32; N], top: i32, codes: &mut [u8]) -> f32 {
    let largest = super::largest(x);
    if largest.abs() < NEGLIGIBLE {
        codes.fill(0);
        return 0.0;
    }
    let mut put = |inverse: f32| {
        for (q, &x) in codes.iter_mut().zip(x) {
            *q = (top + nearest(inverse * x).clamp(-top, top - 1)) as u8;
        }
    };
    let inverse = -(top as f32) / largest;
    put(inverse);
    let (xl, l2) = moments(x, inverse, top);
    let mut scale = if l2 != 0.0 { xl / l2 } else { 0.0 };
    let mut best = scale * xl;
    for i in (-9i8..=9).filter(|&i| i != 0) {
        let inverse = -(top as f32 + 0.1 * f32::from(i)) / largest;
        let (xl, l2) = moments(x, inverse, top);
        if l2 > 0.0 && xl * xl > best * l2 {
            put(inverse);
            scale = xl / l2;
            best = scale * xl;
        }
    }
    scale
}

/// As [`symmetric`], but the codes themselves are improved one by one, each to the best for the scale that the others
/// ask for, at most five times.
pub fn by_turns<const N: usize>(x: &[f32; N], top: i32, codes: &mut [u8]) -> f32 {
    let largest = super::largest(x);
    if largest.abs() < NEGLIGIBLE {
        codes.fill(0);
        return 0.0;
    }
    let inverse = -(top as f32) / largest;
    let mut l = x.map(|x| nearest(inverse * x).clamp(-top, top - 1));
    let (mut xl, mut l2) = moments(x, inverse, top);
    for _ in 0..5 {
        let mut changed = false;
        for (&x, l) in x.iter().zip(&mut l) {
            let w = x * x;
            let old = *l as f32;
            let mut others_xl = xl - w * x * old;
            if others_xl <= 0.0 {
                continue;
            }
            let mut others_l2 = l2 - w * old * old;
            let new = nearest(x * others_l2 / others_xl).clamp(-top, top - 1);
            if new != *l {
                others_xl += w * x * new as f32;
                others_l2 += w * new as f32 * new as f32;
                if others_l2 > 0.0 && others_xl * others_xl * l2 > xl * xl * others_l2 {
                    (*l, xl, l2) = (new, others_xl, others_l2);
                    changed = true;
                }
            }
        }
        if !changed {
            break;
        }
    }
    for (q, l) in codes.iter_mut().zip(l) {
        *q = (l + top) as u8;
    }
    if l2 > 0.0 { xl / l2 } else { 0.0 }
}
