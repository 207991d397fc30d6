//! Vocabularies of merged models: whose tokens the output has, and where every token's row comes from.
//!
//! A row is the model's own where the model has the token. Where it has not, all models get the same row: that of the only
//! model with the token, else the base's, else the mean over the models that have it; of a token that nobody has, zeros.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use refit_store::{Artifact, SideFile};
use serde_json::{Map, Value, json};

use super::config::{Token, TokenRow, Tokenizer, Whose};
use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::merge::group::{Row, RowMap};

/// Files that make up a tokenizer.
const FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// Those that hold a vocabulary of their own and know nothing of added tokens.
const OLDER: &[&str] = &[
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
];

/// The output's vocabulary.
#[derive(Debug)]
pub struct Vocabulary {
    /// Rows of embeddings and heads.
    pub rows: usize,
    /// The tokenizer's files.
    pub files: Vec<SideFile>,
    /// Files of the first model that do not go along.
    pub dropped: Vec<String>,
    /// Things that are worth knowing.
    pub notes: Vec<String>,
    /// Ids by token, in the output.
    ids: Vec<(usize, String)>,
    /// Ids by token, of every model.
    of: Vec<HashMap<String, usize>>,
    tokens: usize,
    special: Vec<(usize, Special)>,
    base: Option<usize>,
}

/// A row that the recipe chose: of output token `.0`.
#[derive(Debug)]
struct Special {
    row: Option<(usize, usize)>,
    force: bool,
}

impl Vocabulary {
    /// Puts the output's tokenizer together. `names` are the models' names in the recipe.
    ///
    /// # Errors
    /// Models without `tokenizer.json`, and tokens that a recipe names and nobody has.
    pub fn new(
        wanted: &Tokenizer,
        models: &[ModelInput],
        names: &[String],
        base: Option<usize>,
    ) -> Result<Self> {
        let place = |name: &String| names.iter().position(|other| other == name).unwrap_or(0);
        let mut of: Vec<HashMap<String, usize>> = Vec::new();
        let mut jsons = Vec::new();
        for model in models {
            let json = read(model)?;
            of.push(json.as_ref().map(ids_of).unwrap_or_default());
            jsons.push(json);
        }
        let (donor, union) = match &wanted.from {
            Whose::Base => (base.unwrap_or(0), false),
            Whose::Union => (base.unwrap_or(0), true),
            Whose::Model(name) => (place(name), false),
        };
        let Some(mut json) = jsons[donor].clone() else {
            let problem = format!(
                "{} has no tokenizer.json, so its tokens have no names",
                models[donor].source
            );
            return Err(Error::recipe("tokenizer_source", problem));
        };
        for (at, json) in jsons.iter().enumerate() {
            if json.is_none() {
                // As mergekit takes it.
                of[at] = of[base.unwrap_or(0)].clone();
            }
        }
        let mut known = ids_of(&json);
        let mut added = Vec::new();
        if union {
            for (at, model) in models.iter().enumerate().filter(|(at, _)| *at != donor) {
                let Some(theirs) = &jsons[at] else { continue };
                let rows = rows_of(&model.artifact).unwrap_or(usize::MAX);
                let mut tokens: Vec<(usize, String)> =
                    of[at].iter().map(|(token, id)| (*id, token.clone())).collect();
                tokens.sort();
                let extras = theirs["added_tokens"].as_array().cloned().unwrap_or_default();
                let extra = |token: &str| extras.iter().find(|entry| entry["content"] == token);
                // Plain tokens first, then the special ones with their flags.
                let (special, plain): (Vec<_>, Vec<_>) =
                    tokens.into_iter().partition(|(_, token)| extra(token).is_some());
                for (id, token) in plain.into_iter().chain(special) {
                    if id < rows && !known.contains_key(&token) {
                        added.push(add(&mut json, &mut known, &token, extra(&token)));
                    }
                }
            }
        }
        for token in wanted.tokens.keys() {
            if !known.contains_key(token) {
                added.push(add(&mut json, &mut known, token, None));
            }
        }
        let mut ids: Vec<(usize, String)> =
            known.into_iter().map(|(token, id)| (id, token)).collect();
        ids.sort();
        let tokens = ids.last().map_or(0, |(id, _)| id + 1);
        let rows = wanted.multiple.map_or(tokens, |multiple| tokens.next_multiple_of(multiple));
        let mut vocabulary = Self {
            rows,
            files: Vec::new(),
            dropped: Vec::new(),
            notes: Vec::new(),
            ids,
            of,
            tokens,
            special: Vec::new(),
            base,
        };
        vocabulary.choose(wanted, models, &place)?;
        vocabulary.write(&json, &added, donor, models);
        vocabulary.notes.push(format!(
            "the output has {rows} rows of vocabulary: {} tokens of {}{}",
            vocabulary.ids.len(),
            models[donor].source,
            if added.is_empty() {
                String::new()
            } else {
                format!(", {} of them added", added.len())
            }
        ));
        Ok(vocabulary)
    }

