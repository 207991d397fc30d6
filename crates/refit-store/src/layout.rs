//! From a path to its weight files: which format, which shards, which files travel along.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use crate::artifact::{Format, SideFile};
use crate::config::{self, Config};
use crate::error::{Error, Result, ShardFault, TensorFault};
use crate::formats::{factored, gguf, packed, safetensors, torch};
use crate::storage::Entry;

/// What lies at a path, before it becomes an [`Artifact`](crate::Artifact).
pub(crate) struct Layout {
    pub format: Format,
    pub entries: Vec<Entry>,
    pub config: Config,
    pub gguf: Option<Box<gguf::Header>>,
    /// The format of packed weights, where there are any.
    pub packed: Option<&'static str>,
    /// Whether matrices are stored in factors.
    pub factored: bool,
    pub side_files: Vec<SideFile>,
}

/// Weight files that transformers would look for, most preferred first.
const PREFERRED: [&str; 6] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
];

const WEIGHT_EXTENSIONS: [&str; 5] = ["safetensors", "gguf", "pth", "pt", "bin"];

/// Extensions of files that are passed through.
const SIDE_EXTENSIONS: [&str; 7] = ["json", "txt", "model", "jinja", "tiktoken", "py", "vocab"];

pub(crate) fn open(path: &Path) -> Result<Layout> {
    let meta = fs::metadata(path).map_err(|error| Error::io(path, "open", error))?;
    if !meta.is_dir() {
        return open_file(path);
    }
    let weights = find_weights(path)?;
    let (format, entries, built, gguf) = if weights.extension() == Some(OsStr::new("json")) {
        let (format, entries) = open_index(path, &weights)?;
        (format, entries, Config::default(), None)
    } else {
        open_weights(&weights)?
    };
    let config = read_config(path)?.unwrap_or(built);
    let packed::Opened { entries, format: packed } = packed::open(path, entries, &config)?;
    let factored::Opened { entries, factored } = factored::open(path, entries, &config)?;
    Ok(Layout { format, entries, config, gguf, packed, factored, side_files: side_files(path)? })
}

/// A single weight file. Files beside it count as its own only where a `config.json` says so.
fn open_file(path: &Path) -> Result<Layout> {
    let (format, entries, built, gguf) = open_weights(path)?;
    let directory = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    };
    let beside = if gguf.is_none() { read_config(directory)? } else { None };
    let side_files = if beside.is_some() { side_files(directory)? } else { Vec::new() };
    let config = beside.unwrap_or(built);
    let packed::Opened { entries, format: packed } = packed::open(path, entries, &config)?;
    let factored::Opened { entries, factored } = factored::open(path, entries, &config)?;
    Ok(Layout { format, entries, config, gguf, packed, factored, side_files })
}

fn read_config(directory: &Path) -> Result<Option<Config>> {
    let path = directory.join("config.json");
    match fs::read(&path) {
        Ok(bytes) => Config::parse(&path, &bytes).map(Some),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(&path, "read", error)),
    }
}

/// Picks the weight file, or the index of a sharded model.
fn find_weights(directory: &Path) -> Result<PathBuf> {
    if let Some(name) = PREFERRED.iter().find(|name| directory.join(name).is_file()) {
        return Ok(directory.join(name));
    }
    let mut found: Vec<PathBuf> = Vec::new();
    let mut indexes: Vec<PathBuf> = Vec::new();
    for path in list(directory)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') || !path.is_file() {
            continue;
        }
        let extension = path.extension().and_then(OsStr::to_str).unwrap_or("");
        if name.ends_with(".index.json") {
            indexes.push(path);
        } else if WEIGHT_EXTENSIONS.contains(&extension) && !NOT_WEIGHTS.contains(&&*name) {
            found.push(path);
        }
    }
    let mut best = Vec::new();
    for group in [&["safetensors"][..], &["gguf"], &["pth", "pt", "bin"]] {
        let has = |path: &&PathBuf| {
            path.extension().and_then(OsStr::to_str).is_some_and(|ext| group.contains(&ext))
        };
        best = found.iter().filter(has).collect();
        if !best.is_empty() {
            break;
        }
    }
    match (&best[..], &indexes[..]) {
        ([one], _) => Ok((*one).clone()),
        (_, [index]) => Ok(index.clone()),
        ([], _) => Err(not_an_artifact(
            directory,
            "the directory holds no .safetensors, .gguf, .pth, .pt or .bin file",
        )),
        (several, _) => {
            let names: Vec<_> = several
                .iter()
                .map(|path| path.file_name().unwrap_or_default().to_string_lossy())
                .collect();
            let reason = format!(
                "{} weight files and no index ({}); name the one to open",
                names.len(),
                names.join(", ")
            );
            Err(not_an_artifact(directory, reason))
        }
    }
}

