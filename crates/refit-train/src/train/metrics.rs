//! `metrics.jsonl`: one line per step.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::error::{Result, TrainError};
use super::trainer::StepReport;

/// The metrics file of a run.
pub(super) struct Metrics {
    path: PathBuf,
    file: Mutex<File>,
}

impl Metrics {
    /// Opens `dir/metrics.jsonl`, without what an interrupted run wrote after the checkpoint at `step`.
    pub(super) fn open(dir: &Path, step: u64) -> Result<Self> {
        fs::create_dir_all(dir).map_err(TrainError::io(dir))?;
        let path = dir.join("metrics.jsonl");
        let old = match fs::read_to_string(&path) {
            Ok(old) => old,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(TrainError::io(&path)(e)),
        };
        let kept: String = old
            .lines()
            .filter(|line| serde_json::from_str::<StepReport>(line).is_ok_and(|r| r.step < step))
            .flat_map(|line| [line, "\n"])
            .collect();
        fs::write(&path, kept).map_err(TrainError::io(&path))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(TrainError::io(&path))?;
        Ok(Self { path, file: Mutex::new(file) })
    }

    pub(super) fn append(&self, report: &StepReport) -> Result<()> {
        let mut line = serde_json::to_vec(report).expect("invariant: a report is plain data");
        line.push(b'\n');
        let mut file = self.file.lock().expect("invariant: no thread panics while holding it");
        file.write_all(&line).map_err(TrainError::io(&self.path))
    }
}
