//! Cut and flipped files: every truncation is an error, every flipped bit is either an error or changes
//! no more than it must, and neither panics nor makes a small file ask for much memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use refit_store::{Artifact, Error, TensorInfo};

/// The system's allocator, with the most bytes that each thread held at once.
struct Counting;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is passed on unchanged; the counters are plain cells without destructors.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.set(LIVE.get().wrapping_add(layout.size()));
        // What was allocated by another thread may be freed here: the count then wraps below zero.
        if LIVE.get() < usize::MAX / 2 {
            PEAK.set(PEAK.get().max(LIVE.get()));
        }
        // SAFETY: the caller's promises are the ones that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.set(LIVE.get().wrapping_sub(layout.size()));
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The result of `work`, and the bytes that this thread held at most beyond those it held before.
fn peak<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.get();
    PEAK.set(before);
    let result = work();
    (result, PEAK.get().saturating_sub(before))
}

/// Headers are parsed into lists of names and shapes, some tens of bytes for each of theirs; a damaged count
/// of layers costs the list of the first few hundred that are missing.
fn allowed(file: usize) -> usize {
    64 * file + (1 << 20)
}

fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    fs::read(path).unwrap()
}

/// Three tensors of different types and shapes.
fn safetensors() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b.weight":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]},"c.steps":{"dtype":"I64","shape":[],"data_offsets":[32,40]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..6).flat_map(|i| (i as f32 + 0.5).to_le_bytes()));
    bytes.extend([0x80, 0x3f, 0x00, 0x40, 0x40, 0x40, 0x80, 0x40]);
    bytes.extend(7u64.to_le_bytes());
    bytes
}

/// A GGUF file of two tensors and three keys.
fn gguf() -> Vec<u8> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    let text = |bytes: &mut Vec<u8>, text: &str| {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    };
    bytes.extend(2u64.to_le_bytes());
    bytes.extend(3u64.to_le_bytes());
    text(&mut bytes, "general.architecture");
    bytes.extend(8u32.to_le_bytes());
    text(&mut bytes, "llama");
    text(&mut bytes, "llama.block_count");
    bytes.extend(4u32.to_le_bytes());
    bytes.extend(1u32.to_le_bytes());
    text(&mut bytes, "tokenizer.ggml.tokens");
    bytes.extend([9u32.to_le_bytes(), 8u32.to_le_bytes()].concat());
    bytes.extend(2u64.to_le_bytes());
    text(&mut bytes, "<s>");
    text(&mut bytes, "a");
    for (name, dims, kind, offset) in
        [("token_embd.weight", [32u64, 2], 8u32, 0u64), ("output_norm.weight", [32, 1], 0, 96)]
    {
        text(&mut bytes, name);
        bytes.extend(2u32.to_le_bytes());
        bytes.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    // Two rows of Q8_0: a scale of 1 and 32 values each, then padding, then the norm.
    for row in 0..2u8 {
        bytes.extend([0x00, 0x3c]);
        bytes.extend((0..32).map(|i| i + row));
    }
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    bytes.extend((0..32).flat_map(|i| (i as f32).to_le_bytes()));
    bytes
}

struct Case {
    name: &'static str,
    bytes: Vec<u8>,
    /// First byte of the tensors' data, where they lie at the end without a checksum.
    data: usize,
}

fn cases() -> Vec<Case> {
    let safetensors = safetensors();
    let gguf = gguf();
    let data_of_gguf = gguf.len() - (96 + 128);
    let data_of_safetensors = safetensors.len() - 40;
    vec![
        Case { name: "a.safetensors", bytes: safetensors, data: data_of_safetensors },
        Case { name: "a.gguf", bytes: gguf, data: data_of_gguf },
        Case { name: "zip.pth", bytes: fixture("zip.pth"), data: usize::MAX },
        Case { name: "legacy.pth", bytes: fixture("legacy.pth"), data: usize::MAX },
    ]
}

type Tensors = Vec<(TensorInfo, Vec<u32>)>;

/// Opens a file and reads all that can be read of it.
fn read(path: &Path) -> Result<Tensors, Error> {
    let artifact = Artifact::open(path)?;
    let _ = (artifact.side_files(), artifact.tokenizer_json(), artifact.load_report());
    let values = |info: &TensorInfo| -> Result<_, Error> {
        let values = artifact.read_f32(&info.name)?;
        let mut raw = vec![0; info.nbytes as usize];
        artifact.read_raw_into(&info.name, 0, &mut raw)?;
        Ok((info.clone(), values.iter().map(|x| x.to_bits()).collect()))
    };
    artifact.tensors().iter().map(values).collect()
}

