//! Calibrated methods on the small model that travels with refit.

mod support;

use std::path::{Path, PathBuf};

use refit_data::corpus;
use refit_methods::method::{Inputs, ModelInput, TextData};
use refit_methods::prune::mask::Mask;
use refit_store::Artifact;
use serde_json::{Value, json};
use support::{apply, bytes, plan, tensor};

const WEIGHTS: &str = "model.safetensors";

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
    parameters
}

/// The linears of the tiny model, with rows and inputs.
fn linears() -> Vec<(String, usize, usize)> {
    let artifact = Artifact::open(tiny()).unwrap();
    let shape = |site: &refit_store::architecture::Site| {
        let (rows, inputs) = site.out_in().unwrap();
        (site.name.clone(), rows, inputs)
    };
    artifact.architecture().linears().map(shape).collect()
}

fn masks(out: &Path) -> Vec<(String, Mask)> {
    let file = Artifact::open(out.join("refit.masks.safetensors")).unwrap();
    linears()
        .into_iter()
        .map(|(name, rows, inputs)| {
            let mut stored = vec![0; rows * inputs.div_ceil(8)];
            file.read_raw_into(&name, 0, &mut stored).unwrap();
            let mask = Mask::from_bytes(rows, inputs, &stored).unwrap();
            (name, mask)
        })
        .collect()
}

#[test]
fn masks_are_exact_and_kept_weights_are_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let given = given();
    for (index, (method, parameters)) in [
        ("wanda", json!({"sparsity": 0.6})),
        ("wanda", json!({"pattern": "2:4"})),
        ("dsnot", json!({"sparsity": 0.6, "skip_layer": "no_skip"})),
        ("dsnot", json!({"sparsity": 0.6, "initial": "magnitude", "same_sign": true})),
        ("dsnot", json!({"sparsity": 0.6, "initial": "sparsegpt", "skip_layer": "no_skip"})),
        ("dsnot", json!({"pattern": "2:4", "initial": "magnitude", "skip_layer": "no_skip"})),
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.path().join(index.to_string());
        let grouped = parameters.get("pattern").is_some();
        let output = apply(method, small(parameters), &given, &out, 0).unwrap();
        for (name, mask) in masks(&out) {
            let expected = (mask.columns() as f64 * 0.6 + 1e-9) as usize;
            for row in 0..mask.rows() {
                if !grouped {
                    assert_eq!(mask.pruned_in_row(row), expected, "{method} {name} {row}");
                }
            }
            if grouped {
                assert_eq!(mask.violations(2, 4), 0, "{method} {name}");
            }
            let (before, after) = (tensor(&tiny(), &name), tensor(&out, &name));
            for (index, (before, after)) in before.iter().zip(&after).enumerate() {
                let keeps = mask.keeps(index / mask.columns(), index % mask.columns());
                let expected = if keeps { *before } else { 0.0 };
                assert_eq!(expected.to_bits(), after.to_bits(), "{method} {name} {index}");
            }
        }
        if method == "dsnot" {
            let refinement = &output.report["refinement"];
            assert!(refinement["swaps"].as_u64().unwrap() > 0, "{refinement}");
            let error = |key: &str| refinement[key].as_f64().unwrap();
            assert!(error("mean_error_after") < error("mean_error_before"), "{refinement}");
        }
    }
}

#[test]
fn dsnot_without_cycles_is_where_it_starts() {
    let dir = tempfile::tempdir().unwrap();
    let given = given();
    let run = |name: &str, method: &str, parameters: Value| {
        let out = dir.path().join(name);
        apply(method, small(parameters), &given, &out, 0).unwrap();
        bytes(&out, WEIGHTS)
    };
    let wanda = run("wanda", "wanda", json!({"sparsity": 0.5}));
    let still = json!({"sparsity": 0.5, "max_cycle": 0, "skip_layer": "no_skip"});
    assert_eq!(wanda, run("still", "dsnot", still));
    let patient = json!({"sparsity": 0.5, "update_threshold": 1e30, "skip_layer": "no_skip"});
    assert_eq!(wanda, run("patient", "dsnot", patient));
}

#[test]
fn sparsegpt_prunes_the_share_that_was_asked_and_moves_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("s");
    apply("sparsegpt", small(json!({"sparsity": 0.5})), &given(), &out, 0).unwrap();
    for (name, mask) in masks(&out) {
        assert!((mask.sparsity() - 0.5).abs() < 0.01, "{name}: {}", mask.sparsity());
        let (before, after) = (tensor(&tiny(), &name), tensor(&out, &name));
        let moved = before.iter().zip(&after).filter(|(b, a)| **a != 0.0 && a != b).count();
        assert!(moved > 0, "{name}");
        for (index, after) in after.iter().enumerate() {
            assert!(mask.keeps(index / mask.columns(), index % mask.columns()) || *after == 0.0);
        }
    }
}

