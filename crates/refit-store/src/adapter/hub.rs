//! AdapterHub's adapters: LoRA, and those bottleneck adapters whose place in the block refit's form can express.
//!
//! The adapter's name stands inside the keys (`...loras.NAME.lora_A`, `...adapters.NAME.adapter_down.0.weight`). Facts
//! from the source of `adapters` (methods/modeling.py, methods/lora.py, loading.py, models/bert, models/llama).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value as Json};

use super::form::{Form, Part, Values};
use super::read::{Contents, Reader, Stored, sort};
use crate::error::{Error, Result, TensorFault};

/// Words of the keys, and what they stand for.
const HOLDS: [(&str, &str); 7] = [
    (".loras.", "LoRA"),
    (".adapters.", "bottleneck adapters"),
    ("prefix_tunings.", "prefix tuning"),
    ("invertible_adapters.", "invertible adapters"),
    ("prompt_tunings.", "prompt tuning"),
    (".refts.", "ReFT"),
    ("heads.", "prediction heads"),
];

/// Reads an AdapterHub directory into parts whose sites are those of the Hugging Face model.
pub(super) fn read(reader: &Reader<'_>, dir: &Path, tensors: Vec<Stored>) -> Result<Contents> {
    let hub = Hub::new(reader, dir, &tensors)?;
    let mut sites: BTreeMap<String, BTreeMap<String, Stored>> = BTreeMap::new();
    let mut parts = Vec::new();
    let architecture = hub.config.get("architecture").and_then(Json::as_str);
    let marker = if architecture == Some("lora") { "loras" } else { "adapters" };
    match architecture {
        Some("lora") | None => {}
        Some(other) => return Err(hub.foreign(format!(
            "its architecture is `{other}`; refit reads LoRA and bottleneck adapters; merge or convert it with `adapters`"
        ))),
    }
    for (name, values) in tensors {
        let path: Vec<&str> = name.split('.').collect();
        let at = path.iter().position(|part| *part == marker).filter(|&at| at > 0);
        let Some(at) = at.filter(|&at| path.len() > at + 2) else {
            return Err(hub.foreign(format!("`{name}` is not a tensor of {marker}")));
        };
        let word = path[at + 2..].join(".");
        let (module, word) = (path[..at].join("."), word);
        sites.entry(module).or_default().insert(word, (name, values));
    }
    for (module, mut factors) in sites {
        let (site, form) = match marker {
            "loras" => (module, hub.lora(&mut factors)?),
            _ => hub.bottleneck(&module, &mut factors)?,
        };
        if let Some((name, _)) = factors.into_values().next() {
            return Err(hub.foreign(format!("refit has no place for its tensor `{name}`")));
        }
        parts.push(Part { site, form });
    }
    sort(&mut parts);
    Ok(Contents { parts, prompt: None })
}

struct Hub<'a> {
    reader: &'a Reader<'a>,
    dir: &'a Path,
    config: &'a Map<String, Json>,
    model_type: &'a str,
    holds: String,
}

impl<'a> Hub<'a> {
    fn new(reader: &'a Reader<'a>, dir: &'a Path, tensors: &[Stored]) -> Result<Self> {
        let holds: BTreeSet<&str> = tensors
            .iter()
            .flat_map(|(name, _)| HOLDS.iter().filter(move |(word, _)| name.contains(word)))
            .map(|(_, what)| *what)
            .collect();
        let holds = match holds.len() {
            0 => "nothing that refit knows".to_owned(),
            _ => holds.into_iter().collect::<Vec<_>>().join(" and "),
        };
        let wrong = |key: &str, reason: &str| Error::AdapterConfig {
            path: reader.config_path.to_owned(),
            key: key.to_owned(),
            reason: reason.to_owned(),
        };
        let config = reader.config.get("config").and_then(Json::as_object).ok_or_else(|| {
            wrong("config", "expected an object, as AdapterHub's `save_adapter` writes it")
        })?;
        let model_type = reader.config.get("model_type").and_then(Json::as_str);
        let model_type =
            model_type.ok_or_else(|| wrong("model_type", "missing: which model is it for?"))?;
        Ok(Self { reader, dir, config, model_type, holds })
    }

    fn foreign(&self, reason: impl Into<String>) -> Error {
        let (path, holds) = (self.dir.to_owned(), self.holds.clone());
        Error::ForeignAdapter { path, tool: "AdapterHub", holds, reason: reason.into() }
    }