/// The damaged file's tensors. The error must name the file, and neither may ask for much memory.
fn survive(path: &Path, bytes: &[u8]) -> Result<Tensors, Error> {
    fs::write(path, bytes).unwrap();
    let (read, peak) = peak(|| read(path));
    assert!(peak <= allowed(bytes.len()), "{peak} bytes held for a file of {}", bytes.len());
    if let Err(error) = &read {
        let file = path.file_name().unwrap().to_str().unwrap();
        assert!(error.to_string().contains(file), "{error}");
    }
    read
}

fn places() -> (tempfile::TempDir, impl Fn(&str) -> PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().to_owned();
    (dir, move |name| root.join(name))
}

#[test]
fn whole_files_open() {
    let (_dir, at) = places();
    for case in cases() {
        let tensors = survive(&at(case.name), &case.bytes).unwrap();
        assert!(tensors.len() >= 2, "{}", case.name);
    }
}

#[test]
fn every_truncation_is_an_error() {
    let (_dir, at) = places();
    for case in cases() {
        let path = at(case.name);
        for len in 0..case.bytes.len() {
            let read = survive(&path, &case.bytes[..len]);
            assert!(read.is_err(), "{} cut to {len} bytes opens", case.name);
        }
    }
}

#[test]
fn every_flipped_bit_is_an_error_or_changes_one_thing() {
    let (_dir, at) = places();
    for case in cases() {
        let path = at(case.name);
        let whole = survive(&path, &case.bytes).unwrap();
        let stored = |tensors: &Tensors| tensors.iter().map(|(info, _)| info.nbytes).sum::<u64>();
        // Of the larger files every fifth bit: every byte, and by and by every bit of a byte.
        let step = if case.bytes.len() > 1024 { 5 } else { 1 };
        for bit in (0..8 * case.bytes.len()).step_by(step) {
            let mut bytes = case.bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let Ok(tensors) = survive(&path, &bytes) else {
                assert!(bit / 8 < case.data, "{}: data cannot be wrong", case.name);
                continue;
            };
            assert!(stored(&tensors) <= bytes.len() as u64, "{} bit {bit}", case.name);
            if bit / 8 >= case.data {
                // In the data: the same tensors, and at most one of them (one block) has other values.
                let differ = whole.iter().zip(&tensors).filter(|(a, b)| a != b).count();
                assert!(differ <= 1, "{} bit {bit}", case.name);
                assert!(whole.iter().zip(&tensors).all(|(a, b)| a.0 == b.0));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// The same on a file with a tokenizer and every kind of key, at random places.
    #[test]
    fn a_real_header_survives_a_flip_or_a_cut(at in any::<prop::sample::Index>(), bit in 0u8..8, cut: bool) {
        let (_dir, place) = places();
        let mut bytes = fixture("tiny_llama.gguf");
        // Most of the file is data; half of the cases go into the first kilobytes.
        let index = at.index(if bit % 2 == 0 { bytes.len() } else { 4096 });
        if cut {
            prop_assert!(survive(&place("m.gguf"), &bytes[..index]).is_err());
        } else {
            bytes[index] ^= 1 << bit;
            let _ = survive(&place("m.gguf"), &bytes);
        }
    }

    /// A shard index and a config beside sound weights, damaged.
    #[test]
    fn damaged_json_beside_the_weights_is_an_error_or_harmless(at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let (dir, place) = places();
        fs::write(place("a.safetensors"), safetensors()).unwrap();
        let index = br#"{"weight_map":{"a.weight":"a.safetensors","b.weight":"a.safetensors"}}"#;
        let config = br#"{"model_type":"llama","num_hidden_layers":2,"hidden_size":64,"vocab_size":100,"num_attention_heads":4}"#;
        let (mut index, mut config) = (index.to_vec(), config.to_vec());
        let position = at.index(index.len() + config.len());
        match position.checked_sub(index.len()) {
            None => index[position] ^= 1 << bit,
            Some(position) => config[position] ^= 1 << bit,
        }
        fs::write(place("model.safetensors.index.json"), index).unwrap();
        fs::write(place("config.json"), config).unwrap();
        let (_, peak) = peak(|| read(dir.path()));
        prop_assert!(peak < 8 << 20, "{peak}");
    }
}
