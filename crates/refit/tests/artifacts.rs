//! Verbs that read and write artifacts.

mod common;

use std::process::Stdio;

use common::{Place, contents, safetensors};

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
    // Like every verb, it takes sources; the embedded model was not written by refit.
    place.run(&["lineage", "builtin:tiny"]).says(&["refit.lineage.json"]).code(2);
    place.run(&["lineage", "builtin:tine"]).code(2).says(&["builtin:tiny"]);
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
    let calibration =
        ["--text", "builtin:calibration", "--samples", "2", "--sequence-length", "64"];
    let methods = [
        [&["apply", "finequant", "builtin:tiny", "--bits", "3"][..], &[]].concat(),
        [&["apply", "wanda", "builtin:tiny"][..], &calibration].concat(),
        [&["apply", "gptq", "builtin:tiny", "--group", "64"][..], &calibration].concat(),
    ];
    for args in &methods {
        let (method, mut caught) = (args[1], 0);
        let whole = format!("{method}-whole");
        place.run(&[args, &["-o", &whole][..]].concat()).code(0);
        let weights = |out: &str| -> Vec<(String, Vec<u8>)> {
            let files = contents(&place.path(out)).into_iter();
            files.filter(|(name, _)| name.ends_with(".safetensors")).collect()
        };
        // Killed as soon as so many tensors are finished: never a half-written output, and the next run
        // completes it.
        for finished in [0, 1, 5, 20] {
            let out = format!("{method}-{finished}");
            let (done, journal) =
                (place.path(&out), place.path(&format!(".{out}.refit-partial/.refit-journal")));
            let mut command = place.command();
            command.args(args).args(["-o", &out]).stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = command.spawn().unwrap();
            let lines = || std::fs::read_to_string(&journal).map_or(0, |text| text.lines().count());
            // Its first line names the plan.
            while lines() <= finished && !done.exists() && child.try_wait().unwrap().is_none() {
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
            child.kill().unwrap();
            child.wait().unwrap();
            caught += usize::from(!done.exists());
            if !done.exists() {
                place.run(&[args, &["-o", &out][..]].concat()).code(0);
            }
            assert!(weights(&out) == weights(&whole), "{method} killed after {finished} tensors");
            assert_eq!(contents(&done).len(), contents(&place.path(&whole)).len());
        }
        assert!(caught > 0, "{method}: every run was over before it could be killed");
    }
    let left: Vec<String> = place.names().into_iter().filter(|n| n.contains("partial")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_killed_training_resumes_to_the_same_bytes() {
    let place = Place::new();
    let args = [
        "apply",
        "lora",
        "builtin:tiny",
        "--data",
        "builtin:kjv-calib",
        "--steps",
        "8",
        "--batch",
        "2",
        "--max-length",
        "64",
        "--rank",
        "4",
        "--dropout",
        "0.1",
        "--checkpoint-every",
        "1",
    ];
    place.run(&[&args[..], &["-o", "whole"]].concat()).code(0);
    let mut caught = 0;
    for step in [1, 4] {
        let out = format!("killed-{step}");
        let (done, checkpoint) = (
            place.path(&out),
            place.path(&format!(".{out}.refit-training/step-{step:09}.ckpt.safetensors")),
        );
        let mut command = place.command();
        command.args(args).args(["-o", &out]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        while !checkpoint.exists() && !done.exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        caught += usize::from(!done.exists());
        if !done.exists() {
            let other = [&args[..], &["--learning-rate", "1e-3", "-o", &out]].concat();
            place.run(&other).code(2).says(&["the recipe changed", "`rate` was 0.0002, is 0.001"]);
            place.run(&[&args[..], &["-o", &out]].concat()).code(0);
        }
        assert!(contents(&done) == contents(&place.path("whole")), "killed after step {step}");
    }
    assert!(caught > 0, "every run was over before it could be killed");
    let left: Vec<String> = place.names().into_iter().filter(|n| n.contains("training")).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Sends Ctrl-C to a running child and returns what came of it.
#[cfg(unix)]
fn interrupt(child: std::process::Child) -> common::Ran {
    let id = child.id().to_string();
    // It may be over already; then its exit code says so.
    let _ = std::process::Command::new("kill").args(["-INT", &id]).stderr(Stdio::null()).status();
    common::Ran::of(child.wait_with_output().unwrap())
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_says_so_and_the_same_command_resumes() {
    let place = Place::new();
    let args =
        ["apply", "wanda", "builtin:tiny", "--text", "builtin:calibration", "--samples", "2"];
    let args = [&args[..], &["--sequence-length", "64", "--quiet", "--json", "-o"]].concat();
    place.run(&[&args[..], &["whole"]].concat()).code(0);
    let mut caught = 0;
    for finished in [0, 1, 5, 20] {
        let out = format!("out-{finished}");
        let whole_args = [&args[..], &[out.as_str()]].concat();
        let (done, journal) =
            (place.path(&out), place.path(&format!(".{out}.refit-partial/.refit-journal")));
        let mut command = place.command();
        command.args(&whole_args).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = || std::fs::read_to_string(&journal).map_or(0, |text| text.lines().count());
        while lines() <= finished && !done.exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        let ran = interrupt(child);
        if ran.code == 4 {
            caught += 1;
            let error: serde_json::Value = serde_json::from_str(ran.err.trim()).unwrap();
            assert_eq!(error["error"]["code"], 4);
            assert!(error["error"]["message"].as_str().unwrap().contains("resume"), "{error}");
            assert!(ran.out.is_empty() && !done.exists());
            place.run(&whole_args).code(0);
        } else {
            ran.code(0);
        }
        let weights = |dir: &str| std::fs::read(place.path(dir).join("model.safetensors")).unwrap();
        assert!(weights(&out) == weights("whole"), "interrupted after {finished} tensors");
    }
    assert!(caught > 0, "every run was over before it could be interrupted");
}

#[cfg(unix)]
#[test]
fn an_interrupted_verb_that_writes_nothing_says_that() {
    let place = Place::new();
    place.run(&["pull", "builtin:tiny"]).code(0);
    let eval = ["eval", "builtin:tiny", "--text", "builtin:held-out", "--quiet"];
    for (extra, message) in [
        (&[][..], "error: interrupted: nothing was written\n"),
        (
            &["--json"],
            "{\"error\":{\"code\":4,\"message\":\"interrupted: nothing was written\"}}\n",
        ),
    ] {
        let mut command = place.command();
        command.args(eval).args(extra).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        // Long enough to have started, far from long enough to have read the text.
        std::thread::sleep(std::time::Duration::from_millis(400));
        let ran = interrupt(child).code(4);
        assert_eq!((ran.err.as_str(), ran.out.as_str()), (message, ""));
    }
}

#[test]
fn a_sound_model_is_safe_and_nothing_is_no_model() {
    let place = Place::new();
    place.tiny("tiny");
    let scanned = place.run(&["scan", "tiny"]).code(0);
    assert!(scanned.out.contains("safe"), "{}", scanned.out);
    place.run(&["scan", "nowhere"]).code(2).says(&["nowhere"]);
}

#[test]
fn a_soup_without_data_is_the_mean() {
    let place = Place::new();
    for (name, value) in [("a", 1.0), ("b", 3.0)] {
        place.write(&format!("{name}/config.json"), "{\"model_type\": \"unheard-of\"}");
        let tensors = [("w.weight", &[2, 2][..], vec![value; 4])];
        place.write(&format!("{name}/model.safetensors"), safetensors(&tensors));
    }
    place.run(&["apply", "model-soups", "a", "b", "-o", "out"]).code(0);
    let soup = place.run(&["compare", "out", "a", "--weights-only", "--json"]).json();
    assert_eq!(soup["tensors"][0]["max_abs"], 1.0);
}
