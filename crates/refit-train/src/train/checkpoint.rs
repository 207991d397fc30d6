//! Checkpoints: one safetensors file with the trained parameters, the optimizer's state and the position in the run.
//!
//! Written under a temporary name, synced, renamed, and the directory synced: after a crash or a full disk the newest complete
//! file is still there, and it is the one that a resumed run starts from.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::error::{Result, TrainError};
use super::optimizer::{Slot, State};

/// Where a run stands, beside its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// Steps done.
    pub step: u64,
    /// The run's recipe as JSON.
    pub recipe: serde_json::Value,
    /// What the caller says that the run depends on besides (hashes of data and base model).
    pub identity: String,
    /// Updates made to each tensor.
    pub updates: BTreeMap<String, u64>,
    /// Smoothed loss, its best value, and steps above the limit of divergence.
    pub guard: (Option<f64>, f64, u64),
}

/// Everything that a run needs to go on.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Where the run stands.
    pub position: Position,
    /// Trained parameters by name, with shapes.
    pub parameters: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    /// Optimizer state by name.
    pub states: BTreeMap<String, State>,
    /// Moving averages by name.
    pub averages: BTreeMap<String, Vec<f32>>,
}

const SUFFIX: &str = ".ckpt.safetensors";

/// The file of step `step` in `dir`.
pub fn path(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("step-{step:09}{SUFFIX}"))
}

/// Complete checkpoints in `dir`, oldest first. A directory that does not exist has none.
///
/// # Errors
/// A directory that cannot be read.
pub fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(TrainError::io(dir)(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(TrainError::io(dir))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if name.starts_with("step-") && name.ends_with(SUFFIX) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

impl Checkpoint {
    /// Writes it to `dir` and deletes all but the newest `keep` checkpoints.
    ///
    /// # Errors
    /// A full disk, a directory that cannot be written; older checkpoints are then untouched.
    pub fn write(&self, dir: &Path, keep: usize) -> Result<PathBuf> {
        fs::create_dir_all(dir).map_err(TrainError::io(dir))?;
        let target = path(dir, self.position.step);
        let bytes = self.encode(&target)?;
        let temporary = dir.join(format!(".step-{:09}.partial", self.position.step));
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &target)?;
            File::open(dir)?.sync_all()
        };
        if let Err(error) = write() {
            // Best effort: the error that matters is the first one.
            let _ = fs::remove_file(&temporary);
            return Err(TrainError::io(target)(error));
        }
        let all = list(dir)?;
        for old in &all[..all.len().saturating_sub(keep.max(1))] {
            fs::remove_file(old).map_err(TrainError::io(old))?;
        }
        Ok(target)
    }

    fn encode(&self, target: &Path) -> Result<Vec<u8>> {
        let mut tensors: Vec<(String, Dtype, Vec<usize>, &[u8])> = Vec::new();
        for (name, (shape, values)) in &self.parameters {
            tensors.push((format!("parameter/{name}"), Dtype::F32, shape.clone(), bytes(values)));
        }
        for (name, values) in &self.averages {
            tensors.push((
                format!("average/{name}"),
                Dtype::F32,
                vec![values.len()],
                bytes(values),
            ));
        }
        for (name, state) in &self.states {
            for (slot, content) in &state.slots {
                let (dtype, len, raw) = match content {
                    Slot::F32(values) => (Dtype::F32, values.len(), bytes(values)),
                    Slot::U8(codes) => (Dtype::U8, codes.len(), codes.as_slice()),
                };
                tensors.push((format!("state/{slot}/{name}"), dtype, vec![len], raw));
            }
        }
        let views: Result<Vec<_>, _> = tensors
            .into_iter()
            .map(|(name, dtype, shape, raw)| TensorView::new(dtype, shape, raw).map(|v| (name, v)))
            .collect();
        let position = serde_json::to_string(&self.position).map_err(|e| e.to_string());
        let encoded = views.map_err(|e| e.to_string()).and_then(|views| {
            let metadata = HashMap::from([("refit".to_owned(), position?)]);
            safetensors::serialize(views, Some(metadata)).map_err(|e| e.to_string())
        });
        encoded.map_err(|problem| TrainError::Checkpoint { path: target.into(), problem })
    }

    /// Reads a checkpoint.
    ///
    /// # Errors
    /// Files that are not complete checkpoints of refit.
    pub fn read(path: &Path) -> Result<Self> {
        Self::decode(path, &fs::read(path).map_err(TrainError::io(path))?)
    }

    /// The checkpoint that the bytes `raw` of the file `path` hold.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn decode(path: &Path, raw: &[u8]) -> Result<Self> {
        let bad = |problem: String| TrainError::Checkpoint { path: path.into(), problem };
        let damaged = |e: safetensors::SafeTensorError| {
            bad(format!("not a complete checkpoint ({e}); delete it to resume from an older one"))
        };
        let (_, header) = SafeTensors::read_metadata(raw).map_err(damaged)?;
        let position =
            header.metadata().as_ref().and_then(|m| m.get("refit")).ok_or_else(|| {
                bad("no refit checkpoint: the position in the run is missing".into())
            })?;
        let position: Position = serde_json::from_str(position)
            .map_err(|e| bad(format!("the position in the run is unreadable: {e}")))?;
        let tensors = SafeTensors::deserialize(raw).map_err(damaged)?;
        let mut found = Self {
            position,
            parameters: BTreeMap::new(),
            states: BTreeMap::new(),
            averages: BTreeMap::new(),
        };
        for (name, step) in &found.position.updates {
            found.states.insert(name.clone(), State { step: *step, ..State::default() });
        }
        for (key, view) in tensors.tensors() {
            let slot = match view.dtype() {
                Dtype::F32 => Slot::F32(floats(view.data())),
                Dtype::U8 => Slot::U8(view.data().to_vec()),
                other => return Err(bad(format!("tensor `{key}` has the type {other:?}"))),
            };
            match (key.split_once('/'), slot) {
                (Some(("parameter", name)), Slot::F32(values)) => {
                    found.parameters.insert(name.to_owned(), (view.shape().to_vec(), values));
                }
                (Some(("average", name)), Slot::F32(values)) => {
                    found.averages.insert(name.to_owned(), values);
                }
                (Some(("state", rest)), slot) if rest.contains('/') => {
                    let (kind, name) = rest.split_once('/').unwrap_or((rest, ""));
                    let state = found.states.entry(name.to_owned()).or_default();
                    state.slots.insert(kind.to_owned(), slot);
                }
                _ => return Err(bad(format!("tensor `{key}` does not belong in a checkpoint"))),
            }
        }
        Ok(found)
    }
}

