//! Methods that touch weights alone, from a directory to a directory.

mod support;

use refit_methods::method::Context;
use refit_methods::prune::mask::Mask;
use refit_methods::rewrite;
use refit_store::architecture::Site;
use refit_store::{Artifact, DType};
use serde_json::{Value, json};
use support::{apply, bytes, inputs, model, plan, tensor};

const WEIGHTS: &str = "model.safetensors";
const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn finequant_at_its_ends_is_rtn_bit_for_bit() {
    let dir = scratch();
    let source = model(&dir.path().join("m"), 1, DType::F32, |_, _| {});
    let given = inputs(&[&source]);
    let run = |name: &str, method: &str, parameters: Value| {
        let out = dir.path().join(name);
        apply(method, parameters, &given, &out, 0).unwrap();
        bytes(&out, WEIGHTS)
    };
    let row = run("row", "rtn", json!({"group": "row"}));
    assert_eq!(row, run("one", "finequant", json!({"alpha": 1.0})));
    let fine = run("g32", "rtn", json!({"group": 32}));
    assert_eq!(fine, run("zero", "finequant", json!({"alpha": 0.0})));
    assert_ne!(row, fine);
}

#[test]
fn what_is_not_a_linear_is_left_alone_and_the_record_counts_everything() {
    let dir = scratch();
    let source = model(&dir.path().join("m"), 2, DType::BF16, |_, _| {});
    let out = dir.path().join("q");
    let output =
        apply("rtn", json!({"bits": 4, "group": 32}), &inputs(&[&source]), &out, 0).unwrap();
    for name in ["model.embed_tokens.weight", "model.norm.weight"] {
        assert_eq!(tensor(&source, name), tensor(&out, name));
    }
    assert_ne!(tensor(&source, DOWN), tensor(&out, DOWN));
    assert_eq!(output.report["bits_per_weight"], json!(4.5));
    assert_eq!(output.report["quantized_tensors"], json!(14));
    let artifact = Artifact::open(&out).unwrap();
    assert_eq!(artifact.tensor(DOWN).unwrap().dtype, DType::BF16);
    let record: Value = serde_json::from_slice(&bytes(&out, "refit.quantization.json")).unwrap();
    assert_eq!(record["tensors"][DOWN]["group"], json!(32));
    assert_eq!(record["tensors"][DOWN]["packed_bytes"], json!(96 * 192 / 2 + 2 * 96 * 6));
    assert!(out.join("refit.lineage.json").exists() && out.join("README.md").exists());
}

#[test]
fn a_budget_is_kept() {
    let dir = scratch();
    let source = model(&dir.path().join("m"), 3, DType::F32, |name, values| {
        if name.contains("v_proj") {
            values.iter_mut().step_by(97).for_each(|v| *v *= 40.0);
        }
    });
    let given = inputs(&[&source]);
    let out = dir.path().join("q");
    let output = apply("finequant", json!({"target_bpw": 4.3}), &given, &out, 0).unwrap();
    let bits = output.report["bits_per_weight"].as_f64().unwrap();
    assert!(bits <= 4.3 && bits > 4.25, "{bits}");
    assert_eq!(output.report["groups"]["model.layers.0.self_attn.v_proj.weight"], json!(32));
    let error = plan("finequant", json!({"target_bpw": 4.01}), &given).unwrap_err().to_string();
    assert!(error.contains("target_bpw") && error.contains("at least 4.1"), "{error}");
}

#[test]
fn any_number_of_threads_gives_the_same_files() {
    let dir = scratch();
    let source = model(&dir.path().join("m"), 4, DType::F32, |_, _| {});
    let given = inputs(&[&source]);
    for (method, parameters, files) in [
        ("finequant", json!({"criterion": "mse"}), &[WEIGHTS, "refit.quantization.json"][..]),
        ("magnitude", json!({"pattern": "global"}), &[WEIGHTS, "refit.masks.safetensors"][..]),
        ("model-soups", json!({}), &[WEIGHTS][..]),
    ] {
        let outs = [1, 3].map(|threads| {
            let out = dir.path().join(format!("{method}-{threads}"));
            apply(method, parameters.clone(), &given, &out, threads).unwrap();
            out
        });
        for file in files.iter().chain(&["refit.lineage.json"]) {
            assert_eq!(bytes(&outs[0], file), bytes(&outs[1], file), "{method} {file}");
        }
    }
}

#[test]
fn an_interrupted_run_goes_on_and_gives_the_same_bytes() {
    let dir = scratch();
    let source = model(&dir.path().join("m"), 5, DType::F32, |_, _| {});
    let given = inputs(&[&source]);
    let plan = plan("rtn", json!({}), &given).unwrap();
    let halve = |_: &Site, weights: &mut [f32]| {
        weights.iter_mut().for_each(|w| *w *= 0.5);
        Ok(())
    };
    let fail_at_down = |site: &Site, weights: &mut [f32]| {
        if site.name == DOWN {
            return Err(refit_methods::Error::tensor("m", DOWN, "the power went out"));
        }
        halve(site, weights)
    };
    let finally = || Ok((Vec::new(), json!({})));
    let (broken, whole) = (dir.path().join("a"), dir.path().join("b"));
    let cx = Context::new(&broken);
    let error = rewrite::rewrite(&given, &plan, &cx, &fail_at_down, finally).unwrap_err();
    assert!(error.to_string().contains("power") && !broken.exists());
    rewrite::rewrite(&given, &plan, &cx, &halve, finally).unwrap();
    rewrite::rewrite(&given, &plan, &Context::new(&whole), &halve, finally).unwrap();
    assert_eq!(bytes(&broken, WEIGHTS), bytes(&whole, WEIGHTS));
}

