//! Methods that change whole blocks, and what they say of activations, on the small model that travels with refit.

mod support;

use std::path::{Path, PathBuf};

use refit_data::corpus;
use refit_methods::method::{Inputs, ModelInput, TextData};
use refit_methods::quantize::activations;
use refit_nn::rounding::{Rounder, Rounding};
use refit_nn::{BurnDevice, Decoder};
use refit_store::Artifact;
use refit_train::eval::{CausalLm, Options, Reference, Rounded, Segment, perplexity};
use serde_json::{Value, json};
use support::{apply, bytes, inputs, plan, tensor};

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
    parameters["samples"] = json!(8);
    parameters["sequence_length"] = json!(64);
    parameters["dtype"] = json!("f32");
    parameters
}

/// Mean loss on held-out text, with activations rounded.
fn nll(path: &Path, rounder: &Rounder) -> f64 {
    let artifact = Artifact::open(path).unwrap();
    let tokenizer = refit_data::Tokenizer::from_artifact(&artifact).unwrap();
    let mut ids = tokenizer.encode(corpus::builtin()[1].eval, false).unwrap();
    ids.truncate(2048);
    let model = Decoder::load(&artifact, &BurnDevice::flex()).unwrap();
    let options = Options { resamples: 0, window: Some(128), ..Options::default() };
    let rounded = Rounded { model: &model, rounder };
    let runs: &dyn CausalLm = if rounder.is_empty() { &model } else { &rounded };
    let text = [Segment::new("man", ids)];
    perplexity(runs, &text, &options, Reference::None, &|_, _| {}).unwrap().nll
}

fn plain(path: &Path) -> f64 {
    nll(path, &Rounder::default())
}

fn stated(path: &Path) -> Rounder {
    activations::stated(&Artifact::open(path).unwrap()).unwrap()
}

#[test]
fn smoothing_alone_changes_nothing_and_lets_activations_be_rounded() {
    let dir = tempfile::tempdir().unwrap();
    let given = given();
    let (smooth, both) = (dir.path().join("smooth"), dir.path().join("both"));
    let output =
        apply("smoothquant", small(json!({"fold_only": true})), &given, &smooth, 0).unwrap();
    assert_eq!(output.report["folded"], json!(10));
    let before = plain(&tiny());
    assert!((plain(&smooth) - before).abs() < 1e-4, "{} {before}", plain(&smooth));
    assert!(stated(&smooth).is_empty());
    let norm = "model.layers.0.input_layernorm.weight";
    assert_ne!(tensor(&smooth, norm), tensor(&tiny(), norm));
    // W8A8 as it is stated, close to where it came from.
    apply("smoothquant", small(json!({})), &given, &both, 0).unwrap();
    let rounder = stated(&both);
    assert_eq!(rounder.roundings.len(), 35);
    assert!(rounder.roundings.values().all(|r| *r == Rounding::Token { bits: 8 }));
    let rounded = nll(&both, &rounder);
    assert!((rounded - before).abs() < 0.02, "{rounded} against {before}");
    assert_ne!(rounded, plain(&both));
}

#[test]
fn what_is_said_of_activations_survives_an_export() {
    let dir = tempfile::tempdir().unwrap();
    let (source, packed) = (dir.path().join("s"), dir.path().join("p"));
    apply("smoothquant", small(json!({})), &given(), &source, 0).unwrap();
    // Stated is enough; it need not be asked for.
    let parameters = json!({"to": "compressed-tensors"});
    apply("export", parameters, &inputs(&[&source]), &packed, 0).unwrap();
    assert_eq!(stated(&source), stated(&packed));
    let note = plan("export", json!({"to": "gptq"}), &inputs(&[&source])).unwrap().notes;
    assert!(note.iter().any(|note| note.contains("only --to compressed-tensors")), "{note:?}");
    let (a, b) = (nll(&source, &stated(&source)), nll(&packed, &stated(&packed)));
    assert!((a - b).abs() < 1e-6, "{a} {b}");
    let weights_alone = dir.path().join("w");
    let parameters = json!({"to": "compressed-tensors"});
    let rtn = dir.path().join("rtn");
    apply("rtn", json!({"bits": 8, "dtype": "f32"}), &given(), &rtn, 0).unwrap();
    apply("export", parameters, &inputs(&[&rtn]), &weights_alone, 0).unwrap();
    assert!(stated(&weights_alone).is_empty());
}

