//! Frozen forward passes, computed once and kept on disk: what heads on frozen encoders are trained on.
//!
//! A feature is a vector of `width` numbers that a frozen model makes of one example. It is kept under the hash of the example's
//! content, in a set that is named by the hash of everything else that decides it: the model's content, its config, the
//! preprocessing, what is read off, and the version of refit. So nothing is ever found under a wrong name, and a data set that
//! shares examples with an earlier one shares their features.
//!
//! ```text
//! ROOT/SET/SEGMENT.features      keys, values, a checksum over both
//! ```
//!
//! Segments are written under a temporary name and renamed, so a reader sees whole ones only; a segment whose checksum is wrong
//! is removed and its rows are computed again. Processes may share a set: each writes segments of its own, named by their
//! content, and a segment is removed only when its rows lie in another one. A killed run leaves the segments that it wrote.
//!
//! All sets together take at most [`Limits::bytes`]; the set that was used longest ago goes first. Any file, set or the whole
//! root may be deleted at any time.

mod segment;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use crate::error::{Error, Result};
use segment::Segment;

/// Name of an example: the hash of its content.
pub type Key = [u8; 32];

/// The key of an example from the parts of its content.
pub fn key(parts: &[&[u8]]) -> Key {
    let lengths: Vec<[u8; 8]> = parts.iter().map(|p| (p.len() as u64).to_le_bytes()).collect();
    let whole: Vec<&[u8]> =
        lengths.iter().zip(parts).flat_map(|(length, part)| [&length[..], part]).collect();
    segment::digest(&whole.concat())
}

/// How much is kept, and how often it is written.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most bytes of all sets together.
    pub bytes: u64,
    /// Rows that are computed before they are written at the latest.
    pub rows: usize,
    /// Time after which computed rows are written.
    pub time: Duration,
    /// Segments of a set before they are merged into one.
    pub segments: usize,
}

impl Default for Limits {
    /// 4 GiB; every 5 seconds or 8192 rows.
    fn default() -> Self {
        Self { bytes: 4 << 30, rows: 8192, time: Duration::from_secs(5), segments: 16 }
    }
}

/// The features of one model under one preprocessing.
#[derive(Debug)]
pub struct FeatureStore {
    root: PathBuf,
    dir: PathBuf,
    width: usize,
    limits: Limits,
    segments: Vec<Segment>,
    /// Segment and row of each key.
    index: HashMap<Key, (usize, usize)>,
    pending: HashMap<Key, Vec<f32>>,
    written: Instant,
    /// Rows found on disk so far.
    pub found: u64,
    /// Rows computed so far.
    pub computed: u64,
    /// Why rows could not be kept, where they could not: a full disk does not stop the work that they are for.
    pub unkept: Option<String>,
}

impl FeatureStore {
    /// Opens the set below `root` that belongs to `source`: everything that features depend on besides the example, in words
    /// or hashes. Every segment is read through once; damaged ones are removed.
    ///
    /// # Errors
    /// A root that cannot be made or listed.
    pub fn open(root: &Path, source: &[&str], width: usize, limits: Limits) -> Result<Self> {
        let parts: Vec<&[u8]> = source.iter().map(|part| part.as_bytes()).collect();
        let name = segment::hex(&key(&[&parts.concat()[..], &key(&parts)[..]])[..16]);
        let dir = root.join(name);
        fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        // The time of the directory says when the set was used last.
        if let Ok(handle) = fs::File::open(&dir) {
            let _ = handle.set_modified(SystemTime::now());
        }
        let (mut segments, mut index) = (Vec::new(), HashMap::new());
        for path in segment::list(&dir)? {
            let Some((segment, keys)) = Segment::open(&path, width) else { continue };
            for (row, key) in keys.into_iter().enumerate() {
                index.entry(key).or_insert((segments.len(), row));
            }
            segments.push(segment);
        }
        Ok(Self {
            root: root.to_owned(),
            dir,
            width,
            limits,
            segments,
            index,
            pending: HashMap::new(),
            written: Instant::now(),
            found: 0,
            computed: 0,
            unkept: None,
        })
    }

