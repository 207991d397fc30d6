//! The operations as plain Burn compositions: what devices without a fused kernel run, and the reference of the tests.

use burn::tensor::{Int, Tensor, TensorData, activation as act};

use super::{Activation, AttentionSpec, LogitLoss};

/// An elementwise nonlinearity.
pub fn activation<const D: usize>(x: Tensor<D>, kind: Activation) -> Tensor<D> {
    match kind {
        Activation::Silu => act::silu(x),
        Activation::Gelu => act::gelu(x),
        Activation::GeluTanh => {
            let cube = x.clone().powi_scalar(3);
            let u = (x.clone() + cube * 0.044_715) * 0.797_884_56;
            x * (u.tanh() + 1.0) * 0.5
        }
        Activation::QuickGelu => x.clone() * act::sigmoid(x * 1.702),
        Activation::Relu => act::relu(x),
        Activation::Relu6 => x.clamp(0.0, 6.0),
        Activation::Tanh => x.tanh(),
    }
}

/// `x · weightᵀ + bias`, see [`super::linear`].
pub fn linear(x: Tensor<3>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<3> {
    let [batch, seq, k] = x.dims();
    let [n, _] = weight.dims();
    let y = x.reshape([batch * seq, k]).matmul(weight.transpose());
    let y = match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    };
    y.reshape([batch, seq, n])
}

/// RMSNorm, see [`super::rms_norm`].
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let mean = x.clone().powi_scalar(2).mean_dim(D - 1);
    x / (mean + eps).sqrt() * weight.unsqueeze()
}

/// LayerNorm, see [`super::layer_norm`].
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    eps: f64,
) -> Tensor<D> {
    let x = x.clone() - x.mean_dim(D - 1);
    let var = x.clone().powi_scalar(2).mean_dim(D - 1);
    let y = x / (var + eps).sqrt() * weight.unsqueeze();
    match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    }
}

/// `activation(gate) * up`.
pub fn gated(gate: Tensor<3>, up: Tensor<3>, kind: Activation) -> Tensor<3> {
    activation(gate, kind) * up
}

/// Rotary position embedding, see [`super::rope`].
pub fn rope(x: Tensor<3>, cos: Tensor<2>, sin: Tensor<2>, heads: usize) -> Tensor<3> {
    let [batch, seq, width] = x.dims();
    let head_dim = width / heads;
    let half = cos.dims()[1];
    let x = x.reshape([batch, seq, heads, head_dim]);
    let a = x.clone().slice([0..batch, 0..seq, 0..heads, 0..half]);
    let b = x.clone().slice([0..batch, 0..seq, 0..heads, half..2 * half]);
    let cos = cos.reshape([1, seq, 1, half]);
    let sin = sin.reshape([1, seq, 1, half]);
    let first = a.clone() * cos.clone() - b.clone() * sin.clone();
    let second = b * cos + a * sin;
    let mut parts = vec![first, second];
    if 2 * half < head_dim {
        parts.push(x.slice([0..batch, 0..seq, 0..heads, 2 * half..head_dim]));
    }
    Tensor::cat(parts, 3).reshape([batch, seq, width])
}

/// Softmax attention, see [`super::attention`].
pub fn attention(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, spec: &AttentionSpec) -> Tensor<3> {
    mix(attention_probabilities(q, k, spec), v, spec)
}

/// What each query takes of each key, `[batch, heads, seq, keys]`.
pub fn attention_probabilities(q: Tensor<3>, k: Tensor<3>, spec: &AttentionSpec) -> Tensor<4> {
    let [batch, seq, _] = q.dims();
    let keys = k.dims()[1];
    let device = q.device();
    let q = q.reshape([batch, seq, spec.heads, spec.head_dim]).swap_dims(1, 2);
    let k = per_query_head(k, spec);
    let mut scores = q.matmul(k.swap_dims(2, 3)) * spec.scale as f64;
    if let Some(cap) = spec.softcap {
        scores = (scores / cap as f64).tanh() * cap as f64;
    }
    if spec.causal.is_some() || spec.window.is_some() || spec.lengths.is_some() {
        let mut mask = vec![f32::NEG_INFINITY; batch * seq * keys];
        for b in 0..batch {
            for i in 0..seq {
                let from = (b * seq + i) * keys;
                let visible = spec.visible(b, i, keys);
                mask[from + visible.start..from + visible.end].fill(0.0);
            }
        }
        scores =
            scores + Tensor::<4>::from_data(TensorData::new(mask, [batch, 1, seq, keys]), &device);
    }
    act::softmax(scores, 3)
}

/// Values in the shares of `probabilities` `[batch, heads, seq, keys]`: `[batch, seq, heads * head_dim]`.
pub fn mix(probabilities: Tensor<4>, v: Tensor<3>, spec: &AttentionSpec) -> Tensor<3> {
    let [batch, heads, seq, _] = probabilities.dims();
    let v = per_query_head(v, spec);
    probabilities.matmul(v).swap_dims(1, 2).reshape([batch, seq, heads * spec.head_dim])
}

/// Keys or values `[batch, heads, keys, head_dim]`, repeated for the query heads that share them.
fn per_query_head(x: Tensor<3>, spec: &AttentionSpec) -> Tensor<4> {
    let (heads, kv_heads, dim) = (spec.heads, spec.kv_heads, spec.head_dim);
    let [batch, keys, _] = x.dims();
    x.reshape([batch, keys, kv_heads, 1, dim])
        .expand([batch, keys, kv_heads, heads / kv_heads, dim])
        .reshape([batch, keys, heads, dim])
        .swap_dims(1, 2)
}

/// Table look-up, see [`super::embedding`].
pub fn embedding(table: Tensor<2>, ids: &[u32], batch: usize, seq: usize) -> Tensor<3> {
    let width = table.dims()[1];
    let ids: Vec<i32> = ids.iter().map(|&i| i as i32).collect();
    let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [batch * seq]), &table.device());
    table.select(0, ids).reshape([batch, seq, width])
}

/// A loss on logits, see [`super::head_loss`].
pub fn head_loss(x: Tensor<3>, weight: Tensor<2>, loss: &LogitLoss) -> Tensor<1> {
    let logits = linear(x, weight, None);
    let [batch, seq, vocab] = logits.dims();
    logit_loss(logits.reshape([batch * seq, vocab]), loss)
}

/// A loss on logits, see [`super::logit_loss`]: the logits go to the host, their gradient comes back as the constant factor of a
/// dot product that has the loss's value and its gradient.
pub fn logit_loss(logits: Tensor<2>, loss: &LogitLoss) -> Tensor<1> {
    let [rows, classes] = logits.dims();
    let device = logits.device();
    let mut values = super::to_vec(&logits);
    let value = loss(0..rows, &mut values);
    let slope = Tensor::<2>::from_data(TensorData::new(values, [rows, classes]), &device);
    let linear = (logits * slope).sum();
    let offset = linear.clone().detach() - value;
    linear - offset
}
