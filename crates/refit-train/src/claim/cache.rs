//! Finished trials on disk, so that an interrupted claim resumes.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Trial;
use crate::error::BoxError;

/// One line of `trials.jsonl`.
#[derive(Serialize, Deserialize)]
struct Line {
    key: String,
    trial: Trial,
}

/// Trials that are finished, by key.
#[derive(Default)]
pub(super) struct Cache {
    known: HashMap<String, Trial>,
    journal: Option<File>,
}

impl Cache {
    /// Opens the journal in `folder`. A folder that cannot be used is no reason to stop: the second
    /// value then says that nothing will be kept.
    pub(super) fn open(folder: Option<&Path>, fresh: bool) -> (Self, Option<String>) {
        let Some(folder) = folder else { return (Self::default(), None) };
        let path = folder.join("trials.jsonl");
        let mut cache = Self::default();
        if !fresh && let Ok(text) = std::fs::read_to_string(&path) {
            // The last line may be cut short by a crash; whatever does not parse is run again.
            let lines = text.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok());
            cache.known.extend(lines.map(|line| (line.key, line.trial)));
        }
        let open = || {
            std::fs::create_dir_all(folder)?;
            let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
            // A cut last line must not swallow the next one.
            file.write_all(b"\n").map(|()| file)
        };
        match open() {
            Ok(file) => {
                cache.journal = Some(file);
                (cache, None)
            }
            Err(e) => (cache, Some(format!("finished trials could not be kept for a resume: {e}"))),
        }
    }

    pub(super) fn find(&self, key: &str) -> Option<Trial> {
        self.known.get(key).cloned()
    }

    pub(super) fn store(&mut self, key: &str, trial: &Trial) -> Result<(), BoxError> {
        if let Some(journal) = &mut self.journal {
            let line = Line { key: key.into(), trial: trial.clone() };
            let text = serde_json::to_string(&line)?;
            journal.write_all(format!("{text}\n").as_bytes())?;
            journal.sync_data()?;
        }
        self.known.insert(key.into(), trial.clone());
        Ok(())
    }
}

/// What a trial depends on, hashed.
pub(super) fn key(
    method: &str,
    quick: bool,
    parameters: &BTreeMap<String, serde_json::Value>,
    arm: &str,
    seed: u64,
) -> String {
    let facts =
        serde_json::json!([env!("CARGO_PKG_VERSION"), method, quick, parameters, arm, seed]);
    let hash = Sha256::digest(facts.to_string().as_bytes());
    hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// f64 in JSON, with strings for what JSON numbers cannot say.
pub(super) mod any_f64 {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(in super::super) fn serialize<S: Serializer>(value: &f64, s: S) -> Result<S::Ok, S::Error> {
        match value {
            v if v.is_nan() => s.serialize_str("nan"),
            v if v.is_infinite() => s.serialize_str(if *v > 0.0 { "inf" } else { "-inf" }),
            v => s.serialize_f64(*v),
        }
    }

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(f64),
        Text(String),
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
        match Either::deserialize(d)? {
            Either::Number(value) => Ok(value),
            Either::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}
