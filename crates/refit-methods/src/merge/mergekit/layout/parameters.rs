//! The method's parameters for one tensor: looked up from the source to the whole recipe.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{Layout, Place};
use crate::error::{Error, Result};
use crate::merge::mergekit::config::Config;
use crate::merge::mergekit::setting::{Kind, Setting, Settings};

/// Parameters that mergekit wants to be told.
const REQUIRED: &[&str] = &["weight", "t"];

/// What a per-model parameter is where only other models say.
const DEFAULTS: &[(&str, f64)] =
    &[("density", 1.0), ("gamma", 0.01), ("epsilon", 0.15), ("scale", 1.0)];

/// What the method's parameters are.
pub(super) fn kinds(config: &Config) -> BTreeMap<String, (Kind, bool)> {
    let schema = (config.method.schema)();
    let properties = schema["properties"].as_object().cloned().unwrap_or_default();
    let kind = |name: &str, field: &Value| match field["type"].as_str() {
        Some("array") => Some((Kind::Number, true)),
        Some("number") => Some((Kind::Number, false)),
        Some("integer") => Some((Kind::Integer, false)),
        Some("boolean") => Some((Kind::Bool, false)),
        _ if name == "rescale" => Some((Kind::Bool, false)),
        _ => None,
    };
    properties.iter().filter_map(|(name, field)| Some((name.clone(), kind(name, field)?))).collect()
}

impl Layout<'_> {
    /// The method's parameters for one tensor.
    pub(super) fn parameters(&self, place: &Place, beside: &[usize]) -> Result<Value> {
        let shared = [&place.slice.parameters, &self.config.parameters];
        let mut found = Map::new();
        for (name, (kind, per_model)) in &self.kinds {
            let at = format!("`{name}` of `{}`", place.out);
            let look = |levels: &[&Settings], tensor: &str| -> Result<Option<Value>> {
                for setting in levels.iter().filter_map(|level| level.get(name)) {
                    let setting: &Setting = setting;
                    if let Some(value) = setting.evaluate(tensor, place.t, *kind, &at)? {
                        return Ok(Some(value));
                    }
                }
                Ok(None)
            };
            let missing = |who: &str| {
                let method = self.config.method.about.name.replace('-', "_");
                let problem = format!(
                    "{method} needs `{name}`{who}, and the recipe does not give it for `{}`",
                    place.out
                );
                Error::recipe("parameters", problem)
            };
            if !per_model {
                match look(&shared, &place.out)? {
                    Some(value) if name == "rescale" => {
                        found.insert(name.clone(), json!(self.rescale(value == json!(true))));
                    }
                    Some(value) => {
                        found.insert(name.clone(), value);
                    }
                    None if REQUIRED.contains(&name.as_str()) => return Err(missing("")),
                    None if name == "rescale" && self.compat && self.is_random() => {
                        found.insert(name.clone(), json!("l1"));
                    }
                    None => {}
                }
                continue;
            }
            let mut values = Vec::new();
            for k in beside {
                let source = &place.sources[*k];
                let levels = [&source.parameters, shared[0], shared[1]];
                values.push((source, look(&levels, &place.tensors[*k])?));
            }
            if let Some((source, _)) = values.iter().find(|(_, value)| value.is_none())
                && REQUIRED.contains(&name.as_str())
            {
                return Err(missing(&format!(" for {}", source.model)));
            }
            if values.iter().any(|(_, value)| value.is_some()) {
                let default =
                    DEFAULTS.iter().find(|(of, _)| of == name).map_or(1.0, |(_, value)| *value);
                let filled = values.into_iter().map(|(_, value)| value.unwrap_or(json!(default)));
                found.insert(name.clone(), filled.collect());
            }
        }
        Ok(Value::Object(found))
    }

    pub(super) fn is_random(&self) -> bool {
        ["dare", "della"].iter().any(|name| self.config.method.about.name.starts_with(name))
    }

    /// What mergekit's `rescale` is here.
    fn rescale(&self, on: bool) -> &'static str {
        match (on, self.is_random() && !self.compat) {
            (false, _) => "none",
            (true, true) => "unbiased",
            (true, false) => "l1",
        }
    }
}
