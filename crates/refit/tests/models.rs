//! Verbs that run models.

mod common;

use std::io::Read;
use std::process::Stdio;

use common::{Place, edit_json};
use serde_json::{Value, json};

#[test]
fn eval_prints_what_it_promises() {
    let place = Place::new();
    let found = place
        .run(&[
            "eval",
            "builtin:tiny",
            "--text",
            "builtin:held-out",
            "--window",
            "128",
            "--max-tokens",
            "512",
            "--json",
        ])
        .json();
    assert_eq!(found["tokens"], 512 - 4);
    assert!(found["kl_to_reference"].is_null());
    let (perplexity, nll) = (found["perplexity"].as_f64().unwrap(), found["nll"].as_f64().unwrap());
    assert!((perplexity.ln() - nll).abs() < 1e-9 && perplexity > 1.0);
    assert!(found["tokens_per_second"].as_f64().unwrap() > 0.0);

    let with = place
        .run(&[
            "eval",
            "builtin:tiny",
            "--text",
            "builtin:kjv",
            "--window",
            "64",
            "--max-tokens",
            "256",
            "--reference",
            "builtin:tiny",
            "--json",
        ])
        .json();
    assert!(with["kl_to_reference"].as_f64().unwrap().abs() < 1e-6);
}

#[test]
fn generate_is_greedy_and_repeatable_at_temperature_zero() {
    let place = Place::new();
    let args = [
        "generate",
        "builtin:tiny",
        "--prompt",
        "In the beginning",
        "--max-new-tokens",
        "12",
        "--temperature",
        "0",
        "--ignore-eos",
        "--json",
    ];
    let first = place.run(&args).json();
    assert_eq!(first["tokens"].as_array().unwrap().len(), 12);
    assert!(!first["text"].as_str().unwrap().is_empty());
    assert!(first["time_to_first_token"].as_f64().unwrap() > 0.0);
    assert_eq!(first["tokens"], place.run(&args).json()["tokens"]);
    let shown = place.run(&args[..args.len() - 1]).code(0).out;
    assert_eq!(shown.trim_end(), first["text"].as_str().unwrap().trim_end());
    place
        .run(&["generate", "builtin:tiny", "--prompt", "x", "--top-p", "0"])
        .code(2)
        .says(&["above 0"]);
}

#[test]
fn models_of_another_kind_are_told_apart() {
    let place = Place::new();
    let text = place.write("t.txt", "one line\n");
    place.run(&["embed", "builtin:tiny", "--text", &text]).code(2).says(&["refit embed"]);
    let bert = concat!(env!("CARGO_MANIFEST_DIR"), "/../refit-nn/tests/fixtures/hf/bert");
    let ran = place.run(&["eval", bert, "--text", &text, "--window", "8"]).code(2);
    assert!(ran.err.contains("bert"), "{}", ran.err);
}

