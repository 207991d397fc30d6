//! `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` from `tokenizer.ggml.*`.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::header::{Header, Strings, Value};

/// Kinds of tokens, as GGUF numbers them.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// GPT-2's own way to cut text into words.
const GPT2_WORDS: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Llama 3's; Qwen's differs in taking digits one by one.
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How a family cuts text before merging.
struct Cut {
    /// Normalizer, pre-tokenizer.
    normalizer: Json,
    pre_tokenizer: Json,
    /// A word that is a token is taken whole.
    ignore_merges: bool,
    /// What llama.cpp assumes where `add_bos_token` is absent.
    add_bos: bool,
}

fn byte_level(use_regex: bool) -> Json {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

fn split(regex: &str) -> Json {
    json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false })
}

fn sequence(parts: Vec<Json>) -> Json {
    json!({ "type": "Sequence", "pretokenizers": parts })
}

/// The cut of a `tokenizer.ggml.pre`; `None` if refit does not know it.
fn cut(pre: &str) -> Option<Cut> {
    let plain = |pre_tokenizer| Cut {
        normalizer: Json::Null,
        pre_tokenizer,
        ignore_merges: false,
        add_bos: false,
    };
    Some(match pre {
        "gpt-2" | "phi-2" | "roberta-bpe" | "mpt" | "olmo" | "jina-es" | "jina-de" | "gigachat"
        | "jina-v2-es" | "jina-v2-de" | "a.x-4.0" | "mellum" => plain(byte_level(true)),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
            let digits = json!({ "type": "Digits", "individual_digits": true });
            plain(sequence(vec![digits, byte_level(true)]))
        }
        "default" => plain(sequence(vec![
            split(r"[\p{P}\$\+<=>\^~\|]+"),
            split(GPT2_WORDS),
            split(r"\p{N}+"),
            split("[0-9][0-9][0-9]"),
            byte_level(false),
        ])),
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" | "smaug-bpe" | "dbrx" => Cut {
            ignore_merges: matches!(
                pre,
                "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral"
            ),
            add_bos: matches!(pre, "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral"),
            ..plain(sequence(vec![split(LLAMA3_WORDS), byte_level(false)]))
        },
        "qwen2" | "deepseek-r1-qwen" => Cut {
            normalizer: json!({ "type": "NFC" }),
            ..plain(sequence(vec![split(QWEN2_WORDS), byte_level(false)]))
        },
        "stablelm2" | "hunyuan" | "megrez" => {
            plain(sequence(vec![split(QWEN2_WORDS), byte_level(false)]))
        }
        _ => return None,
    })
}

/// Names for which GGUF's readers and refit agree, most specific first; several names stand for one cut.
const NAMED: [&str; 7] =
    ["smollm", "gpt-2", "llama-bpe", "qwen2", "stablelm2", "smaug-bpe", "default"];

/// The `tokenizer.ggml.pre` of a byte-level BPE `tokenizer.json`; `None` if its text is cut in a way that has no name
/// here. What an offset covers (`trim_offsets`) is not part of it.
pub(crate) fn name_of_cut(tokenizer: &Json) -> Option<&'static str> {
    fn plain(value: &Json) -> Json {
        match value {
            Json::Object(map) => {
                let kept = map.iter().filter(|(key, value)| {
                    // `use_regex` and `invert` stand where they were written out.
                    !matches!(
                        (key.as_str(), value),
                        ("trim_offsets", _) | ("use_regex", Json::Bool(true))
                    )
                });
                kept.map(|(key, value)| (key.clone(), plain(value))).collect::<Map<_, _>>().into()
            }
            Json::Array(list) => list.iter().map(plain).collect(),
            other => other.clone(),
        }
    }
    let parts = |normalizer: &Json, pre_tokenizer: &Json, ignore: bool| {
        (plain(normalizer), plain(pre_tokenizer), ignore)
    };
    let ignore = tokenizer["model"]["ignore_merges"].as_bool().unwrap_or(false);
    let wanted = parts(&tokenizer["normalizer"], &tokenizer["pre_tokenizer"], ignore);
    NAMED.into_iter().find(|name| {
        cut(name).is_some_and(|cut| {
            parts(&cut.normalizer, &cut.pre_tokenizer, cut.ignore_merges) == wanted
        })
    })
}

