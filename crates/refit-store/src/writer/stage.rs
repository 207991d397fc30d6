//! The staging directory and its journal.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::plan::{FileLayout, Shard};
use crate::error::{Error, Result};

/// Name of the journal inside the staging directory.
pub(super) const JOURNAL: &str = ".refit-journal";

/// Room that metadata, side files and reports take at most, beside the tensors.
const SLACK: u64 = 1 << 20;

/// An output in the making: files of their final size, and the list of finished tensors.
#[derive(Debug)]
pub(super) struct Stage {
    pub dir: PathBuf,
    pub files: Vec<File>,
    pub journal: File,
    pub done: HashSet<String>,
}

/// `.NAME.refit-partial` beside the output.
pub(super) fn staging_dir(out: &Path) -> Option<PathBuf> {
    let name = out.file_name()?.to_str()?;
    Some(out.with_file_name(format!(".{name}.refit-partial")))
}

/// Maps "no space left" and "file too large" to errors that say what to do.
pub(super) fn write_error(out: &Path, path: &Path, need: u64, error: std::io::Error) -> Error {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            Error::DiskFull { path: out.to_owned(), need, available: available(path).unwrap_or(0) }
        }
        ErrorKind::FileTooLarge => Error::FileTooLarge { path: path.to_owned(), need },
        _ => Error::io(path, "write", error),
    }
}

/// Free bytes for this user in the file system that holds `path`.
fn available(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

impl Stage {
    /// Takes up the work of an interrupted run of the same plan, or begins anew.
    pub fn open(out: &Path, layout: &FileLayout, side_bytes: u64) -> Result<Self> {
        let bad = |reason: &str| Error::BadPlan { out: out.to_owned(), reason: reason.to_owned() };
        let dir = staging_dir(out).ok_or_else(|| bad("the output needs a name in UTF-8"))?;
        let existed = dir.exists();
        fs::create_dir_all(&dir).map_err(|error| Error::io(&dir, "create", error))?;
        let opened = Self::fill(out, &dir, layout, side_bytes);
        if opened.is_err() && !existed {
            // Nothing of value is lost: this call made the directory.
            let _ = fs::remove_dir_all(&dir);
        }
        opened
    }

    fn fill(out: &Path, dir: &Path, layout: &FileLayout, side_bytes: u64) -> Result<Self> {
        let path = dir.join(JOURNAL);
        let mut journal = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| write_error(out, &path, 0, error))?;
        lock(dir, &path, &journal)?;
        let mut text = Vec::new();
        journal.read_to_end(&mut text).map_err(|error| Error::io(&path, "read", error))?;
        let head = format!("refit 1 {} {}\n", layout.fingerprint, boot_id());
        let done = finished(&text, &head, layout);
        let fresh = done.is_none();
        if fresh {
            if !text.is_empty() {
                tracing::warn!(
                    "{}: left by a run with other inputs or parameters (or before a restart of the \
                     machine); starting over",
                    dir.display()
                );
            }
            clear(dir)?;
        }
        let need = layout.shards.iter().map(|shard| shard.len).sum::<u64>() + side_bytes + SLACK;
        let have: u64 = layout.shards.iter().map(|shard| allocated(&dir.join(&shard.name))).sum();
        let free = available(dir);
        if let Some(available) = free.filter(|&free| free < need.saturating_sub(have)) {
            return Err(Error::DiskFull { path: out.to_owned(), need, available });
        }
        let files = layout
            .shards
            .iter()
            .map(|shard| preallocate(&dir.join(&shard.name), shard))
            .collect::<std::result::Result<_, (PathBuf, std::io::Error)>>()
            .map_err(|(path, error)| write_error(out, &path, need, error))?;
        let done = done.unwrap_or_default();
        if fresh {
            rewrite(&mut journal, head.as_bytes())
                .map_err(|error| write_error(out, &path, need, error))?;
        } else {
            // A kill may have cut the last line: keep whole lines only.
            let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
            rewrite(&mut journal, &text[..whole])
                .map_err(|error| write_error(out, &path, need, error))?;
        }
        Ok(Self { dir: dir.to_owned(), files, journal, done })
    }
}

/// Takes the journal for this process, until the file is closed.
fn lock(dir: &Path, path: &Path, journal: &File) -> Result<()> {
    match journal.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(Error::Busy { path: dir.to_owned() }),
        // A file system without locks: two writers at once are the user's to avoid.
        Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => Ok(()),
        Err(TryLockError::Error(error)) => Err(Error::io(path, "lock", error)),
    }
}

/// [`Error::Busy`] where another process works in the staging directory.
pub(super) fn check_idle(dir: &Path) -> Result<()> {
    let path = dir.join(JOURNAL);
    match File::open(&path) {
        Ok(journal) => lock(dir, &path, &journal),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io(&path, "open", error)),
    }
}

fn rewrite(journal: &mut File, bytes: &[u8]) -> std::io::Result<()> {
    journal.set_len(bytes.len() as u64)?;
    journal.seek(SeekFrom::Start(0))?;
    journal.write_all(bytes)
}

/// Tensors that the journal names, if it is one of this plan. One JSON string a line.
fn finished(text: &[u8], head: &str, layout: &FileLayout) -> Option<HashSet<String>> {
    let lines = text.strip_prefix(head.as_bytes())?;
    let whole = lines.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    let names = lines[..whole].split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    let mut done = HashSet::new();
    for line in names {
        let name: String = serde_json::from_slice(line).ok()?;
        if !layout.index.contains_key(&name) {
            return None;
        }
        done.insert(name);
    }
    Some(done)
}

/// The kernel's name of this run of the machine. Written pages survive a killed process but not a crash of the
/// machine, so a journal from before the last boot is not believed.
fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_or_else(|_| "-".to_owned(), |id| id.trim().to_owned())
}

/// Removes everything but the journal (which is locked).
fn clear(dir: &Path) -> Result<()> {
    let fail = |error| Error::io(dir, "empty", error);
    for entry in fs::read_dir(dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if entry.file_name() == JOURNAL {
            continue;
        }
        let directory = entry.file_type().map_err(fail)?.is_dir();
        let path = entry.path();
        if directory { fs::remove_dir_all(path) } else { fs::remove_file(path) }.map_err(fail)?;
    }
    Ok(())
}

/// Bytes on disk of a file that is already there.
fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).map_or(0, |meta| meta.blocks() * 512)
}

/// Opens one weight file at its final size, with its blocks reserved and its header written.
fn preallocate(path: &Path, shard: &Shard) -> Result<File, (PathBuf, std::io::Error)> {
    let make = || {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        reserve(&file, shard.len)?;
        file.set_len(shard.len)?;
        std::os::unix::fs::FileExt::write_all_at(&file, &shard.header, 0)?;
        Ok(file)
    };
    make().map_err(|error| (path.to_owned(), error))
}

/// Reserves blocks, so that a full disk shows now and not after an hour of work. File systems that cannot do
/// so get a sparse file.
#[cfg(target_os = "linux")]
fn reserve(file: &File, len: u64) -> std::io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    match fallocate(file, FallocateFlags::empty(), 0, len) {
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
        outcome => Ok(outcome?),
    }
}

#[cfg(not(target_os = "linux"))]
fn reserve(_: &File, _: u64) -> std::io::Result<()> {
    Ok(())
}
