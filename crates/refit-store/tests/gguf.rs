//! GGUF files against the `gguf` Python package (fixtures made by `fixtures/make_gguf.py`).

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use refit_store::{Artifact, DType, Error, Format, GgmlType, TensorFault};
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn floats(name: &str) -> Vec<f32> {
    let bytes = std::fs::read(fixture(name)).unwrap();
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn every_type_decodes_bit_for_bit_as_in_the_gguf_package() {
    let artifact = Artifact::open(fixture("blocks.gguf")).unwrap();
    assert_eq!(artifact.format(), Format::Gguf);
    let header = artifact.gguf().unwrap();
    let expected = floats("blocks.bin");
    let mut at = 0;
    let mut seen = Vec::new();
    for tensor in &header.tensors {
        let values = artifact.read_f32(&tensor.info.name).unwrap();
        for (i, (ours, theirs)) in values.iter().zip(&expected[at..]).enumerate() {
            assert_eq!(ours.to_bits(), theirs.to_bits(), "{} element {i}", tensor.info.name);
        }
        // Any range, also one that begins and ends inside a block.
        let mut part = vec![0.0; 301];
        artifact.read_f32_into(&tensor.info.name, 77, &mut part).unwrap();
        assert_eq!(part, values[77..378]);
        at += values.len();
        seen.push(tensor.info.dtype);
    }
    assert_eq!(at, expected.len());
    for &ggml in GgmlType::ALL {
        // Q8_K is an intermediate that the package neither writes nor decodes.
        assert!(ggml == GgmlType::Q8_K || seen.contains(&DType::Ggml(ggml)), "{ggml} untested");
    }
}

#[test]
fn a_llama_gguf_opens_like_a_directory() {
    let artifact = Artifact::open(fixture("tiny_llama.gguf")).unwrap();
    let config = artifact.config();
    assert_eq!(config.model_type(), Some("llama"));
    assert_eq!(config.usize("hidden_size"), Some(64));
    assert_eq!(config.usize("num_key_value_heads"), Some(2));
    assert_eq!(config.usize("vocab_size"), Some(40));
    assert_eq!(config.f64("rms_norm_eps"), Some(1e-5));
    assert_eq!(config.bool("tie_word_embeddings"), Some(true));
    let report = artifact.load_report();
    assert!(report.is_clean(), "{report}");
    // Rows are those of Hugging Face: the head permutation is undone, for whole and partial reads.
    let name = "model.layers.0.self_attn.q_proj.weight";
    let expected = floats("tiny_llama.bin");
    assert_eq!(artifact.read_f32(name).unwrap(), expected);
    let mut part = vec![0.0; 1000];
    artifact.read_f32_into(name, 333, &mut part).unwrap();
    assert_eq!(part, expected[333..1333]);
    // Stored bytes come in the same order: decoding them gives the same values.
    let info = artifact.tensor(name).unwrap();
    let mut raw = vec![0; info.nbytes as usize];
    artifact.read_raw_into(name, 0, &mut raw).unwrap();
    let mut decoded = vec![0.0; info.numel()];
    refit_store::convert::decode(info.dtype, &raw, &mut decoded);
    assert_eq!(decoded, expected);
    assert!(artifact.shared_bytes(name).is_none());
    let norm = artifact.shared_bytes("model.norm.weight").unwrap();
    assert_eq!(norm.len(), 64 * 4);
}

/// The value that `make_gguf_families.py` gives element `i` of a Hugging Face tensor.
fn value(name: &str, i: usize) -> f32 {
    let name: usize = name.bytes().map(usize::from).sum();
    ((name + 7 * i) % 251) as f32 / 64.0 - 125.0 / 64.0
}

/// Files whose names the `gguf` package chose come back under the names, shapes and row orders of transformers.
#[test]
fn every_translated_family_opens_like_its_directory() {
    let models: Value =
        serde_json::from_slice(&std::fs::read(fixture("transformers.json")).unwrap()).unwrap();
    for family in ["llama", "mixtral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "bert"] {
        let artifact = Artifact::open(fixture(&format!("families/{family}.gguf"))).unwrap();
        let model = &models["models"][family];
        let expected: Vec<(&String, Vec<usize>)> = model["tensors"]
            .as_object()
            .unwrap()
            .iter()
            // llama.cpp's converter leaves BERT's pooler out.
            .filter(|(name, _)| !name.starts_with("pooler."))
            .map(|(name, shape)| (name, serde_json::from_value(shape.clone()).unwrap()))
            .collect();
        let found: Vec<_> =
            artifact.tensors().iter().map(|info| (&info.name, info.shape.clone())).collect();
        assert_eq!(found, expected, "{family}");
        let report = artifact.load_report();
        assert!(report.is_clean() && report.absent_keys.is_empty(), "{family}: {report}");
        artifact.check_fit().unwrap();
        let architecture = artifact.architecture();
        assert!(!architecture.inferred && architecture.model_type == family);
        assert!(architecture.linears().next().is_some());
        for info in artifact.tensors() {
            let values = artifact.read_f32(&info.name).unwrap();
            let wrong = (0..values.len()).find(|&i| values[i] != value(&info.name, i));
            assert_eq!(wrong, None, "{family}: {}", info.name);
            let (start, len) = (values.len() / 3, values.len() / 2);
            let mut part = vec![0.0; len];
            artifact.read_f32_into(&info.name, start, &mut part).unwrap();
            assert_eq!(part, values[start..start + len], "{family}: {}", info.name);
        }
        for key in artifact.config().raw().keys() {
            let (ours, theirs) = (artifact.config().get(key), model["config"].get(key));
            // Keys that transformers spells another way by now, and what no longer stands in its files.
            let Some(theirs) = theirs.filter(|value| !value.is_null()) else { continue };
            match (ours.and_then(Value::as_f64), theirs.as_f64()) {
                // Gemma's scalar is not stored; its value follows from the width of a head.
                _ if key == "query_pre_attn_scalar" => {
                    assert_eq!(ours, model["config"].get("head_dim"))
                }
                (Some(ours), Some(theirs)) => {
                    assert!((ours - theirs).abs() <= 1e-6 * theirs.abs(), "{family}: {key}");
                }
                _ => assert_eq!(ours, Some(theirs), "{family}: {key}"),
            }
        }
    }
}

#[test]
fn types_that_are_not_read_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for (id, name) in [(16u32, "IQ2_XXS"), (29, "IQ1_M"), (4, "has removed"), (99, "number 99")] {
        let mut bytes = b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
        bytes.extend(1u64.to_le_bytes());
        bytes.push(b'w');
        bytes.extend(1u32.to_le_bytes());
        bytes.extend(256u64.to_le_bytes());
        bytes.extend(id.to_le_bytes());
        bytes.extend([0; 8 + 4096]);
        std::fs::write(&path, bytes).unwrap();
        match Artifact::open(&path) {
            Err(Error::BadTensor {
                tensor, reason: TensorFault::UnknownDType { dtype }, ..
            }) => {
                assert!(tensor == "w" && dtype.contains(name), "{dtype}");
            }
            other => panic!("{id}: {other:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// A changed header of any family is refused, or everything in it can be read.
    #[test]
    fn changed_headers_are_refused_or_read(
        family in proptest::sample::select(vec!["mixtral", "gemma2", "phi3", "gpt2", "bert"]),
        edits in proptest::collection::vec((0usize..4000, any::<u8>()), 1..4),
    ) {
        let mut bytes = std::fs::read(fixture(&format!("families/{family}.gguf"))).unwrap();
        for (at, byte) in edits {
            bytes[at] = byte;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        std::fs::write(&path, bytes).unwrap();
        if let Ok(artifact) = Artifact::open(&path) {
            let _ = (artifact.load_report(), artifact.tokenizer_json(), artifact.side_files());
            for info in artifact.tensors() {
                prop_assert_eq!(artifact.read_f32(&info.name).unwrap().len(), info.numel());
            }
        }
    }
}

/// Blocks made by ggml's reference quantizers (`fixtures/make_quantized.py`).
#[test]
fn every_quantizer_writes_the_bytes_of_ggml() {
    let artifact = Artifact::open(fixture("quantized.gguf")).unwrap();
    let values = artifact.read_f32("x").unwrap();
    for ggml in refit_store::formats::gguf::WRITABLE {
        let info = artifact.tensor(ggml.name()).unwrap();
        assert_eq!(info.dtype, DType::Ggml(ggml));
        let mut theirs = vec![0; info.nbytes as usize];
        artifact.read_raw_into(ggml.name(), 0, &mut theirs).unwrap();
        let mut ours = vec![0; theirs.len()];
        refit_store::convert::encode(info.dtype, &values, &mut ours).unwrap();
        let size = ggml.block_bytes();
        for (block, (ours, theirs)) in ours.chunks(size).zip(theirs.chunks(size)).enumerate() {
            assert_eq!(ours, theirs, "{ggml}, block {block}");
        }
    }
}
