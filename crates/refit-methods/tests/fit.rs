//! Fit on the small model that travels with refit: sizes are kept to the byte, and nothing uniform is foreseen to be better.

mod support;

use std::path::{Path, PathBuf};

use refit_data::corpus;
use refit_methods::method::{Inputs, ModelInput, TextData};
use serde_json::{Value, json};
use support::{apply, bytes, inputs, plan, tensor};

const WEIGHTS: &str = "model.safetensors";

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny")
}

fn with_text() -> Inputs {
    let text = corpus::builtin()
        .iter()
        .map(|text| TextData { source: text.domain.into(), text: text.calib.into() })
        .collect();
    Inputs { models: vec![ModelInput::open("tiny", tiny()).unwrap()], text, ..Inputs::default() }
}

fn alone() -> Inputs {
    Inputs { text: Vec::new(), ..with_text() }
}

fn small(mut parameters: Value) -> Value {
    parameters["samples"] = json!(4);
    parameters["sequence_length"] = json!(64);
    parameters["weighing_tokens"] = json!(64);
    parameters
}

/// Bytes of the weight file of the compressed-tensors export.
fn exported(out: &Path, to: &Path) -> u64 {
    let done =
        apply("export", json!({"to": "compressed-tensors"}), &inputs(&[out]), to, 0).unwrap();
    assert_eq!(done.report["format"], "compressed-tensors");
    std::fs::metadata(to.join(WEIGHTS)).unwrap().len()
}

