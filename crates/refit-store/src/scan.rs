//! Is this file safe? An answer from reading alone: nothing is imported, unpickled, rendered or run.
//!
//! Everything is judged by allow-lists. A pickle may use the opcodes and callables that rebuild tensors and no
//! others; a zip must say the same thing in both of its directories; headers must stay within their file. What is
//! not known to be harmless is a [`Severity::Danger`].

mod gguf;
mod pickle;
mod safetensors;
mod template;
mod tree;
pub(crate) mod zip;

use std::path::Path;

use serde::Serialize;

use crate::artifact::Artifact;
use crate::error::{Error, Result, ShardFault};

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Worth knowing; harmless in refit.
    Note,
    /// Harmless in refit, but other tools may run it.
    Warning,
    /// Can run code, hides something, or is malformed: do not load it anywhere.
    Danger,
}

/// Something that a scan found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The file, below the scanned path; a member of an archive stands behind `!`.
    pub file: String,
    /// Where in the file, if it can be told.
    pub offset: Option<u64>,
    /// What was found.
    pub what: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.offset {
            Some(offset) => write!(f, "{} at byte {offset}: {}", self.file, self.what),
            None => write!(f, "{}: {}", self.file, self.what),
        }
    }
}

/// Outcome of a scan.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ScanReport {
    /// Files that were read.
    pub files: usize,
    /// What was found, worst first.
    pub findings: Vec<Finding>,
}

impl ScanReport {
    /// True when nothing dangerous was found. Warnings concern other tools.
    pub fn is_safe(&self) -> bool {
        self.worst() < Some(Severity::Danger)
    }

    /// The worst severity; `None` when nothing was found.
    pub fn worst(&self) -> Option<Severity> {
        self.findings.iter().map(|finding| finding.severity).max()
    }
}

/// Scans a file, or every file of a directory.
///
/// # Errors
/// When the path cannot be read. A malformed file is a finding.
pub fn scan(path: &Path) -> Result<ScanReport> {
    let mut report = ScanReport::default();
    let metadata =
        std::fs::symlink_metadata(path).map_err(|error| Error::io(path, "read", error))?;
    if metadata.is_dir() || (metadata.is_symlink() && path.is_dir()) {
        tree::scan(path, &mut report)?;
    } else {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        scan_file(path, &name, &mut report)?;
    }
    whole(path, &mut report);
    report.findings.sort_by(|a, b| b.severity.cmp(&a.severity).then_with(|| a.file.cmp(&b.file)));
    Ok(report)
}

/// What only the whole model shows: shards that lead out of it, and tensors that do not fit its config.
fn whole(path: &Path, report: &mut ScanReport) {
    if !path.is_dir() && !is_model_name(&path.to_string_lossy()) {
        return;
    }
    let (opened, sound) = (Artifact::open(path), report.is_safe());
    let file = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let mut findings = Findings { file, report };
    match opened {
        Ok(artifact) => {
            let fit = artifact.load_report();
            if let Some(problems) = fit.misfit() {
                findings
                    .add(Severity::Note, format!("the weights do not fit config.json: {problems}"));
            }
            if let Some(strays) = fit.strays() {
                findings.add(
                    Severity::Note,
                    format!("not part of the architecture that config.json names: {strays}"),
                );
            }
        }
        Err(Error::BadShard { index, shard, reason: ShardFault::Outside }) => {
            findings.file = index.file_name().unwrap_or_default().to_string_lossy().into_owned();
            findings.add(Severity::Danger, format!("shard `{shard}` {}", ShardFault::Outside));
        }
        Err(Error::NotAnArtifact { .. }) => {}
        // What is already known to be dangerous need not be said in two ways.
        Err(error) if sound => {
            findings.add(Severity::Warning, format!("refit cannot open it: {error}"));
        }
        Err(_) => {}
    }
}

/// Findings about one file.
struct Findings<'r> {
    file: String,
    report: &'r mut ScanReport,
}

impl Findings<'_> {
    fn add(&mut self, severity: Severity, what: impl Into<String>) {
        self.at(severity, None, what);
    }

    fn at(&mut self, severity: Severity, offset: Option<u64>, what: impl Into<String>) {
        self.report.findings.push(Finding {
            severity,
            file: self.file.clone(),
            offset,
            what: what.into(),
        });
    }

    fn inside(&mut self, member: &str) -> Findings<'_> {
        Findings { file: format!("{}!{member}", self.file), report: self.report }
    }
}

