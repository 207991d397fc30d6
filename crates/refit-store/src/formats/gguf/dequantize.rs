//! GGML blocks to `f32`. Each kernel is the format's definition written out; the order of the
//! floating-point operations is that of the `gguf` Python package, so results agree bit for bit.
//!
//! In the 32-element types byte `j` holds element `j` in its low and `j + 16` in its high nibble.

use super::GgmlType;
use crate::convert::f16_to_f32;

/// Decodes whole blocks: `out.len() / block_len` of them.
///
/// # Panics
/// If the lengths are not those of the same number of whole blocks (callers compute both).
pub fn dequantize(ggml: GgmlType, blocks: &[u8], out: &mut [f32]) {
    let count = out.len() / ggml.block_len();
    assert!(out.len() == count * ggml.block_len() && blocks.len() == count * ggml.block_bytes());
    match ggml {
        GgmlType::Q4_0 => each(blocks, out, q4_0),
        GgmlType::Q4_1 => each(blocks, out, q4_1),
        GgmlType::Q5_0 => each(blocks, out, q5_0),
        GgmlType::Q5_1 => each(blocks, out, q5_1),
        GgmlType::Q8_0 => each(blocks, out, q8_0),
        GgmlType::Q2_K => each(blocks, out, q2_k),
        GgmlType::Q3_K => each(blocks, out, q3_k),
        GgmlType::Q4_K => each(blocks, out, q4_k),
        GgmlType::Q5_K => each(blocks, out, q5_k),
        GgmlType::Q6_K => each(blocks, out, q6_k),
        GgmlType::Q8_K => each(blocks, out, q8_k),
        GgmlType::IQ4_NL => each(blocks, out, iq4_nl),
        GgmlType::IQ4_XS => each(blocks, out, iq4_xs),
        GgmlType::TQ1_0 => each(blocks, out, tq1_0),
        GgmlType::TQ2_0 => each(blocks, out, tq2_0),
        GgmlType::MXFP4 => each(blocks, out, mxfp4),
        GgmlType::NVFP4 => each(blocks, out, nvfp4),
        GgmlType::Q1_0 => each(blocks, out, q1_0),
        GgmlType::Q2_0 => each(blocks, out, q2_0),
    }
}

/// Runs a kernel over every block; the array types let the compiler drop all bounds checks.
#[inline(always)]
fn each<const BYTES: usize, const LEN: usize>(
    blocks: &[u8],
    out: &mut [f32],
    kernel: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    let (blocks, _) = blocks.as_chunks::<BYTES>();
    let (out, _) = out.as_chunks_mut::<LEN>();
    for (block, out) in blocks.iter().zip(out) {
        kernel(block, out);
    }
}

#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// Calls `put(j, nibble)` for the 32 elements held in 16 bytes.
#[inline(always)]
fn nibbles(bytes: &[u8; 16], out: &mut [f32], value: impl Fn(usize, u8) -> f32) {
    for j in 0..16 {
        out[j] = value(j, bytes[j] & 15);
        out[j + 16] = value(j + 16, bytes[j] >> 4);
    }
}

#[inline(always)]
fn sixteen(block: &[u8], at: usize) -> &[u8; 16] {
    block[at..].first_chunk().expect("invariant: block layouts are fixed")
}

#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    nibbles(sixteen(block, 2), out, |_, q| d * f32::from(q as i8 - 8));
}

#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    nibbles(sixteen(block, 4), out, |_, q| d * f32::from(q) + m);
}

/// Bit 4 of element `j` is bit `j` of a little-endian word.
#[inline(always)]
fn fifth_bit(word: u32, j: usize) -> u8 {
    (((word >> j) & 1) << 4) as u8
}

#[inline(always)]
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    nibbles(sixteen(block, 6), out, |j, q| d * f32::from((q | fifth_bit(high, j)) as i8 - 16));
}

#[inline(always)]
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    nibbles(sixteen(block, 8), out, |j, q| d * f32::from(q | fifth_bit(high, j)) + m);
}

#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (x, &q) in out.iter_mut().zip(&block[2..]) {
        *x = f32::from(q as i8) * d;
    }
}

