//! The swappable parts of a transformer block: mixer, ffn, wiring.

use burn::module::Module;
use burn::tensor::Tensor;

use crate::operator::{Linear, Norm};
use crate::ops::{self, Activation, AttentionSpec};
use crate::run::Run;
use crate::side::{self, Bottleneck, HeadAdapter};

/// How query, key and value projections are stored.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // one per block: the weights dwarf it
pub enum Projections {
    /// Three matrices.
    Separate(Separate),
    /// One matrix whose outputs are split.
    Fused(Fused),
}

/// Query, key and value projections as three sites.
#[derive(Module, Debug)]
pub struct Separate {
    /// Query projection.
    pub q: Linear,
    /// Key projection.
    pub k: Linear,
    /// Value projection.
    pub v: Linear,
}

/// Query, key and value projections as one site.
#[derive(Module, Debug)]
pub struct Fused {
    /// `[q; k; v]` stacked along the outputs, or interleaved head by head.
    pub qkv: Linear,
    /// True when each head's q, k and v rows lie together (GPT-NeoX).
    #[module(skip)]
    pub by_head: bool,
}

/// Softmax attention with grouped keys and values, rotary positions and optional per-head norms.
#[derive(Module, Debug)]
pub struct Attention {
    /// Input projections.
    pub projections: Projections,
    /// Output projection.
    pub o: Linear,
    /// Norm of every query head (Qwen3).
    pub q_norm: Option<Norm>,
    /// Norm of every key head (Qwen3).
    pub k_norm: Option<Norm>,
    /// Adapter that adds to the heads before the output projection.
    pub side: Option<Bottleneck>,
    /// Adapter of every head by itself.
    pub head_adapter: Option<HeadAdapter>,
    /// Heads, scale and visibility; `causal` and `lengths` are set for each pass.
    #[module(skip)]
    pub spec: AttentionSpec,
}

/// What all blocks of one pass share.
#[derive(Debug, Clone)]
pub struct Context {
    /// Position of the first token of this pass.
    pub start: usize,
    /// Rotary tables `[seq, rotary_dim / 2]`, cosine and sine.
    pub rope: Option<(Tensor<2>, Tensor<2>)>,
    /// True for left-to-right models.
    pub causal: bool,
    /// Real tokens of each batch row; the rest is padding. A prefix counts.
    pub lengths: Option<Vec<usize>>,
    /// Keys and values of virtual tokens, as [`Prefix::keys_and_values`](crate::side::Prefix::keys_and_values) gives them. Not
    /// for passes with a cache: there they are its first entries.
    pub prefix: Option<Tensor<2>>,
}

impl Attention {
    /// `x [batch, seq, hidden]` to the same shape; extends layer `layer` of the run's cache.
    pub fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        layer: usize,
        run: &mut Run,
    ) -> Tensor<3> {
        let (heads, kv_heads, dim) = (self.spec.heads, self.spec.kv_heads, self.spec.head_dim);
        let side = self.side.is_some().then(|| x.clone());
        let (mut q, mut k, v) = match &self.projections {
            Projections::Separate(p) => Linear::forward_all([&p.q, &p.k, &p.v], x, run).into(),
            Projections::Fused(p) => {
                split_qkv(p.qkv.forward(x, run), p.by_head, heads, kv_heads, dim)
            }
        };
        if let Some(norm) = &self.q_norm {
            q = per_head(norm, q, dim);
        }
        if let Some(norm) = &self.k_norm {
            k = per_head(norm, k, dim);
        }
        let query = self.head_adapter.is_some().then(|| q.clone());
        if let Some((cos, sin)) = &context.rope {
            q = ops::rope(q, cos.clone(), sin.clone(), heads);
            k = ops::rope(k, cos.clone(), sin.clone(), kv_heads);
        }
        let (k, v) = match &mut run.cache {
            Some(cache) => cache.append(layer, k, v),
            None => match &context.prefix {
                Some(prefix) => {
                    let [batch, _, width] = k.dims();
                    let [pk, pv] = side::layer_of(prefix, layer, width, batch);
                    (Tensor::cat(vec![pk, k], 1), Tensor::cat(vec![pv, v], 1))
                }
                None => (k, v),
            },
        };
        let spec = AttentionSpec {
            causal: context.causal.then_some(context.start),
            lengths: context.lengths.clone(),
            ..self.spec.clone()
        };
        let mut mixed = match run.opens_attention() {
            true => open_attention(q, k, v, &spec, layer, run),
            false => ops::attention(q, k, v, &spec),
        };
        if let (Some(adapter), Some(query)) = (&self.head_adapter, query) {
            mixed = mixed + adapter.forward(query, self.spec.scale);
        }
        let mixed = side::join(&self.side, side, mixed, run);
        self.o.forward(mixed, run)
    }
}

