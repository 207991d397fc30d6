//! Additive adapters: what stands beside a part of a block and adds to its output, and prefixes.
//!
//! In the words of He et al. 2022 (*Towards a Unified View of Parameter-Efficient Transfer Learning*, arXiv:2110.04366), every
//! such method is `h <- h + s Δh`, and differs in where `h` is taken, what `Δh` sees and which function it is. Their outputs
//! depend on the input in a way that no change of a weight expresses, so they are parts of a block and not
//! [forms](crate::adapt) of a weight.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use refit_data::Rng;

use crate::operator::Linear;
use crate::ops::Activation;
use crate::run::Run;

/// How a [`Bottleneck`] begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Init {
    /// Both matrices from N(0, 0.02²), as BERT's: the model is changed a little from the start.
    Bert,
    /// Down by Kaiming's uniform rule with `a = sqrt 5`, up zero: the model is unchanged at the start.
    Lora,
}

/// `s · f(x · downᵀ + b) · upᵀ + s · b'`: a two-layer network through `rank` channels (Houlsby et al. 2019).
#[derive(Module, Debug)]
pub struct Bottleneck {
    /// `[rank, in]` with bias.
    pub down: Linear,
    /// `[out, rank]` with bias.
    pub up: Linear,
    /// Nonlinearity between them; none makes it a low-rank map.
    #[module(skip)]
    pub activation: Option<Activation>,
    /// The factor `s`.
    pub scale: f64,
    /// A learned factor beside `s`, one at the start.
    pub gain: Option<Param<Tensor<1>>>,
    /// True: it reads the output that it adds to. False: it reads what the part beside it reads.
    pub sequential: bool,
}

impl Bottleneck {
    /// A bottleneck at the linear `site`, with tensors `SITE.adapter_down.*` and `SITE.adapter_up.*`.
    pub fn new(
        site: &str,
        [inputs, rank, outputs]: [usize; 3],
        init: Init,
        rng: &mut Rng,
        device: &Device,
    ) -> Self {
        let (down, up) = match init {
            Init::Bert => (normal(rank, inputs, 0.02, rng), normal(outputs, rank, 0.02, rng)),
            Init::Lora => (kaiming(rank, inputs, rng), vec![0.0; outputs * rank]),
        };
        let linear = |part: &str, values, out: usize, inner: usize| {
            let weight = Tensor::from_data(TensorData::new(values, [out, inner]), device);
            Linear::dense(format!("{site}.{part}"), weight, Some(Tensor::zeros([out], device)))
        };
        Self {
            down: linear("adapter_down", down, rank, inputs),
            up: linear("adapter_up", up, outputs, rank),
            activation: Some(Activation::Relu),
            scale: 1.0,
            gain: None,
            sequential: false,
        }
    }

    /// `x [batch, seq, in]` to what is added, `[batch, seq, out]`.
    pub fn forward(&self, x: Tensor<3>, run: &mut Run) -> Tensor<3> {
        let hidden = self.down.forward(x, run);
        let hidden = match self.activation {
            Some(activation) => activation.apply(hidden),
            None => hidden,
        };
        let hidden = run.drop(hidden);
        // The narrow side is the cheap one to scale; the bias of `up` is scaled with it.
        let out = self.up.forward(hidden, run) * self.scale;
        match &self.gain {
            Some(gain) => out * gain.val().unsqueeze(),
            None => out,
        }
    }

    /// Adds its output to `y`, the output of the part that read `x`.
    pub fn join(&self, x: Option<Tensor<3>>, y: Tensor<3>, run: &mut Run) -> Tensor<3> {
        let input = if self.sequential { y.clone() } else { x.unwrap_or_else(|| y.clone()) };
        y + self.forward(input, run)
    }
}

/// Adds `side`'s output to `y`, where there is one.
pub(crate) fn join(
    side: &Option<Bottleneck>,
    x: Option<Tensor<3>>,
    y: Tensor<3>,
    run: &mut Run,
) -> Tensor<3> {
    match side {
        Some(side) => side.join(x, y, run),
        None => y,
    }
}

/// Multi-head parallel adapter (the paper's section 4.5): on every head, `ReLU(q P_kᵀ) P_v` from that head's own query.
///
/// The query is taken before rotary positions, scaled as the model's scores are.
#[derive(Module, Debug)]
pub struct HeadAdapter {
    /// `P_k [heads, rank, head_dim]`.
    pub keys: Param<Tensor<3>>,
    /// `P_v [heads, rank, head_dim]`; zero at the start.
    pub values: Param<Tensor<3>>,
    /// Factor on the output.
    pub scale: f64,
    /// `softmax` in place of the ReLU: prefix tuning without its gate.
    pub softmax: bool,
}

impl HeadAdapter {
    /// A fresh one that changes nothing.
    pub fn new([heads, rank, dim]: [usize; 3], scale: f64, rng: &mut Rng, device: &Device) -> Self {
        let keys = kaiming(heads * rank, dim, rng);
        Self {
            keys: Param::from_tensor(Tensor::from_data(
                TensorData::new(keys, [heads, rank, dim]),
                device,
            )),
            values: Param::from_tensor(Tensor::zeros([heads, rank, dim], device)),
            scale,
            softmax: false,
        }
    }

