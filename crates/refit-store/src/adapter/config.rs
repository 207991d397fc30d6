//! `adapter_config.json`: every key is kept, the ones that change a result are read strictly.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::form::{Factor, Form, Part, Prompt, Side};
use super::pattern::{self, Pattern};
use crate::config::parse_object;
use crate::error::{Error, Result};

/// Name of the configuration in an adapter's directory.
pub const FILE_NAME: &str = "adapter_config.json";

/// Values of `peft_type` that refit reads.
pub const PEFT_TYPES: [&str; 8] =
    ["LORA", "IA3", "LOHA", "LOKR", "LN_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"];

/// Which tool's conventions a directory follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Hugging Face PEFT: `peft_type`.
    Peft,
    /// AdapterHub's `adapters`: a nested `config`, the adapter's name inside the keys.
    AdapterHub,
    /// refit's own, for forms that PEFT lacks: `refit_type`.
    Refit,
}

/// The configuration of an adapter.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdapterConfig {
    raw: Map<String, Json>,
}

/// What is wrong with a key; becomes an error where the file is known.
#[derive(Debug)]
pub(super) struct Fault {
    key: String,
    reason: String,
}

impl Fault {
    pub fn new(key: &str, reason: impl Into<String>) -> Self {
        Self { key: key.to_owned(), reason: reason.into() }
    }

    pub fn at(self, path: &Path) -> Error {
        Error::AdapterConfig { path: path.to_owned(), key: self.key, reason: self.reason }
    }
}

impl AdapterConfig {
    /// Wraps parsed keys.
    pub fn new(raw: Map<String, Json>) -> Self {
        Self { raw }
    }

