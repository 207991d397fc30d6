//! Stored bytes to `f32` and back: plain little-endian loops that the compiler vectorizes.

use half::bf16;

use crate::dtype::DType;
use crate::formats::gguf::{dequantize, quantize};

/// Decodes `out.len()` elements. Integers and `F64` are rounded to the nearest `f32`.
///
/// # Panics
/// If `bytes` is not exactly the encoding of `out.len()` elements in whole blocks; callers size both
/// from a checked header.
pub fn decode(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    fn each<const N: usize>(bytes: &[u8], out: &mut [f32], f: impl Fn([u8; N]) -> f32) {
        let (chunks, rest) = bytes.as_chunks::<N>();
        assert!(rest.is_empty() && chunks.len() == out.len(), "invariant: sizes agree");
        for (x, &chunk) in out.iter_mut().zip(chunks) {
            *x = f(chunk);
        }
    }
    match dtype {
        DType::F32 => each(bytes, out, f32::from_le_bytes),
        DType::F16 => each(bytes, out, |b| f16_to_f32(u16::from_le_bytes(b))),
        DType::BF16 => {
            each(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16));
        }
        DType::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
        DType::F8E4M3 => each(bytes, out, |[b]| E4M3_VALUES[usize::from(b)]),
        DType::F8E5M2 => each(bytes, out, |[b]| f16_to_f32(u16::from(b) << 8)),
        DType::F8E8M0 => each(bytes, out, |[b]| e8m0_to_f32(b)),
        DType::I64 => each(bytes, out, |b| i64::from_le_bytes(b) as f32),
        DType::I32 => each(bytes, out, |b| i32::from_le_bytes(b) as f32),
        DType::I16 => each(bytes, out, |b| f32::from(i16::from_le_bytes(b))),
        DType::I8 => each(bytes, out, |[b]| f32::from(b as i8)),
        DType::U64 => each(bytes, out, |b| u64::from_le_bytes(b) as f32),
        DType::U32 => each(bytes, out, |b| u32::from_le_bytes(b) as f32),
        DType::U16 => each(bytes, out, |b| f32::from(u16::from_le_bytes(b))),
        DType::U8 => each(bytes, out, |[b]| f32::from(b)),
        DType::Bool => each(bytes, out, |[b]| f32::from(u8::from(b != 0))),
        DType::Ggml(ggml) => dequantize(ggml, bytes, out),
    }
}

/// Encodes `values` into `out`, rounding floats to nearest even and quantizing to GGUF's block types. Fails with the
/// index of the first value that the type cannot hold: a finite value beyond its range, the first of a block whose scale
/// is, or, for integers and booleans, a value that is not one of theirs.
///
/// # Panics
/// If `out` has not the size of `values` in this type, or the type is a block type that refit does not write
/// ([`WRITABLE`](crate::formats::gguf::WRITABLE)).
pub fn encode(dtype: DType, values: &[f32], out: &mut [u8]) -> Result<(), usize> {
    fn each<const N: usize>(values: &[f32], out: &mut [u8], f: impl Fn(f32) -> [u8; N]) {
        let (chunks, rest) = out.as_chunks_mut::<N>();
        assert!(rest.is_empty() && chunks.len() == values.len(), "invariant: sizes agree");
        for (chunk, &x) in chunks.iter_mut().zip(values) {
            *chunk = f(x);
        }
    }
    let holds: &dyn Fn(f32) -> bool = match dtype {
        DType::F32 | DType::F64 => {
            if dtype == DType::F32 {
                each(values, out, f32::to_le_bytes);
            } else {
                each(values, out, |x| f64::from(x).to_le_bytes());
            }
            return Ok(());
        }
        DType::BF16 => {
            each(values, out, |x| f32_to_bf16(x).to_le_bytes());
            &|x| !x.is_finite() || bf16::from_f32(x).is_finite()
        }
        DType::F16 => {
            each(values, out, |x| f32_to_f16(x).to_le_bytes());
            // 65520 is the first value that rounds to infinity.
            &|x| !x.is_finite() || x.abs() < 65520.0
        }
        DType::F8E4M3 => {
            each(values, out, |x| [f32_to_e4m3(x)]);
            &|x| x.is_nan() || x.abs() <= 464.0
        }
        DType::F8E5M2 => {
            each(values, out, |x| [f32_to_e5m2(x)]);
            &|x| !x.is_finite() || x.abs() < 61440.0
        }
        DType::F8E8M0 => {
            each(values, out, |x| [f32_to_e8m0(x)]);
            // A scale is a power of two or nothing: rounding one would scale a whole block.
            &|x| x.is_nan() || e8m0_to_f32(f32_to_e8m0(x)) == x
        }
        DType::I64 => {
            each(values, out, |x| (x as i64).to_le_bytes());
            &|x| x as i64 as f32 == x && x < 9.223_372e18
        }
        DType::U64 => {
            each(values, out, |x| (x as u64).to_le_bytes());
            &|x| x as u64 as f32 == x && x < 1.844_674_4e19
        }
        DType::I32 => {
            each(values, out, |x| (x as i32).to_le_bytes());
            &|x| x as i32 as f32 == x && x < 2_147_483_648.0
        }
        DType::U32 => {
            each(values, out, |x| (x as u32).to_le_bytes());
            &|x| x as u32 as f32 == x && x < 4_294_967_296.0
        }
        DType::I16 => {
            each(values, out, |x| (x as i16).to_le_bytes());
            &|x| f32::from(x as i16) == x
        }
        DType::U16 => {
            each(values, out, |x| (x as u16).to_le_bytes());
            &|x| f32::from(x as u16) == x
        }
        DType::I8 => {
            each(values, out, |x| (x as i8).to_le_bytes());
            &|x| f32::from(x as i8) == x
        }
        DType::U8 => {
            each(values, out, |x| [x as u8]);
            &|x| f32::from(x as u8) == x
        }
        DType::Bool => {
            each(values, out, |x| [u8::from(x != 0.0)]);
            &|x| x == 0.0 || x == 1.0
        }
        DType::Ggml(ggml) => return quantize(ggml, values, out),
    };
    match values.iter().position(|&x| !holds(x)) {
        Some(index) => Err(index),
        None => Ok(()),
    }
}

