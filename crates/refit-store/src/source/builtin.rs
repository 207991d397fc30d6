//! `builtin:tiny`: the small model that travels in the binary, so that everything works without a network.

use super::cache::Entry;
use super::{PullOptions, Pulled, entry_point, fault};
use crate::error::{Error, Result};
use crate::hash;

/// `(name, bytes)` of each file of the embedded model; written by the build script from `assets/tiny`.
const TINY: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/builtin_tiny.rs"));

pub(super) fn resolve(source: &str, rest: &str, options: &PullOptions) -> Result<Pulled> {
    let (name, member) =
        rest.split_once('/').map_or((rest, None), |(name, member)| (name, Some(member)));
    if name != "tiny" {
        return Err(fault(
            source,
            "there is no such embedded model",
            "the only one is builtin:tiny",
        ));
    }
    if TINY.is_empty() {
        return Err(fault(
            source,
            "this refit was built from a tree without assets/tiny",
            "build from a complete checkout",
        ));
    }
    // The content names the entry: a newer refit with another model does not find the old one.
    let digests: String =
        TINY.iter().map(|(name, bytes)| format!("{name} {}\n", hash::hex(bytes))).collect();
    let key = format!("tiny-{}", &hash::hex(digests.as_bytes())[..16]);
    let entry = Entry::open(source, "builtin", &key, options)?;
    let (manifest, from_cache) = match entry.verified()? {
        Some(manifest) => (manifest, true),
        None => {
            let staging = entry.staging_dir()?;
            for (name, bytes) in TINY {
                let path = staging.join(name);
                let parent = path.parent().expect("invariant: joined below the staging directory");
                std::fs::create_dir_all(parent)
                    .map_err(|error| Error::io(parent, "create", error))?;
                std::fs::write(&path, bytes).map_err(|error| Error::io(&path, "write", error))?;
            }
            (entry.commit("builtin:tiny".to_owned(), None)?, false)
        }
    };
    let root = entry.files_dir();
    let files = manifest.records();
    let path = entry_point(source, &root, &files, member)?;
    Ok(Pulled { path, root, files, source: manifest.source, sha256: None, from_cache })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tiny_is_there() {
        let error =
            resolve("builtin:huge", "huge", &PullOptions::default()).unwrap_err().to_string();
        assert!(error.contains("builtin:tiny"), "{error}");
    }

    #[test]
    fn tiny_unpacks_without_a_network() {
        let dir = tempfile::tempdir().unwrap();
        let options =
            PullOptions { cache: Some(dir.path().to_owned()), offline: true, refresh: false };
        match resolve("builtin:tiny", "tiny", &options) {
            Ok(first) => {
                assert!(!first.from_cache && first.files.len() == TINY.len());
                assert!(resolve("builtin:tiny", "tiny", &options).unwrap().from_cache);
            }
            Err(error) => {
                assert!(TINY.is_empty() && error.to_string().contains("assets/tiny"), "{error}")
            }
        }
    }
}
