//! One file per verb: its arguments, its work, its answer.

pub mod advise;
pub mod apply;
pub mod card;
pub mod claim;
pub mod classify;
pub mod compare;
pub mod completions;
pub mod doctor;
pub mod embed;
pub mod eval;
pub mod explain;
pub mod export;
pub mod filter;
pub mod generate;
pub mod inspect;
pub mod interference;
pub mod lineage;
pub mod map;
pub mod methods;
pub mod pull;
pub mod report;
pub mod run;
pub mod scan;

use std::path::{Path, PathBuf};

use crate::cli::App;
use crate::failure::{Failure, Result};

/// Where downloads are kept: `--cache`, else the user's cache directory.
pub fn cache_dir(app: &App) -> Result<PathBuf> {
    if let Some(dir) = &app.global.cache {
        return Ok(dir.clone());
    }
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = var("XDG_CACHE_HOME").or_else(|| Some(var("HOME")?.join(".cache")));
    base.map(|base| base.join("refit")).ok_or_else(|| {
        Failure::usage(
            "no cache directory: neither XDG_CACHE_HOME nor HOME is set; pass --cache DIR",
        )
    })
}

/// Writes a whole file under another name and renames it, so that no reader ever sees half of it.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    std::fs::write(&partial, bytes).and_then(|()| std::fs::rename(&partial, path)).map_err(
        |source| {
            // Best effort: the failure that is reported is the one that matters.
            let _ = std::fs::remove_file(&partial);
            Failure::io(path, "write", &source)
        },
    )
}

/// Refuses a directory that could not be made or written to, before long work whose results go there.
pub fn check_writable(dir: &Path) -> Result {
    let mut above = dir.ancestors().map(|above| match above.as_os_str().is_empty() {
        true => Path::new("."),
        false => above,
    });
    let Some(nearest) = above.find(|above| above.symlink_metadata().is_ok()) else {
        return Err(Failure::usage(format!("{}: no such directory", dir.display())));
    };
    if !nearest.is_dir() {
        return Err(Failure::usage(format!(
            "{}: {} is not a directory; name another one",
            dir.display(),
            nearest.display()
        )));
    }
    // Asking for permission bits says less than trying: file systems can be read-only.
    let trial = nearest.join(format!(".refit-{}", std::process::id()));
    std::fs::write(&trial, "")
        .and_then(|()| std::fs::remove_file(&trial))
        .map_err(|source| Failure::io(nearest, "write", &source).about(dir))
}

/// The directory that a file lies in; `.` for a bare name.
pub fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => PathBuf::from("."),
    }
}
