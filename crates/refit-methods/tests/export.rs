//! Exports: the same weights in every format, and clear refusals where a format has no word for them.

mod support;

use std::path::{Path, PathBuf};

use refit_methods::method::{Inputs, Output};
use refit_store::{Artifact, DType, GgmlType};
use serde_json::{Value, json};
use support::{apply, bytes, inputs, model, plan, tensor};

const Q: &str = "model.layers.1.self_attn.q_proj.weight";
const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

fn linears(dir: &Path) -> Vec<(String, Vec<f32>)> {
    let artifact = Artifact::open(dir).unwrap();
    let read = |name: &str| (name.to_owned(), artifact.read_f32(name).unwrap());
    artifact.architecture().linears().map(|site| read(&site.name)).collect()
}

/// A tiny model, quantized by refit.
fn quantized(dir: &Path, dtype: DType, method: &str, parameters: Value) -> PathBuf {
    let source = model(&dir.join("m"), 7, dtype, |name, values| {
        if name.contains("v_proj") {
            values.iter_mut().step_by(41).for_each(|v| *v *= 20.0);
        }
    });
    let out = dir.join("q");
    apply(method, parameters, &inputs(&[&source]), &out, 0).unwrap();
    out
}

fn export(source: &Path, out: &Path, parameters: Value) -> refit_methods::Result<Output> {
    apply("export", parameters, &inputs(&[source]), out, 0)
}

/// Every format says the values that refit's quantizers left, and the proof counts them.
#[test]
fn the_same_codes_decode_to_the_same_weights_in_every_format() {
    for (method, parameters) in [
        ("rtn", json!({"bits": 4, "group": 32})),
        ("rtn", json!({"bits": 3, "group": "row"})),
        ("rtn", json!({"bits": 8, "group": 96})),
        ("rtn", json!({"bits": 4, "group": 32, "asymmetric": true})),
        ("rtn", json!({"bits": 2, "group": 48})),
        ("rtn", json!({"bits": 4, "group": 32, "scale_rule": "best"})),
        ("finequant", json!({"bits": 4, "target_bpw": 4.3})),
        ("hqq", json!({"bits": 4, "group": 32})),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let source = quantized(dir.path(), DType::F32, method, parameters.clone());
        let expected = linears(&source);
        for to in [
            json!({"to": "gguf"}),
            json!({"to": "compressed-tensors"}),
            json!({"to": "gptq", "checkpoint_format": "gptq_v2"}),
            json!({"to": "safetensors"}),
        ] {
            let out = dir.path().join(to["to"].as_str().unwrap());
            let output = export(&source, &out, to.clone()).unwrap();
            assert_eq!(output.report["proved"], json!(true));
            assert_eq!(output.report["tensors_rounded"], json!(0), "{method} {parameters} {to}");
            let found = linears(&out);
            for ((name, a), (other, b)) in expected.iter().zip(&found) {
                assert_eq!(name, other);
                assert!(a == b, "{method} {parameters} {to}: {name}");
            }
            assert_eq!(expected.len(), found.len());
            assert_eq!(tensor(&source, "model.norm.weight"), tensor(&out, "model.norm.weight"));
        }
    }
}

#[test]
fn weights_stored_in_half_the_bits_keep_their_codes() {
    let dir = tempfile::tempdir().unwrap();
    let source = quantized(dir.path(), DType::BF16, "rtn", json!({"bits": 4, "group": 32}));
    let [gguf, packed, gptq] = ["gguf", "compressed-tensors", "gptq"].map(|to| {
        let out = dir.path().join(to);
        export(&source, &out, json!({ "to": to })).unwrap();
        linears(&out)
    });
    assert!(gguf == packed && packed == gptq);
    for ((name, stored), (_, exact)) in linears(&source).iter().zip(&gguf) {
        let rounded = exact.iter().map(|x| half::bf16::from_f32(*x).to_f32());
        assert!(rounded.eq(stored.iter().copied()), "{name}");
    }
}

#[test]
fn a_packed_directory_is_a_source_like_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let source = quantized(dir.path(), DType::F32, "rtn", json!({"bits": 4, "group": 32}));
    let mut from = source.clone();
    for (at, to) in ["gptq", "compressed-tensors", "gguf", "gptq", "safetensors"].iter().enumerate()
    {
        let out = dir.path().join(format!("{at}"));
        let output = export(&from, &out, json!({ "to": to })).unwrap();
        assert_eq!(output.report["tensors_rounded"], json!(0));
        assert!(linears(&source) == linears(&out), "{to}");
        from = out;
    }
    // And methods decode it, leaving no settings of codes behind.
    let out = dir.path().join("again");
    apply("rtn", json!({"bits": 3}), &inputs(&[&dir.path().join("1")]), &out, 0).unwrap();
    let config = String::from_utf8(bytes(&out, "config.json")).unwrap();
    assert!(!config.contains("quantization_config"));
    assert_eq!(Artifact::open(&out).unwrap().packed(), None);
}