    fn wrong(&self, key: &str, reason: String) -> Error {
        let path = self.reader.config_path.to_owned();
        Error::AdapterConfig { path, key: format!("config.{key}"), reason }
    }

    fn flag(&self, key: &str) -> bool {
        match self.config.get(key) {
            None | Some(Json::Null | Json::Bool(false)) => false,
            Some(Json::String(text)) => !text.is_empty(),
            Some(_) => true,
        }
    }

    fn number(&self, key: &str) -> Result<f64> {
        let value = self.config.get(key);
        value.and_then(Json::as_f64).filter(|x| x.is_finite()).ok_or_else(|| {
            let found = value.map_or("nothing".to_owned(), Json::to_string);
            self.wrong(key, format!("expected a number, found {found}"))
        })
    }

    fn take(&self, factors: &mut BTreeMap<String, Stored>, word: &str) -> Result<Stored> {
        factors.remove(word).ok_or_else(|| {
            let (name, stem) = match factors.first_key_value() {
                Some((other, (name, _))) => (name.clone(), name.strip_suffix(&**other)),
                None => return self.foreign(format!("`{word}` is missing")),
            };
            let missing = format!("{}{word}", stem.unwrap_or_default());
            Error::tensor(self.reader.weights, name.clone(), TensorFault::Half { missing })
        })
    }

    fn shape(&self, stored: &Stored, expected: String) -> Error {
        let fault = TensorFault::Shape { found: stored.1.shape.clone(), expected };
        Error::tensor(self.reader.weights, stored.0.clone(), fault)
    }

    fn lora(&self, factors: &mut BTreeMap<String, Stored>) -> Result<Form> {
        for key in ["use_gating", "use_dora", "vera_d", "vera_b"] {
            if self.flag(key) {
                return Err(
                    self.foreign(format!("`config.{key}` is set, which refit does not read"))
                );
            }
        }
        if let Some(mode) = self.config.get("composition_mode").and_then(Json::as_str)
            && mode != "add"
        {
            return Err(self
                .foreign(format!("its composition mode is `{mode}` ((IA)^3); refit reads `add`")));
        }
        let (rank, alpha) = (self.number("r")?, self.number("alpha")?);
        if !(rank >= 1.0 && rank.fract() == 0.0) {
            return Err(self.wrong("r", format!("expected a whole number from 1, found {rank}")));
        }
        // Before 1.1.0 the library trained with a factor of 1, whatever alpha said; its own loader corrects that too.
        let scale = if self.trained_unscaled() { 1.0 } else { alpha / rank };
        let b = self.take(factors, "lora_B")?;
        let a = match factors.remove("lora_A") {
            Some(a) => a,
            None => {
                let missing = b.0.replace("lora_B", "lora_A");
                let fault = TensorFault::Half { missing };
                return Err(Error::tensor(self.reader.weights, b.0, fault));
            }
        };
        for stored in [&a, &b] {
            if stored.1.shape.len() != 2 {
                return Err(self.shape(stored, "a matrix".to_owned()));
            }
        }
        if a.1.rows() as f64 != rank || b.1.columns() as f64 != rank {
            let expected = format!("rank {rank} in both factors, as `config.r` says");
            return Err(self.shape(if a.1.rows() as f64 == rank { &b } else { &a }, expected));
        }
        Ok(Form::Lora { a: a.1, b: b.1, scale: scale as f32, magnitude: None, bias: None })
    }

    /// True for `adapters.X` with X before 1.1.0.
    fn trained_unscaled(&self) -> bool {
        let version = self.reader.config.get("version").and_then(Json::as_str).unwrap_or("");
        let Some(version) = version.strip_prefix("adapters.") else { return false };
        let mut numbers = version.split(['.', 'r', 'a', 'b', '+']).map(|part| part.parse::<u32>());
        let mut next = || numbers.next().and_then(std::result::Result::ok).unwrap_or(0);
        (next(), next()) < (1, 1)
    }

