//! Text to token ids and back, with the files of a model directory.
//!
//! The work is done by Hugging Face's `tokenizers`; this module finds the files,
//! settles the special tokens, renders chat templates and checks that a
//! tokenizer and a model belong together.

mod chat;
mod stream;
mod wordpiece;

pub use chat::Message;
pub use stream::StreamDecoder;

use crate::{Error, Result};
use refit_store::Artifact;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The tokenizer of a model.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    origin: PathBuf,
    special: SpecialIds,
    /// The texts of bos, eos, pad and unk, as chat templates see them.
    special_texts: Map<String, Value>,
    template: Option<String>,
    max_id: u32,
}

/// Ids with a meaning of their own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Starts a sequence.
    pub bos: Option<u32>,
    /// Each of them ends generation.
    pub eos: Vec<u32>,
    /// Fills up a batch.
    pub pad: Option<u32>,
    /// Stands for what the vocabulary cannot say.
    pub unk: Option<u32>,
}

/// The bytes of the files that make up a tokenizer; all but one of
/// `tokenizer_json` and `vocab_txt` may be absent.
#[derive(Debug, Clone, Default)]
pub struct TokenizerFiles {
    /// `tokenizer.json`
    pub tokenizer_json: Option<Vec<u8>>,
    /// `vocab.txt` of WordPiece, read when there is no `tokenizer.json`
    pub vocab_txt: Option<Vec<u8>>,
    /// `tokenizer_config.json`
    pub tokenizer_config: Option<Vec<u8>>,
    /// `special_tokens_map.json`
    pub special_tokens_map: Option<Vec<u8>>,
    /// `generation_config.json`
    pub generation_config: Option<Vec<u8>>,
    /// `config.json`
    pub config: Option<Vec<u8>>,
    /// `chat_template.jinja`
    pub chat_template: Option<Vec<u8>>,
}

impl TokenizerFiles {
    /// Reads what is there through `read`, which gives a file's bytes by its name.
    fn gather<E>(mut read: impl FnMut(&str) -> Result<Option<Vec<u8>>, E>) -> Result<Self, E> {
        Ok(TokenizerFiles {
            tokenizer_json: read("tokenizer.json")?,
            vocab_txt: read("vocab.txt")?,
            tokenizer_config: read("tokenizer_config.json")?,
            special_tokens_map: read("special_tokens_map.json")?,
            generation_config: read("generation_config.json")?,
            config: read("config.json")?,
            chat_template: read("chat_template.jinja")?,
        })
    }
}

impl Tokenizer {
    /// The tokenizer that travels with a model; that of a GGUF file included.
    ///
    /// # Errors
    /// No tokenizer, or one that does not parse.
    pub fn from_artifact(artifact: &Artifact) -> Result<Self> {
        let files = artifact.side_files();
        // `tokenizer_json` says why a GGUF file's tokenizer cannot be rebuilt.
        let tokenizer_json = artifact.tokenizer_json()?;
        let gathered = TokenizerFiles::gather(|name| {
            files.iter().find(|f| f.name == name).map(|f| f.read()).transpose()
        })?;
        let gathered = TokenizerFiles { tokenizer_json, ..gathered };
        Self::from_files(artifact.path(), gathered)
    }

