//! Lineage: where an artifact comes from, in a manifest beside it that can be checked.
//!
//! `refit.lineage.json` names the method and its parameters, the parents with their hashes (a graph, since merges
//! have several), the data, the sha256 of every file and the BLAKE3 of every tensor that was written. It holds no
//! time unless the caller gives one, so the same work gives the same bytes.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::error::{Error, Result};
use crate::hash;

/// Name of the manifest in a model directory.
pub const FILE_NAME: &str = "refit.lineage.json";

/// Version of the manifest's layout; readers refuse newer ones.
pub const SCHEMA: u32 = 1;

/// The manifest of one artifact.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Lineage {
    /// [`SCHEMA`] of the writer.
    pub schema: u32,
    /// Version of refit that wrote the artifact.
    pub refit: String,
    /// Name of the method (or recipe).
    pub method: String,
    /// Its parameters, all of them, defaults included.
    pub parameters: Json,
    /// What it was made from.
    pub parents: Vec<Parent>,
    /// Random seeds, in the order of use.
    #[serde(default)]
    pub seeds: Vec<u64>,
    /// Data that the method read.
    #[serde(default)]
    pub data: Vec<DataUse>,
    /// What was measured.
    #[serde(default)]
    pub measurements: Vec<Measurement>,
    /// Facts of the machine that can change the result: device, threads, CPU features.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// One command that makes the artifact again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// When it was made, if the user asked for it (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// Records that were deleted from the model's training data and unlearned.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deletions: Vec<Deletion>,
    /// Files that were written, sorted by name; the manifest and the card are not among them.
    #[serde(default)]
    pub outputs: Vec<FileRecord>,
    /// BLAKE3 of every tensor's stored bytes.
    #[serde(default)]
    pub tensors: BTreeMap<String, String>,
}

/// An artifact that another was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// The source string as the user gave it; where a check looks first.
    pub source: String,
    /// A name that does not depend on where the parent lay.
    pub name: String,
    /// `Artifact::content_hash` of the parent.
    pub content: String,
    /// sha256 of the parent's own manifest, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<String>,
    /// What the parent was used for: `base`, `adapter`, `ingredient`, `teacher`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<String>,
}

/// Data that a method read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataUse {
    /// Name or source string.
    pub name: String,
    /// sha256 of its bytes.
    pub sha256: String,
    /// `calibration`, `training`, `evaluation`.
    pub purpose: String,
    /// Its size, in words ("8 windows of 256 tokens").
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// Its licence, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub license: Option<String>,
}

/// One metric before and after. A value that is not finite is stored as absent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// Name of the metric ("perplexity", "accuracy", "kl_to_reference").
    pub metric: String,
    /// Data set and split.
    pub dataset: String,
    /// How many units (tokens, images, records) it was measured on.
    pub n: u64,
    /// Of the parent.
    pub before: Option<Estimate>,
    /// Of this artifact.
    pub after: Option<Estimate>,
}

/// A value with its confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// Lower and upper end of the 95 % interval.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<[f64; 2]>,
}

impl Estimate {
    /// `None` when the value or an end of the interval is NaN or infinite: JSON has no such numbers.
    pub fn new(value: f64, interval: Option<[f64; 2]>) -> Option<Self> {
        let finite =
            value.is_finite() && interval.is_none_or(|ends| ends.iter().all(|end| end.is_finite()));
        finite.then_some(Self { value, interval })
    }
}

/// An edge of the deletion ledger: data that the artifact must no longer know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deletion {
    /// Identifiers of the deleted records.
    pub records: Vec<String>,
    /// sha256 of the ledger entry before this one; empty for the first.
    pub previous: String,
    /// How the deletion was carried out.
    pub method: String,
}

/// A file with its hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Path below the directory, with `/`.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// sha256 in hexadecimal.
    pub sha256: String,
}

