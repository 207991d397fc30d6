//! `f32` to GGML blocks: the reference quantizers of GGML, bit for bit (`tests/fixtures/make_quantized.py` holds them
//! together), and the way to say codes that are known already ([`exact`]).
//!
//! | type | scale | code |
//! |---|---|---|
//! | `Q4_0`, `Q5_0` | the signed value of the largest magnitude over `-8`, `-16` | `floor(x/d + 8.5)`, `floor(x/d + 16.5)` |
//! | `Q4_1`, `Q5_1` | `(max - min) / 15`, `/ 31`; `m = min` | `floor((x - m)/d + 0.5)` |
//! | `Q8_0` | `max\|x\| / 127` | `round(x/d)`, halves away from zero |
//! | `TQ1_0`, `TQ2_0` | `max\|x\|` | `round(x/d)` in `-1, 0, 1` |
//! | `Q2_K` to `Q6_K` | fits of weighted squared (or absolute) error, see [`fit`] | nearest after the scales were rounded |
//!
//! Codes are chosen with the scale before it is rounded to half precision (but for the K types), as GGML does.

mod exact;
mod fit;
mod superblock;

use super::GgmlType;
use crate::convert::f32_to_f16;

pub use exact::{exact, holds};

/// Types that refit can quantize to, in order of their bits.
pub const WRITABLE: [GgmlType; 12] = [
    GgmlType::TQ1_0,
    GgmlType::TQ2_0,
    GgmlType::Q2_K,
    GgmlType::Q3_K,
    GgmlType::Q4_0,
    GgmlType::Q4_K,
    GgmlType::Q4_1,
    GgmlType::Q5_0,
    GgmlType::Q5_K,
    GgmlType::Q5_1,
    GgmlType::Q6_K,
    GgmlType::Q8_0,
];

/// Quantizes whole blocks. Fails with the index of the first element of a block whose scale is beyond half precision
/// (or not a number): a block of such values would decode to infinities.
///
/// # Panics
/// If the lengths are not those of the same number of whole blocks, or the type is none of [`WRITABLE`] (callers
/// check both before).
pub fn quantize(ggml: GgmlType, values: &[f32], blocks: &mut [u8]) -> Result<(), usize> {
    let count = values.len() / ggml.block_len();
    assert!(values.len() == count * ggml.block_len() && blocks.len() == count * ggml.block_bytes());
    match ggml {
        GgmlType::Q4_0 => each(values, blocks, q4_0),
        GgmlType::Q4_1 => each(values, blocks, q4_1),
        GgmlType::Q5_0 => each(values, blocks, q5_0),
        GgmlType::Q5_1 => each(values, blocks, q5_1),
        GgmlType::Q8_0 => each(values, blocks, q8_0),
        GgmlType::TQ1_0 => each(values, blocks, tq1_0),
        GgmlType::TQ2_0 => each(values, blocks, tq2_0),
        GgmlType::Q2_K => each(values, blocks, superblock::q2_k),
        GgmlType::Q3_K => each(values, blocks, superblock::q3_k),
        GgmlType::Q4_K => each(values, blocks, superblock::q4_k),
        GgmlType::Q5_K => each(values, blocks, superblock::q5_k),
        GgmlType::Q6_K => each(values, blocks, superblock::q6_k),
        other => unreachable!("invariant: {other} is refused before anything is written"),
    }
}

/// Runs a kernel over every block; a kernel says whether its scales are finite.
fn each<const LEN: usize, const BYTES: usize>(
    values: &[f32],
    blocks: &mut [u8],
    kernel: impl Fn(&[f32; LEN], &mut [u8; BYTES]) -> bool,
) -> Result<(), usize> {
    let (values, _) = values.as_chunks::<LEN>();
    let (blocks, _) = blocks.as_chunks_mut::<BYTES>();
    for (index, (values, block)) in values.iter().zip(blocks).enumerate() {
        if !kernel(values, block) {
            return Err(index * LEN);
        }
    }
    Ok(())
}

/// Writes a scale in half precision; false if it became infinite or is not a number.
fn put_half(block: &mut [u8], at: usize, value: f32) -> bool {
    let half = f32_to_f16(value);
    block[at..at + 2].copy_from_slice(&half.to_le_bytes());
    half & 0x7c00 != 0x7c00
}

/// `1 / d`, and 0 for a block of zeros.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The value of the largest magnitude, the first of several.
fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most: f32, &x| if x.abs() > most.abs() { x } else { most })
}

fn max_abs(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most: f32, x| most.max(x.abs()))
}

