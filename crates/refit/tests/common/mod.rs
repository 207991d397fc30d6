//! Running the binary under test, and tiny models for it.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A finished run of the binary.
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    pub fn of(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Asserts the exit code.
    #[track_caller]
    pub fn code(self, expected: i32) -> Self {
        assert_eq!(self.code, expected, "stdout:\n{}\nstderr:\n{}", self.out, self.err);
        self
    }

    /// Asserts that the message on standard error has all these parts, in one line each.
    #[track_caller]
    pub fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.err.contains(part), "`{part}` is not in:\n{}", self.err);
        }
        assert!(!self.err.contains("panicked"), "{}", self.err);
        self
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(self) -> Value {
        let ran = self.code(0);
        serde_json::from_str(&ran.out).unwrap_or_else(|e| panic!("{e}:\n{}", ran.out))
    }
}

/// A directory of its own for a test, with a cache inside.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn str(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// The binary, offline, with its cache in here.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_refit"));
        command
            .current_dir(self.0.path())
            .env("REFIT_OFFLINE", "1")
            .env("REFIT_CACHE", self.path("cache"))
            .env_remove("RUST_BACKTRACE");
        command
    }

    #[track_caller]
    pub fn run(&self, args: &[&str]) -> Ran {
        Ran::of(self.command().args(args).output().unwrap())
    }

    /// Asserts that a command fails with a code and a message, and leaves nothing behind: no output, no
    /// temporary name, not even an empty directory.
    #[track_caller]
    pub fn refuses(&self, args: &[&str], code: i32, parts: &[&str]) -> Ran {
        let before = self.names();
        let ran = self.run(args).code(code).says(parts);
        assert_eq!(self.names(), before, "`refit {}` left something behind", args.join(" "));
        ran
    }

    /// Names in here, without the cache.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.0.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "cache")
            .collect();
        names.sort();
        names
    }

    /// A copy of the embedded model, to be damaged.
    pub fn tiny(&self, name: &str) -> PathBuf {
        self.copy("../../assets/tiny", name)
    }

    /// A copy of a two-block BERT with a vocabulary of 64 words, `w5` to `w63` among them.
    pub fn bert(&self, name: &str) -> PathBuf {
        let to = self.copy("../refit-nn/tests/fixtures/hf/bert", name);
        std::fs::remove_file(to.join("expected.safetensors")).unwrap();
        let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(str::to_owned);
        let words: Vec<String> =
            special.into_iter().chain((5..64).map(|i| format!("w{i}"))).collect();
        std::fs::write(to.join("vocab.txt"), words.join("\n")).unwrap();
        to
    }

    /// A copy of a two-block ViT with ten classes, `LABEL_0` to `LABEL_9`.
    pub fn vit(&self, name: &str) -> PathBuf {
        let to = self.copy("../refit-nn/tests/fixtures/hf/vit", name);
        std::fs::remove_file(to.join("expected.safetensors")).unwrap();
        to
    }

    /// A picture of 224 x 224 pixels.
    pub fn picture(&self, name: &str) -> String {
        let from = "../refit-nn/tests/fixtures/efficientnet-lite0/shapes.png";
        self.write(name, std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(from)).unwrap())
    }

    /// A copy of a model directory, given below this crate.
    pub fn copy(&self, from: &str, name: &str) -> PathBuf {
        let to = self.path(name);
        std::fs::create_dir_all(&to).unwrap();
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join(from);
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
            }
        }
        to
    }
}

/// Every file below a directory with its bytes.
pub fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => open.push(path),
                false => {
                    let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
                    all.push((name, std::fs::read(&path).unwrap()));
                }
            }
        }
    }
    all.sort();
    all
}

/// A safetensors file from `(name, shape, values)`, f32.
pub fn safetensors(tensors: &[(&str, &[usize], Vec<f32>)]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape, values) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        header.insert(
            (*name).to_owned(),
            serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}),
        );
    }
    raw_safetensors(&Value::Object(header).to_string(), &data)
}

/// A safetensors file from its parts, right or wrong.
pub fn raw_safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

/// A tensor as it is stored: element type, shape, bytes.
pub struct Stored {
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// Rewrites `model.safetensors` of a directory with its tensors changed.
pub fn edit_weights(
    dir: &Path,
    edit: impl FnOnce(&mut std::collections::BTreeMap<String, Stored>),
) {
    let path = dir.join("model.safetensors");
    let file = std::fs::read(&path).unwrap();
    let (length, rest) = file.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: serde_json::Map<String, Value> = serde_json::from_slice(header).unwrap();
    let mut tensors: std::collections::BTreeMap<String, Stored> = header
        .into_iter()
        .filter(|(name, _)| name != "__metadata__")
        .map(|(name, entry)| {
            let at = |i: usize| entry["data_offsets"][i].as_u64().unwrap() as usize;
            let stored = Stored {
                dtype: entry["dtype"].as_str().unwrap().to_owned(),
                shape: serde_json::from_value(entry["shape"].clone()).unwrap(),
                bytes: data[at(0)..at(1)].to_vec(),
            };
            (name, stored)
        })
        .collect();
    edit(&mut tensors);
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, Stored { dtype, shape, bytes }) in tensors {
        let start = data.len();
        data.extend(bytes);
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name, entry);
    }
    std::fs::write(path, raw_safetensors(&Value::Object(header).to_string(), &data)).unwrap();
}

/// Rewrites a JSON file.
pub fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    edit(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}