/// 16 sub-blocks of 16; per 128 elements 32 bytes, two bits for each of four groups of 32.
#[inline(always)]
fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (scales, qs) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (sub, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(scales[sub] & 15);
        let min = dmin * f32::from(scales[sub] >> 4);
        let bytes = &qs[sub / 8 * 32 + sub % 2 * 16..][..16];
        let shift = sub % 8 / 2 * 2;
        for (x, byte) in out.iter_mut().zip(bytes) {
            *x = scale * f32::from((byte >> shift) & 3) - min;
        }
    }
}

/// As `q2_k`, with a third bit (inverted: 0 means "subtract 4") and 6-bit scales minus 32.
#[inline(always)]
fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let (high, qs, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half_at(block, 108);
    for (sub, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let low4 = if sub < 8 { packed[sub] & 15 } else { packed[sub - 8] >> 4 };
        let high2 = (packed[8 + sub % 4] >> (sub / 4 * 2)) & 3;
        let scale = d * f32::from((low4 | (high2 << 4)) as i8 - 32);
        let column = sub % 2 * 16;
        let bytes = &qs[sub / 8 * 32 + column..][..16];
        let bits = &high[column..][..16];
        let shift = sub % 8 / 2 * 2;
        for ((x, byte), bit) in out.iter_mut().zip(bytes).zip(bits) {
            let third = ((bit >> (sub / 2)) & 1) ^ 1;
            *x = scale * f32::from(((byte >> shift) & 3) as i8 - (third << 2) as i8);
        }
    }
}

/// 6-bit scale and minimum of sub-block `j` of `Q4_K` and `Q5_K`.
#[inline(always)]
fn scale_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let (low, top) = (packed[j + 4], j - 4);
        ((low & 15) | ((packed[top] >> 6) << 4), (low >> 4) | ((packed[top + 4] >> 6) << 4))
    };
    (f32::from(scale), f32::from(min))
}

/// 8 sub-blocks of 32; each 32 bytes hold one sub-block in the low and the next in the high nibbles.
#[inline(always)]
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (sub, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_min(&block[4..16], sub);
        let (scale, min) = (d * scale, dmin * min);
        let shift = sub % 2 * 4;
        for (x, byte) in out.iter_mut().zip(&block[16 + sub / 2 * 32..][..32]) {
            *x = scale * f32::from((byte >> shift) & 15) - min;
        }
    }
}

/// As `q4_k`, with bit 4 of sub-block `j` in bit `j` of 32 further bytes.
#[inline(always)]
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let high = &block[16..48];
    for (sub, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_min(&block[4..16], sub);
        let (scale, min) = (d * scale, dmin * min);
        let shift = sub % 2 * 4;
        let low = &block[48 + sub / 2 * 32..][..32];
        for ((x, byte), bits) in out.iter_mut().zip(low).zip(high) {
            let q = ((byte >> shift) & 15) | (((bits >> sub) & 1) << 4);
            *x = scale * f32::from(q) - min;
        }
    }
}

/// 16 sub-blocks of 16 with 8-bit scales; 4 low bits in `ql`, 2 high bits in `qh`.
#[inline(always)]
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (ql, qh, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (sub, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (half, group, column) = (sub / 8, sub % 8 / 2, sub % 2 * 16);
        let scale = d * f32::from(scales[sub] as i8);
        let low = &ql[half * 64 + group % 2 * 32 + column..][..16];
        let high = &qh[half * 32 + column..][..16];
        for ((x, l), h) in out.iter_mut().zip(low).zip(high) {
            let q = ((l >> (group / 2 * 4)) & 15) | (((h >> (group * 2)) & 3) << 4);
            *x = scale * f32::from(q as i8 - 32);
        }
    }
}

/// f32 scale, 256 signed bytes; the trailing sums serve dot products only.
#[inline(always)]
fn q8_k(block: &[u8; 292], out: &mut [f32; 256]) {
    let d = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    for (x, &q) in out.iter_mut().zip(&block[4..260]) {
        *x = d * f32::from(q as i8);
    }
}

/// GGML's non-linear 4-bit grid.
const IQ4_GRID: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

#[inline(always)]
fn iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half_at(block, 0);
    nibbles(sixteen(block, 2), out, |_, q| d * f32::from(IQ4_GRID[usize::from(q)]));
}

