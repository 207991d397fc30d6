//! A typed, lenient view of `config.json`: unknown keys are kept, wrong kinds read as absent.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A model's configuration: `config.json`, or the same keys rebuilt from GGUF metadata.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Config {
    raw: Map<String, Value>,
}

impl Config {
    /// Wraps a parsed configuration.
    pub fn new(raw: Map<String, Value>) -> Self {
        Self { raw }
    }

    /// Parses `config.json`; `path` is for the error message, which names the line.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        parse_object(path, bytes).map(Self::new)
    }

    /// The architecture family, as Hugging Face names it ("llama", "bert", ...).
    pub fn model_type(&self) -> Option<&str> {
        self.str("model_type")
    }

    /// Every key, in file order.
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }

    /// True if there is no configuration at all (a bare weight file).
    pub fn is_empty(&self) -> bool {
        self.raw.is_empty()
    }

    /// A key's value, `null` counting as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.raw.get(key).filter(|value| !value.is_null())
    }

    /// A non-negative whole number (also when spelled `12.0`) that `f64` holds exactly; larger ones are no sizes.
    pub fn usize(&self, key: &str) -> Option<usize> {
        let float = self.get(key)?.as_f64()?;
        (float.fract() == 0.0 && (0.0..9.0e15).contains(&float)).then_some(float as usize)
    }

    /// A number.
    pub fn f64(&self, key: &str) -> Option<f64> {
        self.get(key)?.as_f64()
    }

    /// A string.
    pub fn str(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// A boolean.
    pub fn bool(&self, key: &str) -> Option<bool> {
        self.get(key)?.as_bool()
    }

    /// A nested configuration, such as `text_config` or `rope_scaling`.
    pub fn sub(&self, key: &str) -> Option<Config> {
        self.get(key)?.as_object().cloned().map(Config::new)
    }

    /// One id or the list of ids under a key (`eos_token_id` may be either).
    pub fn ids(&self, key: &str) -> Vec<u32> {
        let as_id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        match self.get(key) {
            Some(Value::Array(list)) => list.iter().filter_map(as_id).collect(),
            Some(single) => as_id(single).into_iter().collect(),
            None => Vec::new(),
        }
    }

    /// Pretty JSON with a final newline, as Hugging Face writes it.
    pub fn to_json(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(&self.raw).expect("invariant: maps serialize");
        bytes.push(b'\n');
        bytes
    }
}

/// Parses a JSON object, with the line of the first error.
pub(crate) fn parse_object(path: &Path, bytes: &[u8]) -> Result<Map<String, Value>> {
    serde_json::from_slice(bytes).map_err(|error| Error::Json {
        path: path.to_owned(),
        line: error.line(),
        reason: format!("expected a JSON object: {error}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_leniently_and_keeps_unknown_keys() {
        let text = br#"{"model_type":"llama","hidden_size":576.0,"rope_theta":1e5,"pad":null,
                        "eos_token_id":[2,7],"x":{"y":1},"vast":18446744073709551615}"#;
        let config = Config::parse(Path::new("config.json"), text).unwrap();
        assert_eq!(config.model_type(), Some("llama"));
        assert_eq!(config.usize("hidden_size"), Some(576));
        assert_eq!(config.usize("model_type"), None);
        assert_eq!(config.usize("vast"), None);
        assert_eq!(config.get("pad"), None);
        assert_eq!(config.ids("eos_token_id"), [2, 7]);
        assert_eq!(config.sub("x").unwrap().usize("y"), Some(1));
        assert!(config.raw().contains_key("pad"));
    }

    #[test]
    fn errors_name_the_line() {
        let error = Config::parse(Path::new("a/config.json"), b"{\n\"x\": }\n").unwrap_err();
        assert!(error.to_string().starts_with("a/config.json: line 2:"), "{error}");
        assert!(Config::parse(Path::new("c"), b"[1]").is_err());
    }
}
