//! `tokenizer.json` (and SentencePiece's `tokenizer.model`) as `tokenizer.ggml.*`.

use std::collections::HashMap;

use serde_json::Value as Json;

use super::pieces::{Piece, pieces};
use super::{Field, Fields};
use crate::artifact::Artifact;
use crate::formats::gguf::tokenizer::name_of_cut;

/// Kinds of tokens, as GGUF numbers them.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// The tokenizer of a model with `rows` rows of embeddings; `None` where the model has none. The error says why one
/// cannot be told.
pub fn tokenizer_fields(artifact: &Artifact, rows: usize) -> Result<Option<Fields>, String> {
    let json = artifact.tokenizer_json().map_err(|error| error.to_string())?;
    let Some(json) = json else { return Ok(None) };
    let json: Json =
        serde_json::from_slice(&json).map_err(|error| format!("tokenizer.json: {error}"))?;
    let side = |name: &str| -> Result<Option<Vec<u8>>, String> {
        let file = artifact.side_files().iter().find(|file| file.name == name);
        file.map(|file| file.read().map_err(|error| error.to_string())).transpose()
    };
    let parsed = |name: &str| -> Result<Json, String> {
        let Some(bytes) = side(name)? else { return Ok(Json::Null) };
        serde_json::from_slice(&bytes).map_err(|error| format!("{name}: {error}"))
    };
    let mut vocabulary = Vocabulary::new(&json, rows)?;
    let kind = json["model"]["type"].as_str().unwrap_or_default();
    let byte_fallback = json["model"]["byte_fallback"].as_bool() == Some(true);
    let mut fields = Fields::new();
    let mut put = |key: &str, field: Field| fields.push((format!("tokenizer.ggml.{key}"), field));
    match (kind, byte_fallback) {
        ("BPE", true) => {
            let scores = match side("tokenizer.model")?.as_deref().and_then(pieces) {
                Some(pieces) => vocabulary.take_pieces(&pieces)?,
                None => vocabulary.scores_of_merges(&json)?,
            };
            put("model", "llama".into());
            put("pre", "default".into());
            put("tokens", Field::Texts(vocabulary.tokens.clone()));
            put("scores", Field::F32s(scores));
            put("token_type", Field::I32s(vocabulary.kinds.clone()));
            put("add_space_prefix", Field::Bool(adds_space(&json)));
        }
        ("BPE", false) => {
            let pre = name_of_cut(&json).ok_or(
                "tokenizer.json cuts text in a way that has no name in GGUF (`pre_tokenizer`, `normalizer`); \
                 --no-tokenizer writes the weights without it",
            )?;
            put("model", "gpt2".into());
            put("pre", pre.into());
            put("tokens", Field::Texts(vocabulary.tokens.clone()));
            put("token_type", Field::I32s(vocabulary.kinds.clone()));
            put(
                "merges",
                Field::Texts(
                    merges(&json)?
                        .into_iter()
                        .map(|(a, b)| format!("{a} {b}").into_bytes())
                        .collect(),
                ),
            );
        }
        (other, _) => {
            return Err(format!(
                "tokenizer.json is of type `{other}`; refit tells GGUF about byte-level BPE and SentencePiece \
                 BPE; --no-tokenizer writes the weights without it"
            ));
        }
    }
    let config = parsed("tokenizer_config.json")?;
    let generation = parsed("generation_config.json")?;
    let ids = special_ids(artifact, &vocabulary, &config, &generation);
    for (name, id) in ids {
        put(&format!("{name}_token_id"), Field::U32(id));
    }
    let (begins, ends) = added_around(&json["post_processor"]);
    put("add_bos_token", Field::Bool(begins));
    put("add_eos_token", Field::Bool(ends));
    let template = match side("chat_template.jinja")? {
        Some(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
        None => chat_template(&config["chat_template"]),
    };
    if let Some(template) = template {
        fields.push(("tokenizer.chat_template".into(), Field::Text(template)));
    }
    Ok(Some(fields))
}

/// Tokens by id, and their kinds.
struct Vocabulary {
    tokens: Vec<Vec<u8>>,
    kinds: Vec<i32>,
    ids: HashMap<String, u32>,
}

impl Vocabulary {
    fn new(json: &Json, rows: usize) -> Result<Self, String> {
        let vocab = json["model"]["vocab"].as_object().ok_or(
            "tokenizer.json has no `model.vocab`; --no-tokenizer writes the weights without it",
        )?;
        // Rows of the embedding without a token get a name that no text holds.
        let mut tokens: Vec<Vec<u8>> =
            (0..rows).map(|id| format!("[PAD{id}]").into_bytes()).collect();
        let mut kinds = vec![UNUSED; rows];
        let mut ids = HashMap::new();
        let mut set = |text: &str, id: Option<u64>, kind: i32| {
            let id = id.ok_or(format!("tokenizer.json: token `{text}` has no id"))? as usize;
            if id >= rows {
                return Err(format!(
                    "tokenizer.json: token `{text}` has id {id}, but the embedding has {rows} rows"
                ));
            }
            tokens[id] = text.as_bytes().to_vec();
            kinds[id] = kind;
            ids.insert(text.to_owned(), id as u32);
            Ok(())
        };
        let unknown = json["model"]["unk_token"].as_str();
        for (text, id) in vocab {
            let is_byte = text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
            let kind = match text {
                _ if unknown == Some(text) => UNKNOWN,
                _ if is_byte => BYTE,
                _ => NORMAL,
            };
            set(text, id.as_u64(), kind)?;
        }
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let text = added["content"].as_str().unwrap_or_default();
            let kind = match added["special"].as_bool() {
                _ if unknown == Some(text) => UNKNOWN,
                Some(true) => CONTROL,
                _ => USER_DEFINED,
            };
            set(text, added["id"].as_u64(), kind)?;
        }
        Ok(Self { tokens, kinds, ids })
    }

    /// Kinds and scores of SentencePiece's own model, where it has the same pieces.
    fn take_pieces(&mut self, pieces: &[Piece]) -> Result<Vec<f32>, String> {
        // What was added later stands behind the model's own.
        let mut scores = vec![-1000.0; self.tokens.len()];
        for (id, piece) in pieces.iter().enumerate() {
            if self.tokens.get(id) != Some(&piece.text) {
                return Err(format!(
                    "tokenizer.model and tokenizer.json disagree on token {id}; remove the one that is not the \
                     model's"
                ));
            }
            scores[id] = piece.score;
            self.kinds[id] = piece.kind;
        }
        Ok(scores)
    }

    /// Scores that give the merges their order: a token that merge `i` makes scores `-i`.
    fn scores_of_merges(&self, json: &Json) -> Result<Vec<f32>, String> {
        let merges = merges(json)?;
        let mut scores: Vec<f32> =
            (0..self.tokens.len()).map(|id| -((merges.len() + id) as f32)).collect();
        for (rank, (left, right)) in merges.iter().enumerate().rev() {
            if let Some(&id) = self.ids.get(&format!("{left}{right}")) {
                scores[id as usize] = -(rank as f32);
            }
        }
        for (score, &kind) in scores.iter_mut().zip(&self.kinds) {
            if matches!(kind, UNKNOWN | CONTROL | BYTE) {
                *score = 0.0;
            }
        }
        Ok(scores)
    }
}