/// Attention step by step, with its operands and probabilities shown to the tap.
fn open_attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    spec: &AttentionSpec,
    layer: usize,
    run: &mut Run,
) -> Tensor<3> {
    let q = run.tap(|| format!("layers.{layer}.attn.q"), q);
    let k = run.tap(|| format!("layers.{layer}.attn.k"), k);
    let v = run.tap(|| format!("layers.{layer}.attn.v"), v);
    let shares = ops::compose::attention_probabilities(q, k, spec);
    let [batch, heads, seq, keys] = shares.dims();
    let shares = shares.reshape([batch, heads * seq, keys]);
    let shares = run.tap(|| format!("layers.{layer}.attn.probs"), shares);
    ops::compose::mix(shares.reshape([batch, heads, seq, keys]), v, spec)
}

fn per_head(norm: &Norm, x: Tensor<3>, dim: usize) -> Tensor<3> {
    let [batch, seq, width] = x.dims();
    norm.forward(x.reshape([batch, seq * (width / dim), dim])).reshape([batch, seq, width])
}

fn split_qkv(
    x: Tensor<3>,
    by_head: bool,
    heads: usize,
    kv_heads: usize,
    dim: usize,
) -> (Tensor<3>, Tensor<3>, Tensor<3>) {
    let [batch, seq, _] = x.dims();
    if by_head {
        let x = x.reshape([batch, seq, heads, 3 * dim]);
        let part = |i: usize| {
            x.clone().slice([0..batch, 0..seq, 0..heads, i * dim..(i + 1) * dim]).reshape([
                batch,
                seq,
                heads * dim,
            ])
        };
        return (part(0), part(1), part(2));
    }
    let (q, kv) = (heads * dim, kv_heads * dim);
    let part = |from: usize, width: usize| x.clone().slice([0..batch, 0..seq, from..from + width]);
    (part(0, q), part(q, kv), part(q + kv, kv))
}

/// How channels mix.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // one per block: the weights dwarf it
pub enum Ffn {
    /// `down(act(gate x) * up x)`.
    Gated(GatedMlp),
    /// `down(act(up x))`.
    Plain(Mlp),
}

/// Gated MLP (Shazeer 2020).
#[derive(Module, Debug)]
pub struct GatedMlp {
    /// Gate and up projections: two sites, or one with the outputs stacked `[gate; up]`.
    pub gate_up: GateUp,
    /// Down projection.
    pub down: Linear,
    /// Nonlinearity on the gate.
    #[module(skip)]
    pub activation: Activation,
}

/// Storage of the gate and up projections.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // one per block: the weights dwarf it
pub enum GateUp {
    /// Two matrices.
    Separate(GateAndUp),
    /// One matrix `[gate; up]` (Phi-3).
    Fused(Linear),
}

/// Gate and up projections as two sites.
#[derive(Module, Debug)]
pub struct GateAndUp {
    /// Gate projection.
    pub gate: Linear,
    /// Up projection.
    pub up: Linear,
}

/// Two-layer perceptron.
#[derive(Module, Debug)]
pub struct Mlp {
    /// First projection.
    pub up: Linear,
    /// Second projection.
    pub down: Linear,
    /// Nonlinearity between them.
    #[module(skip)]
    pub activation: Activation,
}

impl Ffn {
    /// Site of the last linear.
    pub fn down_site(&self) -> &str {
        match self {
            Self::Gated(mlp) => &mlp.down.site,
            Self::Plain(mlp) => &mlp.down.site,
        }
    }

    /// `x [batch, seq, hidden]` to the same shape.
    pub fn forward(&self, x: Tensor<3>, run: &mut Run) -> Tensor<3> {
        match self {
            Self::Gated(mlp) => {
                let (gate, up) = match &mlp.gate_up {
                    GateUp::Separate(p) => Linear::forward_all([&p.gate, &p.up], x, run).into(),
                    GateUp::Fused(both) => {
                        let x = both.forward(x, run);
                        let [batch, seq, width] = x.dims();
                        let part = |from: usize| {
                            x.clone().slice([0..batch, 0..seq, from..from + width / 2])
                        };
                        (part(0), part(width / 2))
                    }
                };
                mlp.down.forward(ops::gated(gate, up, mlp.activation), run)
            }
            Self::Plain(mlp) => {
                let x = mlp.activation.apply(mlp.up.forward(x, run));
                mlp.down.forward(x, run)
            }
        }
    }
}

/// How a block joins the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wiring {
    /// `x += mixer(norm x); x += ffn(norm x)`: Llama, GPT-2.
    PreNorm,
    /// `x = norm(x + mixer x); x = norm(x + ffn x)`: BERT.
    PostNorm,
    /// `x += mixer(norm₁ x) + ffn(norm₂ x)`: GPT-NeoX.
    Parallel,
    /// Norms before and after both parts: Gemma 2.
    Sandwich,
}

/// One transformer block.
#[derive(Module, Debug)]
pub struct Block {
    /// Norm of the mixer (before it, or after its residual sum in [`Wiring::PostNorm`]).
    pub mixer_norm: Norm,
    /// Token mixing.
    pub mixer: Attention,
    /// Norm of the ffn.
    pub ffn_norm: Norm,
    /// Channel mixing.
    pub ffn: Ffn,
    /// Norm on the mixer's output ([`Wiring::Sandwich`]).
    pub mixer_post_norm: Option<Norm>,
    /// Norm on the ffn's output ([`Wiring::Sandwich`]).
    pub ffn_post_norm: Option<Norm>,
    /// Adapter that adds to the mixer's output.
    pub mixer_side: Option<Bottleneck>,
    /// Adapter that adds to the ffn's output.
    pub ffn_side: Option<Bottleneck>,
    /// Residual wiring.
    #[module(skip)]
    pub wiring: Wiring,
}

