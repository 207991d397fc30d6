//! The operations that models are made of.
//!
//! Each runs a fused kernel when its operands live on the CPU backend ([`cpu`]), with a backward kernel of its own under
//! autodiff ([`back`]), and the plain Burn composition everywhere else ([`compose`]). The tests compare the three.

pub mod back;
pub mod bf16;
pub mod compand;
pub mod compose;
pub mod conv;
pub mod cpu;
mod decode;
mod grad;
pub mod simd;
pub mod sink;

use std::ops::Range;

use burn::tensor::{Bytes, DType, Shape, Tensor, TensorData};
use burn_flex::{Flex, FlexTensor, Layout};

use crate::packed::{self, PackedMatrix, Product, Rounded};
pub use compand::{Curve, compand};
pub use conv::{ConvSpec, conv2d, conv2d_with, global_avg_pool2d, max_pool2d};
pub(crate) use grad::tracked;

/// Elementwise nonlinearity, by its Hugging Face name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`: `silu`, `swish`.
    Silu,
    /// `x * Φ(x)` with the exact error function: `gelu`.
    Gelu,
    /// The tanh approximation: `gelu_new`, `gelu_pytorch_tanh`, `gelu_fast`.
    GeluTanh,
    /// `x * sigmoid(1.702 x)`: `quick_gelu`.
    QuickGelu,
    /// `max(x, 0)`: `relu`.
    Relu,
    /// `min(max(x, 0), 6)`: `relu6`.
    Relu6,
    /// `tanh(x)`.
    Tanh,
}

impl Activation {
    /// Reads the name that Hugging Face configs use.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "silu" | "swish" => Self::Silu,
            "gelu" | "gelu_python" => Self::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_python_tanh" => Self::GeluTanh,
            "quick_gelu" => Self::QuickGelu,
            "relu" => Self::Relu,
            "relu6" => Self::Relu6,
            "tanh" => Self::Tanh,
            _ => return None,
        })
    }

    /// Applies the nonlinearity.
    pub fn apply<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        if let Some(x) = host(&x) {
            return build(x.shape(), |out| cpu::activation(x.slice(), out, self));
        }
        grad::activation(&x, self).unwrap_or_else(|| compose::activation(x, self))
    }
}

/// How the large matrix products of linears and heads are computed, forward and backward. Sums, weights, activations and
/// everything else stay in f32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// Operands in f32.
    #[default]
    F32,
    /// Operands rounded to bfloat16; see [`bf16`]. Without effect off the CPU and on products too small to gain.
    Bf16,
}

/// `x · weightᵀ + bias`: `x [batch, seq, in]`, `weight [out, in]` (the layout of checkpoints), `bias [out]`.
pub fn linear(x: Tensor<3>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<3> {
    linear_in(x, weight, bias, Precision::F32)
}

/// [`linear`] at a precision.
pub fn linear_in(
    x: Tensor<3>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    precision: Precision,
) -> Tensor<3> {
    let [batch, seq, k] = x.dims();
    let [n, _] = weight.dims();
    if let (Some(hx), Some(hw)) = (host(&x), host(&weight)) {
        let bias = bias.as_ref().and_then(host);
        return build(Shape::from([batch, seq, n]), |out| {
            let bias = bias.as_ref().map(|b| b.slice());
            cpu::linear(hx.slice(), hw.slice(), bias, out, k, n, precision);
        });
    }
    grad::linear(&x, &weight, bias.as_ref(), precision)
        .unwrap_or_else(|| compose::linear(x, weight, bias))
}

/// `x · Wᵀ + bias` for a weight in codes, `x [batch, seq, in]` rounded to 8 bits on the way; see [`crate::packed`]. Runs on the CPU
/// whatever the device of `x`, and has no gradient.
pub fn packed_linear(x: Tensor<3>, w: &PackedMatrix, bias: Option<Tensor<1>>) -> Tensor<3> {
    let ([batch, seq, _], device) = (x.dims(), x.device());
    let shape = Shape::from([batch, seq, w.rows()]);
    let bias = bias.map(|bias| to_vec(&bias));
    if let Some(x) = host(&x) {
        return build(shape, |out| w.multiply(x.slice(), bias.as_deref(), out));
    }
    let mut out = vec![0.0; shape.num_elements()];
    w.multiply(&to_vec(&x), bias.as_deref(), &mut out);
    Tensor::from_data(TensorData::new(out, shape), &device)
}

/// [`packed_linear`] for several weights that read the same `x`: it is rounded once, and one pass over all rows of all weights
/// serves them. `None` off the CPU.
pub fn packed_linears<const N: usize>(
    x: &Tensor<3>,
    weights: [(&PackedMatrix, Option<Tensor<1>>); N],
) -> Option<[Tensor<3>; N]> {
    let [batch, seq, inputs] = x.dims();
    let x = host(x)?;
    let rounded = Rounded::new(x.slice(), inputs);
    let bias = weights.each_ref().map(|(_, bias)| bias.as_ref().map(to_vec));
    let mut outs = weights.each_ref().map(|(w, _)| vec![0.0f32; batch * seq * w.rows()]);
    let mut products: Vec<Product> = weights
        .iter()
        .zip(&bias)
        .zip(&mut outs)
        .map(|(((matrix, _), bias), out)| Product { matrix, bias: bias.as_deref(), out })
        .collect();
    packed::multiply_all(&rounded, &mut products);
    let rows = weights.map(|(w, _)| w.rows());
    let mut rows = rows.into_iter();
    Some(outs.map(|out| {
        let rows = rows.next().expect("invariant: as many as outputs");
        from_vec(out, Shape::from([batch, seq, rows]))
    }))
}

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    if let (Some(hx), Some(hw)) = (host(&x), host(&weight)) {
        return build(hx.shape(), |out| cpu::rms_norm(hx.slice(), hw.slice(), eps as f32, out));
    }
    grad::rms_norm(&x, &weight, eps).unwrap_or_else(|| compose::rms_norm(x, weight, eps))
}