#[test]
fn gptq_lies_on_its_grid_and_beats_rounding_on_held_out_text() {
    use refit_train::eval::{Options, Reference, Segment, perplexity};
    let dir = tempfile::tempdir().unwrap();
    let given = given();
    let (gptq, rtn) = (dir.path().join("gptq"), dir.path().join("rtn"));
    let parameters = json!({"bits": 2, "samples": 16, "sequence_length": 128});
    apply("gptq", parameters, &given, &gptq, 0).unwrap();
    apply("rtn", json!({"bits": 2}), &given, &rtn, 0).unwrap();
    for (name, _, inputs) in linears() {
        for row in tensor(&gptq, &name).chunks(inputs) {
            let mut levels: Vec<u32> = row.iter().map(|w| w.to_bits()).collect();
            levels.sort_unstable();
            levels.dedup();
            assert!(levels.len() <= 4, "{name}: {} levels", levels.len());
        }
    }
    let tokenizer = refit_data::Tokenizer::from_artifact(&given.models[0].artifact).unwrap();
    let mut ids = tokenizer.encode(corpus::builtin()[1].eval, false).unwrap();
    ids.truncate(2048);
    let text = [Segment::new("man", ids)];
    let measure = |path: &Path| {
        let artifact = Artifact::open(path).unwrap();
        let model = refit_nn::Decoder::load(&artifact, &refit_nn::BurnDevice::flex()).unwrap();
        let options = Options { resamples: 0, window: Some(128), ..Options::default() };
        perplexity(&model, &text, &options, Reference::None, &|_, _| {}).unwrap().nll
    };
    let (gptq, rtn) = (measure(&gptq), measure(&rtn));
    assert!(gptq < rtn, "gptq {gptq}, rtn {rtn}");
}

#[test]
fn threads_do_not_change_the_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let given = given();
    let run = |name: &str, method: &str, threads| {
        let out = dir.path().join(name);
        apply(method, small(json!({})), &given, &out, threads).unwrap();
        bytes(&out, WEIGHTS)
    };
    for method in ["dsnot", "sparsegpt"] {
        let one = run(&format!("{method}1"), method, 1);
        assert_eq!(one, run(&format!("{method}3"), method, 3), "{method}");
    }
}

#[test]
fn too_little_text_and_impossible_numbers_are_refused() {
    let mut given = given();
    for (method, parameters, word) in [
        ("wanda", json!({"samples": 0}), "samples"),
        ("wanda", json!({"sequence_length": 1}), "sequence_length"),
        ("wanda", json!({"pattern": "global"}), "one after the other"),
        ("dsnot", json!({"pattern": "tensor"}), "within a row"),
        ("dsnot", json!({"update_threshold": -1.0}), "update_threshold"),
        ("gptq", json!({"percdamp": -1.0}), "percdamp"),
        ("sparsegpt", json!({"block_size": 0}), "block_size"),
        ("sparsegpt", json!({"pattern": "2:4", "block_size": 6}), "multiple of M"),
    ] {
        let error = plan(method, parameters, &given).unwrap_err().to_string();
        assert!(error.contains(word), "{method}: {error}");
    }
    given.text = vec![TextData { source: "short.txt".into(), text: "a few words".into() }];
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let error = apply("wanda", json!({}), &given, &out, 0).unwrap_err().to_string();
    assert!(error.contains("short.txt") && error.contains("--sequence-length"), "{error}");
    assert!(!out.exists());
    given.text[0].text = "  \n".into();
    let error = plan("wanda", json!({}), &given).unwrap_err().to_string();
    assert!(error.contains("empty"), "{error}");
}

#[test]
fn greedy_soups_are_no_worse_than_their_best_ingredient() {
    let dir = tempfile::tempdir().unwrap();
    let base = given();
    // Two damaged copies of the model as ingredients: rounding at 4 and at 2 bits.
    let (fine, coarse) = (dir.path().join("fine"), dir.path().join("coarse"));
    apply("rtn", json!({"bits": 4}), &base, &fine, 0).unwrap();
    apply("rtn", json!({"bits": 2}), &base, &coarse, 0).unwrap();
    let open = |name: &str, path: &Path| ModelInput::open(name, path).unwrap();
    let models = vec![open("coarse", &coarse), open("fine", &fine), open("tiny", &tiny())];
    let inputs = Inputs { models, text: vec![base.text[1].clone()], ..Inputs::default() };
    let out = dir.path().join("soup");
    let parameters = json!({"mode": "greedy", "max_tokens": 512});
    let output = apply("model-soups", parameters, &inputs, &out, 0).unwrap();
    let recipe = &output.report["recipe"];
    let best = recipe["score"].as_f64().unwrap();
    for step in recipe["steps"].as_array().unwrap() {
        assert!(best >= step["alone"].as_f64().unwrap(), "{recipe}");
    }
    assert!(out.join(WEIGHTS).exists());

    // The best two are the soup of the two that were damaged least.
    let (best, pair) = (dir.path().join("best"), dir.path().join("pair"));
    let parameters = json!({"mode": "maximum", "best": 2, "max_tokens": 512});
    let report = apply("model-soups", parameters, &inputs, &best, 0).unwrap().report;
    assert_eq!(report["kept"], json!([2, 1]), "{report}");
    let two = Inputs { models: inputs.models[1..].to_vec(), ..Inputs::default() };
    apply("model-soups", json!({}), &two, &pair, 0).unwrap();
    let weights = |path: &Path| std::fs::read(path.join(WEIGHTS)).unwrap();
    assert!(weights(&best) == weights(&pair));
}