/// `.bin` files of the Trainer that hold no weights.
const NOT_WEIGHTS: [&str; 4] =
    ["training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt"];

fn not_an_artifact(path: &Path, reason: impl Into<String>) -> Error {
    Error::NotAnArtifact { path: path.to_owned(), reason: reason.into() }
}

/// Directory entries, sorted, so that nothing depends on the file system's order.
fn list(directory: &Path) -> Result<Vec<PathBuf>> {
    let fail = |error| Error::io(directory, "list", error);
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).map_err(fail)? {
        paths.push(entry.map_err(fail)?.path());
    }
    paths.sort();
    Ok(paths)
}

/// Tells the format by content; the extension only decides which parser explains what is wrong.
fn sniff(path: &Path) -> Result<Format> {
    let mut first = [0; 16];
    let mut file = fs::File::open(path).map_err(|error| Error::io(path, "open", error))?;
    let mut len = 0;
    while len < first.len() {
        match file.read(&mut first[len..]).map_err(|error| Error::io(path, "read", error))? {
            0 => break,
            read => len += read,
        }
    }
    let first = &first[..len];
    let extension = path.extension().and_then(OsStr::to_str).unwrap_or("").to_ascii_lowercase();
    Ok(match (first, &*extension) {
        ([b'G', b'G', b'U', b'F', ..], _) => Format::Gguf,
        // Before pickles: a header of 640 bytes begins as a pickle of protocol 2 does. None is longer than 100 MB.
        ([_, _, _, _, 0, 0, 0, 0, b'{', ..], _) => Format::Safetensors,
        ([b'P', b'K', 3 | 5, 4 | 6, ..] | [0x80, 2..=5, ..], _) => Format::Torch,
        ([_, _, _, _, _, _, _, _, b'{', ..], _) | (_, "safetensors") => Format::Safetensors,
        (_, "gguf") => Format::Gguf,
        (_, "pth" | "pt" | "bin" | "ckpt") => Format::Torch,
        ([0x89, b'H', b'D', b'F', ..], _) => {
            return Err(not_an_artifact(
                path,
                "it is HDF5 (Keras); convert it to safetensors first",
            ));
        }
        _ => {
            let reason = "it is not safetensors, GGUF or a PyTorch file by its first bytes";
            return Err(not_an_artifact(path, reason));
        }
    })
}

type Opened = (Format, Vec<Entry>, Config, Option<Box<gguf::Header>>);

fn open_weights(path: &Path) -> Result<Opened> {
    let format = sniff(path)?;
    let (entries, config, header) = match format {
        Format::Safetensors => (safetensors::open(path)?.0, Config::default(), None),
        Format::Gguf => {
            let (entries, config, header) = gguf::open(path)?;
            (entries, config, Some(Box::new(header)))
        }
        Format::Torch => (torch::open(path)?, Config::default(), None),
    };
    check_unique(&entries)?;
    Ok((format, entries, config, header))
}

/// Translation may map two stored names to one.
fn check_unique(entries: &[Entry]) -> Result<()> {
    let mut seen: HashMap<&str, &Path> = HashMap::new();
    for entry in entries {
        let path = &*entry.source.path;
        if let Some(first) = seen.insert(&entry.info.name, path) {
            let other = (first != path).then(|| first.to_owned());
            return Err(Error::tensor(path, &entry.info.name, TensorFault::Duplicate { other }));
        }
    }
    Ok(())
}

