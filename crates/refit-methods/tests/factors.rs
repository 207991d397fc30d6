//! Thin factors and compensations of models whose matrices are stored the other way round, and of damaged ones.

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use refit_methods::method::{AdapterInput, Inputs, ModelInput, TextData, TrainingData};
use refit_nn::load::Weights;
use refit_nn::{BurnDevice, Decoder, Run, ops};
use refit_store::adapter::Adapter;
use refit_store::{Artifact, DType};
use serde_json::{Map, Value, json};
use support::{apply, inputs, model, plan};

/// A GPT-2 of random weights, `[in, out]` as its family stores them, with a word for each of its tokens.
fn gpt2(dir: &Path) -> PathBuf {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../refit-nn/tests/fixtures/hf/gpt2");
    let out = dir.join("gpt2");
    std::fs::create_dir(&out).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture.join(name), out.join(name)).unwrap();
    }
    let words: Map<String, Value> = (0..64).map(|i| (format!("w{i}"), json!(i))).collect();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "decoder": null,
        "truncation": null, "padding": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" },
        "model": { "type": "WordLevel", "vocab": words, "unk_token": "w0" },
    });
    std::fs::write(out.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    out
}

fn square(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x).powi(2)).sum()
}

/// `||a - b||^2 / ||a||^2`.
fn lost(a: &[f32], b: &[f32]) -> f64 {
    let rest: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    square(&rest) / square(a)
}

fn logits(path: &Path, weights: Weights) -> Vec<f32> {
    let artifact = Artifact::open(path).unwrap();
    let model = Decoder::load_as(&artifact, &BurnDevice::flex(), weights).unwrap();
    ops::to_vec(&model.forward(&[5, 9, 1, 30, 7, 7, 2, 31], 1, &mut Run::plain()).unwrap())
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn pairs_lose_what_their_report_says_in_either_orientation() {
    let dir = tempfile::tempdir().unwrap();
    for source in [gpt2(dir.path()), model(&dir.path().join("llama"), 3, DType::F32, |_, _| {})] {
        let out = source.with_extension("pairs");
        let report =
            apply("svd", json!({"ratio": 1.3}), &inputs(&[&source]), &out, 0).unwrap().report;
        let (before, after) = (Artifact::open(&source).unwrap(), Artifact::open(&out).unwrap());
        let mut count = 0;
        for site in before.architecture().linears() {
            let (a, b) =
                (before.read_f32(&site.name).unwrap(), after.read_f32(&site.name).unwrap());
            assert_eq!(after.tensor(&site.name).unwrap().shape, site.shape);
            match report["relative_errors"][&site.name].as_f64() {
                Some(said) => assert!((lost(&a, &b) - said).abs() < 1e-5, "{}: {said}", site.name),
                None => assert!(a == b, "{}", site.name),
            }
            count += usize::from(after.stored_in_factors(&site.name));
        }
        assert_eq!(report["factorized_matrices"], count);
        // Running the pairs is running their product.
        let (product, pairs) = (logits(&out, Weights::Float), logits(&out, Weights::Packed));
        assert!(apart(&product, &pairs) < 1e-4 * product.iter().fold(1.0, |m, x| x.abs().max(m)));
        assert!(apart(&product, &logits(&source, Weights::Float)) > 1e-3);
    }
}

#[test]
fn pairs_stored_the_other_way_round_are_tuned_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let source = gpt2(dir.path());
    let (pairs, tuned) = (dir.path().join("pairs"), dir.path().join("tuned"));
    apply("svd", json!({}), &inputs(&[&source]), &pairs, 0).unwrap();
    let text = TextData { source: "lesson".into(), text: "w5 w9 w12 w30 w7 w48 w3 ".repeat(40) };
    let lesson = Inputs { data: vec![TrainingData::Text(text)], ..inputs(&[&pairs]) };
    let [before, after] = [&["*ln_f*"][..], &["*mlp*"]].map(|train| {
        let parameters = json!({
            "train": train, "steps": 2, "batch": 2, "max_length": 16, "learning_rate": 1e-2,
        });
        let _ = std::fs::remove_dir_all(&tuned);
        apply("fine-tune", parameters, &lesson, &tuned, 0).unwrap();
        Artifact::open(&tuned).unwrap().factors("transformer.h.0.mlp.c_fc.weight").unwrap().unwrap()
    });
    let start = Artifact::open(&pairs).unwrap();
    let start = start.factors("transformer.h.0.mlp.c_fc.weight").unwrap().unwrap();
    assert!(before == start, "frozen factors are kept");
    assert_eq!((after.rank, after.left.len()), (start.rank, start.left.len()));
    // A step of the optimizer moves every element by about the learning rate, and in its own place.
    for (new, old) in [(&after.left, &start.left), (&after.right, &start.right)] {
        assert!(new != old && apart(new, old) < 0.05, "{}", apart(new, old));
    }
}