impl Lineage {
    /// A manifest without parents, data or outputs.
    pub fn new(method: impl Into<String>, parameters: Json) -> Self {
        Self {
            schema: SCHEMA,
            refit: env!("CARGO_PKG_VERSION").to_owned(),
            method: method.into(),
            parameters,
            parents: Vec::new(),
            seeds: Vec::new(),
            data: Vec::new(),
            measurements: Vec::new(),
            environment: BTreeMap::new(),
            command: None,
            created: None,
            deletions: Vec::new(),
            outputs: Vec::new(),
            tensors: BTreeMap::new(),
        }
    }

    /// The bytes of the manifest: the same for the same content.
    pub fn to_json(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("invariant: a manifest serializes");
        bytes.push(b'\n');
        bytes
    }

    /// sha256 of [`Lineage::to_json`]: what children store as [`Parent::manifest`].
    pub fn manifest_hash(&self) -> String {
        hash::hex(&self.to_json())
    }

    /// Parses a manifest; `path` is for messages.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let json = |error: serde_json::Error| Error::Json {
            path: path.to_owned(),
            line: error.line(),
            reason: format!("not a lineage manifest: {error}"),
        };
        #[derive(Deserialize)]
        struct Version {
            schema: u32,
        }
        let version: Version = serde_json::from_slice(bytes).map_err(json)?;
        if version.schema > SCHEMA {
            return Err(Error::malformed(
                path,
                "lineage manifest",
                format!(
                    "schema {} is newer than this refit knows ({SCHEMA}); use a newer refit",
                    version.schema
                ),
            ));
        }
        serde_json::from_slice(bytes).map_err(json)
    }

    /// The manifest of a model directory, or of the directory that a file lies in; `None` where there is none.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = manifest_path(dir);
        match std::fs::read(&path) {
            Ok(bytes) => Self::parse(&path, &bytes).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => Ok(None),
            Err(error) => Err(Error::io(&path, "read", error)),
        }
    }

    /// Recomputes every hash of an artifact and of those ancestors that can be found.
    ///
    /// # Errors
    /// When the directory has no manifest or it cannot be read. A hash that differs is a [`Problem`], not an
    /// error.
    pub fn verify(dir: &Path) -> Result<Verification> {
        Self::verify_with(dir, &|_| None)
    }

    /// As [`verify`](Self::verify); `find` says where a parent's source string lies, when it is no path.
    ///
    /// # Errors
    /// As [`verify`](Self::verify).
    pub fn verify_with(dir: &Path, find: Find<'_>) -> Result<Verification> {
        let mut visited = HashSet::new();
        verify(dir, &mut visited, find)
    }
}

/// From a source string to the place where it lies on this machine.
pub type Find<'a> = &'a dyn Fn(&str) -> Option<PathBuf>;

fn manifest_path(dir: &Path) -> PathBuf {
    let dir = if dir.is_file() { dir.parent().unwrap_or(Path::new(".")) } else { dir };
    dir.join(FILE_NAME)
}

/// Outcome of a check.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// Files whose hash was recomputed.
    pub files: usize,
    /// Tensors whose hash is covered by those files.
    pub tensors: usize,
    /// What differs.
    pub problems: Vec<Problem>,
    /// Every parent, and whether the chain goes on there.
    pub parents: Vec<ParentCheck>,
}

impl Verification {
    /// True when nothing differs, here or in any ancestor that was found.
    pub fn is_ok(&self) -> bool {
        self.problems.is_empty() && self.parents.iter().all(ParentCheck::is_ok)
    }

    /// True when some ancestor could not be found, so that the chain ends early.
    pub fn is_truncated(&self) -> bool {
        self.parents.iter().any(|parent| match &parent.status {
            ParentStatus::NotFound => true,
            ParentStatus::Found(below) => below.is_truncated(),
            ParentStatus::Root | ParentStatus::Differs(_) | ParentStatus::Seen => false,
        })
    }
}

/// Something that is not as the manifest says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The file, below the directory.
    pub file: String,
    /// The tensor, where one can be named.
    pub tensor: Option<String>,
    /// What differs.
    pub what: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.tensor {
            Some(tensor) => write!(f, "{}: tensor `{tensor}`: {}", self.file, self.what),
            None => write!(f, "{}: {}", self.file, self.what),
        }
    }
}