/// What a file is, by its first bytes. The name decides nothing: bypasses begin with a wrong extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Zip,
    Gguf,
    Pickle,
    Safetensors,
    /// Something that hides its content from this scan.
    Wrapped(&'static str),
    Other,
}

fn content(name: &str, head: &[u8], length: u64) -> Content {
    let lower = name.to_lowercase();
    let named = |extensions: &[&str]| extensions.iter().any(|e| lower.ends_with(e));
    let wrappers: [(&[u8], &str); 7] = [
        (b"\x1f\x8b", "gzip"),
        (b"BZh", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"Rar!", "rar"),
    ];
    if head.starts_with(b"PK\x03\x04") || head.starts_with(b"PK\x05\x06") {
        return Content::Zip;
    }
    if head.starts_with(b"GGUF") {
        return Content::Gguf;
    }
    if let Some((_, kind)) = wrappers.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Content::Wrapped(kind);
    }
    if named(&[".safetensors"]) || looks_like_safetensors(head, length) {
        return Content::Safetensors;
    }
    if named(&[".gguf"]) {
        return Content::Gguf;
    }
    let pickle_name =
        named(&[".pkl", ".pickle", ".pth", ".pt", ".bin", ".ckpt", ".joblib", ".dill"]);
    let protocol = matches!(head, [0x80, 0..=5, ..]);
    if protocol || pickle_name || pickle::looks_like_text_pickle(head) {
        return Content::Pickle;
    }
    Content::Other
}

fn looks_like_safetensors(head: &[u8], length: u64) -> bool {
    let Some((prefix, rest)) = head.split_first_chunk::<8>() else { return false };
    let header = u64::from_le_bytes(*prefix);
    header > 1 && header < length && rest.starts_with(b"{")
}

fn scan_file(path: &Path, name: &str, report: &mut ScanReport) -> Result<()> {
    use std::io::Read;
    report.files += 1;
    let mut findings = Findings { file: name.to_owned(), report };
    let file = std::fs::File::open(path).map_err(|error| Error::io(path, "read", error))?;
    let length = file.metadata().map_err(|error| Error::io(path, "inspect", error))?.len();
    let mut head = Vec::new();
    (&file).take(64).read_to_end(&mut head).map_err(|error| Error::io(path, "read", error))?;
    match content(name, &head, length) {
        Content::Zip => archive(path, name, &mut findings),
        Content::Gguf => gguf::scan(path, &mut findings),
        Content::Safetensors => safetensors::scan(path, &mut findings),
        Content::Pickle => pickle::scan(path, &mut findings),
        Content::Wrapped(kind) => {
            // Compressed data sets are ordinary; compressed weights exist to get past scanners.
            let severity = if is_weight_name(name) { Severity::Danger } else { Severity::Warning };
            findings.add(
                severity,
                format!("{kind} data whose content cannot be judged; unpack it and scan again"),
            );
        }
        Content::Other => tree::scan_text(path, name, length, &mut findings)?,
    }
    Ok(())
}

