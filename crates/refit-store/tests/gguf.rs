//! GGUF files against the `gguf` Python package (fixtures made by `fixtures/make_gguf.py`).

use std::path::{Path, PathBuf};

use refit_store::{Artifact, DType, Format, GgmlType};

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