#[test]
fn fixed_scales_are_exported_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let (source, packed) = (dir.path().join("s"), dir.path().join("p"));
    let parameters = small(json!({"w_bits": 8, "a_bits": 8, "rounded": "linears"}));
    apply("repquant", parameters, &given(), &source, 0).unwrap();
    let to = json!({"to": "compressed-tensors"});
    let output = apply("export", to.clone(), &inputs(&[&source]), &packed, 0).unwrap();
    assert_eq!(output.report["proved"], json!(true));
    assert_eq!(stated(&source), stated(&packed));
    let artifact = Artifact::open(&packed).unwrap();
    assert_eq!(artifact.load_report().strays(), None);
    let group = &artifact.config().raw()["quantization_config"]["config_groups"]["group_0"];
    assert_eq!(group["input_activations"]["dynamic"], json!(false));
    // 4-bit activations have no word, and the plan says so.
    let four = dir.path().join("four");
    apply("repquant", small(json!({"w_bits": 8, "rounded": "norms"})), &given(), &four, 0).unwrap();
    let notes = plan("export", to, &inputs(&[&four])).unwrap().notes;
    assert!(notes.iter().any(|note| note.contains("no word")), "{notes:?}");
}

#[test]
fn awq_beats_rounding_on_its_grid_and_is_exported_with_its_codes() {
    let dir = tempfile::tempdir().unwrap();
    let given = given();
    let (awq, rtn) = (dir.path().join("awq"), dir.path().join("rtn"));
    let grid = json!({"bits": 2, "group": 64});
    let mut asymmetric = grid.clone();
    asymmetric["asymmetric"] = json!(true);
    asymmetric["dtype"] = json!("f32");
    let output = apply("awq", small(grid), &given, &awq, 0).unwrap();
    apply("rtn", asymmetric, &given, &rtn, 0).unwrap();
    assert_eq!(output.report["scaling"]["searches"], json!(20));
    assert!(output.report["scaling"]["mean_error_ratio"].as_f64().unwrap() < 1.0);
    let (found, rounded) = (plain(&awq), plain(&rtn));
    assert!(found < rounded, "awq {found}, rtn {rounded}");
    let exported = dir.path().join("gptq");
    let to = json!({"to": "gptq", "checkpoint_format": "gptq_v2"});
    let output = apply("export", to, &inputs(&[&awq]), &exported, 0).unwrap();
    assert_eq!(output.report["tensors_rounded"], json!(0));
}

#[test]
fn repquant_at_eight_bits_is_nearly_the_model_and_says_how_it_runs() {
    let dir = tempfile::tempdir().unwrap();
    let given = given();
    let out = dir.path().join("out");
    let parameters = small(json!({"w_bits": 8, "a_bits": 8}));
    let output = apply("repquant", parameters, &given, &out, 0).unwrap();
    let rounder = stated(&out);
    // 7 inputs of linears and 4 operands of attention in each of 5 blocks.
    assert_eq!(rounder.roundings.len(), 55);
    assert_eq!(output.report["activations"], json!(55));
    assert!(output.report["channel_spread"]["mean"].as_f64().unwrap() > 1.0);
    let of = |name: &str| rounder.roundings[name].clone();
    assert!(matches!(of("layers.0.attn.probs"), Rounding::LogSqrt2 { bits: 8, .. }));
    let q = of("model.layers.2.self_attn.q_proj:in");
    assert_eq!(q, of("model.layers.2.self_attn.v_proj:in"));
    // An RMSNorm takes no shift: the zero is the middle of the codes.
    assert!(matches!(q, Rounding::Tensor { bits: 8, zero: 128.0, .. }), "{q:?}");
    let (before, after) = (plain(&tiny()), nll(&out, &rounder));
    assert!((after - before).abs() < 0.05, "{after} against {before}");
    let packed = dir.path().join("packed");
    let to = json!({"to": "compressed-tensors"});
    let output = apply("export", to, &inputs(&[&out]), &packed, 0).unwrap();
    assert_eq!(output.report["tensors_rounded"], json!(0));
}