    /// Rows on disk.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// The features of all examples, `[keys, width]`. `batches` says which examples `compute` is given at once, and must name
    /// every one; a batch is computed whole when one of its rows is not there, so that a feature never depends on what was
    /// there before. `progress` gets examples done and their number.
    ///
    /// # Errors
    /// What `compute` fails with; rows that it computed before are kept.
    pub fn rows<E: From<Error>>(
        &mut self,
        keys: &[Key],
        batches: &[Vec<usize>],
        compute: &mut Compute<E>,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Vec<f32>, E> {
        let mut all = vec![0.0; keys.len() * self.width];
        let mut done = 0;
        let mut work = |store: &mut Self| -> Result<(), E> {
            for batch in batches {
                if !store.read(keys, batch, &mut all) {
                    let values = compute(batch)?;
                    if values.len() != batch.len() * store.width {
                        let (left, right) = (values.len(), batch.len() * store.width);
                        let what = "features of a batch against examples × width".to_owned();
                        return Err(Error::Length { what, left, right }.into());
                    }
                    for (&example, row) in batch.iter().zip(values.chunks_exact(store.width)) {
                        let at = example * store.width;
                        all[at..at + store.width].copy_from_slice(row);
                        store.keep(keys[example], row);
                    }
                    store.computed += batch.len() as u64;
                    store.flush(false);
                } else {
                    store.found += batch.len() as u64;
                }
                done += batch.len() as u64;
                progress(done, keys.len() as u64);
            }
            Ok(())
        };
        let result = work(self);
        self.flush(true);
        result?;
        self.merge();
        trim(&self.root, self.limits.bytes, Some(&self.dir));
        Ok(all)
    }

    /// Reads the rows of a batch into their places; false when one is not there or cannot be read.
    fn read(&mut self, keys: &[Key], batch: &[usize], all: &mut [f32]) -> bool {
        batch.iter().all(|&example| {
            let Some(&(segment, row)) = self.index.get(&keys[example]) else { return false };
            let out = &mut all[example * self.width..(example + 1) * self.width];
            self.segments[segment].read(row, out)
        })
    }

    fn keep(&mut self, key: Key, row: &[f32]) {
        if !self.index.contains_key(&key) {
            self.pending.insert(key, row.to_vec());
        }
    }

    /// Writes what was computed, where it is time to or `now`.
    fn flush(&mut self, now: bool) {
        let due =
            self.pending.len() >= self.limits.rows || self.written.elapsed() >= self.limits.time;
        if self.pending.is_empty() || !(now || due) {
            return;
        }
        self.written = Instant::now();
        let rows: Vec<_> = std::mem::take(&mut self.pending).into_iter().collect();
        let own: u64 = self.segments.iter().map(Segment::bytes).sum();
        if own + segment::size(rows.len(), self.width) > self.limits.bytes {
            let limit = self.limits.bytes;
            self.unkept = Some(format!("features of one model take at most {limit} bytes on disk"));
            return;
        }
        match Segment::write(&self.dir, self.width, rows) {
            Ok((segment, keys)) => self.take(segment, keys),
            Err(error) => self.unkept = Some(error.to_string()),
        }
    }

    fn take(&mut self, segment: Segment, keys: Vec<Key>) {
        let at = self.segments.len();
        self.index.extend(keys.into_iter().enumerate().map(|(row, key)| (key, (at, row))));
        self.segments.push(segment);
    }

    /// Makes one segment of many: a set is opened by reading all of them.
    fn merge(&mut self) {
        if self.segments.len() <= self.limits.segments {
            return;
        }
        let mut rows = Vec::with_capacity(self.index.len());
        for (key, &(segment, row)) in &self.index {
            let mut values = vec![0.0; self.width];
            if !self.segments[segment].read(row, &mut values) {
                return;
            }
            rows.push((*key, values));
        }
        let Ok((segment, keys)) = Segment::write(&self.dir, self.width, rows) else { return };
        let old = std::mem::take(&mut self.segments);
        self.index.clear();
        let kept = segment.path().to_owned();
        self.take(segment, keys);
        for segment in old.iter().filter(|segment| segment.path() != kept) {
            let _ = fs::remove_file(segment.path());
        }
    }
}

/// Rows that were computed outlive a panic.
impl Drop for FeatureStore {
    fn drop(&mut self) {
        self.flush(true);
    }
}

/// Features of the examples of a batch, row after row.
pub type Compute<'a, E> = dyn FnMut(&[usize]) -> Result<Vec<f32>, E> + 'a;

/// Removes the sets that were used longest ago until at most `limit` bytes are left, never `but`. Returns the bytes that went.
pub fn trim(root: &Path, limit: u64, but: Option<&Path>) -> u64 {
    let Ok(entries) = fs::read_dir(root) else { return 0 };
    let mut sets: Vec<(SystemTime, u64, PathBuf)> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let used = fs::metadata(&path).ok().filter(|meta| meta.is_dir())?.modified().ok()?;
            let files = fs::read_dir(&path).ok()?;
            let sizes = files.filter_map(|file| Some(file.ok()?.metadata().ok()?.len()));
            Some((used, sizes.sum(), path))
        })
        .collect();
    sets.sort();
    let mut total: u64 = sets.iter().map(|(_, size, _)| size).sum();
    let mut gone = 0;
    for (_, size, path) in sets {
        if total <= limit {
            break;
        }
        if but != Some(&path) && fs::remove_dir_all(&path).is_ok() {
            total -= size;
            gone += size;
        }
    }
    gone
}

#[cfg(test)]
mod tests;
