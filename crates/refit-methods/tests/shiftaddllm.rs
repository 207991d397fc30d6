//! ShiftAddLLM on the small model that travels with refit.

mod support;

use std::path::{Path, PathBuf};

use refit_data::corpus;
use refit_methods::method::{Inputs, ModelInput, TextData};
use refit_methods::quantize::shiftaddllm::packed;
use serde_json::{Value, json};
use support::{apply, bytes, plan, tensor};

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny")
}

fn given() -> Inputs {
    let text = corpus::builtin()
        .iter()
        .map(|text| TextData { source: text.domain.into(), text: text.calib.into() })
        .collect();
    Inputs { models: vec![ModelInput::open("tiny", tiny()).unwrap()], text, ..Inputs::default() }
}

fn small(mut parameters: Value) -> Value {
    parameters["samples"] = json!(4);
    parameters["sequence_length"] = json!(64);
    parameters["rounds"] = json!(8);
    parameters["dtype"] = json!("f32");
    parameters
}

#[test]
fn the_packed_file_decodes_to_the_weights_and_counts_everything() {
    let dir = tempfile::tempdir().unwrap();
    let given = given();
    for (index, parameters) in
        [json!({"bits": 2}), json!({"bits": 3, "mode": "acc"})].into_iter().enumerate()
    {
        let out = dir.path().join(index.to_string());
        let done = apply("shiftaddllm", small(parameters), &given, &out, 0).unwrap();
        let file = out.join(packed::FILE_NAME);
        let matrices = packed::read(&file).unwrap();
        assert_eq!(matrices.len(), 5 * 7);
        for (name, packed) in &matrices {
            let (decoded, written) = (packed.decode(), tensor(&out, name));
            assert!(
                decoded.iter().zip(&written).all(|(a, b)| a.to_bits() == b.to_bits()),
                "{name}"
            );
        }
        let counted: u64 = matrices.values().map(packed::Packed::bytes).sum();
        assert_eq!(done.report["packed_bytes_quantized"].as_u64(), Some(counted));
        let header = u64::from_le_bytes(std::fs::read(&file).unwrap()[..8].try_into().unwrap());
        assert_eq!(std::fs::metadata(&file).unwrap().len(), 8 + header + counted);
    }
}

#[test]
fn a_mean_of_bits_is_kept_and_a_whole_one_is_uniform() {
    let dir = tempfile::tempdir().unwrap();
    let given = given();
    let run = |name: &str, parameters: Value| {
        let out = dir.path().join(name);
        let done = apply("shiftaddllm", small(parameters), &given, &out, 0).unwrap();
        (bytes(&out, "model.safetensors"), done.report["mean_bits"].as_f64().unwrap())
    };
    let (two, mean) = run("two", json!({"bits": 2}));
    assert_eq!(mean, 2.0);
    assert_eq!(run("mean two", json!({"mean_bits": 2})).0, two);
    let (_, mean) = run("mixed", json!({"mean_bits": 2.2}));
    assert!(mean <= 2.2 && mean > 2.15, "{mean}");
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let given = given();
    for mode in ["lat", "acc"] {
        let run = |threads: usize| {
            let out = dir.path().join(format!("{mode}{threads}"));
            apply("shiftaddllm", small(json!({"bits": 2, "mode": mode})), &given, &out, threads)
                .unwrap();
            (bytes(&out, "model.safetensors"), bytes(&out, packed::FILE_NAME))
        };
        assert_eq!(run(1), run(3));
    }
}

#[test]
fn what_cannot_be_done_is_said_before_anything_is_written() {
    let given = given();
    for (parameters, word) in [
        (json!({"bits": 5}), "2, 3 or 4"),
        (json!({"bits": 1}), "2, 3 or 4"),
        (json!({"mean_bits": 4.5}), "from 2 to 4"),
        (json!({"apot": 0}), "apot"),
        (json!({"group": 8}), "--mode acc"),
        (json!({"no_incoherence": true}), "--mode acc"),
        (json!({"mode": "acc", "group": 7}), "not divisible by group = 7"),
        (json!({"percdamp": -1.0}), "percdamp"),
        (json!({"samples": 0}), "samples"),
    ] {
        let error = plan("shiftaddllm", parameters, &given).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}
