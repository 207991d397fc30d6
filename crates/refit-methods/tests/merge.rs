//! Merge methods by their flags, from directories to a directory.

mod support;

use std::path::{Path, PathBuf};

use refit_methods::method::{Context, Inputs, Progress, Unit};
use refit_methods::registry;
use refit_store::DType;
use serde_json::{Value, json};
use support::{apply, bytes, inputs, model, plan, shapes, tensor};

const WEIGHTS: &str = "model.safetensors";

/// A base and three relatives of it.
fn family(dir: &Path) -> Vec<PathBuf> {
    let mut made = vec![model(&dir.join("base"), 0, DType::F32, |_, _| {})];
    for seed in 1..4u64 {
        let mut stream = support::Stream::new(seed * 77);
        made.push(model(&dir.join(format!("m{seed}")), 0, DType::F32, |_, values| {
            values.iter_mut().for_each(|x| *x += 0.1 * stream.normal());
        }));
    }
    made
}

fn based(paths: &[PathBuf], count: usize) -> Inputs {
    let paths: Vec<&Path> = paths.iter().take(1 + count).map(PathBuf::as_path).collect();
    Inputs { base: Some(0), ..inputs(&paths) }
}

/// Every method with the number of models that it takes beside a base, or none.
fn methods() -> Vec<(&'static str, Option<usize>, Value)> {
    vec![
        ("linear", None, json!({"weight": [0.2, 0.3, 0.1]})),
        ("multislerp", None, json!({})),
        ("karcher", None, json!({})),
        ("slerp", Some(1), json!({"t": 0.3})),
        ("nuslerp", Some(2), json!({"nuslerp_flatten": false})),
        ("task-arithmetic", Some(3), json!({"weight": [0.3, 0.5, -0.2]})),
        ("ties", Some(3), json!({"density": 0.2})),
        ("dare-linear", Some(3), json!({"density": 0.5})),
        ("dare-ties", Some(3), json!({"density": 0.5, "rescale": "l1"})),
        ("della", Some(3), json!({"density": 0.5})),
        ("della-linear", Some(3), json!({"density": 0.5, "rescale": "l1"})),
        ("breadcrumbs", Some(3), json!({"density": 0.7, "gamma": 0.1})),
        ("breadcrumbs-ties", Some(3), json!({"density": 0.7})),
        ("model-stock", Some(3), json!({})),
        ("sce", Some(3), json!({"select_topk": 0.4})),
        ("arcee-fusion", Some(1), json!({})),
        ("nearswap", Some(1), json!({"t": 0.02})),
    ]
}

fn given(paths: &[PathBuf], beside: Option<usize>) -> Inputs {
    match beside {
        Some(count) => based(paths, count),
        None => inputs(&[&paths[1], &paths[2], &paths[3]]),
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let paths = family(dir.path());
    for (method, beside, parameters) in methods() {
        let inputs = given(&paths, beside);
        let run = |threads: usize| {
            let out = dir.path().join(format!("{method}-{threads}"));
            apply(method, parameters.clone(), &inputs, &out, threads).unwrap();
            bytes(&out, WEIGHTS)
        };
        let one = run(1);
        assert_eq!(one, run(3), "{method}");
        assert_ne!(one, bytes(&paths[0], WEIGHTS), "{method} changes nothing");
    }
}

#[test]
fn relatives_of_one_model_that_changed_nothing_are_that_model() {
    let dir = tempfile::tempdir().unwrap();
    let base = model(&dir.path().join("base"), 5, DType::F32, |_, _| {});
    let copies: Vec<PathBuf> = (0..4)
        .map(|k| model(&dir.path().join(format!("c{k}")), 5, DType::F32, |_, _| {}))
        .collect();
    for (method, beside, parameters) in methods() {
        let out = dir.path().join(method);
        apply(method, parameters, &given(&copies, beside), &out, 0).unwrap();
        for (name, _) in shapes() {
            let (x, y) = (tensor(&base, &name), tensor(&out, &name));
            let close = x.iter().zip(&y).all(|(x, y)| (x - y).abs() <= 1e-6 * x.abs().max(1e-3));
            assert!(close, "{method}: {name}");
        }
    }
}

#[test]
fn a_merge_is_the_same_whether_large_tensors_are_held_or_streamed_and_resumed() {
    /// Stops the run after some bytes.
    struct Stop(std::sync::atomic::AtomicU64);
    impl Progress for Stop {
        fn begin(&self, _: &str, _: u64, _: Unit) {}
        fn advance(&self, by: u64) {
            if self.0.fetch_sub(by, std::sync::atomic::Ordering::SeqCst) < by {
                panic!("the power went out");
            }
        }
        fn end(&self) {}
    }
    let dir = tempfile::tempdir().unwrap();
    let paths = family(dir.path());
    let inputs = based(&paths, 3);
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    apply("ties", json!({"density": 0.3}), &inputs, &whole, 0).unwrap();
    let method = registry::get("ties").unwrap().from_value(&json!({"density": 0.3})).unwrap();
    let plan = method.plan(&inputs).unwrap();
    let progress = std::sync::Arc::new(Stop(std::sync::atomic::AtomicU64::new(200_000)));
    let mut cx = Context { threads: 1, progress, ..Context::new(&broken) };
    let stopped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        method.run(&inputs, &plan, &mut cx).map(|_| ())
    }));
    assert!(stopped.is_err() && !broken.exists());
    assert!(dir.path().join(".broken.refit-partial").exists());
    apply("ties", json!({"density": 0.3}), &inputs, &broken, 0).unwrap();
    assert_eq!(bytes(&whole, WEIGHTS), bytes(&broken, WEIGHTS));
}

