//! `deb:NAME`: the files of a Debian package, installed or fetched with the system's own `apt-get`, which checks
//! the archive's signatures.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::cache::{Entry, Manifest};
use super::{PullOptions, Pulled, fault, offline, unreachable};
use crate::error::{Error, Result};
use crate::hash;
use crate::lineage::FileRecord;

/// Directories of a package that hold words about it and not its data.
const ASIDE: [&str; 5] =
    ["usr/share/doc", "usr/share/man", "usr/share/lintian", "usr/share/doc-base", "etc"];

pub(super) fn resolve(source: &str, rest: &str, options: &PullOptions) -> Result<Pulled> {
    let (name, member) =
        rest.split_once('/').map_or((rest, None), |(name, member)| (name, Some(member)));
    let plain =
        |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '+' | '-' | '.');
    if name.len() < 2
        || !name.chars().all(plain)
        || !name.starts_with(|c: char| c.is_ascii_alphanumeric())
    {
        return Err(fault(
            source,
            "this is not the name of a Debian package",
            "write deb:NAME, as in deb:wordnet-base",
        ));
    }
    if !options.refresh
        && let Some(files) = installed(name)
        && stands_alone(&files)
    {
        return pulled(source, Path::new("/"), files, member, source.to_owned(), None);
    }
    let entry = Entry::open(source, "deb", name, options)?;
    let from_entry = |manifest: Manifest, from_cache: bool| {
        let (version, sha256) = (manifest.source.clone(), manifest.sha256.clone());
        let mut pulled =
            pulled(source, &entry.files_dir(), manifest.records(), member, version, sha256)?;
        pulled.from_cache = from_cache;
        Ok(pulled)
    };
    if !options.refresh
        && let Some(manifest) = entry.verified()?
    {
        return from_entry(manifest, true);
    }
    if options.is_offline() {
        return Err(offline(source));
    }
    let partial = entry.partial_dir()?;
    run(source, Command::new("apt-get").args(["download", "-qq", name]).current_dir(&partial))?;
    let deb = newest_deb(&partial)?.ok_or_else(|| {
        fault(source, "apt-get left no package", "run `apt-get update` and try again")
    })?;
    let sha256 = hash::file(&deb).map_err(|error| Error::io(&deb, "read", error))?;
    let staging = entry.staging_dir()?;
    run(source, Command::new("dpkg-deb").arg("--extract").arg(&deb).arg(&staging))?;
    resolve_links(source, &staging)?;
    let version =
        deb.file_stem().unwrap_or_default().to_string_lossy().split('_').nth(1).map(str::to_owned);
    let resolved =
        version.map_or_else(|| format!("deb:{name}"), |version| format!("deb:{name}={version}"));
    from_entry(entry.commit(resolved, Some(sha256))?, false)
}

/// Files of an installed package; `None` when it is not installed.
fn installed(name: &str) -> Option<Vec<FileRecord>> {
    let status = Command::new("dpkg-query").args(["-W", "-f=${Status}", name]).output().ok()?;
    if !status.status.success() || !status.stdout.ends_with(b" installed") {
        return None;
    }
    let listing = Command::new("dpkg-query").args(["-L", name]).output().ok()?;
    let listing = String::from_utf8(listing.stdout).ok()?;
    let files: Vec<_> = listing.lines().map(Path::new).filter(|path| path.is_file()).collect();
    // Slim images install packages without their documents, and some without their data.
    let record = |path: &Path| {
        Some(FileRecord {
            name: path.strip_prefix("/").ok()?.to_string_lossy().into_owned(),
            size: path.metadata().ok()?.len(),
            sha256: hash::file(path).ok()?,
        })
    };
    let records: Vec<_> = files.into_iter().filter_map(record).collect();
    records.iter().any(|file| !is_aside(&file.name)).then_some(records)
}

/// True when the package's data has a directory of its own; below `/usr/lib` it would lie among everyone's.
fn stands_alone(files: &[FileRecord]) -> bool {
    let data = data(files);
    data.len() == 1 || common_dir(&data).components().count() > 2
}

/// Names of the files that are not words about the package.
fn data(files: &[FileRecord]) -> Vec<&str> {
    files.iter().map(|file| file.name.as_str()).filter(|name| !is_aside(name)).collect()
}

fn is_aside(name: &str) -> bool {
    ASIDE.iter().any(|dir| Path::new(name).starts_with(dir))
}

