//! `refit filter`: what is kept, what is said, what is refused.

mod common;

use common::Place;
use serde_json::Value;

/// Verses that the embedded model has learned, and lines that nobody could.
fn lines() -> String {
    let verses = [
        "In the beginning God created the heaven and the earth.",
        "And the LORD said unto Moses, Go in unto Pharaoh.",
        "And it came to pass in those days, that he went out.",
        "And he said unto them, Hear the word of the LORD.",
    ];
    let noise = ["qX7#zz 0x93fe kkkw vv", "9f8e-77aa Zq!! ~~pp", "zzxq 4417 hh0 bbb^^"];
    let mut all = String::new();
    for (i, text) in verses.iter().chain(&noise).enumerate() {
        all.push_str(&serde_json::json!({"id": i, "text": text}).to_string());
        all.push('\n');
    }
    all.push_str("{\"id\": 7, \"text\": \"  \"}\n");
    all
}

#[test]
fn the_least_surprising_records_are_kept() {
    let place = Place::new();
    place.write("data.jsonl", lines());
    let base =
        ["filter", "builtin:tiny", "--data", "data.jsonl", "-o", "kept.jsonl", "--keep", "0.6"];
    let dry = place.run(&[&base[..], &["--dry-run", "--json"]].concat()).json();
    assert_eq!(
        (&dry["records"], &dry["unscored"], &dry["kept"]),
        (&8.into(), &1.into(), &4.into())
    );
    assert!(!place.path("kept.jsonl").exists());
    let ran = place.run(&[&base[..], &["--json"]].concat()).json();
    assert_eq!(ran["kept"], 4);
    assert!(ran["median_perplexity_kept"].as_f64() < ran["median_perplexity_dropped"].as_f64());
    let read = || -> Vec<Value> {
        let text = std::fs::read_to_string(place.path("kept.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let kept = read();
    let ids: Vec<i64> = kept.iter().map(|row| row["id"].as_i64().unwrap()).collect();
    assert_eq!(ids, [0, 1, 2, 3], "the verses, in their order");
    let limit = ran["highest_perplexity_kept"].as_f64().unwrap();
    assert!(kept.iter().all(|row| row["perplexity"].as_f64().unwrap() <= limit));
    // All of them: what is kept can be learned from, and every dropped one scores higher.
    let all = [&base[..7], &["1", "--force", "--json"]].concat();
    place.run(&all).json();
    let rest: Vec<f64> =
        read().iter().skip(4).map(|row| row["perplexity"].as_f64().unwrap()).collect();
    assert_eq!(rest.len(), 3);
    assert!(rest.iter().all(|score| *score > limit), "{rest:?} {limit}");
    let learn = "apply lora builtin:tiny --data kept.jsonl --steps 1 --batch 1 --rank 1 -o adapter";
    place.run(&learn.split(' ').collect::<Vec<_>>()).code(0);
}

#[test]
fn mistakes_are_found_before_the_work() {
    let place = Place::new();
    place.write("data.jsonl", lines());
    place.write("words.txt", "words\n");
    place.write("other.jsonl", "{\"a\": 1}\n");
    place.write("empty.jsonl", "{\"text\": \" \"}\n");
    place.write("there.jsonl", "mine");
    let refuses = |args: &[&str], parts: &[&str]| {
        place.refuses(&[&["filter", "builtin:tiny"], args].concat(), 2, parts);
    };
    refuses(&["--data", "data.jsonl", "-o", "x", "--keep", "0"], &["--keep 0", "above 0"]);
    refuses(&["--data", "data.jsonl", "-o", "x", "--keep", "NaN"], &["--keep"]);
    refuses(&["--data", "data.jsonl", "-o", "x", "--keep", "0.01"], &["would be none"]);
    refuses(&["--data", "data.jsonl", "-o", "x", "--max-length", "1"], &["at least 2 tokens"]);
    refuses(&["--data", "data.jsonl", "-o", "there.jsonl"], &["there.jsonl exists", "--force"]);
    refuses(&["--data", "data.jsonl", "-o", "data.jsonl", "--force"], &["data.jsonl is read here"]);
    refuses(&["--data", "words.txt", "-o", "x"], &["words.txt", ".jsonl"]);
    refuses(&["--data", "other.jsonl", "-o", "x"], &["other.jsonl", "`text`"]);
    refuses(&["--data", "empty.jsonl", "-o", "x"], &["empty.jsonl:1", "empty"]);
    assert_eq!(std::fs::read_to_string(place.path("there.jsonl")).unwrap(), "mine");
}
