//! compressed-tensors and GPTQ directories, written here word by word, are opened as plain matrices.

use std::path::Path;

use refit_store::lattice::Lattice;
use refit_store::writer::{ArtifactWriter, WritePlan};
use refit_store::{Artifact, Card, DType, Lineage, SideFile, TensorSpec};
use serde_json::{Value, json};

/// A tensor to write: name, type, shape, bytes.
type Part = (&'static str, DType, Vec<usize>, Vec<u8>);

fn words(list: &[u32]) -> Vec<u8> {
    list.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn halves(list: &[f32]) -> Vec<u8> {
    list.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect()
}

fn write(dir: &Path, parts: &[Part], settings: Value) {
    let config = json!({ "model_type": "unknown", "quantization_config": settings });
    let spec = |(name, dtype, shape, _): &Part| TensorSpec {
        name: (*name).to_owned(),
        shape: shape.clone(),
        dtype: *dtype,
    };
    let plan = WritePlan {
        tensors: parts.iter().map(spec).collect(),
        side_files: vec![SideFile::from_bytes("config.json", config.to_string().into_bytes())],
        ..WritePlan::default()
    };
    let writer = ArtifactWriter::create(dir, plan).unwrap();
    for (name, _, _, bytes) in parts {
        writer.write_raw(name, 0, bytes).unwrap();
        writer.done(name).unwrap();
    }
    writer.finish(Lineage::new("fixture", json!({})), Card::new("fixture")).unwrap();
}

fn compressed(bits: u8, symmetric: bool, group: Value) -> Value {
    json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": { "group_0": {
            "targets": ["re:.*proj$"],
            "weights": { "num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group },
        } },
    })
}

/// Codes of three bits run on from word to word; older files have ten to a word.
#[test]
fn three_bits_are_read_in_both_packings() {
    let dir = tempfile::tempdir().unwrap();
    // Two rows of 64 inputs in groups of 32; code k of row r is (5 k + r) % 8, minus 4.
    let code = |r: usize, k: usize| ((5 * k + r) % 8) as u32;
    let scales = [[0.5, 2.0], [0.25, 8.0]];
    let expected: Vec<f32> = (0..128)
        .map(|at| (code(at / 64, at % 64) as f32 - 4.0) * scales[at / 64][at % 64 / 32])
        .collect();
    for (name, words) in [("dense", 6), ("sparse", 7)] {
        let path = dir.path().join(name);
        let mut packed = vec![0u32; 2 * words];
        for r in 0..2 {
            for k in 0..64 {
                let bit = if words == 6 { 3 * k } else { k / 10 * 32 + 3 * (k % 10) };
                let wide = u64::from(code(r, k)) << (bit % 32);
                packed[r * words + bit / 32] |= wide as u32;
                if wide >> 32 > 0 {
                    packed[r * words + bit / 32 + 1] |= (wide >> 32) as u32;
                }
            }
        }
        let listed = [2i64, 64].map(i64::to_le_bytes).concat();
        let parts: Vec<Part> = vec![
            ("a.q_proj.weight_packed", DType::I32, vec![2, words], self::words(&packed)),
            ("a.q_proj.weight_scale", DType::F16, vec![2, 2], halves(&scales.concat())),
            ("a.q_proj.weight_shape", DType::I64, vec![2], listed),
            ("a.norm.weight", DType::F32, vec![2], self::words(&[0, 0])),
        ];
        write(&path, &parts, compressed(3, true, json!(32)));
        let artifact = Artifact::open(&path).unwrap();
        assert_eq!(artifact.packed(), Some("compressed-tensors"));
        let names: Vec<&str> = artifact.tensors().iter().map(|info| &*info.name).collect();
        assert_eq!(names, ["a.norm.weight", "a.q_proj.weight"]);
        assert_eq!(artifact.read_f32("a.q_proj.weight").unwrap(), expected, "{name}");
        let mut part = [0.0; 70];
        artifact.read_f32_into("a.q_proj.weight", 17, &mut part).unwrap();
        assert_eq!(part, expected[17..87]);
        let lattice = artifact.stored_lattice("a.q_proj.weight").unwrap();
        assert_eq!(lattice, Some(Lattice { bits: 3, symmetric: true, group: 32 }));
        let stored = artifact.stored_bytes("a.q_proj.weight").unwrap();
        assert_eq!(stored, 8 * words as u64 + 8);
        // What is passed on describes decoded weights.
        let config = artifact.side_files().iter().find(|file| file.name == "config.json").unwrap();
        let config = String::from_utf8(config.read().unwrap()).unwrap();
        assert!(!config.contains("quantization_config"));
        assert!(artifact.shared_bytes("a.q_proj.weight").is_none());
    }
}