    /// Parses the file's bytes; `path` is for messages.
    ///
    /// # Errors
    /// JSON that does not parse, with its line, or that is no object.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        parse_object(path, bytes).map(Self::new)
    }

    /// Every key.
    pub fn raw(&self) -> &Map<String, Json> {
        &self.raw
    }

    /// A key's value, `null` counting as absent.
    pub fn get(&self, key: &str) -> Option<&Json> {
        self.raw.get(key).filter(|value| !value.is_null())
    }

    /// The same configuration with a key set.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Json>) -> Self {
        self.raw.insert(key.to_owned(), value.into());
        self
    }

    /// Whose conventions the keys follow; `None` where no tool's mark is there.
    pub fn dialect(&self) -> Option<Dialect> {
        let hub = || self.get("config").is_some() && self.get("version").is_some();
        if self.get("peft_type").is_some() {
            Some(Dialect::Peft)
        } else if self.get("refit_type").is_some() {
            Some(Dialect::Refit)
        } else if hub() || (self.get("config").is_some() && self.get("model_type").is_some()) {
            Some(Dialect::AdapterHub)
        } else {
            None
        }
    }

    /// `peft_type`.
    pub fn peft_type(&self) -> Option<&str> {
        self.get("peft_type")?.as_str()
    }

    /// The base model that the adapter names.
    pub fn base_model(&self) -> Option<&str> {
        self.get("base_model_name_or_path").or_else(|| self.get("model_name"))?.as_str()
    }

    /// JSON as PEFT writes it: keys sorted, two spaces. Nested objects keep their order, which decides between two
    /// patterns that match the same name.
    pub fn to_json(&self) -> Vec<u8> {
        let sorted: BTreeMap<&String, &Json> = self.raw.iter().collect();
        let mut bytes = serde_json::to_vec_pretty(&sorted).expect("invariant: maps serialize");
        bytes.push(b'\n');
        bytes
    }

    /// A PEFT configuration with the keys that every type has.
    fn peft(kind: &str) -> Self {
        let raw = Map::from_iter([
            ("peft_type".to_owned(), json!(kind)),
            ("task_type".to_owned(), Json::Null),
            ("base_model_name_or_path".to_owned(), Json::Null),
            ("revision".to_owned(), Json::Null),
            ("inference_mode".to_owned(), json!(true)),
            ("auto_mapping".to_owned(), Json::Null),
        ]);
        Self { raw }
    }

    /// Prefix tuning of a left-to-right model with these layers, key-value heads and head size.
    pub fn prefix(tokens: usize, layers: usize, kv_heads: usize, head_dim: usize) -> Self {
        Self::peft("PREFIX_TUNING")
            .with("task_type", "CAUSAL_LM")
            .with("num_virtual_tokens", tokens)
            .with("token_dim", kv_heads * head_dim)
            .with("num_attention_heads", kv_heads)
            .with("num_layers", layers)
            .with("num_transformer_submodules", 1)
            .with("encoder_hidden_size", kv_heads * head_dim)
            .with("prefix_projection", false)
    }

    /// Prompt tuning of a left-to-right model of this width.
    pub fn prompt(tokens: usize, hidden: usize, layers: usize, heads: usize) -> Self {
        Self::peft("PROMPT_TUNING")
            .with("task_type", "CAUSAL_LM")
            .with("num_virtual_tokens", tokens)
            .with("token_dim", hidden)
            .with("num_attention_heads", heads)
            .with("num_layers", layers)
            .with("num_transformer_submodules", 1)
            .with("prompt_tuning_init", "RANDOM")
    }

    /// The configuration of an adapter that changes nothing, in refit's own dialect: no parts and no prompt.
    pub fn nothing() -> Self {
        Self::unified(&[], None)
    }

    /// The configuration that describes these parts: PEFT's where it has the form, refit's own for bottleneck
    /// adapters (with `prompt`, a prefix beside them). Modules are listed by their whole names, ranks and scales that
    /// differ go into `rank_pattern` and `alpha_pattern`.
    ///
    /// # Errors
    /// [`Error::AdapterForm`] when the parts are of forms that no one adapter can hold.
    pub fn describe(parts: &[Part], prompt: Option<&Prompt>) -> Result<Self> {
        let bad = |reason: &str| Error::AdapterForm { form: "adapter", reason: reason.to_owned() };
        let kinds: BTreeSet<&str> = parts.iter().filter_map(|part| family(&part.form)).collect();
        let kind = match (kinds.len(), prompt) {
            (0, _) => return Err(bad("there is no change of a weight to describe")),
            (1, _) => *kinds.first().expect("invariant: there is one"),
            _ => {
                let all: Vec<_> = kinds.into_iter().collect();
                return Err(bad(&format!(
                    "one adapter cannot hold {} together",
                    all.join(" and ")
                )));
            }
        };
        if kind == "unified" {
            return Ok(Self::unified(parts, prompt));
        }
        if kind == "delta" && prompt.is_none() {
            let base = ("base_model_name_or_path".to_owned(), Json::Null);
            let raw = Map::from_iter([("refit_type".to_owned(), json!("delta")), base]);
            return Ok(Self { raw });
        }
        if prompt.is_some() {
            return Err(bad("a prompt beside parts that PEFT knows needs an adapter of its own"));
        }
        let changed = |part: &&Part| family(&part.form).is_some();
        let mut sites: Vec<&str> = parts.iter().filter(changed).map(|part| &*part.site).collect();
        sites.dedup();
        let mut config = Self::peft(kind).with("target_modules", json!(sites));
        let saved: BTreeSet<&str> = parts
            .iter()
            .filter(|part| family(&part.form).is_none() && !sites.contains(&&*part.site))
            .map(|part| &*part.site)
            .collect();
        if !saved.is_empty() {
            config = config.with("modules_to_save", json!(saved));
        }
        let biased = |part: &Part| {
            matches!(&part.form, Form::Full { tensor, .. } if tensor == ".bias")
                && sites.contains(&&*part.site)
        };
        match kind {
            "LORA" => {
                config = config.ranks(parts, "lora_alpha");
                let has = |wanted: fn(&Form) -> bool| parts.iter().any(|part| wanted(&part.form));
                let dora = has(|form| matches!(form, Form::Lora { magnitude: Some(_), .. }));
                let lora_bias = has(|form| matches!(form, Form::Lora { bias: Some(_), .. }));
                let bias = if parts.iter().any(biased) { "lora_only" } else { "none" };
                config = config
                    .with("use_dora", dora)
                    .with("lora_bias", lora_bias)
                    .with("use_rslora", false)
                    .with("lora_dropout", 0.0)
                    .with("bias", bias);
            }
            "LOHA" => config = config.ranks(parts, "alpha"),
            "LOKR" => config = config.ranks(parts, "alpha").kronecker(parts),
            "IA3" => {
                let input = |part: &&Part| matches!(part.form, Form::Ia3 { side: Side::Input, .. });
                let forward: Vec<_> = parts.iter().filter(input).map(|part| &part.site).collect();
                config = config.with("feedforward_modules", json!(forward));
            }
            _ => {}
        }
        Ok(config)
    }

    /// `r`, alpha and the patterns of those sites that differ from the most common pair.
    fn ranks(self, parts: &[Part], alpha_key: &str) -> Self {
        let pairs: Vec<Ranked<'_>> = parts
            .iter()
            .filter_map(|part| {
                let (rank, scale) = rank_and_scale(&part.form)?;
                // Whole numbers where they give the scale again: PEFT's alpha is declared as one.
                let alpha = f64::from(scale) * rank as f64;
                let whole = alpha.round();
                let exact = (whole / rank as f64) as f32 == scale;
                Some((&*part.site, rank, if exact { whole } else { alpha }))
            })
            .collect();
        let mut counts: BTreeMap<(usize, u64), usize> = BTreeMap::new();
        pairs
            .iter()
            .for_each(|(_, r, alpha)| *counts.entry((*r, alpha.to_bits())).or_default() += 1);
        let common = counts.iter().max_by_key(|(_, count)| **count).map(|(pair, _)| *pair);
        let (r, alpha) = common.map_or((8, 8.0), |(r, bits)| (r, f64::from_bits(bits)));
        let number = |x: f64| if x.fract() == 0.0 { json!(x as i64) } else { json!(x) };
        let odd = |keep: &dyn Fn(&Ranked<'_>) -> Option<Json>| -> Map<String, Json> {
            let entry = |pair: &Ranked<'_>| Some((pattern::escape(pair.0), keep(pair)?));
            pairs.iter().filter_map(entry).collect()
        };
        let ranks = odd(&|(_, rank, _)| (*rank != r).then(|| json!(rank)));
        let alphas = odd(&|(_, _, a)| (*a != alpha).then(|| number(*a)));
        self.with("r", r)
            .with(alpha_key, number(alpha))
            .with("rank_pattern", ranks)
            .with("alpha_pattern", alphas)
    }

    /// How PEFT has to cut the matrices to get these factors: its own near-square cut, or one size for all.
    fn kronecker(self, parts: &[Part]) -> Self {
        let outer = parts.iter().filter_map(|part| match &part.form {
            Form::Lokr { w1, .. } => Some(w1),
            _ => None,
        });
        let both = outer.clone().any(|w1| matches!(w1, Factor::LowRank(..)));
        let sizes: BTreeSet<usize> = outer.flat_map(|w1| <[usize; 2]>::from(w1.dims())).collect();
        let factor = if sizes.len() == 1 { sizes.first().copied() } else { None };
        self.with("decompose_both", both)
            .with("decompose_factor", factor.map_or(json!(-1), |size| json!(size)))
    }

    fn unified(parts: &[Part], prompt: Option<&Prompt>) -> Self {
        let mut adapters = Map::new();
        for part in parts {
            if let Form::Heads { keys, scale, activation, .. } = &part.form {
                let rank = keys.shape.get(1).copied().unwrap_or(0);
                let entry = json!({
                    "form": "per-head", "scale": scale, "activation": activation, "bottleneck": rank,
                });
                adapters.insert(part.site.clone(), entry);
            }
            if let Form::Bottleneck { down, scale, activation, sequential, position, .. } =
                &part.form
            {
                let form = if *sequential { "sequential" } else { "parallel" };
                adapters.insert(
                    part.site.clone(),
                    json!({
                        "form": form, "scale": scale, "activation": activation,
                        "position": position, "bottleneck": down.rows(),
                    }),
                );
            }
        }
        let mut config = Self::default()
            .with("refit_type", "unified")
            .with("base_model_name_or_path", Json::Null)
            .with("adapters", adapters);
        if let Some(prompt) = prompt {
            config = config.with("num_virtual_tokens", prompt.tokens());
            if let Prompt::Prefix { layers, .. } = prompt {
                config = config.with("num_layers", *layers);
            }
        }
        config
    }

    pub(super) fn count(&self, key: &str) -> Result<Option<usize>, Fault> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let float = value.as_f64().filter(|x| x.fract() == 0.0 && (1.0..1e9).contains(x));
        float.map(|x| Some(x as usize)).ok_or_else(|| {
            Fault::new(key, format!("expected a whole number from 1, found {value}"))
        })
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, Fault> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value
            .as_f64()
            .filter(|x| x.is_finite())
            .map(Some)
            .ok_or_else(|| Fault::new(key, format!("expected a number, found {value}")))
    }

    pub(super) fn flag(&self, key: &str) -> Result<bool, Fault> {
        let Some(value) = self.get(key) else { return Ok(false) };
        value
            .as_bool()
            .ok_or_else(|| Fault::new(key, format!("expected true or false, found {value}")))
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, Fault> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let text = value.as_str();
        text.map(Some).ok_or_else(|| Fault::new(key, format!("expected a string, found {value}")))
    }

    /// A string, or a list of them.
    pub(super) fn names(&self, key: &str) -> Result<Vec<&str>, Fault> {
        let bad = |value| Fault::new(key, format!("expected a list of names, found {value}"));
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Json::String(one)) => Ok(vec![one]),
            Some(value @ Json::Array(many)) => {
                many.iter().map(|name| name.as_str().ok_or_else(|| bad(value))).collect()
            }
            Some(value) => Err(bad(value)),
        }
    }

    /// Regular expressions with a positive number each, in the file's order: the first that matches counts.
    pub(super) fn patterns(&self, key: &str) -> Result<Vec<(Pattern, f64)>, Fault> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let object = value.as_object().ok_or_else(|| {
            Fault::new(key, format!("expected an object of names and numbers, found {value}"))
        })?;
        let entry = |(name, value): (&String, &Json)| {
            let compiled = Pattern::new(name).map_err(|reason| {
                Fault::new(key, format!("`{name}` is not a pattern that refit reads: {reason}"))
            })?;
            let number = value.as_f64().filter(|x| x.is_finite());
            let number = number.ok_or_else(|| {
                Fault::new(key, format!("`{name}`: expected a number, found {value}"))
            })?;
            Ok((compiled, number))
        };
        object.iter().map(entry).collect()
    }
}

