//! Verbs that run models.

mod common;

use common::Place;

#[test]
fn eval_prints_what_it_promises() {
    let place = Place::new();
    let found = place
        .run(&[
            "eval",
            "builtin:tiny",
            "--text",
            "builtin:held-out",
            "--window",
            "128",
            "--max-tokens",
            "512",
            "--json",
        ])
        .json();
    assert_eq!(found["tokens"], 512 - 4);
    assert!(found["kl_to_reference"].is_null());
    let (perplexity, nll) = (found["perplexity"].as_f64().unwrap(), found["nll"].as_f64().unwrap());
    assert!((perplexity.ln() - nll).abs() < 1e-9 && perplexity > 1.0);
    assert!(found["tokens_per_second"].as_f64().unwrap() > 0.0);

    let with = place
        .run(&[
            "eval",
            "builtin:tiny",
            "--text",
            "builtin:kjv",
            "--window",
            "64",
            "--max-tokens",
            "256",
            "--reference",
            "builtin:tiny",
            "--json",
        ])
        .json();
    assert!(with["kl_to_reference"].as_f64().unwrap().abs() < 1e-6);
}

#[test]
fn generate_is_greedy_and_repeatable_at_temperature_zero() {
    let place = Place::new();
    let args = [
        "generate",
        "builtin:tiny",
        "--prompt",
        "In the beginning",
        "--max-new-tokens",
        "12",
        "--temperature",
        "0",
        "--ignore-eos",
        "--json",
    ];
    let first = place.run(&args).json();
    assert_eq!(first["tokens"].as_array().unwrap().len(), 12);
    assert!(!first["text"].as_str().unwrap().is_empty());
    assert!(first["time_to_first_token"].as_f64().unwrap() > 0.0);
    assert_eq!(first["tokens"], place.run(&args).json()["tokens"]);
    let shown = place.run(&args[..args.len() - 1]).code(0).out;
    assert_eq!(shown.trim_end(), first["text"].as_str().unwrap().trim_end());
    place
        .run(&["generate", "builtin:tiny", "--prompt", "x", "--top-p", "0"])
        .code(2)
        .says(&["above 0"]);
}

#[test]
fn models_of_another_kind_are_told_apart() {
    let place = Place::new();
    let text = place.write("t.txt", "one line\n");
    place.run(&["embed", "builtin:tiny", "--text", &text]).code(2).says(&["refit embed"]);
    let bert = concat!(env!("CARGO_MANIFEST_DIR"), "/../refit-nn/tests/fixtures/hf/bert");
    let ran = place.run(&["eval", bert, "--text", &text, "--window", "8"]).code(2);
    assert!(ran.err.contains("bert"), "{}", ran.err);
}