#[test]
fn zero_points_are_packed_along_the_outputs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    // Nine outputs, eight inputs of four bits, one group: two words of zero points.
    let packed: Vec<u32> = (0..9).map(|r: u32| 0x7654_3210u32.rotate_left(4 * r)).collect();
    let zeros = [0x8765_4321u32, 9];
    let parts: Vec<Part> = vec![
        ("q_proj.weight_packed", DType::I32, vec![9, 1], words(&packed)),
        ("q_proj.weight_scale", DType::F16, vec![9, 1], halves(&[0.5; 9])),
        ("q_proj.weight_zero_point", DType::I32, vec![2, 1], words(&zeros)),
        ("q_proj.weight_shape", DType::I64, vec![2], [9i64, 8].map(i64::to_le_bytes).concat()),
    ];
    write(&path, &parts, compressed(4, false, Value::Null));
    let values = Artifact::open(&path).unwrap().read_f32("q_proj.weight").unwrap();
    for r in 0..9 {
        for k in 0..8 {
            let code = (packed[r] >> (4 * k)) & 15;
            assert_eq!(values[8 * r + k], (code as f32 - (r + 1) as f32) * 0.5);
        }
    }
}

#[test]
fn both_versions_of_gptq_and_any_order_of_groups_are_read() {
    let dir = tempfile::tempdir().unwrap();
    // Eight inputs, eight outputs, four bits: code i of output o is (i + o) % 16; two groups, zero points o + 1.
    let codes: Vec<u32> =
        (0..8u32).map(|o| (0..8).fold(0, |word, i| word | ((i + o) % 16) << (4 * i))).collect();
    let zeros = |less: u32| -> u32 { (0..8).fold(0, |word, o| word | (o + 1 - less) << (4 * o)) };
    let scales: Vec<f32> = (0..16).map(|at| if at < 8 { 0.5 } else { 2.0 }).collect();
    let order = [0, 1, 0, 1, 1, 1, 0, 0u32];
    for (version, less) in [("gptq", 1), ("gptq_v2", 0)] {
        let path = dir.path().join(version);
        let parts: Vec<Part> = vec![
            ("o_proj.qweight", DType::I32, vec![1, 8], words(&codes)),
            ("o_proj.qzeros", DType::I32, vec![2, 1], words(&[zeros(less); 2])),
            ("o_proj.scales", DType::F16, vec![2, 8], halves(&scales)),
            ("o_proj.g_idx", DType::I32, vec![8], words(&order)),
        ];
        let settings = json!({ "quant_method": "gptq", "bits": 4, "checkpoint_format": version });
        write(&path, &parts, settings);
        let artifact = Artifact::open(&path).unwrap();
        let values = artifact.read_f32("o_proj.weight").unwrap();
        for o in 0..8 {
            for i in 0..8 {
                let scale = if order[i] == 0 { 0.5 } else { 2.0 };
                let expected = (((i + o) % 16) as f32 - (o + 1) as f32) * scale;
                assert_eq!(values[8 * o + i], expected, "{version} {o} {i}");
            }
        }
        // Groups that are not consecutive are no grid of consecutive inputs.
        assert_eq!(artifact.stored_lattice("o_proj.weight").unwrap(), None);
    }
}

#[test]
fn parts_that_do_not_fit_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let shape = || [2i64, 12].map(i64::to_le_bytes).concat();
    let packed = || ("q_proj.weight_packed", DType::I32, vec![2, 2], words(&[0; 4]));
    let scale = || ("q_proj.weight_scale", DType::F16, vec![2, 3], halves(&[0.0; 6]));
    let listed = || ("q_proj.weight_shape", DType::I64, vec![2], shape());
    let settings = || compressed(3, true, json!(4));
    let cases: [(Vec<Part>, Value, &str); 5] = [
        (vec![packed(), scale()], settings(), "weight_shape"),
        (vec![scale(), listed()], settings(), "`weight` is missing"),
        (vec![packed(), scale(), listed()], compressed(8, true, json!(4)), "weight_packed"),
        (vec![packed(), scale(), listed()], compressed(3, true, json!(6)), "3 groups"),
        (vec![packed(), scale(), listed()], compressed(3, false, json!(4)), "weight_zero_point"),
    ];
    for (at, (parts, settings, word)) in cases.into_iter().enumerate() {
        let path = dir.path().join(at.to_string());
        write(&path, &parts, settings);
        let error = Artifact::open(&path).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("q_proj.weight"), "{error}");
    }
}