    /// Rows that the recipe chose.
    fn choose(
        &mut self,
        wanted: &Tokenizer,
        models: &[ModelInput],
        place: &dyn Fn(&String) -> usize,
    ) -> Result<()> {
        for (token, Token { row, force }) in &wanted.tokens {
            let at = format!("tokenizer.tokens.`{token}`");
            let find = |model: usize, token: &str| {
                self.of[model].get(token).copied().ok_or_else(|| {
                    Error::recipe(&at, format!("{} has no token `{token}`", models[model].source))
                })
            };
            let row = match row {
                TokenRow::Zero => None,
                TokenRow::Model(name) => Some((place(name), find(place(name), token)?)),
                TokenRow::Other(name, Ok(other)) => Some((place(name), find(place(name), other)?)),
                TokenRow::Other(name, Err(id)) => Some((place(name), *id)),
            };
            if let Some((model, id)) = row
                && rows_of(&models[model].artifact).is_none_or(|rows| id >= rows)
            {
                let problem = format!("{} has no row {id}", models[model].source);
                return Err(Error::recipe(&at, problem));
            }
            let id = self.ids.iter().find(|(_, known)| known == token).map_or(0, |(id, _)| *id);
            self.special.push((id, Special { row, force: *force }));
        }
        Ok(())
    }

    fn write(&mut self, json: &Value, added: &[Value], donor: usize, models: &[ModelInput]) {
        let artifact = &models[donor].artifact;
        let ours = |file: &&SideFile| FILES.contains(&file.name.as_str());
        if donor != 0 {
            let theirs = models[0].artifact.side_files().iter().filter(ours);
            self.dropped = theirs.map(|file| file.name.clone()).collect();
            self.files = artifact.side_files().iter().filter(ours).cloned().collect();
        }
        if added.is_empty() {
            return;
        }
        self.files.retain(|file| !OLDER.contains(&file.name.as_str()));
        self.dropped.extend(OLDER.iter().map(|name| (*name).to_owned()));
        let mut set = |name: &str, value: &Value| {
            self.files.retain(|file| file.name != name);
            let mut bytes = serde_json::to_vec_pretty(value).unwrap_or_default();
            bytes.push(b'\n');
            self.files.push(SideFile::from_bytes(name, bytes));
        };
        set("tokenizer.json", json);
        let config = artifact.side_files().iter().find(|file| file.name == "tokenizer_config.json");
        let config =
            config.and_then(|file| serde_json::from_slice::<Value>(&file.read().ok()?).ok());
        if let Some(Value::Object(mut config)) = config
            && let Some(Value::Object(known)) = config.get_mut("added_tokens_decoder")
        {
            for entry in added {
                let mut flags = entry.as_object().cloned().unwrap_or_default();
                let id = flags.shift_remove("id").unwrap_or_default();
                known.insert(id.to_string(), Value::Object(flags));
            }
            set("tokenizer_config.json", &Value::Object(config));
        }
    }

