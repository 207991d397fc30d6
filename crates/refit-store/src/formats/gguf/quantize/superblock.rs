//! The K types: 256 elements with one or two half-precision scales, and sub-blocks whose own scales are small integers.
//! First the sub-blocks are fitted, then their scales are rounded, and the codes are chosen again for the rounded ones.

use super::fit::{Trials, affine, by_turns, nearest, symmetric};
use super::{put_half, put_pairs};
use crate::convert::f16_to_f32;

fn half_at(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// The largest of some scales, at least 0. Comparing keeps a zero positive, where `f32::max` may give -0.
fn most(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most, &x| if x > most { x } else { most })
}

/// Codes for `x + offset` in steps of `d`, kept where `d` is 0.
fn recode(x: &[f32], offset: f32, d: f32, (low, high): (i32, i32), codes: &mut [u8]) {
    if d == 0.0 {
        return;
    }
    for (q, x) in codes.iter_mut().zip(x) {
        *q = (nearest((x + offset) / d).clamp(low, high) - low) as u8;
    }
}

pub fn q2_k(x: &[f32; 256], block: &mut [u8; 84]) -> bool {
    const TRIALS: Trials = Trials { first: -0.5, step: 0.1, steps: 15, absolute: true };
    let (subs, _) = x.as_chunks::<16>();
    let mut codes = [0u8; 256];
    let (mut scales, mut mins) = ([0f32; 16], [0f32; 16]);
    for (j, sub) in subs.iter().enumerate() {
        let weights = sub.map(f32::abs);
        (scales[j], mins[j]) = affine(sub, &weights, 3, TRIALS, &mut codes[16 * j..16 * j + 16]);
    }
    let mut finite = true;
    let mut levels = |values: &[f32; 16], at: usize, block: &mut [u8; 84]| {
        let most = most(values);
        finite &= put_half(block, at, if most > 0.0 { most / 15.0 } else { 0.0 });
        let inverse = if most > 0.0 { 15.0 / most } else { 0.0 };
        values.map(|value| nearest(inverse * value) as u8)
    };
    let (low, high) = (levels(&scales, 80, block), levels(&mins, 82, block));
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (j, sub) in subs.iter().enumerate() {
        block[j] = low[j] | high[j] << 4;
        let (scale, min) = (d * f32::from(block[j] & 15), dmin * f32::from(block[j] >> 4));
        recode(sub, min, scale, (0, 3), &mut codes[16 * j..16 * j + 16]);
    }
    put_pairs(&codes, &mut block[16..80]);
    finite
}

pub fn q3_k(x: &[f32; 256], block: &mut [u8; 110]) -> bool {
    let (subs, _) = x.as_chunks::<16>();
    let mut codes = [0u8; 256];
    let mut scales = [0f32; 16];
    for (j, sub) in subs.iter().enumerate() {
        scales[j] = by_turns(sub, 4, &mut codes[16 * j..16 * j + 16]);
    }
    let most = super::largest(&scales);
    let inverse = if most == 0.0 { 0.0 } else { -32.0 / most };
    let finite = put_half(block, 108, if most == 0.0 { 0.0 } else { 1.0 / inverse });
    let levels = match most == 0.0 {
        true => [0; 16],
        false => scales.map(|scale| (nearest(inverse * scale) as i8).clamp(-32, 31) + 32),
    };
    put_six_bits(&levels.map(|level| level as u8), &mut block[96..108]);
    let d = half_at(block, 108);
    for (j, sub) in subs.iter().enumerate() {
        let scale = d * f32::from(levels[j] - 32);
        recode(sub, 0.0, scale, (-4, 3), &mut codes[16 * j..16 * j + 16]);
    }
    put_three_bits(&codes, block);
    finite
}

/// 16 scales of six bits: low nibbles in eight bytes, high pairs in four.
pub(super) fn put_six_bits(levels: &[u8; 16], bytes: &mut [u8]) {
    bytes.fill(0);
    for (j, level) in levels.iter().enumerate() {
        bytes[j % 8] |= (level & 15) << (j / 8 * 4);
        bytes[8 + j % 4] |= (level >> 4) << (j / 4 * 2);
    }
}

/// Codes 0 to 7 of `Q3_K`: the third bit of elements `j + 32 n` is bit `n` of byte `j`, the others lie as in `Q2_K`.
pub(super) fn put_three_bits(codes: &[u8; 256], block: &mut [u8; 110]) {
    block[..32].fill(0);
    for (j, code) in codes.iter().enumerate() {
        block[j % 32] |= (code >> 2 & 1) << (j / 32);
    }
    put_pairs(codes, &mut block[32..96]);
}

