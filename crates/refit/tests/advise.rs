//! `refit advise` and `refit map` from the command line: commands that run as they are printed, answers, refusals, and the shape of
//! the JSON.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::Place;
use serde_json::{Value, json};

fn advise(place: &Place, more: &[&str]) -> Value {
    place.run(&[&["advise", "builtin:tiny", "--ram", "8GB", "--json"], more].concat()).json()
}

fn advised<'a>(advice: &'a Value, method: &str) -> &'a Value {
    let all = advice["advised"].as_array().unwrap();
    all.iter()
        .find(|one| one["method"] == method)
        .unwrap_or_else(|| panic!("no {method} in {all:#?}"))
}

fn commands(advised: &Value) -> Vec<Vec<&str>> {
    let lines = advised["commands"].as_array().unwrap().iter().filter_map(Value::as_str);
    lines.map(|line| line.split(' ').skip(1).collect()).collect()
}

#[test]
fn the_first_command_of_every_method_passes_its_dry_run() {
    let place = Place::new();
    let mut seen = 0;
    for target in ["2200kB", "4500kB"] {
        let advice = advise(&place, &["--target", target, "--keep", "task", "--pattern", "2:4"]);
        for one in advice["advised"].as_array().unwrap() {
            let first = &commands(one)[0];
            // A recovery begins with a quantizer of its own, which is advised by itself, too.
            place.run(&[&first[..], &["--dry-run"]].concat()).code(0);
            seen += 1;
        }
    }
    assert!(seen > 15, "only {seen}");
    assert!(place.names().is_empty());
}

#[test]
fn commands_run_as_they_are_printed_and_keep_the_size() {
    let place = Place::new();
    let advice = advise(&place, &["--target", "2200kB", "--needs", "none"]);
    for method in ["rtn", "fit", "export"] {
        let one = advised(&advice, method);
        let all = commands(one);
        all.iter().for_each(|command| drop(place.run(command).code(0)));
        let out = place.path(all[all.len() - 1].last().unwrap());
        let file = ["model.safetensors", "model.gguf"].map(|name| out.join(name));
        let file = file.iter().find(|path| path.exists()).unwrap();
        let bytes = std::fs::metadata(file).unwrap().len();
        assert!(bytes <= 2_200_000, "{method}: {bytes}");
        let foreseen = one["bytes"].as_u64().unwrap();
        // What fits a size keeps below it; the others are foreseen.
        let off = (foreseen as f64 / bytes as f64 - 1.0).abs();
        assert!(
            off < 0.02 || (method == "fit" && bytes <= foreseen),
            "{method}: {bytes} {foreseen}"
        );
    }
    let measure = advice["evaluate"].as_array().unwrap();
    assert_eq!(measure.len(), 3);
    let first: Vec<&str> = measure[0].as_str().unwrap().split(' ').skip(1).collect();
    place.run(&[&first[..], &["--max-tokens", "64", "--window", "64"]].concat()).code(0);
}

/// What is measured is what the commands made, with what stands beside it.
#[test]
fn results_in_two_parts_are_measured_together() {
    let place = Place::new();
    for (method, part) in [("lorc", "tiny-lorc --reference"), ("ia3", "--adapter tiny-gptq-ia3")] {
        let ask = ["advise", "builtin:tiny", "--target", "2200kB", "--method", method, "--json"];
        let advice = place.run(&ask).json();
        let one = &advice["advised"][0];
        assert_eq!(one["method"], method, "{advice}");
        commands(one).iter().for_each(|command| drop(place.run(command).code(0)));
        let measure = advice["evaluate"][0].as_str().unwrap();
        assert!(measure.contains(part), "{measure}");
        let words: Vec<&str> = measure.split(' ').skip(1).collect();
        place.run(&[&words[..], &["--max-tokens", "64", "--window", "64"]].concat()).code(0);
    }
}

#[test]
fn refusals_name_the_need_and_the_smallest_size() {
    let place = Place::new();
    let ask = |more: &[&str], parts: &[&str]| {
        place.refuses(&[&["advise", "builtin:tiny"], more].concat(), 2, parts);
    };
    ask(&[], &["--target"]);
    ask(&["--target", "2MB", "--bpw", "3"], &["--bpw"]);
    ask(&["--target", "much"], &["much"]);
    ask(&["--target", "1kB"], &["smallest that refit can write", "bytes", "refit "]);
    ask(
        &["--target", "2MB", "--tokens-available", "0", "--method", "gptq"],
        &["gptq", "calibration text", "--tokens-available is 0"],
    );
    ask(&["--target", "2MB", "--method", "gtpq"], &["gtpq", "did you mean `gptq`"]);
    ask(&["--target", "2MB", "--needs", "none", "--train-tokens", "5"], &["--train-tokens"]);
    // Asked well, and the answer is no.
    let no = place.run(&["advise", "builtin:tiny", "--target", "2MB", "--ram", "1MB"]).code(1);
    assert!(no.out.contains("nothing") && no.out.contains("--ram"), "{}", no.out);
}

/// The keys of a JSON value and the types below them; arrays as what all their elements have.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let below: BTreeMap<&String, Value> = map.iter().map(|(k, v)| (k, shape(v))).collect();
            json!(below)
        }
        Value::Array(list) => {
            let mut all: Vec<Value> = Vec::new();
            for item in list.iter().map(shape) {
                if !all.contains(&item) {
                    all.push(item);
                }
            }
            // Objects that differ in which keys are null are one.
            let objects: Vec<&serde_json::Map<String, Value>> =
                all.iter().filter_map(Value::as_object).collect();
            if objects.len() == all.len() && !objects.is_empty() {
                let keys: BTreeSet<&String> = objects.iter().flat_map(|map| map.keys()).collect();
                let merged: BTreeMap<&String, Value> = keys
                    .into_iter()
                    .map(|key| {
                        let kinds: BTreeSet<String> = objects
                            .iter()
                            .map(|map| {
                                map.get(key).map_or("absent".into(), |v| {
                                    v.as_str().map_or_else(|| v.to_string(), str::to_owned)
                                })
                            })
                            .collect();
                        (key, json!(kinds))
                    })
                    .collect();
                return json!([merged]);
            }
            json!(all)
        }
        Value::Null => json!("null"),
        Value::Bool(_) => json!("bool"),
        Value::Number(_) => json!("number"),
        Value::String(_) => json!("string"),
    }
}

#[test]
fn the_json_has_the_shape_that_scripts_rely_on() {
    let place = Place::new();
    let advice = advise(
        &place,
        &["--target", "2200kB", "--tokens-available", "4000", "--train-tokens", "100"],
    );
    let map = place.run(&["map", "--json"]).json();
    let found = json!({"advise": shape(&advice), "map": shape(&map)});
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/advise-shape.json");
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let expected: Value = serde_json::from_str(&text).unwrap_or_default();
    assert!(
        found == expected,
        "the shape of the JSON changed; if that is meant, {file} shall hold:\n{}",
        serde_json::to_string_pretty(&found).unwrap()
    );
}

#[test]
fn the_map_checks_itself() {
    let place = Place::new();
    let checked = place.run(&["map", "--check"]).code(0);
    assert!(checked.out.contains("every leaf has a method"), "{}", checked.out);
    let page = place.run(&["map", "--markdown"]).code(0).out;
    assert!(page.starts_with("<!-- Made by") && page.contains("[rtn](methods/rtn.md)"), "{page}");
}
