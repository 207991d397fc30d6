//! Sites and the operators that sit at them.
//!
//! A site is a named place that holds a weight; its name is the tensor's name in the artifact without `.weight`. Methods change
//! the [`Operator`] of a site, never the code of the model around it.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};

use crate::ops::ConvSpec;
use crate::packed::SharedMatrix;
use crate::run::Run;
use crate::{adapt, ops};

/// A full weight matrix `[out, in]`, the layout of checkpoints.
#[derive(Module, Debug)]
pub struct Dense {
    /// Weight `[out, in]`.
    pub weight: Param<Tensor<2>>,
}

/// A weight of low rank: `up · down`, `[out, rank] · [rank, in]`.
#[derive(Module, Debug)]
pub struct LowRank {
    /// `[rank, in]`.
    pub down: Param<Tensor<2>>,
    /// `[out, rank]`.
    pub up: Param<Tensor<2>>,
}

/// A weight that stays in codes of a few bits; it does not train. See [`crate::packed`].
#[derive(Module, Debug)]
pub struct Packed {
    /// The codes, `[out, in]`.
    #[module(skip)]
    pub matrix: SharedMatrix,
}

/// A weight in codes and a product of low rank that gives back some of what the codes lost: `x · Ŵᵀ + (x · Vᵀ) · Uᵀ` (LoRC,
/// arXiv:2303.08302). The product is never added into the codes.
#[derive(Module, Debug)]
pub struct Compensated {
    /// `Ŵ`.
    pub base: Packed,
    /// `U` is `up`, `V` is `down`.
    pub pair: LowRank,
}

/// What computes `x · Wᵀ` at a site.
#[derive(Module, Debug)]
pub enum Operator {
    /// A full matrix.
    Dense(Dense),
    /// A product of two thin matrices.
    LowRank(LowRank),
    /// Codes.
    Packed(Packed),
    /// Codes, and a product of two thin matrices.
    Compensated(Compensated),
}

impl LowRank {
    /// `x [batch, seq, in]` to `[batch, seq, out]`, through the rank.
    fn forward(&self, x: Tensor<3>, bias: Option<Tensor<1>>, run: &Run) -> Tensor<3> {
        let inner = run.linear(x, self.down.val(), None);
        run.linear(inner, self.up.val(), bias)
    }

    /// The product `[out, in]`.
    fn weight(&self) -> Tensor<2> {
        self.up.val().matmul(self.down.val())
    }
}

impl Packed {
    /// The weight, decoded.
    fn weight(&self) -> Tensor<2> {
        let shape = [self.matrix.rows(), self.matrix.inputs()];
        Tensor::from_data(TensorData::new(self.matrix.decode(), shape), &Device::flex())
    }
}

/// A linear layer: a site's operator and its bias.
#[derive(Module, Debug)]
pub struct Linear {
    /// Name of the site.
    #[module(skip)]
    pub site: String,
    /// The operator that holds the weight.
    pub op: Operator,
    /// Bias `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// A dense linear from `weight [out, in]`.
    pub fn dense(site: impl Into<String>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        let op = Operator::Dense(Dense { weight: Param::from_tensor(weight) });
        Self { site: site.into(), op, bias: bias.map(Param::from_tensor) }
    }

    /// `x [batch, seq, in]` to `[batch, seq, out]`; taps `SITE:in` and `SITE:out`.
    pub fn forward(&self, x: Tensor<3>, run: &mut Run) -> Tensor<3> {
        let x = run.tap(|| format!("{}:in", self.site), x);
        let bias = self.bias.as_ref().map(|b| b.val());
        let y = match &self.op {
            Operator::Dense(dense) => adapt::forward(dense, x, bias, run),
            Operator::LowRank(pair) => pair.forward(x, bias, run),
            Operator::Packed(packed) => ops::packed_linear(x, &packed.matrix, bias),
            Operator::Compensated(both) => {
                let more = both.pair.forward(x.clone(), None, run);
                ops::packed_linear(x, &both.base.matrix, bias) + more
            }
        };
        run.tap(|| format!("{}:out", self.site), y)
    }

    /// [`forward`](Self::forward) of several linears that read the same `x`; packed ones share the rounding of it.
    pub fn forward_all<const N: usize>(
        linears: [&Self; N],
        x: Tensor<3>,
        run: &mut Run,
    ) -> [Tensor<3>; N] {
        let packed = linears.map(|linear| match &linear.op {
            Operator::Packed(packed) if run.tap.is_none() => Some((linear, &*packed.matrix)),
            _ => None,
        });
        if packed.iter().all(Option::is_some) {
            let weights = packed.map(|part| {
                let (linear, matrix) = part.expect("invariant: all are packed");
                (matrix, linear.bias.as_ref().map(|bias| bias.val()))
            });
            if let Some(outs) = ops::packed_linears(&x, weights) {
                return outs;
            }
        }
        linears.map(|linear| linear.forward(x.clone(), run))
    }

    /// Shape `[out, in]` of the effective weight.
    pub fn shape(&self) -> [usize; 2] {
        match &self.op {
            Operator::Dense(dense) => dense.weight.val().dims(),
            Operator::LowRank(pair) => [pair.up.val().dims()[0], pair.down.val().dims()[1]],
            Operator::Packed(Packed { matrix })
            | Operator::Compensated(Compensated { base: Packed { matrix }, .. }) => {
                [matrix.rows(), matrix.inputs()]
            }
        }
    }

