//! Numbers that are too many for memory, in a file without a name that is gone when the work is over.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::error::{Error, Result};

/// Vectors of f32, read and written by their place. Threads may share it.
#[derive(Debug)]
pub struct Scratch {
    file: File,
    directory: PathBuf,
    end: Mutex<u64>,
}

impl Scratch {
    /// An empty file in `directory`.
    ///
    /// # Errors
    /// A directory that cannot be written.
    pub fn new(directory: &Path) -> Result<Self> {
        let directory = directory.to_owned();
        let file = tempfile::tempfile_in(&directory)
            .map_err(|source| Error::Io { path: directory.clone(), source })?;
        Ok(Self { file, directory, end: Mutex::new(0) })
    }

    /// Room for `count` numbers; returns its place.
    pub fn reserve(&self, count: usize) -> u64 {
        let mut end = self.end.lock().expect("invariant: no thread panics while holding it");
        let place = *end;
        *end += 4 * count as u64;
        place
    }

    /// Writes at a place.
    ///
    /// # Errors
    /// A full disk.
    pub fn write(&self, place: u64, values: &[f32]) -> Result<()> {
        let done = self.file.write_all_at(bytemuck::cast_slice(values), place);
        done.map_err(|source| Error::Io { path: self.directory.clone(), source })
    }

    /// Reads from a place.
    ///
    /// # Errors
    /// A disk that fails.
    pub fn read(&self, place: u64, values: &mut [f32]) -> Result<()> {
        let done = self.file.read_exact_at(bytemuck::cast_slice_mut(values), place);
        done.map_err(|source| Error::Io { path: self.directory.clone(), source })
    }
}
