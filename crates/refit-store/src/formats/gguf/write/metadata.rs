//! From Hugging Face's names and configuration to GGUF's: the inverse of [`super::super::translate`].

use serde_json::Value as Json;

use super::{Field, Fields};
use crate::artifact::Artifact;
use crate::config::Config;
use crate::formats::gguf::names::{COMMON_KEYS, FAMILIES, Family};

/// Model types that can be written as GGUF.
pub const MODEL_TYPES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// How a model's tensors are called in GGUF.
#[derive(Debug, Clone, Copy)]
pub struct Naming {
    family: &'static Family,
    heads: (usize, usize),
}

/// The naming of a model; the error says what is missing.
pub fn naming(config: &Config) -> Result<Naming, String> {
    let model_type = config.model_type().unwrap_or_default();
    if !MODEL_TYPES.contains(&model_type) {
        return Err(format!(
            "GGUF is written for the model types {}; this one is `{model_type}`: export it with \
             llama.cpp's converter, or to another format",
            MODEL_TYPES.join(", ")
        ));
    }
    // Mistral has Llama's tensors and travels under its name.
    let gguf = if model_type == "mistral" { "llama" } else { model_type };
    let family = FAMILIES
        .iter()
        .find(|family| family.gguf == gguf)
        .expect("invariant: every model type that is written is read");
    let heads =
        config.usize("num_attention_heads").ok_or("config.json has no `num_attention_heads`")?;
    Ok(Naming { family, heads: (heads, config.usize("num_key_value_heads").unwrap_or(heads)) })
}

impl Naming {
    /// `general.architecture`.
    pub fn architecture(&self) -> &'static str {
        self.family.gguf
    }

    /// GGUF's name of a tensor; `None` where it has none.
    pub fn tensor(&self, name: &str) -> Option<String> {
        let (stem, kind) = name.rsplit_once('.')?;
        let find = |names: &[(&str, &str)], stem: &str| {
            names.iter().find(|(_, hf)| *hf == stem).map(|(gguf, _)| (*gguf).to_owned())
        };
        match stem.strip_prefix(self.family.layers).and_then(|rest| rest.split_once('.')) {
            Some((layer, inner)) if layer.parse::<u32>().is_ok() => {
                Some(format!("blk.{layer}.{}.{kind}", find(self.family.inner, inner)?))
            }
            _ => Some(format!("{}.{kind}", find(self.family.outer, stem)?)),
        }
    }

    /// Rows of one head where a tensor's rows are interleaved for llama.cpp's rotary embedding: stored row `2 j + p` of a
    /// head of `d` rows is row `p d/2 + j` of Hugging Face's.
    pub fn head_rows(&self, name: &str, rows: usize) -> Option<usize> {
        let heads = match name.rsplit('.').nth(1)? {
            "q_proj" => self.heads.0,
            "k_proj" => self.heads.1,
            _ => return None,
        };
        (self.family.interleaved && heads > 0).then(|| rows / heads)
    }
}

/// A number of the rotary embedding, where transformers 5 keeps it or where older releases do.
fn rope<'a>(config: &'a Config, key: &str) -> Option<&'a Json> {
    let inside = |name: &str| config.raw().get(name)?.get(key);
    inside("rope_parameters").or_else(|| inside("rope_scaling")).or_else(|| config.raw().get(key))
}

/// The kind of rotary scaling; `None` for none.
fn rope_type(config: &Config) -> Option<&str> {
    let kind = rope(config, "rope_type").or_else(|| rope(config, "type")).and_then(Json::as_str);
    kind.filter(|kind| *kind != "default")
}

/// `general.*` and the architecture's keys.
pub fn metadata(artifact: &Artifact, naming: &Naming, name: &str) -> Result<Fields, String> {
    let config = artifact.config();
    let gguf = naming.family.gguf;
    let mut fields: Fields = vec![
        ("general.architecture".into(), gguf.into()),
        ("general.type".into(), "model".into()),
        ("general.name".into(), name.into()),
    ];
    let mut put = |key: &str, field: Field| fields.push((format!("{gguf}.{key}"), field));
    let whole = |key: &str| -> Result<Option<u32>, String> {
        let Some(value) = config.raw().get(key).filter(|value| !value.is_null()) else {
            return Ok(None);
        };
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
        number.map(Some).ok_or(format!("config.json: `{key}` is {value}, no 32-bit whole number"))
    };
    for (key, hf) in COMMON_KEYS {
        match *key {
            "attention.layer_norm_rms_epsilon" | "rope.freq_base" | "attention.key_length" => {}
            // Qwen 2 has a width for a window that it does not use.
            "attention.sliding_window" if config.bool("use_sliding_window") == Some(false) => {}
            _ => {
                if let Some(number) = whole(hf)? {
                    put(key, Field::U32(number));
                }
            }
        }
    }
    let epsilon = config.f64("rms_norm_eps").ok_or("config.json has no `rms_norm_eps`")?;
    put("attention.layer_norm_rms_epsilon", Field::F32(epsilon as f32));
    let hidden = whole("hidden_size")?.ok_or("config.json has no `hidden_size`")?;
    let heads = naming.heads.0.max(1) as u32;
    let head_dim = whole("head_dim")?.unwrap_or(hidden / heads);
    put("attention.key_length", Field::U32(head_dim));
    put("attention.value_length", Field::U32(head_dim));
    put("rope.dimension_count", Field::U32(head_dim));
    let theta = rope(config, "rope_theta").and_then(Json::as_f64).unwrap_or(10_000.0);
    put("rope.freq_base", Field::F32(theta as f32));
    let number = |key: &str| rope(config, key).and_then(Json::as_f64);
    match rope_type(config) {
        None | Some("llama3") => {}
        Some(kind @ ("linear" | "yarn")) => {
            put("rope.scaling.type", kind.into());
            put("rope.scaling.factor", Field::F32(number("factor").unwrap_or(1.0) as f32));
            if let Some(original) = number("original_max_position_embeddings") {
                put("rope.scaling.original_context_length", Field::U32(original as u32));
            }
        }
        Some(other) => {
            return Err(format!(
                "config.json: rotary scaling `{other}` has no word in GGUF for this family"
            ));
        }
    }
    Ok(fields)
}

/// What the wavelengths of a head are divided by under Llama 3.1's scaling: the content of `rope_freqs.weight`, which
/// is written beside the weights. `None` for other models.
pub fn rope_factors(config: &Config) -> Option<Vec<f32>> {
    if rope_type(config) != Some("llama3") {
        return None;
    }
    let number =
        |key: &str, default: f64| rope(config, key).and_then(Json::as_f64).unwrap_or(default);
    let heads = config.usize("num_attention_heads").filter(|&heads| heads > 0)?;
    let dim = config.usize("head_dim").or(config.usize("hidden_size").map(|h| h / heads))?;
    let theta = number("rope_theta", 10_000.0);
    let (factor, low) = (number("factor", 8.0), number("low_freq_factor", 1.0));
    let high = number("high_freq_factor", 4.0);
    let context = number("original_max_position_embeddings", 8192.0);
    let factors = (0..dim / 2).map(|pair| {
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * pair as f64 / dim as f64);
        if wavelength < context / high {
            1.0
        } else if wavelength > context / low {
            factor as f32
        } else {
            let smooth = (context / wavelength - low) / (high - low);
            (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
        }
    });
    Some(factors.collect())
}
