//! Shape of a Vision Transformer.

use burn::module::Param;
use burn::tensor::Device;
use refit_store::Artifact;
use serde_json::{Value, json};

use super::values::{Start, Values, check};
use crate::block::{Attention, Block, Ffn, Mlp, Projections, Separate, Wiring};
use crate::error::{Error, Result};
use crate::ops::{Activation, AttentionSpec};
use crate::vision::VisionTransformer;

/// Initial weights, class token and positions (Dosovitskiy et al. 2021).
const START: Start = Start::Truncated { std: 0.02 };
/// What transformers adds to the variance in a ViT.
const EPS: f64 = 1e-12;

/// Shape of a ViT classifier (Dosovitskiy et al. 2021), with GELU and a class token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VitShape {
    /// Height and width of the images.
    pub image_size: usize,
    /// Height and width of a patch; divides `image_size`.
    pub patch: usize,
    /// Colour channels of the images.
    pub inputs: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Blocks.
    pub layers: usize,
    /// Heads; divides `hidden`.
    pub heads: usize,
    /// Classes.
    pub classes: usize,
}

impl Default for VitShape {
    /// ViT-Tiny (Touvron et al. 2021) for Fashion-MNIST: 49 patches of 4 x 4 grey pixels, 6 blocks of width 192.
    fn default() -> Self {
        Self {
            image_size: 28,
            patch: 4,
            inputs: 1,
            hidden: 192,
            intermediate: 768,
            layers: 6,
            heads: 3,
            classes: 10,
        }
    }
}

impl VitShape {
    /// Checks that such a model can be.
    ///
    /// # Errors
    /// Zero sizes, patches that do not divide the image, heads that do not divide the width.
    pub fn check(&self) -> Result<()> {
        check(&[
            ("image_size", self.image_size),
            ("patch_size", self.patch),
            ("num_channels", self.inputs),
            ("hidden_size", self.hidden),
            ("intermediate_size", self.intermediate),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_labels", self.classes),
        ])?;
        let divides = |key: &str, part: usize, of: &str, whole: usize| match whole % part {
            0 => Ok(()),
            _ => {
                let problem = format!("{part} does not divide {of} = {whole}");
                Err(Error::Config { key: key.into(), problem })
            }
        };
        divides("patch_size", self.patch, "image_size", self.image_size)?;
        divides("num_attention_heads", self.heads, "hidden_size", self.hidden)
    }

    /// The `config.json` of a `ViTForImageClassification` in transformers. It names `num_labels` classes `LABEL_0` and on, which
    /// is how transformers counts them.
    pub fn to_config_json(&self) -> Value {
        let names = (0..self.classes).map(|i| format!("LABEL_{i}"));
        let ids: serde_json::Map<_, _> =
            names.clone().enumerate().map(|(i, name)| (i.to_string(), name.into())).collect();
        let labels: serde_json::Map<_, _> =
            names.enumerate().map(|(i, name)| (name, i.into())).collect();
        json!({
            "model_type": "vit",
            "architectures": ["ViTForImageClassification"],
            "image_size": self.image_size,
            "patch_size": self.patch,
            "num_channels": self.inputs,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "hidden_act": "gelu",
            "layer_norm_eps": EPS,
            "qkv_bias": true,
            "attention_probs_dropout_prob": 0.0,
            "hidden_dropout_prob": 0.0,
            "initializer_range": 0.02,
            "id2label": ids,
            "label2id": labels,
        })
    }

    /// A model of this shape: weights, class token and positions from N(0, 0.02²) cut at two standard deviations, biases zero,
    /// fixed by `seed`; tensor names as transformers writes them.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn init(&self, seed: u64, device: &Device) -> Result<VisionTransformer> {
        self.check()?;
        let values = Values::Seed(seed, device);
        let (h, p) = (self.hidden, self.patch);
        let tokens = (self.image_size / p).pow(2) + 1;
        let embeddings = |part: &str| format!("vit.embeddings.{part}");
        let projection = embeddings("patch_embeddings.projection");
        Ok(VisionTransformer {
            patches: Param::from_tensor(values.tensor(
                &format!("{projection}.weight"),
                [h, self.inputs, p, p],
                START,
            )?),
            patch_bias: Param::from_tensor(values.zeros(&format!("{projection}.bias"), h)?),
            class_token: Param::from_tensor(values.tensor(
                &embeddings("cls_token"),
                [1, 1, h],
                START,
            )?),
            positions: Param::from_tensor(values.tensor(
                &embeddings("position_embeddings"),
                [1, tokens, h],
                START,
            )?),
            blocks: (0..self.layers).map(|i| self.block(i, &values)).collect::<Result<_>>()?,
            norm: values.layer_norm("vit.layernorm".into(), h, EPS)?,
            classifier: values.linear("classifier", [self.classes, h], START)?,
            image_size: self.image_size,
        })
    }

    /// A model with the weights of an artifact, pretrained or our own.
    ///
    /// # Errors
    /// As [`VisionTransformer::load`].
    pub fn load(artifact: &Artifact, device: &Device) -> Result<VisionTransformer> {
        VisionTransformer::load(artifact, device)
    }

    fn block(&self, index: usize, values: &Values) -> Result<Block> {
        let at = |part: &str| format!("vit.encoder.layer.{index}.{part}");
        let (h, f) = (self.hidden, self.intermediate);
        let linear = |part: &str, shape| values.linear(&at(part), shape, START);
        Ok(Block {
            mixer_norm: values.layer_norm(at("layernorm_before"), h, EPS)?,
            mixer: Attention {
                projections: Projections::Separate(Separate {
                    q: linear("attention.attention.query", [h, h])?,
                    k: linear("attention.attention.key", [h, h])?,
                    v: linear("attention.attention.value", [h, h])?,
                }),
                o: linear("attention.output.dense", [h, h])?,
                q_norm: None,
                k_norm: None,
                side: None,
                head_adapter: None,
                spec: AttentionSpec {
                    heads: self.heads,
                    kv_heads: self.heads,
                    head_dim: h / self.heads,
                    scale: 1.0 / ((h / self.heads) as f32).sqrt(),
                    causal: None,
                    window: None,
                    softcap: None,
                    lengths: None,
                },
            },
            ffn_norm: values.layer_norm(at("layernorm_after"), h, EPS)?,
            ffn: Ffn::Plain(Mlp {
                up: linear("intermediate.dense", [f, h])?,
                down: linear("output.dense", [h, f])?,
                activation: Activation::Gelu,
            }),
            mixer_post_norm: None,
            ffn_post_norm: None,
            mixer_side: None,
            ffn_side: None,
            wiring: Wiring::PreNorm,
        })
    }
}