/// Opens every shard of an index; each tensor must be in the shard that the index names.
fn open_index(directory: &Path, index: &Path) -> Result<(Format, Vec<Entry>)> {
    let bytes = fs::read(index).map_err(|error| Error::io(index, "read", error))?;
    let object = config::parse_object(index, &bytes)?;
    let malformed = |reason: String| Error::malformed(index, "shard index", reason);
    let map = object
        .get("weight_map")
        .and_then(|map| map.as_object())
        .ok_or_else(|| malformed("it has no `weight_map` object".to_owned()))?;
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in map {
        let shard = shard
            .as_str()
            .ok_or_else(|| malformed(format!("the shard of `{tensor}` is not a string")))?;
        shards.entry(shard).or_default().push(tensor);
    }
    let mut all = Vec::new();
    let mut format = None;
    for (shard, tensors) in shards {
        let bad =
            |reason| Error::BadShard { index: index.to_owned(), shard: shard.to_owned(), reason };
        let path = shard_path(directory, shard, tensors[0]).map_err(bad)?;
        let (found, entries, ..) = open_weights(&path)?;
        if *format.get_or_insert(found) != found {
            return Err(bad(ShardFault::WrongFormat { expected: "safetensors" }));
        }
        let names: std::collections::HashSet<&str> =
            entries.iter().map(|entry| &*entry.info.name).collect();
        if let Some(tensor) = tensors.iter().find(|tensor| !names.contains(**tensor)) {
            return Err(bad(ShardFault::LacksTensor { tensor: (*tensor).to_owned() }));
        }
        all.extend(entries);
    }
    check_unique(&all)?;
    let format = format.ok_or_else(|| malformed("its `weight_map` is empty".to_owned()))?;
    Ok((format, all))
}

/// A shard's path, refusing anything that leaves the directory. Links into the `blobs` folder of a Hugging
/// Face cache, which is how that cache stores every file, are followed.
fn shard_path(directory: &Path, shard: &str, tensor: &str) -> Result<PathBuf, ShardFault> {
    let relative = Path::new(shard);
    let inside = relative.components().all(|part| matches!(part, Component::Normal(_)));
    if !inside || shard.contains('\\') || shard.is_empty() {
        return Err(ShardFault::Outside);
    }
    let path = directory.join(relative);
    let missing = || ShardFault::Missing { tensor: tensor.to_owned() };
    let (Ok(target), Ok(root)) = (path.canonicalize(), directory.canonicalize()) else {
        return Err(missing());
    };
    let cache = || {
        let snapshots = root.parent()?;
        let blobs = snapshots.parent()?.join("blobs");
        Some(snapshots.file_name()? == "snapshots" && target.starts_with(blobs))
    };
    if !target.starts_with(&root) && cache() != Some(true) {
        return Err(ShardFault::Outside);
    }
    if target.is_file() { Ok(path) } else { Err(missing()) }
}

/// Configuration, tokenizer and licence files, also those one folder down (`1_Pooling/config.json`).
fn side_files(directory: &Path) -> Result<Vec<SideFile>> {
    let mut files = Vec::new();
    for path in list(directory)? {
        let Some(name) = path.file_name().and_then(OsStr::to_str) else { continue };
        if name.starts_with('.') {
            continue;
        }
        if path.is_dir() {
            for inner in list(&path)? {
                let Some(file) = inner.file_name().and_then(OsStr::to_str) else { continue };
                if file == "config.json" && inner.is_file() {
                    files.push(SideFile::from_path(format!("{name}/{file}"), &inner));
                }
            }
        } else if passes_through(name) && path.is_file() {
            files.push(SideFile::from_path(name, &path));
        }
    }
    Ok(files)
}

fn passes_through(name: &str) -> bool {
    // The card, the lineage, the index and what a training tells are written anew for every output.
    let anew = ["refit.lineage.json", "refit.training.json"];
    if name.ends_with(".index.json") || anew.contains(&name) {
        return false;
    }
    let extension = Path::new(name).extension().and_then(OsStr::to_str).unwrap_or("");
    SIDE_EXTENSIONS.contains(&extension)
        || ["LICENSE", "LICENCE", "NOTICE", "COPYING"].iter().any(|stem| name.starts_with(stem))
}
