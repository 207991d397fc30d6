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

#[test]
fn interference_is_measured_drawn_and_part_of_a_recipes_report() {
    let place = Place::new();
    relatives(&place);
    let args = ["interference", "a", "b", "--base", "builtin:tiny"];
    let found = place.run(&[&args[..], &["--html", "page.html", "--json"]].concat()).json();
    assert_eq!(found["models"], serde_json::json!(["a", "b"]));
    let cosine = found["overall"]["cosines"][0].as_f64().unwrap();
    assert!(cosine.abs() < 0.9, "errors of two roundings are not one: {cosine}");
    let share = found["overall"]["sign_conflicts"].as_f64().unwrap();
    assert!(share > 0.05 && share < 0.9, "{share}");
    // Norms were left alone: no angle, no change.
    let tensors = found["tensors"].as_array().unwrap();
    let norm = tensors.iter().find(|tensor| tensor["role"] == "norm").unwrap();
    assert_eq!(
        (&norm["cosines"][0], &norm["sign_conflicts"]),
        (&serde_json::Value::Null, &0.0.into())
    );
    let page = std::fs::read_to_string(place.path("page.html")).unwrap();
    assert!(page.contains("Sign conflicts") && page.matches("class=\"cell\"").count() > 30);
    place.refuses(&[&args[..], &["--html", "page.html"]].concat(), 2, &["page.html", "--force"]);
    let text = place.run(&args).code(0).out;
    assert!(text.contains("pulled both ways") && text.contains("q_proj"), "{text}");
    place.refuses(&["interference", "a", "--base", "builtin:tiny"], 2, &["2"]);
    let other = place.bert("bert");
    let other = other.to_str().unwrap();
    place.refuses(&["interference", "a", other, "--base", "builtin:tiny"], 2, &["bert"]);
    // A merge in a recipe brings it along.
    let steps = "name: x\ntitle: X\nsteps:\n  - pull: builtin:tiny\n    as: base\n  - apply: rtn\n    to: base\n    with: {bits: 4}\n    as: a\n  \
                 - apply: rtn\n    to: base\n    with: {bits: 3}\n    as: b\n  - apply: ties\n    to: [a, b]\n    base: base\n    as: merged\n";
    place.write("merge.yaml", steps);
    place.run(&["run", "merge.yaml", "-o", "out"]).code(0);
    let page = std::fs::read_to_string(place.path("out/report.html")).unwrap();
    assert!(page.contains("Interference: ") && page.contains("Cosine of changes"));
}

#[test]
fn merges_that_look_at_text_keep_what_models_agree_on() {
    let place = Place::new();
    relatives(&place);
    let perplexity = |model: &str| {
        let args = [
            "eval",
            model,
            "--text",
            "builtin:kjv",
            "--window",
            "64",
            "--max-tokens",
            "512",
            "--json",
        ];
        place.run(&args).json()["perplexity"].as_f64().unwrap()
    };
    let (original, a, b) = (perplexity("builtin:tiny"), perplexity("a"), perplexity("b"));
    let worst = a.max(b);
    for method in ["regmean", "fisher"] {
        let few = ["--samples", "6", "--sequence-length", "48", "--text", "builtin:calibration"];
        let merge = |models: &[&str], out: &str, more: &[&str]| {
            let head = ["apply", method];
            place.run(&[&head[..], models, &["-o", out], &few, more].concat()).code(0)
        };
        // A model and its copy are that model.
        let same = format!("{method}-same");
        merge(&["builtin:tiny", "builtin:tiny"], &same, &["--dtype", "f32"]);
        let compared =
            place.run(&["compare", &same, "builtin:tiny", "--weights-only", "--json"]).json();
        for tensor in compared["tensors"].as_array().unwrap() {
            assert!(tensor["relative_frobenius"].as_f64().unwrap() < 2e-3, "{method}: {tensor}");
        }
        let out = format!("{method}-out");
        merge(&["a", "b"], &out, &[]);
        let merged = perplexity(&out);
        assert!(merged < worst && merged > 0.9 * original, "{method}: {merged} of {a} and {b}");
        place.refuses(&["apply", method, "a", "b", "-o", "x"], 2, &["--text"]);
        place.refuses(
            &["apply", method, "a", "-o", "x", "--text", "builtin:kjv"],
            2,
            &["at least 2"],
        );
    }
}