/// IEEE half to single precision, exactly. Shifting the magnitude into place leaves the exponent 112
/// too small; one multiplication corrects normals and subnormals alike.
#[inline(always)]
pub fn f16_to_f32(half: u16) -> f32 {
    let magnitude = u32::from(half & 0x7fff);
    let sign = u32::from(half & 0x8000) << 16;
    let scaled = f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23);
    let special = if magnitude >= 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled.to_bits() | special | sign)
}

/// Single to half precision, nearest even; NaN stays NaN, too large becomes infinity.
#[inline(always)]
pub fn f32_to_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let sign = (bits >> 16) & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    let half = if magnitude > 0x7f80_0000 {
        0x7e00
    } else if magnitude >= 0x477f_f000 {
        0x7c00
    } else if magnitude < 0x3880_0000 {
        // Subnormal: adding 0.5 puts the unit of 2^-24 into the last mantissa bit, rounded by the FPU.
        (f32::from_bits(magnitude) + 0.5).to_bits() - 0x3f00_0000
    } else {
        let odd = (magnitude >> 13) & 1;
        (magnitude - (112 << 23) + 0xfff + odd) >> 13
    };
    (sign | half) as u16
}

/// Single precision to bfloat16, nearest even; NaN stays NaN.
#[inline(always)]
pub fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if x.is_nan() { (bits >> 16) as u16 | 0x40 } else { rounded as u16 }
}

/// Single precision to `E5M2`: half precision's layout with eight mantissa bits fewer.
fn e8m0_to_f32(code: u8) -> f32 {
    match code {
        // 2^-127 is subnormal in single precision.
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        code => f32::from_bits(u32::from(code) << 23),
    }
}

/// The exponent of a power of two; NaN for NaN. Of other values the result means nothing.
fn f32_to_e8m0(x: f32) -> u8 {
    if x.is_nan() { 255 } else { (x.to_bits() >> 23) as u8 }
}

fn f32_to_e5m2(x: f32) -> u8 {
    round_to_f8(x, 2, -16, 0x7c, 0x7e)
}

/// Single precision to `E4M3` (finite only: beyond 464 there is only NaN).
fn f32_to_e4m3(x: f32) -> u8 {
    round_to_f8(x, 3, -9, 0x7f, 0x7f)
}

/// Rounds to an 8-bit float with `mantissa` bits whose smallest subnormal is `2^min_exp`; values past
/// the largest code below `overflow` become `overflow`, NaN becomes `nan`.
fn round_to_f8(x: f32, mantissa: i32, min_exp: i32, overflow: u8, nan: u8) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if x.is_nan() {
        return sign | nan;
    }
    let magnitude = f64::from(x.abs());
    if magnitude == f64::INFINITY {
        return sign | overflow;
    }
    if magnitude == 0.0 {
        return sign;
    }
    // Exponent of the leading bit, but never below that of the smallest normal.
    let exponent = (((magnitude.to_bits() >> 52) as i32) - 1023).max(min_exp + mantissa);
    let unit = f64::exp2(f64::from(exponent - mantissa));
    let steps = (magnitude / unit).round_ties_even() as i32;
    let code = ((exponent - mantissa - min_exp) << mantissa) + steps;
    sign | u8::try_from(code).map_or(overflow, |code| code.min(overflow))
}

