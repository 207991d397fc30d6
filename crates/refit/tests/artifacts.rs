//! Verbs that read and write artifacts, and every bad input that reaches them.

mod common;

use common::{Place, contents, raw_safetensors, safetensors};
use serde_json::Value;

#[test]
fn pull_inspect_explain_on_the_embedded_model() {
    let place = Place::new();
    let pulled = place.run(&["pull", "builtin:tiny", "--json"]).json();
    assert!(std::path::Path::new(pulled["path"].as_str().unwrap()).exists());
    let facts = place.run(&["inspect", "builtin:tiny", "--values", "--strict", "--json"]).json();
    assert_eq!(facts["architecture"]["model_type"], "llama");
    assert_eq!(facts["healthy"], true);
    assert!(facts["parameters"].as_u64().unwrap() > 100_000);
    for key in ["roles", "dtypes", "ties", "memory", "grid", "strict_load", "tensors", "config"] {
        assert!(!facts[key].is_null(), "{key}");
    }
    assert!(facts["memory"]["run"].as_u64() < facts["memory"]["tune_adamw"].as_u64());
    let text = place.run(&["inspect", "builtin:tiny", "--tensors"]).code(0).out;
    assert!(text.contains("model.layers.0.self_attn.q_proj.weight"), "{text}");

    let words = place.run(&["explain", "builtin:tiny"]).code(0).out;
    assert!(words.lines().count() > 8 && words.lines().all(|line| line.ends_with(']')), "{words}");
    let key = place.run(&["explain", "builtin:tiny", "--key", "rms_norm_eps"]).code(0).out;
    assert!(key.contains("rms_norm_eps ="), "{key}");
    place
        .run(&["explain", "builtin:tiny", "--key", "rms_norm_epz"])
        .code(2)
        .says(&["`rms_norm_eps`"]);
}

