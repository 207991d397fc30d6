//! PyTorch checkpoints: what torch wrote is read, what an attacker wrote is refused.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use refit_store::formats::torch;
use refit_store::{Artifact, DType, Error, Format};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

#[test]
fn both_layouts_give_the_values_that_torch_has() {
    let text = std::fs::read_to_string(fixture("expected.json")).unwrap();
    let expected: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    for file in ["zip.pth", "legacy.pth"] {
        let artifact = Artifact::open(fixture(file)).unwrap();
        assert_eq!(artifact.format(), Format::Torch);
        let names: Vec<_> = artifact.tensors().iter().map(|info| &*info.name).collect();
        let mut wanted: Vec<_> = expected.keys().map(String::as_str).collect();
        wanted.sort_unstable();
        assert_eq!(names, wanted, "{file}");
        for (name, value) in &expected {
            let shape: Vec<usize> = serde_json::from_value(value["shape"].clone()).unwrap();
            let values: Vec<f64> = serde_json::from_value(value["values"].clone()).unwrap();
            assert_eq!(artifact.tensor(name).unwrap().shape, shape, "{file} {name}");
            let read = artifact.read_f32(name).unwrap();
            let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
            assert_eq!(read, values, "{file} {name}");
            if read.len() > 3 {
                let mut part = vec![0.0; read.len() - 2];
                artifact.read_f32_into(name, 1, &mut part).unwrap();
                assert_eq!(part, read[1..read.len() - 1], "{file} {name}");
            }
        }
        assert_eq!(artifact.tensor("bf16").unwrap().dtype, DType::BF16);
        assert_eq!(artifact.tensor("bool").unwrap().dtype, DType::Bool);
        assert!(artifact.shared_bytes("transposed").is_none());
    }
}