/// Pairs of `model.merges`, written as one string or as two.
fn merges(json: &Json) -> Result<Vec<(&str, &str)>, String> {
    let list = json["model"]["merges"].as_array().ok_or("tokenizer.json has no `model.merges`")?;
    fn pair(merge: &Json) -> Option<(&str, &str)> {
        match merge {
            Json::String(text) => text.split_once(' '),
            other => Some((other.get(0)?.as_str()?, other.get(1)?.as_str()?)),
        }
    }
    let pairs = list
        .iter()
        .enumerate()
        .map(|(at, merge)| pair(merge).ok_or(format!("tokenizer.json: merge {at} is no pair")));
    pairs.collect()
}

/// Whether a space is put before the text.
fn adds_space(json: &Json) -> bool {
    fn has(part: &Json) -> bool {
        match part["type"].as_str() {
            Some("Prepend") => true,
            Some("Metaspace") => {
                part["prepend_scheme"].as_str().is_none_or(|scheme| scheme != "never")
            }
            Some("Sequence") => ["normalizers", "pretokenizers"]
                .iter()
                .any(|list| part[*list].as_array().into_iter().flatten().any(has)),
            _ => false,
        }
    }
    has(&json["normalizer"]) || has(&json["pre_tokenizer"])
}

/// Whether special tokens are put before and after a single text.
fn added_around(processor: &Json) -> (bool, bool) {
    if let Some(parts) = processor["processors"].as_array() {
        let found = parts.iter().map(added_around);
        return found.fold((false, false), |(a, b), (c, d)| (a | c, b | d));
    }
    let single = processor["single"].as_array().map_or(&[][..], Vec::as_slice);
    let special = |part: Option<&Json>| part.is_some_and(|part| part.get("SpecialToken").is_some());
    (special(single.first()), special(single.last()))
}

/// `bos`, `eos`, ... : the names of tokenizer_config.json first, then the ids of config.json. A second end of
/// generation_config.json is the end of a turn.
fn special_ids(
    artifact: &Artifact,
    vocabulary: &Vocabulary,
    config: &Json,
    generation: &Json,
) -> Vec<(&'static str, u32)> {
    let mut found = Vec::new();
    for (name, gguf) in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")] {
        let token = &config[format!("{name}_token")];
        let text = token.as_str().or_else(|| token["content"].as_str());
        let by_text = text.and_then(|text| vocabulary.ids.get(text).copied());
        let by_id = || artifact.config().ids(&format!("{name}_token_id")).first().copied();
        let id = by_text.or_else(by_id).filter(|&id| (id as usize) < vocabulary.tokens.len());
        found.extend(id.map(|id| (gguf, id)));
    }
    let ends = generation["eos_token_id"].as_array().map_or(&[][..], Vec::as_slice);
    let eos = found.iter().find(|(name, _)| *name == "eos").map(|&(_, id)| u64::from(id));
    let turn = ends.iter().filter_map(Json::as_u64).find(|&id| Some(id) != eos);
    if let Some(id) = turn.and_then(|id| u32::try_from(id).ok()) {
        found.push(("eot", id));
    }
    found
}

/// The template, or the default one of several.
fn chat_template(value: &Json) -> Option<String> {
    if let Some(list) = value.as_array() {
        let named = list.iter().find(|entry| entry["name"] == "default").or(list.first())?;
        return named["template"].as_str().map(str::to_owned);
    }
    value.as_str().map(str::to_owned)
}