/// `(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension.
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    eps: f64,
) -> Tensor<D> {
    if let (Some(hx), Some(hw)) = (host(&x), host(&weight)) {
        let bias = bias.as_ref().and_then(host);
        return build(hx.shape(), |out| {
            cpu::layer_norm(
                hx.slice(),
                hw.slice(),
                bias.as_ref().map(|b| b.slice()),
                eps as f32,
                out,
            );
        });
    }
    grad::layer_norm(&x, &weight, bias.as_ref(), eps)
        .unwrap_or_else(|| compose::layer_norm(x, weight, bias, eps))
}

/// `activation(gate) * up`.
pub fn gated(gate: Tensor<3>, up: Tensor<3>, kind: Activation) -> Tensor<3> {
    if let (Some(g), Some(u)) = (host(&gate), host(&up)) {
        return build(g.shape(), |out| cpu::gated(g.slice(), u.slice(), out, kind));
    }
    grad::gated(&gate, &up, kind).unwrap_or_else(|| compose::gated(gate, up, kind))
}

/// Rotary position embedding, half-split layout of Hugging Face: element `i` of a head pairs with `i + rotary_dim/2`.
///
/// `x [batch, seq, heads * head_dim]`; `cos`, `sin` `[seq, rotary_dim / 2]`; elements past `rotary_dim` stay.
pub fn rope(x: Tensor<3>, cos: Tensor<2>, sin: Tensor<2>, heads: usize) -> Tensor<3> {
    let [batch, seq, width] = x.dims();
    let head_dim = width / heads;
    if let (Some(c), Some(s), Some(hx)) = (host(&cos), host(&sin), host(&x)) {
        drop(x);
        let mut values = hx.into_vec();
        cpu::rope(&mut values, c.slice(), s.slice(), heads, head_dim, seq);
        return from_vec(values, Shape::from([batch, seq, width]));
    }
    grad::rope(&x, &cos, &sin, heads).unwrap_or_else(|| compose::rope(x, cos, sin, heads))
}

/// The shape of one softmax attention and what each query may see.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads` (grouped-query attention).
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// `Some(offset)`: query `i` sees keys `0..=offset + i`.
    pub causal: Option<usize>,
    /// Sliding window: only the last `window` visible keys are seen.
    pub window: Option<usize>,
    /// `softcap * tanh(score / softcap)` before the softmax (Gemma 2).
    pub softcap: Option<f32>,
    /// Number of real keys of each batch row; the rest is padding.
    pub lengths: Option<Vec<usize>>,
}

impl AttentionSpec {
    /// Keys that query `row` of batch element `batch` sees; never empty.
    pub fn visible(&self, batch: usize, row: usize, keys: usize) -> Range<usize> {
        let keys = self.lengths.as_ref().map_or(keys, |l| l[batch].clamp(1, keys));
        let end = self.causal.map_or(keys, |offset| (offset + row + 1).min(keys));
        let start = self.window.map_or(0, |window| end.saturating_sub(window));
        start..end
    }
}

/// Softmax attention with grouped keys and values.
///
/// `q [batch, seq, heads * head_dim]`, `k` and `v` `[batch, keys, kv_heads * head_dim]`; returns `[batch, seq, heads * head_dim]`.
pub fn attention(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, spec: &AttentionSpec) -> Tensor<3> {
    let [batch, seq, width] = q.dims();
    let [_, keys, _] = k.dims();
    if let (Some(hq), Some(hk), Some(hv)) = (host(&q), host(&k), host(&v)) {
        return build(Shape::from([batch, seq, width]), |out| {
            cpu::attention(hq.slice(), hk.slice(), hv.slice(), out, batch, seq, keys, spec);
        });
    }
    grad::attention(&q, &k, &v, spec).unwrap_or_else(|| compose::attention(q, k, v, spec))
}