/// Names under which refit opens models.
fn is_model_name(name: &str) -> bool {
    ends_with_one_of(name, &[".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".gguf"])
}

fn is_weight_name(name: &str) -> bool {
    is_model_name(name) || ends_with_one_of(name, &[".pkl", ".joblib", ".h5", ".npy", ".npz"])
}

fn ends_with_one_of(name: &str, extensions: &[&str]) -> bool {
    let lower = name.to_lowercase();
    extensions.iter().any(|extension| lower.ends_with(extension))
}

/// Members of a PyTorch archive beside the pickle: raw storages and a few words about them.
fn is_plain_member(name: &str) -> bool {
    let inner = name.split_once('/').map_or(name, |(_, inner)| inner);
    let storage = inner
        .strip_prefix("data/")
        .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
    storage
        || matches!(
            inner,
            "version"
                | "byteorder"
                | ".format_version"
                | ".storage_alignment"
                | ".data/serialization_id"
        )
}

fn archive(path: &Path, name: &str, findings: &mut Findings<'_>) {
    let archive = match zip::Archive::open(path) {
        Ok(archive) => archive,
        Err(error) => return findings.add(Severity::Danger, format!("malformed zip: {error}")),
    };
    for oddity in &archive.oddities {
        findings.add(Severity::Danger, format!("zip anomaly: {oddity}"));
    }
    let lower = name.to_lowercase();
    let numpy = lower.ends_with(".npz");
    let package = lower.ends_with(".whl");
    let torch = archive.members.iter().any(|member| member.name.ends_with("data.pkl"));
    if !torch && !numpy && !package && is_weight_name(name) {
        findings.add(Severity::Danger, "a zip without data.pkl under the name of a weight file");
    }
    for member in archive.members.iter().filter(|member| !member.is_dir()) {
        let mut inside = findings.inside(&member.name);
        // Bits 0, 6 and 13 mean encryption; the oddity above has said so.
        if member.flags & 0x2041 != 0 {
            continue;
        }
        if !numpy && member.is_bomb() {
            inside.add(
                Severity::Danger,
                format!(
                    "a zip bomb: {} bytes that unpack to {}; it was not unpacked",
                    member.compressed, member.size
                ),
            );
            continue;
        }
        let mut head = [0; 16];
        let head = match archive.read(member).and_then(|reader| read_some(reader, &mut head)) {
            Ok(read) => &head[..read],
            Err(error) => {
                inside.add(Severity::Danger, format!("cannot be read: {error}"));
                continue;
            }
        };
        if torch && is_plain_member(&member.name) {
            // Raw storages hold any bytes; nothing interprets them. Their checksum is checked all the same.
            if let Err(error) =
                archive.read(member).and_then(|mut r| std::io::copy(&mut r, &mut std::io::sink()))
            {
                inside.add(Severity::Danger, format!("cannot be read: {error}"));
            }
            continue;
        }
        let inner = member.name.to_lowercase();
        if inner.contains("/code/")
            || inner.starts_with("code/")
            || inner.ends_with("constants.pkl")
        {
            inside.add(
                Severity::Danger,
                "TorchScript code; export the weights alone with torch.save(model.state_dict())",
            );
        } else if inner.ends_with(".py")
            || inner.ends_with(".pyc")
            || inner.ends_with(".so")
            || inner.ends_with(".dll")
        {
            let severity = if package { Severity::Note } else { Severity::Danger };
            inside.add(severity, "code; refit neither unpacks nor runs it");
        } else if numpy && inner.ends_with(".npy") {
            numpy_member(&archive, member, &mut inside);
        } else {
            match content(&member.name, head, member.size) {
                Content::Pickle => match archive.read(member) {
                    Ok(reader) => {
                        pickle::scan_reader(reader, pickle::Container::Member, &mut inside)
                    }
                    Err(error) => inside.add(Severity::Danger, format!("cannot be read: {error}")),
                },
                Content::Other if package => {}
                Content::Other if torch => {
                    inside.add(Severity::Danger, "PyTorch writes no such member");
                }
                Content::Other => {}
                _ if package => inside.add(Severity::Note, "a model inside; unpack it to scan it"),
                _ => inside.add(
                    Severity::Danger,
                    "an archive or model inside an archive; unpack it and scan again",
                ),
            }
        }
    }
}

fn read_some(mut reader: impl std::io::Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}

/// An `.npy` of objects carries a pickle behind its header.
fn numpy_member(archive: &zip::Archive, member: &zip::Member, findings: &mut Findings<'_>) {
    let mut head = vec![0; 512];
    match archive.read(member).and_then(|reader| read_some(reader, &mut head)) {
        Ok(read) => {
            let head = &head[..read];
            let plain = head.starts_with(b"\x93NUMPY") && contains(head, b"'descr'");
            // `|O` and structured types with object fields are pickled.
            let objects = contains(head, b"|O") || contains(head, b"'O'");
            if !plain || objects {
                findings.add(
                    Severity::Danger,
                    "a NumPy array of Python objects, or no NumPy array: loading it unpickles",
                );
            }
        }
        Err(error) => findings.add(Severity::Danger, format!("cannot be read: {error}")),
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}