#[test]
fn gguf_types_are_the_smallest_that_hold_the_grid() {
    let dir = tempfile::tempdir().unwrap();
    for (parameters, expected) in [
        (json!({"bits": 4, "group": 32}), DType::Ggml(GgmlType::Q4_0)),
        (json!({"bits": 3, "group": 96}), DType::Ggml(GgmlType::Q4_0)),
        (json!({"bits": 8, "group": 32}), DType::Ggml(GgmlType::Q8_0)),
        (json!({"bits": 4, "group": 32, "asymmetric": true}), DType::Ggml(GgmlType::Q5_0)),
        // 48 inputs are no whole blocks: the source's type.
        (json!({"bits": 4, "group": 48}), DType::F32),
    ] {
        let source = quantized(dir.path(), DType::F32, "rtn", parameters.clone());
        let given = inputs(&[&source]);
        let plan = plan("export", json!({}), &given).unwrap();
        let down = plan.tensors.iter().find(|t| t.name == "blk.1.ffn_down.weight").unwrap();
        assert_eq!(down.dtype, expected.to_string(), "{parameters}");
        let noted = plan.notes.iter().any(|note| note.contains("multiples of 32"));
        assert_eq!(noted, expected == DType::F32, "{:?}", plan.notes);
        std::fs::remove_dir_all(source).unwrap();
        std::fs::remove_dir_all(dir.path().join("m")).unwrap();
    }
}

#[test]
fn explicit_types_round_and_fall_back_as_the_plan_says() {
    let dir = tempfile::tempdir().unwrap();
    let source = model(&dir.path().join("m"), 3, DType::BF16, |_, _| {});
    let given = inputs(&[&source]);
    // 96 and 192 are no multiples of 256.
    let planned = plan("export", json!({"type": "Q4_K"}), &given).unwrap();
    assert!(planned.notes.iter().any(|note| note.contains("Q4_K") && note.contains("Q5_0")));
    let out = dir.path().join("out");
    let output = export(&source, &out, json!({"type": "Q4_K"})).unwrap();
    let artifact = Artifact::open(&out).unwrap();
    assert_eq!(artifact.tensor(Q).unwrap().dtype, DType::Ggml(GgmlType::Q5_0));
    let embedding = artifact.tensor("model.embed_tokens.weight").unwrap();
    assert_eq!(embedding.dtype, DType::Ggml(GgmlType::Q8_0));
    assert_eq!(artifact.tensor("model.norm.weight").unwrap().dtype, DType::F32);
    assert!(artifact.load_report().is_clean(), "{}", artifact.load_report());
    let error = output.report["relative_error"].as_f64().unwrap();
    assert!(error > 1e-5 && error < 5e-3, "{error}");
    // Rows of heads come back in Hugging Face's order.
    let (before, after) = (tensor(&source, Q), tensor(&out, Q));
    let off: f32 = before.iter().zip(&after).map(|(a, b)| (a - b).powi(2)).sum();
    assert!(off < 5e-3 * before.iter().map(|x| x * x).sum::<f32>());
    // Float types say what they can.
    let out = dir.path().join("bf16");
    let output = export(&source, &out, json!({"type": "BF16"})).unwrap();
    assert_eq!(output.report["tensors_rounded"], json!(0));
    assert_eq!(tensor(&source, DOWN), tensor(&out, DOWN));
    let card = String::from_utf8(bytes(&out, "README.md")).unwrap();
    assert!(card.contains("gguf"), "{card}");
    assert!(out.join("refit.lineage.json").exists() && !out.join("config.json").exists());
}

#[test]
fn what_a_format_cannot_say_is_refused_before_work() {
    let dir = tempfile::tempdir().unwrap();
    let source = model(&dir.path().join("m"), 5, DType::F32, |_, _| {});
    let refused = |given: &Inputs, parameters: Value, words: &[&str]| {
        let error = plan("export", parameters, given).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{error}");
        }
    };
    for to in ["gptq", "compressed-tensors"] {
        refused(&inputs(&[&source]), json!({ "to": to }), &["refit apply rtn", "14 linears"]);
    }
    refused(&inputs(&[&source]), json!({"to": "gptq", "type": "F16"}), &["--type"]);
    // Powers of two are no equal steps.
    let log = dir.path().join("log");
    apply("rtn", json!({"bits": 4, "scheme": "log2"}), &inputs(&[&source]), &log, 0).unwrap();
    refused(&inputs(&[&log]), json!({"to": "compressed-tensors"}), &["equal steps"]);
    // Zero point 0 has no word in version 1 of GPTQ.
    let positive = model(&dir.path().join("p"), 6, DType::F32, |_, values| {
        values.iter_mut().for_each(|v| *v = v.abs() + 0.1);
    });
    let asymmetric = dir.path().join("a");
    let parameters = json!({"bits": 4, "group": 32, "asymmetric": true});
    apply("rtn", parameters, &inputs(&[&positive]), &asymmetric, 0).unwrap();
    let given = inputs(&[&asymmetric]);
    refused(&given, json!({"to": "gptq"}), &["zero point 0", "gptq_v2"]);
    plan("export", json!({"to": "gptq", "checkpoint_format": "gptq_v2"}), &given).unwrap();
    refused(&given, json!({"to": "compressed-tensors", "layout": "int-quantized"}), &["8 bits"]);
}

