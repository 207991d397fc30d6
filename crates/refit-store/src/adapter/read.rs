//! From the tensors of a PEFT (or refit) adapter to its parts.

use std::collections::BTreeMap;
use std::path::Path;

use super::build::{Builder, Site};
use super::config::{AdapterConfig, Dialect, Fault, PEFT_TYPES};
use super::form::{Form, Part, Prompt, Values};
use crate::error::{Error, Result, TensorFault};

/// What PEFT and refit put before every module path.
pub(super) const PREFIX: &str = "base_model.model.";

/// Key of a trained prompt.
pub(super) const PROMPT: &str = "prompt_embeddings";

/// Layers that PEFT saves along when the vocabulary was resized.
const EMBEDDINGS: [&str; 3] = ["embed_tokens", "lm_head", "wte"];

/// Options of LoRA that change what its factors mean.
const FOREIGN_LORA: [(&str, &str); 10] = [
    ("alora_invocation_tokens", "activated LoRA, which acts on some tokens only"),
    ("arrow_config", "routed LoRA, which depends on the input"),
    ("kasa_config", "KaSA, which changes the base weights"),
    ("layer_replication", "layers that the base model does not have"),
    ("monteclora_config", "sampled LoRA"),
    ("target_parameters", "LoRA on bare parameters"),
    ("trainable_token_indices", "single trained rows of the embedding"),
    ("use_bdlora", "block-diagonal LoRA"),
    ("use_qalora", "LoRA on pooled inputs"),
    ("velora_config", "VeLoRA"),
];

/// Initializations that take a part of the base weights away.
const SPLITTING: [&str; 5] = ["pissa", "corda", "olora", "loftq", "lora_ga"];

/// A tensor of the file: its name there and its values.
pub type Stored = (String, Values);

/// What one adapter holds.
#[derive(Debug, PartialEq)]
pub(super) struct Contents {
    pub parts: Vec<Part>,
    pub prompt: Option<Prompt>,
}

/// Where an adapter's facts come from, for messages.
pub(super) struct Reader<'a> {
    /// `adapter_config.json`.
    pub config_path: &'a Path,
    /// The weight file.
    pub weights: &'a Path,
    pub config: &'a AdapterConfig,
}

/// Words that end a module's path in the keys of each kind, and whether `.weight` or `.bias` follows.
fn markers(kind: &str) -> &'static [&'static str] {
    match kind {
        "LORA" => {
            &["lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"]
        }
        "IA3" => &["ia3_l"],
        "LOHA" => &["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"],
        "LOKR" => {
            &["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"]
        }
        "LN_TUNING" => &["ln_tuning_layers"],
        "delta" => &["delta"],
        "unified" => &["adapter_down", "adapter_up", "adapter_keys", "adapter_values"],
        _ => &[PROMPT],
    }
}