fn smallest(inputs: &Inputs, parameters: Value) -> u64 {
    let error = plan("fit", parameters, inputs).unwrap_err().to_string();
    let after = error.split("smallest possible is ").nth(1).unwrap_or_else(|| panic!("{error}"));
    after.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_size_is_kept_to_the_byte_and_nothing_uniform_is_foreseen_to_be_better() {
    let dir = tempfile::tempdir().unwrap();
    for (index, (given, dtype)) in
        [(with_text(), "f16"), (alone(), "f16"), (with_text(), "f32")].into_iter().enumerate()
    {
        let least = smallest(&given, json!({"target": "1kB", "dtype": dtype}));
        for (step, share) in [1.0, 1.07, 1.3].into_iter().enumerate() {
            let target = (least as f64 * share) as u64;
            let out = dir.path().join(format!("{index}-{step}"));
            let parameters = small(json!({"target": target, "dtype": dtype}));
            let done = apply("fit", parameters, &given, &out, 0).unwrap();
            let fit = &done.report["fit"];
            let size = exported(&out, &out.with_extension("ct"));
            assert_eq!(Some(size), fit["export_bytes"].as_u64(), "{fit}");
            assert!(size <= target, "{size} for {target}");
            if step > 0 {
                // Offsets in the header are counted at their longest.
                let used = fit["used_bytes"].as_u64().unwrap();
                assert!(
                    used <= target && used as f64 > 0.995 * target as f64,
                    "{used} for {target}"
                );
                assert!(size as f64 > 0.97 * target as f64, "{size} for {target}");
            }
            let found = fit["predicted_error"].as_f64().unwrap();
            let uniform = fit["uniform"].as_array().unwrap();
            let within = |u: &&Value| u["within_budget"] == true;
            assert!(uniform.iter().any(|u| within(&u)), "{fit}");
            for rival in uniform.iter().filter(within) {
                assert!(
                    found <= rival["predicted_error"].as_f64().unwrap() * (1.0 + 1e-9),
                    "{rival}"
                );
            }
            let weighing = if given.text.is_empty() { "weights" } else { "kl" };
            assert_eq!(fit["weighing"], weighing);
        }
    }
}

#[test]
fn bits_per_weight_are_kept_and_more_of_them_lose_less() {
    let dir = tempfile::tempdir().unwrap();
    let mut last = f64::INFINITY;
    for (index, bpw) in [2.5, 3.1, 4.0, 5.7].into_iter().enumerate() {
        let out = dir.path().join(index.to_string());
        let done = apply("fit", json!({"bpw": bpw}), &alone(), &out, 0).unwrap();
        let spent = done.report["fit"]["export_bits_per_weight"].as_f64().unwrap();
        assert!(spent <= bpw && spent > bpw * 0.995, "{spent} for {bpw}");
        let error = done.report["mean_relative_error"].as_f64().unwrap();
        assert!(error < last, "{bpw}: {error} after {last}");
        last = error;
    }
}

#[test]
fn one_choice_is_gptq_or_rounding_to_nearest() {
    let dir = tempfile::tempdir().unwrap();
    let only = json!({"bpw": 8, "bits": [3], "g_min": 32, "g_max": 32, "symmetric": true});
    let run = |name: &str, method: &str, parameters: Value, given: &Inputs| {
        let out = dir.path().join(name);
        apply(method, parameters, given, &out, 0).unwrap();
        bytes(&out, WEIGHTS)
    };
    let plain = json!({"bits": 3, "group": 32});
    assert_eq!(
        run("a", "fit", small(only.clone()), &alone()),
        run("b", "rtn", plain.clone(), &alone())
    );
    let mut calibrated = plain;
    calibrated["samples"] = json!(4);
    calibrated["sequence_length"] = json!(64);
    let given = with_text();
    assert_eq!(run("c", "fit", small(only), &given), run("d", "gptq", calibrated, &given));
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let given = with_text();
    let run = |threads: usize| {
        let out = dir.path().join(threads.to_string());
        apply("fit", small(json!({"bpw": 3.3})), &given, &out, threads).unwrap();
        (bytes(&out, WEIGHTS), bytes(&out, "refit.quantization.json"))
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn sizes_that_cannot_be_had_name_those_that_can() {
    let given = alone();
    let least = smallest(&given, json!({"target": 1000}));
    plan("fit", json!({ "target": least }), &given).unwrap();
    let error = plan("fit", json!({"target": least - 1}), &given).unwrap_err().to_string();
    assert!(error.contains(&least.to_string()), "{error}");
    let error = plan("fit", json!({"target": "1GB"}), &given).unwrap_err().to_string();
    assert!(error.contains("as it is") && error.contains("nothing to fit"), "{error}");
    let error = plan("fit", json!({"bpw": 1.5}), &given).unwrap_err().to_string();
    let named = error.split("smallest possible is ").nth(1).unwrap().split(' ').next().unwrap();
    plan("fit", json!({"bpw": named.parse::<f64>().unwrap()}), &given).unwrap();
    for bpw in [json!(32), json!(1e9)] {
        let error = plan("fit", json!({ "bpw": bpw }), &given).unwrap_err().to_string();
        assert!(error.contains("below 32"), "{error}");
    }
    let warned = plan("fit", json!({"bpw": 12}), &given).unwrap().warnings;
    assert!(warned.iter().any(|w| w.contains("finest choice")), "{warned:?}");
    let error = plan("fit", json!({"target": "60MB", "bpw": 3}), &given).unwrap_err().to_string();
    assert!(error.contains("not both"), "{error}");
    // What is kept as 32-bit floats is said to be the reason, with the way out.
    let error =
        plan("fit", json!({"target": 1000, "dtype": "f32"}), &given).unwrap_err().to_string();
    assert!(error.contains("--dtype f16"), "{error}");
}

#[test]
fn outliers_get_finer_groups() {
    let dir = tempfile::tempdir().unwrap();
    let name = "model.layers.0.mlp.down_proj.weight";
    let model =
        support::model(&dir.path().join("m"), 5, refit_store::DType::F32, |tensor, values| {
            if tensor == name {
                values.iter_mut().step_by(41).for_each(|w| *w *= 20.0);
            }
        });
    let out = dir.path().join("out");
    let done = apply("fit", json!({"bpw": 3.3}), &inputs(&[&model]), &out, 0).unwrap();
    let group = |name: &str| done.report["fit"]["matrices"][name]["group"].as_u64().unwrap();
    let (spiked, plain) = (group(name), group("model.layers.1.mlp.down_proj.weight"));
    assert!(spiked < plain, "{spiked} {plain}");
    assert_eq!(tensor(&out, "model.norm.weight"), tensor(&model, "model.norm.weight"));
}
