//! ComPEFT: what is kept, what is written, and the way back.

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use refit_methods::inputs::AdapterInput;
use refit_methods::method::{Inputs, Output};
use refit_store::adapter::{self, Adapter, AdapterConfig, Form, Part, Side, Values};
use refit_store::{Artifact, Card, DType, Lineage};
use serde_json::{Value, json};
use support::{Stream, bytes, inputs, model, plan, tensor};

fn apply(method: &str, with: Value, inputs: &Inputs, out: &Path) -> refit_methods::Result<Output> {
    support::apply(method, with, inputs, out, 0)
}

/// A base, and a model that differs from it everywhere by `size` times the same deviates.
fn pair(dir: &Path, name: &str, size: f32) -> (PathBuf, PathBuf) {
    let base = model(&dir.join("base"), 0, DType::F32, |_, values| {
        values.iter_mut().for_each(|x| *x = 0.0)
    });
    let mut stream = Stream::new(11);
    let tuned = model(&dir.join(name), 0, DType::F32, |_, values| {
        values.iter_mut().for_each(|x| *x = size * stream.normal());
    });
    (base, tuned)
}

fn tuned(base: &Path, tuned: &Path) -> Inputs {
    Inputs { base: Some(0), ..inputs(&[base, tuned]) }
}

fn with_adapter(base: &Path, adapter: &Path, as_base: bool) -> Inputs {
    let opened = AdapterInput {
        source: adapter.display().to_string(),
        adapter: Arc::new(Adapter::open(adapter).unwrap()),
    };
    Inputs { base: as_base.then_some(0), adapters: vec![opened], ..inputs(&[base]) }
}

/// The whole update, in the order of the tensors' names in its file.
fn flat(update: &Path) -> Vec<f32> {
    let adapter = Adapter::open(update).unwrap();
    adapter.tensors().unwrap().into_iter().flat_map(|(_, values)| values.values).collect()
}

/// What was compressed, in the same order, by the names of the model.
fn truth(dir: &Path, update: &Path) -> Vec<f32> {
    let adapter = Adapter::open(update).unwrap();
    let names =
        adapter.tensors().unwrap().into_iter().map(|(name, _)| {
            name.strip_prefix("base_model.model.").unwrap().replace(".delta.", ".")
        });
    names.flat_map(|name| tensor(dir, &name)).collect()
}

fn lora(dir: &Path, base: &Path, seed: u64) -> PathBuf {
    let artifact = Artifact::open(base).unwrap();
    let mut stream = Stream::new(seed);
    let mut normals = |n: usize| -> Vec<f32> { (0..n).map(|_| stream.normal()).collect() };
    let parts: Vec<Part> = artifact
        .architecture()
        .linears()
        .take(4)
        .map(|site| {
            let (out, inputs) = site.out_in().unwrap();
            let a = Values::new([4, inputs], normals(4 * inputs)).unwrap();
            let b = Values::new([out, 4], normals(out * 4)).unwrap();
            let site = site.name.strip_suffix(".weight").unwrap().to_owned();
            Part { site, form: Form::Lora { a, b, scale: 2.0, magnitude: None, bias: None } }
        })
        .collect();
    let config = AdapterConfig::describe(&parts, None).unwrap();
    let lineage = Lineage::new("fixture", json!({}));
    adapter::write(dir, &config, &parts, None, lineage, Card::new("fixture"), true, Vec::new())
        .unwrap()
}

#[test]
fn the_largest_entries_keep_their_sign_and_one_number() {
    let dir = tempfile::tempdir().unwrap();
    let (base, a) = pair(dir.path(), "a", 0.02);
    let out = dir.path().join("out");
    let report = apply("compeft", json!({"density": 0.3}), &tuned(&base, &a), &out).unwrap().report;
    let (found, tau) = (flat(&out), truth(&a, &out));
    let keep = (0.3 * tau.len() as f64).round() as usize;
    let mut order: Vec<usize> = (0..tau.len()).collect();
    order.sort_by(|i, j| tau[*j].abs().total_cmp(&tau[*i].abs()).then(i.cmp(j)));
    let scale = report["scale"].as_f64().unwrap() as f32;
    let mut wanted = vec![0f32; tau.len()];
    order[..keep].iter().for_each(|at| wanted[*at] = scale * tau[*at].signum());
    assert_eq!(found, wanted);
    let mean = tau.iter().map(|x| f64::from(*x)).sum::<f64>() / tau.len() as f64;
    let sigma = (tau.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>()
        / (tau.len() - 1) as f64)
        .sqrt();
    assert!((f64::from(scale) / sigma - 1.0).abs() < 1e-3);
    assert_eq!(report["kept"], keep);
    // It merges into the base as any adapter does.
    let merged = dir.path().join("merged");
    apply("merge-adapter", json!({}), &with_adapter(&base, &out, false), &merged).unwrap();
    assert_eq!(truth(&merged, &out), wanted);
    // And it is small.
    let size = std::fs::metadata(out.join("adapter_model.cpft.safetensors")).unwrap().len();
    assert!((size as f64) < 0.25 * tau.len() as f64 + 8000.0, "{size} for {}", tau.len());
    assert!(Lineage::verify(&out).unwrap().is_ok());
}