    /// Queries `[batch, seq, heads * head_dim]` to what is added to the heads, of the same shape.
    pub fn forward(&self, q: Tensor<3>, factor: f32) -> Tensor<3> {
        let [heads, _, dim] = self.keys.val().dims();
        let [batch, seq, width] = q.dims();
        let q = q.reshape([batch, seq, heads, dim]).swap_dims(1, 2);
        let scores = q.matmul(self.keys.val().swap_dims(1, 2).unsqueeze()) * f64::from(factor);
        let weights = match self.softmax {
            true => burn::tensor::activation::softmax(scores, 3),
            false => burn::tensor::activation::relu(scores),
        };
        let out = weights.matmul(self.values.val().unsqueeze()) * self.scale;
        out.swap_dims(1, 2).reshape([batch, seq, width])
    }
}

/// Keys and values of virtual tokens before every layer's own (Li and Liang 2021), for all layers together.
#[derive(Module, Debug)]
pub struct Prefix {
    /// Without a net: `[tokens, 2 * layers * kv_width]`, column block `2 i` the keys of layer `i`, `2 i + 1` its values.
    /// With one: its input, `[tokens, width]`.
    pub table: Param<Tensor<2>>,
    /// The reparameterization that the paper trains through; [`Self::fold`] drops it.
    pub net: Option<PrefixNet>,
}

/// `Linear(tanh(Linear(x)))`, from an embedding per token to the keys and values of all layers.
#[derive(Module, Debug)]
pub struct PrefixNet {
    /// `[mid, width]`.
    pub first: Linear,
    /// `[2 * layers * kv_width, mid]`.
    pub second: Linear,
}

impl Prefix {
    /// A prefix of `tokens` for `layers` layers of `kv_width`; through a net of width `mid` when that is not 0.
    pub fn new(
        tokens: usize,
        layers: usize,
        kv_width: usize,
        [width, mid]: [usize; 2],
        rng: &mut Rng,
        device: &Device,
    ) -> Self {
        let columns = 2 * layers * kv_width;
        let tensor = |values, rows: usize, columns: usize| {
            Tensor::<2>::from_data(TensorData::new(values, [rows, columns]), device)
        };
        if mid == 0 {
            let table = tensor(normal(tokens, columns, 0.02, rng), tokens, columns);
            return Self { table: Param::from_tensor(table), net: None };
        }
        // PyTorch's defaults: N(0, 1) for embeddings, U(±1/sqrt(in)) for linears and their biases.
        let table = tensor(normal(tokens, width, 1.0, rng), tokens, width);
        let mut linear = |part: &str, out: usize, inner: usize| {
            let weight = tensor(kaiming(out, inner, rng), out, inner);
            let bias = Tensor::<1>::from_floats(kaiming_row(out, inner, rng).as_slice(), device);
            Linear::dense(format!("prefix.{part}"), weight, Some(bias))
        };
        let net = PrefixNet {
            first: linear("first", mid, width),
            second: linear("second", columns, mid),
        };
        Self { table: Param::from_tensor(table), net: Some(net) }
    }

    /// A prefix from its keys and values, `[tokens, 2 * layers * kv_width]`.
    pub fn from_table(table: Tensor<2>) -> Self {
        Self { table: Param::from_tensor(table), net: None }
    }

    /// Number of virtual tokens.
    pub fn tokens(&self) -> usize {
        self.table.val().dims()[0]
    }

    /// Keys and values `[tokens, 2 * layers * kv_width]`.
    pub fn keys_and_values(&self) -> Tensor<2> {
        let Some(net) = &self.net else { return self.table.val() };
        let x = self.table.val().unsqueeze::<3>();
        let hidden = Activation::Tanh.apply(net.first.forward(x, &mut Run::plain()));
        net.second.forward(hidden, &mut Run::plain()).squeeze_dim(0)
    }

    /// The same prefix as a plain table.
    pub fn fold(&self) -> Self {
        Self::from_table(self.keys_and_values())
    }
}

/// Keys and values of one layer, each `[batch, tokens, width]`, out of a table of all layers.
pub(crate) fn layer_of(
    table: &Tensor<2>,
    layer: usize,
    width: usize,
    batch: usize,
) -> [Tensor<3>; 2] {
    let tokens = table.dims()[0];
    [2 * layer, 2 * layer + 1].map(|block| {
        let part = table.clone().slice([0..tokens, block * width..(block + 1) * width]);
        part.unsqueeze::<3>().expand([batch, tokens, width])
    })
}

/// `rows * columns` values from N(0, deviation²).
pub(crate) fn normal(rows: usize, columns: usize, deviation: f32, rng: &mut Rng) -> Vec<f32> {
    (0..rows * columns).map(|_| deviation * rng.normal() as f32).collect()
}

/// Kaiming's uniform rule with `a = sqrt 5`, PyTorch's default for linears: U(±1/sqrt(inputs)).
pub(crate) fn kaiming(rows: usize, inputs: usize, rng: &mut Rng) -> Vec<f32> {
    kaiming_row(rows * inputs, inputs, rng)
}

fn kaiming_row(count: usize, inputs: usize, rng: &mut Rng) -> Vec<f32> {
    let bound = 1.0 / (inputs.max(1) as f32).sqrt();
    (0..count).map(|_| (2.0 * rng.uniform() as f32 - 1.0) * bound).collect()
}