/// The vocabulary of a file and what is known of its tokens.
struct Vocabulary<'a> {
    header: &'a Header,
    tokens: &'a Strings,
    kinds: Vec<i64>,
}

impl<'a> Vocabulary<'a> {
    fn new(header: &'a Header) -> Result<Self, String> {
        let tokens = header
            .get("tokenizer.ggml.tokens")
            .and_then(Value::as_strings)
            .ok_or("`tokenizer.ggml.tokens` is missing or no list of strings")?;
        let kinds = match header.get("tokenizer.ggml.token_type") {
            None => Vec::new(),
            Some(value) => {
                let list = value.as_numbers().ok_or("`tokenizer.ggml.token_type` is no list")?;
                if list.len() != tokens.len() {
                    let (kinds, tokens) = (list.len(), tokens.len());
                    return Err(format!("{tokens} tokens but {kinds} entries in `token_type`"));
                }
                list.iter().map(|kind| kind.as_f64().unwrap_or(1.0) as i64).collect()
            }
        };
        Ok(Self { header, tokens, kinds })
    }

    fn kind(&self, id: usize) -> i64 {
        self.kinds.get(id).copied().unwrap_or(1)
    }

    /// Id under `tokenizer.ggml.NAME_token_id`, if it is one of the vocabulary's.
    fn special(&self, name: &str) -> Option<u64> {
        let id = self.header.get(&format!("tokenizer.ggml.{name}_token_id"))?.as_u64()?;
        (id < self.tokens.len() as u64).then_some(id)
    }

    fn text(&self, id: u64) -> Option<String> {
        let bytes = self.tokens.get(usize::try_from(id).ok()?)?;
        Some(String::from_utf8_lossy(bytes).into_owned())
    }

    fn flag(&self, name: &str, default: bool) -> bool {
        let key = format!("tokenizer.ggml.{name}");
        self.header.get(&key).and_then(Value::as_bool).unwrap_or(default)
    }

    /// `text -> id`, where a text occurs twice the first.
    fn map(&self) -> Map<String, Json> {
        let mut map = Map::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            map.entry(token.into_owned()).or_insert_with(|| json!(id));
        }
        map
    }

    /// Tokens that are matched in the text before anything else.
    fn added(&self) -> Vec<Json> {
        let mut added = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            let kind = self.kind(id);
            if matches!(kind, UNKNOWN | CONTROL | USER_DEFINED) && !token.is_empty() {
                added.push(json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": kind != USER_DEFINED,
                }));
            }
        }
        added
    }

    /// Adds begin and end tokens as the flags say; `other` where there is nothing to add.
    fn post_processor(&self, add_bos: bool, add_eos: bool, other: Json) -> Json {
        let wanted = |add: bool, name| self.special(name).filter(|_| add);
        let begin = wanted(add_bos, "bos");
        let end = wanted(add_eos, "eos");
        let mut specials = Map::new();
        let mut token = |id: Option<u64>, sequence: u8| -> Vec<Json> {
            let Some((id, text)) = id.and_then(|id| Some((id, self.text(id)?))) else {
                return Vec::new();
            };
            let entry = json!({ "id": text, "ids": [id], "tokens": [text] });
            specials.insert(text.clone(), entry);
            vec![json!({ "SpecialToken": { "id": text, "type_id": sequence } })]
        };
        let mut single = token(begin, 0);
        single.push(json!({ "Sequence": { "id": "A", "type_id": 0 } }));
        single.extend(token(end, 0));
        let mut pair = single.clone();
        pair.extend(token(begin, 1));
        pair.push(json!({ "Sequence": { "id": "B", "type_id": 1 } }));
        pair.extend(token(end, 1));
        if specials.is_empty() {
            return other;
        }
        json!({
            "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": specials,
        })
    }
}

