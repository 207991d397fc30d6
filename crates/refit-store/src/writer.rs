//! One way to write a model directory: declared first, filled in any order, resumable, renamed when
//! complete.
//!
//! The files grow in `.NAME.refit-partial` beside the output, at their final size from the start. A journal there
//! lists the finished tensors, so a killed run goes on where it stopped and yields the same bytes.

mod plan;
mod stage;

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

pub use plan::{GGUF_NAME, TensorSpec, WritePlan};

use crate::artifact::{SideFile, nearest};
use crate::card::Card;
use crate::convert;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::hash;
use crate::lineage::{self, FileRecord, Lineage};
use plan::{FileLayout, INDEX_NAME, Slot};
use stage::{JOURNAL, Stage, staging_dir, write_error};

/// Elements that are encoded at a time: their bytes stay in a core's cache until they are written.
/// Whole blocks of every type.
const CHUNK: usize = 1 << 15;

/// Name of the model card in a model directory.
const CARD_NAME: &str = "README.md";

/// Writes one artifact. Any number of threads may write at once.
#[derive(Debug)]
pub struct ArtifactWriter {
    out: PathBuf,
    force: bool,
    layout: FileLayout,
    side_files: Vec<SideFile>,
    dir: PathBuf,
    files: Vec<File>,
    journal: Mutex<(File, HashSet<String>)>,
    /// Bytes written so far, by tensor.
    written: Vec<AtomicU64>,
}

impl ArtifactWriter {
    /// Checks the plan, the output and the free space, then opens the staging directory. If an interrupted run of
    /// the same plan left one, its finished tensors count; one of another plan is discarded with a warning.
    pub fn create(out: &Path, plan: WritePlan) -> Result<Self> {
        let layout = FileLayout::new(out, &plan)?;
        check_output(out, plan.force)?;
        let mut side_bytes = 0;
        for file in &plan.side_files {
            side_bytes += side_len(file)?;
        }
        let made = create_parents(out)?;
        let opened = Stage::open(out, &layout, side_bytes);
        if opened.is_err() {
            // Only those that are empty again; the failure that is reported is the one that matters.
            made.iter().for_each(|dir| drop(fs::remove_dir(dir)));
        }
        let Stage { dir, files, journal, done } = opened?;
        let written = layout.slots.iter().map(|_| AtomicU64::new(0)).collect();
        Ok(Self {
            out: out.to_owned(),
            force: plan.force,
            layout,
            side_files: plan.side_files,
            dir,
            files,
            journal: Mutex::new((journal, done)),
            written,
        })
    }

    /// Removes what an unfinished run left for `out`, for callers that know that no later run can use it. Leaves it
    /// where another process is at work there.
    pub fn discard(out: &Path) -> Result<()> {
        let Some(dir) = staging_dir(out).filter(|dir| dir.exists()) else { return Ok(()) };
        stage::check_idle(&dir)?;
        fs::remove_dir_all(&dir).map_err(|error| Error::io(&dir, "remove", error))
    }

    /// Whether `out` could be written: it is absent or empty (or `force` is set), and the directory that it will
    /// lie in, or the nearest one that exists, takes new files. For checks before long work.
    pub fn check(out: &Path, force: bool) -> Result<()> {
        check_output(out, force)?;
        let mut parent = out.parent().unwrap_or(out);
        while !parent.as_os_str().is_empty() && !parent.exists() {
            parent = parent.parent().unwrap_or(Path::new(""));
        }
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        use rustix::fs::{Access, access};
        access(parent, Access::WRITE_OK | Access::EXEC_OK)
            .map_err(|error| Error::io(parent, "write into the directory", error.into()))
    }

