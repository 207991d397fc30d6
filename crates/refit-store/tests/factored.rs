//! Matrices that are stored in factors, and quantized ones with a product of low rank beside them, are opened as plain matrices.

use std::path::Path;

use refit_store::writer::{ArtifactWriter, WritePlan};
use refit_store::{Artifact, Card, DType, Lineage, SideFile, TensorSpec};
use serde_json::{Value, json};

/// A tensor to write: name, shape, values.
type Part<'a> = (&'a str, &'a [usize], &'a [f32]);

fn write(dir: &Path, parts: &[Part], bytes: &[(&str, &[usize], &[i8])], low_rank: Value) {
    let mut config = json!({ "model_type": "unknown" });
    if !low_rank.is_null() {
        config["low_rank"] = low_rank;
    }
    let spec = |name: &str, shape: &[usize], dtype| TensorSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype,
    };
    let floats = parts.iter().map(|(name, shape, _)| spec(name, shape, DType::F32));
    let plan = WritePlan {
        tensors: floats.chain(bytes.iter().map(|(n, s, _)| spec(n, s, DType::I8))).collect(),
        side_files: vec![SideFile::from_bytes("config.json", config.to_string().into_bytes())],
        ..WritePlan::default()
    };
    let writer = ArtifactWriter::create(dir, plan).unwrap();
    for (name, _, values) in parts {
        writer.write_f32(name, 0, values).unwrap();
        writer.done(name).unwrap();
    }
    for (name, _, codes) in bytes {
        let codes: Vec<u8> = codes.iter().map(|code| *code as u8).collect();
        writer.write_raw(name, 0, &codes).unwrap();
        writer.done(name).unwrap();
    }
    writer.finish(Lineage::new("fixture", json!({})), Card::new("fixture")).unwrap();
}

const LEFT: [f32; 6] = [1.0, 2.0, 3.0, -1.0, 0.5, 4.0];
const RIGHT: [f32; 8] = [1.0, 0.0, 2.0, -3.0, 5.0, 1.0, 0.0, 2.0];
/// `LEFT [3, 2] · RIGHT [2, 4]`.
const PRODUCT: [f32; 12] = [11.0, 2.0, 2.0, 1.0, -2.0, -1.0, 6.0, -11.0, 20.5, 4.0, 1.0, 6.5];

/// The pair of the given name, and its sites as the configuration lists them.
fn pair(dir: &Path) -> Value {
    let parts: [Part; 4] = [
        ("a.q_proj.0.weight", &[2, 4], &RIGHT),
        ("a.q_proj.1.weight", &[3, 2], &LEFT),
        ("a.q_proj.1.bias", &[3], &[7.0, 8.0, 9.0]),
        // A pair by its names alone is two layers of something else.
        ("mlp.0.weight", &[2, 4], &RIGHT),
    ];
    let sites = json!({ "method": "svd", "sites": { "a.q_proj": 2 } });
    write(dir, &parts, &[], sites.clone());
    sites
}

#[test]
fn a_pair_is_read_as_its_product() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pair");
    pair(&path);
    let artifact = Artifact::open(&path).unwrap();
    let names: Vec<&str> = artifact.tensors().iter().map(|info| &*info.name).collect();
    assert_eq!(names, ["a.q_proj.bias", "a.q_proj.weight", "mlp.0.weight"]);
    let info = artifact.tensor("a.q_proj.weight").unwrap();
    assert_eq!((&info.shape[..], info.dtype), (&[3, 4][..], DType::F32));
    assert_eq!(artifact.read_f32("a.q_proj.weight").unwrap(), PRODUCT);
    assert_eq!(artifact.read_f32("a.q_proj.bias").unwrap(), [7.0, 8.0, 9.0]);
    // A part that begins and ends within rows, and the same as bytes.
    let mut some = [0.0; 6];
    artifact.read_f32_into("a.q_proj.weight", 3, &mut some).unwrap();
    assert_eq!(some, PRODUCT[3..9]);
    let mut bytes = [0; 7];
    artifact.read_raw_into("a.q_proj.weight", 13, &mut bytes).unwrap();
    let all: Vec<u8> = PRODUCT.iter().flat_map(|x| x.to_le_bytes()).collect();
    assert_eq!(bytes, all[13..20]);
    assert_eq!(artifact.stored_bytes("a.q_proj.weight").unwrap(), 4 * (6 + 8));
    let factors = artifact.factors("a.q_proj.weight").unwrap().unwrap();
    assert_eq!((factors.rank, &factors.left[..], &factors.right[..]), (2, &LEFT[..], &RIGHT[..]));
    assert!(!artifact.is_compensated("a.q_proj.weight"));
    assert_eq!(artifact.factors("mlp.0.weight").unwrap(), None);
    // What is written from here is multiplied out, so its configuration must not speak of factors.
    let config = artifact.side_files().iter().find(|file| file.name == "config.json").unwrap();
    let config: Value = serde_json::from_slice(&config.read().unwrap()).unwrap();
    assert_eq!(config, json!({ "model_type": "unknown" }));
}

