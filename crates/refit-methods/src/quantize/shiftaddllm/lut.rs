//! `y = W x` from the packed form with look-ups, shifts and additions.
//!
//! For 8 inputs there are 256 sums `sum ±x_k`. A byte of a bit plane names one of them, and the scale of the patch, a sum of powers
//! of two, shifts its exponent. Where every input has scales of its own (mode `acc`), the inputs are shifted before the table is
//! made, one table per plane and patch.

use super::bcq::Term;
use super::packed::Packed;

/// `x 2^exponent` by adding to the exponent field. Zeros, subnormal and non-finite numbers, and results that are one, are
/// multiplied: the reference adds to the field unseen, which makes numbers out of zeros.
#[inline]
pub fn shift(x: f32, exponent: i8) -> f32 {
    let bits = x.to_bits();
    let field = (bits >> 23 & 0xff) as i32;
    let moved = field + i32::from(exponent);
    match (1..255).contains(&field) && (1..255).contains(&moved) {
        true => f32::from_bits(bits & !(0xff << 23) | (moved as u32) << 23),
        false => x * f32::from(exponent).exp2(),
    }
}

/// `x` times a scale.
fn scaled(x: f32, terms: impl Iterator<Item = Term>) -> f32 {
    let mut sum = 0.0;
    for term in terms {
        let moved = shift(x, term.exponent);
        sum += if term.negative { -moved } else { moved };
    }
    sum
}

/// All sums `sum ±x_k` of 8 inputs by the byte of their signs, each from another by one addition.
fn table(x: &[f32; 8]) -> [f32; 256] {
    let mut sums = [0f32; 256];
    sums[0] = -x.iter().sum::<f32>();
    for code in 1usize..256 {
        let lowest = code.trailing_zeros() as usize;
        sums[code] = sums[code & (code - 1)] + (x[lowest] + x[lowest]);
    }
    sums
}

/// What a product took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Operations {
    /// Sums looked up.
    pub lookups: u64,
    /// Additions, those of the tables included.
    pub additions: u64,
    /// Shifts by a power of two.
    pub shifts: u64,
}

/// `W x` for one `x` `[inputs]`; `None` where the weights were turned before they were quantized, which no shift undoes.
pub fn multiply(packed: &Packed, x: &[f32]) -> Option<(Vec<f32>, Operations)> {
    if packed.incoherence.is_some() || x.len() != packed.inputs {
        return None;
    }
    let Packed { rows, inputs, bits, columns, patches, .. } = *packed;
    let (mut y, mut done) = (vec![0f32; rows], Operations::default());
    let height = rows / patches;
    let shared = columns.is_multiple_of(8);
    for byte in 0..inputs / 8 {
        let eight: [f32; 8] = std::array::from_fn(|k| x[8 * byte + k]);
        let common = shared.then(|| table(&eight));
        done.additions += if shared { 263 } else { 0 };
        for patch in 0..patches {
            for bit in 0..bits {
                let scale = |input: usize| packed.patch(patch * height, input) * bits + bit;
                let terms = packed.terms_of(scale(8 * byte)).count() as u64;
                let own;
                let sums = match &common {
                    Some(common) => common,
                    None => {
                        let moved = std::array::from_fn(|k| {
                            scaled(eight[k], packed.terms_of(scale(8 * byte + k)))
                        });
                        done.shifts += 8 * terms;
                        done.additions += 263 + 8 * terms;
                        own = table(&moved);
                        &own
                    }
                };
                for (row, y) in y.iter_mut().enumerate().skip(patch * height).take(height) {
                    let word = packed.words[(row * inputs / 32 + byte / 4) * bits + bit];
                    let found = sums[(word >> (8 * (byte % 4)) & 0xff) as usize];
                    *y += match shared {
                        true => scaled(found, packed.terms_of(scale(8 * byte))),
                        false => found,
                    };
                }
                done.lookups += height as u64;
                done.additions += height as u64 * if shared { terms } else { 1 };
                done.shifts += if shared { height as u64 * terms } else { 0 };
            }
        }
    }
    Some((y, done))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::shiftaddllm::Mode;
    use crate::quantize::shiftaddllm::rule::plain;
    use crate::testing::Stream;

    #[test]
    fn shifting_is_multiplying() {
        for x in [1.0f32, -3.7, 0.0, -0.0, 1e-40, f32::MAX, f32::MIN_POSITIVE, f32::INFINITY] {
            for exponent in [-120i8, -3, 0, 1, 17, 120] {
                let expected = x * f32::from(exponent).exp2();
                assert_eq!(shift(x, exponent).to_bits(), expected.to_bits(), "{x} {exponent}");
            }
        }
    }

    #[test]
    fn looking_up_equals_multiplying() {
        let (rows, inputs) = (48, 96);
        let weights = Stream::new(1).normals(rows * inputs);
        let x = Stream::new(2).normals(inputs);
        for (mode, group) in [(Mode::Lat, None), (Mode::Acc, None), (Mode::Acc, Some(12))] {
            for bits in [2, 3, 4] {
                let packed = plain(&weights, inputs, mode, group, bits);
                let dense = packed.decode();
                let (y, done) = multiply(&packed, &x).unwrap();
                for (row, y) in dense.chunks(inputs).zip(&y) {
                    let product = |(w, x): (&f32, &f32)| f64::from(*w) * f64::from(*x);
                    let expected: f64 = row.iter().zip(&x).map(product).sum();
                    let size: f64 = row.iter().zip(&x).map(|p| product(p).abs()).sum();
                    assert!(
                        (f64::from(*y) - expected).abs() < 1e-5 * size,
                        "{mode:?} {y} {expected}"
                    );
                }
                assert_eq!(done.lookups, (rows * inputs / 8) as u64 * u64::from(bits));
            }
        }
    }
}
