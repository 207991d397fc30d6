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

    #[test]
    fn a_changed_tokenizer_is_refused_or_works(
        base in 0usize..4, steps in proptest::collection::vec(any::<prop::sample::Index>(), 1..7), with in 0usize..20,
        more in proptest::option::of((proptest::collection::vec(any::<prop::sample::Index>(), 1..7), 0usize..20)),
    ) {
        let mut json = small(base);
        change(&mut json, &steps, with);
        if let Some((steps, with)) = more {
            change(&mut json, &steps, with);
        }
        use_it(json.to_string().as_bytes());
    }

    #[test]
    fn a_damaged_tokenizer_is_refused_or_works(base in 0usize..4, at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = small(base).to_string().into_bytes();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        use_it(&bytes);
    }

    /// Templates made of the pieces of templates: refused or rendered, and the same every time.
    #[test]
    fn any_template_is_refused_or_renders(template in template(), role in "\\PC{0,8}", content in "\\PC{0,40}") {
        let tokenizer = chat(&template);
        let turns = [Message::new(role, content.clone()), Message::new("user", content)];
        let render = || tokenizer.render_chat(&turns, true).map_err(|e| e.to_string());
        let first = render();
        if let Err(error) = &first {
            prop_assert!(error.starts_with("model: chat template"), "{error}");
        }
        prop_assert_eq!(first, render());
    }

    #[test]
    fn a_changed_template_is_refused_or_renders(at in any::<prop::sample::Index>(), with in "[{}%|()\\[\\]'\".~*-]{0,3}", content in "\\PC{0,20}") {
        let mut template = CHATML.to_owned();
        let at = at.index(template.len());
        template.replace_range(at..at + 1, &with);
        let _ = chat(&template).render_chat(&[Message::new("user", content)], true);
    }

    /// Text without delimiters renders as itself, whatever the messages (Jinja drops one newline at the end).
    #[test]
    fn plain_text_renders_as_itself(text in "[^{}#\r\n]{0,40}\n{0,2}", content in "\\PC{0,20}") {
        let rendered = chat(&text).render_chat(&[Message::new("user", content)], true).unwrap();
        prop_assert_eq!(rendered, text.strip_suffix('\n').unwrap_or(&text));
    }
}

const CHATML: &str = "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<s>' }}{% endif %}\
    {{- '<|' ~ m.role ~ '|>' + m['content'] | trim }}{% generation %}{{ [m] | tojson(indent=2) }}{% endgeneration %}\
    {% endfor %}{% if add_generation_prompt %}{{ 'a' }}{% endif %}";

fn template() -> impl Strategy<Value = String> {
    const PIECES: [&str; 40] = [
        "{%",
        "%}",
        "{{",
        "}}",
        "{#",
        "#}",
        "{%-",
        "-%}",
        "{%}",
        "{% generation %}",
        "{% endgeneration %}",
        "{% for m in messages %}",
        "{% endfor %}",
        "{% if m.role == 'user' %}",
        "{% else %}",
        "{% endif %}",
        "{{ m.content }}",
        "{{ m['role'] | upper }}",
        "{{ messages | tojson }}",
        "{{ messages[0]['content'].split('a') }}",
        "{{ range(1000000000) | list }}",
        "{{ 'x' * 1000000000000 }}",
        "{{ [[]] * 999999999 }}",
        "{{ messages | tojson(indent=99999999999) }}",
        "{% set x = messages %}",
        "{% set x = [x, x] %}",
        "{{ x | tojson }}",
        "{% set ns = namespace(a='') %}",
        "{% set ns.a = ns.a ~ ns.a ~ 'x' %}",
        "{{ raise_exception('no') }}",
        "{{ strftime_now('%Y %') }}",
        "{{ bos_token }}",
        "{% macro f(a) %}{{ f(a) }}{% endmacro %}",
        "{{ f(1) }}",
        "{{ 'a'.center(99999999999) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ -9223372036854775808 // -1 }}",
        "{{ 1 / 0 }}{{ 1 % 0 }}",
        "é\n",
        " ",
    ];
    proptest::collection::vec(proptest::sample::select(PIECES.to_vec()), 0..12)
        .prop_map(|pieces| pieces.concat())
}

/// The fuel bounds the work of any nest of loops: what is finished is whole, and what is too much is refused.
#[test]
fn loops_are_bounded_by_fuel() {
    for (depth, count) in [(1, 10_000), (2, 200), (3, 30), (2, 9_999), (3, 400), (5, 100)] {
        let mut template = "x".to_owned();
        for _ in 0..depth {
            template = format!("{{% for i in range({count}) %}}{template}{{% endfor %}}");
        }
        let rounds = usize::pow(count, depth);
        match chat(&template).render_chat(&[], false) {
            Ok(text) => assert!(text.len() == rounds && rounds <= 1_000_000),
            Err(error) => {
                assert!(rounds > 100_000, "{rounds}");
                assert!(error.to_string().contains("fuel"), "{error}");
            }
        }
    }
}