/// Outcome for one parent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ParentCheck {
    /// [`Parent::name`].
    pub name: String,
    /// [`Parent::source`].
    pub source: String,
    /// What was found.
    pub status: ParentStatus,
}

impl ParentCheck {
    fn is_ok(&self) -> bool {
        match &self.status {
            ParentStatus::Root | ParentStatus::NotFound | ParentStatus::Seen => true,
            ParentStatus::Found(below) => below.is_ok(),
            ParentStatus::Differs(_) => false,
        }
    }
}

/// What a check found at a parent's source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ParentStatus {
    /// It is there with the manifest that the child names; its own check follows.
    Found(Box<Verification>),
    /// It is there, has no manifest of its own, and its content hash is the one that the child names.
    Root,
    /// It is there but is another artifact.
    Differs(String),
    /// It is not there: the chain is truncated.
    NotFound,
    /// It was already checked on another way through the graph.
    Seen,
}

fn verify(dir: &Path, visited: &mut HashSet<PathBuf>, find: Find<'_>) -> Result<Verification> {
    let Some(lineage) = Lineage::read(dir)? else {
        return Err(Error::NotAnArtifact {
            path: dir.to_owned(),
            reason: format!(
                "there is no {FILE_NAME}; only what refit wrote has a lineage to verify"
            ),
        });
    };
    let path = manifest_path(dir);
    let dir = path.parent().expect("invariant: a manifest lies in a directory");
    visited.insert(dir.canonicalize().map_err(|error| Error::io(dir, "resolve", error))?);
    let mut outcome = Verification::default();
    for record in &lineage.outputs {
        outcome.files += 1;
        check_file(dir, record, &lineage.tensors, &mut outcome.problems);
    }
    outcome.tensors = lineage.tensors.len();
    for parent in &lineage.parents {
        let status = check_parent(dir, parent, visited, find)?;
        outcome.parents.push(ParentCheck {
            name: parent.name.clone(),
            source: parent.source.clone(),
            status,
        });
    }
    Ok(outcome)
}

fn check_file(
    dir: &Path,
    record: &FileRecord,
    tensors: &BTreeMap<String, String>,
    problems: &mut Vec<Problem>,
) {
    let mut report = |tensor: Option<String>, what: String| {
        problems.push(Problem { file: record.name.clone(), tensor, what });
    };
    if !is_plain_relative(&record.name) {
        return report(
            None,
            "the manifest names a file outside the directory; not followed".to_owned(),
        );
    }
    let path = dir.join(&record.name);
    let found = match hash::file(&path) {
        Ok(found) => found,
        Err(error) => return report(None, format!("cannot be read: {error}")),
    };
    if found == record.sha256 {
        return;
    }
    if !record.name.ends_with(".safetensors") {
        return report(None, format!("sha256 is {found}, the manifest says {}", record.sha256));
    }
    match damaged_tensors(&path, tensors) {
        Ok(damaged) if damaged.is_empty() => {
            report(
                None,
                "the header differs; every tensor's bytes are as the manifest says".to_owned(),
            );
        }
        Ok(damaged) => {
            for (tensor, what) in damaged {
                report(Some(tensor), what);
            }
        }
        Err(reason) => report(None, format!("differs, and its header cannot be read: {reason}")),
    }
}

/// True for a relative path without `..`.
fn is_plain_relative(name: &str) -> bool {
    Path::new(name).components().all(|part| matches!(part, std::path::Component::Normal(_)))
}

