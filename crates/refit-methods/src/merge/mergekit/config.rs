//! The YAML of mergekit (0.1.5): what it says, and what is wrong with it.

use std::collections::BTreeMap;
use std::path::Path;

use refit_store::DType;
use serde_json::Value;

use super::setting::Settings;
use crate::error::{Error, Result};
use crate::merge::KERNELS;
use crate::merge::kernel::Maker;
use crate::suggest::nearest;

mod reader;
#[cfg(test)]
mod tests;

use reader::{Reader, dtype, list, model, object, settings, text_of};

/// A recipe.
#[derive(Clone, Debug)]
pub struct Config {
    /// The method.
    pub method: &'static Maker,
    /// Slices in the order of the output's layers; whole models are one slice without ranges.
    pub slices: Vec<Slice>,
    /// Whether `models` was given: the base then takes part without being listed.
    pub whole: bool,
    /// The base of all slices that name none.
    pub base: Option<String>,
    /// Parameters for everything.
    pub parameters: Settings,
    /// The type that mergekit computes in.
    pub dtype: Option<DType>,
    /// The type that is written, where it is another one.
    pub out_dtype: Option<DType>,
    /// The output's vocabulary, where it is not that of the first model.
    pub tokenizer: Option<Tokenizer>,
    /// `auto`, a name, or a template.
    pub chat_template: Option<String>,
    /// Things that are probably not what the user wants.
    pub warnings: Vec<String>,
}

/// Layers of the output.
#[derive(Clone, Debug)]
pub struct Slice {
    /// What it is merged from.
    pub sources: Vec<Source>,
    /// Its base.
    pub base: Option<String>,
    /// Its parameters.
    pub parameters: Settings,
}

/// A model in a slice.
#[derive(Clone, Debug)]
pub struct Source {
    /// The model, as it is written.
    pub model: String,
    /// Its layers, from the first up to but not including the second.
    pub range: Option<(usize, usize)>,
    /// Its parameters.
    pub parameters: Settings,
}

/// The output's vocabulary.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    /// Whose it is.
    pub from: Whose,
    /// Tokens whose rows come from somewhere else.
    pub tokens: BTreeMap<String, Token>,
    /// The number of rows is raised to a multiple of this.
    pub multiple: Option<usize>,
}

/// Whose vocabulary the output has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The base's, or the first model's.
    Base,
    /// Every model's tokens.
    Union,
    /// This model's.
    Model(String),
}

/// Where the row of a token comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// The row.
    pub row: TokenRow,
    /// Also for models that have the token.
    pub force: bool,
}

/// A row of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenRow {
    /// Zeros.
    Zero,
    /// The token's row in this model.
    Model(String),
    /// Another token's row in this model.
    Other(String, std::result::Result<String, usize>),
}

const KEYS: &[&str] = &[
    "merge_method",
    "models",
    "slices",
    "modules",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "name",
];

/// Whether a YAML text is a recipe of mergekit and not one of refit.
pub fn is_mergekit(text: &str) -> bool {
    let Ok(Value::Object(map)) = refit_store::yaml::parse::<Value>(Path::new("recipe"), text)
    else {
        // Broken YAML still says whose it is.
        return text.lines().any(|line| line.starts_with("merge_method:"));
    };
    let has = |key: &str| map.contains_key(key);
    has("merge_method") || ((has("models") || has("slices") || has("experts")) && !has("steps"))
}

/// Reads a recipe. With `compat`, keys that mergekit would ignore are said and ignored too.
///
/// # Errors
/// [`Error::Recipe`]: what, where, and the nearest name.
pub fn parse(path: &Path, text: &str, compat: bool) -> Result<Config> {
    let value: Value = refit_store::yaml::parse(path, text)?;
    let map = object(&value, "the recipe")?;
    if map.contains_key("experts") || map.contains_key("gate_mode") {
        let problem = "this is a recipe of mergekit-moe, which builds mixtures of experts; refit reads those of mergekit-yaml";
        return Err(Error::recipe("experts", problem));
    }
    if map.contains_key("genome") {
        let problem = "this is a recipe of mergekit-evolve, which searches; refit reads those of mergekit-yaml";
        return Err(Error::recipe("genome", problem));
    }
    let mut reader = Reader { compat, warnings: Vec::new() };
    reader.keys(map, KEYS, "the recipe")?;
    let name = text_of(map, "merge_method", "the recipe")?.ok_or_else(|| {
        Error::recipe("merge_method", format!("it is missing; there are {}", methods().join(", ")))
    })?;
    let method = find_method(&name)?;
    let given: Vec<&str> = ["models", "slices", "modules"]
        .into_iter()
        .filter(|key| map.get(*key).is_some_and(|value| !value.is_null()))
        .collect();
    let &[kind] = &given[..] else {
        let problem = "give exactly one of `models`, `slices` and `modules`";
        return Err(Error::recipe("the recipe", problem));
    };
    if kind == "modules" {
        let problem =
            "merging the modules of a model apart is not read yet; use `models` for whole models";
        return Err(Error::recipe("modules", problem));
    }
    let slices = match kind {
        "models" => {
            let at = |i: usize| format!("models[{i}]");
            let sources = list(&map["models"], "models")?
                .iter()
                .enumerate()
                .map(|(i, item)| reader.source(item, &at(i), false))
                .collect::<Result<_>>()?;
            vec![Slice { sources, base: None, parameters: Settings::new() }]
        }
        _ => list(&map["slices"], "slices")?
            .iter()
            .enumerate()
            .map(|(i, item)| reader.slice(item, &format!("slices[{i}]")))
            .collect::<Result<_>>()?,
    };
    let config = Config {
        method,
        slices,
        whole: kind == "models",
        base: map.get("base_model").map(|value| model(value, "base_model")).transpose()?.flatten(),
        parameters: settings(map, "parameters")?,
        dtype: dtype(map, "dtype")?,
        out_dtype: dtype(map, "out_dtype")?,
        tokenizer: reader.tokenizer(map)?,
        chat_template: text_of(map, "chat_template", "the recipe")?,
        warnings: reader.warnings,
    };
    config.check_parameters(compat)
}

