//! Every fused kernel against the plain composition of Burn.

use burn::tensor::{Device, Distribution, Tensor};

use super::*;

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

fn plain<const D: usize>(x: &Tensor<D>) -> Tensor<D> {
    x.clone()
}

fn assert_close<const D: usize>(a: &Tensor<D>, b: &Tensor<D>, tolerance: f32) {
    assert_eq!(a.dims(), b.dims());
    let worst = to_vec(a).iter().zip(to_vec(b)).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(worst <= tolerance, "largest difference {worst}");
}

#[test]
fn linear_matches_the_composition() {
    let device = Device::flex();
    for (batch, seq, k, n) in [(1, 1, 64, 33), (1, 3, 65, 200), (2, 40, 96, 130)] {
        let (x, w, b) =
            (random([batch, seq, k], &device), random([n, k], &device), random([n], &device));
        let fused = linear(x.clone(), w.clone(), Some(b.clone()));
        assert_close(&fused, &compose::linear(plain(&x), plain(&w), Some(plain(&b))), 2e-4);
        assert_close(
            &linear(x.clone(), w.clone(), None),
            &compose::linear(plain(&x), plain(&w), None),
            2e-4,
        );
    }
}

#[test]
fn norms_and_activations_match_the_composition() {
    let device = Device::flex();
    let (x, w, b) = (random([2, 9, 37], &device), random([37], &device), random([37], &device));
    assert_close(
        &rms_norm(x.clone(), w.clone(), 1e-5),
        &compose::rms_norm(plain(&x), plain(&w), 1e-5),
        1e-5,
    );
    let fused = layer_norm(x.clone(), w.clone(), Some(b.clone()), 1e-5);
    assert_close(&fused, &compose::layer_norm(plain(&x), plain(&w), Some(plain(&b)), 1e-5), 1e-5);
    let big = random([3, 100, 101], &device) * 3.0;
    use Activation::*;
    for kind in [Silu, Gelu, GeluTanh, QuickGelu, Relu, Relu6, Tanh] {
        assert_close(&kind.apply(big.clone()), &compose::activation(plain(&big), kind), 2e-6);
        assert_close(
            &gated(x.clone(), x.clone(), kind),
            &compose::gated(plain(&x), plain(&x), kind),
            1e-5,
        );
    }
}

#[test]
fn rope_and_attention_match_the_composition() {
    let device = Device::flex();
    let (batch, seq, heads, kv_heads, dim) = (2, 70, 6, 2, 16);
    let table = random([seq, 6], &device);
    let x = random([batch, seq, heads * dim], &device);
    let fused = rope(x.clone(), table.clone().cos(), table.clone().sin(), heads);
    assert_close(
        &fused,
        &compose::rope(plain(&x), plain(&table).cos(), plain(&table).sin(), heads),
        1e-5,
    );

    let mut spec = AttentionSpec {
        heads,
        kv_heads,
        head_dim: dim,
        scale: 0.25,
        causal: None,
        window: None,
        softcap: None,
        lengths: None,
    };
    let keys = 90;
    let (k, v) = (
        random([batch, keys, kv_heads * dim], &device),
        random([batch, keys, kv_heads * dim], &device),
    );
    let check = |spec: &AttentionSpec| {
        let fused = attention(x.clone(), k.clone(), v.clone(), spec);
        assert_close(&fused, &compose::attention(plain(&x), plain(&k), plain(&v), spec), 2e-5);
    };
    check(&spec);
    spec.causal = Some(20);
    check(&spec);
    spec.window = Some(7);
    spec.softcap = Some(5.0);
    check(&spec);
    spec = AttentionSpec { causal: None, window: None, lengths: Some(vec![3, 90]), ..spec };
    check(&spec);
    // One query row, as in decoding.
    let q = random([1, 1, heads * dim], &device);
    let one = |x: &Tensor<3>| x.clone().narrow(0, 0, 1);
    spec = AttentionSpec { causal: Some(keys - 1), lengths: None, softcap: None, ..spec };
    let fused = attention(q.clone(), one(&k), one(&v), &spec);
    assert_close(
        &fused,
        &compose::attention(plain(&q), plain(&one(&k)), plain(&one(&v)), &spec),
        2e-5,
    );
}

mod backward;

/// What bfloat16 operands cost: their relative error is at most 2^-9 each, and sums average it out.
#[test]
fn linear_in_bf16_is_close_to_f32() {
    let device = Device::flex();
    let (x, w, b) =
        (random([2, 40, 96], &device), random([130, 96], &device), random([130], &device));
    let wide = linear(x.clone(), w.clone(), Some(b.clone()));
    let narrow = linear_in(x.clone(), w.clone(), Some(b.clone()), Precision::Bf16);
    let (wide, narrow) = (to_vec(&wide), to_vec(&narrow));
    assert_ne!(wide, narrow, "the precision is used");
    let scale = (wide.iter().map(|v| v * v).sum::<f32>() / wide.len() as f32).sqrt();
    let gap: f32 = wide.iter().zip(&narrow).map(|(a, b)| (a - b).powi(2)).sum();
    let relative = (gap / wide.len() as f32).sqrt() / scale;
    assert!(relative < 4e-3, "relative error {relative}");
    // Too few rows to gain: the same numbers.
    let few = x.slice([0..1, 0..8, 0..96]);
    let (wide, narrow) =
        (linear(few.clone(), w.clone(), None), linear_in(few, w, None, Precision::Bf16));
    assert_eq!(to_vec(&wide), to_vec(&narrow));
}