#[test]
fn scales_of_channels_beat_one_and_moving_them_loses_little() {
    let dir = tempfile::tempdir().unwrap();
    // Channels of different size, in the same function.
    let source = dir.path().join("source");
    spread(&source);
    let given = Inputs { models: vec![ModelInput::open("spread", &source).unwrap()], ..given() };
    let measure = |name: &str, more: Value| {
        let out = dir.path().join(name);
        let mut parameters = small(json!({"w_bits": 8, "a_bits": 6, "rounded": "norms"}));
        for (key, value) in more.as_object().unwrap() {
            parameters[key] = value.clone();
        }
        apply("repquant", parameters, &given, &out, 0).unwrap();
        nll(&out, &stated(&out))
    };
    let tensor = measure("tensor", json!({"norm_scales": "tensor"}));
    let channel = measure("channel", json!({"norm_scales": "channel"}));
    let moved = measure("reparam", json!({}));
    let clipped = measure("clip", json!({"clip": true, "clip_steps": 20}));
    let rebuilt = measure("reconstruct", json!({"reconstruct": true}));
    for (name, found) in [("reparam", moved), ("clip", clipped), ("reconstruct", rebuilt)] {
        assert!(found < tensor, "{name}: {found}, per tensor {tensor}");
        assert!(found < channel + 0.1, "{name}: {found}, per channel {channel}");
    }
}

/// The tiny model with channels of its norms up to 30 times apart, and the linears behind them scaled back.
fn spread(out: &Path) {
    let artifact = Artifact::open(tiny()).unwrap();
    let factor = |c: usize| 30f32.powf((c * 37 % 64) as f32 / 63.0);
    let specs: Vec<refit_store::TensorSpec> = artifact
        .tensors()
        .iter()
        .map(|info| refit_store::TensorSpec {
            name: info.name.clone(),
            shape: info.shape.clone(),
            dtype: refit_store::DType::F32,
        })
        .collect();
    let plan = refit_store::WritePlan {
        tensors: specs.clone(),
        side_files: artifact.side_files().to_vec(),
        identity: "spread".into(),
        force: true,
        ..refit_store::WritePlan::default()
    };
    let writer = refit_store::writer::ArtifactWriter::create(out, plan).unwrap();
    for spec in specs {
        let mut values = artifact.read_f32(&spec.name).unwrap();
        let site = artifact.architecture().site(&spec.name).unwrap();
        if spec.name.contains("layers.") && spec.name.contains("layernorm") {
            values.iter_mut().enumerate().for_each(|(c, v)| *v *= factor(c));
        } else if site.layer.is_some() && site.norm.is_some() {
            for row in values.chunks_mut(spec.shape[1]) {
                row.iter_mut().enumerate().for_each(|(c, v)| *v /= factor(c));
            }
        }
        writer.write_f32(&spec.name, 0, &values).unwrap();
        writer.done(&spec.name).unwrap();
    }
    let lineage = refit_store::Lineage::new("fixture", json!({}));
    writer.finish(lineage, refit_store::Card::new("fixture")).unwrap();
}

#[test]
fn threads_do_not_change_the_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let given = given();
    for (method, parameters) in [
        ("awq", json!({"group": 64, "grid": 4})),
        ("smoothquant", json!({})),
        ("repquant", json!({"clip": true, "clip_steps": 5, "reconstruct": true})),
        ("hqq", json!({})),
    ] {
        let run = |threads: usize| {
            let out = dir.path().join(format!("{method}-{threads}"));
            let parameters = match method {
                "hqq" => parameters.clone(),
                _ => small(parameters.clone()),
            };
            apply(method, parameters, &given, &out, threads).unwrap();
            let files = ["model.safetensors", "refit.quantization.json"];
            files.map(|name| bytes(&out, name))
        };
        assert_eq!(run(1), run(3), "{method}");
    }
}