/// mergekit's names of the methods.
pub fn methods() -> Vec<String> {
    KERNELS.iter().map(|maker| maker.about.name.replace('-', "_")).collect()
}

fn find_method(name: &str) -> Result<&'static Maker> {
    let ours = name.replace('_', "-");
    KERNELS.iter().find(|maker| maker.about.name == ours).ok_or_else(|| {
        let known = methods();
        let names: Vec<&str> = known.iter().map(String::as_str).collect();
        let hint = match nearest(name, &names) {
            Some(near) => format!(" (did you mean `{near}`?)"),
            None => String::new(),
        };
        let problem = format!("there is no method `{name}`{hint}; methods: {}", known.join(", "));
        Error::recipe("merge_method", problem)
    })
}

impl Config {
    /// Every model by name, the one whose configuration goes along first.
    pub fn models(&self) -> Vec<String> {
        let listed = self.slices.iter().flat_map(|slice| {
            slice.base.iter().chain(slice.sources.iter().map(|source| &source.model))
        });
        let tokenizer = self.tokenizer.iter().flat_map(|tokenizer| {
            let from = match &tokenizer.from {
                Whose::Model(name) => Some(name),
                _ => None,
            };
            let rows = tokenizer.tokens.values().filter_map(|token| match &token.row {
                TokenRow::Model(name) | TokenRow::Other(name, _) => Some(name),
                TokenRow::Zero => None,
            });
            from.into_iter().chain(rows)
        });
        let mut names: Vec<String> = Vec::new();
        for name in self.base.iter().chain(listed).chain(tokenizer) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        names
    }

    /// Refuses parameters that no method has, and says of those that only others have that they do nothing.
    fn check_parameters(mut self, compat: bool) -> Result<Self> {
        let own = names(self.method);
        let anyone: Vec<String> = KERNELS.iter().flat_map(names).collect();
        let method = self.method.about.name.replace('-', "_");
        let mut places: Vec<(String, &Settings)> =
            vec![("parameters".to_owned(), &self.parameters)];
        for (i, slice) in self.slices.iter().enumerate() {
            let at = if self.whole { "models".to_owned() } else { format!("slices[{i}]") };
            places.push((at.clone(), &slice.parameters));
            for (k, source) in slice.sources.iter().enumerate() {
                places.push((format!("{at}[{k}]"), &source.parameters));
            }
        }
        let mut idle: BTreeMap<&str, &str> = BTreeMap::new();
        for (at, settings) in &places {
            for key in settings.keys().filter(|key| !own.contains(*key)) {
                // It only saves memory in mergekit.
                if key == "int8_mask" {
                    continue;
                }
                if anyone.contains(key) || compat {
                    idle.insert(key, at);
                    continue;
                }
                let known: Vec<&str> = own.iter().map(String::as_str).collect();
                let hint = match nearest(key, &known) {
                    Some(near) => format!(" (did you mean `{near}`?)"),
                    None => String::new(),
                };
                let problem =
                    format!("unknown parameter `{key}`{hint}; {method} has {}", own.join(", "));
                return Err(Error::recipe(at, problem));
            }
        }
        let said: Vec<String> = idle
            .iter()
            .map(|(key, at)| format!("{at}: `{key}` has no effect on {method}"))
            .collect();
        self.warnings.extend(said);
        Ok(self)
    }
}

/// Names of a method's parameters, without the element type.
fn names(maker: &Maker) -> Vec<String> {
    let schema = (maker.schema)();
    let properties = schema["properties"].as_object();
    properties
        .into_iter()
        .flatten()
        .map(|(name, _)| name.clone())
        .filter(|name| name != "dtype")
        .collect()
}
