//! The one error type of this crate. Every variant names the file (and the tensor, line or key where
//! there is one), says what was expected, and what to do about it.

use std::path::{Path, PathBuf};

/// Result of every fallible call in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong between a path and a tensor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused an operation on a file.
    #[error("{path}: cannot {action}: {source}", path = path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was being done, as a verb phrase ("read", "create").
        action: &'static str,
        /// The system's own message.
        source: std::io::Error,
    },
    /// Nothing at this path looks like a model.
    #[error("{path}: not a model that refit can open: {reason}", path = path.display())]
    NotAnArtifact {
        /// The path that was given.
        path: PathBuf,
        /// What was found there and what is accepted.
        reason: String,
    },
    /// The file ends before its own header says it should.
    #[error(
        "{path}: truncated or damaged: {what} needs {need} bytes but the file has {have}; download it again",
        path = path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The part that does not fit.
        what: String,
        /// Bytes that the header asks for.
        need: u64,
        /// Bytes that are there.
        have: u64,
    },
    /// A header that breaks its format's rules.
    #[error("{path}: malformed {format}: {reason}", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Which format ("safetensors", "GGUF", "zip", "pickle", ...).
        format: &'static str,
        /// Which rule is broken, where.
        reason: String,
    },
    /// One tensor's entry breaks its format's rules.
    #[error("{path}: tensor `{tensor}`: {reason}", path = path.display())]
    BadTensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name as stored.
        tensor: String,
        /// Which rule is broken.
        reason: TensorFault,
    },
    /// A shard index that cannot be followed.
    #[error("{index}: shard `{shard}`: {reason}", index = index.display())]
    BadShard {
        /// The index file.
        index: PathBuf,
        /// The shard's name as the index spells it.
        shard: String,
        /// Which rule is broken.
        reason: ShardFault,
    },
    /// A pickle stream that asks for more than tensors.
    #[error("{path}: refused pickle at byte {offset}: {reason}", path = path.display())]
    UnsafePickle {
        /// The file (and archive member, after `!`).
        path: PathBuf,
        /// Offset of the opcode in the pickle stream.
        offset: u64,
        /// Which opcode or global was refused, or which rule is broken.
        reason: String,
    },
    /// A source that cannot be parsed, found or verified.
    #[error("{spec}: {reason}; {help}")]
    Source {
        /// The source as the user gave it.
        spec: String,
        /// What went wrong.
        reason: String,
        /// What would work.
        help: String,
    },
    /// A source that is not in the cache, while what holds it does not answer: nothing is known to be wrong with it.
    #[error("{spec}: {reason}; {help}")]
    Unreachable {
        /// The source as the user gave it.
        spec: String,
        /// What was tried.
        reason: String,
        /// What would work.
        help: String,
    },
    /// No tensor of this name.
    #[error("{path}: no tensor `{tensor}`{}", suggestion(nearest), path = path.display())]
    NoSuchTensor {
        /// The artifact.
        path: PathBuf,
        /// The name that was asked for.
        tensor: String,
        /// Up to three names that are close.
        nearest: Vec<String>,
    },
    /// Tensors that are missing or have another shape than the configuration promises.
    #[error(
        "{path}: the weights do not fit config.json: {problems}; get the complete model again or \
         correct config.json (`refit inspect {path}` shows every difference)",
        path = path.display()
    )]
    Misfit {
        /// The artifact.
        path: PathBuf,
        /// What does not fit: counts, and the first few names.
        problems: String,
    },
    /// Values that are NaN or infinite where weights are expected.
    #[error(
        "{path}: {problems}: the weights are damaged, or overflowed when they were saved; get them \
         again or save them in a wider type (`refit inspect --values {path}` lists every tensor that \
         is affected)",
        path = path.display()
    )]
    NotFinite {
        /// The artifact.
        path: PathBuf,
        /// The first few tensors with counts and positions.
        problems: String,
    },
    /// A read or write outside a tensor.
    #[error("tensor `{tensor}`: range {start}..{end} lies outside its {len} {unit}")]
    OutOfRange {
        /// The tensor.
        tensor: String,
        /// First element or byte.
        start: u64,
        /// One past the last.
        end: u64,
        /// How many there are.
        len: u64,
        /// "elements" or "bytes".
        unit: &'static str,
    },
    /// JSON that does not parse, or a value of the wrong kind in it.
    #[error("{path}: line {line}: {reason}", path = path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A tokenizer that cannot be rebuilt from a GGUF file.
    #[error("{path}: cannot rebuild the tokenizer: {reason}", path = path.display())]
    Tokenizer {
        /// The GGUF file.
        path: PathBuf,
        /// Which key is missing or unknown.
        reason: String,
    },
    /// The plan of an output contradicts itself.
    #[error("cannot write {out}: {reason}", out = out.display())]
    BadPlan {
        /// The output directory.
        out: PathBuf,
        /// What is wrong with the plan.
        reason: String,
    },
    /// The output is already there.
    #[error("{path} already exists; choose another output or pass --force to replace it", path = path.display())]
    OutputExists {
        /// The output directory.
        path: PathBuf,
    },
    /// Not enough room for the output.
    #[error(
        "{path}: disk full: {need} bytes needed, {available} available; free space or choose another \
         output directory (the output was not written)",
        path = path.display()
    )]
    DiskFull {
        /// The output directory.
        path: PathBuf,
        /// Bytes that the output takes.
        need: u64,
        /// Bytes that are free.
        available: u64,
    },
    /// A file that the file system or the user's limits do not allow to be so large.
    #[error(
        "{path}: a file of {need} bytes is more than the file system or `ulimit -f` allows; raise the limit \
         or choose another output directory (the output was not written)",
        path = path.display()
    )]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Bytes that it takes.
        need: u64,
    },
    /// Another process is writing the same output.
    #[error("{path} is being written by another refit process; wait for it or choose another output", path = path.display())]
    Busy {
        /// The staging directory.
        path: PathBuf,
    },
    /// A value that the output's element type cannot hold.
    #[error(
        "tensor `{tensor}`: element {index} is {value}, which {dtype} cannot hold; choose a wider --dtype"
    )]
    CannotEncode {
        /// The tensor.
        tensor: String,
        /// Flat index of the element.
        index: u64,
        /// Its value.
        value: f32,
        /// The declared element type.
        dtype: String,
    },
    /// A key of an adapter's configuration that cannot be followed.
    #[error("{path}: `{key}`: {reason}", path = path.display())]
    AdapterConfig {
        /// `adapter_config.json`.
        path: PathBuf,
        /// The key.
        key: String,
        /// What was found, what was expected.
        reason: String,
    },
    /// An adapter of a kind that refit does not read.
    #[error(
        "{path}: `{kind}` adapters are not supported; refit reads {}",
        supported.join(", "),
        path = path.display()
    )]
    UnsupportedAdapter {
        /// `adapter_config.json`.
        path: PathBuf,
        /// As the configuration spells it.
        kind: String,
        /// The kinds that are read.
        supported: &'static [&'static str],
    },
    /// Another tool's adapter that does not fit any form that refit has.
    #[error("{path}: an adapter of {tool} that holds {holds}: {reason}", path = path.display())]
    ForeignAdapter {
        /// The adapter.
        path: PathBuf,
        /// The tool that wrote it.
        tool: &'static str,
        /// What is in it.
        holds: String,
        /// Why refit cannot use it, and what would help.
        reason: String,
    },
    /// An adapter that was made for another model.
    #[error(
        "{adapter} does not fit {base}: {problems}; use the base model that the adapter was trained on",
        adapter = adapter.display(),
        base = base.display()
    )]
    AdapterMisfit {
        /// The adapter.
        adapter: PathBuf,
        /// The model.
        base: PathBuf,
        /// How many sites do not fit, and the first few with both shapes.
        problems: String,
    },
    /// A form of adaptation that contradicts itself or the weight that it is applied to.
    #[error("{form}: {reason}")]
    AdapterForm {
        /// Which form.
        form: &'static str,
        /// What does not go together.
        reason: String,
    },
    /// `finish` was called before every tensor was written.
    #[error("{out}: {missing} of {total} tensors were not written, first `{first}`", out = out.display())]
    Incomplete {
        /// The output directory.
        out: PathBuf,
        /// How many are missing.
        missing: usize,
        /// How many were declared.
        total: usize,
        /// The first missing one in name order.
        first: String,
    },
}