fn bounds(values: &[f32]) -> (f32, f32) {
    values.iter().fold((f32::MAX, -f32::MAX), |(min, max), &x| {
        // The first of two zeros, whatever their signs.
        (if x < min { x } else { min }, if x > max { x } else { max })
    })
}

/// Puts 32 codes of four bits into 16 bytes: element `j` low, `j + 16` high.
fn put_nibbles(bytes: &mut [u8], code: impl Fn(usize) -> u8) {
    for (j, byte) in bytes.iter_mut().enumerate() {
        *byte = code(j) & 15 | code(j + 16) << 4;
    }
}

/// Bit 4 of every code, element `j` in bit `j`.
fn fifth_bits(code: impl Fn(usize) -> u8) -> [u8; 4] {
    (0..32).fold(0u32, |word, j| word | u32::from(code(j) >> 4 & 1) << j).to_le_bytes()
}

fn q4_0(x: &[f32; 32], block: &mut [u8; 18]) -> bool {
    let d = largest(x) / -8.0;
    let inverse = inverse(d);
    put_nibbles(&mut block[2..], |j| ((x[j] * inverse + 8.5) as u8).min(15));
    put_half(block, 0, d)
}

fn q4_1(x: &[f32; 32], block: &mut [u8; 20]) -> bool {
    let (min, max) = bounds(x);
    let d = (max - min) / 15.0;
    let inverse = inverse(d);
    put_nibbles(&mut block[4..], |j| (((x[j] - min) * inverse + 0.5) as u8).min(15));
    put_half(block, 0, d) & put_half(block, 2, min)
}

fn q5_0(x: &[f32; 32], block: &mut [u8; 22]) -> bool {
    let d = largest(x) / -16.0;
    let inverse = inverse(d);
    let code = |j: usize| ((x[j] * inverse + 16.5) as u8).min(31);
    block[2..6].copy_from_slice(&fifth_bits(code));
    put_nibbles(&mut block[6..], code);
    put_half(block, 0, d)
}

fn q5_1(x: &[f32; 32], block: &mut [u8; 24]) -> bool {
    let (min, max) = bounds(x);
    let d = (max - min) / 31.0;
    let inverse = inverse(d);
    let code = |j: usize| (((x[j] - min) * inverse + 0.5) as u8).min(31);
    block[4..8].copy_from_slice(&fifth_bits(code));
    put_nibbles(&mut block[8..], code);
    put_half(block, 0, d) & put_half(block, 2, min)
}

fn q8_0(x: &[f32; 32], block: &mut [u8; 34]) -> bool {
    let d = max_abs(x) / 127.0;
    let inverse = inverse(d);
    for (code, x) in block[2..].iter_mut().zip(x) {
        *code = (x * inverse).round() as i8 as u8;
    }
    put_half(block, 0, d)
}

/// `-1, 0, 1` as `0, 1, 2`.
fn trits(x: &[f32; 256], d: f32) -> [u8; 256] {
    let inverse = inverse(d);
    x.map(|x| ((x * inverse).round() as i8 + 1).clamp(0, 2) as u8)
}

fn tq1_0(x: &[f32; 256], block: &mut [u8; 54]) -> bool {
    let d = max_abs(x);
    put_trits(&trits(x, d), block);
    put_half(block, 52, d)
}

/// Five trits a byte, the first the most significant: 160 elements over 32 bytes, 80 over 16, and the last 16, four a
/// byte, over 4. A byte is the base-3 fraction `q / 243` in units of 1/256, rounded up.
fn put_trits(codes: &[u8; 256], block: &mut [u8; 54]) {
    for (start, first, width, count) in [(0, 0, 32, 5), (160, 32, 16, 5), (240, 48, 4, 4)] {
        for column in 0..width {
            let digits = (0..5).map(|n| match n < count {
                true => codes[start + n * width + column],
                false => 0,
            });
            let q = digits.fold(0u16, |q, digit| 3 * q + u16::from(digit));
            block[first + column] = (q * 256).div_ceil(243) as u8;
        }
    }
}

fn tq2_0(x: &[f32; 256], block: &mut [u8; 66]) -> bool {
    let d = max_abs(x);
    put_pairs(&trits(x, d), &mut block[..64]);
    put_half(block, 64, d)
}