/// A ViT with random weights, calibrated on a folder of pictures.
#[test]
fn a_vit_is_calibrated_on_images() {
    use refit_methods::labelled::{Labelled, Part};
    let dir = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../refit-nn/tests/fixtures");
    let model = root.join("hf/vit");
    let pictures = dir.path().join("pictures/one");
    std::fs::create_dir_all(&pictures).unwrap();
    let picture = root.join("efficientnet-lite0/shapes.png");
    for copy in ["a.png", "b.png", "c.png"] {
        std::fs::copy(&picture, pictures.join(copy)).unwrap();
    }
    let labelled = Labelled::open(&dir.path().join("pictures"), Part::Train).unwrap();
    let inputs = Inputs {
        models: vec![ModelInput::open("vit", &model).unwrap()],
        labelled: Some(labelled),
        ..Inputs::default()
    };
    let out = dir.path().join("out");
    apply("repquant", json!({"w_bits": 8, "a_bits": 8}), &inputs, &out, 0).unwrap();
    let artifact = Artifact::open(&model).unwrap();
    let patches =
        artifact.tensors().iter().find(|t| t.name.ends_with("projection.weight")).unwrap();
    assert_ne!(tensor(&model, &patches.name), tensor(&out, &patches.name));
    let biased = artifact.tensors().iter().find(|t| t.name.ends_with("layernorm_before.bias"));
    let biased = &biased.unwrap().name;
    assert_ne!(tensor(&model, biased), tensor(&out, biased), "zero points move into the norm");
    let rounder = stated(&out);
    assert!(rounder.roundings.keys().any(|name| name == "layers.1.attn.probs"));
    let run = |path: &Path, rounder: &Rounder| -> Vec<f32> {
        use burn::tensor::{Tensor, TensorData};
        let vision =
            refit_nn::vision::Vision::load(&Artifact::open(path).unwrap(), &BurnDevice::flex());
        let refit_nn::vision::Vision::Vit(vit) = vision.unwrap() else { panic!("a ViT") };
        // The picture that ranges were observed on.
        let artifact = Artifact::open(&model).unwrap();
        let preprocess = refit_data::images::Preprocess::from_artifact(&artifact).unwrap();
        let labelled = inputs.labelled.as_ref().unwrap();
        let (values, height, width) = preprocess.apply(&labelled.image(0).unwrap()).unwrap();
        let shape = [1, values.len() / (height * width), height, width];
        let images = Tensor::from_data(TensorData::new(values, shape), &BurnDevice::flex());
        let mut tap = rounder;
        refit_nn::ops::to_vec(&vit.forward(images, &mut refit_nn::Run::tapped(&mut tap)).unwrap())
    };
    let (before, after) = (run(&model, &Rounder::default()), run(&out, &rounder));
    let size = before.iter().fold(1f32, |most, x| most.max(x.abs()));
    for (a, b) in before.iter().zip(&after) {
        assert!((a - b).abs() < 0.1 * size, "{before:?} {after:?}");
    }
    // Text is no image, and no images are no data.
    let mut without = inputs.clone();
    without.labelled = None;
    let error = plan("repquant", json!({}), &without).unwrap_err().to_string();
    assert!(error.contains("--labelled"), "{error}");
}

#[test]
fn what_cannot_be_is_refused_before_work_starts() {
    let given = given();
    for (method, parameters, word) in [
        ("hqq", json!({"bits": 1}), "bits"),
        ("hqq", json!({"lp_norm": 0.0}), "lp_norm"),
        ("hqq", json!({"beta": -1.0}), "beta"),
        ("hqq", json!({"group": 100}), "divisible"),
        ("awq", json!({}), "group = 128"),
        ("awq", json!({"group": 64, "grid": 0}), "grid"),
        ("smoothquant", json!({"alpha": 1.5}), "alpha"),
        ("smoothquant", json!({"activation_bits": 1}), "activation_bits"),
        ("repquant", json!({"w_bits": 9}), "w_bits"),
        ("repquant", json!({"a_bits": 1}), "a_bits"),
        ("repquant", json!({"percentiles": [0.4]}), "percentiles"),
        ("repquant", json!({"percentiles": []}), "percentiles"),
        ("repquant", json!({"clip": true, "norm_scales": "tensor"}), "clip"),
        ("repquant", json!({"damping": 0.0}), "damping"),
        ("repquant", json!({"samples": 0}), "samples"),
    ] {
        let error = plan(method, parameters, &given).unwrap_err().to_string();
        assert!(error.contains(word), "{method}: {error}");
    }
    let bert = Path::new(env!("CARGO_MANIFEST_DIR")).join("../refit-nn/tests/fixtures/hf/bert");
    let bert = Inputs { models: vec![ModelInput::open("bert", bert).unwrap()], ..given.clone() };
    for method in ["awq", "smoothquant", "repquant"] {
        let error = plan(method, json!({"group": "row"}), &bert);
        let error = match error {
            Err(refit_methods::Error::UnknownParameter { .. }) => plan(method, json!({}), &bert),
            other => other,
        };
        let error = error.unwrap_err().to_string();
        assert!(error.contains("residual stream"), "{method}: {error}");
        let silent = Inputs { text: Vec::new(), ..given.clone() };
        let parameters = if method == "awq" { json!({"group": 64}) } else { json!({}) };
        let error = plan(method, parameters, &silent).unwrap_err().to_string();
        assert!(error.contains("--text"), "{method}: {error}");
    }
}