#[test]
fn values_that_grow_without_end_are_refused() {
    let double = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}";
    let error = chat(double).render_chat(&[], false).unwrap_err().to_string();
    assert!(error.contains("16 MiB"), "{error}");
    // Each round goes one level down; freeing, printing and comparing such a value takes stack.
    let nest = "{% set ns = namespace(x=[1]) %}{% for i in range(9000) %}{% set ns.x = [[[[[[[[[[ns.x]]]]]]]]]] %}{% endfor %}";
    assert_eq!(chat(nest).render_chat(&[], false).unwrap(), "");
    let printed = format!("{nest}{{{{ ns.x }}}}{{{{ [ns.x] == [ns.x] }}}}");
    assert!(chat(&printed).render_chat(&[], false).unwrap().len() > 180_000);
    let json = format!("{nest}{{{{ ns.x | tojson }}}}");
    assert!(chat(&json).render_chat(&[], false).unwrap_err().to_string().contains("128 deep"));
    let endless = "{% set ns = namespace(x=[1]) %}{% for j in range(99999) %}{% for i in range(99999) %}{% set ns.x = [[[[[ns.x]]]]] %}{% endfor %}{% endfor %}";
    assert!(chat(endless).render_chat(&[], false).unwrap_err().to_string().contains("fuel"));
    let text = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}";
    assert!(chat(text).render_chat(&[], false).is_err());
}

/// A tokenizer of each model, with the parts that go along with it.
fn small(model: usize) -> Value {
    let special = |id: u32, text: &str| {
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let (model, normalizer, pre_tokenizer, post_processor, decoder) = match model {
        0 => (
            json!({"type": "BPE", "dropout": null, "unk_token": "<s>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true, "ignore_merges": false,
                "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "<0xC3>": 5}, "merges": [["a", "b"]]}),
            json!({"type": "NFC"}),
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]}),
            json!({"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}}),
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        ),
        1 => (
            json!({"type": "WordPiece", "unk_token": "<s>", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": {"<s>": 0, "a": 1, "##b": 2}}),
            json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true}),
            json!({"type": "BertPreTokenizer"}),
            json!({"type": "BertProcessing", "sep": ["<s>", 0], "cls": ["<s>", 0]}),
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        ),
        2 => (
            json!({"type": "Unigram", "unk_id": 0, "byte_fallback": false,
                "vocab": [["<s>", 0.0], ["\u{2581}a", -1.0], ["b", -2.5], ["ab", -2.0]]}),
            json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]}),
            json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true}),
            Value::Null,
            json!({"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
        ),
        _ => (
            json!({"type": "WordLevel", "unk_token": "<s>", "vocab": {"<s>": 0, "a": 1, "b": 2}}),
            json!({"type": "Lowercase"}),
            json!({"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {"type": "Digits", "individual_digits": true},
                {"type": "Punctuation", "behavior": "Isolated"}]}),
            json!({"type": "RobertaProcessing", "sep": ["<s>", 0], "cls": ["<s>", 0], "trim_offsets": true, "add_prefix_space": false}),
            json!({"type": "CTC", "pad_token": "<s>", "word_delimiter_token": "|", "cleanup": true}),
        ),
    };
    json!({"version": "1.0", "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"},
        "added_tokens": [special(0, "<s>"), special(9, "<e>")], "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor, "decoder": decoder, "model": model})
}

/// Walks down into `json` and puts another value there, or takes one away.
fn change(json: &mut Value, steps: &[prop::sample::Index], with: usize) {
    let values = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(1),
        json!(4),
        json!(u32::MAX),
        json!(u64::MAX),
        json!(1e308),
        json!(0.5),
        json!(""),
        json!("a"),
        json!("é"),
        json!("("),
        json!("(a*)*$"),
        json!([]),
        json!({}),
        json!(["a"]),
        json!([["a", "é"]]),
    ];
    let (step, deeper) = steps.split_first().expect("invariant: the tests walk at least one step");
    let child = match json {
        Value::Array(items) if !items.is_empty() => {
            let at = step.index(items.len());
            if deeper.is_empty() && with == values.len() {
                items.remove(at);
                return;
            }
            items.get_mut(at)
        }
        Value::Object(map) if !map.is_empty() => {
            let key = map.keys().nth(step.index(map.len())).expect("invariant: in range").clone();
            if deeper.is_empty() && with == values.len() {
                map.remove(&key);
                return;
            }
            map.get_mut(&key)
        }
        _ => None,
    };
    match child {
        Some(child) if !deeper.is_empty() => change(child, deeper, with),
        Some(child) => *child = values[with % values.len()].clone(),
        None => *json = values[with % values.len()].clone(),
    }
}

/// Whatever opens can be asked everything.
fn use_it(bytes: &[u8]) {
    let Ok(tokenizer) = Tokenizer::from_bytes(bytes) else { return };
    for text in ["", "ab a", " é\n<s>\u{1f600} 12", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!"] {
        for special in [false, true] {
            if let Ok(ids) = tokenizer.encode(text, special) {
                let _ = tokenizer.decode(&ids, special);
            }
        }
        let _ = tokenizer.report(text);
    }
    let _ = tokenizer.decode(&[0, 3, 5, 9, u32::MAX], false);
    tokenizer.check_same(&tokenizer).unwrap();
    assert!(tokenizer.check_embedding(tokenizer.max_id() as usize + 1).is_ok());
    assert_eq!(tokenizer.fingerprint(), tokenizer.clone().fingerprint());
}