#[test]
fn apply_writes_an_artifact_with_lineage_and_card() {
    let place = Place::new();
    let plan = place
        .run(&[
            "apply",
            "rtn",
            "builtin:tiny",
            "--bits",
            "3",
            "--group",
            "64",
            "-o",
            "out",
            "--dry-run",
            "--json",
        ])
        .json();
    assert_eq!(plan["plan"]["method"], "rtn");
    assert!(place.names().is_empty(), "a dry run wrote {:?}", place.names());

    let done = place
        .run(&[
            "apply",
            "rtn",
            "builtin:tiny",
            "--bits",
            "3",
            "--group",
            "64",
            "-o",
            "out",
            "--json",
        ])
        .json();
    assert_eq!(done["parameters"]["bits"], 3);
    for file in
        ["model.safetensors", "config.json", "tokenizer.json", "README.md", "refit.lineage.json"]
    {
        assert!(place.path("out").join(file).is_file(), "{file}");
    }
    let verified = place.run(&["lineage", "out", "--json"]).json();
    assert_eq!(verified["verified"], true);
    assert_eq!(verified["manifest"]["method"], "rtn");
    let card = place.run(&["card", "out", "--json"]).json();
    assert!(card["completeness"]["score"].as_f64().unwrap() > 0.5);
    assert!(card["markdown"].as_str().unwrap().contains("rtn"));

    // One flipped bit is found, and the tensor is named.
    let file = place.path("out/model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 100;
    bytes[last] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let broken = place.run(&["lineage", "out"]).code(1);
    assert!(
        broken.out.contains("model.safetensors") && broken.out.contains("tensor `"),
        "{}",
        broken.out
    );
}

#[test]
fn compare_sees_no_difference_to_itself_and_names_the_tensor_that_differs() {
    let place = Place::new();
    let same = place.run(&["compare", "builtin:tiny", "builtin:tiny", "--check", "--json"]).json();
    assert_eq!(same["equal"], true);
    place
        .run(&["apply", "rtn", "builtin:tiny", "--bits", "2", "--group", "64", "-o", "two"])
        .code(0);
    let other = place.run(&["compare", "two", "builtin:tiny", "--json"]).json();
    let worst = &other["tensors"][0];
    assert!(worst["relative_frobenius"].as_f64().unwrap() > 0.1, "{worst}");
    assert!(worst["name"].as_str().unwrap().ends_with("_proj.weight"), "{worst}");
    assert!(other["behaviour"]["output"]["kl"].as_f64().unwrap() > 0.0, "{}", other["behaviour"]);
    place.run(&["compare", "two", "builtin:tiny", "--check"]).code(1);
}

#[test]
fn the_same_bytes_whatever_the_number_of_threads() {
    let place = Place::new();
    for (threads, out) in [("1", "a"), ("2", "b")] {
        place
            .run(&[
                "apply",
                "wanda",
                "builtin:tiny",
                "--sparsity",
                "0.6",
                "--samples",
                "2",
                "--sequence-length",
                "64",
                "--text",
                "builtin:calibration",
                "--threads",
                threads,
                "-o",
                out,
            ])
            .code(0);
    }
    let weights = |out: &str| std::fs::read(place.path(out).join("model.safetensors")).unwrap();
    assert!(weights("a") == weights("b"), "one and two threads gave different weights");
}

#[test]
fn a_killed_run_resumes_to_the_same_bytes() {
    let place = Place::new();
    let args = ["apply", "finequant", "builtin:tiny", "--bits", "3", "--quiet"];
    place.command().args(args).args(["-o", "whole"]).status().unwrap();
    let whole = contents(&place.path("whole"));
    assert!(!whole.is_empty());
    // Whatever instant the kill hits: never a half-written output, and the next run completes it.
    for milliseconds in [1, 5, 10, 20, 40, 80, 160] {
        let out = format!("killed-{milliseconds}");
        let mut child = place.command().args(args).args(["-o", &out]).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        child.kill().unwrap();
        child.wait().unwrap();
        if !place.path(&out).exists() {
            place.command().args(args).args(["-o", &out]).status().unwrap();
        }
        let weights = |files: &[(String, Vec<u8>)]| -> Vec<(String, Vec<u8>)> {
            files.iter().filter(|(name, _)| name.ends_with(".safetensors")).cloned().collect()
        };
        let resumed = contents(&place.path(&out));
        assert!(weights(&resumed) == weights(&whole), "after {milliseconds} ms");
        assert_eq!(resumed.len(), whole.len());
    }
    let left: Vec<String> = place.names().into_iter().filter(|n| n.contains("partial")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn outputs_are_never_overwritten_by_accident() {
    let place = Place::new();
    place.write("taken/precious.txt", "mine");
    place.run(&["apply", "rtn", "builtin:tiny", "-o", "taken"]).code(2).says(&[
        "taken",
        "already exists",
        "--force",
    ]);
    assert_eq!(contents(&place.path("taken")), [("precious.txt".to_owned(), b"mine".to_vec())]);
    place.run(&["apply", "rtn", "builtin:tiny"]).code(2).says(&["-o"]);
    let ran =
        place.run(&["apply", "rtn", "builtin:tiny", "--group", "64", "-o", "/proc/nowhere/out"]);
    assert!(ran.code == 2 || ran.code == 3, "{}", ran.err);
    assert!(ran.err.contains("/proc/nowhere"), "{}", ran.err);
}

#[test]
fn parameters_out_of_range_say_what_would_do() {
    let place = Place::new();
    let apply = |args: &[&str]| {
        let mut all = vec!["apply"];
        all.extend(args);
        all.extend(["-o", "out"]);
        place.run(&all).code(2)
    };
    apply(&["wanda", "builtin:tiny", "--sparsity", "1.0", "--text", "builtin:calibration"])
        .says(&["sparsity", "1"]);
    apply(&["magnitude", "builtin:tiny", "--sparsity", "-0.1"]);
    apply(&["rtn", "builtin:tiny", "--bits", "1"]).says(&["bits", "2 to 8"]);
    apply(&["rtn", "builtin:tiny", "--group", "100"]).says(&["group", "64", "row"]);
    apply(&["wanda", "builtin:tiny"]).says(&["--text"]);
    apply(&["rtn", "builtin:tiny", "builtin:tiny"]).says(&["exactly 1 model"]);
    let empty = place.write("empty.txt", " \n");
    apply(&["wanda", "builtin:tiny", "--text", &empty]).says(&["empty.txt", "empty"]);
    apply(&["wanda", "builtin:tiny", "--text", "missing.txt"]).says(&["missing.txt"]);
    assert_eq!(place.names(), ["empty.txt"]);
}

#[test]
fn damaged_safetensors_are_refused_by_every_verb_that_opens_models() {
    let place = Place::new();
    let good =
        safetensors(&[("a.weight", &[2, 2], vec![1.0; 4]), ("b.weight", &[2], vec![2.0; 2])]);
    let entry = |name: &str, shape: &str, from: i64, to: i64| {
        format!("\"{name}\":{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[{from},{to}]}}")
    };
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("truncated", good[..good.len() - 3].to_vec(), "truncated"),
        ("short", vec![1, 2, 3], "short"),
        (
            "long-header",
            raw_safetensors("{}", &[])
                .into_iter()
                .enumerate()
                .map(|(i, b)| if i == 6 { 255 } else { b })
                .collect(),
            "header",
        ),
        (
            "flipped",
            {
                let mut f = good.clone();
                f[9] ^= 0x04;
                f
            },
            "flipped",
        ),
        (
            "overlap",
            raw_safetensors(
                &format!("{{{},{}}}", entry("a", "[2]", 0, 8), entry("b", "[2]", 4, 12)),
                &[0; 12],
            ),
            "overlap",
        ),
        (
            "negative",
            raw_safetensors(&format!("{{{}}}", entry("a", "[2]", -8, 0)), &[0; 8]),
            "negative",
        ),
        (
            "twice",
            raw_safetensors(
                &format!("{{{},{}}}", entry("a", "[2]", 0, 8), entry("a", "[2]", 8, 16)),
                &[0; 16],
            ),
            "`a`",
        ),
        (
            "wrong-size",
            raw_safetensors(&format!("{{{}}}", entry("a", "[3]", 0, 8)), &[0; 8]),
            "`a`",
        ),
        (
            "beyond",
            raw_safetensors(&format!("{{{}}}", entry("a", "[4]", 0, 16)), &[0; 8]),
            "beyond",
        ),
    ];
    for (name, bytes, word) in cases {
        let path = place.write(&format!("{name}.safetensors"), bytes);
        for args in [
            vec!["inspect", &path],
            vec!["explain", &path],
            vec!["apply", "rtn", &path, "-o", "out"],
        ] {
            place.run(&args).code(2).says(&[&format!("{name}.safetensors"), word]);
        }
        let scanned = place.run(&["scan", &path, "--json"]).code(1);
        assert!(scanned.out.contains("\"safe\":false"), "{name}: {}", scanned.out);
    }
    assert!(!place.path("out").exists());
}

#[test]
fn shard_indexes_are_not_followed_outside() {
    let place = Place::new();
    let shard = safetensors(&[("a.weight", &[2, 2], vec![1.0; 4])]);
    place.write("secret.safetensors", &shard);
    for (name, target, word) in
        [("out", "../secret.safetensors", "outside"), ("gone", "missing.safetensors", "missing")]
    {
        place.write(&format!("{name}/config.json"), "{}");
        let index = format!("{{\"weight_map\": {{\"a.weight\": \"{target}\"}}}}");
        place.write(&format!("{name}/model.safetensors.index.json"), index);
        place.run(&["inspect", name]).code(2).says(&[target, word]);
    }
}

#[test]
fn pickles_that_call_anything_are_refused_and_scanned_as_unsafe() {
    let place = Place::new();
    // Protocol 2: GLOBAL os.system, a string, REDUCE.
    let evil = b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.";
    let path = place.write("evil.pth", evil);
    place.run(&["inspect", &path]).code(2).says(&["evil.pth"]);
    let scanned = place.run(&["scan", &path]).code(1);
    assert!(scanned.out.contains("system") && scanned.out.contains("NOT SAFE"), "{}", scanned.out);
    place.run(&["scan", "builtin-is-no-path"]).code(2);
    let good = place.tiny("tiny");
    place.run(&["scan", good.to_str().unwrap()]).code(0);
}

#[test]
fn values_that_are_not_finite_are_found() {
    let place = Place::new();
    let tiny = place.tiny("nan");
    let file = tiny.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    // The embedded model is bf16 with a bf16 tensor at the end: two bytes make a NaN.
    let end = bytes.len();
    bytes[end - 2] = 0xff;
    bytes[end - 1] = 0x7f;
    std::fs::write(&file, bytes).unwrap();
    let found = place.run(&["inspect", "nan", "--values", "--strict", "--json"]).code(1);
    let facts: Value = serde_json::from_str(&found.out).unwrap();
    assert_eq!(facts["values"]["not_finite"].as_array().unwrap().len(), 1);
}

#[test]
fn soups_of_models_that_do_not_fit_are_refused() {
    let place = Place::new();
    let config = "{\"model_type\": \"unheard-of\"}";
    let model = |name: &str, tensors: &[(&str, &[usize], Vec<f32>)]| {
        place.write(&format!("{name}/config.json"), config);
        place.write(&format!("{name}/model.safetensors"), safetensors(tensors));
    };
    model("a", &[("w.weight", &[2, 2], vec![1.0; 4])]);
    model("b", &[("w.weight", &[2, 2], vec![3.0; 4])]);
    model("wide", &[("w.weight", &[4, 2], vec![1.0; 8])]);
    model("other", &[("v.weight", &[2, 2], vec![1.0; 4])]);
    model("nan", &[("w.weight", &[2, 2], vec![1.0, f32::NAN, 1.0, 1.0])]);
    place.run(&["apply", "model-soups", "a", "wide", "-o", "out"]).code(2).says(&["w.weight"]);
    place.run(&["apply", "model-soups", "a", "other", "-o", "out"]).code(2).says(&["weight"]);
    place
        .run(&["apply", "model-soups", "a", "nan", "-o", "out"])
        .code(2)
        .says(&["w.weight", "nan"]);
    assert!(!place.path("out").exists());
    place.run(&["apply", "model-soups", "a", "b", "-o", "out"]).code(0);
    let soup = place.run(&["compare", "out", "a", "--weights-only", "--json"]).json();
    assert_eq!(soup["tensors"][0]["max_abs"], 1.0);
}
