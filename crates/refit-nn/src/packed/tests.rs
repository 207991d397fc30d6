//! Packed products against dense ones on the same rounded inputs, for every kernel of this machine.

use refit_data::Rng;

use super::*;

fn coded(
    rng: &mut Rng,
    (rows, inputs): (usize, usize),
    bits: u8,
    group: usize,
    zeros: u8,
) -> Coded {
    let groups = inputs / group;
    let below = |rng: &mut Rng| rng.below(1 << bits) as u8;
    let half = |x: f64| f16::from_f64(x).to_f32();
    let scales = (0..rows * groups).map(|_| half(0.01 + 0.02 * rng.uniform())).collect();
    let zeros = match zeros {
        0 => Zeros::Constant(1 << (bits - 1)),
        1 => Zeros::Integer((0..rows * groups).map(|_| below(rng)).collect()),
        _ => Zeros::Float((0..rows * groups).map(|_| half(-0.2 * rng.uniform())).collect()),
    };
    let codes = (0..rows * inputs).map(|_| below(rng)).collect();
    Coded { rows, inputs, bits, group, codes, scales, zeros }
}

fn dense(weights: &[f32], x: &[f32], inputs: usize) -> Vec<f64> {
    let mut out = Vec::new();
    for x in x.chunks(inputs) {
        for row in weights.chunks(inputs) {
            out.push(row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum());
        }
    }
    out
}

#[test]
fn every_kernel_equals_the_dense_product_on_rounded_inputs() {
    let mut rng = Rng::new(3);
    let shapes = [(8, 32), (24, 64), (13, 192), (64, 576), (5, 96)];
    for bits in [2u8, 3, 4, 5, 6, 8] {
        for (shape, zeros) in shapes.into_iter().flat_map(|s| (0..3).map(move |z| (s, z))) {
            let (rows, inputs) = shape;
            let groups = [32, 64, 96, inputs];
            for group in groups.into_iter().filter(|g| inputs % g == 0) {
                let coded = coded(&mut rng, shape, bits, group, zeros);
                let packed = PackedMatrix::new(&coded).expect("whole chunks");
                let weights = coded.decode();
                assert_eq!(packed.decode(), weights, "{bits} bits, group {group}, {shape:?}");
                for tokens in [1usize, 3, 4, 9] {
                    let x: Vec<f32> = (0..tokens * inputs).map(|_| rng.normal() as f32).collect();
                    let bias: Vec<f32> = (0..rows).map(|_| rng.normal() as f32).collect();
                    let rounded = Rounded::new(&x, inputs);
                    let wanted = dense(&weights, &rounded.decode(inputs), inputs);
                    for kernel in kernels() {
                        let mut out = vec![0.0; tokens * rows];
                        packed.multiply_rounded(&rounded, Some(&bias), &mut out, kernel);
                        for (at, (found, wanted)) in out.iter().zip(&wanted).enumerate() {
                            let wanted = wanted + f64::from(bias[at % rows]);
                            let off = (f64::from(*found) - wanted).abs();
                            assert!(
                                off < 2e-5 * (1.0 + wanted.abs()) * (inputs as f64).sqrt(),
                                "{kernel:?}, {bits} bits, zeros {zeros}, group {group}, {shape:?}, {tokens} tokens: \
                                 {found} is not {wanted}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn extreme_codes_do_not_overflow() {
    // The largest sums that there can be: every code and every input at its end.
    for bits in [2u8, 4, 8] {
        let (rows, inputs) = (8, 64);
        let top = ((1u16 << bits) - 1) as u8;
        let codes = vec![top; rows * inputs];
        let scales = vec![1.0; rows * 2];
        let coded =
            Coded { rows, inputs, bits, group: 32, codes, scales, zeros: Zeros::Constant(0) };
        let packed = PackedMatrix::new(&coded).expect("whole chunks");
        for sign in [1.0f32, -1.0] {
            let x = vec![sign * 127.0; inputs];
            let wanted = sign * 127.0 * f32::from(top) * inputs as f32;
            for kernel in kernels() {
                let mut out = vec![0.0; rows];
                packed.multiply_rounded(&Rounded::new(&x, inputs), None, &mut out, kernel);
                assert_eq!(out, vec![wanted; rows], "{kernel:?} {bits}");
            }
        }
    }
}

#[test]
fn rounding_of_inputs_errs_by_half_a_step_and_shows_what_is_not_finite() {
    let mut rng = Rng::new(5);
    let x: Vec<f32> = (0..2 * 40).map(|i| (rng.normal() * f64::from(1 + i % 7)) as f32).collect();
    let decoded = Rounded::new(&x, 40).decode(40);
    for (x, decoded) in x.chunks(40).zip(decoded.chunks(40)) {
        for (x, decoded) in x.chunks(CHUNK).zip(decoded.chunks(CHUNK)) {
            let step = x.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0;
            assert!(x.iter().zip(decoded).all(|(a, b)| (a - b).abs() <= 0.501 * step));
        }
    }
    assert_eq!(Rounded::new(&[0.0; 32], 32).decode(32), [0.0; 32]);
    let coded = coded(&mut rng, (8, 32), 4, 32, 2);
    let packed = PackedMatrix::new(&coded).expect("whole chunks");
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = vec![1.0; 32];
        x[3] = bad;
        let mut out = vec![0.0; 8];
        packed.multiply(&x, None, &mut out);
        assert!(out.iter().all(|y| y.is_nan()));
    }
}

#[test]
fn groups_that_are_no_whole_chunks_are_refused_and_bytes_are_those_of_the_codes() {
    let mut rng = Rng::new(1);
    assert_eq!(PackedMatrix::new(&coded(&mut rng, (8, 64), 4, 16, 0)), None);
    assert_eq!(PackedMatrix::new(&coded(&mut rng, (8, 96), 4, 48, 0)), None);
    let four = PackedMatrix::new(&coded(&mut rng, (64, 128), 4, 32, 2)).expect("whole chunks");
    // Two halves for every group of 32 codes of 4 bits: 5 bits a weight, as Q4_1.
    assert_eq!(four.bytes() * 8, 5 * 64 * 128);
    let two = PackedMatrix::new(&coded(&mut rng, (64, 128), 2, 64, 0)).expect("whole chunks");
    assert_eq!(two.bytes(), 64 * 128 / 4 + 64 * 2 * 2);
    // A row of inputs that no chunk divides is padded.
    let ragged = coded(&mut rng, (9, 40), 8, 40, 1);
    assert_eq!(PackedMatrix::new(&ragged).expect("one group").decode(), ragged.decode());
}