#[test]
fn a_base_is_asked_for_and_models_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let paths = family(dir.path());
    let error = |method: &str, parameters: Value, inputs: &Inputs| {
        plan(method, parameters, inputs).unwrap_err().to_string()
    };
    let no_base = inputs(&[&paths[1], &paths[2]]);
    assert!(error("ties", json!({}), &no_base).contains("--base MODEL"));
    assert!(error("linear", json!({}), &based(&paths, 2)).contains("takes no base"));
    assert!(
        error("slerp", json!({}), &based(&paths, 2)).contains("exactly 1 model beside the base")
    );
    assert!(
        error("model-stock", json!({}), &based(&paths, 1))
            .contains("at least 2 models beside the base")
    );
    assert!(
        error("ties", json!({"weight": [1, 2]}), &based(&paths, 3))
            .contains("each of the 3 models")
    );
    assert!(error("ties", json!({"density": [-0.1]}), &based(&paths, 3)).contains("from 0 to 1"));
    assert!(error("della", json!({"density": 0.95}), &based(&paths, 3)).contains("epsilon"));
    assert!(error("nearswap", json!({"t": -1}), &based(&paths, 1)).contains("0 or more"));
    assert!(
        error("ties", json!({"densty": 0.5}), &based(&paths, 3)).contains("did you mean `density`")
    );
}

#[test]
fn models_that_do_not_fit_and_broken_weights_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let paths = family(dir.path());
    let mut other = support::config();
    other["hidden_size"] = json!(128);
    std::fs::write(paths[2].join("config.json"), other.to_string()).unwrap();
    let error = plan("ties", json!({}), &based(&paths, 2)).unwrap_err().to_string();
    assert!(error.contains("hidden_size") && error.contains("m2"), "{error}");
    other["model_type"] = json!("mistral");
    std::fs::write(paths[2].join("config.json"), other.to_string()).unwrap();
    let error = plan("ties", json!({}), &based(&paths, 2)).unwrap_err().to_string();
    assert!(error.contains("model_type") && error.contains("mistral"), "{error}");

    let nan = model(&dir.path().join("nan"), 9, DType::F32, |name, values| {
        if name == "model.layers.1.mlp.down_proj.weight" {
            values[7] = f32::NAN;
        }
    });
    for (method, parameters) in [("ties", json!({"density": 0.1})), ("task-arithmetic", json!({}))]
    {
        let out = dir.path().join(format!("{method}-out"));
        let given = based(&[paths[0].clone(), nan.clone()], 1);
        let error = apply(method, parameters, &given, &out, 0).unwrap_err().to_string();
        assert!(
            error.contains("nan") && error.contains("down_proj") && error.contains("index 7"),
            "{error}"
        );
        assert!(!out.exists());
    }
}

#[test]
fn the_base_lends_its_configuration_and_the_flags_are_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let paths = family(dir.path());
    let out = dir.path().join("out");
    apply(
        "ties",
        json!({"weight": [0.5, 0.25], "normalize": false, "dtype": "bf16"}),
        &based(&paths, 2),
        &out,
        0,
    )
    .unwrap();
    let lineage = refit_store::Lineage::read(&out).unwrap().unwrap();
    let command = lineage.command.unwrap();
    assert!(command.starts_with("refit apply ties m1 m2 --base base "), "{command}");
    assert!(
        command.contains("--normalize false") && command.contains("--weight 0.5,0.25"),
        "{command}"
    );
    assert_eq!(lineage.parents[0].part.as_deref(), Some("base"));
    let made = refit_store::Artifact::open(&out).unwrap();
    assert_eq!(made.config().str("torch_dtype"), Some("bfloat16"));
}
