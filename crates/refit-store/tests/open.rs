//! Directories, shards and damaged files.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use refit_store::{Artifact, Error, Format, ShardFault, TensorFault};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A safetensors file of one-element `F32` tensors, each holding its place in the list.
fn safetensors(names: &[&str]) -> Vec<u8> {
    let entries: Vec<String> = names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let (start, end) = (4 * i, 4 * i + 4);
            format!(r#""{name}":{{"dtype":"F32","shape":[1],"data_offsets":[{start},{end}]}}"#)
        })
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..names.len()).flat_map(|i| (i as f32).to_le_bytes()));
    bytes
}

fn sharded(dir: &Path, map: &str) -> Result<Artifact, Error> {
    fs::write(dir.join("one.safetensors"), safetensors(&["a", "b"])).unwrap();
    fs::write(dir.join("two.safetensors"), safetensors(&["c"])).unwrap();
    let index = format!(r#"{{"metadata":{{}},"weight_map":{{{map}}}}}"#);
    fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    Artifact::open(dir)
}

const GOOD: &str = r#""a":"one.safetensors","b":"one.safetensors","c":"two.safetensors""#;

#[test]
fn a_sharded_directory_opens_as_one_model() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), r#"{"model_type":"bert"}"#).unwrap();
    fs::write(dir.path().join("vocab.txt"), "[PAD]\n").unwrap();
    fs::create_dir(dir.path().join("1_Pooling")).unwrap();
    fs::write(dir.path().join("1_Pooling/config.json"), "{}").unwrap();
    let artifact = sharded(dir.path(), GOOD).unwrap();
    assert_eq!(artifact.format(), Format::Safetensors);
    assert_eq!(artifact.config().model_type(), Some("bert"));
    let names: Vec<_> = artifact.tensors().iter().map(|info| &*info.name).collect();
    assert_eq!(names, ["a", "b", "c"]);
    assert_eq!(artifact.read_f32("b").unwrap(), [1.0]);
    let side: Vec<_> = artifact.side_files().iter().map(|file| &*file.name).collect();
    assert_eq!(side, ["1_Pooling/config.json", "config.json", "vocab.txt"]);
    assert_eq!(artifact.tokenizer_json().unwrap(), None);
    assert_eq!(artifact.file_hashes().unwrap().len(), 5);
    assert!(matches!(artifact.tensor("aa"), Err(Error::NoSuchTensor { .. })));
    let mut out = [0.0; 2];
    assert!(matches!(artifact.read_f32_into("a", 0, &mut out), Err(Error::OutOfRange { .. })));
    assert!(matches!(
        artifact.read_f32_into("a", usize::MAX, &mut out),
        Err(Error::OutOfRange { .. })
    ));
}

fn shard_fault(map: &str) -> ShardFault {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("outside.safetensors"), safetensors(&["c"])).unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    std::os::unix::fs::symlink("../outside.safetensors", model.join("link.safetensors")).unwrap();
    match sharded(&model, map) {
        Err(Error::BadShard { reason, index, .. }) => {
            assert!(index.ends_with("model.safetensors.index.json"));
            reason
        }
        other => panic!("expected a shard fault, got {other:?}"),
    }
}

