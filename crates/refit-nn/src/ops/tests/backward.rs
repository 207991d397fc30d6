//! Gradients of the fused kernels: against autodiff through the plain composition, and against finite differences.

use burn::tensor::{Device, Distribution, Tensor};

use crate::ops::*;

fn leaf<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    let device = Device::flex().autodiff();
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &device).require_grad()
}

/// Sum of `y` times fixed, uneven factors: a scalar that gives every element its own gradient.
fn scalar<const D: usize>(y: Tensor<D>) -> Tensor<1> {
    let n = y.dims().iter().product::<usize>();
    let factors: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
    let factors = Tensor::<1>::from_floats(factors.as_slice(), &y.device());
    (y.reshape([n]) * factors).sum()
}

fn close(name: &str, a: Vec<f32>, b: Vec<f32>, tolerance: f32) {
    assert_eq!(a.len(), b.len(), "{name}");
    let size = b.iter().fold(1.0f32, |m, x| m.max(x.abs()));
    let worst = a.iter().zip(&b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(worst <= tolerance * size, "{name}: largest difference {worst} of values up to {size}");
}

/// Compares the gradients of each named input through two ways of computing the same scalar.
macro_rules! same_gradients {
    ($tolerance:expr, [$($x:ident),+], $fused:expr, $plain:expr $(,)?) => {{
        let fused = scalar($fused);
        let plain = scalar($plain);
        close("value", to_vec(&fused.clone().inner()), to_vec(&plain.clone().inner()), $tolerance);
        let (fused, plain) = (fused.backward(), plain.backward());
        $(close(
            stringify!($x),
            to_vec(&$x.grad(&fused).expect("the fused kernel gives a gradient")),
            to_vec(&$x.grad(&plain).expect("the composition gives a gradient")),
            $tolerance,
        );)+
    }};
}

#[test]
fn linear() {
    for (batch, seq, k, n) in [(1, 2, 17, 9), (3, 50, 33, 130)] {
        let (x, w, b) = (leaf([batch, seq, k]), leaf([n, k]), leaf([n]));
        same_gradients!(
            2e-5,
            [x, w, b],
            super::super::linear(x.clone(), w.clone(), Some(b.clone())),
            compose::linear(x.clone(), w.clone(), Some(b.clone())),
        );
        same_gradients!(
            2e-5,
            [x, w],
            super::super::linear(x.clone(), w.clone(), None),
            compose::linear(x.clone(), w.clone(), None),
        );
    }
}

/// Gradients alone: the sum of all outputs may come out near zero, where no relative bound means anything; the outputs
/// themselves are compared in `linear_in_bf16_is_close_to_f32`.
#[test]
fn linear_in_bf16() {
    let (x, w, b) = (leaf([2, 40, 64]), leaf([96, 64]), leaf([96]));
    let narrow = linear_in(x.clone(), w.clone(), Some(b.clone()), Precision::Bf16);
    let narrow = scalar(narrow).backward();
    let wide = scalar(compose::linear(x.clone(), w.clone(), Some(b.clone()))).backward();
    close("x", to_vec(&x.grad(&narrow).unwrap()), to_vec(&x.grad(&wide).unwrap()), 1e-2);
    close("w", to_vec(&w.grad(&narrow).unwrap()), to_vec(&w.grad(&wide).unwrap()), 1e-2);
    // No product: the same sum.
    close("b", to_vec(&b.grad(&narrow).unwrap()), to_vec(&b.grad(&wide).unwrap()), 1e-5);
}

#[test]
fn norms() {
    let (x, w, b) = (leaf([5, 31, 37]), leaf([37]), leaf([37]));
    same_gradients!(
        3e-5,
        [x, w],
        rms_norm(x.clone(), w.clone(), 1e-5),
        compose::rms_norm(x.clone(), w.clone(), 1e-5),
    );
    same_gradients!(
        3e-5,
        [x, w, b],
        layer_norm(x.clone(), w.clone(), Some(b.clone()), 1e-5),
        compose::layer_norm(x.clone(), w.clone(), Some(b.clone()), 1e-5),
    );
}

#[test]
fn activations_and_gates() {
    use Activation::*;
    let (x, up) = (leaf([2, 90, 101]) * 2.0, leaf([2, 90, 101]));
    for kind in [Silu, Gelu, GeluTanh, QuickGelu, Relu, Relu6, Tanh] {
        let x = x.clone().detach().require_grad();
        same_gradients!(2e-5, [x], kind.apply(x.clone()), compose::activation(x.clone(), kind));
        same_gradients!(
            2e-5,
            [x, up],
            gated(x.clone(), up.clone(), kind),
            compose::gated(x.clone(), up.clone(), kind),
        );
    }
}

#[test]
fn rope_and_embedding() {
    let device = Device::flex();
    let (seq, heads, dim) = (20, 6, 16);
    let table = Tensor::<2>::random([seq, 6], Distribution::Normal(0.0, 1.0), &device);
    let (cos, sin) = (table.clone().cos(), table.sin());
    let (cos, sin) = (Tensor::from_inner(cos), Tensor::from_inner(sin));
    let x = leaf([2, seq, heads * dim]);
    same_gradients!(
        1e-5,
        [x],
        rope(x.clone(), cos.clone(), sin.clone(), heads),
        compose::rope(x.clone(), cos.clone(), sin.clone(), heads),
    );
    let table = leaf([7, 5]);
    let ids = [0, 3, 3, 6, 1, 3];
    same_gradients!(
        1e-6,
        [table],
        embedding(table.clone(), &ids, 2, 3),
        compose::embedding(table.clone(), &ids, 2, 3),
    );
}

#[test]
fn attention() {
    let (heads, kv_heads, head_dim, seq, keys) = (6, 2, 16, 70, 90);
    let q = leaf([2, seq, heads * head_dim]);
    let (k, v) = (leaf([2, keys, kv_heads * head_dim]), leaf([2, keys, kv_heads * head_dim]));
    let open = AttentionSpec {
        heads,
        kv_heads,
        head_dim,
        scale: 0.25,
        causal: None,
        window: None,
        softcap: None,
        lengths: None,
    };
    let causal = AttentionSpec { causal: Some(20), ..open.clone() };
    let capped = AttentionSpec { window: Some(7), softcap: Some(5.0), ..causal.clone() };
    let padded = AttentionSpec { lengths: Some(vec![3, 90]), ..open.clone() };
    for spec in [open, causal, capped, padded] {
        same_gradients!(
            5e-5,
            [q, k, v],
            super::super::attention(q.clone(), k.clone(), v.clone(), &spec),
            compose::attention(q.clone(), k.clone(), v.clone(), &spec),
        );
    }
}

/// Mean cross-entropy as a [`LogitLoss`].
fn cross_entropy(
    targets: &[usize],
    vocab: usize,
) -> impl Fn(std::ops::Range<usize>, &mut [f32]) -> f64 {
    move |rows, logits| {
        let mut total = 0.0;
        for (row, logits) in rows.zip(logits.chunks_exact_mut(vocab)) {
            let chosen = logits[targets[row]];
            total += f64::from(back::softmax_in_place(logits) - chosen) / targets.len() as f64;
            logits[targets[row]] -= 1.0;
            logits.iter_mut().for_each(|g| *g /= targets.len() as f32);
        }
        total
    }
}

#[test]
fn head_loss_is_the_cross_entropy_of_all_logits() {
    let (x, w) = (leaf([2, 9, 12]), leaf([40, 12]));
    let targets: Vec<usize> = (0..18).map(|i| i * 11 % 40).collect();
    let loss = cross_entropy(&targets, 40);
    let ids: Vec<i32> = targets.iter().map(|&t| t as i32).collect();
    let ids = Tensor::<1, burn::tensor::Int>::from_ints(ids.as_slice(), &x.device());
    let ids = ids.reshape([18, 1]);
    let plain = || {
        let logits = compose::linear(x.clone(), w.clone(), None).reshape([18, 40]);
        -burn::tensor::activation::log_softmax(logits, 1).gather(1, ids.clone()).mean()
    };
    same_gradients!(
        1e-5,
        [x, w],
        super::super::head_loss(x.clone(), w.clone(), &loss, Precision::F32),
        plain(),
    );
    same_gradients!(1e-5, [x, w], compose::head_loss(x.clone(), w.clone(), &loss), plain());
    let logits = || compose::linear(x.clone(), w.clone(), None).reshape([18, 40]);
    same_gradients!(1e-5, [x, w], logit_loss(logits(), &loss), plain());
    same_gradients!(1e-5, [x, w], compose::logit_loss(logits(), &loss), plain());
    close("logits", to_vec(&logit_loss(logits().inner(), &loss)), to_vec(&plain().inner()), 1e-5);
    let host = super::super::head_loss(x.clone().inner(), w.clone().inner(), &loss, Precision::F32);
    close("value outside autodiff", to_vec(&host), to_vec(&plain().inner()), 1e-5);
}

#[test]
fn frozen_inputs_get_no_gradient() {
    let (x, w) = (leaf([1, 8, 16]), leaf([4, 16]).set_require_grad(false));
    let grads = scalar(super::super::linear(x.clone(), w.clone(), None)).backward();
    assert!(x.grad(&grads).is_some());
    assert!(w.grad(&grads).is_none());
    let (x, w) = (leaf([1, 8, 16]).set_require_grad(false), leaf([4, 16]));
    let grads = scalar(super::super::linear(x.clone(), w.clone(), None)).backward();
    assert!(x.grad(&grads).is_none());
    assert!(w.grad(&grads).is_some());
}

#[test]
fn gradients_follow_finite_differences() {
    let (heads, dim) = (2, 4);
    let spec = AttentionSpec {
        heads,
        kv_heads: 1,
        head_dim: dim,
        scale: 0.5,
        causal: Some(0),
        window: None,
        softcap: Some(3.0),
        lengths: None,
    };
    let inputs = [leaf([1, 5, 8]), leaf([1, 5, 4]), leaf([1, 5, 4])];
    let norm = leaf([8]);
    let run = |inputs: &[Tensor<3>; 3]| {
        let [q, k, v] = inputs.clone();
        let mixed = super::super::attention(q, k, v, &spec);
        scalar(gated(
            rms_norm(mixed.clone(), norm.clone(), 1e-3),
            layer_norm(mixed, norm.clone(), None, 1e-3),
            Activation::Silu,
        ))
    };
    let grads = run(&inputs).backward();
    for which in 0..3 {
        let analytic = to_vec(&inputs[which].grad(&grads).expect("tracked"));
        let values = to_vec(&inputs[which].clone().inner());
        for (i, slope) in analytic.iter().enumerate() {
            let at = |step: f32| {
                let mut moved = values.clone();
                moved[i] += step;
                let data = burn::tensor::TensorData::new(moved, inputs[which].dims());
                let mut inputs = inputs.clone();
                inputs[which] = Tensor::from_data(data, &inputs[which].device());
                f64::from(to_vec(&run(&inputs).inner())[0])
            };
            let h = 1e-2;
            let measured = (at(h) - at(-h)) / (2.0 * f64::from(h));
            let error = (measured - f64::from(*slope)).abs();
            assert!(
                error < 2e-2 * (1.0 + measured.abs()),
                "input {which}[{i}]: {measured} {slope}"
            );
        }
    }
}