#[test]
fn a_reader_that_has_seen_enough_ends_generation_quietly() {
    let place = Place::new();
    let mut command = place.command();
    command.args(["generate", "builtin:tiny", "--prompt", "In the beginning", "--ignore-eos"]);
    command.args(["--max-new-tokens", "100"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut first = [0; 5];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let ran = common::Ran::of(child.wait_with_output().unwrap()).code(0);
    ran.says(&[]);
}

/// Vectors of the lines of a text.
fn vectors(place: &Place, model: &str, text: &str) -> (Value, Vec<Vec<f64>>) {
    let file = place.write("lines.txt", text);
    let found = place.run(&["embed", model, "--text", &file, "--json"]).json();
    let rows = found["embeddings"].as_array().unwrap();
    let rows = rows.iter().map(|row| serde_json::from_value(row.clone()).unwrap()).collect();
    (found, rows)
}

fn norm(vector: &[f64]) -> f64 {
    vector.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn far(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
}

#[test]
fn vectors_stand_where_their_lines_stand() {
    let place = Place::new();
    place.bert("bert");
    let (found, rows) = vectors(&place, "bert", "w5 w6\n\n  w7\nw5 w6\r\n\n");
    assert_eq!(rows.len(), 5);
    assert_eq!(found["dimension"], rows[0].len());
    assert_eq!((&found["pooling"], &found["normalized"]), (&json!("mean"), &json!(true)));
    // Line 1 and line 4 are the same; lines 2 and 5 are empty and the same; line 3 is its own.
    assert!(far(&rows[0], &rows[3]) < 1e-5 && far(&rows[1], &rows[4]) < 1e-5);
    assert!(far(&rows[0], &rows[1]) > 1e-3 && far(&rows[2], &rows[1]) > 1e-3);
    let (_, alone) = vectors(&place, "bert", "w7\n");
    assert!(far(&rows[2], &alone[0]) < 1e-5);
    assert!(rows.iter().all(|row| (norm(row) - 1.0).abs() < 1e-5));
    // Two files are one list.
    let (a, b) = (place.write("a.txt", "w5\n\n"), place.write("b.txt", "w6"));
    let both = place.run(&["embed", "bert", "--text", &a, &b, "--json"]).json();
    assert_eq!(both["embeddings"].as_array().unwrap().len(), 3);
}

#[test]
fn embed_follows_the_files_of_sentence_transformers() {
    let place = Place::new();
    let bert = place.bert("bert");
    let text = "w5 w6 w7 w8 w9 w10\nw7\n";
    let (_, mean) = vectors(&place, "bert", text);
    let module = |kind: &str, path: &str| json!({"type": format!("sentence_transformers.models.{kind}"), "path": path});
    let mut modules = vec![module("Transformer", ""), module("Pooling", "1_Pooling")];
    let write = |modules: &[Value]| {
        std::fs::write(bert.join("modules.json"), json!(modules).to_string()).unwrap();
    };
    write(&modules);
    place.write(
        "bert/1_Pooling/config.json",
        json!({"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}).to_string(),
    );
    let (found, cls) = vectors(&place, "bert", text);
    assert_eq!((&found["pooling"], &found["normalized"]), (&json!("cls"), &json!(false)));
    assert!((norm(&cls[0]) - 1.0).abs() > 1e-3, "not normalized: its length is its own");
    modules.push(module("Normalize", "2_Normalize"));
    write(&modules);
    let (found, unit) = vectors(&place, "bert", text);
    assert_eq!((&found["pooling"], &found["normalized"]), (&json!("cls"), &json!(true)));
    let scaled: Vec<f64> = cls[0].iter().map(|x| x / norm(&cls[0])).collect();
    assert!(far(&unit[0], &scaled) < 1e-5 && far(&unit[0], &mean[0]) > 1e-3);
    edit_json(&bert.join("1_Pooling/config.json"), |config| {
        *config = json!({"pooling_mode_mean_tokens": true});
    });
    let (found, again) = vectors(&place, "bert", text);
    assert_eq!(found["pooling"], "mean");
    assert!(far(&again[0], &mean[0]) < 1e-5);
    // The longest line that the model was made for.
    std::fs::write(bert.join("sentence_bert_config.json"), r#"{"max_seq_length": 4}"#).unwrap();
    let (found, short) = vectors(&place, "bert", text);
    assert_eq!(found["truncated"], 1);
    assert!(far(&short[0], &mean[0]) > 1e-4 && far(&short[1], &mean[1]) < 1e-5);
    edit_json(&bert.join("1_Pooling/config.json"), |config| *config = json!({}));
    let file = place.write("lines.txt", text);
    place.run(&["embed", "bert", "--text", &file]).code(2).says(&["1_Pooling/config.json"]);
}

#[test]
fn classify_prints_what_it_promises() {
    let place = Place::new();
    place.vit("vit");
    let image = place.picture("shapes.png");
    let found = place.run(&["classify", "vit", &image, &image, "--top", "3", "--json"]).json();
    let results = found["results"].as_array().unwrap();
    assert_eq!((found.as_object().unwrap().len(), results.len()), (1, 2));
    assert_eq!(results[0]["image"], image);
    let classes = results[0]["classes"].as_array().unwrap();
    assert_eq!(classes.len(), 3);
    let probability = |i: usize| classes[i]["probability"].as_f64().unwrap();
    assert!(probability(0) >= probability(1) && probability(1) >= probability(2));
    for class in classes {
        assert_eq!(class.as_object().unwrap().len(), 3, "{class}");
        assert_eq!(class["label"], format!("LABEL_{}", class["class"]));
    }
    let all = place.run(&["classify", "vit", &image, "--top", "99", "--json"]).json();
    let all = all["results"][0]["classes"].as_array().unwrap();
    let sum: f64 = all.iter().map(|c| c["probability"].as_f64().unwrap()).sum();
    assert!(all.len() == 10 && (sum - 1.0).abs() < 1e-5, "{sum}");
    let shown = place.run(&["classify", "vit", &image]).code(0).out;
    assert!(shown.contains(&image) && shown.contains("LABEL_"), "{shown}");

    let broken = place.write("broken.png", "not a picture");
    place.refuses(&["classify", "vit", &broken], 2, &["broken.png"]);
    place.refuses(&["classify", "vit"], 2, &["IMAGE"]);
    place.refuses(&["classify", "vit", &image, "--top", "0"], 2, &["--top"]);
}

#[test]
fn classify_measures_accuracy_on_labelled_images() {
    let place = Place::new();
    place.vit("vit");
    let image = place.picture("shapes.png");
    let top = place.run(&["classify", "vit", &image, "--top", "1", "--json"]).json();
    let class = top["results"][0]["classes"][0]["class"].as_u64().unwrap();
    // One image in the folder of its class, three in another's.
    let other = (class + 1) % 10;
    place.picture(&format!("set/LABEL_{class}/a.png"));
    for name in ["b", "c", "d"] {
        place.picture(&format!("set/LABEL_{other}/{name}.png"));
    }
    let found = place.run(&["classify", "vit", "--labelled", "set", "--json"]).json();
    assert_eq!((&found["accuracy"], &found["n"]), (&json!(0.25), &json!(4)));
    // Wilson, 1 of 4 at 95 %.
    let end = |i: usize| found["interval"][i].as_f64().unwrap();
    assert!((end(0) - 0.045587).abs() < 1e-5 && (end(1) - 0.699358).abs() < 1e-5, "{found}");
    assert_eq!(found.as_object().unwrap().len(), 3, "{found}");
    let shown = place.run(&["classify", "vit", "--labelled", "set"]).code(0).out;
    assert!(shown.contains("25.00 % (95 %: 4.56 to 69.94)"), "{shown}");

    // An IDX pair: one image ten times, once under each label.
    let pixels: Vec<u8> = (0..28 * 28).map(|i| (i % 251) as u8).collect();
    let (images, labels) =
        ([0, 0, 8, 3, 0, 0, 0, 10, 0, 0, 0, 28, 0, 0, 0, 28], [0, 0, 8, 1, 0, 0, 0, 10]);
    place.write("idx/t10k-images-idx3-ubyte", [&images[..], &pixels.repeat(10)].concat());
    place
        .write("idx/t10k-labels-idx1-ubyte", [&labels[..], &(0..10).collect::<Vec<u8>>()].concat());
    let found = place.run(&["classify", "vit", "--labelled", "idx", "--json"]).json();
    assert_eq!((&found["accuracy"], &found["n"]), (&json!(0.1), &json!(10)));
    let file = place.str("idx/t10k-images-idx3-ubyte");
    assert_eq!(found, place.run(&["classify", "vit", "--labelled", &file, "--json"]).json());

    place
        .write("idx/t10k-labels-idx1-ubyte", [&labels[..], &(1..11).collect::<Vec<u8>>()].concat());
    place.refuses(&["classify", "vit", "--labelled", "idx"], 2, &["image 9", "10 classes"]);
    place.picture("strange/LABEL_x/a.png");
    place.refuses(&["classify", "vit", "--labelled", "strange"], 2, &["LABEL_x", "10 labels"]);
    place.refuses(&["classify", "vit", "--labelled", "vit"], 2, &["one per class"]);
    place.refuses(&["classify", "vit", "--labelled", &image], 2, &["IDX pair"]);
    place.refuses(&["classify", "vit", &image, "--labelled", "set"], 2, &["--labelled"]);
}

/// Texts of two classes, and a probe on a two-block BERT that tells them apart.
fn text_classifier(place: &Place) -> String {
    place.bert("bert");
    // Fewer rows than features: a light penalty lets the probe learn them all.
    let rows: String = (0..24)
        .map(|i| {
            let (class, label) = [(5, "low"), (40, "high")][i % 2];
            let at = i / 2;
            let text = format!("w{} w{} w{}", class + at % 9, 25 + at % 7, class + at * 3 % 9);
            json!({"text": text, "label": label}).to_string() + "\n"
        })
        .collect();
    let table = place.write("lesson.jsonl", rows);
    let light = ["--l2", "1e-3", "-o", "probe"];
    place.run(&[&["apply", "linear-probe", "bert", "--data", &table][..], &light].concat()).code(0);
    table
}

#[test]
fn classify_reads_texts() {
    let place = Place::new();
    let table = text_classifier(&place);
    let lines = place.write("lines.txt", "w6 w26 w8\nw41 w26 w43\n");
    let found = place.run(&["classify", "probe", "--text", &lines, "--json"]).json();
    let results = found["results"].as_array().unwrap();
    assert_eq!((results.len(), &results[0]["text"]), (2, &json!("w6 w26 w8")));
    for (result, wanted) in results.iter().zip(["low", "high"]) {
        let classes = result["classes"].as_array().unwrap();
        assert_eq!((classes.len(), &classes[0]["label"]), (2, &json!(wanted)), "{result}");
        let logit = |i: usize| result["logits"][i].as_f64().unwrap();
        let difference = (logit(0) - logit(1)).abs();
        let probability = classes[0]["probability"].as_f64().unwrap();
        assert!((probability - 1.0 / (1.0 + (-difference).exp())).abs() < 1e-6, "{result}");
    }
    let shown = place.run(&["classify", "probe", "--text", &lines, "--top", "1"]).code(0).out;
    assert!(shown.contains("w41 w26 w43") && shown.contains("high"), "{shown}");
    for flag in ["--labelled", "--data"] {
        let found = place.run(&["classify", "probe", flag, &table, "--json"]).json();
        assert_eq!((&found["accuracy"], &found["n"]), (&json!(1.0), &json!(24)), "{found}");
    }
    // Numbers name classes too, and columns may have other names.
    let csv = place.write("held.csv", "words,kind\nw6 w26 w8,1\nw41 w26 w43,1\n");
    let columns = ["--text-column", "words", "--label-column", "kind"];
    let args = [&["classify", "probe", "--data", &csv, "--json"][..], &columns].concat();
    assert_eq!(place.run(&args).json()["accuracy"], json!(0.5));

    let shown = place.run(&["inspect", "probe"]).code(0).out;
    assert!(shown.contains("2: high, low"), "{shown}");
    assert_eq!(place.run(&["inspect", "probe", "--json"]).json()["labels"], json!(["high", "low"]));
    assert_eq!(place.run(&["inspect", "bert", "--json"]).json()["labels"], json!(null));
    let shown = place.run(&["explain", "probe"]).code(0).out;
    assert!(shown.contains("for each text 2 scores, one per class (high, low)"), "{shown}");

    let image = place.picture("shapes.png");
    place.refuses(&["classify", "probe", &image], 2, &["--text FILE"]);
    place.refuses(&["classify", "bert", "--text", &lines], 2, &["text encoder", "linear-probe"]);
    let blank = place.write("blank.txt", "w6\n\nw7\n");
    place.refuses(&["classify", "probe", "--text", &blank], 2, &["blank.txt", "line 2"]);
    let wrong = place.write("wrong.csv", "text,label\nw6,low\nw7,middle\n");
    place.refuses(
        &["classify", "probe", "--data", &wrong],
        2,
        &["wrong.csv:3", "`middle`", "high, low"],
    );
    place.vit("vit");
    place.refuses(&["classify", "vit", "--text", &lines], 2, &["image model"]);
    place.refuses(&["classify", "vit", "--labelled", &wrong], 2, &["wrong.csv", "images"]);
}