#[test]
fn indexes_are_not_followed_out_of_the_directory() {
    for shard in ["../outside.safetensors", "/etc/passwd", "link.safetensors", "", "x/../../y"] {
        let map = format!(r#""a":"one.safetensors","c":"{shard}""#);
        assert_eq!(shard_fault(&map), ShardFault::Outside, "{shard}");
    }
    let missing = r#""a":"one.safetensors","c":"three.safetensors""#;
    assert!(matches!(shard_fault(missing), ShardFault::Missing { tensor } if tensor == "c"));
    let lacks = r#""a":"one.safetensors","c":"one.safetensors""#;
    assert!(matches!(shard_fault(lacks), ShardFault::LacksTensor { tensor } if tensor == "c"));
}

#[test]
fn a_hugging_face_cache_is_followed_through_its_links() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = dir.path().join("snapshots/abc");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir(dir.path().join("blobs")).unwrap();
    fs::write(dir.path().join("blobs/hash"), safetensors(&["d"])).unwrap();
    std::os::unix::fs::symlink("../../blobs/hash", snapshot.join("linked.safetensors")).unwrap();
    let artifact = sharded(&snapshot, &format!(r#"{GOOD},"d":"linked.safetensors""#)).unwrap();
    assert_eq!(artifact.tensors().len(), 4);
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("three.safetensors"), safetensors(&["a", "d"])).unwrap();
    let error = sharded(dir.path(), &format!(r#"{GOOD},"d":"three.safetensors""#)).unwrap_err();
    let duplicate = matches!(
        &error,
        Error::BadTensor { tensor, reason: TensorFault::Duplicate { other: Some(_) }, .. } if tensor == "a"
    );
    assert!(duplicate, "{error}");
}

#[test]
fn what_is_no_model_says_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let not = |error: Error| assert!(matches!(error, Error::NotAnArtifact { .. }), "{error}");
    not(Artifact::open(dir.path()).unwrap_err());
    for (name, content) in [("notes.txt", &b"hello"[..]), ("model.h5", b"\x89HDF\r\n\x1a\n")] {
        fs::write(dir.path().join(name), content).unwrap();
        not(Artifact::open(dir.path().join(name)).unwrap_err());
    }
    fs::write(dir.path().join("a.safetensors"), safetensors(&["a"])).unwrap();
    assert_eq!(Artifact::open(dir.path()).unwrap().tensors().len(), 1);
    fs::write(dir.path().join("b.safetensors"), safetensors(&["b"])).unwrap();
    let error = Artifact::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("a.safetensors, b.safetensors"), "{error}");
    assert!(matches!(Artifact::open(dir.path().join("absent")), Err(Error::Io { .. })));
    for name in ["empty.safetensors", "empty.gguf", "empty.pth"] {
        let path = dir.path().join(name);
        fs::write(&path, []).unwrap();
        let error = Artifact::open(&path).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
    fs::write(dir.path().join("config.json"), "{\n  \"a\": ,\n}").unwrap();
    let error = Artifact::open(dir.path().join("a.safetensors")).unwrap_err();
    assert!(matches!(error, Error::Json { line: 2, .. }), "{error}");
}

#[test]
fn every_truncation_of_a_file_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let whole = safetensors(&["a", "b"]);
    let path = dir.path().join("model.safetensors");
    for len in 0..whole.len() {
        fs::write(&path, &whole[..len]).unwrap();
        let error = Artifact::open(&path).unwrap_err();
        assert!(error.to_string().contains("model.safetensors"), "{error}");
    }
    let gguf = fs::read(fixture("tiny_llama.gguf")).unwrap();
    for len in (0..gguf.len()).step_by(97) {
        let parsed =
            refit_store::formats::gguf::parse(Path::new("m.gguf"), &gguf[..len], len as u64);
        assert!(parsed.is_err(), "{len}");
    }
}

/// The fixture with the tensor entry of `name` changed by `edit`, which sees the bytes after the name.
fn edited(name: &str, edit: impl Fn(&mut [u8])) -> Error {
    let mut bytes = fs::read(fixture("blocks.gguf")).unwrap();
    let at = bytes.windows(name.len()).position(|w| w == name.as_bytes()).unwrap() + name.len();
    edit(&mut bytes[at..]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    let error = Artifact::open(&path).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("model.gguf") && message.contains(name), "{message}");
    error
}

#[test]
fn damaged_gguf_entries_name_the_tensor() {
    // After the name: u32 rank, u64 dims[2], u32 type, u64 offset.
    let fault = |edit: &dyn Fn(&mut [u8])| match edited("q4_1", edit) {
        Error::BadTensor { reason, .. } => reason,
        other => panic!("expected a tensor fault, got {other}"),
    };
    assert!(matches!(fault(&|e| e[0] = 9), TensorFault::Other(_)));
    assert!(matches!(fault(&|e| e[4] = 1), TensorFault::BlockMismatch { .. }));
    assert!(matches!(
        fault(&|e| {
            e[4..20].fill(0xff);
            e[4] = 0xe0;
        }),
        TensorFault::Overflow { .. }
    ));
    assert!(matches!(fault(&|e| e[20] = 200), TensorFault::UnknownDType { .. }));
    assert!(matches!(fault(&|e| e[24] = 1), TensorFault::Other(_)));
    assert!(matches!(fault(&|e| e[30] = 0xff), TensorFault::OutOfBounds { .. }));
    assert!(matches!(fault(&|e| e[24..32].fill(0)), TensorFault::Overlaps { .. }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn arbitrary_gguf_never_panics(tail in proptest::collection::vec(any::<u8>(), 0..300)) {
        let bytes = [&b"GGUF\x03\0\0\0"[..], &tail].concat();
        let _ = refit_store::formats::gguf::parse(Path::new("m"), &bytes, bytes.len() as u64);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn mutated_gguf_never_panics(
        edits in proptest::collection::vec((0usize..4000, any::<u8>()), 1..8),
    ) {
        let mut bytes = fs::read(fixture("tiny_llama.gguf")).unwrap();
        for (at, value) in edits {
            bytes[at] = value;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        fs::write(&path, bytes).unwrap();
        if let Ok(artifact) = Artifact::open(&path) {
            let _ = artifact.tokenizer_json();
            let _ = artifact.side_files();
            let _ = artifact.architecture();
            for info in artifact.tensors() {
                let mut out = vec![0.0; info.numel().min(100)];
                prop_assert!(artifact.read_f32_into(&info.name, 0, &mut out).is_ok());
            }
        }
    }
}

#[test]
fn broken_values_are_found_with_their_place() {
    let values = [1.0, f32::NAN, 2.0, f32::INFINITY, 0.0, 0.0, 3.0, 4.0];
    let header = r#"{"w":{"dtype":"F32","shape":[4,2],"data_offsets":[0,32]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(values.iter().flat_map(|x| x.to_le_bytes()));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    fs::write(&path, bytes).unwrap();
    let artifact = Artifact::open(&path).unwrap();
    let lines: Vec<_> = artifact.validate().unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(
        lines,
        [
            "tensor `w` holds 1 NaN and 1 infinite values, first at index 1",
            "tensor `w`: 1 of 4 rows are all zero, first row 2",
        ]
    );
    assert_eq!(artifact.census()[&refit_store::DType::F32].elements, 8);
    let llama = Artifact::open(fixture("tiny_llama.gguf")).unwrap();
    let grid = llama.grid("model.layers.0.mlp.up_proj.weight").unwrap().unwrap();
    assert_eq!(grid.to_string(), "weights lie on a 16-level grid per 32 inputs: source was Q4_1");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Any index gives a model whose tensors are those of files inside the directory, or an error that names the index
    /// or a shard.
    #[test]
    fn any_index_is_followed_or_refused(
        map in proptest::collection::btree_map("[abcd]", prop_oneof![
            4 => Just("one.safetensors".to_owned()),
            2 => Just("two.safetensors".to_owned()),
            1 => "(\\.\\./|/|\\./|\\\\|one|\\.safetensors|model|outside|é){0,4}",
        ], 0..5),
    ) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("outside.safetensors"), safetensors(&["d"])).unwrap();
        let model = dir.path().join("model");
        fs::create_dir(&model).unwrap();
        let text = serde_json::to_string(&map).unwrap();
        match sharded(&model, &text[1..text.len() - 1]) {
            Ok(artifact) => {
                let names: Vec<_> = artifact.tensors().iter().map(|info| info.name.clone()).collect();
                prop_assert!(map.keys().all(|name| names.contains(name)), "{map:?} {names:?}");
                prop_assert!(!names.contains(&"d".to_owned()), "followed outside");
                for name in names {
                    prop_assert_eq!(artifact.read_f32(&name).unwrap().len(), 1);
                }
            }
            Err(error) => prop_assert!(error.to_string().contains("safetensors"), "{error}"),
        }
    }

    #[test]
    fn a_damaged_index_is_followed_or_refused(at in any::<prop::sample::Index>(), with in "(\\PC|[\"{}\\[\\],:0-]){0,3}") {
        let dir = tempfile::tempdir().unwrap();
        sharded(dir.path(), GOOD).unwrap();
        let path = dir.path().join("model.safetensors.index.json");
        let mut text = fs::read_to_string(&path).unwrap();
        let at = at.index(text.len());
        text.replace_range(at..at + 1, &with);
        fs::write(&path, text).unwrap();
        match Artifact::open(dir.path()) {
            Ok(artifact) => prop_assert!(artifact.tensors().len() <= 3),
            Err(error) => prop_assert!(error.to_string().contains(dir.path().to_str().unwrap()), "{error}"),
        }
    }
}
