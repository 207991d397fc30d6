//! Tokenizers rebuilt from GGUF against the libraries that they come from (fixtures made by
//! `fixtures/make_gguf_tokenizers.py`).

use refit_data::Tokenizer;
use refit_store::Artifact;
use serde_json::Value;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn expected() -> Value {
    serde_json::from_slice(&std::fs::read(fixture("gguf_tokenizers.json")).unwrap()).unwrap()
}

fn open(name: &str) -> Tokenizer {
    let artifact = Artifact::open(fixture(&format!("{name}.gguf"))).unwrap();
    Tokenizer::from_artifact(&artifact).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn agrees(name: &str) {
    let tokenizer = open(name);
    let texts = &expected()[name]["texts"];
    assert!(texts.as_array().unwrap().len() > 15);
    for case in texts.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let plain = tokenizer.encode(text, false).unwrap();
        assert_eq!(plain, ids(&case["ids"]), "{name}: {text:?}");
        assert_eq!(
            tokenizer.encode(text, true).unwrap(),
            ids(&case["special"]),
            "{name}: {text:?} with special tokens"
        );
        let decoded = tokenizer.decode(&plain, true).unwrap();
        assert_eq!(decoded, case["decoded"].as_str().unwrap(), "{name}: {text:?} decoded");
    }
}

#[test]
fn sentencepiece_vocabularies_tokenize_as_in_sentencepiece() {
    agrees("spm");
    let special = open("spm").special().clone();
    assert_eq!((special.bos, special.eos, special.unk), (Some(1), vec![2], Some(0)));
}

#[test]
fn without_the_space_before_a_text_too() {
    agrees("spm_bare");
}

#[test]
fn bert_vocabularies_tokenize_as_in_tokenizers() {
    agrees("wordpiece");
    let tokenizer = open("wordpiece");
    let vocabulary = expected()["wordpiece"]["vocabulary"].clone();
    let vocabulary: Vec<String> = serde_json::from_value(vocabulary).unwrap();
    assert_eq!(tokenizer.vocab_size(), vocabulary.len());
    for (id, token) in vocabulary.iter().enumerate() {
        assert_eq!(tokenizer.token(id as u32).as_deref(), Some(&**token));
    }
    assert_eq!(tokenizer.special().unk, Some(1));
    assert_eq!(tokenizer.special().pad, Some(0));
}