#[test]
fn magnitude_prunes_exactly_and_saves_what_it_did() {
    let dir = scratch();
    // Ties everywhere, as in a dequantized file.
    let source = model(&dir.path().join("m"), 6, DType::F32, |_, values| {
        values.iter_mut().for_each(|v| *v = (*v * 40.0).round() / 40.0);
    });
    let given = inputs(&[&source]);
    let linears: usize = 2 * (2 * 96 * 96 + 2 * 48 * 96 + 3 * 96 * 192);
    for (pattern, sparsity, expected) in [
        ("row", 0.6, 2 * (57 * (96 + 48 + 48 + 96 + 192 + 192) + 115 * 96)),
        ("tensor", 0.6, 2 * (2 * 5529 + 2 * 2764 + 3 * 11059)),
        ("global", 0.6, (linears as f64 * 0.6 + 1e-9) as usize),
        ("2:4", 0.5, linears / 2),
    ] {
        let out = dir.path().join(pattern.replace(':', "-"));
        let parameters = json!({"pattern": pattern, "sparsity": sparsity});
        let output = apply("magnitude", parameters, &given, &out, 0).unwrap();
        assert_eq!(output.report["pruned"], json!(expected), "{pattern}");
        let masks = Artifact::open(out.join("refit.masks.safetensors")).unwrap();
        let (before, after) = (tensor(&source, DOWN), tensor(&out, DOWN));
        let mut stored = vec![0; 96 * 192 / 8];
        masks.read_raw_into(DOWN, 0, &mut stored).unwrap();
        let mask = Mask::from_bytes(96, 192, &stored).unwrap();
        for (index, (before, after)) in before.iter().zip(&after).enumerate() {
            let expected = if mask.keeps(index / 192, index % 192) { *before } else { 0.0 };
            assert_eq!(expected.to_bits(), after.to_bits(), "{pattern} {index}");
        }
        if pattern == "2:4" {
            assert_eq!(mask.violations(2, 4), 0);
        }
    }
}

#[test]
fn no_sparsity_is_the_identity() {
    let dir = scratch();
    let source = model(&dir.path().join("m"), 7, DType::F32, |_, _| {});
    let out = dir.path().join("p");
    apply("magnitude", json!({"sparsity": 0.0}), &inputs(&[&source]), &out, 0).unwrap();
    assert_eq!(bytes(&source, WEIGHTS), bytes(&out, WEIGHTS));
}

#[test]
fn errors_come_before_anything_is_written() {
    let dir = scratch();
    let source = model(&dir.path().join("m"), 8, DType::F32, |_, _| {});
    let given = inputs(&[&source]);
    for (method, parameters, words) in [
        ("rtn", json!({"bits": 1}), &["bits", "2 to 8"][..]),
        ("rtn", json!({"group": 64}), &["_proj", "in = 96", "group = 64", "32, 48"][..]),
        ("rtn", json!({"scheme": "log2", "asymmetric": true}), &["zero point", "--scheme"][..]),
        ("hqq", json!({"bits": 9}), &["bits", "2 to 8"][..]),
        ("hqq", json!({"group": 64}), &["_proj", "in = 96", "32, 48"][..]),
        ("hqq", json!({"group": 32, "lp_norm": 0.0}), &["lp_norm", "above 0"][..]),
        ("hqq", json!({"group": 32, "beta": -1.0}), &["beta", "positive"][..]),
        ("finequant", json!({"g_min": 64}), &["96", "64", "48"][..]),
        ("finequant", json!({"g_min": 32, "g_max": 16}), &["g_max", "32"][..]),
        ("magnitude", json!({"sparsity": 1.0}), &["sparsity", "not including 1"][..]),
        ("magnitude", json!({"sparsity": -0.1}), &["sparsity"][..]),
        ("magnitude", json!({"pattern": "5:7"}), &["groups of 7", "96"][..]),
        ("magnitude", json!({"patern": "row"}), &["patern", "did you mean `pattern`"][..]),
        ("wanda", json!({}), &["wanda", "calibration text", "--text"][..]),
        ("model-soups", json!({"mode": "greedy"}), &["held-out", "--text"][..]),
        ("model-soups", json!({"mode": "wise-ft"}), &["exactly 2 models"][..]),
        ("model-soups", json!({"mode": "maximum"}), &["best", "1 to 1", "3"][..]),
    ] {
        let error = plan(method, parameters.clone(), &given).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{method} {parameters}: {error}");
        }
    }
}

#[test]
fn a_value_that_is_not_finite_is_found_and_named() {
    let dir = scratch();
    let source = model(&dir.path().join("m"), 9, DType::F32, |name, values| {
        if name == DOWN {
            values[17] = f32::NAN;
        }
    });
    for method in ["rtn", "hqq", "finequant", "magnitude"] {
        let out = dir.path().join(method);
        let parameters = if method == "hqq" { json!({"group": "row"}) } else { json!({}) };
        let error =
            apply(method, parameters, &inputs(&[&source]), &out, 0).unwrap_err().to_string();
        assert!(error.contains(DOWN) && error.contains("index 17"), "{method}: {error}");
        assert!(!out.exists());
    }
}
