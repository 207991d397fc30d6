//! Activation checkpointing gives the gradients of the ordinary pass.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor, TensorData};
use refit_nn::adapt::Lora;
use refit_nn::ops::sink::{GradientSink, Leaf, leaf, with_sink};
use refit_nn::ops::{self, to_vec};
use refit_nn::scratch::DecoderShape;
use refit_nn::{BurnDevice as Device, Decoder, Run};

fn decoder() -> Decoder {
    let shape = DecoderShape {
        hidden: 32,
        intermediate: 48,
        layers: 3,
        heads: 4,
        kv_heads: 2,
        vocab: 40,
        context: 16,
        tied: true,
    };
    shape.init(2, &Device::flex()).expect("a valid shape")
}

/// A scalar of the last hidden states that gives every element its own gradient.
fn loss(model: &Decoder, run: &mut Run) -> Tensor<1> {
    let ids: Vec<u32> = (0..24).map(|i| i * 7 % 40).collect();
    let x = model.hidden(&ids, 2, run).expect("runs");
    let n = x.dims().iter().product();
    let factors: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
    (x.reshape([n]) * Tensor::from_floats(factors.as_slice(), &Device::flex().autodiff())).sum()
}

struct Collect<'a>(&'a Gradients, BTreeMap<String, Vec<f32>>);

impl ModuleVisitor for Collect<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = param.base().grad(self.0) {
            self.1.insert(param.id.to_string(), to_vec(&grad));
        }
    }
}

fn gradients(model: &Decoder, run: &mut Run) -> BTreeMap<String, Vec<f32>> {
    let grads = loss(model, run).backward();
    let mut collect = Collect(&grads, BTreeMap::new());
    model.visit(&mut collect);
    collect.1
}

fn adapted(base: Decoder) -> Decoder {
    let mut model = base;
    for linear in model.blocks.iter_mut().flat_map(|b| b.linears_mut()) {
        let [out, inputs] = linear.weight().dims();
        let table = |rows: usize, columns: usize| {
            let values = (0..rows * columns).map(|i| ((i * 13 % 17) as f32 - 8.0) / 90.0);
            Tensor::<2>::from_data(
                TensorData::new(values.collect::<Vec<_>>(), [rows, columns]),
                &Device::flex(),
            )
        };
        let form = Lora {
            a: Param::from_tensor(table(2, inputs)),
            b: Param::from_tensor(table(out, 2)),
            scale: 2.0,
        };
        assert!(linear.attach(form, true));
    }
    model
}

#[test]
fn gradients_are_the_same_numbers() {
    for (what, model, count) in [
        ("all", decoder().train(), 1 + 1 + 3 * 9),
        ("adapters", adapted(decoder()).train(), 1 + 1 + 3 * (2 + 14)),
    ] {
        let usual = loss(&model, &mut Run::plain());
        let again = loss(&model, &mut Run::checkpointed());
        assert_eq!(to_vec(&usual), to_vec(&again), "{what}");
        let usual = gradients(&model, &mut Run::plain());
        // The norm after the last block is outside of `hidden`.
        assert_eq!(usual.len(), count - 1, "{what}");
        assert_eq!(usual, gradients(&model, &mut Run::checkpointed()), "{what}");
    }
}

#[test]
fn a_frozen_beginning_does_not_cut_the_gradient_off() {
    let mut model = decoder().train();
    let weight = model.frame.embed.weight.clone();
    model.frame.embed.weight = weight.set_require_grad(false);
    let usual = gradients(&model, &mut Run::plain());
    assert_eq!(usual.len(), 3 * 9);
    assert_eq!(usual, gradients(&model, &mut Run::checkpointed()));
    // Nothing trains in the first block, either.
    model.blocks[0] = model.blocks[0].clone().no_grad();
    let usual = gradients(&model, &mut Run::plain());
    assert_eq!(usual.len(), 2 * 9);
    assert_eq!(usual, gradients(&model, &mut Run::checkpointed()));
}

#[test]
fn without_autodiff_it_is_the_plain_pass() {
    let model = decoder();
    let ids = [1, 2, 3, 4];
    let run = |run: &mut Run| to_vec(&model.hidden(&ids, 1, run).expect("runs"));
    assert_eq!(run(&mut Run::plain()), run(&mut Run::checkpointed()));
    // A tap sees the inside of the blocks, so they run as usual.
    let model = model.train();
    let mut seen = 0;
    let mut tap = |_: &str, x: Tensor<3>| {
        seen += 1;
        x
    };
    let mut tapped = Run { checkpoint: true, ..Run::tapped(&mut tap) };
    model.hidden(&ids, 1, &mut tapped).expect("runs");
    assert!(seen > 3 * 7, "{seen}");
}

#[test]
fn a_sink_sees_the_gradients_under_the_names_of_the_outer_graph() {
    struct Take(BTreeMap<String, Leaf>, BTreeMap<String, Vec<f32>>);
    impl GradientSink for Take {
        fn take(&mut self, leaf: Leaf, grad: &[f32]) -> bool {
            let found = self.0.iter().find(|(_, l)| **l == leaf).map(|(name, _)| name.clone());
            found.is_some_and(|name| self.1.insert(name, grad.to_vec()).is_none())
        }
    }
    let model = decoder().train();
    let usual = gradients(&model, &mut Run::plain());
    let wanted = model.blocks.iter().flat_map(|b| b.linears()).map(|linear| {
        let ops_weight = match &linear.op {
            refit_nn::operator::Operator::Dense(dense) => &dense.weight,
            _ => unreachable!("scratch models are dense"),
        };
        (ops_weight.id.to_string(), leaf(&ops_weight.base()).expect("tracked"))
    });
    let mut sink = Take(wanted.collect(), BTreeMap::new());
    let loss = loss(&model, &mut Run::checkpointed());
    let grads = with_sink(&mut sink, || loss.backward());
    assert_eq!(sink.1.len(), 3 * 7);
    assert!(sink.1.iter().all(|(name, grad)| usual[name] == *grad));
    let mut rest = Collect(&grads, BTreeMap::new());
    model.visit(&mut rest);
    assert_eq!(rest.1.len(), usual.len() - 3 * 7);
    assert!(ops::sink::leaf(&Tensor::<1>::zeros([1], &Device::flex())).is_none());
}
