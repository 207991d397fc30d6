//! What a model says of its activations, from the command line: said by methods, honoured by `refit eval`, exported.

mod common;

use common::Place;
use serde_json::Value;

/// Perplexity, and what was rounded.
fn eval(place: &Place, model: &str, more: &[&str]) -> (f64, Value) {
    let args = ["eval", model, "--text", "builtin:kjv", "--window", "64", "--max-tokens", "256"];
    let found = place.run(&[&args[..], more, &["--json"]].concat()).json();
    (found["perplexity"].as_f64().unwrap(), found["activations"].clone())
}

#[test]
fn what_is_stated_is_measured_and_exported() {
    let place = Place::new();
    let calibration =
        ["--samples", "4", "--sequence-length", "64", "--text", "builtin:calibration"];
    let smooth = ["apply", "smoothquant", "builtin:tiny", "--dtype", "f32", "-o", "w8a8"];
    place.run(&[&smooth[..], &calibration].concat()).code(0);
    let (rounded, said) = eval(&place, "w8a8", &[]);
    assert_eq!(said, "35 rounded (8 bits per token)");
    let (weights, said) = eval(&place, "w8a8", &["--activations", "none"]);
    assert!(said.is_null() && weights != rounded);
    let (four, said) = eval(&place, "w8a8", &["--activations", "int4"]);
    assert!(said == "35 rounded (4 bits per token)" && four > rounded);
    place.run(&["export", "w8a8", "--to", "compressed-tensors", "-o", "packed"]).code(0);
    let (packed, said) = eval(&place, "packed", &[]);
    assert_eq!(said, "35 rounded (8 bits per token)");
    assert!((packed / rounded - 1.0).abs() < 1e-6, "{packed} {rounded}");
    let facts = place.run(&["eval", "w8a8", "--text", "builtin:kjv", "--max-tokens", "64"]).code(0);
    assert!(facts.out.contains("activations"), "{}", facts.out);
}

#[test]
fn refusals_say_what_to_do() {
    let place = Place::new();
    let bert = place.bert("encoder");
    let bert = bert.to_str().unwrap();
    let text = ["--text", "builtin:calibration", "-o", "out"];
    for method in ["awq", "smoothquant", "repquant"] {
        let mut args = vec!["apply", method, bert];
        args.extend(if method == "awq" { vec!["--group", "row"] } else { vec![] });
        args.extend(text);
        place.refuses(&args, 2, &["residual stream", "gptq"]);
    }
    place.refuses(&["apply", "repquant", "builtin:tiny", "-o", "out"], 2, &["--text"]);
    let vit = place.vit("vit");
    place.refuses(&["apply", "repquant", vit.to_str().unwrap(), "-o", "out"], 2, &["--labelled"]);
    place.refuses(
        &["eval", "builtin:tiny", "--text", "builtin:kjv", "--activations", "int9"],
        2,
        &["int2 to int8"],
    );
    // A record that makes no sense.
    let tiny = place.tiny("m");
    let record =
        r#"{"activations": {"x:in": {"kind": "tensor", "bits": 8, "scale": -1.0, "zero": 0.0}}}"#;
    std::fs::write(tiny.join("refit.quantization.json"), record).unwrap();
    let eval = ["eval", "m", "--text", "builtin:kjv", "--max-tokens", "64"];
    place.refuses(&eval, 2, &["refit.quantization.json", "x:in"]);
    place.run(&[&eval[..], &["--activations", "none"]].concat()).code(0);
}
