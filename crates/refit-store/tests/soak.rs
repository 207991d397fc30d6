//! What the fuzz targets do, as plain loops on the stable compiler: sound files, changed at random, are opened or
//! refused and never a crash. Ignored by default; `fuzz/README.md` says how it is run and for how long it was.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use refit_store::formats::{gguf, safetensors, torch};
use refit_store::{Artifact, Card, Lineage, config::Config};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    /// Half of the places lie in the first kilobyte, where headers are.
    fn place(&mut self, len: usize) -> usize {
        let bound = if self.below(2) == 0 { len.min(1024) } else { len };
        self.below(bound)
    }
}

/// One to six changes: bytes, bits, counts, pieces left out, doubled, or taken from another seed.
fn changed(random: &mut Random, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(6) {
        let at = random.place(bytes.len());
        let end = (at + 1 + random.below(16)).min(bytes.len());
        match random.below(8) {
            _ if bytes.is_empty() => bytes.push(random.next() as u8),
            0 => bytes[at] = random.next() as u8,
            1 => bytes[at] ^= 1 << random.below(8),
            2 => drop(bytes.drain(at..end)),
            3 => {
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            4 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.place(other.len());
                let to = (from + random.below(64)).min(other.len());
                bytes.splice(at..end, other[from..to].iter().copied());
            }
            5 => {
                let counts = [0, 1, 0xff, 0x7fff_ffff, u64::MAX, u64::MAX >> 1, bytes.len() as u64];
                let count = counts[random.below(counts.len())].to_le_bytes();
                let len = count.len().min(bytes.len() - at);
                bytes[at..at + len].copy_from_slice(&count[..len]);
            }
            6 => {
                let digits = ["0", "-1", "99999999999999999999", "1e999", "\"", "{", "[", "null"];
                bytes.splice(at..end, digits[random.below(digits.len())].bytes());
            }
            _ => bytes.truncate(at),
        }
    }
    bytes
}

/// Keeps the input that made a target panic.
struct Keep<'a>(&'a str, &'a [u8]);

impl Drop for Keep<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let path = std::env::temp_dir().join(format!("refit-soak-{}", self.0));
            let _ = fs::write(&path, self.1);
            eprintln!("the input is kept as {}", path.display());
        }
    }
}

/// Runs `target` on changed seeds for `REFIT_SOAK_SECONDS` (10), from `REFIT_SOAK_SEED` (1).
fn soak(name: &str, seeds: &[Vec<u8>], target: impl Fn(&[u8])) {
    let number = |key: &str, usual| {
        std::env::var(key).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
    };
    let (seconds, seed) = (number("REFIT_SOAK_SECONDS", 10), number("REFIT_SOAK_SEED", 1));
    for whole in seeds {
        target(whole);
    }
    let (mut random, mut runs, start) = (Random(seed), 0u64, Instant::now());
    while start.elapsed() < Duration::from_secs(seconds) {
        let input = changed(&mut random, seeds);
        let kept = Keep(name, &input);
        target(&input);
        drop(kept);
        runs += 1;
    }
    eprintln!("{name}: {runs} inputs in {seconds} s from seed {seed}");
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn read_all(names: &[&str]) -> Vec<Vec<u8>> {
    names.iter().map(|name| fs::read(fixtures().join(name)).unwrap()).collect()
}

fn small_safetensors() -> Vec<u8> {
    let header = br#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[16,24]},"c":{"dtype":"I64","shape":[],"data_offsets":[24,32]}}"#;
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(0..32);
    bytes
}

const GGUFS: [&str; 6] = [
    "tiny_llama.gguf",
    "blocks.gguf",
    "families/mixtral.gguf",
    "families/gpt2.gguf",
    "families/bert.gguf",
    "families/gemma2.gguf",
];

#[test]
#[ignore = "runs for as long as it is told"]
fn soak_safetensors() {
    soak("safetensors", &[small_safetensors()], |bytes| {
        let _ = safetensors::parse(Path::new("soak"), bytes, bytes.len() as u64);
    });
}

#[test]
#[ignore = "runs for as long as it is told"]
fn soak_gguf() {
    soak("gguf", &read_all(&GGUFS), |bytes| {
        let _ = gguf::parse(Path::new("soak"), bytes, bytes.len() as u64);
    });
}

#[test]
#[ignore = "runs for as long as it is told"]
fn soak_pickle() {
    soak("pickle", &read_all(&["zip.pth", "legacy.pth"]), |bytes| {
        let _ = torch::check(Path::new("soak"), bytes);
    });
}

#[test]
#[ignore = "runs for as long as it is told"]
fn soak_text() {
    let card = Card::new("soak").render().into_bytes();
    let lineage =
        serde_json::to_vec(&Lineage::new("soak", serde_json::json!({"bits": 3}))).unwrap();
    let config = br#"{"model_type":"llama","hidden_size":64,"rope_scaling":{"factor":2.0},"eos_token_id":[1,2]}"#;
    let yaml = b"seed: 7\nname: 'x'\nnote: |\n  two\n  lines\nlist: \"[1, 2]\"\n";
    soak("text", &[card, lineage, config.to_vec(), yaml.to_vec()], |bytes| {
        let path = Path::new("soak");
        let _ = Lineage::parse(path, bytes);
        let _ = Config::parse(path, bytes);
        let text = String::from_utf8_lossy(bytes);
        let _ = Card::parse(&text);
        let _ = refit_store::yaml::parse::<BTreeMap<String, String>>(path, &text);
    });
}

#[test]
#[ignore = "runs for as long as it is told"]
fn soak_artifact() {
    let dir = tempfile::tempdir().unwrap();
    let mut seeds = read_all(&GGUFS);
    seeds.extend(read_all(&["zip.pth", "legacy.pth"]));
    seeds.push(small_safetensors());
    soak("artifact", &seeds, |bytes| {
        let kind = match bytes {
            [b'G', ..] => "m.gguf",
            [b'P' | 0x80, ..] => "m.pth",
            _ => "m.safetensors",
        };
        let path = dir.path().join(kind);
        fs::write(&path, bytes).unwrap();
        let _ = refit_store::scan::scan(&path);
        if let Ok(artifact) = Artifact::open(&path) {
            let _ = (artifact.side_files(), artifact.tokenizer_json(), artifact.load_report());
            for tensor in artifact.tensors() {
                artifact.read_f32(&tensor.name).expect("what was opened can be read");
            }
        }
        fs::remove_file(&path).unwrap();
    });
}