    /// The tokenizer in a directory.
    ///
    /// # Errors
    /// No tokenizer, or one that does not parse.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let files = TokenizerFiles::gather(|name| {
            let path = dir.join(name);
            path.is_file().then(|| std::fs::read(&path).map_err(Error::io(&path))).transpose()
        })?;
        Self::from_files(dir, files)
    }

    /// A tokenizer from the bytes of `tokenizer.json` alone.
    ///
    /// # Errors
    /// Bytes that do not parse.
    pub fn from_bytes(tokenizer_json: &[u8]) -> Result<Self> {
        let tokenizer_json = Some(tokenizer_json.to_vec());
        let files = TokenizerFiles { tokenizer_json, ..Default::default() };
        Self::from_files(Path::new("tokenizer.json"), files)
    }

    /// A tokenizer from file contents; `origin` is what errors name.
    ///
    /// # Errors
    /// No tokenizer, or one that does not parse.
    pub fn from_files(origin: &Path, files: TokenizerFiles) -> Result<Self> {
        let tokenizer_config = object(origin, "tokenizer_config.json", &files.tokenizer_config)?;
        let json = match (files.tokenizer_json, files.vocab_txt) {
            (Some(json), _) => json,
            (None, Some(vocab)) => wordpiece::tokenizer_json(origin, vocab, &tokenizer_config)?,
            (None, None) => {
                let message = "no tokenizer here (tokenizer.json or vocab.txt); copy the tokenizer files of the model it was made from into the directory";
                return Err(Error::file(origin, message));
            }
        };
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(&json))
            .map_err(|e| Error::file(origin, format!("tokenizer.json does not parse: {e}")))?;
        // Some files carry the padding and truncation of a training run. Text is
        // never shortened here; callers cut at the model's context themselves.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| tokenizer_error(origin, &e))?;
        let max_id = inner.get_vocab(true).into_values().max();
        let max_id = max_id.ok_or_else(|| Error::file(origin, "the tokenizer has no tokens"))?;

        let special_map = object(origin, "special_tokens_map.json", &files.special_tokens_map)?;
        let generation = object(origin, "generation_config.json", &files.generation_config)?;
        let config = object(origin, "config.json", &files.config)?;
        let mut special_texts = Map::new();
        let mut ids = |role: &str| {
            let key = format!("{role}_token");
            let text =
                [&tokenizer_config, &special_map].into_iter().find_map(|m| text_of(m.get(&key)));
            let mut ids: Vec<u32> = Vec::new();
            for source in [&generation, &config] {
                if ids.is_empty() {
                    ids = ids_of(source.get(&format!("{key}_id")));
                    ids.retain(|id| inner.id_to_token(*id).is_some());
                }
            }
            let by_text = text.as_deref().and_then(|t| inner.token_to_id(t));
            ids.extend(by_text.filter(|id| !ids.contains(id)));
            let first = by_text.or(ids.first().copied());
            if let Some(text) = text.or_else(|| first.and_then(|id| inner.id_to_token(id))) {
                special_texts.insert(key, Value::String(text));
            }
            (first, ids)
        };
        let special = SpecialIds {
            bos: ids("bos").0,
            eos: ids("eos").1,
            pad: ids("pad").0,
            unk: ids("unk").0.or_else(|| model_unk(&inner)),
        };
        let template = chat::find_template(origin, files.chat_template, &tokenizer_config)?;
        let origin = origin.to_owned();
        Ok(Tokenizer { inner, origin, special, special_texts, template, max_id })
    }

    /// The ids of `text`. `special` adds what the post-processor adds: BOS, or
    /// `[CLS] ... [SEP]`.
    ///
    /// # Errors
    /// Text that the vocabulary cannot say, when there is no unknown token.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode_fast(text, special));
        let encoding = encoding.map_err(|e| self.error(&e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// [`Tokenizer::encode`] of many texts, in parallel.
    ///
    /// # Errors
    /// As `encode`.
    pub fn encode_batch<T: AsRef<str> + Sync>(
        &self,
        texts: &[T],
        special: bool,
    ) -> Result<Vec<Vec<u32>>> {
        use rayon::prelude::*;
        texts.par_iter().map(|text| self.encode(text.as_ref(), special)).collect()
    }

    /// The text of `ids`.
    ///
    /// # Errors
    /// A decoder that refuses; ids outside the vocabulary are left out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guarded(|| self.inner.decode(ids, skip_special)).map_err(|e| self.error(&e))
    }

    /// Decodes one id at a time, never cutting a character.
    pub fn stream(&self, skip_special: bool) -> StreamDecoder<'_> {
        StreamDecoder::new(self, skip_special)
    }

    /// The number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The greatest id. Vocabularies may have holes, so this is not always
    /// `vocab_size() - 1`.
    pub fn max_id(&self) -> u32 {
        self.max_id
    }

    /// The token of an id, as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token, as the vocabulary spells it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Special ids.
    pub fn special(&self) -> &SpecialIds {
        &self.special
    }

    /// The file or directory the tokenizer came from.
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// SHA-256 over all tokens in the order of their ids. Two tokenizers with the
    /// same fingerprint give every id the same meaning.
    pub fn fingerprint(&self) -> String {
        let mut vocab: Vec<(u32, String)> =
            self.inner.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
        vocab.sort_unstable();
        let mut digest = Sha256::new();
        for (id, token) in vocab {
            digest.update(id.to_le_bytes());
            digest.update((token.len() as u64).to_le_bytes());
            digest.update(token);
        }
        digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Checks that every id has a row in an embedding of `rows` rows. More rows
    /// than tokens is common (padding to a round number) and fine.
    ///
    /// # Errors
    /// An id beyond the last row.
    pub fn check_embedding(&self, rows: usize) -> Result<()> {
        if (self.max_id as usize) < rows {
            return Ok(());
        }
        let max_id = self.max_id;
        let message = format!(
            "the tokenizer has ids up to {max_id}, the model's embedding only {rows} rows; this tokenizer belongs to another model"
        );
        Err(Error::file(&self.origin, message))
    }

    /// Checks that `other` gives every id the same meaning.
    ///
    /// # Errors
    /// The first id that differs.
    pub fn check_same(&self, other: &Tokenizer) -> Result<()> {
        // Ids may lie far apart: only those that one of them has are compared.
        let ids = |t: &Tokenizer| t.inner.get_vocab(true).into_values();
        let ids: BTreeSet<u32> = ids(self).chain(ids(other)).collect();
        let differs = ids.into_iter().find(|id| self.token(*id) != other.token(*id));
        let Some(id) = differs else { return Ok(()) };
        let name = |t: &Tokenizer| t.token(id).map_or("no token".into(), |t| format!("{t:?}"));
        let message = format!(
            "its tokenizer does not match that of {}: id {id} is {} here and {} there; use models that share a tokenizer",
            other.origin.display(),
            name(self),
            name(other)
        );
        Err(Error::file(&self.origin, message))
    }

    /// How well the vocabulary fits `text`.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn report(&self, text: &str) -> Result<TokenizerReport> {
        let ids = self.encode(text, false)?;
        let is_byte =
            |id: &u32| self.token(*id).is_some_and(|t| t.len() == 6 && t.starts_with("<0x"));
        Ok(TokenizerReport {
            characters: text.chars().count(),
            words: text.split_whitespace().count(),
            tokens: ids.len(),
            unknown: ids.iter().filter(|id| Some(**id) == self.special.unk).count(),
            byte_fallback: ids.iter().filter(|id| is_byte(id)).count(),
        })
    }

    fn error(&self, error: &tokenizers::Error) -> Error {
        tokenizer_error(&self.origin, error)
    }
}

