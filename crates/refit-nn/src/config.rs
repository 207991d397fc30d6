//! What a decoder or encoder needs to know, read from Hugging Face config keys.

use refit_store::Config;

use crate::block::Wiring;
use crate::error::{Error, Result};
use crate::operator::NormKind;
use crate::ops::Activation;

/// Shape and flavour of a transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct TransformerConfig {
    /// `model_type` of the config.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Rows of the embedding table.
    pub vocab: usize,
    /// Longest input in tokens.
    pub context: usize,
    /// Kind of norm.
    pub norm: NormKind,
    /// Added to the variance.
    pub eps: f64,
    /// Norm weights are stored as `scale - 1` (Gemma).
    pub norm_offset: bool,
    /// Nonlinearity of the MLP.
    pub activation: Activation,
    /// The MLP has a gate.
    pub gated: bool,
    /// Residual wiring.
    pub wiring: Wiring,
    /// Rotary positions, if the model uses them.
    pub rope: Option<RopeConfig>,
    /// Offset into the learned position table, if the model has one.
    pub positions: Option<usize>,
    /// Query and key heads are normalized.
    pub qk_norm: bool,
    /// The head shares the embedding's weight.
    pub tied: bool,
    /// Factor on the embeddings (Gemma: `sqrt(hidden)`).
    pub embed_scale: Option<f64>,
    /// Factor on attention scores.
    pub attention_scale: f32,
    /// Cap on attention scores (Gemma 2).
    pub attention_softcap: Option<f32>,
    /// Cap on logits (Gemma 2).
    pub logit_softcap: Option<f64>,
    /// Sliding window of each layer.
    pub windows: Vec<Option<usize>>,
}

/// Rotary position embedding (Su et al. 2021) and its stretched variants.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// Elements of each head that rotate.
    pub dim: usize,
    /// Stretching of the positions.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched for longer contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// All frequencies divided by a factor.
    Linear(f64),
    /// Llama 3.1: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// Division of the low frequencies.
        factor: f64,
        /// Start of the ramp, in turns over the old context.
        low: f64,
        /// End of the ramp.
        high: f64,
        /// Context of the original training.
        old_context: f64,
    },
}