/// What is wrong with one tensor's entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorFault {
    /// Its bytes lie (partly) outside the data.
    #[error(
        "bytes {start}..{end} lie outside the file's {available} bytes of data; the file is truncated or \
         damaged: download it again"
    )]
    OutOfBounds {
        /// First byte, from the start of the data.
        start: u64,
        /// One past the last byte.
        end: u64,
        /// Bytes of data in the file.
        available: u64,
    },
    /// Begin and end are the wrong way round.
    #[error(
        "its data begins at byte {start}, after its end at {end}; the header is damaged: download the \
         file again"
    )]
    Backwards {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// Two tensors share bytes.
    #[error(
        "its bytes overlap those of `{other}`; the header is damaged or forged: get the file again from \
         its source"
    )]
    Overlaps {
        /// The other tensor.
        other: String,
    },
    /// Bytes between tensors belong to none (safetensors forbids holes).
    #[error(
        "{bytes} bytes before it belong to no tensor; safetensors allows no holes; save the file again"
    )]
    Hole {
        /// Size of the hole.
        bytes: u64,
    },
    /// The byte count is not shape x element size.
    #[error(
        "shape {shape:?} of {dtype} takes {expected} bytes, but {found} are declared; the header is \
         damaged: download the file again"
    )]
    SizeMismatch {
        /// The declared shape.
        shape: Vec<usize>,
        /// The declared element type.
        dtype: String,
        /// Bytes that they take.
        expected: u64,
        /// Bytes that the entry has.
        found: u64,
    },
    /// The product of the dimensions does not fit into 64 bits.
    #[error(
        "the size of shape {shape:?} overflows; the header is damaged: download the file again"
    )]
    Overflow {
        /// The declared shape.
        shape: Vec<u64>,
    },
    /// An element type that refit does not know.
    #[error("element type {dtype} is not one that refit reads; save the file in f32, f16 or bf16")]
    UnknownDType {
        /// As stored.
        dtype: String,
    },
    /// The name occurs twice.
    #[error("the name occurs twice{}; keep one of them", also_in(other))]
    Duplicate {
        /// The other file, when it is another one.
        other: Option<PathBuf>,
    },
    /// A block-quantized row is not a whole number of blocks.
    #[error(
        "rows of {columns} elements cannot be cut into {dtype} blocks of {block}; the header is damaged: download the file again"
    )]
    BlockMismatch {
        /// Elements per row.
        columns: usize,
        /// The element type.
        dtype: String,
        /// Elements per block.
        block: usize,
    },
    /// One half of a pair of factors is missing.
    #[error(
        "its other half `{missing}` is missing; the adapter is incomplete: save or download it again"
    )]
    Half {
        /// The tensor that should be there.
        missing: String,
    },
    /// A name that the adapter's kind does not have.
    #[error("{kind} has no such tensor (known: {}); is adapter_config.json of another adapter?", known.join(", "))]
    UnknownSuffix {
        /// The kind of the adapter.
        kind: String,
        /// What names of this kind may hold.
        known: &'static [&'static str],
    },
    /// A shape that contradicts the configuration or the tensor's other half.
    #[error("its shape is {found:?}, expected {expected}")]
    Shape {
        /// As stored.
        found: Vec<usize>,
        /// What it should be, and why.
        expected: String,
    },
    /// A value that no trained adapter has.
    #[error("element {index} is {value}; the training diverged or the file is damaged")]
    NotFinite {
        /// Flat index.
        index: usize,
        /// NaN or an infinity.
        value: String,
    },
    /// Anything else, in words.
    #[error("{0}")]
    Other(String),
}

