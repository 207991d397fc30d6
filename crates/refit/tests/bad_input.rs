//! Bad input, item by item: what is wrong is said with file, tensor or line and with what to do, the exit
//! code says whose fault it is, and nothing is written.

mod common;

use common::{Place, edit_json, edit_weights, raw_safetensors, safetensors};

const UP: &str = "model.layers.1.mlp.up_proj.weight";
const EMBED: &str = "model.embed_tokens.weight";

/// A small file in each format that refit opens.
fn whole_files() -> [(&'static str, Vec<u8>); 4] {
    let fixture = |name: &str| {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../refit-store/tests/fixtures");
        std::fs::read(format!("{folder}/{name}")).unwrap()
    };
    let two = [("a.weight", &[2, 2][..], vec![1.0; 4]), ("b.weight", &[2], vec![2.0; 2])];
    [
        ("m.safetensors", safetensors(&two)),
        ("m.gguf", fixture("tiny_llama.gguf")),
        ("m.pth", fixture("zip.pth")),
        ("old.bin", fixture("legacy.pth")),
    ]
}

/// Every verb that opens a model refuses `path`, and the scan does not call it safe.
#[track_caller]
fn refused_everywhere(place: &Place, path: &str, parts: &[&str]) {
    let text = place.write("words.txt", "some words");
    for args in [
        &["inspect", path][..],
        &["explain", path],
        &["apply", "rtn", path, "-o", "out"],
        &["apply", "model-soups", path, path, "-o", "out"],
        &["eval", path, "--text", &text],
        &["embed", path, "--text", &text],
        &["classify", path, &text],
        &["generate", path, "--prompt", "x"],
        &["compare", path, "builtin:tiny"],
    ] {
        place.refuses(args, 2, parts);
    }
    let scanned = place.run(&["scan", path, "--json"]);
    assert!(!scanned.err.contains("panicked"), "{}", scanned.err);
    let unsafe_or_warned = scanned.code == 1 || scanned.out.contains("warning");
    assert!(unsafe_or_warned, "{path}: {}", scanned.out);
}

#[test]
fn truncated_files() {
    let place = Place::new();
    for (name, bytes) in whole_files() {
        let cut = place.write(name, &bytes[..bytes.len() - 9]);
        refused_everywhere(&place, &cut, &[name, "download"]);
        for length in [0, 3, 20, bytes.len() / 2] {
            let cut = place.write(name, &bytes[..length]);
            place.refuses(&["inspect", &cut], 2, &[name]);
        }
    }
}

#[test]
fn flipped_bits_in_headers() {
    let place = Place::new();
    // A quotation mark, the count of tensors, the first opcode of a pickle, a magic number.
    for ((name, mut bytes), (at, bit)) in
        whole_files().into_iter().zip([(9, 0x04), (13, 0x40), (70, 0x80), (3, 0x20)])
    {
        bytes[at] ^= bit;
        let flipped = place.write(name, bytes);
        refused_everywhere(&place, &flipped, &[name]);
    }
}

#[test]
fn headers_that_lie() {
    let place = Place::new();
    let entry = |name: &str, shape: &str, from: i64, to: i64| {
        format!("\"{name}\":{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[{from},{to}]}}")
    };
    let one = |entry: String, data: usize| raw_safetensors(&format!("{{{entry}}}"), &vec![0; data]);
    let two = |a: String, b: String, data: usize| one(format!("{a},{b}"), data);
    let long = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
    let cases: &[(&str, Vec<u8>, &[&str])] = &[
        ("longer-than-file", long(50), &["header needs 58 bytes", "has 10", "download"]),
        ("longer-than-any", long(u64::MAX), &["header claims", "100000000"]),
        (
            "overlap",
            two(entry("a", "[2]", 0, 8), entry("b", "[2]", 4, 12), 12),
            &["`b`", "overlap", "`a`"],
        ),
        ("negative", one(entry("a", "[2]", -8, 0), 8), &["`a`", "-8", "not negative", "line 1"]),
        ("negative-shape", one(entry("a", "[-2]", 0, 8), 8), &["`a`", "-2", "not negative"]),
        ("backwards", one(entry("a", "[2]", 8, 0), 8), &["`a`", "begins at byte 8, after its end"]),
        ("hole", one(entry("a", "[2]", 8, 16), 16), &["`a`", "8 bytes before it", "no holes"]),
        ("tail", one(entry("a", "[2]", 0, 8), 80), &["72 bytes after the last tensor"]),
        (
            "twice",
            two(entry("a", "[2]", 0, 8), entry("a", "[2]", 8, 16), 16),
            &["`a`", "occurs twice"],
        ),
        (
            "same-place",
            two(entry("a", "[2]", 0, 8), entry("a", "[2]", 0, 8), 8),
            &["`a`", "occurs twice"],
        ),
        (
            "wrong-size",
            one(entry("a", "[3]", 0, 8), 8),
            &["`a`", "takes 12 bytes", "8 are declared"],
        ),
        ("beyond", one(entry("a", "[4]", 0, 16), 8), &["`a`", "0..16", "outside", "8 bytes"]),
        (
            "vast",
            one(entry("a", "[4294967296,4294967296,4294967296]", 0, 8), 8),
            &["`a`", "overflows"],
        ),
        (
            "no-type",
            one("\"a\":{\"dtype\":\"Q9\",\"shape\":[2],\"data_offsets\":[0,8]}".into(), 8),
            &["`a`", "Q9"],
        ),
        ("no-json", raw_safetensors("[1, 2]", &[]), &["header", "damaged"]),
    ];
    for (name, bytes, parts) in cases {
        let path = place.write(&format!("{name}.safetensors"), bytes);
        let parts = [&[path.as_str()][..], parts].concat();
        refused_everywhere(&place, &path, &parts);
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn gguf_headers_that_lie() {
    let place = Place::new();
    let [_, (_, whole), ..] = whole_files();
    let (query, key) = ("blk.0.attn_q.weight", "blk.0.attn_k.weight");
    let position = |name: &str| {
        whole.windows(name.len()).position(|window| window == name.as_bytes()).unwrap()
    };
    // Behind a tensor's name: u32 rank, two u64 dimensions, u32 type, u64 offset.
    let entry = position(query) + query.len();
    let edited = |at: usize, with: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        bytes
    };
    let cases: &[(&str, Vec<u8>, &[&str])] = &[
        ("twice", edited(position(query), key.as_bytes()), &[key, "occurs twice"]),
        (
            "beyond",
            edited(entry + 24, &(1u64 << 40).to_le_bytes()),
            &[query, "outside", "download"],
        ),
        ("negative", edited(entry + 24, &(-32i64).to_le_bytes()), &[query, "outside", "download"]),
        ("overlap", edited(entry + 24, &0u64.to_le_bytes()), &["overlap"]),
        ("crooked", edited(entry + 24, &1u64.to_le_bytes()), &[query, "alignment"]),
        ("vast", edited(entry + 4, &[0xe0; 16]), &[query, "overflows"]),
        ("no-type", edited(entry + 20, &200u32.to_le_bytes()), &[query, "number 200 of GGML"]),
        ("many", edited(8, &u64::MAX.to_le_bytes()), &["truncated or damaged"]),
        (
            "long-key",
            edited(24, &(1u64 << 60).to_le_bytes()),
            &["a metadata key needs", "download"],
        ),
        ("new", edited(4, &99u32.to_le_bytes()), &["version 99", "reads 2 and 3"]),
    ];
    for (name, bytes, parts) in cases {
        let path = place.write(&format!("{name}.gguf"), bytes);
        refused_everywhere(&place, &path, &[&[path.as_str()][..], parts].concat());
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn shards_that_lead_outside_or_are_missing() {
    let place = Place::new();
    let shard = safetensors(&[("a.weight", &[2, 2], vec![1.0; 4])]);
    place.write("secret.safetensors", &shard);
    place.write("both/one.safetensors", &shard);
    place.write("both/two.safetensors", &shard);
    let cases: &[(&str, &str, &[&str])] = &[
        (
            "climbs",
            r#"{"a.weight": "../secret.safetensors"}"#,
            &["../secret.safetensors", "outside", "beside"],
        ),
        ("abs", r#"{"a.weight": "/etc/passwd"}"#, &["/etc/passwd", "outside"]),
        (
            "gone",
            r#"{"a.weight": "gone.safetensors"}"#,
            &["gone.safetensors", "missing", "download"],
        ),
        ("lacks", r#"{"a.weight": "../both/one.safetensors"}"#, &["outside"]),
        (
            "both",
            r#"{"a.weight": "one.safetensors", "b": "two.safetensors"}"#,
            &["two.safetensors", "`b`"],
        ),
        ("number", r#"{"a.weight": 3}"#, &["`a.weight`", "string"]),
        ("empty", "{}", &["weight_map", "empty"]),
        ("list", "[]", &["weight_map"]),
    ];
    for (name, map, parts) in cases {
        place.write(&format!("{name}/config.json"), "{}");
        let index = format!("{{\"weight_map\": {map}}}");
        place.write(&format!("{name}/model.safetensors.index.json"), index);
        let parts = [&["model.safetensors.index.json"][..], parts].concat();
        refused_everywhere(&place, name, &parts);
    }
    let scanned = place.run(&["scan", "climbs"]).code(1).out;
    assert!(scanned.contains("danger") && scanned.contains("../secret.safetensors"), "{scanned}");
}

#[test]
fn weights_that_are_not_finite() {
    let place = Place::new();
    // NaN in a matrix that methods change, and infinity in one that they copy.
    for (name, tensor, bits) in [("nan", UP, 0x7fc0u16), ("inf", EMBED, 0xff80)] {
        let dir = place.tiny(name);
        edit_weights(&dir, |tensors| {
            tensors.get_mut(tensor).unwrap().bytes[10..12].copy_from_slice(&bits.to_le_bytes());
        });
        let parts = [name, tensor, "index 5", "refit inspect --values"];
        place.refuses(&["apply", "rtn", name, "--group", "64", "-o", "out"], 2, &parts);
        place.refuses(&["apply", "magnitude", name, "-o", "out"], 2, &parts);
        let wanda = ["apply", "wanda", name, "--text", "builtin:calibration", "-o", "out"];
        place.refuses(&wanda, 2, &parts);
        let soup = ["apply", "model-soups", "builtin:tiny", name, "-o", "deep/out"];
        place.refuses(&soup, 2, &[name, tensor, "index 5"]);
        place.refuses(&["eval", name, "--text", "builtin:kjv", "--max-tokens", "2000"], 2, &parts);
        let found = place.run(&["inspect", name, "--values", "--strict", "--json"]).code(1);
        let facts: serde_json::Value = serde_json::from_str(&found.out).unwrap();
        assert_eq!(facts["values"]["not_finite"][0]["tensor"], tensor);
    }
    let generate = ["generate", "nan", "--prompt", "In the", "--max-new-tokens", "3"];
    place.refuses(&generate, 2, &["nan", UP, "NaN"]);
    let compared = place.run(&["compare", "nan", "builtin:tiny", "--check", "--json"]).code(1);
    assert!(compared.out.contains(UP), "{}", compared.out);

    let bert = place.bert("bert");
    let text = place.write("words.txt", "w5 w6\nw7\n");
    assert!(
        place.run(&["embed", "bert", "--text", &text, "--json"]).json()["embeddings"][1][0]
            .is_number()
    );
    let tensor = "encoder.layer.1.output.dense.weight";
    edit_weights(&bert, |tensors| {
        tensors.get_mut(tensor).unwrap().bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    place.refuses(&["embed", "bert", "--text", &text, "--json"], 2, &["bert", tensor, "NaN"]);
}

#[test]
fn soups_of_models_that_do_not_fit_together() {
    let place = Place::new();
    let soup = |with: &str, parts: &[&str]| {
        let parts = [&["do not fit together"][..], parts].concat();
        place.refuses(&["apply", "model-soups", "builtin:tiny", with, "-o", "out"], 2, &parts);
    };
    edit_weights(&place.tiny("short"), |tensors| {
        let table = tensors.get_mut(EMBED).unwrap();
        table.shape[0] -= 8;
        table.bytes.truncate(table.bytes.len() - 8 * table.shape[1] * 2);
    });
    edit_json(&place.path("short/config.json"), |config| config["vocab_size"] = 3064.into());
    soup("short", &["short", EMBED, "[3072, 192]", "[3064, 192]", "vocabulary"]);

    edit_weights(&place.tiny("fewer"), |tensors| {
        tensors.retain(|name, _| !name.contains("layers.4."));
    });
    edit_json(&place.path("fewer/config.json"), |config| config["num_hidden_layers"] = 4.into());
    soup("fewer", &["fewer", "model.layers.4", "missing in the second"]);

    edit_json(&place.tiny("labels").join("config.json"), |config| {
        config["vocab_size"] = 3073.into()
    });
    place.refuses(
        &["apply", "model-soups", "builtin:tiny", "labels", "-o", "out"],
        2,
        &["labels", EMBED, "[3073, 192]"],
    );

    edit_json(&place.tiny("words").join("tokenizer.json"), |tokenizer| {
        let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
        let keys: Vec<String> = vocabulary.keys().skip(300).take(2).cloned().collect();
        let (a, b) = (vocabulary[&keys[0]].clone(), vocabulary[&keys[1]].clone());
        vocabulary.insert(keys[0].clone(), b);
        vocabulary.insert(keys[1].clone(), a);
    });
    soup("words", &["words", "tokenizers differ"]);

    // Another element type: f32 beside bf16 leaves open what to write.
    edit_weights(&place.tiny("wide"), |tensors| {
        for tensor in tensors.values_mut() {
            tensor.dtype = "F32".to_owned();
            tensor.bytes =
                tensor.bytes.as_chunks().0.iter().flat_map(|[a, b]| [0, 0, *a, *b]).collect();
        }
    });
    soup("wide", &["wide", "BF16", "F32", "--dtype"]);
    let mixed = ["apply", "model-soups", "builtin:tiny", "wide", "--dtype", "f32", "-o", "mixed"];
    place.run(&mixed).code(0);
    edit_weights(&place.tiny("whole"), |tensors| {
        tensors.get_mut(UP).unwrap().dtype = "I16".to_owned();
    });
    soup("whole", &["whole", UP, "I16"]);

    let bert = place.bert("bert");
    soup(bert.to_str().unwrap(), &["bert", "missing"]);
}

#[test]
fn tensors_that_do_not_fit_the_config() {
    let place = Place::new();
    let text = place.write("words.txt", "In the beginning God created the heaven and the earth.");
    let refused = |name: &str, parts: &[&str]| {
        for args in [
            &["apply", "rtn", name, "--group", "64", "-o", "out"][..],
            &["apply", "wanda", name, "--text", &text, "-o", "out"],
            &["apply", "model-soups", name, name, "-o", "out"],
            &["apply", "rtn", name, "-o", "out", "--dry-run"],
            &["eval", name, "--text", &text],
            &["eval", "builtin:tiny", "--reference", name, "--text", &text],
            &["generate", name, "--prompt", "In the"],
        ] {
            let parts = [&[name, "do not fit config.json", "refit inspect"][..], parts].concat();
            place.refuses(args, 2, &parts);
        }
        // Looking is allowed, and shows the difference.
        let shown = place.run(&["inspect", name]).code(0).out;
        let strict = place.run(&["inspect", name, "--strict"]).code(1).out;
        let scanned = place.run(&["scan", name]).code(0).out;
        for part in parts.iter().filter(|part| part.starts_with('`')) {
            assert!(shown.contains(part) && strict.contains(part), "{part}: {shown}");
            assert!(scanned.contains(part), "{part}: {scanned}");
        }
    };
    let query = "model.layers.2.self_attn.q_proj.weight";
    edit_weights(&place.tiny("lacks"), |tensors| {
        tensors.remove(UP).unwrap();
        tensors.remove(query).unwrap();
    });
    refused("lacks", &["2 tensors missing", &format!("`{UP}`"), &format!("`{query}`")]);

    edit_weights(&place.tiny("renamed"), |tensors| {
        let tensor = tensors.remove(UP).unwrap();
        tensors.insert(UP.replace("up_proj", "up_porj"), tensor);
    });
    refused(
        "renamed",
        &["1 tensor missing", "stored instead: `model.layers.1.mlp.up_porj.weight`"],
    );

    edit_weights(&place.tiny("halved"), |tensors| {
        let tensor = tensors.get_mut(UP).unwrap();
        tensor.shape[0] /= 2;
        tensor.bytes.truncate(tensor.bytes.len() / 2);
    });
    refused("halved", &["1 tensor of another shape", "is [256, 192], the config says [512, 192]"]);

    edit_json(&place.tiny("deeper").join("config.json"), |c| c["num_hidden_layers"] = 50.into());
    refused("deeper", &["405 tensors missing", "and 402 more", "`model.layers.5."]);

    // Nothing is missing: the model works, and the surplus is said.
    edit_weights(&place.tiny("surplus"), |tensors| {
        let norm = common::Stored { dtype: "F32".into(), shape: vec![2], bytes: vec![0; 8] };
        tensors.insert("model.extra.weight".into(), norm);
    });
    let eval = ["eval", "surplus", "--text", &text];
    place.run(&eval).code(0).says(&[
        "warning",
        "surplus",
        "1 tensor (`model.extra.weight`)",
        "`llama`",
    ]);
    let apply = ["apply", "rtn", "surplus", "--group", "64", "-o", "out", "--json"];
    let done = place.run(&apply).says(&["model.extra.weight"]).json();
    assert!(done["warnings"][0].as_str().unwrap().contains("model.extra.weight"), "{done}");
    place.run(&["inspect", "surplus", "--strict"]).code(1);
}

#[test]
fn configs_with_absurd_values_never_panic() {
    let place = Place::new();
    let text = place.write("words.txt", "In the beginning God created the heaven and the earth.");
    let absurd = [
        "0",
        "-1",
        "1e300",
        "18446744073709551615",
        "4611686018427387904",
        "0.5",
        "\"x\"",
        "null",
        "[]",
        "{}",
        "true",
    ];
    for key in [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "model_type",
        "hidden_act",
        "eos_token_id",
    ] {
        let dir = place.tiny("m");
        for value in absurd {
            edit_json(&dir.join("config.json"), |config| {
                config[key] = serde_json::from_str(value).unwrap();
            });
            for args in [
                &["inspect", "m", "--json"][..],
                &["explain", "m"],
                &["eval", "m", "--text", &text, "--max-tokens", "8", "--window", "4"],
            ] {
                let ran = place.run(args);
                assert!(matches!(ran.code, 0 | 2), "{key}: {value}: {}: {}", ran.code, ran.err);
                assert!(!ran.err.contains("panicked"), "{key}: {value}: {}", ran.err);
                assert!(ran.code == 0 || ran.err.contains("m"), "{key}: {value}: {}", ran.err);
            }
        }
    }
    place.write("m/config.json", "{\n  \"model_type\": \"llama\",\n  oops\n}");
    place.refuses(&["inspect", "m"], 2, &["config.json", "line 3"]);
}

#[test]
fn tokenizers_that_are_absent_or_of_another_vocabulary() {
    let place = Place::new();
    let text = place.write("words.txt", "In the beginning God created the heaven and the earth.");
    let refused = |name: &str, parts: &[&str]| {
        for args in [
            &["eval", name, "--text", &text][..],
            &["generate", name, "--prompt", "In the"],
            &["apply", "wanda", name, "--text", "builtin:calibration", "-o", "out"],
        ] {
            place.refuses(args, 2, &[&[name][..], parts].concat());
        }
    };
    std::fs::remove_file(place.tiny("mute").join("tokenizer.json")).unwrap();
    refused("mute", &["no tokenizer", "copy"]);
    place.write("broken/x", "");
    std::fs::write(place.tiny("broken").join("tokenizer.json"), "{").unwrap();
    refused("broken", &["tokenizer.json"]);
    edit_json(&place.tiny("foreign").join("tokenizer.json"), |tokenizer| {
        tokenizer["added_tokens"].as_array_mut().unwrap().push(serde_json::json!({
            "id": 900_000, "content": "<stranger>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true
        }));
    });
    refused("foreign", &["3072 rows", "another model"]);

    edit_json(&place.tiny("words").join("tokenizer.json"), |tokenizer| {
        let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
        let keys: Vec<String> = vocabulary.keys().skip(300).take(2).cloned().collect();
        let (a, b) = (vocabulary[&keys[0]].clone(), vocabulary[&keys[1]].clone());
        vocabulary.insert(keys[0].clone(), b);
        vocabulary.insert(keys[1].clone(), a);
    });
    let against = ["eval", "words", "--reference", "builtin:tiny", "--text", &text];
    place.refuses(&against, 2, &["tokenizer", "words", "share"]);

    let bert = place.bert("bert");
    std::fs::remove_file(bert.join("vocab.txt")).unwrap();
    place.refuses(&["embed", "bert", "--text", &text], 2, &["bert", "tokenizer"]);
    let words: String = (0..100).map(|i| format!("w{i}\n")).collect();
    place.write("bert/vocab.txt", format!("[PAD]\n[UNK]\n[CLS]\n[SEP]\n{words}"));
    place.refuses(&["embed", "bert", "--text", &text], 2, &["bert", "64"]);
}

#[test]
fn texts_that_cannot_be_read_or_are_empty() {
    let place = Place::new();
    place.bert("bert");
    place.write("folder/x", "");
    let cases: &[(&str, &[u8], &[&str])] = &[
        ("empty.txt", b"", &["empty.txt", "empty", "words"]),
        ("blank.txt", b" \n\t\n", &["blank.txt", "empty"]),
        ("latin.txt", b"one\ntwo \xe9\n", &["latin.txt", "line 2", "UTF-8", "iconv"]),
    ];
    for (name, bytes, parts) in cases {
        let text = place.write(name, bytes);
        place.refuses(&["eval", "builtin:tiny", "--text", &text], 2, parts);
        place.refuses(&["embed", "bert", "--text", &text], 2, parts);
        place.refuses(&["apply", "wanda", "builtin:tiny", "--text", &text, "-o", "out"], 2, parts);
    }
    for verb in [
        &["eval", "builtin:tiny"][..],
        &["embed", "bert"],
        &["apply", "wanda", "builtin:tiny", "-o", "out"],
    ] {
        let with = |text| [verb, &["--text", text][..]].concat();
        place.refuses(&with("gone.txt"), 2, &["gone.txt", "no such file"]);
        place.refuses(&with("builtin:kjw"), 2, &["builtin:kjw", "`kjv`"]);
        let ran = place.run(&with("folder"));
        assert!(ran.code != 0 && ran.err.contains("folder"), "{}", ran.err);
    }
    let one = place.write("one.txt", "a");
    place.refuses(&["eval", "builtin:tiny", "--text", &one], 2, &["one.txt", "too few"]);
    place.refuses(&["generate", "builtin:tiny", "--prompt", ""], 2, &["--prompt"]);
    place.refuses(&["apply", "wanda", "builtin:tiny", "-o", "out"], 2, &["--text"]);
}

#[test]
fn windows_larger_than_the_context() {
    let place = Place::new();
    let eval = |window: &str| {
        let args = [
            "eval",
            "builtin:tiny",
            "--text",
            "builtin:kjv",
            "--max-tokens",
            "64",
            "--window",
            window,
        ];
        place.run(&args)
    };
    eval("100000").code(2).says(&["--window 100000", "512", "or less"]);
    eval("1").code(2).says(&["--window 1", "2 tokens"]);
    eval("0").code(2).says(&["--window 0", "2 tokens"]);
    let few = ["eval", "builtin:tiny", "--text", "builtin:kjv", "--max-tokens", "1"];
    place.refuses(&few, 2, &["--max-tokens 1", "at least 2"]);
    // Without the flag the window is what the model can take.
    let args = ["eval", "builtin:tiny", "--text", "builtin:kjv", "--max-tokens", "64", "--json"];
    assert_eq!(place.run(&args).json()["window"], 512);
    let args = ["generate", "builtin:tiny", "--prompt", "x", "--max-new-tokens", "99999"];
    place.refuses(&args, 2, &["512"]);
    let wanda = ["apply", "wanda", "builtin:tiny", "--text", "builtin:calibration", "-o", "out"];
    let long = [&wanda[..], &["--sequence-length", "4096"]].concat();
    place.refuses(&long, 2, &["4096", "512"]);
    let recipe = "name: x\ndata: {t: builtin:kjv}\nsteps:\n  - pull: builtin:tiny\n    as: m\n  - eval: [m]\n    on: t\n    window: 4096\n";
    let recipe = place.write("long.yaml", recipe);
    place.run(&["run", &recipe]).code(2).says(&["4096", "512"]);
}

#[test]
fn parameters_out_of_range() {
    let place = Place::new();
    let apply = |args: &[&str], parts: &[&str]| {
        let args = [&["apply"], args, &["-o", "out"]].concat();
        place.refuses(&args, 2, parts);
    };
    for method in ["magnitude", "wanda", "sparsegpt", "dsnot"] {
        let text = if method == "magnitude" { &[][..] } else { &["--text", "builtin:calibration"] };
        for sparsity in ["1", "1.0", "1.5", "-0.1", "NaN", "inf"] {
            let flag = format!("--sparsity={sparsity}");
            let args = [&[method, "builtin:tiny", &flag], text].concat();
            apply(&args, &["sparsity", "from 0 up to but not including 1"]);
        }
        let args = [&[method, "builtin:tiny", "--sparsity=half"], text].concat();
        apply(&args, &["half", "--sparsity"]);
    }
    for bits in ["0", "1", "9", "-3", "2.5"] {
        apply(&["rtn", "builtin:tiny", &format!("--bits={bits}")], &["bits"]);
    }
    apply(&["rtn", "builtin:tiny", "--bits", "1"], &["2 to 8"]);
    // What does not divide says what would.
    apply(
        &["rtn", "builtin:tiny", "--group", "100"],
        &["group = 100", "64", "row", "_proj.weight"],
    );
    apply(&["rtn", "builtin:tiny", "--group", "0"], &["`0`", "row"]);
    apply(&["rtn", "builtin:tiny", "--group", "-4"], &["-4"]);
    let gptq = ["gptq", "builtin:tiny", "--group", "100", "--text", "builtin:calibration"];
    apply(&gptq, &["group = 100", "64", "row"]);
    let wanda = ["wanda", "builtin:tiny", "--text", "builtin:calibration"];
    apply(&[&wanda[..], &["--pattern", "5:4"]].concat(), &["5:4"]);
    apply(&[&wanda[..], &["--pattern", "3:7"]].concat(), &["7", "192"]);
    apply(&["rtn", "builtin:tiny", "builtin:tiny"], &["exactly 1 model"]);
    apply(&["rtn", "builtin:tiny", "--bist", "3"], &["--bits"]);
}

#[test]
fn recipes_with_mistakes_or_bombs() {
    let place = Place::new();
    let refuse = |text: &str, parts: &[&str]| {
        let recipe = place.write("bad.yaml", text);
        place.refuses(&["run", &recipe], 2, &[&["bad.yaml"][..], parts].concat());
        place.refuses(&["run", &recipe, "--dry-run"], 2, &[&["bad.yaml"][..], parts].concat());
    };
    let step =
        |step: &str| format!("name: x\nsteps:\n  - pull: builtin:tiny\n    as: m\n  - {step}\n");
    refuse(&step("{apply: rtn, to: m, wiht: {bits: 3}}"), &["line 5", "wiht", "`with`"]);
    refuse(&step("{apply: rtn, to: m, with: {bist: 3}}"), &["line 5", "bist", "`bits`"]);
    refuse(&step("{apply: rtm, to: m}"), &["line 5", "rtm", "`rtn`"]);
    refuse(&step("{apply: rtn, to: mm}"), &["line 5", "`m`"]);
    refuse("name: x\nstpes: []\n", &["line 2", "stpes", "`steps`"]);
    refuse("name: ../up\nsteps: [{pull: builtin:tiny}]\n", &["name", "../up"]);
    // A billion laughs, a self-reference, a merge key, another kind of document, deep nesting, sheer size.
    let mut laughs = String::from("name: x\ndata:\n  a0: &a0 [lol, lol, lol, lol, lol, lol]\n");
    for i in 1..10 {
        let previous = format!("*a{},", i - 1).repeat(9);
        laughs.push_str(&format!("  a{i}: &a{i} [{}]\n", previous.trim_end_matches(',')));
    }
    refuse(&laughs, &["aliases"]);
    refuse("name: x\nsteps: &s [*s]\n", &["aliases"]);
    refuse("name: x\nsteps:\n  - &b {pull: y}\n  - <<: *b\n", &["aliases"]);
    refuse("- a\n- b\n", &["line 1"]);
    refuse("name: x\nsteps: [", &["line"]);
    refuse(&format!("name: x\nsteps: {}{}", "[".repeat(5000), "]".repeat(5000)), &["limit"]);
    refuse(&"x".repeat(300 << 10), &["too many"]);
    refuse("name: !!python/object/apply:os.system [id]\nsteps: []\n", &["line 1"]);
}

#[test]
fn outputs_that_exist_or_cannot_be_written() {
    let place = Place::new();
    place.write("taken/precious.txt", "mine");
    let file = place.write("file", "mine");
    let apply =
        |out: &str| ["apply", "rtn", "builtin:tiny", "--group", "64", "-o", out].map(str::to_owned);
    let refuse = |out: &str, code: i32, parts: &[&str]| {
        let args = apply(out);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        place.refuses(&args, code, parts);
        place.refuses(&[&args[..], &["--dry-run"]].concat(), code, parts);
    };
    refuse("taken", 2, &["taken", "already exists", "--force"]);
    refuse("file", 2, &["file", "already exists", "--force"]);
    refuse(".", 2, &["already exists"]);
    refuse(&format!("{file}/out"), 3, &["file/out", "Not a directory"]);
    assert_eq!(std::fs::read(place.path("taken/precious.txt")).unwrap(), b"mine");
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    let args = ["apply", "rtn", "builtin:tiny", "--group", "64", "-o", "/proc/nowhere/out"];
    let ran = place.run(&args);
    assert!(ran.code == 2 || ran.code == 3, "{}", ran.err);
    assert!(ran.err.contains("/proc/nowhere") || ran.err.contains("/proc:"), "{}", ran.err);
    place.refuses(&["apply", "rtn", "builtin:tiny"], 2, &["-o"]);

    // A recipe does not mix its files with another one's.
    let recipe = place.write("r.yaml", "name: x\nsteps:\n  - pull: builtin:tiny\n    as: m\n");
    for out in ["taken", "file"] {
        let parts = [out, "already exists", "-o DIR"];
        place.refuses(&["run", &recipe, "-o", out], 2, &parts);
    }
    assert_eq!(std::fs::read_dir(place.path("taken")).unwrap().count(), 1);
    place.refuses(&["run", &recipe, "-o", "file/run"], 3, &["file/run", "Not a directory"]);

    // Permissions do not bind the superuser, so there is nothing to see as one.
    let locked = place.path("locked");
    std::fs::create_dir(&locked).unwrap();
    let mut permissions = std::fs::metadata(&locked).unwrap().permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&locked, permissions).unwrap();
    if std::fs::write(locked.join("probe"), "").is_err() {
        refuse("locked/out", 3, &["locked", "cannot write", "denied"]);
        refuse("locked/deep/out", 3, &["locked", "cannot write", "denied"]);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn disks_and_limits_that_are_too_small() {
    let place = Place::new();
    let refit = env!("CARGO_BIN_EXE_refit");
    let shell = |script: &str| {
        let mut command = std::process::Command::new("sh");
        let output = command
            .args(["-c", script])
            .current_dir(place.path(""))
            .env("REFIT_OFFLINE", "1")
            .output();
        common::Ran::of(output.unwrap())
    };
    let apply = format!("'{refit}' apply rtn builtin:tiny --group 64 -o");
    // The whole output goes along, so that the model is in the cache before the limits fall.
    shell(&format!("export REFIT_CACHE=$PWD/cache; {apply} whole --quiet")).code(0);
    let before = place.names();

    // A limit on the size of files, reported as an error and not by a signal: 1000 blocks of 512 bytes.
    let limited =
        format!("export REFIT_CACHE=$PWD/cache; trap '' XFSZ; ulimit -f 1000; {apply} out");
    shell(&limited).code(3).says(&["model.safetensors", "ulimit", "the output was not written"]);
    assert_eq!(place.names(), before);
    // The same by a signal: killed in the middle; then it goes on, or starts over, to the same bytes.
    let killed = shell(&format!("export REFIT_CACHE=$PWD/cache; ulimit -f 1000; {apply} out"));
    assert!(killed.code != 0 && !place.path("out").exists());
    shell(&format!("export REFIT_CACHE=$PWD/cache; {apply} out")).code(0);
    let weights = |out: &str| std::fs::read(place.path(out).join("model.safetensors")).unwrap();
    assert!(weights("out") == weights("whole"));

    // A checkpoint that does not fit: the run stops with its name, and goes on when there is room.
    let lora = format!(
        "export REFIT_CACHE=$PWD/cache; '{refit}' apply lora builtin:tiny --data builtin:kjv-calib --steps 3 --batch 2 \
         --max-length 32 --checkpoint-every 2 -o"
    );
    shell(&format!("trap '' XFSZ; ulimit -f 1000; {lora} adapter"))
        .code(3)
        .says(&["step-000000002.ckpt.safetensors", "the last complete checkpoint is untouched"]);
    assert!(!place.path("adapter").exists());
    shell(&format!("{lora} adapter")).code(0);
    assert!(place.path("adapter/adapter_model.safetensors").exists());
    for (args, parts) in [
        (&["apply", "rtn", "adapter", "-o", "x"][..], ["this is an adapter", "merge-adapter"]),
        (&["eval", "adapter", "--text", "builtin:kjv"], ["this is an adapter", "--adapter"]),
        (&["apply", "merge-adapter", "builtin:tiny", "-o", "x"], ["an adapter", "after the model"]),
    ] {
        place.run(args).code(2).says(&parts);
    }

    // A file system of four megabytes, where this user may make one.
    let small = format!(
        "mkdir small && mount -t tmpfs -o size=4m none small || exit 77; export REFIT_CACHE=$PWD/cache; \
         {apply} small/out; code=$?; ls -A small; exit $code"
    );
    let ran = shell(&format!("exec unshare -rm sh -c '{}'", small.replace('\'', "'\\''")));
    if ran.code == 3 {
        let ran = ran.says(&["small/out", "disk full", "needed", "free space"]);
        assert_eq!(ran.out.trim(), "", "left on the full disk");
    } else {
        // No namespaces here: the message says so, and nothing of refit ran.
        assert!(!ran.err.contains("error: "), "{}", ran.err);
    }
}

#[test]
fn files_that_attack() {
    let place = Place::new();
    let scan = |name: &str, bytes: &[u8], parts: &[&str]| {
        let path = place.write(name, bytes);
        let ran = place.run(&["scan", &path]).code(1);
        for part in [&["NOT SAFE", "danger"][..], parts].concat() {
            assert!(ran.out.contains(part), "{name}: `{part}` is not in:\n{}", ran.out);
        }
    };
    // Published bypasses: a plain call, the memo instead of adjacent strings, another name of the module,
    // an attribute chain, `__import__` through builtins, code that pip runs, INST and OBJ instead of REDUCE.
    let pickles: &[(&str, &[u8], &str)] = &[
        ("call.pkl", b"\x80\x02cos\nsystem\nX\x02\0\0\0id\x85R.", "os.system"),
        (
            "memo.pkl",
            b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93\x8c\x02id\x85R.",
            "os.system",
        ),
        ("posix.pth", b"\x80\x02cposix\nsystem\nX\x02\0\0\0id\x85R.", "posix.system"),
        ("builtins.bin", b"\x80\x02cbuiltins\nexec\nX\x01\0\0\x001\x85R.", "builtins.exec"),
        ("getattr.pt", b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\n.", "builtins.getattr"),
        ("pip.ckpt", b"\x80\x02cpip\nmain\n]X\x07\0\0\0installa\x85R.", "pip.main"),
        ("inst.pkl", b"(X\x02\0\0\0idios\nsystem\n.", "INST"),
        ("obj.pkl", b"(cos\nsystem\nX\x02\0\0\0ido.", "os.system"),
        ("weights.safetensors", b"\x80\x02cos\nsystem\nX\x02\0\0\0id\x85R.", "safetensors"),
    ];
    for (name, bytes, named) in pickles {
        scan(name, bytes, &[name, named]);
        if !name.ends_with(".pkl") {
            place.refuses(&["inspect", name], 2, &[name]);
            place.refuses(&["apply", "rtn", name, "-o", "out"], 2, &[name]);
        }
    }
    let config = r#"{"model_type": "x", "auto_map": {"AutoModel": "modeling.Evil"}, "trust_remote_code": true}"#;
    place.write("remote/config.json", config);
    place.write("remote/modeling.py", "import os");
    let ran = place.run(&["scan", "remote"]).code(0);
    for part in [
        "warning",
        "config.json",
        "`auto_map`",
        "`trust_remote_code`",
        "modeling.py",
        "never runs it",
    ] {
        assert!(ran.out.contains(part), "`{part}` is not in:\n{}", ran.out);
    }
    let template =
        r#"{"chat_template": "{{ cycler.__init__.__globals__.os.popen('id').read() }}"}"#;
    scan("tokenizer_config.json", template.as_bytes(), &["chat_template", "__globals__"]);
}