    /// The effective weight `[out, in]`.
    pub fn weight(&self) -> Tensor<2> {
        match &self.op {
            Operator::Dense(dense) => dense.weight.val(),
            Operator::LowRank(pair) => pair.weight(),
            Operator::Packed(packed) => packed.weight(),
            Operator::Compensated(both) => both.base.weight() + both.pair.weight(),
        }
    }

    /// A linear whose weight stays packed.
    pub fn packed(site: impl Into<String>, matrix: SharedMatrix, bias: Option<Tensor<1>>) -> Self {
        let op = Operator::Packed(Packed { matrix });
        Self { site: site.into(), op, bias: bias.map(Param::from_tensor) }
    }

    /// A linear whose weight is a product of `down [rank, in]` and `up [out, rank]`, alone or beside codes.
    pub fn factored(
        site: impl Into<String>,
        matrix: Option<SharedMatrix>,
        down: Tensor<2>,
        up: Tensor<2>,
        bias: Option<Tensor<1>>,
    ) -> Self {
        let pair = LowRank { down: Param::from_tensor(down), up: Param::from_tensor(up) };
        let op = match matrix {
            Some(matrix) => Operator::Compensated(Compensated { base: Packed { matrix }, pair }),
            None => Operator::LowRank(pair),
        };
        Self { site: site.into(), op, bias: bias.map(Param::from_tensor) }
    }

    /// Replaces the operator by a pair: `down` is row-major `[rank, in]`, `up` `[out, rank]`.
    pub fn set_factors(&mut self, down: Vec<f32>, up: Vec<f32>, rank: usize) {
        let ([out, inner], device) = (self.shape(), self.weight().device());
        assert_eq!(down.len(), rank * inner, "invariant: a weight keeps its shape");
        assert_eq!(up.len(), out * rank, "invariant: a weight keeps its shape");
        let param = |values, shape: [usize; 2]| {
            Param::from_tensor(Tensor::from_data(TensorData::new(values, shape), &device))
        };
        let pair = LowRank { down: param(down, [rank, inner]), up: param(up, [out, rank]) };
        self.op = Operator::LowRank(pair);
    }

    /// Replaces the operator by a dense one; `values` are row-major `[out, in]`.
    pub fn set_weight(&mut self, values: Vec<f32>, device: &Device) {
        let [out, inner] = self.shape();
        assert_eq!(values.len(), out * inner, "invariant: a weight keeps its shape");
        let weight = Tensor::from_data(TensorData::new(values, [out, inner]), device);
        self.op = Operator::Dense(Dense { weight: Param::from_tensor(weight) });
    }
}

/// A table of vectors, `[rows, width]`.
#[derive(Module, Debug)]
pub struct Embedding {
    /// Name of the site.
    #[module(skip)]
    pub site: String,
    /// The table.
    pub weight: Param<Tensor<2>>,
}

impl Embedding {
    /// Looks up `ids`, `batch * seq` of them; returns `[batch, seq, width]`.
    pub fn forward(&self, ids: &[u32], batch: usize, seq: usize) -> Tensor<3> {
        ops::embedding(self.weight.val(), ids, batch, seq)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.weight.val().dims()[0]
    }
}

/// A convolution: kernel, bias, and how it moves. The weight may carry any training form of [`adapt`].
#[derive(Module, Debug)]
pub struct Conv2d {
    /// Name of the site.
    #[module(skip)]
    pub site: String,
    /// Kernel `[out, in / groups, k, k]`.
    pub weight: Param<Tensor<4>>,
    /// Bias `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// Stride, padding and groups.
    #[module(skip)]
    pub spec: ConvSpec,
}

impl Conv2d {
    /// A convolution from `weight [out, in / groups, k, k]`.
    pub fn new(
        site: impl Into<String>,
        weight: Tensor<4>,
        bias: Option<Tensor<1>>,
        spec: ConvSpec,
    ) -> Self {
        let weight = Param::from_tensor(weight);
        Self { site: site.into(), weight, bias: bias.map(Param::from_tensor), spec }
    }

    /// `x [batch, in, height, width]` to `[batch, out, height', width']`, by the effective weight.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let bias = self.bias.as_ref().map(|b| b.val());
        ops::conv2d_with(x, self.weight.val(), bias, &self.spec)
    }
}

/// Which statistic a [`Norm`] divides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square (RMSNorm, Zhang and Sennrich 2019).
    Rms,
    /// Mean and variance (LayerNorm, Ba et al. 2016).
    Layer,
}

/// A normalization with scale and optional bias.
#[derive(Module, Debug)]
pub struct Norm {
    /// Name of the site.
    #[module(skip)]
    pub site: String,
    /// Scale `[width]`; for models that store `scale - 1` (Gemma) the one is already added.
    pub weight: Param<Tensor<1>>,
    /// Bias `[width]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// Added to the variance.
    #[module(skip)]
    pub eps: f64,
    /// Kind of normalization.
    #[module(skip)]
    pub kind: NormKind,
}

impl Norm {
    /// Normalizes the last dimension.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self.kind {
            NormKind::Rms => ops::rms_norm(x, self.weight.val(), self.eps),
            NormKind::Layer => {
                ops::layer_norm(x, self.weight.val(), self.bias.as_ref().map(|b| b.val()), self.eps)
            }
        }
    }
}
