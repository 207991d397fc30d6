//! The parts of a recipe, from YAML values.

use std::collections::BTreeMap;
use std::path::Path;

use refit_store::DType;
use serde_json::{Map, Value};

use super::{Slice, Source, Token, TokenRow, Tokenizer, Whose};
use crate::error::{Error, Result};
use crate::merge::mergekit::setting::{Setting, Settings};
use crate::suggest::nearest;

/// Reads mappings, and minds keys that nobody reads.
pub(super) struct Reader {
    pub compat: bool,
    pub warnings: Vec<String>,
}

impl Reader {
    /// Refuses keys that nobody reads.
    pub fn keys(&mut self, map: &Map<String, Value>, known: &[&str], at: &str) -> Result<()> {
        for key in map.keys().filter(|key| !known.contains(&key.as_str())) {
            let hint = match nearest(key, known) {
                Some(near) => format!(" (did you mean `{near}`?)"),
                None => String::new(),
            };
            if !self.compat {
                let problem = format!("unknown key `{key}`{hint}; keys here: {}", known.join(", "));
                return Err(Error::recipe(at, problem));
            }
            self.warnings.push(format!("{at}: the key `{key}` is unknown and was ignored{hint}"));
        }
        Ok(())
    }

    pub fn slice(&mut self, value: &Value, at: &str) -> Result<Slice> {
        let map = object(value, at)?;
        self.keys(map, &["sources", "base_model", "residual_weight", "parameters"], at)?;
        let inside = format!("{at}.sources");
        let sources = list(map.get("sources").unwrap_or(&Value::Null), &inside)?
            .iter()
            .enumerate()
            .map(|(i, item)| self.source(item, &format!("{inside}[{i}]"), true))
            .collect::<Result<_>>()?;
        if map.get("residual_weight").is_some_and(|value| !value.is_null()) {
            self.warnings.push(format!("{at}: `residual_weight` has no effect in mergekit either"));
        }
        let base = map.get("base_model").map(|value| model(value, at)).transpose()?.flatten();
        Ok(Slice { sources, base, parameters: settings(map, at)? })
    }

    pub fn source(&mut self, value: &Value, at: &str, sliced: bool) -> Result<Source> {
        let map = object(value, at)?;
        let known: &[&str] = match sliced {
            true => &["model", "layer_range", "parameters"],
            false => &["model", "parameters"],
        };
        self.keys(map, known, at)?;
        let missing = || Error::recipe(at, "the key `model` is missing");
        let model = model(map.get("model").unwrap_or(&Value::Null), at)?.ok_or_else(missing)?;
        let range = match (sliced, map.get("layer_range").and_then(Value::as_array)) {
            (false, _) => None,
            (true, Some(range)) => match range.iter().map(Value::as_u64).collect::<Vec<_>>()[..] {
                [Some(from), Some(to)] if from < to => Some((from as usize, to as usize)),
                _ => {
                    let problem =
                        "expected `layer_range: [FROM, TO]`, with TO not included and above FROM";
                    return Err(Error::recipe(at, problem));
                }
            },
            (true, None) => {
                return Err(Error::recipe(at, "the key `layer_range` is missing: [FROM, TO]"));
            }
        };
        Ok(Source { model, range, parameters: settings(map, at)? })
    }

    pub fn tokenizer(&mut self, map: &Map<String, Value>) -> Result<Option<Tokenizer>> {
        let given = |key: &str| map.get(key).filter(|value| !value.is_null());
        let from = |value: &Value, at: &str| -> Result<Whose> {
            Ok(match value.as_str() {
                Some("union") => Whose::Union,
                Some("base") => Whose::Base,
                _ => match model(value, at)? {
                    Some(name) => Whose::Model(name),
                    None => return Err(Error::recipe(at, "expected `base`, `union` or a model")),
                },
            })
        };
        match (given("tokenizer_source"), given("tokenizer")) {
            (Some(_), Some(_)) => {
                Err(Error::recipe("tokenizer", "give `tokenizer_source` or `tokenizer`, not both"))
            }
            (Some(source), None) => {
                let from = from(source, "tokenizer_source")?;
                Ok(Some(Tokenizer { from, tokens: BTreeMap::new(), multiple: None }))
            }
            (None, Some(value)) => {
                let map = object(value, "tokenizer")?;
                self.keys(map, &["source", "tokens", "pad_to_multiple_of"], "tokenizer")?;
                let source = map.get("source").filter(|value| !value.is_null());
                let multiple = map.get("pad_to_multiple_of").filter(|value| !value.is_null());
                let multiple = match multiple.map(|value| value.as_u64()) {
                    None => None,
                    Some(Some(n @ 1..=65536)) => Some(n as usize),
                    Some(_) => {
                        return Err(Error::recipe(
                            "pad_to_multiple_of",
                            "expected a small whole number",
                        ));
                    }
                };
                let mut tokens = BTreeMap::new();
                if let Some(list) = map.get("tokens").filter(|value| !value.is_null()) {
                    for (token, value) in object(list, "tokenizer.tokens")? {
                        tokens.insert(token.clone(), self.token(token, value)?);
                    }
                }
                let from =
                    source.map_or(Ok(Whose::Union), |value| from(value, "tokenizer.source"))?;
                Ok(Some(Tokenizer { from, tokens, multiple }))
            }
            (None, None) => Ok(None),
        }
    }

