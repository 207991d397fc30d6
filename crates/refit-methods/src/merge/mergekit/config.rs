//! The YAML of mergekit (0.1.5): what it says, and what is wrong with it.

use std::collections::BTreeMap;
use std::path::Path;

use refit_store::DType;
use serde_json::{Map, Value};

use super::setting::{Setting, Settings};
use crate::error::{Error, Result};
use crate::merge::KERNELS;
use crate::merge::kernel::Maker;
use crate::suggest::nearest;

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

struct Reader {
    compat: bool,
    warnings: Vec<String>,
}

impl Reader {
    /// Refuses keys that nobody reads.
    fn keys(&mut self, map: &Map<String, Value>, known: &[&str], at: &str) -> Result<()> {
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

    fn slice(&mut self, value: &Value, at: &str) -> Result<Slice> {
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

    fn source(&mut self, value: &Value, at: &str, sliced: bool) -> Result<Source> {
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

    fn tokenizer(&mut self, map: &Map<String, Value>) -> Result<Option<Tokenizer>> {
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

fn object<'a>(value: &'a Value, at: &str) -> Result<&'a Map<String, Value>> {
    value.as_object().ok_or_else(|| Error::recipe(at, "expected `key: value` pairs"))
}

fn list<'a>(value: &'a Value, at: &str) -> Result<&'a Vec<Value>> {
    let filled = value.as_array().filter(|list| !list.is_empty());
    filled.ok_or_else(|| Error::recipe(at, "expected a list with at least one entry"))
}

fn text_of(map: &Map<String, Value>, key: &str, at: &str) -> Result<Option<String>> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(Error::recipe(at, format!("`{key}` is `{other}`; expected text"))),
    }
}

fn settings(map: &Map<String, Value>, at: &str) -> Result<Settings> {
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

fn dtype(map: &Map<String, Value>, key: &'static str) -> Result<Option<DType>> {
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
fn model(value: &Value, at: &str) -> Result<Option<String>> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config> {
        parse(Path::new("their.yaml"), text, false)
    }

    fn error(text: &str) -> String {
        read(text).unwrap_err().to_string()
    }

    const TIES: &str = "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n    parameters: {weight: 0.5, density: [1, 0.5]}\n  - model: b\n    parameters: {weight: 1}\nparameters: {normalize: true, int8_mask: true}\ndtype: bfloat16\n";

    #[test]
    fn a_recipe_is_told_from_refits_own() {
        assert!(is_mergekit(TIES));
        assert!(is_mergekit("merge_method: [\n"));
        assert!(is_mergekit("slices:\n  - sources: []\n"));
        assert!(!is_mergekit("name: x\nsteps: []\n"));
        assert!(!is_mergekit("- 1\n"));
    }

    #[test]
    fn models_are_listed_once_and_the_base_first() {
        let config = read(TIES).unwrap();
        assert_eq!(config.models(), ["base", "a", "b"]);
        assert_eq!(config.dtype, Some(DType::BF16));
        assert!(config.whole && config.warnings.is_empty());
        let revision = TIES.replace("model: a", "model: {model: {path: o/a, revision: v2}}");
        assert_eq!(read(&revision).unwrap().models()[1], "o/a@v2");
    }

    #[test]
    fn unknown_names_get_the_nearest() {
        let swap = |from: &str, to: &str| error(&TIES.replace(from, to));
        assert!(swap("merge_method: ties", "merge_method: tise").contains("did you mean `ties`"));
        assert!(
            swap("merge_method: ties", "merge_method: dare-tis")
                .contains("did you mean `dare_ties`")
        );
        assert!(swap("density", "densty").contains("did you mean `density`"));
        assert!(swap("base_model", "base_modle").contains("did you mean `base_model`"));
        assert!(swap("bfloat16", "bflot16").contains("did you mean `bfloat16`"));
        assert!(swap("- model: b", "- modle: b").contains("did you mean `model`"));
        // A parameter of another method is no mistake worth stopping for.
        let config = read(&TIES.replace("normalize: true", "t: 0.5")).unwrap();
        assert!(config.warnings[0].contains("`t` has no effect on ties"), "{:?}", config.warnings);
        let lenient = parse(Path::new("x"), &TIES.replace("density", "densty"), true).unwrap();
        assert!(lenient.warnings[0].contains("densty"));
    }

    #[test]
    fn what_is_not_read_is_refused_in_words() {
        assert!(error("merge_method: linear\nexperts: []\nmodels: []\n").contains("mergekit-moe"));
        assert!(
            error("merge_method: linear\nmodules: {a: {models: []}}\n").contains("not read yet")
        );
        assert!(error("merge_method: linear\n").contains("exactly one of"));
        assert!(error("models: [{model: a}]\n").contains("merge_method"));
        assert!(error(&TIES.replace("model: a", "model: a+lora")).contains("merge-adapter"));
        let slices = |range: &str| {
            error(&format!(
                "merge_method: passthrough\nslices:\n  - sources: [{{model: a{range}}}]\n"
            ))
        };
        assert!(slices("").contains("layer_range"));
        assert!(slices(", layer_range: [4, 2]").contains("above FROM"));
        assert!(error("a: 1\na: 2\nmerge_method: x\n").contains("malformed YAML"));
    }
}