impl Block {
    /// `x [batch, seq, hidden]` to the same shape. Taps `layers.N.resid.{pre,mid,post}`.
    pub fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        layer: usize,
        run: &mut Run,
    ) -> Tensor<3> {
        let x = run.tap(|| format!("layers.{layer}.resid.pre"), x);
        let y = match self.wiring {
            Wiring::PostNorm => {
                let mixed = self.mix(x.clone(), context, layer, run);
                let x = run.tap(
                    || format!("layers.{layer}.resid.mid"),
                    self.mixer_norm.forward(x + mixed),
                );
                self.ffn_norm.forward(x.clone() + self.feed(x, run))
            }
            Wiring::Parallel => {
                let mixed = self.mix(self.mixer_norm.forward(x.clone()), context, layer, run);
                let fed = self.feed(self.ffn_norm.forward(x.clone()), run);
                x + mixed + fed
            }
            Wiring::PreNorm | Wiring::Sandwich => {
                let mixed = self.mix(self.mixer_norm.forward(x.clone()), context, layer, run);
                let mixed = after(&self.mixer_post_norm, mixed);
                let x = run.tap(|| format!("layers.{layer}.resid.mid"), x + mixed);
                let fed = self.feed(self.ffn_norm.forward(x.clone()), run);
                x + after(&self.ffn_post_norm, fed)
            }
        };
        run.tap(|| format!("layers.{layer}.resid.post"), y)
    }

    /// The mixer and the adapter beside it.
    fn mix(&self, x: Tensor<3>, context: &Context, layer: usize, run: &mut Run) -> Tensor<3> {
        let side = self.mixer_side.is_some().then(|| x.clone());
        let mixed = self.mixer.forward(x, context, layer, run);
        side::join(&self.mixer_side, side, mixed, run)
    }

    /// The ffn and the adapter beside it.
    fn feed(&self, x: Tensor<3>, run: &mut Run) -> Tensor<3> {
        let side = self.ffn_side.is_some().then(|| x.clone());
        let fed = self.ffn.forward(x, run);
        side::join(&self.ffn_side, side, fed, run)
    }

    /// The adapters beside its parts.
    pub fn sides(&self) -> impl Iterator<Item = &Bottleneck> {
        [&self.mixer.side, &self.mixer_side, &self.ffn_side].into_iter().flatten()
    }

    /// Every linear of the block, in the order in which a pass reaches them.
    pub fn linears(&self) -> Vec<&Linear> {
        let mut all = match &self.mixer.projections {
            Projections::Separate(p) => vec![&p.q, &p.k, &p.v],
            Projections::Fused(p) => vec![&p.qkv],
        };
        all.push(&self.mixer.o);
        match &self.ffn {
            Ffn::Gated(mlp) => {
                match &mlp.gate_up {
                    GateUp::Separate(p) => all.extend([&p.gate, &p.up]),
                    GateUp::Fused(both) => all.push(both),
                }
                all.push(&mlp.down);
            }
            Ffn::Plain(mlp) => all.extend([&mlp.up, &mlp.down]),
        }
        all
    }

    /// Every linear of the block, to be changed.
    pub fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all = match &mut self.mixer.projections {
            Projections::Separate(p) => vec![&mut p.q, &mut p.k, &mut p.v],
            Projections::Fused(p) => vec![&mut p.qkv],
        };
        all.push(&mut self.mixer.o);
        match &mut self.ffn {
            Ffn::Gated(mlp) => {
                match &mut mlp.gate_up {
                    GateUp::Separate(p) => all.extend([&mut p.gate, &mut p.up]),
                    GateUp::Fused(both) => all.push(both),
                }
                all.push(&mut mlp.down);
            }
            Ffn::Plain(mlp) => all.extend([&mut mlp.up, &mut mlp.down]),
        }
        all
    }

    /// The norm at `site` (tensor name with or without `.weight`), where it stands before or after a half of the block.
    pub fn norm_mut(&mut self, site: &str) -> Option<&mut Norm> {
        let site = site.strip_suffix(".weight").unwrap_or(site);
        let after = [&mut self.mixer_post_norm, &mut self.ffn_post_norm];
        [&mut self.mixer_norm, &mut self.ffn_norm]
            .into_iter()
            .chain(after.into_iter().flatten())
            .find(|norm| norm.site == site)
    }

    /// The linear at `site` (tensor name with or without `.weight`).
    pub fn linear_mut(&mut self, site: &str) -> Option<&mut Linear> {
        let site = site.strip_suffix(".weight").unwrap_or(site);
        self.linears_mut().into_iter().find(|l| l.site == site)
    }
}

fn after(norm: &Option<Norm>, x: Tensor<3>) -> Tensor<3> {
    match norm {
        Some(norm) => norm.forward(x),
        None => x,
    }
}