fn bytes(values: &[f32]) -> &[u8] {
    bytemuck::cast_slice(values)
}

fn floats(raw: &[u8]) -> Vec<f32> {
    raw.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(step: u64) -> Checkpoint {
        let slots = BTreeMap::from([
            ("m".to_owned(), Slot::F32(vec![1.0, -2.0])),
            ("v.codes".to_owned(), Slot::U8(vec![3, 4])),
        ]);
        Checkpoint {
            position: Position {
                step,
                recipe: serde_json::json!({"seed": 1}),
                identity: "data".into(),
                updates: BTreeMap::from([("a.weight".to_owned(), 7)]),
                guard: (Some(1.5), 1.25, 0),
            },
            parameters: BTreeMap::from([("a.weight".to_owned(), (vec![1, 2], vec![0.5, 0.25]))]),
            states: BTreeMap::from([("a.weight".to_owned(), State { step: 7, slots })]),
            averages: BTreeMap::from([("a.weight".to_owned(), vec![0.1, 0.2])]),
        }
    }

    #[test]
    fn what_is_written_is_read_and_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        for step in [5, 10, 15] {
            sample(step).write(dir.path(), 2).unwrap();
        }
        let left = list(dir.path()).unwrap();
        assert_eq!(left, [path(dir.path(), 10), path(dir.path(), 15)]);
        assert_eq!(Checkpoint::read(&left[1]).unwrap(), sample(15));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = sample(1).write(dir.path(), 1).unwrap();
        let raw = fs::read(&file).unwrap();
        fs::write(&file, &raw[..raw.len() - 1]).unwrap();
        let error = Checkpoint::read(&file).unwrap_err().to_string();
        assert!(error.contains("step-000000001") && error.contains("not a complete"), "{error}");
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, b"x").unwrap();
        assert!(matches!(sample(1).write(&file.join("sub"), 1), Err(TrainError::Io { .. })));
    }
}
