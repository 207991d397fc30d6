//! OPCM: one model at a time, the ledger, and what is refused.

mod support;

use std::path::{Path, PathBuf};

use refit_methods::method::{Inputs, Output};
use refit_store::{Artifact, DType, Lineage};
use serde_json::{Value, json};
use support::{Stream, bytes, inputs, model, plan, tensor};

const WEIGHTS: &str = "model.safetensors";

fn based(paths: &[&PathBuf]) -> Inputs {
    let paths: Vec<&Path> = paths.iter().map(|path| path.as_path()).collect();
    Inputs { base: Some(0), ..inputs(&paths) }
}

fn apply(method: &str, with: Value, inputs: &Inputs, out: &Path) -> refit_methods::Result<Output> {
    support::apply(method, with, inputs, out, 0)
}

/// A relative of the base that differs where `changes` says.
fn relative(dir: &Path, name: &str, seed: u64, changes: impl Fn(&str) -> f32) -> PathBuf {
    let mut stream = Stream::new(seed);
    model(&dir.join(name), 0, DType::F32, |tensor, values| {
        let size = changes(tensor);
        values.iter_mut().for_each(|x| *x += size * stream.normal());
    })
}

fn family(dir: &Path) -> [PathBuf; 4] {
    let base = model(&dir.join("base"), 0, DType::F32, |_, _| {});
    let [a, b, c] =
        [("a", 3u64), ("b", 5), ("c", 7)].map(|(name, seed)| relative(dir, name, seed, |_| 0.1));
    [base, a, b, c]
}

fn values(dir: &Path) -> Vec<(String, Vec<f32>)> {
    let artifact = Artifact::open(dir).unwrap();
    let names = artifact.tensors().iter().map(|info| info.name.clone());
    names
        .map(|name| {
            let x = tensor(dir, &name);
            (name, x)
        })
        .collect()
}

/// `|a - b|` over all tensors.
fn distance(a: &Path, b: &Path) -> f64 {
    let pairs = values(a).into_iter().zip(values(b));
    pairs
        .flat_map(|((_, x), (_, y))| x.into_iter().zip(y))
        .map(|(x, y)| f64::from(x - y).powi(2))
        .sum::<f64>()
        .sqrt()
}

fn ledger(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("refit.opcm.json")).unwrap()).unwrap()
}

#[test]
fn one_model_is_itself_and_several_keep_the_mean_size() {
    let dir = tempfile::tempdir().unwrap();
    let [base, a, b, c] = family(dir.path());
    let at = |name: &str| dir.path().join(name);
    apply("opcm", json!({}), &based(&[&base, &a]), &at("one")).unwrap();
    assert_eq!(bytes(&at("one"), WEIGHTS), bytes(&a, WEIGHTS));
    apply("opcm", json!({}), &based(&[&base, &a, &b, &c]), &at("three")).unwrap();
    let mean = [&a, &b, &c].map(|path| distance(path, &base)).iter().sum::<f64>() / 3.0;
    let size = distance(&at("three"), &base);
    assert!((size / mean - 1.0).abs() < 1e-5, "{size} {mean}");
    let found = ledger(&at("three"));
    let norms: Vec<f64> =
        (0..3).map(|i| found["ingredients"][i]["norm"].as_f64().unwrap()).collect();
    for (norm, path) in norms.iter().zip([&a, &b, &c]) {
        assert!((norm / distance(path, &base) - 1.0).abs() < 1e-6);
    }
    // Random changes are nearly orthogonal: lambda is about the root of their number.
    let lambda = found["lambda"].as_f64().unwrap();
    assert!((lambda / 3f64.sqrt() - 1.0).abs() < 0.1, "{lambda}");
    assert!(Lineage::verify(&at("three")).unwrap().is_ok());
}