    /// True if the tensor is complete, in this run or in the interrupted one that this run continues.
    pub fn is_done(&self, name: &str) -> bool {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner).1.contains(name)
    }

    /// Writes elements `start..` of a tensor, encoded to its declared type; for a block type, whole blocks. A finite value
    /// that the type cannot hold is an error, never a silent infinity.
    pub fn write_f32(&self, name: &str, start: usize, values: &[f32]) -> Result<()> {
        let (at, slot) = self.slot(name)?;
        check_range(slot, start as u64, values.len() as u64, slot.numel, "elements")?;
        let (size, block) = (slot.dtype.block_bytes(), slot.dtype.block_len());
        if slot.dtype == DType::F32 && cfg!(target_endian = "little") {
            return self.put(at, slot, (start * size) as u64, bytemuck::cast_slice(values));
        }
        if !start.is_multiple_of(block) || !values.len().is_multiple_of(block) {
            let (out, count) = (self.out.clone(), values.len());
            let reason = format!(
                "tensor `{name}`: {count} elements from {start} on are no whole blocks of {}",
                slot.dtype
            );
            return Err(Error::BadPlan { out, reason });
        }
        let mut buffer = vec![0; CHUNK.min(values.len()) / block * size];
        for (chunk, first) in values.chunks(CHUNK).zip((start..).step_by(CHUNK)) {
            let bytes = &mut buffer[..chunk.len() / block * size];
            convert::encode(slot.dtype, chunk, bytes).map_err(|index| Error::CannotEncode {
                tensor: name.to_owned(),
                index: (first + index) as u64,
                value: chunk[index],
                dtype: slot.dtype.to_string(),
            })?;
            self.put(at, slot, (first / block * size) as u64, bytes)?;
        }
        Ok(())
    }

    /// Writes bytes `byte_start..` of a tensor as they are (little endian, in the declared type).
    pub fn write_raw(&self, name: &str, byte_start: u64, bytes: &[u8]) -> Result<()> {
        let (at, slot) = self.slot(name)?;
        check_range(slot, byte_start, bytes.len() as u64, slot.nbytes, "bytes")?;
        self.put(at, slot, byte_start, bytes)
    }

    /// Declares a tensor complete; from now on a resumed run skips it.
    pub fn done(&self, name: &str) -> Result<()> {
        let (at, slot) = self.slot(name)?;
        if self.written[at].load(Ordering::Relaxed) < slot.nbytes && !self.is_done(name) {
            let (out, first) = (self.out.clone(), name.to_owned());
            return Err(Error::Incomplete { out, missing: 1, total: 1, first });
        }
        let mut guard = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        if guard.1.insert(name.to_owned()) {
            let mut line = serde_json::to_vec(name).expect("invariant: strings serialize");
            line.push(b'\n');
            let path = self.dir.join(JOURNAL);
            guard.0.write_all(&line).map_err(|e| write_error(&self.out, &path, 0, e))?;
        }
        Ok(())
    }

    /// Adds a file that goes beside the weights and became known on the way; it replaces a declared one of the same
    /// name.
    pub fn add_side_file(&mut self, file: SideFile) {
        self.side_files.retain(|declared| declared.name != file.name);
        self.side_files.push(file);
    }

    /// Writes side files, lineage (with the hash of every file and tensor) and card, makes all of it durable, and
    /// renames the staging directory to the output. Returns the output's path.
    pub fn finish(self, lineage: Lineage, card: Card) -> Result<PathBuf> {
        self.finish_with(|| Ok((lineage, card)))
    }

    /// As [`finish`](Self::finish), with a manifest and a card that are made while the weights are hashed and go to
    /// the disk: hashing the parents costs no time of its own then.
    ///
    /// # Errors
    /// As [`finish`](Self::finish), and whatever `describe` fails with.
    pub fn finish_with<E: From<Error> + Send>(
        self,
        describe: impl FnOnce() -> Result<(Lineage, Card), E> + Send,
    ) -> Result<PathBuf, E> {
        self.check_complete()?;
        let mut names: Vec<String> =
            self.layout.shards.iter().map(|shard| shard.name.clone()).collect();
        if let Some(index) = &self.layout.shard_index {
            self.write_file(INDEX_NAME, index)?;
            names.push(INDEX_NAME.to_owned());
        }
        for file in &self.side_files {
            // The card and the manifest are this output's own.
            if file.name == CARD_NAME {
                continue;
            }
            self.write_file(&file.name, &file.read()?)?;
            names.push(file.name.clone());
        }
        names.sort();
        let (synced, (files, (described, tensors))) = std::thread::scope(|scope| {
            // The disk works while the processor hashes.
            let sync = scope.spawn(|| self.sync());
            let hashes = rayon::join(
                || self.file_records(&names),
                || rayon::join(describe, || self.tensor_hashes()),
            );
            (sync.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), hashes)
        });
        synced?;
        let (mut lineage, mut card) = described?;
        lineage.outputs = files?;
        lineage.tensors = tensors?.into_iter().collect();
        card.take_lineage(&lineage);
        self.write_file(lineage::FILE_NAME, &lineage.to_json())?;
        self.write_file(CARD_NAME, card.render().as_bytes())?;
        Ok(self.publish()?)
    }

    fn slot(&self, name: &str) -> Result<(usize, &Slot)> {
        let at = self.layout.index.get(name).ok_or_else(|| Error::NoSuchTensor {
            path: self.out.clone(),
            tensor: name.to_owned(),
            nearest: nearest(name, self.layout.slots.iter().map(|slot| &*slot.name)),
        })?;
        Ok((*at, &self.layout.slots[*at]))
    }

    fn put(&self, at: usize, slot: &Slot, start: u64, bytes: &[u8]) -> Result<()> {
        self.files[slot.shard].write_all_at(bytes, slot.offset + start).map_err(|error| {
            let shard = &self.layout.shards[slot.shard];
            write_error(&self.out, &self.dir.join(&shard.name), shard.len, error)
        })?;
        self.written[at].fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn check_complete(&self) -> Result<()> {
        let guard = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let mut missing =
            self.layout.slots.iter().map(|slot| &slot.name).filter(|name| !guard.1.contains(*name));
        let Some(first) = missing.next().cloned() else { return Ok(()) };
        let (missing, total) = (1 + missing.count(), self.layout.slots.len());
        Err(Error::Incomplete { out: self.out.clone(), missing, total, first })
    }

    fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.dir.join(name);
        let write = || {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            let mut file = File::create(&path)?;
            file.write_all(bytes)?;
            file.sync_data()
        };
        write().map_err(|error| write_error(&self.out, &path, bytes.len() as u64, error))
    }

    fn file_records(&self, names: &[String]) -> Result<Vec<FileRecord>> {
        let record = |name: &String| {
            let path = self.dir.join(name);
            let read = |error| Error::io(&path, "read", error);
            let size = fs::metadata(&path).map_err(read)?.len();
            Ok(FileRecord { name: name.clone(), size, sha256: hash::file(&path).map_err(read)? })
        };
        names.par_iter().map(record).collect()
    }

    fn tensor_hashes(&self) -> Result<Vec<(String, String)>> {
        let digest = |slot: &Slot| {
            let content = hash::blake3(slot.nbytes, |at, part| {
                self.files[slot.shard].read_exact_at(part, slot.offset + at).map_err(|e| {
                    Error::io(self.dir.join(&self.layout.shards[slot.shard].name), "read", e)
                })
            })?;
            Ok((slot.name.clone(), content.to_string()))
        };
        self.layout.slots.par_iter().map(digest).collect()
    }

    /// Makes the weights durable.
    fn sync(&self) -> Result<()> {
        for (file, shard) in self.files.iter().zip(&self.layout.shards) {
            let path = self.dir.join(&shard.name);
            file.sync_all().map_err(|error| write_error(&self.out, &path, shard.len, error))?;
        }
        Ok(())
    }

    /// Renames. An output that `force` replaces stays intact until the new one is complete.
    fn publish(self) -> Result<PathBuf> {
        // Again, since the output may have appeared while this run worked.
        check_output(&self.out, self.force)?;
        let journal = self.dir.join(JOURNAL);
        fs::remove_file(&journal).map_err(|error| Error::io(&journal, "remove", error))?;
        sync_dir(&self.dir)?;
        let old = staging_dir(&self.out)
            .map(|dir| dir.with_extension("refit-replaced"))
            .expect("invariant: the staging directory was named from this path");
        let replaced = self.force && self.out.exists();
        if replaced {
            let _ = fs::remove_dir_all(&old);
            fs::rename(&self.out, &old).map_err(|e| Error::io(&self.out, "replace", e))?;
        }
        if let Err(error) = fs::rename(&self.dir, &self.out) {
            if replaced {
                let _ = fs::rename(&old, &self.out);
            }
            return Err(Error::io(&self.out, "create", error));
        }
        if replaced && let Err(error) = remove(&old) {
            tracing::warn!("{}: cannot remove the replaced output: {error}", old.display());
        }
        if let Some(parent) = self.out.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync_dir(parent)?;
        }
        Ok(self.out)
    }
}

