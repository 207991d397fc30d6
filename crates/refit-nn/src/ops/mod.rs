//! The operations that models are made of.
//!
//! Each runs a fused kernel when its operands live on the CPU backend without autodiff, and the plain Burn composition
//! everywhere else (GPUs, training). The two are compared in the tests.

pub mod cpu;
pub mod simd;

use std::ops::Range;

use burn::tensor::{Bytes, DType, Int, Shape, Tensor, TensorData, activation as act};
use burn_flex::{Flex, FlexTensor, Layout};

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
        match self {
            Self::Silu => act::silu(x),
            Self::Gelu => act::gelu(x),
            Self::GeluTanh => {
                let cube = x.clone().powi_scalar(3);
                let u = (x.clone() + cube * 0.044_715) * 0.797_884_56;
                x * (u.tanh() + 1.0) * 0.5
            }
            Self::QuickGelu => x.clone() * act::sigmoid(x * 1.702),
            Self::Relu => act::relu(x),
            Self::Relu6 => x.clamp(0.0, 6.0),
            Self::Tanh => x.tanh(),
        }
    }
}

/// `x · weightᵀ + bias`: `x [batch, seq, in]`, `weight [out, in]` (the layout of checkpoints), `bias [out]`.
pub fn linear(x: Tensor<3>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<3> {
    let [batch, seq, k] = x.dims();
    let [n, _] = weight.dims();
    if let (Some(hx), Some(hw)) = (host(&x), host(&weight)) {
        let bias = bias.as_ref().and_then(host);
        return build(Shape::from([batch, seq, n]), |out| {
            cpu::linear(hx.slice(), hw.slice(), bias.as_ref().map(|b| b.slice()), out, k, n);
        });
    }
    let y = x.reshape([batch * seq, k]).matmul(weight.transpose());
    let y = match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    };
    y.reshape([batch, seq, n])
}

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    if let (Some(hx), Some(hw)) = (host(&x), host(&weight)) {
        return build(hx.shape(), |out| cpu::rms_norm(hx.slice(), hw.slice(), eps as f32, out));
    }
    let mean = x.clone().powi_scalar(2).mean_dim(D - 1);
    x / (mean + eps).sqrt() * weight.unsqueeze()
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
    if let (Some(g), Some(u)) = (host(&gate), host(&up)) {
        return build(g.shape(), |out| cpu::gated(g.slice(), u.slice(), out, kind));
    }
    kind.apply(gate) * up
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
    let (heads, kv_heads, dim) = (spec.heads, spec.kv_heads, spec.head_dim);
    let group = heads / kv_heads;
    let device = q.device();
    let q = q.reshape([batch, seq, heads, dim]).swap_dims(1, 2);
    let expand = |x: Tensor<3>| {
        x.reshape([batch, keys, kv_heads, 1, dim])
            .expand([batch, keys, kv_heads, group, dim])
            .reshape([batch, keys, heads, dim])
            .swap_dims(1, 2)
    };
    let (k, v) = (expand(k), expand(v));
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
    act::softmax(scores, 3).matmul(v).swap_dims(1, 2).reshape([batch, seq, width])
}

/// Rows of `table [rows, width]` chosen by `ids`; returns `[batch, seq, width]`.
pub fn embedding(table: Tensor<2>, ids: &[u32], batch: usize, seq: usize) -> Tensor<3> {
    let width = table.dims()[1];
    if let Some(t) = host(&table) {
        return build(Shape::from([batch, seq, width]), |out| {
            for (row, &id) in out.chunks_exact_mut(width).zip(ids) {
                row.copy_from_slice(&t.slice()[id as usize * width..(id as usize + 1) * width]);
            }
        });
    }
    let ids: Vec<i32> = ids.iter().map(|&i| i as i32).collect();
    let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [batch * seq]), &table.device());
    table.select(0, ids).reshape([batch, seq, width])
}

/// A contiguous f32 view of a CPU tensor.
pub(crate) struct Host(FlexTensor);

impl Host {
    pub(crate) fn shape(&self) -> Shape {
        self.0.layout().shape().clone()
    }

    pub(crate) fn slice(&self) -> &[f32] {
        let start = self.0.layout().start_offset();
        &self.0.storage::<f32>()[start..start + self.0.layout().num_elements()]
    }

    fn into_vec(self) -> Vec<f32> {
        self.slice().to_vec()
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
