//! One file of features.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | `refitft1` |
//! | 4, 4 | width of a row and number of rows, little-endian |
//! | 32 each | keys, sorted |
//! | 4 × width each | rows, f32, little-endian |
//! | 32 | BLAKE3 of all of the above |

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::Key;
use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"refitft1";
const HEAD: usize = 16;
const EXTENSION: &str = "features";
/// A temporary file of this age belongs to no living process.
const STALE: Duration = Duration::from_secs(3600);

/// A whole segment; it stays readable when another process removes its file.
#[derive(Debug)]
pub(super) struct Segment {
    path: PathBuf,
    file: File,
    width: usize,
    rows: usize,
}

/// BLAKE3 of bytes.
pub(super) fn digest(bytes: &[u8]) -> Key {
    let read = |at: u64, part: &mut [u8]| -> Result<(), std::convert::Infallible> {
        part.copy_from_slice(&bytes[at as usize..][..part.len()]);
        Ok(())
    };
    let Ok(hash) = refit_store::hash::blake3(bytes.len() as u64, read);
    *hash.as_bytes()
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes of a segment.
pub(super) fn size(rows: usize, width: usize) -> u64 {
    (HEAD + rows * (32 + 4 * width) + 32) as u64
}

/// Segments of a set in name order. Temporary files that a dead process left are removed.
pub(super) fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        match path.extension().and_then(|e| e.to_str()) {
            Some(EXTENSION) => found.push(path),
            Some("tmp") => {
                let age = fs::metadata(&path).and_then(|meta| meta.modified()).ok();
                let age = age.and_then(|at| SystemTime::now().duration_since(at).ok());
                if age.is_some_and(|age| age > STALE) {
                    let _ = fs::remove_file(&path);
                }
            }
            _ => {}
        }
    }
    found.sort();
    Ok(found)
}

impl Segment {
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn bytes(&self) -> u64 {
        size(self.rows, self.width)
    }

    /// Opens a segment with its keys; `None`, and the file is removed, when it is not whole.
    pub fn open(path: &Path, width: usize) -> Option<(Self, Vec<Key>)> {
        match Self::check(path, width) {
            Ok(found) => {
                if found.is_none() {
                    tracing::warn!(file = %path.display(), "cached features are damaged; computing them again");
                    let _ = fs::remove_file(path);
                }
                found
            }
            // Gone, or not readable now: as if it were not there.
            Err(_) => None,
        }
    }

    fn check(path: &Path, width: usize) -> std::io::Result<Option<(Self, Vec<Key>)>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut head = [0; HEAD];
        if length < size(0, width) {
            return Ok(None);
        }
        file.read_exact(&mut head)?;
        let number = |at: usize| {
            u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]) as usize
        };
        let rows = number(12);
        if &head[..8] != MAGIC || number(8) != width || length != size(rows, width) {
            return Ok(None);
        }
        file.rewind()?;
        let mut keys = vec![0; 32 * rows];
        let end = length - 32;
        let mut read = |at: u64, part: &mut [u8]| -> std::io::Result<()> {
            file.read_exact(part)?;
            // The keys' share of what passes by.
            let (from, to) = (at as usize, at as usize + part.len());
            let (first, last) = (from.max(HEAD), to.min(HEAD + keys.len()));
            if first < last {
                keys[first - HEAD..last - HEAD].copy_from_slice(&part[first - from..last - from]);
            }
            Ok(())
        };
        let hash = refit_store::hash::blake3(end, &mut read)?;
        let mut stored = [0; 32];
        file.read_exact(&mut stored)?;
        if *hash.as_bytes() != stored {
            return Ok(None);
        }
        let keys = keys.chunks_exact(32).filter_map(|key| key.try_into().ok()).collect();
        Ok(Some((Self { path: path.to_owned(), file, width, rows }, keys)))
    }

    /// Reads one row; false when the file does not give it any more.
    pub fn read(&mut self, row: usize, out: &mut [f32]) -> bool {
        let mut bytes = vec![0; 4 * self.width];
        let at = HEAD + 32 * self.rows + row * bytes.len();
        let read = self
            .file
            .seek(SeekFrom::Start(at as u64))
            .and_then(|_| self.file.read_exact(&mut bytes));
        for (value, bytes) in out.iter_mut().zip(bytes.chunks_exact(4)) {
            *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        read.is_ok()
    }

    /// Writes rows as a segment that is named by its content: complete or absent.
    pub fn write(
        dir: &Path,
        width: usize,
        mut rows: Vec<(Key, Vec<f32>)>,
    ) -> Result<(Self, Vec<Key>)> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        rows.sort_by_key(|row| row.0);
        rows.dedup_by(|a, b| a.0 == b.0);
        let mut bytes = Vec::with_capacity(size(rows.len(), width) as usize);
        bytes.extend(MAGIC);
        bytes.extend((width as u32).to_le_bytes());
        bytes.extend((rows.len() as u32).to_le_bytes());
        rows.iter().for_each(|(key, _)| bytes.extend(key));
        rows.iter().flat_map(|(_, row)| row).for_each(|value| bytes.extend(value.to_le_bytes()));
        let hash = digest(&bytes);
        bytes.extend(hash);
        let path = dir.join(format!("{}.{EXTENSION}", hex(&hash[..16])));
        let own = format!("{}-{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let temporary = dir.join(own);
        // Another process may have removed the set to make room.
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&path)
        };
        let file = write().map_err(|error| {
            let _ = fs::remove_file(&temporary);
            Error::io(&path)(error)
        })?;
        let keys = rows.into_iter().map(|(key, _)| key).collect::<Vec<_>>();
        Ok((Self { path, file, width, rows: keys.len() }, keys))
    }
}
