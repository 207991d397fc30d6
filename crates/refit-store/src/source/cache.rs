//! The cache: one directory per source, filled under a lock, complete or absent, checked on every use.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use super::{PullOptions, fault};
use crate::error::{Error, Result};
use crate::hash;
use crate::lineage::FileRecord;

/// Where fetched files lie: `REFIT_CACHE`, else `refit` in the user's cache directory.
pub fn cache_root() -> PathBuf {
    let dir =
        |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let user_cache = || {
        if cfg!(windows) {
            dir("LOCALAPPDATA")
        } else if cfg!(target_os = "macos") {
            dir("HOME").map(|home| home.join("Library/Caches"))
        } else {
            dir("XDG_CACHE_HOME")
                .filter(|path| path.is_absolute())
                .or_else(|| dir("HOME").map(|home| home.join(".cache")))
        }
    };
    dir("REFIT_CACHE")
        .unwrap_or_else(|| user_cache().unwrap_or_else(std::env::temp_dir).join("refit"))
}

/// What lies in an entry, and proof that it still does.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// The source with its version filled in.
    pub source: String,
    /// sha256 of the download, where it was one file.
    pub sha256: Option<String>,
    pub files: Vec<Stored>,
}

/// A file and when it was last known to be intact.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Stored {
    #[serde(flatten)]
    pub record: FileRecord,
    /// Modification time in nanoseconds when the hash was last computed.
    pub modified: u64,
}

/// One source's place in the cache, held by this process.
pub(super) struct Entry {
    /// The source as the user gave it, for messages.
    source: String,
    dir: PathBuf,
    partial: PathBuf,
    _lock: File,
}

const MANIFEST: &str = "manifest.json";
const FILES: &str = "files";

impl Entry {
    /// Opens the entry `kind/key` and waits for other processes that work on it.
    pub fn open(source: &str, kind: &str, key: &str, options: &PullOptions) -> Result<Self> {
        let root = options.cache.clone().unwrap_or_else(cache_root);
        let base = root.join(kind);
        fs::create_dir_all(&base).map_err(|error| Error::io(&base, "create", error))?;
        let slug = slug(key);
        let lock_path = base.join(format!("{slug}.lock"));
        let lock =
            File::create(&lock_path).map_err(|error| Error::io(&lock_path, "create", error))?;
        lock.lock().map_err(|error| Error::io(&lock_path, "lock", error))?;
        Ok(Self {
            source: source.to_owned(),
            dir: base.join(&slug),
            partial: base.join(format!("{slug}.partial")),
            _lock: lock,
        })
    }

    /// Where the entry's files lie.
    pub fn files_dir(&self) -> PathBuf {
        self.dir.join(FILES)
    }

    /// The manifest, when every file is there with its size and hash. A damaged entry is removed.
    pub fn verified(&self) -> Result<Option<Manifest>> {
        let path = self.dir.join(MANIFEST);
        let Ok(bytes) = fs::read(&path) else { return Ok(None) };
        let Ok(mut manifest) = serde_json::from_slice::<Manifest>(&bytes) else {
            self.remove()?;
            return Ok(None);
        };
        let mut rehashed = false;
        for file in &mut manifest.files {
            if !is_inside(&file.record.name) {
                self.remove()?;
                return Ok(None);
            }
            match intact(&self.files_dir().join(&file.record.name), file) {
                Some(modified) => {
                    rehashed |= std::mem::replace(&mut file.modified, modified) != modified
                }
                None => {
                    tracing::warn!(file = %file.record.name, "a cached file was changed; fetching it again");
                    self.remove()?;
                    return Ok(None);
                }
            }
        }
        if rehashed {
            self.write_manifest(&self.dir, &manifest)?;
        }
        Ok(Some(manifest))
    }

    /// A directory for downloads that survives an interrupted run, so that they can be resumed.
    pub fn partial_dir(&self) -> Result<PathBuf> {
        fs::create_dir_all(&self.partial)
            .map_err(|error| Error::io(&self.partial, "create", error))?;
        Ok(self.partial.clone())
    }

    /// An empty directory to unpack into.
    pub fn staging_dir(&self) -> Result<PathBuf> {
        let staging = self.partial_dir()?.join("staging");
        if staging.exists() {
            fs::remove_dir_all(&staging).map_err(|error| Error::io(&staging, "empty", error))?;
        }
        let files = staging.join(FILES);
        fs::create_dir_all(&files).map_err(|error| Error::io(&files, "create", error))?;
        Ok(files)
    }