impl RopeConfig {
    /// Inverse frequencies, `dim / 2` of them.
    pub fn inverse_frequencies(&self) -> Vec<f64> {
        (0..self.dim / 2)
            .map(|i| {
                let f = self.theta.powf(-2.0 * i as f64 / self.dim as f64);
                match self.scaling {
                    RopeScaling::None => f,
                    RopeScaling::Linear(factor) => f / factor,
                    RopeScaling::Llama3 { factor, low, high, old_context } => {
                        let wavelength = 2.0 * std::f64::consts::PI / f;
                        let smooth =
                            ((old_context / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                }
            })
            .collect()
    }

    fn read(config: &Config, head_dim: usize, default_theta: f64) -> Result<Self> {
        // transformers 5 writes one `rope_parameters` table, older versions `rope_theta` and `rope_scaling`.
        let table = config.sub("rope_parameters").or_else(|| config.sub("rope_scaling"));
        let from_table = |key: &str| table.as_ref().and_then(|t| t.f64(key));
        let theta = config
            .f64("rope_theta")
            .or_else(|| from_table("rope_theta"))
            .or_else(|| config.f64("rotary_emb_base"));
        let fraction = config
            .f64("partial_rotary_factor")
            .or_else(|| config.f64("rotary_pct"))
            .or_else(|| from_table("partial_rotary_factor"))
            .unwrap_or(1.0);
        let kind = table
            .as_ref()
            .and_then(|t| t.str("rope_type").or_else(|| t.str("type")).map(str::to_owned));
        let need = |key: &str| {
            from_table(key).ok_or_else(|| Error::Config {
                key: format!("rope_scaling.{key}"),
                problem: "is missing".into(),
            })
        };
        let scaling = match kind.as_deref() {
            None | Some("default") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear(need("factor")?),
            Some("llama3") => RopeScaling::Llama3 {
                factor: need("factor")?,
                low: need("low_freq_factor")?,
                high: need("high_freq_factor")?,
                old_context: need("original_max_position_embeddings")?,
            },
            Some(other) => {
                return Err(Error::Config {
                    key: "rope_scaling.rope_type".into(),
                    problem: format!("is `{other}`; known are default, linear and llama3"),
                });
            }
        };
        Ok(Self {
            theta: theta.unwrap_or(default_theta),
            dim: (head_dim as f64 * fraction) as usize,
            scaling,
        })
    }
}

/// Reads one of several spellings of a key.
fn any(config: &Config, keys: &[&str]) -> Result<usize> {
    let size = keys.iter().find_map(|k| config.usize(k)).ok_or_else(|| Error::Config {
        key: keys[0].into(),
        problem: "is missing or not a whole number".into(),
    })?;
    at_most(keys[0], size, 1 << 30)
}

/// Refuses sizes that no model has, before memory is asked for.
fn at_most(key: &str, size: usize, most: usize) -> Result<usize> {
    if size > most {
        let problem = format!("is {size}, and models have at most {most}");
        return Err(Error::Config { key: key.into(), problem });
    }
    Ok(size)
}

impl TransformerConfig {
    /// Reads the config of a decoder or BERT-like encoder.
    ///
    /// # Errors
    /// Missing keys, unknown activations and model types without a forward pass.
    pub fn read(config: &Config) -> Result<Self> {
        let model_type = config.model_type().unwrap_or("unknown").to_owned();
        let family = model_type.as_str();
        let known = [
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma2",
            "phi3",
            "gpt2",
            "gpt_neox",
            "opt",
            "bert",
            "roberta",
            "xlm-roberta",
            "distilbert",
            "vit",
        ];
        if !known.contains(&family) {
            let reason = format!("no forward pass yet; those with one are {}", known.join(", "));
            return Err(Error::Unsupported { model_type, reason });
        }
        let hidden = any(config, &["hidden_size", "n_embd", "dim"])?;
        let heads = any(config, &["num_attention_heads", "n_head", "n_heads"])?;
        let layers = any(config, &["num_hidden_layers", "n_layer", "n_layers"])?;
        at_most("num_hidden_layers", layers, 1 << 16)?;
        let positive = |key: &str, value: usize| match value {
            0 => Err(Error::Config { key: key.into(), problem: "must not be 0".into() }),
            _ => Ok(()),
        };
        positive("num_attention_heads", heads)?;
        positive("hidden_size", hidden)?;
        let vision = matches!(family, "vit" | "deit");
        let encoder = vision || matches!(family, "bert" | "roberta" | "xlm-roberta" | "distilbert");
        let kv_heads = config.usize("num_key_value_heads").unwrap_or(heads);
        positive("num_key_value_heads", kv_heads)?;
        if heads % kv_heads != 0 {
            let problem = format!("{kv_heads} does not divide num_attention_heads = {heads}");
            return Err(Error::Config { key: "num_key_value_heads".into(), problem });
        }
        let head_dim = match config.usize("head_dim") {
            Some(dim) => at_most("head_dim", dim, 1 << 20)?,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                let problem = format!(
                    "{heads} does not divide hidden_size = {hidden} and head_dim is not given"
                );
                return Err(Error::Config { key: "num_attention_heads".into(), problem });
            }
        };
        let rms = matches!(family, "llama" | "mistral" | "qwen2" | "qwen3" | "gemma2" | "phi3");
        let intermediate = ["intermediate_size", "n_inner", "hidden_dim", "ffn_dim"]
            .iter()
            .find_map(|k| config.usize(k))
            .unwrap_or(4 * hidden);
        at_most("intermediate_size", intermediate, 1 << 32)?;
        let eps = ["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"]
            .iter()
            .find_map(|k| config.f64(k));
        let default_eps = match family {
            "distilbert" | "bert" | "vit" | "deit" => 1e-12,
            "llama" | "gemma2" | "qwen2" | "qwen3" | "mistral" => 1e-6,
            _ => 1e-5,
        };
        let name = ["hidden_activation", "hidden_act", "activation_function", "activation"]
            .iter()
            .find_map(|k| config.str(k))
            .unwrap_or(if rms { "silu" } else { "gelu" });
        let activation = Activation::from_name(name).ok_or_else(|| Error::Config {
            key: "hidden_act".into(),
            problem: format!("`{name}` is not a known activation"),
        })?;
        let rope = match family {
            _ if rms || family == "gpt_neox" => {
                Some(RopeConfig::read(config, head_dim, if family == "qwen3" { 1e6 } else { 1e4 })?)
            }
            _ => None,
        };
        let context = ["max_position_embeddings", "n_positions", "n_ctx"]
            .iter()
            .find_map(|k| config.usize(k))
            .unwrap_or(if vision { usize::MAX } else { 2048 });
        let positions = match family {
            "gpt2" | "bert" | "distilbert" => Some(0),
            "opt" => Some(2),
            "roberta" | "xlm-roberta" => Some(config.usize("pad_token_id").unwrap_or(1) + 1),
            _ => None,
        };
        let wiring = match family {
            "gemma2" => Wiring::Sandwich,
            "gpt_neox" if config.bool("use_parallel_residual").unwrap_or(true) => Wiring::Parallel,
            "bert" | "roberta" | "xlm-roberta" | "distilbert" => Wiring::PostNorm,
            "opt" if config.bool("do_layer_norm_before") == Some(false) => {
                return Err(Error::Unsupported {
                    model_type,
                    reason: "OPT with norms after the residual sum".into(),
                });
            }
            _ => Wiring::PreNorm,
        };
        if family == "opt" && config.usize("word_embed_proj_dim").is_some_and(|d| d != hidden) {
            return Err(Error::Unsupported {
                model_type,
                reason: "OPT with a projected embedding".into(),
            });
        }
        let scalar = config
            .f64("query_pre_attn_scalar")
            .filter(|_| family == "gemma2")
            .unwrap_or(head_dim as f64);
        let tied_by_default = matches!(family, "gpt2" | "opt" | "gemma2");
        Ok(Self {
            hidden,
            intermediate,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab: if vision { 0 } else { any(config, &["vocab_size"])? },
            context: context
                - positions
                    .filter(|_| matches!(family, "roberta" | "xlm-roberta"))
                    .unwrap_or(0)
                    .min(context),
            norm: if rms { NormKind::Rms } else { NormKind::Layer },
            eps: eps.unwrap_or(default_eps),
            norm_offset: family == "gemma2",
            activation,
            gated: rms,
            wiring,
            rope,
            positions,
            qk_norm: family == "qwen3",
            tied: !encoder && config.bool("tie_word_embeddings").unwrap_or(tied_by_default),
            embed_scale: (family == "gemma2").then(|| (hidden as f64).sqrt()),
            attention_scale: (1.0 / scalar.sqrt()) as f32,
            attention_softcap: config.f64("attn_logit_softcapping").map(|x| x as f32),
            logit_softcap: config.f64("final_logit_softcapping"),
            windows: windows(config, family, layers),
            model_type,
        })
    }
}

/// Sliding window of each layer: `layer_types` where given, else the family's rule.
fn windows(config: &Config, family: &str, layers: usize) -> Vec<Option<usize>> {
    let window = config.usize("sliding_window");
    let types = config.get("layer_types").and_then(|v| v.as_array());
    (0..layers)
        .map(|i| {
            let sliding = match types.and_then(|t| t.get(i)).and_then(|t| t.as_str()) {
                Some(kind) => kind == "sliding_attention",
                None => match family {
                    "mistral" | "phi3" => true,
                    "gemma2" => i % 2 == 0,
                    "qwen2" | "qwen3" => {
                        config.bool("use_sliding_window").unwrap_or(false)
                            && i >= config.usize("max_window_layers").unwrap_or(layers)
                    }
                    _ => false,
                },
            };
            window.filter(|_| sliding)
        })
        .collect()
}
