use crate::{Error, Result, file};
use serde_json::{Map, Value, json};
use std::path::Path;

/// BERT's tokenizer from `vocab.txt`, one token a line, as `BertTokenizer` builds
/// it: the `tokenizer.json` that it would save. `tokenizer_config.json` says
/// whether text is lowercased.
pub(super) fn tokenizer_json(
    origin: &Path,
    vocab: Vec<u8>,
    config: &Map<String, Value>,
) -> Result<Vec<u8>> {
    let path = origin.join("vocab.txt");
    let text = file::utf8(&path, vocab)?;
    let mut vocab = Map::new();
    for (id, token) in text.lines().map(str::trim_end).enumerate() {
        // A repeated line takes the later id, as in transformers.
        vocab.insert(token.to_owned(), json!(id));
    }
    let id = |token: &str| {
        let missing = || format!("no {token} among {} tokens; not a BERT vocabulary", vocab.len());
        vocab.get(token).ok_or_else(|| Error::file(&path, missing()))
    };
    let (cls, sep, _) = (id("[CLS]")?, id("[SEP]")?, id("[UNK]")?);
    let added: Vec<Value> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        .iter()
        .filter_map(|token| Some((token, vocab.get(*token)?)))
        .map(|(token, id)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let flag = |key: &str| config.get(key).and_then(Value::as_bool);
    let json = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": true,
            "handle_chinese_chars": flag("tokenize_chinese_chars").unwrap_or(true),
            "strip_accents": flag("strip_accents"),
            "lowercase": flag("do_lower_case").unwrap_or(true),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", sep], "cls": ["[CLS]", cls]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab},
    });
    Ok(json.to_string().into_bytes())
}
