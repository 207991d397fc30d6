//! Operators of two thin matrices, alone and beside codes, against the dense matrix that they stand for.

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};
use refit_nn::operator::Linear;
use refit_nn::packed::PackedMatrix;
use refit_nn::{BurnDevice, Run, ops};
use refit_store::codes::{Coded, Zeros};

const OUT: usize = 24;
const IN: usize = 64;
const RANK: usize = 5;

/// Deterministic values between -1 and 1.
fn values(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn matrix(seed: u32, shape: [usize; 2]) -> Tensor<2> {
    let data = TensorData::new(values(seed, shape[0] * shape[1]), shape);
    Tensor::from_data(data, &BurnDevice::flex())
}

fn forward(linear: &Linear, x: &Tensor<3>) -> Vec<f32> {
    ops::to_vec(&linear.forward(x.clone(), &mut Run::plain()))
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn inputs() -> Tensor<3> {
    let data = TensorData::new(values(9, 2 * 3 * IN), [2, 3, IN]);
    Tensor::from_data(data, &BurnDevice::flex())
}

fn bias() -> Tensor<1> {
    Tensor::from_data(TensorData::new(values(4, OUT), [OUT]), &BurnDevice::flex())
}

#[test]
fn a_pair_is_the_dense_product() {
    let (down, up) = (matrix(1, [RANK, IN]), matrix(2, [OUT, RANK]));
    let pair = Linear::factored("x", None, down, up, Some(bias()));
    let dense = Linear::dense("x", pair.weight(), Some(bias()));
    assert_eq!(pair.shape(), [OUT, IN]);
    assert!(largest_difference(&forward(&pair, &inputs()), &forward(&dense, &inputs())) < 1e-5);
    let mut again = Linear::dense("x", Tensor::zeros([OUT, IN], &BurnDevice::flex()), Some(bias()));
    again.set_factors(values(1, RANK * IN), values(2, OUT * RANK), RANK);
    assert_eq!(forward(&again, &inputs()), forward(&pair, &inputs()));
}

#[test]
fn a_compensation_is_the_codes_and_the_pair() {
    let codes: Vec<u8> = (0..OUT * IN).map(|i| (i * 7 % 16) as u8).collect();
    let scales: Vec<f32> = (0..OUT * 2).map(|i| 0.03125 * (1 + i % 3) as f32).collect();
    let zeros = Zeros::Constant(8);
    let coded = Coded { rows: OUT, inputs: IN, bits: 4, group: 32, codes, scales, zeros };
    let packed = Arc::new(PackedMatrix::new(&coded).unwrap());
    let (down, up) = (matrix(1, [RANK, IN]), matrix(2, [OUT, RANK]));
    let pair = Linear::factored("x", None, down.clone(), up.clone(), None);
    let plain = Linear::packed("x", packed.clone(), Some(bias()));
    let both = Linear::factored("x", Some(packed), down, up, Some(bias()));
    assert_eq!(both.shape(), [OUT, IN]);
    // The sum of its parts, and what it says its weight is.
    let sum: Vec<f32> = forward(&plain, &inputs())
        .iter()
        .zip(forward(&pair, &inputs()))
        .map(|(a, b)| a + b)
        .collect();
    assert!(largest_difference(&forward(&both, &inputs()), &sum) < 1e-5);
    let parts = ops::to_vec(&(plain.weight() + pair.weight()));
    assert_eq!(ops::to_vec(&both.weight()), parts);
}
