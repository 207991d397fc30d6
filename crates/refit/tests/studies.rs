//! What studies of practice ask for (see `docs/src/studies`), where no other test proves it.

mod common;

use common::{Place, contents, edit_json, edit_weights};
use serde_json::{Value, json};

#[test]
fn an_unknown_version_is_refused_by_its_number() {
    let place = Place::new();
    let fixture =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../refit-store/tests/fixtures/tiny_llama.gguf");
    let mut bytes = std::fs::read(fixture).unwrap();
    bytes[4..8].copy_from_slice(&9u32.to_le_bytes());
    let newer = place.write("newer.gguf", bytes);
    place.refuses(&["inspect", &newer], 2, &["newer.gguf", "version 9"]);

    place.run(&["apply", "rtn", "builtin:tiny", "-o", "out"]).code(0);
    edit_json(&place.path("out/refit.lineage.json"), |manifest| manifest["schema"] = 77.into());
    place.run(&["lineage", "out"]).code(2).says(&["refit.lineage.json", "77"]);
}

#[test]
fn the_plan_foresees_bytes_and_memory() {
    let place = Place::new();
    let calibrated = ["--text", "builtin:calibration", "--samples", "2", "--sequence-length", "64"];
    for (name, more) in
        [("rtn", &[][..]), ("magnitude", &[]), ("model-soups", &[]), ("wanda", &calibrated)]
    {
        let args = [&["apply", name, "builtin:tiny", "-o", name, "--json"], more].concat();
        let plan = place.run(&[&args[..], &["--dry-run"]].concat()).json()["plan"].clone();
        assert!(!place.path(name).exists());
        let done = place.run(&args).json();
        // Weights alone: the header of a safetensors file is not counted.
        let file = std::fs::read(place.path(name).join("model.safetensors")).unwrap();
        let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap());
        assert_eq!(plan["output_bytes"].as_u64().unwrap(), file.len() as u64 - header, "{name}");
        let peak = done["peak_memory"].as_u64().unwrap();
        let planned = plan["peak_memory"].as_u64().unwrap();
        // What a process takes before it does anything, in these unoptimised builds.
        let program = 64 << 20;
        assert!(peak <= planned + program, "{name}: {peak} bytes, {planned} planned");
        assert!(done["seconds"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn a_wrong_field_of_the_config_is_flagged_from_the_files() {
    let place = Place::new();
    for (key, wrong) in [
        ("num_attention_heads", json!(12)),
        ("num_key_value_heads", json!(6)),
        ("head_dim", json!(64)),
        ("hidden_size", json!(128)),
        ("intermediate_size", json!(100)),
        ("vocab_size", json!(3000)),
        ("num_hidden_layers", json!(4)),
        ("num_hidden_layers", json!(6)),
        ("tie_word_embeddings", json!(false)),
        ("attention_bias", json!(true)),
        ("model_type", json!("qwen2")),
    ] {
        let dir = place.tiny("mutant");
        edit_json(&dir.join("config.json"), |config| config[key] = wrong.clone());
        place.run(&["inspect", "mutant", "--strict"]).code(1);
        let same_weights = ["compare", "mutant", "builtin:tiny", "--probe-tokens", "4", "--check"];
        let compared = place.run(&same_weights);
        assert_eq!(compared.code, 1, "{key} = {wrong}: {}", compared.out);
    }
}

#[test]
fn a_wrong_field_that_no_shape_betrays_is_flagged_by_comparison() {
    let place = Place::new();
    for (key, wrong, suspect) in [
        ("rope_parameters", json!({"rope_theta": 5e5, "rope_type": "default"}), "rotary positions"),
        ("rms_norm_eps", json!(0.1), "the norm in front of"),
        ("hidden_act", json!("gelu"), "the activation function"),
    ] {
        let dir = place.tiny("mutant");
        edit_json(&dir.join("config.json"), |config| config[key] = wrong);
        // The files alone cannot tell.
        place.run(&["inspect", "mutant", "--strict"]).code(0);
        let compared =
            place.run(&["compare", "mutant", "builtin:tiny", "--probe-tokens", "24", "--check"]);
        assert_eq!(compared.code, 1, "{key}: {}", compared.out);
        assert!(compared.out.contains(suspect), "{key}: {}", compared.out);
        assert!(
            compared.out.contains("layers.0."),
            "{key} shows in the first layer: {}",
            compared.out
        );
    }
}

#[test]
fn compare_names_the_layer_that_was_changed() {
    let place = Place::new();
    let damaged = "model.layers.3.self_attn.o_proj";
    edit_weights(&place.tiny("faulty"), |tensors| {
        // One head of six goes silent: a sixth of the columns of every row.
        let bytes = &mut tensors.get_mut(&format!("{damaged}.weight")).unwrap().bytes;
        bytes.chunks_exact_mut(192 * 2).for_each(|row| row[..32 * 2].fill(0));
    });
    let args = ["compare", "faulty", "builtin:tiny", "--check", "--json"];
    let found: Value = serde_json::from_str(&place.run(&args).code(1).out).unwrap();
    assert_eq!(found["tensors"][0]["name"], format!("{damaged}.weight"));
    let first = found["behaviour"]["first"]["name"].as_str().unwrap();
    assert_eq!(first, format!("{damaged}:out"), "{}", found["behaviour"]);
}

#[test]
fn a_manifest_is_enough_to_do_it_again_to_the_same_bytes() {
    let place = Place::new();
    let first = [
        "apply",
        "sparsegpt",
        "builtin:tiny",
        "--sparsity",
        "0.4",
        "--samples",
        "2",
        "--sequence-length",
        "64",
        "--text",
        "builtin:kjv-calib",
        "--seed",
        "7",
        "-o",
        "first",
    ];
    place.run(&first).code(0);
    let manifest = place.run(&["lineage", "first", "--json"]).json()["manifest"].clone();
    assert_eq!(manifest["seeds"], json!([7]));
    let data = &manifest["data"][0];
    assert!(data["sha256"].as_str().is_some_and(|hash| hash.len() == 64), "{manifest:#}");
    assert!(manifest["parents"][0]["content"].is_string());

    // The recorded command, as it stands.
    let command = manifest["command"].as_str().unwrap();
    let words: Vec<&str> =
        command.split(' ').map(|w| if w == "OUT" { "second" } else { w }).collect();
    place.run(&words[1..]).code(0);
    let bytes = |dir: &str, file: &str| std::fs::read(place.path(dir).join(file)).unwrap();
    for file in ["model.safetensors", "refit.lineage.json"] {
        assert!(bytes("first", file) == bytes("second", file), "{file} differs");
    }
    let card = place.run(&["card", "first", "--json"]).json();
    assert_eq!(card["card"]["reproduce"]["known"], command);
}

#[test]
fn a_conversion_comes_back_equal() {
    let place = Place::new();
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../refit-store/tests/fixtures");
    let gguf = format!("{fixtures}/tiny_llama.gguf");
    for (from, to) in [("builtin:tiny", "wide"), (&gguf, "from-gguf")] {
        place.run(&["apply", "model-soups", from, "--dtype", "f32", "-o", to]).code(0);
        let equal = place.run(&["compare", to, from, "--weights-only", "--check", "--json"]).json();
        assert_eq!(equal["tensors"].as_array().unwrap().len() as u64, equal["equal_tensors"]);
    }
    // Back again: bf16 to f32 and back loses nothing, and the behaviour is the same.
    place.run(&["apply", "model-soups", "wide", "--dtype", "bf16", "-o", "back"]).code(0);
    place.run(&["compare", "back", "builtin:tiny", "--probe-tokens", "16", "--check"]).code(0);
    place.run(&["inspect", "from-gguf", "--strict"]).code(0);
}

#[test]
fn inputs_are_never_modified() {
    let place = Place::new();
    place.tiny("mine");
    let text = place.write("words.txt", "In the beginning God created the heaven and the earth.");
    let before = contents(&place.path("mine"));
    for args in [
        &["inspect", "mine", "--values"][..],
        &["explain", "mine"],
        &["scan", "mine"],
        &["card", "mine"],
        &["eval", "mine", "--text", &text],
        &["generate", "mine", "--prompt", "And", "--max-new-tokens", "3"],
        &["compare", "mine", "mine", "--probe-tokens", "4"],
        &["apply", "rtn", "mine", "-o", "out"],
        &["apply", "model-soups", "mine", "out", "-o", "soup"],
    ] {
        place.run(args).code(0);
        assert!(contents(&place.path("mine")) == before, "`refit {}` changed it", args.join(" "));
    }
    place.run(&["apply", "rtn", "mine", "-o", "mine"]).code(2).says(&["mine", "already exists"]);
    assert!(contents(&place.path("mine")) == before);
}

#[test]
fn no_artifact_leaves_without_card_and_lineage() {
    let place = Place::new();
    let listed = place.run(&["methods", "--json"]).json();
    let short = ["--text", "builtin:calibration", "--samples", "2", "--sequence-length", "64"];
    let rows = |i: usize| format!("{{\"text\": \"line {i}\", \"label\": \"{}\"}}\n", i % 2);
    let lesson = place.write("lesson.jsonl", (0..8).map(rows).collect::<String>());
    for method in listed["methods"].as_array().unwrap() {
        if method["output"] == "report" {
            continue;
        }
        let name = method["name"].as_str().unwrap();
        if name == "bitfit" {
            continue; // The small model has no biases; `bad_input` has the error.
        }
        let needs = |what: &str| method["inputs"][what] == "required";
        let mut more: Vec<&str> = Vec::new();
        if needs("text") {
            more.extend(short);
        }
        if needs("data") {
            more.extend([
                "--data",
                "builtin:kjv-calib",
                "--steps",
                "2",
                "--batch",
                "2",
                "--max-length",
                "32",
            ]);
        }
        if ["linear-probe", "lp-ft"].contains(&name) {
            more.extend(["--data", &lesson]);
        }
        if ["awq", "smoothquant", "repquant"].contains(&name) {
            more.extend(short);
        }
        if name == "fit" {
            more.extend(["--bpw", "3.1"]);
        }
        if name == "awq" {
            more.extend(["--group", "64"]); // 192 inputs are no multiple of the default.
        }
        if name == "unified-peft" {
            more.extend(["--bottleneck", "8"]);
        }
        let mut models = vec!["builtin:tiny"];
        if needs("adapters") {
            models.push("lora"); // Written earlier in this loop.
        }
        if name == "decompress" {
            let learn = ["apply", "lora", "builtin:tiny", "--data", "builtin:kjv-calib"];
            let few = ["--steps", "2", "--batch", "2", "--max-length", "32", "-o", "small-lora"];
            place.run(&[&learn[..], &few].concat()).code(0);
            let shrink =
                ["apply", "compeft", "small-lora", "--base", "builtin:tiny", "-o", "shrunk"];
            place.run(&shrink).code(0);
            models = vec!["builtin:tiny", "shrunk"];
        }
        if needs("base") {
            models = vec!["finequant"]; // So was this.
            more.extend(["--base", "builtin:tiny"]);
        }
        if method["inputs"]["min_models"] == 2 {
            models.push("rtn");
        }
        place.run(&[&["apply", name], &models[..], &["-o", name], &more[..]].concat()).code(0);
        let lineage = place.run(&["lineage", name, "--json"]).json();
        assert_eq!(lineage["verified"], true, "{name}");
        // The parent came from the cache, so the chain is whole.
        assert_eq!(lineage["truncated"], false, "{name}");
        assert_eq!(lineage["manifest"]["method"], name);
        let written = std::fs::read_to_string(place.path(name).join("README.md")).unwrap();
        let card = place.run(&["card", name, "--json"]).json();
        assert_eq!(card["card"]["method"]["known"], name);
        assert_eq!(card["markdown"], written, "{name}: the card that was written is up to date");
        for known in ["architecture", "format", "parameters", "reproduce"] {
            assert!(!card["card"][known]["known"].is_null(), "{name}: {known}");
        }
    }
}

#[test]
fn local_work_needs_no_network() {
    let place = Place::new();
    // Every way out leads to a closed port, and nothing says that refit should not try.
    let offline = |args: &[&str]| {
        let mut command = place.command();
        command.env_remove("REFIT_OFFLINE").args(args);
        for proxy in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
            command.env(proxy, "http://127.0.0.1:9");
        }
        command.env("HF_ENDPOINT", "http://127.0.0.1:9").env("PIP_INDEX_URL", "http://127.0.0.1:9");
        common::Ran::of(command.output().unwrap())
    };
    offline(&["apply", "rtn", "builtin:tiny", "-o", "out"]).code(0);
    offline(&["eval", "out", "--text", "builtin:kjv", "--max-tokens", "256"]).code(0);
    offline(&["lineage", "out"]).code(0);
    offline(&["scan", "out"]).code(0);
    // And a source that needs one says so.
    let gone = offline(&["pull", "hf:someone/something"]);
    assert!(matches!(gone.code, 2 | 3), "{}", gone.err);
    assert!(gone.err.contains("hf:someone/something"), "{}", gone.err);
}

#[test]
fn explain_answers_a_newcomers_questions() {
    let place = Place::new();
    let words = |model: &str| place.run(&["explain", model]).code(0).out;
    let decoder = words("builtin:tiny");
    for fact in [
        "writes text from left to right",
        "of the llama family",
        "3,072 scores, one per token",
        "5 blocks",
        "192 numbers per token",
        "6 heads of 32 numbers",
        "2 key/value heads",
        "longest input is 512 tokens",
        "with base 10,000",
        "vocabulary has 3,072 tokens, and the tokenizer agrees",
        "2.56 M parameters in 47 tensors",
        "16.00 bits per parameter",
        "`lm_head.weight` is tied to `model.embed_tokens.weight`",
        "Every tensor that the config promises is there",
        "To run it on 512 tokens",
        "LoRA factors of rank 8",
        "Nothing beside it says how it was made",
    ] {
        assert!(decoder.contains(fact), "`{fact}` is not in:\n{decoder}");
    }
    place
        .run(&["apply", "rtn", "builtin:tiny", "--bits", "3", "--group", "64", "-o", "out"])
        .code(0);
    let made = words("out");
    for fact in
        ["3-bit grids of 64 inputs", "quantized before", "refit made it with rtn from builtin:tiny"]
    {
        assert!(made.contains(fact), "`{fact}` is not in:\n{made}");
    }
    place.bert("bert");
    let encoder = words("bert");
    for fact in ["turns text into vectors; it does not write text", "a pooling makes one vector"] {
        assert!(encoder.contains(fact), "`{fact}` is not in:\n{encoder}");
    }
    place.copy("../refit-nn/tests/fixtures/hf/vit", "vit");
    edit_json(&place.path("vit/config.json"), |config| {
        config["id2label"] = json!({"0": "shirt", "1": "shoe", "2": "bag"});
    });
    let images = words("vit");
    for fact in ["an image model", "one per class (shirt, shoe, bag"] {
        assert!(images.contains(fact), "`{fact}` is not in:\n{images}");
    }
}

#[test]
fn lines_that_are_too_long_are_cut_and_said() {
    let place = Place::new();
    let bert = place.bert("bert");
    let config: Value =
        serde_json::from_slice(&std::fs::read(bert.join("config.json")).unwrap()).unwrap();
    let longest = config["max_position_embeddings"].as_u64().unwrap() as usize;
    let text = place.write("lines.txt", format!("w5 w6\n{}\n", "w7 ".repeat(longest + 5)));
    let ran = place.run(&["embed", "bert", "--text", &text, "--json"]);
    let ran = ran.says(&["1 of 2 lines", &longest.to_string()]);
    let found = ran.json();
    assert_eq!(found["truncated"], 1);
    assert_eq!(found["embeddings"].as_array().unwrap().len(), 2);
}

#[test]
fn licences_of_parents_reach_the_child() {
    let place = Place::new();
    for (name, licence) in
        [("mit", "mit"), ("apache", "apache-2.0"), ("gpl", "gpl-3.0"), ("cc", "cc-by-sa-4.0")]
    {
        let dir = place.tiny(name);
        std::fs::write(dir.join("README.md"), format!("---\nlicense: {licence}\n---\n# {name}\n"))
            .unwrap();
    }
    let soup = |parents: &[&str], out: &str| {
        place.run(&[&["apply", "model-soups", "-o", out], parents].concat()).code(0);
        place.run(&["card", out, "--json"]).json()["card"].clone()
    };
    assert_eq!(soup(&["mit", "apache"], "open")["license"]["known"], "apache-2.0");
    assert_eq!(soup(&["mit", "gpl"], "copyleft")["license"]["known"], "gpl-3.0");
    let clash = soup(&["gpl", "cc"], "clash");
    assert!(clash["license"]["known"].is_null() && clash["license_conflicts"][0].is_string());
    let gap = soup(&["mit", "builtin:tiny"], "gap");
    assert!(gap["license"]["unknown"].as_str().unwrap().contains("builtin:tiny"), "{gap}");
}