#[test]
fn step_by_step_is_all_at_once_and_the_ledger_makes_it_again() {
    let dir = tempfile::tempdir().unwrap();
    let [base, a, b, c] = family(dir.path());
    let at = |name: &str| dir.path().join(name);
    let with = || json!({"alpha": 0.4});
    apply("opcm", with(), &based(&[&base, &a]), &at("m1")).unwrap();
    apply("opcm", with(), &based(&[&base, &at("m1"), &b]), &at("m2")).unwrap();
    apply("opcm", with(), &based(&[&base, &at("m2"), &c]), &at("m3")).unwrap();
    apply("opcm", with(), &based(&[&base, &a, &b, &c]), &at("whole")).unwrap();
    assert_eq!(bytes(&at("m3"), WEIGHTS), bytes(&at("whole"), WEIGHTS));
    let threads = support::apply("opcm", with(), &based(&[&base, &a, &b, &c]), &at("one"), 1);
    assert!(threads.is_ok() && bytes(&at("one"), WEIGHTS) == bytes(&at("whole"), WEIGHTS));
    let (steps, whole) = (ledger(&at("m3")), ledger(&at("whole")));
    assert_eq!(steps["lambda"], whole["lambda"]);
    assert_eq!(steps["ingredients"][2]["content_hash"], whole["ingredients"][2]["content_hash"]);
    // Alpha comes from the ledger.
    let again = || json!({"rebuild": at("m3")});
    apply("opcm", again(), &based(&[&base, &a, &b, &c]), &at("again")).unwrap();
    assert_eq!(bytes(&at("again"), WEIGHTS), bytes(&at("m3"), WEIGHTS));
    for (given, part) in
        [(vec![&base, &a, &c, &b], "ingredient 2"), (vec![&base, &a, &b], "lists 3 models")]
    {
        let error = plan("opcm", again(), &based(&given)).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    // Another order is another merge, the same order by a seed is the same.
    let shuffled = || json!({"order": "shuffled"});
    apply("opcm", shuffled(), &based(&[&base, &a, &b, &c]), &at("s1")).unwrap();
    apply("opcm", shuffled(), &based(&[&base, &a, &b, &c]), &at("s2")).unwrap();
    assert_eq!(bytes(&at("s1"), WEIGHTS), bytes(&at("s2"), WEIGHTS));
}

#[test]
fn a_parallel_change_adds_nothing_to_linears() {
    let dir = tempfile::tempdir().unwrap();
    let base = model(&dir.path().join("base"), 0, DType::F32, |_, _| {});
    let linear = |name: &str| if name.contains("_proj") { 1.0 } else { 0.0 };
    let a = relative(dir.path(), "a", 3, |name| 0.25 * linear(name));
    let b = relative(dir.path(), "b", 3, |name| 0.5 * linear(name));
    let out = dir.path().join("out");
    apply("opcm", json!({}), &based(&[&base, &a, &b]), &out).unwrap();
    // The direction stays, the size is the mean of both.
    let (one, merged) = (distance(&a, &base), distance(&out, &base));
    assert!((merged / (1.5 * one) - 1.0).abs() < 1e-4);
    for ((name, merged), ((_, a), (_, base))) in
        values(&out).into_iter().zip(values(&a).into_iter().zip(values(&base)))
    {
        for ((m, a), b) in merged.iter().zip(&a).zip(&base) {
            assert!((m - b - 1.5 * (a - b)).abs() < 1e-3, "{name}");
        }
    }
}

#[test]
fn what_is_not_linear_is_added_up() {
    let dir = tempfile::tempdir().unwrap();
    let base = model(&dir.path().join("base"), 0, DType::F32, |_, _| {});
    // Each changes one norm by the same amount: orthogonal, of equal size.
    let names: Vec<String> = values(&base).into_iter().map(|(name, _)| name).collect();
    let norms: Vec<&String> = names.iter().filter(|name| name.contains("norm")).take(3).collect();
    let made: Vec<PathBuf> = norms
        .iter()
        .enumerate()
        .map(|(i, norm)| {
            model(&dir.path().join(format!("n{i}")), 0, DType::F32, |name, values| {
                if name == norm.as_str() {
                    values.iter_mut().for_each(|x| *x += 0.5);
                }
            })
        })
        .collect();
    let out = dir.path().join("out");
    let all: Vec<&PathBuf> = std::iter::once(&base).chain(&made).collect();
    apply("opcm", json!({}), &based(&all), &out).unwrap();
    for (t, one) in ledger(&out)["ingredients"].as_array().unwrap().iter().enumerate() {
        let lambda = one["lambda"].as_f64().unwrap();
        assert!((lambda - ((t + 1) as f64).sqrt()).abs() < 1e-5, "{t}: {lambda}");
    }
}

#[test]
fn refusals_and_what_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let [base, a, b, _] = family(dir.path());
    let at = |name: &str| dir.path().join(name);
    let refuse = |with: Value, given: &[&PathBuf], parts: &[&str]| {
        let error = plan("opcm", with, &based(given)).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    refuse(json!({"alpha": 1.5}), &[&base, &a], &["alpha", "1.5"]);
    apply("opcm", json!({}), &based(&[&base, &a]), &at("m")).unwrap();
    refuse(json!({}), &[&base, &at("m")], &["a model to add"]);
    refuse(json!({}), &[&base, &b, &at("m")], &["give it first"]);
    refuse(json!({"rebuild": at("m")}), &[&base, &at("m"), &b], &["--rebuild"]);
    refuse(json!({"rebuild": &a}), &[&base, &a], &["refit.opcm.json"]);
    let other = model(&at("other"), 9, DType::F32, |_, _| {});
    refuse(json!({}), &[&other, &at("m"), &b], &["another base"]);
    let mut damaged = ledger(&at("m"));
    damaged["lambda"] = json!(-1.0);
    std::fs::write(at("m").join("refit.opcm.json"), damaged.to_string()).unwrap();
    refuse(json!({}), &[&base, &at("m"), &b], &["refit.opcm.json", "no sense"]);
    // A copy of the base adds nothing.
    let same = model(&at("same"), 0, DType::F32, |_, _| {});
    let output = apply("opcm", json!({}), &based(&[&base, &a, &same]), &at("out")).unwrap();
    assert!(output.warnings.iter().any(|warning| warning.contains("left out")), "{output:?}");
    assert_eq!(bytes(&at("out"), WEIGHTS), bytes(&a, WEIGHTS));
    // Tensors that are kept apart stay the base's.
    let with = json!({"exclude": ["embed"], "dtype": "bf16"});
    apply("opcm", with, &based(&[&base, &a, &b]), &at("kept")).unwrap();
    let name =
        values(&base).into_iter().map(|(name, _)| name).find(|n| n.contains("embed")).unwrap();
    let rounded: Vec<f32> =
        tensor(&base, &name).iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect();
    assert_eq!(tensor(&at("kept"), &name), rounded);
}
