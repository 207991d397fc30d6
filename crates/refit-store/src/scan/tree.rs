//! Directories: every file, links, code, and the text files that can name code.

use std::path::Path;

use serde_json::Value as Json;

use super::{Findings, ScanReport, Severity, scan_file, template};
use crate::error::{Error, Result};

/// Larger text files are not templates or configs.
const MAX_TEXT: u64 = 64 << 20;

/// Extensions of files that some tool runs.
const CODE: [&str; 12] =
    [".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".cmd", ".ps1", ".js"];

pub(super) fn scan(root: &Path, report: &mut ScanReport) -> Result<()> {
    let real_root = root.canonicalize().map_err(|error| Error::io(root, "resolve", error))?;
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for item in std::fs::read_dir(&dir).map_err(|error| Error::io(&dir, "list", error))? {
            let path = item.map_err(|error| Error::io(&dir, "list", error))?.path();
            let relative = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
            let metadata =
                path.symlink_metadata().map_err(|error| Error::io(&path, "inspect", error))?;
            if metadata.is_symlink() {
                link(&path, &relative, &real_root, report);
            }
            if metadata.is_dir() {
                pending.push(path);
            } else if metadata.is_file() || (metadata.is_symlink() && path.is_file()) {
                scan_file(&path, &relative, report)?;
            } else if !metadata.is_symlink() {
                Findings { file: relative, report }
                    .add(Severity::Danger, "neither a file nor a directory");
            }
        }
    }
    Ok(())
}

/// A link may lead out of the tree only the way that Hugging Face's cache does, from `snapshots` to `blobs`.
fn link(path: &Path, relative: &str, root: &Path, report: &mut ScanReport) {
    let mut findings = Findings { file: relative.to_owned(), report };
    match path.canonicalize() {
        Err(_) => findings.add(Severity::Warning, "a symbolic link that leads nowhere"),
        Ok(target) if target.starts_with(root) => {}
        Ok(target) => {
            let repository = root
                .ancestors()
                .find(|dir| dir.join("blobs").is_dir() && dir.join("snapshots").is_dir());
            if !repository.is_some_and(|dir| target.starts_with(dir.join("blobs"))) {
                findings.add(Severity::Danger, "a symbolic link that leads out of the directory");
            }
        }
    }
}

/// Files that are no weights: code, configs that name code, templates.
pub(super) fn scan_text(
    path: &Path,
    name: &str,
    length: u64,
    findings: &mut Findings<'_>,
) -> Result<()> {
    let lower = name.to_lowercase();
    if CODE.iter().any(|extension| lower.ends_with(extension)) {
        findings.add(
            Severity::Warning,
            "code; refit never runs it, a tool with trust_remote_code would",
        );
        return Ok(());
    }
    if super::is_weight_name(name) && !lower.ends_with(".npy") {
        findings.add(Severity::Danger, "the name of a weight file, but the content of none");
        return Ok(());
    }
    let wanted = [".json", ".jinja", ".jinja2", ".yaml", ".yml", ".npy"]
        .iter()
        .any(|extension| lower.ends_with(extension));
    if !wanted || length > MAX_TEXT {
        return Ok(());
    }
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, "read", error))?;
    if lower.ends_with(".npy") {
        let head = &bytes[..bytes.len().min(512)];
        if !head.starts_with(b"\x93NUMPY")
            || super::contains(head, b"|O")
            || super::contains(head, b"'O'")
        {
            findings.add(
                Severity::Danger,
                "a NumPy array of Python objects, or no NumPy array: loading it unpickles",
            );
        }
        return Ok(());
    }
    let text = String::from_utf8_lossy(&bytes);
    if lower.contains(".jinja") {
        template::scan(&text, name, findings);
    } else if lower.ends_with(".json") {
        match serde_json::from_str::<Json>(&text) {
            Ok(json) => config(&json, findings),
            Err(error) => findings.add(Severity::Warning, format!("malformed JSON: {error}")),
        }
    } else if text.contains("!!python/") {
        findings.add(Severity::Danger, "a YAML tag that runs Python in careless loaders");
    }
    Ok(())
}

/// Keys of a config that make other tools run code.
fn config(json: &Json, findings: &mut Findings<'_>) {
    match json {
        Json::Object(map) => {
            for (key, value) in map {
                match (key.as_str(), value) {
                    ("auto_map" | "custom_pipelines", value) if !is_empty(value) => findings.add(
                        Severity::Warning,
                        format!(
                            "`{key}` names Python classes that transformers would download and run"
                        ),
                    ),
                    ("trust_remote_code", Json::Bool(true)) => {
                        findings.add(
                            Severity::Warning,
                            "`trust_remote_code` asks other tools to run code",
                        );
                    }
                    ("chat_template" | "template", Json::String(text)) => {
                        template::scan(text, key, findings)
                    }
                    ("_target_" | "__reduce__" | "py/object" | "py/reduce" | "py/function", _) => {
                        findings.add(
                            Severity::Danger,
                            format!("`{key}` makes careless loaders call what it names"),
                        )
                    }
                    (_, value) => config(value, findings),
                }
            }
        }
        Json::Array(items) => items.iter().for_each(|item| config(item, findings)),
        _ => {}
    }
}

fn is_empty(value: &Json) -> bool {
    match value {
        Json::Null => true,
        Json::Object(map) => map.is_empty(),
        Json::Array(items) => items.is_empty(),
        _ => false,
    }
}