/// `tokenizer.json`; `None` where the file has no tokenizer at all.
pub(crate) fn tokenizer_json(header: &Header) -> Result<Option<Vec<u8>>, String> {
    let Some(model) = header.get("tokenizer.ggml.model").and_then(Value::as_str) else {
        return Ok(None);
    };
    if model == "none" || model == "no_vocab" {
        return Ok(None);
    }
    let vocabulary = Vocabulary::new(header)?;
    let mut json = match model {
        "gpt2" => byte_pairs(&vocabulary)?,
        "llama" => sentence_pieces(&vocabulary)?,
        "bert" => word_pieces(&vocabulary)?,
        other => {
            return Err(format!(
                "`tokenizer.ggml.model` is `{other}`; refit knows gpt2, llama and bert; put the \
                 model's own tokenizer.json beside the file"
            ));
        }
    };
    json["version"] = json!("1.0");
    json["truncation"] = Json::Null;
    json["padding"] = Json::Null;
    json["added_tokens"] = vocabulary.added().into();
    Ok(Some(serde_json::to_vec(&json).expect("invariant: values serialize")))
}

/// Byte-level BPE with its merges listed.
fn byte_pairs(vocabulary: &Vocabulary<'_>) -> Result<Json, String> {
    let header = vocabulary.header;
    let pre = header.get("tokenizer.ggml.pre").and_then(Value::as_str).unwrap_or("default");
    let cut = cut(pre).ok_or_else(|| {
        format!(
            "the pre-tokenizer `{pre}` is not known to refit; put the model's own tokenizer.json \
             beside the file"
        )
    })?;
    let listed = header
        .get("tokenizer.ggml.merges")
        .and_then(Value::as_strings)
        .ok_or("`tokenizer.ggml.merges` is missing or no list of strings")?;
    let mut merges = Vec::with_capacity(listed.len());
    for (at, merge) in listed.iter().enumerate() {
        let (left, right) =
            merge.split_once(' ').ok_or_else(|| format!("merge {at} (`{merge}`) is no pair"))?;
        merges.push(json!([left, right]));
    }
    let add_bos = vocabulary.flag("add_bos_token", cut.add_bos);
    let add_eos = vocabulary.flag("add_eos_token", false);
    Ok(json!({
        "normalizer": cut.normalizer,
        "pre_tokenizer": cut.pre_tokenizer,
        "post_processor": vocabulary.post_processor(add_bos, add_eos, byte_level(true)),
        "decoder": byte_level(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": cut.ignore_merges, "vocab": vocabulary.map(), "merges": merges,
        },
    }))
}

/// SentencePiece BPE: merges follow from the scores, bytes stand in for unknown characters.
fn sentence_pieces(vocabulary: &Vocabulary<'_>) -> Result<Json, String> {
    let scores = vocabulary
        .header
        .get("tokenizer.ggml.scores")
        .and_then(Value::as_numbers)
        .ok_or("`tokenizer.ggml.scores` is missing or no list")?;
    if scores.len() != vocabulary.tokens.len() {
        return Err(format!("{} tokens but {} scores", vocabulary.tokens.len(), scores.len()));
    }
    let scores: Vec<f64> = scores.iter().map(|score| score.as_f64().unwrap_or(0.0)).collect();
    let space = "\u{2581}";
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": space });
    let prefix = vocabulary.flag("add_space_prefix", true);
    let mut normalizers = vec![replace];
    if prefix {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": space }));
    }
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": space }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    let unknown = vocabulary.special("unknown").and_then(|id| vocabulary.text(id));
    let add_bos = vocabulary.flag("add_bos_token", true);
    let add_eos = vocabulary.flag("add_eos_token", false);
    Ok(json!({
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "post_processor": vocabulary.post_processor(add_bos, add_eos, Json::Null),
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
            "ignore_merges": false, "vocab": vocabulary.map(),
            "merges": merges_by_score(vocabulary.tokens, &scores),
        },
    }))
}

/// Every way to build a token from two others, best score first, ties in the order of the ids.
fn merges_by_score(tokens: &Strings, scores: &[f64]) -> Vec<Json> {
    /// No vocabulary has longer pieces; a hostile one would cost quadratic time.
    const LONGEST: usize = 256;
    let tokens: Vec<_> = tokens.iter().collect();
    let mut ids = HashMap::new();
    for (id, token) in tokens.iter().enumerate() {
        ids.entry(&**token).or_insert(id);
    }
    let mut merges = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(_, token)| token.len() <= LONGEST) {
        let first = merges.len();
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                merges.push((id, l, r));
            }
        }
        merges[first..].sort_by_key(|&(_, l, r)| (l, r));
    }
    merges.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]));
    merges.into_iter().map(|(_, l, r)| json!([tokens[l], tokens[r]])).collect()
}

