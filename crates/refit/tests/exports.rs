//! `refit export`: from the command line to a file that is measured again.

mod common;

use common::Place;
use serde_json::Value;

fn perplexity(place: &Place, model: &str) -> f64 {
    let args = ["eval", model, "--text", "builtin:kjv", "--window", "64", "--max-tokens", "256"];
    let found = place.run(&[&args[..], &["--json"]].concat()).json();
    found["perplexity"].as_f64().unwrap()
}

#[test]
fn every_format_is_measured_like_its_source() {
    let place = Place::new();
    // The tiny model is stored in bfloat16: decoded codes are rounded there, and not in what is exported.
    place
        .run(&[
            "apply",
            "rtn",
            "builtin:tiny",
            "--bits",
            "4",
            "--group",
            "64",
            "--dtype",
            "f32",
            "-o",
            "q",
        ])
        .code(0);
    let expected = perplexity(&place, "q");
    for (to, name) in
        [("gguf", "g"), ("compressed-tensors", "c"), ("gptq", "p"), ("safetensors", "s")]
    {
        let ran = place.run(&["export", "q", "--to", to, "-o", name, "--json"]).json();
        assert_eq!(ran["report"]["proved"], Value::Bool(true), "{to}");
        assert_eq!(ran["report"]["tensors_rounded"], 0, "{to}");
        let found = perplexity(&place, name);
        assert!((found / expected - 1.0).abs() < 1e-6, "{to}: {found} against {expected}");
    }
    let facts = place.run(&["inspect", "p"]).code(0);
    assert!(
        facts.out.contains("GPTQ") && facts.out.contains("warning: its weights were quantized"),
        "{}",
        facts.out
    );
    let facts = place.run(&["inspect", "builtin:tiny", "--json"]).json();
    assert_eq!(facts["warnings"], serde_json::json!([]));
    let packed = place.run(&["inspect", "p", "--json"]).json();
    let plain = place.run(&["inspect", "q", "--json"]).json();
    assert!(packed["bytes"].as_u64().unwrap() * 2 < plain["bytes"].as_u64().unwrap());
    place.run(&["lineage", "g"]).code(0);
}

#[test]
fn a_dry_run_writes_nothing_and_refusals_say_what_to_do() {
    let place = Place::new();
    let ran =
        place.run(&["export", "builtin:tiny", "--type", "q4_k", "-o", "g", "--dry-run"]).code(0);
    for part in ["Q4_K", "Q5_0", "quantize to", "peak memory"] {
        assert!(ran.out.contains(part), "{}", ran.out);
    }
    place.refuses(&["export", "builtin:tiny", "--to", "gptq", "-o", "p"], 2, &["refit apply rtn"]);
    place.refuses(&["export", "builtin:tiny", "--type", "Q9", "-o", "g"], 2, &["Q9", "Q4_K"]);
    place.refuses(
        &["export", "builtin:tiny", "--to", "safetensors", "--type", "Q8_0", "-o", "s"],
        2,
        &["Q8_0"],
    );
    let bert = place.bert("encoder");
    let bert = bert.to_str().unwrap();
    place.refuses(&["export", bert, "-o", "g"], 2, &["llama", "bert"]);
    assert_eq!(place.names(), ["encoder"]);
}

/// A tokenizer that cuts text in a way that GGUF has no name for.
#[test]
fn tokenizers_without_a_name_are_refused_or_left_out() {
    let place = Place::new();
    let tiny = place.tiny("m");
    common::edit_json(&tiny.join("tokenizer.json"), |json| {
        json["pre_tokenizer"] = serde_json::json!({"type": "Whitespace"});
    });
    place.refuses(&["export", "m", "-o", "g"], 2, &["--no-tokenizer"]);
    place.run(&["export", "m", "-o", "g", "--no-tokenizer"]).code(0);
    assert_eq!(place.run(&["inspect", "g", "--json"]).json()["healthy"], Value::Bool(true));
}
