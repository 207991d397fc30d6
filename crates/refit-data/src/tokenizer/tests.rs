use super::*;
use proptest::prelude::*;
use serde_json::json;

/// A byte-level BPE tokenizer: 256 bytes, the merges `h+e` and `l+l`, and one special
/// token, with a truncation and padding that must not matter.
fn byte_level() -> Vec<u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut vocab = Map::new();
    let mut next = 256u32;
    for byte in 0..=255u8 {
        let letter = if printable(byte) {
            u32::from(byte)
        } else {
            next += 1;
            next - 1
        };
        let letter = char::from_u32(letter).unwrap().to_string();
        vocab.insert(letter, json!(byte));
    }
    vocab.insert("he".into(), json!(256));
    vocab.insert("ll".into(), json!(257));
    let special = json!({"id": 258, "content": "<end>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true});
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
        "added_tokens": [special],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [["h", "e"], ["l", "l"]]}
    })
    .to_string()
    .into_bytes()
}

fn chat(template: &str) -> Tokenizer {
    let config = json!({"chat_template": template, "eos_token": {"content": "<end>"}});
    let files = TokenizerFiles {
        tokenizer_json: Some(byte_level()),
        tokenizer_config: Some(config.to_string().into_bytes()),
        generation_config: Some(br#"{"eos_token_id": [65, 258], "pad_token_id": 99999}"#.to_vec()),
        ..Default::default()
    };
    Tokenizer::from_files(Path::new("model"), files).unwrap()
}

#[test]
fn text_comes_back_and_is_never_cut_or_padded() {
    let tokenizer = Tokenizer::from_bytes(&byte_level()).unwrap();
    let ids = tokenizer.encode("hello é", false).unwrap();
    assert_eq!(ids, [256, 257, 111, 32, 195, 169]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "hello é");
    assert_eq!((tokenizer.vocab_size(), tokenizer.max_id()), (259, 258));
    let report = tokenizer.report("hello é").unwrap();
    assert_eq!((report.words, report.tokens, report.unknown), (2, 6, 0));
}

#[test]
fn special_ids_come_from_every_file() {
    let tokenizer = chat("");
    assert_eq!(tokenizer.special().eos, [65, 258]);
    assert_eq!(tokenizer.special().pad, None, "an id outside the vocabulary is no id");
    assert_eq!(tokenizer.special().bos, None);
}

#[test]
fn a_tokenizer_of_another_model_is_found_out() {
    let tokenizer = Tokenizer::from_bytes(&byte_level()).unwrap();
    tokenizer.check_embedding(259).unwrap();
    tokenizer.check_embedding(320).unwrap();
    let error = tokenizer.check_embedding(258).unwrap_err().to_string();
    assert!(error.contains("ids up to 258") && error.contains("258 rows"), "{error}");

    let text = String::from_utf8(byte_level()).unwrap();
    let swapped = text.replace("\"he\":256", "\"he\":257").replace("\"ll\":257", "\"ll\":256");
    let other = Tokenizer::from_bytes(swapped.as_bytes()).unwrap();
    assert_ne!(tokenizer.fingerprint(), other.fingerprint());
    assert_eq!(tokenizer.fingerprint(), chat("x").fingerprint());
    let error = tokenizer.check_same(&other).unwrap_err().to_string();
    assert!(error.contains("id 256 is \"he\" here and \"ll\" there"), "{error}");
}

#[test]
fn absent_and_damaged_files_are_named() {
    let none = Tokenizer::from_files(Path::new("model"), TokenizerFiles::default()).unwrap_err();
    assert!(none.to_string().starts_with("model: no tokenizer here"), "{none}");
    let bad = Tokenizer::from_bytes(b"{}").unwrap_err().to_string();
    assert!(bad.starts_with("tokenizer.json: tokenizer.json does not parse"), "{bad}");
    let files = TokenizerFiles {
        tokenizer_json: Some(byte_level()),
        generation_config: Some(b"[1]".to_vec()),
        ..Default::default()
    };
    let bad = Tokenizer::from_files(Path::new("model"), files).unwrap_err().to_string();
    assert!(bad.contains("generation_config.json is not a JSON object"), "{bad}");
}

#[test]
fn chat_templates_render_as_in_transformers() {
    let template = "{%- for m in messages %}\n  {%- if m.role not in ['user', 'assistant'] %}\n    \
        {{- raise_exception('unknown role ' + m.role) }}\n  {%- endif %}\n\
        {{ '<|' + m['role'] + '|>' }}{{ m.content.strip().split(' ')[0] }}{{ eos_token }}\n\
        {%- endfor %}\n{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}";
    let tokenizer = chat(template);
    let turns = [Message::new("user", " hi there "), Message::new("assistant", "yo")];
    let text = tokenizer.render_chat(&turns, true).unwrap();
    assert_eq!(text, "<|user|>hi<end><|assistant|>yo<end><|assistant|>\n");
    let error = tokenizer.render_chat(&[Message::new("tool", "x")], false).unwrap_err();
    assert!(error.to_string().contains("unknown role tool"), "{error}");
    let plain = Tokenizer::from_bytes(&byte_level()).unwrap();
    assert!(plain.render_chat(&turns, true).unwrap_err().to_string().contains("no chat template"));
    let broken = chat("{% for %}").render_chat(&turns, true).unwrap_err().to_string();
    assert!(broken.starts_with("model: chat template, line 1"), "{broken}");
}

#[test]
fn tools_reach_the_template_as_python_json() {
    let tokenizer = chat("{{ tools | tojson }}");
    let mut variables = Map::new();
    variables.insert("tools".into(), json!([{"name": "f<", "args": {}}]));
    let text = tokenizer.render_chat_with(&json!([]), false, variables).unwrap();
    assert_eq!(text, r#"[{"name": "f<", "args": {}}]"#);
}

#[test]
fn a_template_cannot_run_for_ever() {
    let source = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
    assert!(chat(source).render_chat(&[], false).is_err());
}

#[test]
fn bert_vocabularies_need_no_tokenizer_json() {
    let vocab = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nun\n##aff\n##able\n,\n";
    let files =
        |vocab: &str| TokenizerFiles { vocab_txt: Some(vocab.into()), ..Default::default() };
    let tokenizer = Tokenizer::from_files(Path::new("bert"), files(vocab)).unwrap();
    assert_eq!(tokenizer.encode("Unaffable, zzz", true).unwrap(), [2, 5, 6, 7, 8, 1, 3]);
    assert_eq!(tokenizer.decode(&[2, 5, 6, 7, 8, 3], true).unwrap(), "unaffable,");
    assert_eq!(tokenizer.special().unk, Some(1));
    assert_eq!(tokenizer.report("zzz un").unwrap().unknown_rate(), 0.5);
    let error = Tokenizer::from_files(Path::new("bert"), files("a\nb\n")).unwrap_err();
    assert!(error.to_string().contains("no [CLS] among 2 tokens"), "{error}");
}

proptest! {
    #[test]
    fn streaming_gives_the_same_text(text in "\\PC{0,60}", cut in 0usize..200) {
        let tokenizer = Tokenizer::from_bytes(&byte_level()).unwrap();
        let text = text.replace('\u{fffd}', "");
        let ids = tokenizer.encode(&text, false).unwrap();
        let ids = &ids[..cut.min(ids.len())];
        let mut stream = tokenizer.stream(true);
        let mut out = String::new();
        for id in ids {
            let piece = stream.push(*id).unwrap();
            let replaced = piece.contains('\u{fffd}');
            prop_assert!(!replaced);
            out += &piece;
        }
        out += &stream.finish().unwrap();
        prop_assert_eq!(out, tokenizer.decode(ids, true).unwrap());
    }

    #[test]
    fn any_bytes_are_refused_or_read(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Tokenizer::from_bytes(&bytes);
        let files = TokenizerFiles { vocab_txt: Some(bytes), ..Default::default() };
        let _ = Tokenizer::from_files(Path::new("x"), files);
    }
}