/// Value of every `E4M3` code.
static E4M3_VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, mantissa) = ((code >> 3) & 15, code & 7);
        let magnitude = if code & 0x7f == 0x7f {
            f32::NAN
        } else if exponent == 0 {
            // Multiples of 2^-9.
            mantissa as f32 * f32::from_bits((127 - 9) << 23)
        } else {
            f32::from_bits(((exponent as u32 + 120) << 23) | ((mantissa as u32) << 20))
        };
        values[code] = if code & 0x80 != 0 { -magnitude } else { magnitude };
        code += 1;
    }
    values
};

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    #[test]
    fn every_half_decodes_and_encodes_as_in_the_half_crate() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (f16_to_f32(bits), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()));
            if !ours.is_nan() {
                assert_eq!(f32_to_f16(ours), bits);
            }
        }
    }

    #[test]
    fn rounding_is_nearest_even() {
        // Around every half and bfloat16, including the ties and the values next to them.
        for bits in (0..u32::MAX - 4096).step_by(4093) {
            for near in [bits, bits & !0xfff, (bits & !0xffff) | 0x8000] {
                let x = f32::from_bits(near);
                if x.is_nan() {
                    assert!(f16_to_f32(f32_to_f16(x)).is_nan());
                    assert!(bf16::from_bits(f32_to_bf16(x)).is_nan());
                } else {
                    assert_eq!(f32_to_f16(x), f16::from_f32(x).to_bits(), "{x:e}");
                    assert_eq!(f32_to_bf16(x), bf16::from_f32(x).to_bits(), "{x:e}");
                }
            }
        }
    }

    #[test]
    fn eight_bit_floats_round_trip_and_round_to_the_nearest_code() {
        for dtype in [DType::F8E4M3, DType::F8E5M2] {
            let codes: Vec<u8> = (0..=255).collect();
            let mut values = vec![0.0; 256];
            decode(dtype, &codes, &mut values);
            let finite: Vec<(u8, f32)> =
                codes.into_iter().zip(values).filter(|(_, x)| x.is_finite()).collect();
            for &(code, x) in &finite {
                let mut out = [0];
                encode(dtype, &[x], &mut out).unwrap();
                assert_eq!(out[0], code, "{dtype} {x}");
            }
            let mut positive: Vec<(u8, f32)> =
                finite.into_iter().filter(|(code, _)| code & 0x80 == 0).collect();
            positive.sort_by(|a, b| a.1.total_cmp(&b.1));
            for pair in positive.windows(2) {
                let middle = (pair[0].1 + pair[1].1) / 2.0;
                let mut out = [0; 3];
                let below = f32::from_bits(middle.to_bits() - 1);
                let above = f32::from_bits(middle.to_bits() + 1);
                encode(dtype, &[below, middle, above], &mut out).unwrap();
                let even = if pair[0].0 & 1 == 0 { pair[0].0 } else { pair[1].0 };
                assert_eq!(out, [pair[0].0, even, pair[1].0], "{dtype} {middle}");
            }
        }
        assert_eq!(E4M3_VALUES[0x7e], 448.0);
    }

    #[test]
    fn scales_are_powers_of_two() {
        let codes: Vec<u8> = (0..=255).collect();
        let mut values = vec![0.0; 256];
        decode(DType::F8E8M0, &codes, &mut values);
        assert_eq!((values[127], values[128], values[0]), (1.0, 2.0, 2.0f32.powi(-127)));
        assert_eq!(values[254], 2.0f32.powi(127));
        assert!(values[255].is_nan());
        let mut out = vec![1; 256];
        encode(DType::F8E8M0, &values, &mut out).unwrap();
        assert_eq!(out, codes);
        for refused in [0.0, -1.0, 3.0, f32::INFINITY, 2.0f32.powi(-128)] {
            assert_eq!(encode(DType::F8E8M0, &[1.0, refused], &mut out[..2]), Err(1), "{refused}");
        }
    }

    #[test]
    fn values_that_do_not_fit_are_reported_by_index() {
        let mut out = [0; 16];
        assert_eq!(encode(DType::F16, &[1.0, 65519.0, 7e4], &mut out[..6]), Err(2));
        assert_eq!(encode(DType::F16, &[f32::INFINITY], &mut out[..2]), Ok(()));
        assert_eq!(encode(DType::BF16, &[f32::MAX], &mut out[..2]), Err(0));
        assert_eq!(encode(DType::F8E4M3, &[448.0, 500.0], &mut out[..2]), Err(1));
        assert_eq!(encode(DType::F8E5M2, &[57344.0, 61440.0], &mut out[..2]), Err(1));
        assert_eq!(encode(DType::I8, &[127.0, -128.0, 0.5], &mut out[..3]), Err(2));
        assert_eq!(encode(DType::U8, &[255.0, 256.0], &mut out[..2]), Err(1));
        assert_eq!(encode(DType::I32, &[2_147_483_648.0], &mut out[..4]), Err(0));
        assert_eq!(encode(DType::Bool, &[0.0, 1.0, 2.0], &mut out[..3]), Err(2));
    }
}
