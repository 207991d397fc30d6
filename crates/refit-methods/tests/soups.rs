//! The arithmetic of soups, from directories to a directory.

mod support;

use refit_store::DType;
use serde_json::json;
use support::{apply, bytes, inputs, model, plan, shapes, tensor};

const WEIGHTS: &str = "model.safetensors";

#[test]
fn one_model_is_itself_and_two_copies_are_too() {
    let dir = tempfile::tempdir().unwrap();
    let a = model(&dir.path().join("a"), 1, DType::F32, |_, _| {});
    let copy = model(&dir.path().join("copy"), 1, DType::F32, |_, _| {});
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    apply("model-soups", json!({}), &inputs(&[&a]), &one, 0).unwrap();
    assert_eq!(bytes(&a, WEIGHTS), bytes(&one, WEIGHTS));
    let both = inputs(&[&a, &copy]);
    assert!(plan("model-soups", json!({}), &both).unwrap().warnings[0].contains("identical"));
    apply("model-soups", json!({}), &both, &two, 0).unwrap();
    assert_eq!(bytes(&a, WEIGHTS), bytes(&two, WEIGHTS));
}

#[test]
fn the_uniform_soup_is_the_mean_in_any_order() {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<_> = (0..3)
        .map(|seed| model(&dir.path().join(format!("m{seed}")), seed, DType::F32, |_, _| {}))
        .collect();
    let (forth, back) = (dir.path().join("forth"), dir.path().join("back"));
    apply("model-soups", json!({}), &inputs(&[&paths[0], &paths[1], &paths[2]]), &forth, 0)
        .unwrap();
    apply("model-soups", json!({}), &inputs(&[&paths[2], &paths[0], &paths[1]]), &back, 0).unwrap();
    for (name, _) in shapes() {
        let models: Vec<Vec<f32>> = paths.iter().map(|path| tensor(path, &name)).collect();
        let (forth, back) = (tensor(&forth, &name), tensor(&back, &name));
        for index in 0..forth.len() {
            let mean: f64 = models.iter().map(|model| f64::from(model[index])).sum::<f64>() / 3.0;
            assert!((f64::from(forth[index]) - mean).abs() < 1e-6);
            assert!((forth[index] - back[index]).abs() < 1e-6);
        }
    }
}

#[test]
fn wise_ft_has_its_ends_and_its_middle() {
    let dir = tempfile::tempdir().unwrap();
    let a = model(&dir.path().join("a"), 1, DType::F32, |_, _| {});
    let b = model(&dir.path().join("b"), 2, DType::F32, |_, _| {});
    let both = inputs(&[&a, &b]);
    let run = |alpha: f64| {
        let out = dir.path().join(format!("mix{alpha}"));
        apply("model-soups", json!({"mode": "wise-ft", "alpha": alpha}), &both, &out, 0).unwrap();
        out
    };
    assert_eq!(bytes(&run(0.0), WEIGHTS), bytes(&a, WEIGHTS));
    assert_eq!(bytes(&run(1.0), WEIGHTS), bytes(&b, WEIGHTS));
    let (middle, name) = (run(0.25), "model.norm.weight");
    let (x, y, z) = (tensor(&a, name), tensor(&b, name), tensor(&middle, name));
    for index in 0..x.len() {
        assert!((z[index] - (0.75 * x[index] + 0.25 * y[index])).abs() < 1e-7);
    }
}

#[test]
fn models_of_two_types_leave_the_choice_to_the_user() {
    let dir = tempfile::tempdir().unwrap();
    let half = model(&dir.path().join("half"), 1, DType::BF16, |_, _| {});
    let full = model(&dir.path().join("full"), 2, DType::F32, |_, _| {});
    let out = dir.path().join("out");
    let both = inputs(&[&half, &full]);
    let error = apply("model-soups", json!({}), &both, &out, 0).unwrap_err().to_string();
    assert!(
        error.contains("BF16") && error.contains("F32") && error.contains("--dtype"),
        "{error}"
    );
    apply("model-soups", json!({"dtype": "bf16"}), &both, &out, 0).unwrap();
    let artifact = refit_store::Artifact::open(&out).unwrap();
    assert!(artifact.tensors().iter().all(|info| info.dtype == DType::BF16));
}

#[test]
fn models_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let a = model(&dir.path().join("a"), 1, DType::F32, |_, _| {});
    let b = model(&dir.path().join("b"), 2, DType::F32, |_, _| {});
    let config = support::config();
    let mut labels = config.clone();
    labels["id2label"] = json!({"0": "no", "1": "yes"});
    std::fs::write(a.join("config.json"), labels.to_string()).unwrap();
    labels["id2label"] = json!({"0": "yes", "1": "no"});
    std::fs::write(b.join("config.json"), labels.to_string()).unwrap();
    let error = plan("model-soups", json!({}), &inputs(&[&a, &b])).unwrap_err().to_string();
    assert!(error.contains("id2label") && error.contains('a') && error.contains('b'), "{error}");

    // Another vocabulary: the embedding has another shape.
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(b.join("config.json"), config.to_string()).unwrap();
    std::fs::write(a.join("config.json"), config.to_string()).unwrap();
    let header = json!({"model.embed_tokens.weight": {
        "dtype": "F32", "shape": [41, 96], "data_offsets": [0, 41 * 96 * 4],
    }})
    .to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(vec![0; 41 * 96 * 4]);
    std::fs::write(other.join("model.safetensors"), file).unwrap();
    std::fs::write(other.join("config.json"), config.to_string()).unwrap();
    let error = plan("model-soups", json!({}), &inputs(&[&a, &other])).unwrap_err().to_string();
    assert!(error.contains("embed_tokens") && error.contains("41"), "{error}");
    assert!(plan("model-soups", json!({}), &inputs(&[])).is_err());
}

#[test]
fn an_ingredient_with_infinities_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let a = model(&dir.path().join("good"), 1, DType::F32, |_, _| {});
    let b = model(&dir.path().join("bad"), 2, DType::F32, |name, values| {
        if name == "model.norm.weight" {
            values[3] = f32::INFINITY;
        }
    });
    let out = dir.path().join("out");
    let error =
        apply("model-soups", json!({}), &inputs(&[&a, &b]), &out, 0).unwrap_err().to_string();
    assert!(error.contains("bad") && error.contains("model.norm.weight"), "{error}");
    assert!(error.contains("index 3") && !out.exists(), "{error}");
}