    /// Takes what lies in [`Entry::staging_dir`] into the cache, whole, and cleans up.
    pub fn commit(&self, source: String, sha256: Option<String>) -> Result<Manifest> {
        let staging = self.partial.join("staging");
        let files = inventory(&self.source, &staging.join(FILES))?;
        let manifest = Manifest { source, sha256, files };
        self.write_manifest(&staging, &manifest)?;
        self.remove()?;
        fs::rename(&staging, &self.dir)
            .map_err(|error| Error::io(&self.dir, "move into the cache", error))?;
        fs::remove_dir_all(&self.partial)
            .map_err(|error| Error::io(&self.partial, "remove", error))?;
        Ok(manifest)
    }

    fn write_manifest(&self, dir: &Path, manifest: &Manifest) -> Result<()> {
        let path = dir.join(MANIFEST);
        let temporary = dir.join("manifest.tmp");
        let bytes =
            serde_json::to_vec_pretty(manifest).expect("invariant: a cache manifest serializes");
        fs::write(&temporary, bytes).map_err(|error| Error::io(&temporary, "write", error))?;
        fs::rename(&temporary, &path).map_err(|error| Error::io(&path, "write", error))
    }

    fn remove(&self) -> Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(&self.dir, "remove", error))
            }
            _ => Ok(()),
        }
    }
}

impl Manifest {
    pub fn records(&self) -> Vec<FileRecord> {
        self.files.iter().map(|file| file.record.clone()).collect()
    }
}

/// True for a name that stays below the entry's own directory.
fn is_inside(name: &str) -> bool {
    let mut parts = Path::new(name).components().peekable();
    parts.peek().is_some() && parts.all(|part| matches!(part, std::path::Component::Normal(_)))
}

/// The modification time to remember, when size and hash are right. The hash is recomputed only when the time
/// changed.
fn intact(path: &Path, file: &Stored) -> Option<u64> {
    let metadata = fs::symlink_metadata(path).ok()?;
    if !metadata.is_file() || metadata.len() != file.record.size {
        return None;
    }
    let modified = modified(&metadata);
    let same = modified == file.modified
        || hash::file(path).is_ok_and(|found| found == file.record.sha256);
    same.then_some(modified)
}

fn modified(metadata: &fs::Metadata) -> u64 {
    let time = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    time.map_or(0, |age| u64::try_from(age.as_nanos()).unwrap_or(u64::MAX))
}

/// Every file below `root`, sorted by name. Links are followed only within the tree.
fn inventory(source: &str, root: &Path) -> Result<Vec<Stored>> {
    let mut files = Vec::new();
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for item in fs::read_dir(&dir).map_err(|error| Error::io(&dir, "list", error))? {
            let path = item.map_err(|error| Error::io(&dir, "list", error))?.path();
            let metadata =
                fs::symlink_metadata(&path).map_err(|error| Error::io(&path, "inspect", error))?;
            if metadata.is_dir() {
                pending.push(path);
                continue;
            }
            if !metadata.is_file() {
                return Err(fault(
                    source,
                    format!("`{}` is neither a file nor a directory", path.display()),
                    "fetch it by hand and give its path",
                ));
            }
            let relative = path.strip_prefix(root).expect("invariant: listed below the root");
            let name = relative.to_string_lossy().replace('\\', "/");
            let sha256 = hash::file(&path).map_err(|error| Error::io(&path, "read", error))?;
            let record = FileRecord { name, size: metadata.len(), sha256 };
            files.push(Stored { record, modified: modified(&metadata) });
        }
    }
    files.sort_by(|a, b| a.record.name.cmp(&b.record.name));
    Ok(files)
}