#[test]
fn a_compensation_is_added_to_its_weight() {
    let dir = tempfile::tempdir().unwrap();
    let base: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let sum: Vec<f32> = base.iter().zip(PRODUCT).map(|(a, b)| a + b).collect();
    let path = dir.path().join("floats");
    let weight: Part = ("a.q_proj.weight", &[3, 4], &base);
    let factors: [Part; 2] =
        [("a.q_proj.lorc_u", &[3, 2], &LEFT), ("a.q_proj.lorc_v", &[2, 4], &RIGHT)];
    write(&path, &[weight, factors[0], factors[1]], &[], Value::Null);
    let artifact = Artifact::open(&path).unwrap();
    assert_eq!(artifact.tensors().len(), 1);
    assert_eq!(artifact.read_f32("a.q_proj.weight").unwrap(), sum);
    assert!(artifact.is_compensated("a.q_proj.weight"));
    assert_eq!(artifact.read_uncompensated("a.q_proj.weight").unwrap(), Some(base.clone()));
    assert_eq!(artifact.coded("a.q_proj.weight").unwrap(), None);

    // Codes of eight bits: left columns by 0.5 and 2, right rows by 0.25 and 1.
    let path = dir.path().join("codes");
    let scales: [Part; 2] = [
        ("a.q_proj.lorc_u_scale", &[2], &[0.5, 2.0]),
        ("a.q_proj.lorc_v_scale", &[2], &[0.25, 1.0]),
    ];
    let codes: [(&str, &[usize], &[i8]); 2] = [
        ("a.q_proj.lorc_u", &[3, 2], &[2, 1, 6, -1, 1, 2]),
        ("a.q_proj.lorc_v", &[2, 4], &[4, 0, 8, -12, 5, 1, 0, 2]),
    ];
    write(&path, &[weight, scales[0], scales[1]], &codes, Value::Null);
    let artifact = Artifact::open(&path).unwrap();
    let found = artifact.factors("a.q_proj.weight").unwrap().unwrap();
    assert_eq!(found.left, [1.0, 2.0, 3.0, -2.0, 0.5, 4.0]);
    assert_eq!(found.right, RIGHT);
    assert_eq!(artifact.stored_bytes("a.q_proj.weight").unwrap(), 4 * 12 + 6 + 8 + 8 + 8);
}

#[test]
fn halves_and_misfits_are_errors_that_name_them() {
    let dir = tempfile::tempdir().unwrap();
    let sites = json!({ "sites": { "a": 2 } });
    let base = [0.0; 12];
    let weight: Part = ("a.weight", &[3, 4], &base);
    let v: Part = ("a.lorc_v", &[2, 4], &RIGHT);
    type Case<'a> = (&'a str, Vec<Part<'a>>, Value, &'a str);
    let cases: [Case; 6] = [
        ("first", vec![("a.1.weight", &[3, 2], &LEFT)], sites.clone(), "`a.0.weight` is missing"),
        (
            "ranks",
            vec![("a.0.weight", &[4, 2], &RIGHT), ("a.1.weight", &[2, 3], &LEFT)],
            sites,
            "no product",
        ),
        ("half", vec![weight, ("a.lorc_u", &[3, 2], &LEFT)], Value::Null, "`a.lorc_v`"),
        ("alone", vec![("a.lorc_u", &[3, 2], &LEFT), v], Value::Null, "the weight itself is not"),
        ("shape", vec![weight, ("a.lorc_u", &[2, 2], &LEFT[..4]), v], Value::Null, "[3, 4]"),
        (
            "scales",
            vec![weight, ("a.lorc_u", &[3, 2], &LEFT), ("a.lorc_u_scale", &[2], &LEFT[..2]), v],
            Value::Null,
            "its scales are there",
        ),
    ];
    for (name, parts, low_rank, expected) in cases {
        let path = dir.path().join(name);
        write(&path, &parts, &[], low_rank);
        let error = Artifact::open(&path).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("`a.weight`"), "{name}: {error}");
    }
}
