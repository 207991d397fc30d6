//! A small Llama-like decoder from a handful of numbers.

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use refit_data::Rng;

use crate::block::{
    Attention, Block, Ffn, GateAndUp, GateUp, GatedMlp, Projections, Separate, Wiring,
};
use crate::config::{RopeConfig, RopeScaling, TransformerConfig};
use crate::error::{Error, Result};
use crate::operator::{Embedding, Linear, Norm, NormKind};
use crate::ops::{Activation, AttentionSpec};
use crate::{Decoder, Frame};

/// Shape of a decoder with RMSNorm, rotary positions and a gated SiLU MLP (Llama).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecoderShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads; divides `hidden`.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Longest input.
    pub context: usize,
    /// The head shares the embedding's weight.
    pub tied: bool,
}

impl DecoderShape {
    /// The config that a pretrained model of this shape would have.
    ///
    /// # Errors
    /// Zero sizes, heads that do not divide, an odd head.
    pub fn config(&self) -> Result<TransformerConfig> {
        let sizes = [
            self.hidden,
            self.intermediate,
            self.layers,
            self.heads,
            self.kv_heads,
            self.vocab,
            self.context,
        ];
        if sizes.contains(&0)
            || !self.hidden.is_multiple_of(2 * self.heads)
            || !self.heads.is_multiple_of(self.kv_heads)
        {
            return Err(Error::Invalid(format!(
                "a decoder needs positive sizes, hidden divisible by 2 * heads and heads by kv_heads; found {self:?}"
            )));
        }
        let head_dim = self.hidden / self.heads;
        Ok(TransformerConfig {
            model_type: "llama".into(),
            hidden: self.hidden,
            intermediate: self.intermediate,
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim,
            vocab: self.vocab,
            context: self.context,
            norm: NormKind::Rms,
            eps: 1e-5,
            norm_offset: false,
            activation: Activation::Silu,
            gated: true,
            wiring: Wiring::PreNorm,
            rope: Some(RopeConfig { theta: 10_000.0, dim: head_dim, scaling: RopeScaling::None }),
            positions: None,
            qk_norm: false,
            tied: self.tied,
            embed_scale: None,
            attention_scale: 1.0 / (head_dim as f32).sqrt(),
            attention_softcap: None,
            logit_softcap: None,
            windows: vec![None; self.layers],
        })
    }

    /// A decoder of this shape, weights from N(0, 0.02²), fixed by `seed`; tensor names as transformers writes them.
    ///
    /// # Errors
    /// As [`Self::config`].
    pub fn init(&self, seed: u64, device: &Device) -> Result<Decoder> {
        let config = self.config()?;
        let mut rng = Rng::new(seed);
        let mut table = |rows: usize, columns: usize| {
            let values: Vec<f32> =
                (0..rows * columns).map(|_| 0.02 * rng.normal() as f32).collect();
            Tensor::<2>::from_data(TensorData::new(values, [rows, columns]), device)
        };
        let norm = |site: String| Norm {
            site,
            weight: Param::from_tensor(Tensor::ones([self.hidden], device)),
            bias: None,
            eps: config.eps,
            kind: NormKind::Rms,
        };
        let embed = Embedding {
            site: "model.embed_tokens".into(),
            weight: Param::from_tensor(table(self.vocab, self.hidden)),
        };
        let kv_width = self.kv_heads * config.head_dim;
        let blocks = (0..self.layers)
            .map(|index| {
                let at = |part: &str| format!("model.layers.{index}.{part}");
                let mut linear =
                    |part: &str, out, inputs| Linear::dense(at(part), table(out, inputs), None);
                let (h, f) = (self.hidden, self.intermediate);
                Block {
                    mixer_norm: norm(at("input_layernorm")),
                    mixer: Attention {
                        projections: Projections::Separate(Separate {
                            q: linear("self_attn.q_proj", h, h),
                            k: linear("self_attn.k_proj", kv_width, h),
                            v: linear("self_attn.v_proj", kv_width, h),
                        }),
                        o: linear("self_attn.o_proj", h, h),
                        q_norm: None,
                        k_norm: None,
                        side: None,
                        head_adapter: None,
                        spec: AttentionSpec {
                            heads: self.heads,
                            kv_heads: self.kv_heads,
                            head_dim: config.head_dim,
                            scale: config.attention_scale,
                            causal: None,
                            window: None,
                            softcap: None,
                            lengths: None,
                        },
                    },
                    ffn_norm: norm(at("post_attention_layernorm")),
                    ffn: Ffn::Gated(GatedMlp {
                        gate_up: GateUp::Separate(GateAndUp {
                            gate: linear("mlp.gate_proj", f, h),
                            up: linear("mlp.up_proj", f, h),
                        }),
                        down: linear("mlp.down_proj", h, f),
                        activation: config.activation,
                    }),
                    mixer_post_norm: None,
                    ffn_post_norm: None,
                    mixer_side: None,
                    ffn_side: None,
                    wiring: config.wiring,
                }
            })
            .collect();
        let head =
            (!self.tied).then(|| Linear::dense("lm_head", table(self.vocab, self.hidden), None));
        Ok(Decoder { frame: Frame::new(embed, norm("model.norm".into()), head, config), blocks })
    }
}