/// Scales and minima of `Q4_K` and `Q5_K`: writes `d`, `dmin` and twelve bytes of six-bit levels, and chooses the
/// codes `0 ..= top` for the rounded ones.
fn affine_block(
    x: &[f32; 256],
    top: i32,
    trials: Trials,
    head: &mut [u8],
    codes: &mut [u8; 256],
) -> bool {
    let (subs, _) = x.as_chunks::<32>();
    let (mut scales, mut mins) = ([0f32; 8], [0f32; 8]);
    for (j, sub) in subs.iter().enumerate() {
        let mean = (sub.iter().fold(0.0, |sum: f32, x| sum + x * x) / 32.0).sqrt();
        let weights = sub.map(|x| mean + x.abs());
        let codes = &mut codes[32 * j..32 * j + 32];
        (scales[j], mins[j]) = affine(sub, &weights, top, trials, codes);
    }
    let levels = |values: &[f32; 8]| {
        let most = most(values);
        let inverse = if most > 0.0 { 63.0 / most } else { 0.0 };
        values.map(|value| (nearest(inverse * value) as u8).min(63))
    };
    let (low, high) = (levels(&scales), levels(&mins));
    let finite = put_half(head, 0, most(&scales) / 63.0) & put_half(head, 2, most(&mins) / 63.0);
    for j in 0..4 {
        head[4 + j] = low[j] | low[j + 4] >> 4 << 6;
        head[8 + j] = high[j] | high[j + 4] >> 4 << 6;
        head[12 + j] = low[j + 4] & 15 | high[j + 4] << 4;
    }
    let (d, dmin) = (half_at(head, 0), half_at(head, 2));
    for (j, sub) in subs.iter().enumerate() {
        let (scale, min) = (d * f32::from(low[j]), dmin * f32::from(high[j]));
        recode(sub, min, scale, (0, top), &mut codes[32 * j..32 * j + 32]);
    }
    finite
}

pub fn q4_k(x: &[f32; 256], block: &mut [u8; 144]) -> bool {
    const TRIALS: Trials = Trials { first: -1.0, step: 0.1, steps: 20, absolute: false };
    let mut codes = [0u8; 256];
    let (head, bytes) = block.split_at_mut(16);
    let finite = affine_block(x, 15, TRIALS, head, &mut codes);
    put_halves(&codes, bytes);
    finite
}

/// Low nibbles: of each 64 elements the first 32 low, the others high.
fn put_halves(codes: &[u8; 256], bytes: &mut [u8]) {
    for (k, bytes) in bytes.chunks_exact_mut(32).enumerate() {
        for (j, byte) in bytes.iter_mut().enumerate() {
            *byte = codes[64 * k + j] & 15 | codes[64 * k + 32 + j] << 4;
        }
    }
}

pub fn q5_k(x: &[f32; 256], block: &mut [u8; 176]) -> bool {
    const TRIALS: Trials = Trials { first: -0.5, step: 0.1, steps: 15, absolute: false };
    let mut codes = [0u8; 256];
    let (head, rest) = block.split_at_mut(16);
    let finite = affine_block(x, 31, TRIALS, head, &mut codes);
    let (high, low) = rest.split_at_mut(32);
    for (j, byte) in high.iter_mut().enumerate() {
        *byte = (0..8).fold(0, |byte, n| byte | (codes[32 * n + j] >> 4 & 1) << n);
    }
    put_halves(&codes, low);
    finite
}

pub fn q6_k(x: &[f32; 256], block: &mut [u8; 210]) -> bool {
    let (subs, _) = x.as_chunks::<16>();
    let mut codes = [0u8; 256];
    let mut scales = [0f32; 16];
    for (j, sub) in subs.iter().enumerate() {
        scales[j] = symmetric(sub, 32, &mut codes[16 * j..16 * j + 16]);
    }
    let most = super::largest(&scales);
    if most.abs() < 1e-15 {
        block.fill(0);
        return true;
    }
    let inverse = -128.0 / most;
    let finite = put_half(block, 208, 1.0 / inverse);
    let d = half_at(block, 208);
    for (j, sub) in subs.iter().enumerate() {
        let level = nearest(inverse * scales[j]).min(127) as i8;
        block[192 + j] = level as u8;
        let scale = d * f32::from(level);
        recode(sub, 0.0, scale, (-32, 31), &mut codes[16 * j..16 * j + 16]);
    }
    put_six_bit_codes(&codes, block);
    finite
}

/// Codes 0 to 63 of `Q6_K`: of each 128 elements four rows of 32; low nibbles of rows 0 and 2, 1 and 3 share bytes, the
/// two high bits of all four share one.
pub(super) fn put_six_bit_codes(codes: &[u8; 256], block: &mut [u8; 210]) {
    for half in 0..2 {
        let row = |n: usize, j: usize| codes[128 * half + 32 * n + j];
        for j in 0..32 {
            block[64 * half + j] = row(0, j) & 15 | row(2, j) << 4;
            block[64 * half + 32 + j] = row(1, j) & 15 | row(3, j) << 4;
            block[128 + 32 * half + j] =
                (0..4).fold(0, |byte, n| byte | (row(n, j) >> 4) << (2 * n));
        }
    }
}