/// WordPiece: GGUF marks word beginnings with U+2581 where BERT marks continuations with `##`.
fn word_pieces(vocabulary: &Vocabulary<'_>) -> Result<Json, String> {
    let mut map = Map::with_capacity(vocabulary.tokens.len());
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        let text = match token.strip_prefix('\u{2581}') {
            Some(word) => word.to_owned(),
            // Tokens in brackets, `[unused7]` among them, have no mark of either kind.
            None if vocabulary.kind(id) == 1
                && !(token.starts_with('[') && token.ends_with(']')) =>
            {
                format!("##{token}")
            }
            None => token.into_owned(),
        };
        map.entry(text).or_insert_with(|| json!(id));
    }
    // Converters have called the ends of an input `cls` and `seperator` (so spelled), `bos` and `eos`, or left them out.
    let special = |keys: &[&str], usual: &str| {
        let named = keys.iter().find_map(|key| vocabulary.special(key));
        let id = named.or_else(|| map.get(usual).and_then(Json::as_u64));
        id.and_then(|id| Some((vocabulary.text(id)?, id))).ok_or_else(|| {
            format!("no `tokenizer.ggml.{}_token_id` and no token `{usual}`", keys[0])
        })
    };
    let unknown = special(&["unknown"], "[UNK]")?.0;
    let (first, last) =
        (special(&["cls", "bos"], "[CLS]")?, special(&["seperator", "eos"], "[SEP]")?);
    Ok(json!({
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true,
        },
        "pre_tokenizer": { "type": "BertPreTokenizer" },
        "post_processor": { "type": "BertProcessing", "sep": last, "cls": first },
        "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true },
        "model": {
            "type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": map,
        },
    }))
}

/// `tokenizer_config.json`: special tokens and the chat template.
pub(crate) fn tokenizer_config(header: &Header) -> Option<Vec<u8>> {
    let vocabulary = Vocabulary::new(header).ok()?;
    let mut config = Map::new();
    for (name, gguf) in [("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")] {
        if let Some(text) = vocabulary.special(gguf).and_then(|id| vocabulary.text(id)) {
            config.insert(format!("{name}_token"), json!(text));
        }
    }
    for flag in ["add_bos_token", "add_eos_token"] {
        if let Some(value) = header.get(&format!("tokenizer.ggml.{flag}")).and_then(Value::as_bool)
        {
            config.insert(flag.to_owned(), json!(value));
        }
    }
    if let Some(template) = header.get("tokenizer.chat_template").and_then(Value::as_str) {
        config.insert("chat_template".to_owned(), json!(template));
    }
    let context =
        header.architecture().and_then(|name| header.get(&format!("{name}.context_length")));
    if let Some(length) = context.and_then(Value::as_u64) {
        config.insert("model_max_length".to_owned(), json!(length));
    }
    config.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
    config.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    Some(pretty(config))
}

/// `generation_config.json`: the ids that begin and end a text.
pub(crate) fn generation_config(header: &Header) -> Option<Vec<u8>> {
    let vocabulary = Vocabulary::new(header).ok()?;
    let mut config = Map::new();
    for (name, gguf) in [("bos", "bos"), ("pad", "padding")] {
        if let Some(id) = vocabulary.special(gguf) {
            config.insert(format!("{name}_token_id"), json!(id));
        }
    }
    let mut ends: Vec<u64> =
        ["eos", "eot", "eom"].iter().filter_map(|name| vocabulary.special(name)).collect();
    ends.dedup();
    match ends[..] {
        [] => {}
        [one] => drop(config.insert("eos_token_id".to_owned(), json!(one))),
        _ => drop(config.insert("eos_token_id".to_owned(), json!(ends))),
    }
    (!config.is_empty()).then(|| pretty(config))
}

fn pretty(map: Map<String, Json>) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(&map).expect("invariant: maps serialize");
    bytes.push(b'\n');
    bytes
}
