//! Models that run in their codes, from the command line: every format that stores codes, and what is refused.

mod common;

use common::Place;
use refit_store::Artifact;

/// Exports of a quantized model that say the same weights.
const FORMATS: &[(&str, &str)] =
    &[("gguf", "model.gguf"), ("compressed-tensors", "packed"), ("gptq", "gptq")];

fn perplexity(place: &Place, model: &str, weights: &str) -> f64 {
    let args = ["eval", model, "--text", "builtin:kjv", "--window", "64", "--max-tokens", "512"];
    let found = place.run(&[&args[..], &["--weights", weights, "--json"]].concat()).json();
    found["perplexity"].as_f64().unwrap()
}

#[test]
fn every_format_runs_packed_and_nearly_as_decoded() {
    let place = Place::new();
    let quantize = ["apply", "rtn", "builtin:tiny", "--bits", "4", "--group", "32", "-o", "q"];
    place.run(&quantize).code(0);
    let decoded = perplexity(&place, "q", "f32");
    let packed = perplexity(&place, "q", "packed");
    assert!(packed != decoded, "inputs were rounded");
    assert!((packed / decoded - 1.0).abs() < 0.01, "{packed} against {decoded}");
    for (format, out) in FORMATS {
        let ran = place.run(&["export", "q", "--to", format, "-o", out]);
        ran.code(0);
        // The same codes in another file: the same numbers.
        let again = perplexity(&place, out, "packed");
        assert!((again / packed - 1.0).abs() < 1e-3, "{format}: {again} against {packed}");
        let artifact = Artifact::open(place.path(out)).unwrap();
        let mut found = 0;
        for site in artifact.architecture().linears() {
            let coded = artifact.coded(&site.name).unwrap().expect("stored in codes");
            let weights = artifact.read_f32(&site.name).unwrap();
            assert_eq!(coded.decode(), weights, "{format}: {}", site.name);
            found += 1;
        }
        let args = ["generate", out, "--prompt", "In the beginning", "--max-new-tokens", "4"];
        let said = place.run(&[&args[..], &["--json"]].concat()).json();
        assert!(said["packed_matrices"].as_u64().unwrap() >= found, "{format}: {said}");
        let said = place.run(&[&args[..], &["--weights", "f32", "--json"]].concat()).json();
        assert_eq!(said["packed_matrices"], 0);
    }
}

#[test]
fn grids_of_all_widths_run_packed() {
    let place = Place::new();
    for bits in ["2", "3", "5", "8"] {
        for more in [&[][..], &["--asymmetric"]] {
            let quantize = ["apply", "rtn", "builtin:tiny", "--bits", bits, "--group", "64"];
            let out = ["-o", "q", "--force"];
            place.run(&[&quantize[..], more, &out].concat()).code(0);
            let (decoded, packed) =
                (perplexity(&place, "q", "f32"), perplexity(&place, "q", "packed"));
            assert!((packed / decoded - 1.0).abs() < 0.02, "{bits} {more:?}: {packed} {decoded}");
        }
    }
}

#[test]
fn floats_and_odd_groups_run_as_they_are_and_adapters_are_refused() {
    let place = Place::new();
    let args =
        ["generate", "builtin:tiny", "--prompt", "In the", "--max-new-tokens", "3", "--json"];
    let said = place.run(&args).json();
    assert_eq!(said["packed_matrices"], 0, "the weights of the built-in model are floats");
    place.run(&["apply", "rtn", "builtin:tiny", "--group", "16", "-o", "fine"]).code(0);
    let said =
        place.run(&["generate", "fine", "--prompt", "In", "--max-new-tokens", "2", "--json"]);
    assert_eq!(said.json()["packed_matrices"], 0);
    assert!(
        (perplexity(&place, "fine", "packed") / perplexity(&place, "fine", "f32") - 1.0).abs()
            < 1e-9
    );
    let lora = ["apply", "lora", "builtin:tiny", "--data", "builtin:kjv-calib", "--steps", "1"];
    place
        .run(&[&lora[..], &["--batch", "1", "--max-length", "16", "-o", "adapter"]].concat())
        .code(0);
    let adapted = ["generate", "builtin:tiny", "--adapter", "adapter", "--prompt", "In the"];
    place.run(&[&adapted[..], &["--max-new-tokens", "2"]].concat()).code(0);
    place.refuses(
        &[&adapted[..], &["--weights", "packed"]].concat(),
        2,
        &["adapter", "merge-adapter"],
    );
}
