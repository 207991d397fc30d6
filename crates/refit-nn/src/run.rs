//! What a caller may hand to a run: a cache and taps. Both are optional and cost nothing when unused.

use burn::tensor::{Tensor, TensorData};
use refit_data::Rng;

use crate::cache::Cache;
use crate::ops::{self, Precision};

/// Reads or replaces named activations.
///
/// Names: `SITE:in` and `SITE:out` around every linear (`model.layers.7.mlp.down_proj:in`), and `layers.N.resid.pre`,
/// `layers.N.resid.mid`, `layers.N.resid.post` on the residual stream. Activations are `[batch, seq, width]`. A tap that looks
/// into [`attention`](Self::attention) also gets `layers.N.attn.q`, `.k`, `.v` (after rotation) and `.probs`, which are
/// `[batch, heads * seq, keys]`.
pub trait Tap {
    /// Sees the activation `name` and returns what the run goes on with.
    fn visit(&mut self, name: &str, value: Tensor<3>) -> Tensor<3>;

    /// Whether it looks into attention, which then runs unfused.
    fn attention(&self) -> bool {
        false
    }
}

impl<F: FnMut(&str, Tensor<3>) -> Tensor<3>> Tap for F {
    fn visit(&mut self, name: &str, value: Tensor<3>) -> Tensor<3> {
        self(name, value)
    }
}

/// The extras of one forward pass.
#[derive(Default)]
pub struct Run<'a> {
    /// Decoding state to read and extend.
    pub cache: Option<&'a mut Cache>,
    /// Activations to observe or replace.
    pub tap: Option<&'a mut dyn Tap>,
    /// Dropout in adapters while they train.
    pub dropout: Option<Dropout>,
    /// How matrix products are computed.
    pub precision: Precision,
    /// Keep only the inputs of blocks for the backward pass and run each block again there ([`crate::checkpoint`]). Without
    /// effect where there is a cache, a tap or dropout.
    pub checkpoint: bool,
}

/// Dropout (Srivastava et al. 2014) at `rate`, drawn from its own stream: the same seed drops the same elements.
#[derive(Debug, Clone)]
pub struct Dropout {
    rate: f32,
    rng: Rng,
}

impl Dropout {
    /// Drops a share `rate` of the elements; `None` when that is 0.
    pub fn new(rate: f64, seed: u64) -> Option<Self> {
        (rate > 0.0).then(|| Self { rate: rate as f32, rng: Rng::named(seed, "dropout") })
    }
}

impl<'a> Run<'a> {
    /// A pass without cache and taps.
    pub fn plain() -> Self {
        Self::default()
    }

    /// A pass that reads and extends `cache`.
    pub fn cached(cache: &'a mut Cache) -> Self {
        Self { cache: Some(cache), ..Self::default() }
    }

    /// A pass observed by `tap`.
    pub fn tapped(tap: &'a mut dyn Tap) -> Self {
        Self { tap: Some(tap), ..Self::default() }
    }

    /// A pass that trades time for memory in training: see [`Self::checkpoint`].
    pub fn checkpointed() -> Self {
        Self { checkpoint: true, ..Self::default() }
    }

    /// May blocks be checkpointed in this pass?
    pub(crate) fn checkpoints(&self) -> bool {
        self.checkpoint && self.cache.is_none() && self.tap.is_none() && self.dropout.is_none()
    }

    /// `x · weightᵀ + bias` at the precision of this pass; see [`ops::linear`].
    pub fn linear(&self, x: Tensor<3>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<3> {
        ops::linear_in(x, weight, bias, self.precision)
    }

    /// Shows `value` to the tap, if there is one. The name is built only then.
    pub fn tap(&mut self, name: impl FnOnce() -> String, value: Tensor<3>) -> Tensor<3> {
        match &mut self.tap {
            Some(tap) => tap.visit(&name(), value),
            None => value,
        }
    }

    /// Whether the tap, if there is one, looks into attention.
    pub(crate) fn opens_attention(&self) -> bool {
        self.tap.as_ref().is_some_and(|tap| tap.attention())
    }

    /// `x` with some elements dropped and the rest scaled up, when this pass has dropout.
    pub fn drop(&mut self, x: Tensor<3>) -> Tensor<3> {
        let Some(Dropout { rate, rng }) = &mut self.dropout else { return x };
        let keep = 1.0 / (1.0 - *rate);
        let mask: Vec<f32> = (0..x.shape().num_elements())
            .map(|_| if (rng.uniform() as f32) < *rate { 0.0 } else { keep })
            .collect();
        let mask = Tensor::from_data(TensorData::new(mask, x.dims()), &x.device());
        x * mask
    }
}