impl Reader<'_> {
    pub(super) fn fault(&self, tensor: &str, fault: TensorFault) -> Error {
        Error::tensor(self.weights, tensor, fault)
    }

    pub(super) fn shape(&self, tensor: &Stored, expected: impl Into<String>) -> Error {
        let fault = TensorFault::Shape { found: tensor.1.shape.clone(), expected: expected.into() };
        self.fault(&tensor.0, fault)
    }

    pub(super) fn key<T>(&self, outcome: Result<T, Fault>) -> Result<T> {
        outcome.map_err(|fault| fault.at(self.config_path))
    }

    pub(super) fn wrong(&self, key: &str, reason: impl Into<String>) -> Error {
        Fault::new(key, reason).at(self.config_path)
    }

    /// Sorts the tensors into parts and a prompt.
    pub fn read(&self, tensors: Vec<Stored>) -> Result<Contents> {
        let kind = self.kind()?;
        let (mut sites, mut parts, mut prompt) =
            (BTreeMap::<String, Site>::new(), Vec::new(), None);
        for (name, values) in tensors {
            if values.values.is_empty() {
                let reason = "it is empty: the training saved a shard that was not gathered (DeepSpeed \
                              ZeRO-3, FSDP); gather the weights and save the adapter again";
                return Err(self.fault(&name, TensorFault::Other(reason.to_owned())));
            }
            if name == PROMPT && (kind.starts_with('P') || kind == "unified") {
                prompt = Some(self.prompt(&kind, (name, values))?);
                continue;
            }
            match self.place(&kind, &name)? {
                Place::Factor { site, word } => {
                    let site = sites.entry(site).or_default();
                    if let Some((first, _)) = site.0.get(word) {
                        let reason = format!("it says the same as `{first}`; keep one of them");
                        return Err(self.fault(&name, TensorFault::Other(reason)));
                    }
                    site.0.insert(word, (name, values));
                }
                Place::Whole { site, tensor } => {
                    parts.push(Part { site, form: Form::Full { tensor, values } });
                }
                Place::Delta { site, tensor } => {
                    parts.push(Part { site, form: Form::Delta { tensor, values } });
                }
                Place::Nothing => {}
            }
        }
        let builder = Builder::new(self, &kind)?;
        for (site, factors) in sites {
            let form = builder.form(&site, factors)?;
            parts.push(Part { site, form });
        }
        sort(&mut parts);
        let same = |pair: &&[Part]| {
            pair[0].tensor() == pair[1].tensor() && pair[0].form.rank() == pair[1].form.rank()
        };
        if let Some(pair) = parts.windows(2).find(same) {
            let reason = "two tensors of the adapter replace it; keep one of them".to_owned();
            return Err(self.fault(&pair[0].tensor(), TensorFault::Other(reason)));
        }
        let listed = self.config.get("adapters").and_then(|map| map.as_object());
        let says_nothing = kind == "unified" && listed.is_some_and(|map| map.is_empty());
        if parts.is_empty() && prompt.is_none() && !says_nothing {
            let reason = format!("it holds no tensor of a {kind} adapter");
            return Err(Error::NotAnArtifact { path: self.weights.to_owned(), reason });
        }
        if let Some(listed) = listed
            && kind == "unified"
            && let Some(site) = listed.keys().find(|site| !parts.iter().any(|p| p.site == **site))
        {
            let missing = format!("{PREFIX}{site}.adapter_down.weight");
            return Err(self.wrong("adapters", format!("`{site}` has no tensor `{missing}`")));
        }
        Ok(Contents { parts, prompt })
    }

    /// The kind of the adapter, with options that would change its meaning refused.
    fn kind(&self) -> Result<String> {
        let config = self.config;
        if config.dialect() == Some(Dialect::Refit) {
            return match self.key(config.text("refit_type"))? {
                Some(kind @ ("unified" | "delta")) => Ok(kind.to_owned()),
                other => Err(self.unsupported(other.unwrap_or("null"), &["unified", "delta"])),
            };
        }
        let kind = self.key(config.text("peft_type"))?.unwrap_or_default().to_owned();
        if !PEFT_TYPES.contains(&&*kind) {
            return Err(self.unsupported(&kind, &PEFT_TYPES));
        }
        if kind != "LORA" {
            return Ok(kind);
        }
        let set = |key: &str| match config.get(key) {
            None | Some(serde_json::Value::Bool(false)) => false,
            Some(serde_json::Value::Array(list)) => !list.is_empty(),
            Some(serde_json::Value::Object(map)) => !map.is_empty(),
            Some(_) => true,
        };
        if let Some((key, what)) = FOREIGN_LORA.iter().find(|(key, _)| set(key)) {
            let reason =
                format!("asks for {what}, which refit does not read; merge it with PEFT first");
            return Err(self.wrong(key, reason));
        }
        let start = config.get("init_lora_weights").and_then(|value| value.as_str());
        if let Some(start) = start.map(str::to_ascii_lowercase)
            && SPLITTING.iter().any(|name| start.starts_with(name))
        {
            let reason = format!(
                "`{start}` moves a part of the base weights into the adapter, so that it does not fit the \
                 original base; save it from PEFT with `path_initial_model_for_weight_conversion`"
            );
            return Err(self.wrong("init_lora_weights", reason));
        }
        Ok(kind)
    }

    fn unsupported(&self, kind: &str, supported: &'static [&'static str]) -> Error {
        let (path, kind) = (self.config_path.to_owned(), kind.to_owned());
        Error::UnsupportedAdapter { path, kind, supported }
    }

    /// What a key names.
    fn place(&self, kind: &str, name: &str) -> Result<Place> {
        let known = markers(kind);
        let unknown =
            || self.fault(name, TensorFault::UnknownSuffix { kind: kind.to_owned(), known });
        let path: Vec<&str> = name.strip_prefix(PREFIX).unwrap_or(name).split('.').collect();
        if kind == "delta" {
            let [site @ .., "delta", last] = &path[..] else { return Err(unknown()) };
            return Ok(Place::Delta { site: site.join("."), tensor: format!(".{last}") });
        }
        let at = path.iter().rposition(|part| known.contains(part)).filter(|&at| at > 0);
        if let Some((at, marker)) = at.and_then(|at| {
            known.iter().find(|marker| **marker == path[at]).map(|marker| (at, *marker))
        }) {
            // The adapter's name may stand behind the marker, as in a raw state dictionary.
            let word = word(marker, &path[at + 1..]).ok_or_else(unknown)?;
            return Ok(Place::Factor { site: path[..at].join("."), word });
        }
        let (last, module) = path.split_last().ok_or_else(unknown)?;
        let mut module = module.to_vec();
        if module.contains(&"original_module") {
            return Ok(Place::Nothing);
        }
        let wrapper = module.iter().position(|part| *part == "modules_to_save");
        if let Some(at) = wrapper {
            // `score.modules_to_save.default.weight`, and the same without the adapter's name.
            let inner = if module.len() > at + 1 { at + 2 } else { at + 1 };
            module.drain(at..inner);
        }
        let based = module.last() == Some(&"base_layer");
        module.retain(|part| *part != "base_layer");
        let saved = self.key(self.config.names("modules_to_save"))?;
        let below_saved = (1..=module.len()).any(|len| {
            let path = module[..len].join(".");
            saved.iter().any(|name| path.ends_with(name))
        });
        let bias =
            *last == "bias" && self.key(self.config.text("bias"))?.unwrap_or("none") != "none";
        let embedding = module.last().is_some_and(|name| EMBEDDINGS.contains(name));
        let whole = wrapper.is_some() || below_saved || bias || based || embedding;
        if !whole || module.is_empty() {
            return Err(unknown());
        }
        Ok(Place::Whole { site: module.join("."), tensor: format!(".{last}") })
    }

    fn prompt(&self, kind: &str, stored: Stored) -> Result<Prompt> {
        let [rows, columns] = stored.1.shape[..] else {
            return Err(self.shape(&stored, "a matrix of virtual tokens"));
        };
        let tokens = self.key(self.config.count("num_virtual_tokens"))?;
        let prefix = kind == "PREFIX_TUNING"
            || (kind == "unified" && self.config.get("num_layers").is_some());
        let submodules = match prefix {
            true => 1,
            false => self.key(self.config.count("num_transformer_submodules"))?.unwrap_or(1),
        };
        let wanted = tokens.unwrap_or(rows).saturating_mul(submodules);
        if rows != wanted {
            return Err(self.shape(&stored, format!("{wanted} rows (`num_virtual_tokens`)")));
        }
        if !prefix {
            if let Some(width) = self.key(self.config.count("token_dim"))?
                && width != columns
            {
                return Err(self.shape(&stored, format!("{width} columns (`token_dim`)")));
            }
            return Ok(Prompt::Input { tokens: rows, table: stored.1 });
        }
        let layers = self
            .key(self.config.count("num_layers"))?
            .ok_or_else(|| self.wrong("num_layers", "a prefix needs the number of layers"))?;
        if !columns.is_multiple_of(layers.saturating_mul(2)) {
            let expected = format!("a key and a value for each of {layers} layers (`num_layers`)");
            return Err(self.shape(&stored, expected));
        }
        if let Some(width) = self.key(self.config.count("token_dim"))?
            && kind == "PREFIX_TUNING"
            && columns != width.saturating_mul(2 * layers)
        {
            let expected = format!("{layers} layers * 2 * {width} columns (`token_dim`)");
            return Err(self.shape(&stored, expected));
        }
        Ok(Prompt::Prefix { tokens: rows, layers, table: stored.1 })
    }
}