/// Tensors of a safetensors file whose bytes are not those of the manifest.
fn damaged_tensors(
    path: &Path,
    expected: &BTreeMap<String, String>,
) -> std::result::Result<Vec<(String, String)>, String> {
    let mut file = File::open(path).map_err(|e| e.to_string())?;
    let length = file.metadata().map_err(|e| e.to_string())?.len();
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix).map_err(|e| e.to_string())?;
    let header_bytes = u64::from_le_bytes(prefix);
    if header_bytes > length.saturating_sub(8) {
        return Err(format!("header length {header_bytes} exceeds the file"));
    }
    let mut header = vec![0; header_bytes as usize];
    file.read_exact(&mut header).map_err(|e| e.to_string())?;
    #[derive(Deserialize)]
    struct Entry {
        data_offsets: [u64; 2],
    }
    let mut entries: BTreeMap<String, Json> =
        serde_json::from_slice(&header).map_err(|e| e.to_string())?;
    entries.remove("__metadata__");
    let mut damaged = Vec::new();
    for (name, entry) in entries {
        let entry: Entry =
            serde_json::from_value(entry).map_err(|e| format!("tensor `{name}`: {e}"))?;
        let [start, end] = entry.data_offsets;
        let Some(want) = expected.get(&name) else {
            damaged.push((name, "is not in the manifest".to_owned()));
            continue;
        };
        let fits = start <= end && end <= length - 8 - header_bytes;
        let found = fits.then(|| {
            file.seek(SeekFrom::Start(8 + header_bytes + start))?;
            hash::blake3(end - start, |_, part| file.read_exact(part))
                .map(|found| found.to_string())
        });
        match found {
            None => damaged.push((name, "its bytes lie outside the file".to_owned())),
            Some(Err(error)) => damaged.push((name, format!("cannot be read: {error}"))),
            Some(Ok(found)) if found != *want => {
                damaged.push((name, format!("BLAKE3 is {found}, the manifest says {want}")));
            }
            Some(Ok(_)) => {}
        }
    }
    Ok(damaged)
}

fn check_parent(
    dir: &Path,
    parent: &Parent,
    visited: &mut HashSet<PathBuf>,
    find: Find<'_>,
) -> Result<ParentStatus> {
    // As the user gave it, from the child, beside the child, or where the source lies: the first that is
    // the one meant.
    let beside =
        is_plain_relative(&parent.name).then(|| dir.parent().unwrap_or(dir).join(&parent.name));
    let candidates = [
        Some(PathBuf::from(&parent.source)),
        Some(dir.join(&parent.source)),
        beside,
        find(&parent.source),
    ];
    let mut different = None;
    let mut tried = HashSet::new();
    for found in candidates.into_iter().flatten() {
        // Two spellings of one place are one candidate.
        if !found.canonicalize().is_ok_and(|path| tried.insert(path)) {
            continue;
        }
        match check_parent_at(&found, parent, visited, find)? {
            ParentStatus::Differs(how) => different = different.or(Some(how)),
            status => return Ok(status),
        }
    }
    Ok(different.map_or(ParentStatus::NotFound, ParentStatus::Differs))
}

fn check_parent_at(
    found: &Path,
    parent: &Parent,
    visited: &mut HashSet<PathBuf>,
    find: Find<'_>,
) -> Result<ParentStatus> {
    let canonical = found.canonicalize().map_err(|error| Error::io(found, "resolve", error))?;
    if visited.contains(&canonical) {
        return Ok(ParentStatus::Seen);
    }
    match (&parent.manifest, Lineage::read(found)?) {
        (Some(want), Some(_)) => {
            let have = hash::file(&manifest_path(found))
                .map_err(|error| Error::io(manifest_path(found), "read", error))?;
            if have != *want {
                return Ok(ParentStatus::Differs(format!(
                    "its manifest has sha256 {have}, the child names {want}"
                )));
            }
            Ok(ParentStatus::Found(Box::new(verify(found, visited, find)?)))
        }
        (Some(_), None) => Ok(ParentStatus::Differs("its manifest is gone".to_owned())),
        (None, _) => {
            visited.insert(canonical);
            // What an adapter does depends on its configuration too.
            let have = match crate::Adapter::is_adapter(found) {
                true => crate::Adapter::open(found)?.content_hash()?,
                false => crate::Artifact::open(found)?.content_hash()?,
            };
            Ok(if have == parent.content {
                ParentStatus::Root
            } else {
                ParentStatus::Differs(format!(
                    "its content hash is {have}, the child names {}",
                    parent.content
                ))
            })
        }
    }
}