#[inline(always)]
fn iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let d = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for (sub, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let low = (block[4 + sub / 2] >> (sub % 2 * 4)) & 15;
        let scale = low | ((((high >> (2 * sub)) & 3) as u8) << 4);
        let d = d * f32::from(scale as i8 - 32);
        nibbles(sixteen(block, 8 + sub * 16), out, |_, q| d * f32::from(IQ4_GRID[usize::from(q)]));
    }
}

const POWERS_OF_3: [u8; 5] = [1, 3, 9, 27, 81];

/// Digit `n` of a byte that holds a base-3 fraction `x / 256`: multiply (mod 256), take the top trit.
#[inline(always)]
fn trit(byte: u8, n: usize) -> i8 {
    ((u16::from(byte.wrapping_mul(POWERS_OF_3[n])) * 3) >> 8) as i8 - 1
}

#[inline(always)]
fn tq1_0(block: &[u8; 54], out: &mut [f32; 256]) {
    let d = half_at(block, 52);
    let (wide, rest) = out.split_at_mut(160);
    let (narrow, tail) = rest.split_at_mut(80);
    for (n, out) in wide.chunks_exact_mut(32).enumerate() {
        for (x, &byte) in out.iter_mut().zip(&block[..32]) {
            *x = d * f32::from(trit(byte, n));
        }
    }
    for (n, out) in narrow.chunks_exact_mut(16).enumerate() {
        for (x, &byte) in out.iter_mut().zip(&block[32..48]) {
            *x = d * f32::from(trit(byte, n));
        }
    }
    for (n, out) in tail.chunks_exact_mut(4).enumerate() {
        for (x, &byte) in out.iter_mut().zip(&block[48..52]) {
            *x = d * f32::from(trit(byte, n));
        }
    }
}

#[inline(always)]
fn tq2_0(block: &[u8; 66], out: &mut [f32; 256]) {
    let d = half_at(block, 64);
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let shift = group % 4 * 2;
        for (x, byte) in out.iter_mut().zip(&block[group / 4 * 32..][..32]) {
            *x = d * f32::from(((byte >> shift) & 3) as i8 - 1);
        }
    }
}

/// Twice the E2M1 values, so that they are whole; the scale is halved to match.
const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

#[inline(always)]
fn mxfp4(block: &[u8; 17], out: &mut [f32; 32]) {
    // Half of 2^(e - 127): exponent e - 1, or a subnormal for e < 2.
    let e = u32::from(block[0]);
    let d = f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 });
    nibbles(sixteen(block, 1), out, |_, q| d * f32::from(E2M1_DOUBLED[usize::from(q)]));
}

/// Half of an unsigned E4M3 scale: the values are doubled to match.
#[inline(always)]
fn half_ue4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (u32::from(code >> 3 & 15), f32::from(code & 7));
    match (exponent, code) {
        (_, 0x7f) => 0.0,
        // Subnormal: the mantissa counts in 2^-9, halved.
        (0, _) => mantissa * f32::from_bits((127 - 10) << 23),
        _ => (1.0 + mantissa / 8.0) * f32::from_bits((exponent + 127 - 8) << 23),
    }
}

/// Four groups of 16: their scales first, then eight bytes each; byte `j` of a group holds element `j` in its low and
/// `j + 8` in its high nibble.
#[inline(always)]
fn nvfp4(block: &[u8; 36], out: &mut [f32; 64]) {
    for (group, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let d = half_ue4m3(block[group]);
        for (j, &byte) in block[4 + 8 * group..][..8].iter().enumerate() {
            out[j] = d * f32::from(E2M1_DOUBLED[usize::from(byte & 15)]);
            out[j + 8] = d * f32::from(E2M1_DOUBLED[usize::from(byte >> 4)]);
        }
    }
}

/// The sign of element `j` is bit `j % 8` of byte `j / 8`: set for positive.
#[inline(always)]
fn q1_0(block: &[u8; 18], out: &mut [f32; 128]) {
    let d = half_at(block, 0);
    for (j, x) in out.iter_mut().enumerate() {
        *x = if block[2 + j / 8] >> (j % 8) & 1 == 1 { d } else { -d };
    }
}

/// Four elements to a byte, the first in its lowest bits.
#[inline(always)]
fn q2_0(block: &[u8; 18], out: &mut [f32; 64]) {
    let d = half_at(block, 0);
    for (j, x) in out.iter_mut().enumerate() {
        *x = d * f32::from((block[2 + j / 4] >> (2 * (j % 4)) & 3) as i8 - 1);
    }
}