fn pulled(
    source: &str,
    root: &Path,
    files: Vec<FileRecord>,
    member: Option<&str>,
    resolved: String,
    sha256: Option<String>,
) -> Result<Pulled> {
    let data = data(&files);
    let path = match member {
        Some(_) => super::entry_point(source, root, &files, member)?,
        None => match data.as_slice() {
            [only] => root.join(only),
            several => root.join(common_dir(several)),
        },
    };
    Ok(Pulled { path, root: root.to_owned(), files, source: resolved, sha256, from_cache: true })
}

/// The deepest directory that holds all files.
fn common_dir(names: &[&str]) -> PathBuf {
    let parents: Vec<_> = names.iter().filter_map(|name| Path::new(name).parent()).collect();
    let mut common = parents.first().map(|path| path.to_path_buf()).unwrap_or_default();
    while !parents.iter().all(|path| path.starts_with(&common)) {
        common.pop();
    }
    common
}

fn run(source: &str, command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| {
        unreachable(
            source,
            format!("cannot run {program}: {error}"),
            "deb: sources need a Debian or Ubuntu system; elsewhere give the path of the files",
        )
    })?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    let reason = message
        .lines()
        .find(|line| line.starts_with("E:"))
        .or(message.lines().last())
        .unwrap_or("no message");
    let (said, help) = (
        format!("{program} failed: {reason}"),
        "check the name, run `apt-get update`, and check the network",
    );
    Err(match reason.contains("Failed to fetch") {
        true => unreachable(source, said, help),
        false => fault(source, said, help),
    })
}

fn newest_deb(dir: &Path) -> Result<Option<PathBuf>> {
    let items = std::fs::read_dir(dir).map_err(|error| Error::io(dir, "list", error))?;
    let debs = items
        .filter_map(|item| Some(item.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "deb"));
    Ok(debs.max_by_key(|path| path.metadata().and_then(|m| m.modified()).ok()))
}

/// Replaces links within the tree by copies of their targets and drops those that leave it.
fn resolve_links(source: &str, root: &Path) -> Result<()> {
    let real_root = root.canonicalize().map_err(|error| Error::io(root, "resolve", error))?;
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for item in std::fs::read_dir(&dir).map_err(|error| Error::io(&dir, "list", error))? {
            let path = item.map_err(|error| Error::io(&dir, "list", error))?.path();
            let metadata =
                path.symlink_metadata().map_err(|error| Error::io(&path, "inspect", error))?;
            if metadata.is_dir() {
                pending.push(path);
            } else if metadata.is_symlink() {
                let target = path
                    .canonicalize()
                    .ok()
                    .filter(|real| real.starts_with(&real_root) && real.is_file());
                std::fs::remove_file(&path).map_err(|error| Error::io(&path, "remove", error))?;
                match target {
                    Some(real) => {
                        std::fs::copy(&real, &path)
                            .map_err(|error| Error::io(&path, "copy", error))?;
                    }
                    None => {
                        tracing::debug!(source, link = %path.display(), "left out a link that leads elsewhere")
                    }
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_directory_is_found() {
        let common = |names: &[&str]| common_dir(names).display().to_string();
        assert_eq!(
            common(&["usr/share/datasets/f/a.gz", "usr/share/datasets/f/b.gz"]),
            "usr/share/datasets/f"
        );
        assert_eq!(common(&["usr/share/wordnet/data.noun", "usr/lib/x"]), "usr");
        assert_eq!(common(&[]), "");
        assert!(is_aside("usr/share/doc/x/copyright") && !is_aside("usr/share/documents/x"));
    }

    #[test]
    fn bad_names_are_refused_before_anything_runs() {
        for name in ["deb:", "deb:-o", "deb:Upper", "deb:a b", "deb:--help"] {
            let rest = name.strip_prefix("deb:").unwrap();
            let error = resolve(name, rest, &PullOptions::default()).unwrap_err().to_string();
            assert!(error.contains("not the name of a Debian package"), "{error}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_out_of_the_tree_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(dir.path().join("secret"), "x").unwrap();
        std::fs::write(root.join("data"), "d").unwrap();
        std::os::unix::fs::symlink("../secret", root.join("out")).unwrap();
        std::os::unix::fs::symlink("data", root.join("in")).unwrap();
        resolve_links("deb:x", &root).unwrap();
        assert!(!root.join("out").exists());
        assert!(root.join("in").symlink_metadata().unwrap().is_file());
    }
}