/// Creates the directories above `out`; returns those that were not there, innermost first.
fn create_parents(out: &Path) -> Result<Vec<PathBuf>> {
    let parents = out.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty());
    let made: Vec<PathBuf> =
        parents.take_while(|parent| !parent.exists()).map(Path::to_owned).collect();
    if let Some(parent) = made.first() {
        fs::create_dir_all(parent).map_err(|error| {
            made.iter().for_each(|dir| drop(fs::remove_dir(dir)));
            Error::io(parent, "create", error)
        })?;
    }
    Ok(made)
}

fn remove(path: &Path) -> std::io::Result<()> {
    if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

/// Renames become durable with their directory.
fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|error| Error::io(dir, "sync", error))
}

/// An output may be absent or an empty directory; anything else needs `force`.
fn check_output(out: &Path, force: bool) -> Result<()> {
    match fs::read_dir(out) {
        Ok(mut entries) => match entries.next() {
            Some(_) if !force => Err(Error::OutputExists { path: out.to_owned() }),
            _ => Ok(()),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        // The output itself is a file; with a file among its parents there would be nothing there.
        Err(_) if out.symlink_metadata().is_ok_and(|meta| !meta.is_dir()) => match force {
            true => Ok(()),
            false => Err(Error::OutputExists { path: out.to_owned() }),
        },
        Err(error) => Err(Error::io(out, "create", error)),
    }
}

fn side_len(file: &SideFile) -> Result<u64> {
    match &file.content {
        crate::SideContent::Bytes(bytes) => Ok(bytes.len() as u64),
        crate::SideContent::File(path) => {
            fs::metadata(path).map(|meta| meta.len()).map_err(|e| Error::io(path, "read", e))
        }
    }
}

fn check_range(slot: &Slot, start: u64, count: u64, len: u64, unit: &'static str) -> Result<()> {
    let end = start.saturating_add(count);
    if end > len {
        return Err(Error::OutOfRange { tensor: slot.name.clone(), start, end, len, unit });
    }
    Ok(())
}