    /// The site and form of the adapter that `module` holds.
    fn bottleneck(
        &self,
        module: &str,
        factors: &mut BTreeMap<String, Stored>,
    ) -> Result<(String, Form)> {
        for key in ["use_gating", "ln_before", "ln_after", "phm_layer", "inv_adapter"] {
            if self.flag(key) {
                return Err(self.foreign(format!(
                    "`config.{key}` is set, which refit's bottleneck adapter does not have"
                )));
            }
        }
        if self.config.get("original_ln_after") == Some(&Json::Bool(false)) {
            return Err(self.foreign(
                "it replaces the block's own residual sum (`original_ln_after` is false), which refit's bottleneck \
                 adapter does not",
            ));
        }
        let parallel = self.flag("is_parallel");
        if !parallel && self.flag("original_ln_before") {
            return Err(self.foreign(
                "it stands behind the residual sum and its norm (`original_ln_before`, the `seq_bn` and Pfeiffer \
                 placement), where no module's output is what it changes; refit reads `double_seq_bn` and `par_bn`",
            ));
        }
        let (site, position) = self.site(module, parallel)?;
        let scale = match self.config.get("scaling") {
            None => 1.0,
            Some(_) => self.number("scaling").map_err(|_| {
                self.foreign("its scaling is learned (`config.scaling`); refit reads a number")
            })?,
        };
        let activation = self.activation()?;
        let up = self.take(factors, "adapter_up.weight")?;
        let down = self.take(factors, "adapter_down.0.weight")?;
        let down_bias = self.take(factors, "adapter_down.0.bias")?;
        let up_bias = self.take(factors, "adapter_up.bias")?;
        let matrix = |values: &Values| values.shape.len() == 2;
        if !matrix(&down.1) || !matrix(&up.1) || up.1.columns() != down.1.rows() {
            let expected = format!("[out, {}], the rows of `{}`", down.1.rows(), down.0);
            return Err(self.shape(&up, expected));
        }
        if down_bias.1.values.len() != down.1.rows() {
            return Err(self.shape(&down_bias, format!("[{}]", down.1.rows())));
        }
        if up_bias.1.values.len() != up.1.rows() {
            return Err(self.shape(&up_bias, format!("[{}]", up.1.rows())));
        }
        let form = Form::Bottleneck {
            down: down.1,
            down_bias: down_bias.1.values,
            up: up.1,
            up_bias: up_bias.1.values,
            scale: scale as f32,
            activation,
            sequential: !parallel,
            position: position.to_owned(),
        };
        Ok((site, form))
    }

    /// The activation as Hugging Face names it. Files without a version use the older names, where `gelu` was the
    /// tanh form.
    fn activation(&self) -> Result<String> {
        let name = self.config.get("non_linearity").and_then(Json::as_str).unwrap_or("relu");
        let name = name.to_ascii_lowercase();
        let versioned = self.reader.config.get("version").is_some();
        Ok(match (&*name, versioned) {
            ("gelu", false) => "gelu_new",
            ("gelu_orig", false) => "gelu",
            ("swish", _) => "silu",
            ("leakyrelu", _) => "leaky_relu",
            (known @ ("relu" | "silu" | "gelu" | "gelu_new" | "tanh"), _) => known,
            (other, _) => return Err(self.foreign(format!("refit has no activation `{other}`"))),
        }
        .to_owned())
    }

    /// The module whose output an adapter at AdapterHub's place changes.
    fn site(&self, module: &str, parallel: bool) -> Result<(String, &'static str)> {
        let unknown = || {
            self.foreign(format!(
                "refit does not know which module of a `{}` model `{module}` follows",
                self.model_type
            ))
        };
        match self.model_type {
            "bert" | "roberta" | "xlm-roberta" | "electra" | "camembert" => {
                let position =
                    if module.ends_with("attention.output") { "attention" } else { "ffn" };
                if !module.ends_with(".output") || module.contains("crossattention") {
                    return Err(unknown());
                }
                Ok((format!("{module}.dense"), position))
            }
            "llama" | "mistral" | "qwen2" => {
                if parallel {
                    return Err(self.foreign(
                        "its parallel adapter reads the residual stream before the norm, where refit's reads what \
                         the sub-layer reads",
                    ));
                }
                if let Some(layer) = module.strip_suffix(".attention_adapters") {
                    return Ok((format!("{layer}.self_attn.o_proj"), "attention"));
                }
                let layer = module.strip_suffix(".output_adapters").ok_or_else(unknown)?;
                Ok((format!("{layer}.mlp.down_proj"), "ffn"))
            }
            _ => Err(unknown()),
        }
    }
}