/// Parts in the order of their sites; within one site what replaces comes first.
pub(super) fn sort(parts: &mut [Part]) {
    parts.sort_by(|a, b| (&a.site, a.form.rank()).cmp(&(&b.site, b.form.rank())));
}

enum Place {
    Factor {
        site: String,
        word: &'static str,
    },
    Whole {
        site: String,
        tensor: String,
    },
    /// A difference.
    Delta {
        site: String,
        tensor: String,
    },
    /// The base's own tensor, which PEFT keeps beside a replaced one.
    Nothing,
}

/// The factor that a marker and what follows it stand for: `lora_B` with `bias` is not `lora_B` with `weight`.
fn word(marker: &'static str, tail: &[&str]) -> Option<&'static str> {
    let module = ["lora_A", "lora_B", "adapter_down", "adapter_up", "ln_tuning_layers"];
    let (end, name) = match tail {
        [.., end @ ("weight" | "bias")] => (Some(*end), &tail[..tail.len() - 1]),
        _ => (None, tail),
    };
    if name.len() > 1 {
        return None;
    }
    match (module.contains(&marker), end) {
        (true, Some("weight")) | (false, None) => Some(marker),
        (true, Some(_)) => match marker {
            "lora_B" => Some("lora_B.bias"),
            "adapter_down" => Some("adapter_down.bias"),
            "adapter_up" => Some("adapter_up.bias"),
            "ln_tuning_layers" => Some("ln_tuning_layers.bias"),
            _ => None,
        },
        // A raw state dictionary of DoRA holds a module's weight where the saved file has a bare tensor.
        (false, Some("weight")) if marker == "lora_magnitude_vector" => Some(marker),
        _ => None,
    }
}