#[test]
fn compensations_are_added_in_either_orientation() {
    let dir = tempfile::tempdir().unwrap();
    for source in [gpt2(dir.path()), model(&dir.path().join("llama"), 5, DType::F32, |_, _| {})] {
        let (quantized, out) = (source.with_extension("q"), source.with_extension("lorc"));
        apply("rtn", json!({"bits": 3}), &inputs(&[&source]), &quantized, 0).unwrap();
        let both = Inputs { base: Some(1), ..inputs(&[&quantized, &source]) };
        let report = apply("lorc", json!({"rank": 4}), &both, &out, 0).unwrap().report;
        let [original, plain, made] =
            [&source, &quantized, &out].map(|p| Artifact::open(p).unwrap());
        let (mut sum, mut count) = (0.0, 0);
        for site in original.architecture().linears() {
            let [a, q, w] = [&original, &plain, &made].map(|m| m.read_f32(&site.name).unwrap());
            assert!(lost(&a, &w) < lost(&a, &q), "{}", site.name);
            assert_eq!(made.read_uncompensated(&site.name).unwrap(), Some(q), "{}", site.name);
            sum += lost(&a, &w);
            count += 1;
        }
        let said = report["mean_relative_error"].as_f64().unwrap();
        assert!((sum / f64::from(count) - said).abs() < 1e-5, "{said}");
        // The adapter beside it says the same.
        let adapter = Arc::new(Adapter::open(&out.join("lorc")).unwrap());
        let merge = Inputs {
            adapters: vec![AdapterInput { source: "lorc".into(), adapter }],
            ..inputs(&[&quantized])
        };
        let merged = source.with_extension("merged");
        apply("merge-adapter", json!({"quantized": "float"}), &merge, &merged, 0).unwrap();
        let merged = Artifact::open(&merged).unwrap();
        for site in original.architecture().linears() {
            let [w, m] = [&made, &merged].map(|model| model.read_f32(&site.name).unwrap());
            assert!(apart(&w, &m) < 1e-4, "{}", site.name);
        }
    }
}

#[test]
fn damaged_weights_are_named() {
    const NAME: &str = "model.layers.0.mlp.up_proj.weight";
    let dir = tempfile::tempdir().unwrap();
    let whole = model(&dir.path().join("whole"), 1, DType::F32, |_, _| {});
    let damaged = model(&dir.path().join("damaged"), 1, DType::F32, |name, values| {
        if name == NAME {
            values[7] = f32::NAN;
        }
    });
    let out = dir.path().join("out");
    for (method, models, base) in [
        ("svd", vec![&*damaged], None),
        ("lorc", vec![&*damaged], None),
        ("lorc", vec![&*whole, &*damaged], Some(1)),
        ("lorc", vec![&*damaged, &*whole], Some(1)),
    ] {
        let inputs = Inputs { base, ..inputs(&models) };
        let error = apply(method, json!({}), &inputs, &out, 0).unwrap_err().to_string();
        assert!(error.contains(NAME) && error.contains("NaN"), "{method}: {error}");
        assert!(!out.exists());
    }
}

#[test]
fn models_that_are_no_copies_of_each_other_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let llama = model(&dir.path().join("llama"), 1, DType::F32, |_, _| {});
    let both = Inputs { base: Some(1), ..inputs(&[&llama, &gpt2(dir.path())]) };
    let error = plan("lorc", json!({}), &both).unwrap_err().to_string();
    assert!(error.contains("do not fit together"), "{error}");
    let model = ModelInput::open("llama", &llama).unwrap();
    let alone = Inputs { models: vec![model], ..Inputs::default() };
    let warned = plan("lorc", json!({"rank": 8}), &alone).unwrap().warnings.join("; ");
    assert!(warned.contains("bits per weight"), "{warned}");
}