/// Counts of [`Tokenizer::report`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct TokenizerReport {
    /// Unicode scalar values.
    pub characters: usize,
    /// Pieces between white space.
    pub words: usize,
    /// Tokens, none of them added.
    pub tokens: usize,
    /// Tokens that are the unknown token.
    pub unknown: usize,
    /// Tokens that spell one byte of a character the vocabulary lacks.
    pub byte_fallback: usize,
}

impl TokenizerReport {
    /// Tokens per word ("fertility"); 0 for no words.
    pub fn tokens_per_word(&self) -> f64 {
        self.tokens as f64 / self.words.max(1) as f64
    }

    /// Part of the tokens that are unknown.
    pub fn unknown_rate(&self) -> f64 {
        self.unknown as f64 / self.tokens.max(1) as f64
    }

    /// Part of the tokens that are single bytes.
    pub fn byte_fallback_rate(&self) -> f64 {
        self.byte_fallback as f64 / self.tokens.max(1) as f64
    }
}

/// `tokenizers` panics on some files that are damaged, or whose parts do not belong together.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    crate::foreign::call(work).unwrap_or_else(|message| Err(message.into()))
}

fn tokenizer_error(origin: &Path, error: &tokenizers::Error) -> Error {
    Error::file(origin, format!("the tokenizer fails: {error}"))
}

/// A JSON object, empty when the file is absent.
fn object(origin: &Path, name: &str, bytes: &Option<Vec<u8>>) -> Result<Map<String, Value>> {
    let Some(bytes) = bytes else { return Ok(Map::new()) };
    serde_json::from_slice(bytes)
        .map_err(|e| Error::file(origin, format!("{name} is not a JSON object: {e}")))
}

/// A token in a configuration: a string, or an object with `content`.
fn text_of(value: Option<&Value>) -> Option<String> {
    let value = value?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// An id in a configuration: a number, or a list of them.
fn ids_of(value: Option<&Value>) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The unknown token that the model itself names.
fn model_unk(inner: &tokenizers::Tokenizer) -> Option<u32> {
    use tokenizers::ModelWrapper as M;
    match inner.get_model() {
        M::BPE(bpe) => inner.token_to_id(bpe.unk_token.as_deref()?),
        M::WordPiece(model) => inner.token_to_id(&model.unk_token),
        M::WordLevel(model) => inner.token_to_id(&model.unk_token),
        // Unigram keeps its unknown id to itself; `<unk>` is its usual name.
        M::Unigram(_) => inner.token_to_id("<unk>"),
    }
}

#[cfg(test)]
mod tests;