/// A file name that tells people what it is and never collides.
fn slug(key: &str) -> String {
    let readable: String = key
        .chars()
        .take(80)
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') { c } else { '-' })
        .collect();
    format!("{readable}-{}", &hash::hex(key.as_bytes())[..12])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn options(dir: &Path) -> PullOptions {
        PullOptions { cache: Some(dir.to_owned()), ..Default::default() }
    }

    fn fill(entry: &Entry) -> Manifest {
        let files = entry.staging_dir().unwrap();
        fs::create_dir(files.join("sub")).unwrap();
        fs::write(files.join("sub/model.gguf"), b"weights").unwrap();
        entry.commit("pypi:x==1".into(), None).unwrap()
    }

    #[test]
    fn an_entry_is_complete_or_absent() {
        let dir = tempfile::tempdir().unwrap();
        let entry = Entry::open("pypi:x", "pypi", "x", &options(dir.path())).unwrap();
        assert!(entry.verified().unwrap().is_none());
        fs::write(entry.staging_dir().unwrap().join("half"), b"ha").unwrap();
        assert!(entry.verified().unwrap().is_none(), "an interrupted fetch shows nothing");
        fill(&entry);
        let manifest = entry.verified().unwrap().unwrap();
        assert_eq!(manifest.records()[0].name, "sub/model.gguf");
        assert!(!entry.partial.exists());
    }

    #[test]
    fn a_changed_file_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let entry = Entry::open("pypi:x", "pypi", "x", &options(dir.path())).unwrap();
        fill(&entry);
        let path = entry.files_dir().join("sub/model.gguf");
        // The same bytes with a new time are hashed once more and accepted.
        fs::write(&path, b"weights").unwrap();
        assert!(entry.verified().unwrap().is_some());
        let file = File::options().write(true).open(&path).unwrap();
        fs::write(&path, b"Weights").unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert!(entry.verified().unwrap().is_none());
        assert!(!path.exists(), "a damaged entry is removed");
    }

    #[test]
    fn a_damaged_manifest_means_absent() {
        let dir = tempfile::tempdir().unwrap();
        let entry = Entry::open("pypi:x", "pypi", "x", &options(dir.path())).unwrap();
        fill(&entry);
        fs::write(entry.dir.join(MANIFEST), "{").unwrap();
        assert!(entry.verified().unwrap().is_none());
    }

    #[test]
    fn the_lock_keeps_others_out() {
        let dir = tempfile::tempdir().unwrap();
        let entry = Entry::open("pypi:x", "pypi", "x", &options(dir.path())).unwrap();
        let other = File::options()
            .write(true)
            .open(dir.path().join("pypi").join(format!("{}.lock", slug("x"))))
            .unwrap();
        assert!(matches!(other.try_lock(), Err(fs::TryLockError::WouldBlock)));
        drop(entry);
        assert!(other.try_lock().is_ok());
    }

    #[test]
    fn slugs_are_safe_and_distinct() {
        assert_ne!(slug("a/b"), slug("a-b"));
        assert!(!slug("../../etc").contains(['/', '.']));
    }

    #[test]
    fn a_manifest_that_names_files_elsewhere_means_absent() {
        let dir = tempfile::tempdir().unwrap();
        let entry = Entry::open("pypi:x", "pypi", "x", &options(dir.path())).unwrap();
        fs::write(dir.path().join("secret"), b"weights").unwrap();
        for name in ["../../../secret", dir.path().join("secret").to_str().unwrap(), ""] {
            let mut manifest = fill(&entry);
            manifest.files[0].record.name = name.to_owned();
            entry.write_manifest(&entry.dir, &manifest).unwrap();
            assert!(entry.verified().unwrap().is_none(), "{name}");
        }
        assert!(dir.path().join("secret").is_file());
    }

    proptest! {
        #![proptest_config(crate::testing::cases(128))]

        /// Whatever became of the manifest, an entry is absent or holds what it lists.
        #[test]
        fn a_changed_manifest_means_absent_or_intact(at in any::<prop::sample::Index>(), with in "(\\PC|[0-9\"{},:-]){0,3}") {
            let dir = tempfile::tempdir().unwrap();
            let entry = Entry::open("pypi:x", "pypi", "x", &options(dir.path())).unwrap();
            fill(&entry);
            let path = entry.dir.join(MANIFEST);
            let mut text = fs::read_to_string(&path).unwrap();
            let at = at.index(text.len());
            text.replace_range(at..at + 1, &with);
            fs::write(&path, text).unwrap();
            if let Some(manifest) = entry.verified().unwrap() {
                for file in manifest.records() {
                    let bytes = fs::read(entry.files_dir().join(&file.name)).unwrap();
                    prop_assert_eq!(bytes.len() as u64, file.size);
                }
            }
        }
    }
}