/// Rows of `table [rows, width]` chosen by `ids`; returns `[batch, seq, width]`.
pub fn embedding(table: Tensor<2>, ids: &[u32], batch: usize, seq: usize) -> Tensor<3> {
    let width = table.dims()[1];
    if let Some(t) = host(&table) {
        return build(Shape::from([batch, seq, width]), |out| {
            cpu::embedding(t.slice(), ids, out, width);
        });
    }
    grad::embedding(&table, ids, batch, seq)
        .unwrap_or_else(|| compose::embedding(table, ids, batch, seq))
}

/// A loss on a few rows of logits: gets the range of rows and their logits `[rows, vocab]`, returns the sum of their losses and
/// leaves the gradient of that sum in place of the logits. Scaling (a mean, weights) is its business.
pub type LogitLoss<'a> = dyn Fn(Range<usize>, &mut [f32]) -> f64 + Sync + 'a;

/// A loss on the logits `x · weightᵀ` without ever holding all of them: `x [batch, seq, width]`, `weight [vocab, width]`.
///
/// Under autodiff the gradients of `x` and `weight` are computed in the same pass over the logits, as in Liger Kernel
/// (Hsu et al. 2024). Off the CPU, the logits are copied to the host.
pub fn head_loss(
    x: Tensor<3>,
    weight: Tensor<2>,
    loss: &LogitLoss,
    precision: Precision,
) -> Tensor<1> {
    if let (Some(hx), Some(hw)) = (host(&x), host(&weight)) {
        let k = weight.dims()[1];
        let (value, _, _) = back::head_loss(hx.slice(), hw.slice(), k, [false; 2], loss, precision);
        return Tensor::from_data([value as f32], &x.device());
    }
    grad::head_loss(&x, &weight, loss, precision)
        .unwrap_or_else(|| compose::head_loss(x, weight, loss))
}

/// A loss on logits that exist already, `[rows, classes]`: classifiers, whose logits are few. Off the CPU, they are copied to the
/// host.
pub fn logit_loss(logits: Tensor<2>, loss: &LogitLoss) -> Tensor<1> {
    if let Some(hl) = host(&logits) {
        let value = loss(0..logits.dims()[0], &mut hl.slice().to_vec());
        return Tensor::from_data([value as f32], &logits.device());
    }
    grad::logit_loss(&logits, loss).unwrap_or_else(|| compose::logit_loss(logits, loss))
}

/// A contiguous f32 view of a CPU tensor.
#[derive(Clone)]
pub(crate) struct Host(FlexTensor);

impl Host {
    pub(crate) fn shape(&self) -> Shape {
        self.0.layout().shape().clone()
    }

    pub(crate) fn slice(&self) -> &[f32] {
        let start = self.0.layout().start_offset();
        &self.0.storage::<f32>()[start..start + self.0.layout().num_elements()]
    }

    /// The values; no copy when nobody else holds them.
    fn into_vec(self) -> Vec<f32> {
        self.0.into_data().try_into_vec().expect("invariant: host tensors are f32")
    }
}

/// The tensor's values if they live on the CPU backend, outside autodiff, as f32.
pub(crate) fn host<const D: usize>(x: &Tensor<D>) -> Option<Host> {
    let x = x.clone().try_into_primitive::<Flex>().ok()?;
    (x.dtype() == DType::F32).then(|| Host(x.to_contiguous()))
}

/// Values of any float tensor as a vector, without a copy of the device where there is none.
pub fn to_vec<const D: usize>(x: &Tensor<D>) -> Vec<f32> {
    match host(x) {
        Some(x) => x.slice().to_vec(),
        None => x
            .clone()
            .into_data()
            .convert::<f32>()
            .try_into_vec()
            .expect("invariant: converted to f32"),
    }
}

/// Calls `f` with the values of `x`; no copy on the CPU.
pub fn with_values<const D: usize, T>(x: &Tensor<D>, f: impl FnOnce(&[f32]) -> T) -> T {
    match host(x) {
        Some(x) => f(x.slice()),
        None => f(&to_vec(x)),
    }
}

fn from_vec<const D: usize>(values: Vec<f32>, shape: Shape) -> Tensor<D> {
    Tensor::from_primitive::<Flex>(FlexTensor::new(
        Bytes::from_elems(values),
        Layout::contiguous(shape),
        DType::F32,
    ))
}

/// Allocates a CPU tensor and lets `fill` write it.
pub(crate) fn build<const D: usize>(shape: Shape, fill: impl FnOnce(&mut [f32])) -> Tensor<D> {
    let mut values = vec![0.0f32; shape.num_elements()];
    fill(&mut values);
    from_vec(values, shape)
}

#[cfg(test)]
mod tests;