/// A site with its rank and alpha.
type Ranked<'s> = (&'s str, usize, f64);

/// The `peft_type` (or refit's own word) that holds a form; `None` for tensors that any type may carry along.
fn family(form: &Form) -> Option<&'static str> {
    match form {
        Form::Lora { .. } | Form::EmbeddingLora { .. } => Some("LORA"),
        Form::Ia3 { .. } => Some("IA3"),
        Form::Loha { .. } => Some("LOHA"),
        Form::Lokr { .. } => Some("LOKR"),
        Form::LayerNorm { .. } => Some("LN_TUNING"),
        Form::Bottleneck { .. } | Form::Heads { .. } => Some("unified"),
        Form::Delta { .. } => Some("delta"),
        Form::Full { .. } => None,
    }
}

fn rank_and_scale(form: &Form) -> Option<(usize, f32)> {
    match form {
        Form::Lora { a, scale, .. } | Form::EmbeddingLora { a, scale, .. } => {
            Some((a.rows(), *scale))
        }
        Form::Loha { w1_b, scale, .. } => Some((w1_b.rows(), *scale)),
        Form::Lokr { w1, w2, scale } => {
            let rank = |factor: &Factor| match factor {
                Factor::LowRank(a, _) => Some(a.columns()),
                Factor::Full(_) => None,
            };
            // With two full factors PEFT's own rank is no longer visible; any that leaves them full will do.
            let (rows, columns) = w2.dims();
            let full = rows.max(columns).max(w1.dims().0).max(w1.dims().1);
            Some((rank(w2).or_else(|| rank(w1)).unwrap_or(full), *scale))
        }
        _ => None,
    }
}