    fn token(&mut self, token: &str, value: &Value) -> Result<Token> {
        let at = format!("tokenizer.tokens.`{token}`");
        let map = object(value, &at)?;
        self.keys(map, &["source", "force"], &at)?;
        let force = map.get("force").and_then(Value::as_bool).unwrap_or(false);
        let source = map.get("source").unwrap_or(&Value::Null);
        let row = match source.get("kind").and_then(Value::as_str) {
            Some("zero") => TokenRow::Zero,
            Some("model_token") => {
                let missing = || Error::recipe(&at, "a model_token needs `model`");
                let of = model(&source["model"], &at)?.ok_or_else(missing)?;
                match (source["token"].as_str(), source["token_id"].as_u64()) {
                    (Some(text), None) => TokenRow::Other(of, Ok(text.to_owned())),
                    (None, Some(id)) => TokenRow::Other(of, Err(id as usize)),
                    _ => {
                        return Err(Error::recipe(
                            &at,
                            "give exactly one of `token` and `token_id`",
                        ));
                    }
                }
            }
            Some(other) => {
                let problem = format!("unknown kind `{other}`; there are zero and model_token");
                return Err(Error::recipe(&at, problem));
            }
            None => match model(source, &at)? {
                Some(name) => TokenRow::Model(name),
                None => return Err(Error::recipe(&at, "the key `source` is missing")),
            },
        };
        Ok(Token { row, force })
    }
}

pub(super) fn object<'a>(value: &'a Value, at: &str) -> Result<&'a Map<String, Value>> {
    value.as_object().ok_or_else(|| Error::recipe(at, "expected `key: value` pairs"))
}

pub(super) fn list<'a>(value: &'a Value, at: &str) -> Result<&'a Vec<Value>> {
    let filled = value.as_array().filter(|list| !list.is_empty());
    filled.ok_or_else(|| Error::recipe(at, "expected a list with at least one entry"))
}

pub(super) fn text_of(map: &Map<String, Value>, key: &str, at: &str) -> Result<Option<String>> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(Error::recipe(at, format!("`{key}` is `{other}`; expected text"))),
    }
}

pub(super) fn settings(map: &Map<String, Value>, at: &str) -> Result<Settings> {
    match map.get("parameters") {
        None | Some(Value::Null) => Ok(Settings::new()),
        Some(value) => object(value, &format!("{at}.parameters"))?
            .iter()
            .map(|(key, value)| {
                Ok((key.clone(), Setting::parse(value, &format!("{at}: `{key}`"))?))
            })
            .collect(),
    }
}

pub(super) fn dtype(map: &Map<String, Value>, key: &'static str) -> Result<Option<DType>> {
    const NAMES: &[(&str, DType)] = &[
        ("float32", DType::F32),
        ("float16", DType::F16),
        ("bfloat16", DType::BF16),
        ("float64", DType::F64),
    ];
    let Some(text) = text_of(map, key, "the recipe")? else { return Ok(None) };
    let name = text.strip_prefix("torch.").unwrap_or(&text);
    let known: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
    match NAMES.iter().find(|(known, _)| *known == name) {
        Some((_, dtype)) => Ok(Some(*dtype)),
        None => {
            let hint = match nearest(name, &known) {
                Some(near) => format!(" (did you mean `{near}`?)"),
                None => String::new(),
            };
            Err(Error::recipe(
                key,
                format!("unknown type `{text}`{hint}; there are {}", known.join(", ")),
            ))
        }
    }
}

/// A model's name: `path[@revision]`, or the same as a mapping.
pub(super) fn model(value: &Value, at: &str) -> Result<Option<String>> {
    let with = |path: &str, revision: Option<&str>| match revision {
        Some(revision) => format!("{path}@{revision}"),
        None => path.to_owned(),
    };
    let adapter = |base: &str, adapter: &str| {
        let problem = format!(
            "{base}+{adapter}: merge the adapter into its base first: refit apply merge-adapter {base} {adapter} -o DIR"
        );
        Error::recipe(at, problem)
    };
    match value {
        Value::Null => Ok(None),
        Value::String(text) => match text.split_once('+') {
            // A plus sign may also be part of a path.
            Some((base, lora)) if !Path::new(text).exists() => Err(adapter(base, lora)),
            _ => Ok(Some(text.clone())),
        },
        Value::Object(map) => {
            if map.get("override_architecture").is_some_and(|value| !value.is_null()) {
                let problem = "`override_architecture` is not read: refit infers architectures from names and shapes";
                return Err(Error::recipe(at, problem));
            }
            let inner = map.get("model").unwrap_or(value);
            let name = match inner {
                Value::String(text) => text.clone(),
                inner => match inner["path"].as_str() {
                    Some(path) => with(path, inner["revision"].as_str()),
                    None => {
                        return Err(Error::recipe(
                            at,
                            "expected a model: a path, or {model: {path, revision}}",
                        ));
                    }
                },
            };
            match &map.get("lora") {
                Some(Value::String(lora)) => Err(adapter(&name, lora)),
                Some(Value::Object(lora)) => {
                    Err(adapter(&name, lora["path"].as_str().unwrap_or("ADAPTER")))
                }
                _ => Ok(Some(name)),
            }
        }
        _ => Err(Error::recipe(at, "expected a model: a path, or {model: {path, revision}}")),
    }
}