/// What is wrong with one shard of an index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShardFault {
    /// The name is absolute, climbs out with `..`, or leads out through a symbolic link.
    #[error(
        "points outside the model directory, and refit does not follow it; put the file beside the index"
    )]
    Outside,
    /// The file is not there.
    #[error("missing, though the index puts `{tensor}` there; download the missing file")]
    Missing {
        /// A tensor that should be there.
        tensor: String,
    },
    /// The shard exists but lacks a tensor.
    #[error(
        "does not contain `{tensor}`, though the index says so; download shard and index again"
    )]
    LacksTensor {
        /// The tensor.
        tensor: String,
    },
    /// The shard is of another format.
    #[error("is not a {expected} file like the others; all shards must have one format")]
    WrongFormat {
        /// What it should be.
        expected: &'static str,
    },
}

impl Error {
    /// Wraps an I/O error with its path and the action that failed.
    pub fn io(path: impl AsRef<Path>, action: &'static str, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_owned(), action, source }
    }

    pub(crate) fn malformed(
        path: impl AsRef<Path>,
        format: &'static str,
        reason: impl Into<String>,
    ) -> Self {
        Self::Malformed { path: path.as_ref().to_owned(), format, reason: reason.into() }
    }

    pub(crate) fn tensor(
        path: impl AsRef<Path>,
        tensor: impl Into<String>,
        reason: TensorFault,
    ) -> Self {
        Self::BadTensor { path: path.as_ref().to_owned(), tensor: tensor.into(), reason }
    }
}

fn suggestion(nearest: &[String]) -> String {
    if nearest.is_empty() {
        return "; `refit inspect` lists the tensors".to_owned();
    }
    let quoted: Vec<_> = nearest.iter().map(|name| format!("`{name}`")).collect();
    format!("; did you mean {}?", quoted.join(" or "))
}

fn also_in(other: &Option<PathBuf>) -> String {
    other.as_ref().map_or(String::new(), |path| format!(" (also in {})", path.display()))
}