#[test]
fn scaling_the_update_scales_the_result() {
    let dir = tempfile::tempdir().unwrap();
    let (base, a) = pair(dir.path(), "a", 0.25);
    let (_, b) = pair(dir.path(), "b", 1.0);
    for scope in ["global", "tensor"] {
        for mode in ["compeft", "stc", "prune-only"] {
            let with = || json!({"scope": scope, "mode": mode, "density": 0.1});
            let [one, four] = [(&a, "one"), (&b, "four")].map(|(model, name)| {
                let out = dir.path().join(format!("{name}-{scope}-{mode}"));
                apply("compeft", with(), &tuned(&base, model), &out).unwrap();
                flat(&out)
            });
            let scaled: Vec<f32> = one.iter().map(|x| 4.0 * x).collect();
            assert_eq!(scaled, four, "{scope} {mode}");
        }
    }
}

#[test]
fn adapters_shrink_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let (base, _) = pair(dir.path(), "a", 1.0);
    let adapter = lora(&dir.path().join("lora"), &base, 5);
    let at = |name: &str| dir.path().join(name);
    let report =
        apply("compeft", json!({"density": 0.1}), &with_adapter(&base, &adapter, true), &at("c"))
            .unwrap()
            .report;
    assert!(report["times_smaller_than_fp16"].as_f64().unwrap() > 25.0, "{report}");
    apply("decompress", json!({}), &with_adapter(&base, &at("c"), false), &at("d")).unwrap();
    let (compressed, plain) = (Adapter::open(&at("c")).unwrap(), Adapter::open(&at("d")).unwrap());
    assert_eq!(compressed.parts(), plain.parts());
    assert!(
        plain.ternary().unwrap().is_none() && at("d").join("adapter_model.safetensors").exists()
    );
    // Everything kept is the adapter itself, bit by bit.
    let whole = json!({"density": 1.0, "mode": "prune-only"});
    apply("compeft", whole, &with_adapter(&base, &adapter, true), &at("w")).unwrap();
    assert_eq!(Adapter::open(&at("w")).unwrap().parts(), Adapter::open(&adapter).unwrap().parts());
    // Twice is an error, and so is what is not compressed.
    let twice = plan("compeft", json!({}), &with_adapter(&base, &at("c"), true)).unwrap_err();
    assert!(twice.to_string().contains("compressed already"), "{twice}");
    let never = plan("decompress", json!({}), &with_adapter(&base, &adapter, false)).unwrap_err();
    assert!(never.to_string().contains("not compressed"), "{never}");
}

#[test]
fn factors_that_count_from_one_do() {
    let dir = tempfile::tempdir().unwrap();
    let (base, _) = pair(dir.path(), "a", 1.0);
    let artifact = Artifact::open(&base).unwrap();
    let site = artifact.architecture().linears().next().unwrap();
    let (out, _) = site.out_in().unwrap();
    let factors: Vec<f32> = (0..out).map(|i| if i % 2 == 0 { 1.5 } else { 0.5 }).collect();
    let name = site.name.strip_suffix(".weight").unwrap().to_owned();
    let parts = [Part { site: name, form: Form::Ia3 { factors, side: Side::Output } }];
    let config = AdapterConfig::describe(&parts, None).unwrap();
    let lineage = Lineage::new("fixture", json!({}));
    let at = dir.path().join("ia3");
    adapter::write(&at, &config, &parts, None, lineage, Card::new("x"), true, Vec::new()).unwrap();
    let out = dir.path().join("c");
    apply("compeft", json!({"density": 1.0, "mode": "stc"}), &with_adapter(&base, &at, true), &out)
        .unwrap();
    assert_eq!(Adapter::open(&out).unwrap().parts(), parts);
}

#[test]
fn nothing_changed_is_said_and_bad_values_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (base, a) = pair(dir.path(), "a", 0.1);
    let same =
        model(&dir.path().join("same"), 0, DType::F32, |_, v| v.iter_mut().for_each(|x| *x = 0.0));
    let out = dir.path().join("out");
    let output = apply("compeft", json!({}), &tuned(&base, &same), &out).unwrap();
    assert!(output.warnings.iter().any(|w| w.contains("zero")) && output.report["kept"] == 0);
    assert!(flat(&out).iter().all(|x| *x == 0.0));
    let refuse = |with: Value, inputs: &Inputs, part: &str| {
        let error = plan("compeft", with, inputs).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    refuse(json!({"density": 0.0}), &tuned(&base, &a), "density");
    refuse(json!({"density": 1.5}), &tuned(&base, &a), "density");
    refuse(json!({"alpha": -1.0}), &tuned(&base, &a), "alpha");
    refuse(
        json!({}),
        &Inputs { base: Some(0), ..inputs(&[&base]) },
        "one fine-tuned model or one adapter",
    );
    let broken = model(&dir.path().join("broken"), 0, DType::F32, |_, v| v[0] = f32::NAN);
    let error =
        apply("compeft", json!({}), &tuned(&base, &broken), &dir.path().join("x")).unwrap_err();
    assert!(error.to_string().contains("NaN") && !dir.path().join("x").exists(), "{error}");
    // A damaged file is no adapter.
    apply("compeft", json!({}), &tuned(&base, &a), &dir.path().join("ok")).unwrap();
    let path = dir.path().join("ok/adapter_model.cpft.safetensors");
    let mut raw = bytes(&dir.path().join("ok"), "adapter_model.cpft.safetensors");
    let last = raw.len() - 5;
    raw[last] ^= 0x10;
    std::fs::write(&path, raw).unwrap();
    let error = Adapter::open(&dir.path().join("ok")).unwrap_err().to_string();
    assert!(error.contains("damaged"), "{error}");
}