#[test]
fn eight_bits_with_eight_bit_activations_are_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let source = quantized(dir.path(), DType::F32, "rtn", json!({"bits": 8}));
    let out = dir.path().join("w8a8");
    export(&source, &out, json!({"to": "compressed-tensors", "activations": "int8"})).unwrap();
    let config: Value = serde_json::from_slice(&bytes(&out, "config.json")).unwrap();
    let settings = &config["quantization_config"];
    assert_eq!(settings["format"], json!("int-quantized"));
    let group = &settings["config_groups"]["group_0"];
    assert_eq!(group["input_activations"]["strategy"], json!("token"));
    assert_eq!(group["weights"]["strategy"], json!("channel"));
    assert_eq!(settings["ignore"], json!(["lm_head"]));
    assert!(linears(&source) == linears(&out));
}

#[test]
fn mixed_groups_become_several_configuration_groups_or_one_group() {
    let dir = tempfile::tempdir().unwrap();
    let source =
        quantized(dir.path(), DType::F32, "finequant", json!({"bits": 4, "target_bpw": 4.3}));
    let record: Value = serde_json::from_slice(&bytes(&source, "refit.quantization.json")).unwrap();
    let sizes = record["summary"]["tensors_by_group"].as_object().unwrap().len();
    assert!(sizes > 1, "{record}");
    let out = dir.path().join("ct");
    export(&source, &out, json!({"to": "compressed-tensors"})).unwrap();
    let config: Value = serde_json::from_slice(&bytes(&out, "config.json")).unwrap();
    let groups = config["quantization_config"]["config_groups"].as_object().unwrap();
    assert!(groups.len() >= sizes);
    let planned = plan("export", json!({"to": "gptq"}), &inputs(&[&source])).unwrap();
    assert!(
        planned.notes.iter().any(|note| note.contains("one group size")),
        "{:?}",
        planned.notes
    );
}

#[test]
fn the_tokenizer_of_a_directory_comes_back_from_gguf() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("g");
    export(&tiny, &out, json!({"type": "Q8_0"})).unwrap();
    let (before, after) = (Artifact::open(&tiny).unwrap(), Artifact::open(&out).unwrap());
    let json = |artifact: &Artifact| -> Value {
        serde_json::from_slice(&artifact.tokenizer_json().unwrap().unwrap()).unwrap()
    };
    let (before_json, after_json) = (json(&before), json(&after));
    for key in ["vocab", "merges", "ignore_merges"] {
        assert_eq!(before_json["model"][key], after_json["model"][key], "{key}");
    }
    assert_eq!(before_json["pre_tokenizer"], after_json["pre_tokenizer"]);
    assert_eq!(before_json["added_tokens"], after_json["added_tokens"]);
    for key in [
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "bos_token_id",
        "eos_token_id",
    ] {
        assert_eq!(before.config().usize(key), after.config().usize(key), "{key}");
    }
    assert_eq!(after.config().f64("rope_theta"), Some(10000.0));
    assert_eq!(after.config().f64("rms_norm_eps"), Some(1e-5));
    assert!(after.load_report().is_clean(), "{}", after.load_report());
    // From GGUF to GGUF, blocks are copied.
    let again = dir.path().join("again");
    export(&out, &again, json!({})).unwrap();
    let weights = |dir: &Path| Artifact::open(dir).unwrap().content_hash().unwrap();
    assert_eq!(weights(&out), weights(&again));
    assert_eq!(json(&Artifact::open(&again).unwrap()), after_json);
}

#[test]
fn any_number_of_threads_gives_the_same_file() {
    let dir = tempfile::tempdir().unwrap();
    let source = quantized(dir.path(), DType::F32, "rtn", json!({"bits": 4, "group": 32}));
    let given = inputs(&[&source]);
    let [one, four] = [1, 4].map(|threads| {
        let out = dir.path().join(format!("t{threads}"));
        apply("export", json!({}), &given, &out, threads).unwrap();
        bytes(&out, "model.gguf")
    });
    assert!(one == four);
}
