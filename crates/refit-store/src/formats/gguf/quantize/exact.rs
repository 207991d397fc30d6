//! Codes that are known already, said in GGML's blocks: no value changes.
//!
//! A symmetric grid `x = n s` fits a type when its codes reach far enough and every block has one step: the 32-element
//! types take groups that are multiples of 32, the super-blocks groups that are multiples of 256 (all sub-block scales
//! are then 1, the minimum of `Q2_K` is `2 s`).

use super::superblock::{put_six_bit_codes, put_six_bits, put_three_bits};
use super::{fifth_bits, put_half, put_nibbles, put_pairs, put_trits};
use crate::formats::gguf::GgmlType;

/// The codes that a type can hold exactly, lowest and highest; `None` where it stores no plain multiples of a step.
fn range(ggml: GgmlType) -> Option<(i16, i16)> {
    Some(match ggml {
        GgmlType::TQ1_0 | GgmlType::TQ2_0 => (-1, 1),
        GgmlType::Q2_K => (-2, 1),
        GgmlType::Q3_K => (-4, 3),
        GgmlType::Q4_0 => (-8, 7),
        GgmlType::Q5_0 => (-16, 15),
        GgmlType::Q6_K => (-32, 31),
        GgmlType::Q8_0 => (-128, 127),
        _ => return None,
    })
}

/// Whether codes between `low` and `high` with one step per `group` elements can be said in this type.
pub fn holds(ggml: GgmlType, (low, high): (i16, i16), group: usize) -> bool {
    group.is_multiple_of(ggml.block_len())
        && range(ggml).is_some_and(|(least, most)| least <= low && high <= most)
}

/// Writes one block of codes and their step, which must be a value of half precision.
///
/// # Panics
/// If the type does not hold the codes ([`holds`]) or the lengths are not those of one block.
pub fn exact(ggml: GgmlType, codes: &[i16], step: f32, block: &mut [u8]) {
    assert!(codes.len() == ggml.block_len() && block.len() == ggml.block_bytes());
    let (low, high) = range(ggml).expect("invariant: callers ask `holds` first");
    assert!(codes.iter().all(|code| (low..=high).contains(code)), "invariant: `holds` was true");
    let code = |j: usize| (codes[j] - low) as u8;
    let whole = || -> [u8; 256] { std::array::from_fn(code) };
    match ggml {
        GgmlType::Q4_0 => {
            put_half(block, 0, step);
            put_nibbles(&mut block[2..], code);
        }
        GgmlType::Q5_0 => {
            put_half(block, 0, step);
            block[2..6].copy_from_slice(&fifth_bits(code));
            put_nibbles(&mut block[6..], code);
        }
        GgmlType::Q8_0 => {
            put_half(block, 0, step);
            block[2..].iter_mut().zip(codes).for_each(|(byte, code)| *byte = *code as i8 as u8);
        }
        GgmlType::TQ1_0 => {
            put_trits(&whole(), block.try_into().expect("invariant: one block"));
            put_half(block, 52, step);
        }
        GgmlType::TQ2_0 => {
            put_pairs(&whole(), &mut block[..64]);
            put_half(block, 64, step);
        }
        GgmlType::Q2_K => {
            // x = step q - step 2.
            block[..16].fill(1 | 2 << 4);
            put_pairs(&whole(), &mut block[16..80]);
            put_half(block, 80, step);
            put_half(block, 82, step);
        }
        GgmlType::Q3_K => {
            put_six_bits(&[33; 16], &mut block[96..108]);
            put_three_bits(&whole(), block.try_into().expect("invariant: one block"));
            put_half(block, 108, step);
        }
        GgmlType::Q6_K => {
            put_six_bit_codes(&whole(), block.try_into().expect("invariant: one block"));
            block[192..208].fill(1);
            put_half(block, 208, step);
        }
        other => unreachable!("invariant: {other} has no range"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::gguf::dequantize;

    #[test]
    fn codes_come_back_as_multiples_of_their_step() {
        for &ggml in GgmlType::ALL {
            let Some((low, high)) = range(ggml) else { continue };
            let span = i32::from(high) - i32::from(low) + 1;
            for step in [0.0123f32, -1.7, 6e-8] {
                let step = half::f16::from_f32(step).to_f32();
                let codes: Vec<i16> = (0..ggml.block_len() as i32)
                    .map(|j| (i32::from(low) + (j * 7 + j / 5) % span) as i16)
                    .collect();
                let mut block = vec![0xff; ggml.block_bytes()];
                exact(ggml, &codes, step, &mut block);
                let mut back = vec![0.0; codes.len()];
                dequantize(ggml, &block, &mut back);
                for (code, value) in codes.iter().zip(back) {
                    assert_eq!(value, f32::from(*code) * step, "{ggml} {code}");
                }
            }
            assert!(holds(ggml, (low, high), 256));
            assert!(!holds(ggml, (low - 1, high), 256) && !holds(ggml, (low, high + 1), 256));
            assert!(!holds(ggml, (low, high), 48), "{ggml}");
        }
    }
}