/// A zip archive of stored members.
fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut central) = (Vec::new(), Vec::new());
    for (name, data) in members {
        let offset = file.len() as u32;
        let (name_len, size) =
            ((name.len() as u16).to_le_bytes(), (data.len() as u32).to_le_bytes());
        file.extend(b"PK\x03\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        file.extend([size, size].concat());
        file.extend(name_len);
        file.extend([0, 0]);
        file.extend(name.as_bytes());
        file.extend(*data);
        central.extend(b"PK\x01\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        central.extend([size, size].concat());
        central.extend(name_len);
        central.extend([0; 12]);
        central.extend(offset.to_le_bytes());
        central.extend(name.as_bytes());
    }
    let start = file.len() as u32;
    file.extend(&central);
    file.extend(b"PK\x05\x06\0\0\0\0");
    file.extend((members.len() as u16).to_le_bytes());
    file.extend((members.len() as u16).to_le_bytes());
    file.extend((central.len() as u32).to_le_bytes());
    file.extend(start.to_le_bytes());
    file.extend([0, 0]);
    file
}

/// The pickle of `{"w": tensor}` over `numel` floats with this offset, shape and stride.
fn tensor_pickle(numel: u8, offset: u8, shape: u8, stride: u8) -> Vec<u8> {
    let mut pickle = b"\x80\x02}(X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK".to_vec();
    pickle.push(numel);
    pickle.extend(b"tQK");
    pickle.push(offset);
    pickle.extend([b'K', shape, 0x85, b'K', stride, 0x85]);
    pickle.extend(b"\x89}tRu.");
    pickle
}

fn check(bytes: &[u8]) -> Result<usize, Error> {
    torch::check(Path::new("model.pth"), bytes)
}

fn pickled(pickle: &[u8]) -> Result<usize, Error> {
    check(&archive(&[("archive/data.pkl", pickle), ("archive/data/0", &[0; 16])]))
}

#[test]
fn tensors_must_fit_their_storage() {
    assert_eq!(pickled(&tensor_pickle(4, 0, 4, 1)).unwrap(), 1);
    assert_eq!(pickled(&tensor_pickle(4, 1, 2, 2)).unwrap(), 1);
    for bad in [
        tensor_pickle(4, 1, 4, 1),
        tensor_pickle(4, 0, 3, 2),
        tensor_pickle(4, 0, 200, 0),
        tensor_pickle(5, 0, 4, 1),
        tensor_pickle(3, 0, 3, 1),
    ] {
        let error = pickled(&bad).unwrap_err();
        assert!(matches!(error, Error::BadTensor { .. }), "{error}");
        assert!(error.to_string().contains("model.pth") && error.to_string().contains("`w`"));
    }
    let missing = archive(&[("archive/data.pkl", &tensor_pickle(4, 0, 4, 1))]);
    assert!(matches!(check(&missing), Err(Error::BadTensor { .. })));
}

#[test]
fn every_way_to_run_code_is_refused_by_name() {
    let cases: &[(&[u8], &str)] = &[
        (b"\x80\x02cos\nsystem\nX\x02\0\0\0id\x85R.", "os.system"),
        (b"\x80\x02cposix\nsystem\nX\x02\0\0\0id\x85R.", "posix.system"),
        (b"\x80\x02c__builtin__\neval\nX\x01\0\0\x001\x85R.", "__builtin__.eval"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.", "os.system"),
        // Names that only begin like allowed ones, and attributes reached through dots.
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "__globals__"),
        (b"\x80\x02ctorch\nload\nX\x01\0\0\0a\x85R.", "torch.load"),
        (b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x01a\x85R.", "_load_from_bytes"),
        (b"\x80\x02crunpy\n_run_code\n.", "runpy._run_code"),
        (b"\x80\x02cnumpy.core.multiarray\nscalar\n.", "numpy.core"),
        // Strings fetched from the memo, so that a scan for adjacent opcodes misses them.
        (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93.", "os.system"),
        (b"(S'id'\nios\nsystem\n.", "STRING"),
        (b"(X\x02\0\0\0idios\nsystem\n.", "INST"),
        (b"(cos\nsystem\nX\x02\0\0\0ido.", "os.system"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        (b"\x80\x02\x82\x01.", "EXT"),
        (b"\x80\x02Pid\n.", "PERSID"),
        (b"\x80\x02]}X\x01\0\0\0aNsb.", "BUILD"),
        (b"\x80\x02X\x01\0\0\0a)R.", "REDUCE"),
        (b"\x80\x02ctorch\nSize\n)R.", "Size"),
    ];
    for (pickle, named) in cases {
        let error = pickled(pickle).unwrap_err();
        assert!(matches!(error, Error::UnsafePickle { .. }), "{error}");
        let message = error.to_string();
        assert!(
            message.contains(named) && message.contains("model.pth!archive/data.pkl"),
            "{message}"
        );
    }
}

#[test]
fn hostile_pickles_exhaust_nothing() {
    // Deep nesting, a cycle, wild lengths, an empty stack.
    let deep: Vec<u8> = [&b"\x80\x02)"[..], &[0x85; 200_000], b"."].concat();
    assert!(matches!(pickled(&deep), Err(Error::NotAnArtifact { .. })));
    assert!(matches!(pickled(b"\x80\x02}q\0X\x01\0\0\0ah\0s."), Err(Error::NotAnArtifact { .. })));
    for bad in [
        &b"\x80\x02X\xff\xff\xff\xff"[..],
        b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
        b".",
        b"",
        b"t.",
    ] {
        assert!(matches!(pickled(bad), Err(Error::UnsafePickle { .. })), "{bad:?}");
    }
}

#[test]
fn archives_that_hide_something_are_refused() {
    let good = tensor_pickle(4, 0, 4, 1);
    let data = [0u8; 16];
    let refused = |bytes: &[u8], why: &str| {
        let error = check(bytes).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    let two = [("a/data.pkl", &good[..]), ("b/data.pkl", &good), ("a/data/0", &data)];
    refused(&archive(&two), "exactly one");
    for name in ["../data.pkl", "/data.pkl", "a/../../x", "a\\b", "c:x"] {
        refused(&archive(&[(name, &good)]), "leads outside");
    }
    let members = [("a/data.pkl", &good[..]), ("a/data/0", &data)];
    let valid = archive(&members);
    assert_eq!(check(&valid).unwrap(), 1);
    refused(&archive(&[members[0], members[1], members[1]]), "twice");
    refused(&archive(&[members[0], members[1], ("a/byteorder", b"big")]), "big-endian");
    refused(&valid[..valid.len() - 1], "truncated");
    // Another name in the local header than in the directory.
    let mut renamed = valid.clone();
    renamed[30] = b'z';
    refused(&renamed, "another name");
    let central = valid.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    for (at, value, why) in [
        (central + 10, 8, "compressed"),
        (central + 8, 1, "encrypted"),
        (central + 24, 0xff, "two different sizes"),
        (central + 42, 1, "damaged"),
    ] {
        let mut bytes = valid.clone();
        bytes[at] = value;
        refused(&bytes, why);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn arbitrary_pickles_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = pickled(&bytes);
        let _ = check(&bytes);
    }

    #[test]
    fn mutated_checkpoints_never_panic(
        legacy: bool,
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = std::fs::read(fixture(if legacy { "legacy.pth" } else { "zip.pth" })).unwrap();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let _ = check(&bytes);
    }

    #[test]
    fn truncated_checkpoints_never_panic(legacy: bool, at in any::<prop::sample::Index>()) {
        let bytes = std::fs::read(fixture(if legacy { "legacy.pth" } else { "zip.pth" })).unwrap();
        prop_assert!(check(&bytes[..at.index(bytes.len())]).is_err());
    }
}