/// 256 codes of two bits in 64 bytes: byte `j` of each half holds elements `j`, `j + 32`, `j + 64`, `j + 96` of its 128.
fn put_pairs(codes: &[u8; 256], bytes: &mut [u8]) {
    for (half, bytes) in bytes.chunks_exact_mut(32).enumerate() {
        for (j, byte) in bytes.iter_mut().enumerate() {
            *byte =
                (0..4).fold(0, |byte, n| byte | (codes[128 * half + 32 * n + j] & 3) << (2 * n));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::formats::gguf::dequantize;

    fn round_trip(ggml: GgmlType, values: &[f32]) -> Vec<f32> {
        let mut blocks = vec![0; values.len() / ggml.block_len() * ggml.block_bytes()];
        quantize(ggml, values, &mut blocks).unwrap();
        let mut back = vec![0.0; values.len()];
        dequantize(ggml, &blocks, &mut back);
        back
    }

    /// The largest error that a block of `values` may have, as a share of its range (`max - min`, 0 included): half a step
    /// of the coarsest sub-block plus the rounding of scales to half precision and to the levels of the super-block.
    fn bound(ggml: GgmlType) -> f32 {
        match ggml {
            // Ternary: a value may lie half a scale from the nearest of -d, 0, d.
            GgmlType::TQ1_0 | GgmlType::TQ2_0 => 0.5,
            GgmlType::Q2_K => 0.5,
            GgmlType::Q3_K => 0.35,
            // The far end of the range lies half a step beyond the last code.
            GgmlType::Q4_0 => 1.0 / 15.0,
            GgmlType::Q4_1 => 0.51 / 15.0,
            GgmlType::Q4_K => 0.13,
            GgmlType::Q5_0 => 1.0 / 31.0,
            GgmlType::Q5_1 => 0.52 / 31.0,
            GgmlType::Q5_K => 0.07,
            GgmlType::Q6_K => 0.04,
            _ => 0.51 / 127.0,
        }
    }

    proptest! {
        #![proptest_config(crate::testing::cases(64))]

        #[test]
        fn decoding_comes_back_within_the_step(
            values in proptest::collection::vec(-1f32..1.0, 512),
            exponent in -8i32..8,
        ) {
            let values: Vec<f32> = values.iter().map(|x| x * (exponent as f32).exp2()).collect();
            for ggml in WRITABLE {
                let back = round_trip(ggml, &values);
                for (x, y) in values.chunks(ggml.block_len()).zip(back.chunks(ggml.block_len())) {
                    let (min, max) = bounds(x);
                    let range = match ggml {
                        GgmlType::TQ1_0 | GgmlType::TQ2_0 => 1.01 * max_abs(x),
                        GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 => 2.0 * max_abs(x),
                        _ => max.max(0.0) - min.min(0.0),
                    };
                    let allowed = bound(ggml) * range + 1e-6 * range;
                    for (x, y) in x.iter().zip(y) {
                        prop_assert!((x - y).abs() <= allowed, "{ggml}: {x} became {y}, {allowed} allowed");
                    }
                }
            }
        }

        #[test]
        fn no_values_panic(bits in proptest::collection::vec(any::<u32>(), 256)) {
            let values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            for ggml in WRITABLE {
                let mut blocks = vec![0; 256 / ggml.block_len() * ggml.block_bytes()];
                let _ = quantize(ggml, &values, &mut blocks);
            }
        }
    }

    #[test]
    fn zeros_stay_zero() {
        for ggml in WRITABLE {
            assert!(round_trip(ggml, &[0.0; 512]).iter().all(|&x| x == 0.0), "{ggml}");
        }
    }

    #[test]
    fn scales_beyond_half_precision_are_reported_by_index() {
        let mut values = [1.0; 512];
        values[300] = 1e9;
        for ggml in WRITABLE {
            let mut blocks = vec![0; 512 / ggml.block_len() * ggml.block_bytes()];
            let first = 300 / ggml.block_len() * ggml.block_len();
            assert_eq!(quantize(ggml, &values, &mut blocks), Err(first), "{ggml}");
        }
    }

    #[test]
    fn more_bits_lose_less() {
        let values: Vec<f32> = (0..2048u32)
            .map(|i| ((i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32 - 0.5).powi(3))
            .collect();
        let error = |ggml| -> f32 {
            round_trip(ggml, &values).iter().zip(&values).map(|(a, b)| (a - b).powi(2)).sum()
        };
        use GgmlType::{Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_K, Q6_K, Q8_0};
        for chain in [&[Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_0][..], &[Q4_0, Q5_0, Q8_0], &[Q4_1, Q5_K]]
        {
            for pair in chain.windows(2) {
                assert!(error(pair[1]) < error(pair[0]), "{} against {}", pair[1], pair[0]);
            }
        }
    }
}
