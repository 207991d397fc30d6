//! Recipes of mergekit and merges by flags, through the binary.

mod common;

use common::Place;

/// A base and two relatives of it.
fn relatives(place: &Place) {
    place.run(&["apply", "rtn", "builtin:tiny", "--bits", "4", "-o", "a"]).code(0);
    place.run(&["apply", "rtn", "builtin:tiny", "--bits", "3", "-o", "b"]).code(0);
}

const TIES: &str = "merge_method: ties\nbase_model: builtin:tiny\nmodels:\n  - {model: a, parameters: {weight: 1, density: 0.5}}\n  - {model: ./b, parameters: {weight: 0.5, density: 0.5}}\n";

#[test]
fn a_recipe_and_its_flags_give_the_same_model() {
    let place = Place::new();
    relatives(&place);
    place.write("their.yaml", TIES);
    let dry = place.run(&["run", "their.yaml", "-o", "merged", "--dry-run", "--json"]).json();
    assert_eq!(dry["plan"]["method"], "ties");
    assert!(dry["plan"]["peak_memory"].as_u64().unwrap() > 0);
    assert!(!place.path("merged").exists());
    let ran = place.run(&["run", "their.yaml", "-o", "merged", "--json"]).json();
    assert_eq!(ran["report"]["base"], "builtin:tiny");
    let flags = "apply ties a ./b --base builtin:tiny --weight 1,0.5 --density 0.5 -o flags";
    place.run(&flags.split(' ').collect::<Vec<_>>()).code(0);
    let bytes = |dir: &str| std::fs::read(place.path(dir).join("model.safetensors")).unwrap();
    assert_eq!(bytes("merged"), bytes("flags"));
    // What the manifest says makes it again.
    let manifest = place.run(&["lineage", "merged", "--json"]).json();
    assert_eq!(manifest["manifest"]["command"], "refit run mergekit_config.yml -o OUT");
    std::fs::copy(place.path("merged/mergekit_config.yml"), place.path("mergekit_config.yml"))
        .unwrap();
    place.run(&["run", "mergekit_config.yml", "-o", "again"]).code(0);
    assert_eq!(bytes("merged"), bytes("again"));
    // The merged model runs.
    place.run(&["generate", "merged", "--prompt", "The", "--max-new-tokens", "2"]).code(0);
}

#[test]
fn a_stack_of_layers_runs() {
    let place = Place::new();
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes/mergekit-stack.yml");
    place.run(&["run", recipe]).code(0);
    let out = place.str("runs/mergekit-stack");
    let found = place.run(&["inspect", &out, "--json"]).json();
    assert_eq!(found["config"]["num_hidden_layers"], 8);
    assert_eq!(found["healthy"], true);
    place.run(&["generate", &out, "--prompt", "The", "--max-new-tokens", "2"]).code(0);
}

#[test]
fn what_is_wrong_with_a_recipe_is_said_and_nothing_is_written() {
    let place = Place::new();
    relatives(&place);
    let refuses = |from: &str, to: &str, parts: &[&str]| {
        place.write("their.yaml", TIES.replace(from, to));
        place.refuses(&["run", "their.yaml", "-o", "out"], 2, parts);
    };
    refuses("merge_method: ties", "merge_method: tie", &["merge_method", "did you mean `ties`"]);
    refuses("density: 0.5", "densty: 0.5", &["models", "did you mean `density`"]);
    refuses("density: 0.5", "density: 5", &["density = 5", "from 0 to 1"]);
    refuses("base_model: builtin:tiny\n", "", &["base_model", "is missing"]);
    refuses("model: a,", "model: nowhere,", &["nowhere"]);
    refuses("merge_method: ties", "merge_method: [", &["their.yaml"]);
    place.write("own.yaml", "name: own\nsteps:\n  - pull: builtin:tiny\n");
    place.refuses(
        &["run", "own.yaml", "--mergekit-compat"],
        2,
        &["--mergekit-compat", "refit's own"],
    );
    place.refuses(&["apply", "ties", "a", "b", "-o", "out"], 2, &["--base MODEL"]);
    place.refuses(
        &["apply", "linear", "a", "b", "--weight", "1,-1", "-o", "out"],
        2,
        &["not zero"],
    );
}

#[test]
fn an_adapter_is_no_ingredient() {
    let place = Place::new();
    relatives(&place);
    place
        .run(&[
            "apply",
            "lora",
            "builtin:tiny",
            "--data",
            "builtin:kjv-calib",
            "--steps",
            "1",
            "-o",
            "adapter",
        ])
        .code(0);
    place.write("their.yaml", TIES.replace("model: a,", "model: adapter,"));
    place.refuses(&["run", "their.yaml", "-o", "out"], 2, &["adapter", "merge-adapter"]);
    place.write("plus.yaml", TIES.replace("model: a,", "model: a+adapter,"));
    place.refuses(&["run", "plus.yaml", "-o", "out"], 2, &["merge-adapter a adapter"]);
}

#[test]
fn recipes_of_refit_name_a_base() {
    let place = Place::new();
    let text = "name: small\nsteps:\n  - pull: builtin:tiny\n    as: original\n  - apply: rtn\n    as: four\n    to: original\n  - apply: ties\n    to: four\n    base: original\n    with: {normalize: false}\n";
    place.write("recipe.yaml", text);
    let ran = place.run(&["run", "recipe.yaml", "--json"]).json();
    let step = &ran["record"]["steps"][2];
    assert_eq!(
        step["command"],
        "refit apply ties runs/small/four --base builtin:tiny --normalize false -o runs/small/ties"
    );
    assert_eq!(ran["record"]["artifacts"][2]["parents"], serde_json::json!(["original", "four"]));
    place.write("recipe.yaml", text.replace("base: original", "base: orignal"));
    place.refuses(&["run", "recipe.yaml"], 2, &["`original`"]);
    place.write("recipe.yaml", text.replace("    base: original\n", ""));
    place.refuses(&["run", "recipe.yaml"], 2, &["step `ties`", "`base`"]);
}
