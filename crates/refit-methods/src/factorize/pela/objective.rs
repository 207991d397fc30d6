//! What a student in thin factors learns from its teacher, on any model whose blocks and linears can be reached.

use burn::tensor::{Tensor, TensorData};
use refit_nn::operator::{Linear, LowRank, Operator};
use refit_nn::{Tap, ops};

/// The outputs of all blocks of one pass, in their order.
#[derive(Default)]
pub struct Blocks(pub Vec<Tensor<3>>);

impl Tap for Blocks {
    fn visit(&mut self, name: &str, value: Tensor<3>) -> Tensor<3> {
        if name.ends_with(".resid.post") {
            self.0.push(value.clone());
        }
        value
    }
}

/// `L_fd`: the mean over blocks of the mean squared distance of their outputs. `mask` `[batch, seq, 1]` is 1 where a token counts
/// and 0 on padding.
pub fn features(student: Blocks, teacher: Blocks, mask: Option<Tensor<3>>) -> Option<Tensor<1>> {
    let pairs: Vec<_> = student.0.into_iter().zip(teacher.0).collect();
    let count = pairs.len().max(1) as f64;
    let one = |(student, teacher): (Tensor<3>, Tensor<3>)| distance(student, teacher, mask.clone());
    pairs.into_iter().map(one).reduce(|a, b| a + b).map(|sum| sum / count)
}

/// The mean squared distance of two activations, of which the second gets no gradient.
pub fn distance(student: Tensor<3>, teacher: Tensor<3>, mask: Option<Tensor<3>>) -> Tensor<1> {
    let teacher = on(teacher, &student);
    let square = (student - teacher).powf_scalar(2.0);
    match mask {
        None => square.mean(),
        Some(mask) => {
            let width = square.dims()[2] as f32;
            let mask = on(mask, &square);
            (square * mask.clone()).sum() / (mask.sum() * width)
        }
    }
}

/// `x` where `like` is, as a constant.
fn on(x: Tensor<3>, like: &Tensor<3>) -> Tensor<3> {
    match like.is_autodiff() && !x.is_autodiff() {
        true => Tensor::from_inner(x),
        false => x,
    }
}

/// A factored linear and what the teacher has there, `[out, in]` row-major.
pub struct Held<'a> {
    /// The pair.
    pub pair: &'a LowRank,
    /// `W`.
    pub weight: &'a [f32],
}

/// The pair of a linear.
pub fn pair_of(linear: &Linear) -> Option<&LowRank> {
    match &linear.op {
        Operator::LowRank(pair) => Some(pair),
        _ => None,
    }
}

/// `L_wp`: the mean over pairs of `(max |up down - W| - epsilon)^2`. The gradient flows through the largest entry alone, as it does
/// in the reference's `torch.norm(., inf)`; so that entry is found without one, and computed once more with it.
pub fn perturbation(pairs: &[Held], epsilon: f64) -> Option<Tensor<1>> {
    let count = pairs.len().max(1) as f64;
    let one = |held: &Held| {
        let (up, down) = (held.pair.up.val(), held.pair.down.val());
        let (out, inputs) = (up.dims()[0], down.dims()[1]);
        let plain = |x: &Tensor<2>| if x.is_autodiff() { x.clone().inner() } else { x.clone() };
        let product = ops::to_vec(&plain(&up).matmul(plain(&down)));
        let far = product.iter().zip(held.weight).map(|(p, w)| (p - w).abs());
        let (at, _) = far
            .enumerate()
            .fold((0, -1.0f32), |best, (at, size)| if size > best.1 { (at, size) } else { best });
        let (row, column) = (at / inputs, at % inputs);
        let rank = up.dims()[1];
        debug_assert_eq!(product.len(), out * inputs);
        let entry = up
            .slice([row..row + 1, 0..rank])
            .matmul(down.slice([0..rank, column..column + 1]))
            .reshape([1]);
        let wanted =
            Tensor::<1>::from_data(TensorData::new(vec![held.weight[at]], [1]), &entry.device());
        ((entry - wanted).abs() - epsilon).powf_scalar(2.0)
    };
    pairs.iter().map(one).reduce(|a, b| a + b).map(|sum| sum / count)
}

#[cfg(test)]
mod tests {
    use refit_nn::BurnDevice;

    use super::*;
    use crate::testing::Stream;

    fn tensor(seed: u64, shape: [usize; 3]) -> Tensor<3> {
        let values = Stream::new(seed).normals(shape.iter().product());
        Tensor::from_data(TensorData::new(values, shape), &BurnDevice::flex())
    }

    fn value(x: Tensor<1>) -> f32 {
        ops::to_vec(&x)[0]
    }

    #[test]
    fn a_student_that_is_its_teacher_has_nothing_to_learn() {
        let blocks = || Blocks((0..3).map(|seed| tensor(seed, [2, 5, 8])).collect());
        assert_eq!(value(features(blocks(), blocks(), None).unwrap()), 0.0);
        let other = Blocks((3..6).map(|seed| tensor(seed, [2, 5, 8])).collect());
        let apart = value(features(other, blocks(), None).unwrap());
        assert!((1.0..3.0).contains(&apart), "{apart}");
        assert!(features(Blocks::default(), Blocks::default(), None).is_none());
    }

    #[test]
    fn padding_does_not_count() {
        let (a, b) = (tensor(1, [1, 4, 3]), tensor(2, [1, 4, 3]));
        let mask = Tensor::<3>::from_data(
            TensorData::new(vec![1.0f32, 1.0, 0.0, 0.0], [1, 4, 1]),
            &BurnDevice::flex(),
        );
        let masked = value(distance(a.clone(), b.clone(), Some(mask)));
        let short = |x: Tensor<3>| x.slice([0..1, 0..2, 0..3]);
        let alone = value(distance(short(a), short(b), None));
        assert!((masked - alone).abs() < 1e-6, "{masked} {alone}");
    }

    fn pair(up: Vec<f32>, down: Vec<f32>, rank: usize) -> Linear {
        let (out, inputs) = (up.len() / rank, down.len() / rank);
        let zeros = Tensor::<2>::zeros([out, inputs], &BurnDevice::flex());
        let mut linear = Linear::dense("x", zeros, None);
        linear.set_factors(down, up, rank);
        linear
    }

    #[test]
    fn the_farthest_entry_is_held_at_epsilon() {
        let mut stream = Stream::new(4);
        let (up, down) = (stream.normals(6 * 2), stream.normals(2 * 5));
        let linear = pair(up, down, 2);
        let weight = ops::to_vec(&linear.weight());
        let of = |weight: &[f32]| {
            let held = Held { pair: pair_of(&linear).unwrap(), weight };
            f64::from(value(perturbation(&[held], 0.25).unwrap()))
        };
        // Nothing moved: epsilon squared. Exactly epsilon: nothing. Twice that: epsilon squared again.
        assert!((of(&weight) - 0.0625).abs() < 1e-6);
        let mut moved = weight.clone();
        moved[7] += 0.25;
        assert!(of(&moved).abs() < 1e-6);
        moved[7] += 0.25;
        moved[20] -= 0.1;
        assert!((of(&moved) - 0.0625).abs() < 1e-5);
    }
}