    /// Where the rows of a tensor come from that all `parts`, `(model, tensor)`, have; one map per part.
    ///
    /// # Errors
    /// A model whose rows are needed and that takes no part.
    pub fn maps(
        &self,
        parts: &[(usize, String)],
        models: &[ModelInput],
    ) -> Result<Vec<Arc<RowMap>>> {
        let mut donors = parts.to_vec();
        let sizes: Vec<usize> = parts
            .iter()
            .map(|(model, tensor)| {
                let shape = &models[*model].artifact.tensor(tensor)?.shape;
                Ok(shape.first().copied().unwrap_or(0))
            })
            .collect::<Result<_>>()?;
        let mut rows: Vec<Vec<Row>> = vec![Vec::with_capacity(self.rows); parts.len()];
        let mut next = self.ids.iter().peekable();
        for id in 0..self.tokens {
            let Some((_, token)) = next.next_if(|(known, _)| *known == id) else {
                // A number that no token has.
                rows.iter_mut().for_each(|rows| rows.push(Row::Mean(Vec::new())));
                continue;
            };
            let own: Vec<Option<usize>> = parts
                .iter()
                .zip(&sizes)
                .map(|((model, _), size)| {
                    self.of[*model].get(token).copied().filter(|row| row < size)
                })
                .collect();
            let special = self.special.iter().find(|(of, _)| *of == id).map(|(_, special)| special);
            let present = || own.iter().enumerate().filter_map(|(at, row)| Some((at, (*row)?)));
            let base = present().find(|(at, _)| Some(parts[*at].0) == self.base);
            let shared = match special {
                Some(Special { row: None, .. }) => Vec::new(),
                Some(Special { row: Some((model, row)), .. }) => {
                    let known = donors.iter().position(|(donor, _)| donor == model);
                    let at = known.unwrap_or_else(|| {
                        donors.push((*model, parts[0].1.clone()));
                        donors.len() - 1
                    });
                    vec![(at, *row)]
                }
                None if present().count() > 1 => match base {
                    Some(base) => vec![base],
                    None => present().collect(),
                },
                None => present().collect(),
            };
            let forced = special.is_some_and(|special| special.force);
            for (rows, own) in rows.iter_mut().zip(&own) {
                rows.push(match own {
                    Some(row) if !forced => Row::Own(*row),
                    _ => Row::Mean(shared.clone()),
                });
            }
        }
        for (model, tensor) in &donors {
            models[*model].artifact.tensor(tensor)?;
        }
        let map = |mut rows: Vec<Row>| {
            rows.resize(self.rows, Row::Padding);
            let padding = OnceLock::new();
            Arc::new(RowMap { rows, donors: donors.clone(), tokens: self.tokens, padding })
        };
        Ok(rows.into_iter().map(map).collect())
    }
}

/// Rows of the embedding.
fn rows_of(artifact: &Artifact) -> Option<usize> {
    use refit_store::architecture::Role;
    artifact.architecture().with_role(Role::Embed).next()?.shape.first().copied()
}

fn read(model: &ModelInput) -> Result<Option<Value>> {
    let Some(bytes) = model.artifact.tokenizer_json()? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| {
        Error::recipe(
            "tokenizer",
            format!("{}: tokenizer.json is not valid JSON: {error}", model.source),
        )
    })
}

/// Ids by token, added ones included.
fn ids_of(json: &Value) -> HashMap<String, usize> {
    let mut ids = HashMap::new();
    match &json["model"]["vocab"] {
        Value::Object(map) => {
            let known =
                map.iter().filter_map(|(token, id)| Some((token.clone(), id.as_u64()? as usize)));
            ids.extend(known);
        }
        Value::Array(list) => {
            let known = list.iter().enumerate();
            ids.extend(known.filter_map(|(id, entry)| Some((entry[0].as_str()?.to_owned(), id))));
        }
        _ => {}
    }
    for entry in json["added_tokens"].as_array().into_iter().flatten() {
        if let (Some(token), Some(id)) = (entry["content"].as_str(), entry["id"].as_u64()) {
            ids.insert(token.to_owned(), id as usize);
        }
    }
    ids
}

/// Adds a token behind all others, with the flags that `like` has.
fn add(
    json: &mut Value,
    known: &mut HashMap<String, usize>,
    token: &str,
    like: Option<&Value>,
) -> Value {
    let id = known.values().max().map_or(0, |last| last + 1);
    known.insert(token.to_owned(), id);
    let flag = |name: &str, default: bool| {
        json!(like.and_then(|like| like[name].as_bool()).unwrap_or(default))
    };
    let mut entry = Map::new();
    entry.insert("id".to_owned(), json!(id));
    entry.insert("content".to_owned(), json!(token));
    for (name, default) in [
        ("single_word", false),
        ("lstrip", false),
        ("rstrip", false),
        ("normalized", true),
        ("special", false),
    ] {
        entry.insert(name.to_owned(), flag(name, default));
    }
    let entry = Value::Object(entry);
    match &mut json["added_tokens"] {
        Value::Array(list) => list.push(entry.clone()),
        other => *other = json!([entry.clone()]),
    }
    entry
}
