//! PyTorch checkpoints, zip and older, read without ever executing what they hold.

mod pickle;
mod zip;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::artifact::TensorInfo;
use crate::error::{Error, Result, TensorFault};
use crate::storage::{Entry, Source, View};
use pickle::{Id, Loaded, Node, Refusal, Storage, Tensor};

/// First value of a checkpoint in the format before zip.
const LEGACY_MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

/// Keys under which training scripts put the weights, most specific first.
const WRAPPERS: [&str; 11] = [
    "state_dict",
    "model_state_dict",
    "params_ema",
    "ema_state_dict",
    "model",
    "module",
    "params",
    "net",
    "network",
    "generator",
    "weights",
];

/// Nested dictionaries deeper than this are not weights.
const MAX_DEPTH: usize = 16;

/// Opens one file: runs its pickle, checks every tensor against its storage, reads no weights.
pub(crate) fn open(path: &Path) -> Result<Vec<Entry>> {
    let source = Source::open(path)?;
    if source.len == 0 {
        return Err(source.truncated("the first pickle", 2));
    }
    let bytes = source.map().ok_or_else(|| {
        Error::io(path, "map", std::io::Error::other("the file system does not support it"))
    })?;
    let checkpoint = parse(path, bytes)?;
    let entry = |(name, tensor): (String, Tensor)| {
        place(&checkpoint.storages, &source, name.clone(), &tensor)
            .map_err(|reason| Error::tensor(path, name, reason))
    };
    checkpoint.tensors.into_iter().map(entry).collect()
}

/// Parses a checkpoint held in memory and checks its tensors; returns how many there are. For scanners and
/// fuzzers: [`crate::Artifact::open`] is the way to the tensors.
pub fn check(path: &Path, bytes: &[u8]) -> Result<usize> {
    let checkpoint = parse(path, bytes)?;
    for (name, tensor) in &checkpoint.tensors {
        layout(&checkpoint.storages, tensor).map_err(|fault| Error::tensor(path, name, fault))?;
    }
    Ok(checkpoint.tensors.len())
}

/// Offset and size in bytes of each storage.
type Storages = HashMap<Box<str>, (u64, u64)>;

struct Checkpoint {
    tensors: BTreeMap<String, Tensor>,
    storages: Storages,
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Checkpoint> {
    let (loaded, storages) =
        if bytes.starts_with(b"PK") { parse_zip(path, bytes)? } else { parse_legacy(path, bytes)? };
    let tensors = state_dict(&loaded);
    if tensors.is_empty() {
        let reason = "the pickle holds no tensors (no state_dict)".to_owned();
        return Err(Error::NotAnArtifact { path: path.to_owned(), reason });
    }
    Ok(Checkpoint { tensors, storages })
}

fn refused(path: impl Into<PathBuf>, start: usize) -> impl FnOnce(Refusal) -> Error {
    let path = path.into();
    move |Refusal { offset, reason }| Error::UnsafePickle {
        path,
        offset: (start + offset) as u64,
        reason,
    }
}

fn parse_zip(path: &Path, bytes: &[u8]) -> Result<(Loaded, Storages)> {
    let malformed = |reason: String| Error::malformed(path, "torch archive", reason);
    let members = zip::members(bytes).map_err(malformed)?;
    let content = |&(start, len): &(u64, u64)| &bytes[start as usize..(start + len) as usize];
    let mut pickles = members.iter().filter_map(|(name, place)| {
        let prefix = name.strip_suffix("data.pkl")?;
        (prefix.is_empty() || prefix.ends_with('/')).then_some((name, prefix, place))
    });
    let (Some((name, prefix, place)), None) = (pickles.next(), pickles.next()) else {
        return Err(malformed("it must hold exactly one `data.pkl`".to_owned()));
    };
    if let Some(order) = members.get(&format!("{prefix}byteorder"))
        && content(order) != b"little"
    {
        return Err(malformed("it was written on a big-endian machine".to_owned()));
    }
    let pickle = content(place);
    let inner = format!("{}!{name}", path.display());
    let loaded = pickle::load(pickle).map_err(refused(inner, 0))?;
    let folder = format!("{prefix}data/");
    let storages = members
        .iter()
        .filter_map(|(name, place)| Some((name.strip_prefix(&folder)?.into(), *place)))
        .collect();
    Ok((loaded, storages))
}

/// Before zip: pickles of a magic number, a version, machine facts, the object and the list of storages, then
/// each storage as an 8-byte count and its elements.
fn parse_legacy(path: &Path, bytes: &[u8]) -> Result<(Loaded, Storages)> {
    let malformed = |reason: &str| Error::malformed(path, "torch file", reason);
    let mut at = 0;
    let mut next = || -> Result<Loaded> {
        let loaded = pickle::load(&bytes[at..]).map_err(refused(path, at))?;
        at += loaded.consumed;
        Ok(loaded)
    };
    let magic = bytes.windows(LEGACY_MAGIC.len()).take(16).any(|window| window == LEGACY_MAGIC);
    if !magic {
        return Err(malformed("it is neither a zip archive nor a checkpoint of torch.save"));
    }
    let (_, version, facts) = (next()?, next()?, next()?);
    if !matches!(version.node(version.root), Node::Int(1001)) {
        return Err(malformed("its version is not 1001"));
    }
    if big_endian(&facts) {
        return Err(malformed("it was written on a big-endian machine"));
    }
    let (loaded, keys) = (next()?, next()?);
    let Node::List(keys_list) = keys.node(keys.root) else {
        return Err(malformed("its list of storages is missing"));
    };
    let mut sizes: HashMap<&str, &Storage> = HashMap::new();
    for tensor in all_tensors(&loaded) {
        sizes.insert(&tensor.storage.key, &tensor.storage);
    }
    let mut storages = Storages::new();
    let mut offset = at as u64;
    for &key in keys_list {
        let Node::Text(key) = keys.node(key) else {
            return Err(malformed("its list of storages is damaged"));
        };
        let storage = sizes
            .get(&**key)
            .ok_or_else(|| malformed("its list of storages names one that no tensor uses"))?;
        let have = bytes.len() as u64;
        let truncated = |need: u64| Error::Truncated {
            path: path.to_owned(),
            what: format!("storage `{key}`"),
            need,
            have,
        };
        let count = bytes
            .get(offset as usize..)
            .and_then(|rest| rest.first_chunk::<8>())
            .map(|count| u64::from_le_bytes(*count))
            .ok_or_else(|| truncated(offset + 8))?;
        if count != storage.numel {
            return Err(malformed("a storage has another length than its tensors expect"));
        }
        let size = storage.dtype.map_or(1, |dtype| dtype.block_bytes() as u64);
        let nbytes = count.saturating_mul(size);
        let end = (offset + 8).saturating_add(nbytes);
        if end > have {
            return Err(truncated(end));
        }
        if storages.insert(key.clone(), (offset + 8, nbytes)).is_some() {
            return Err(malformed("its list of storages names one twice"));
        }
        offset = end;
    }
    Ok((loaded, storages))
}

fn big_endian(facts: &Loaded) -> bool {
    let Node::Dict(entries) = facts.node(facts.root) else { return false };
    entries.iter().any(|&(key, value)| {
        matches!(facts.node(key), Node::Text(key) if &**key == "little_endian")
            && matches!(facts.node(value), Node::Bool(false))
    })
}

/// Every tensor that the object reaches.
fn all_tensors(loaded: &Loaded) -> Vec<&Tensor> {
    let (mut seen, mut open, mut tensors) = (HashSet::new(), vec![loaded.root], Vec::new());
    while let Some(id) = open.pop() {
        if !seen.insert(id) {
            continue;
        }
        match loaded.node(id) {
            Node::Tensor(tensor) => tensors.push(&**tensor),
            Node::List(items) => open.extend(items),
            Node::Tuple(items) => open.extend(items),
            Node::Dict(entries) => open.extend(entries.iter().map(|(_, value)| *value)),
            _ => {}
        }
    }
    tensors
}

/// The weights of a checkpoint by name: the wrapped state dictionary where there is one, else all tensors, nested
/// dictionaries joined by dots. `DataParallel`'s `module.` prefix is dropped.
fn state_dict(loaded: &Loaded) -> BTreeMap<String, Tensor> {
    let mut root = loaded.root;
    // Wrappers may be nested: {"model": {"state_dict": ...}}.
    for _ in 0..4 {
        match WRAPPERS.iter().find_map(|key| wrapped(loaded, root, key)) {
            Some(inner) => root = inner,
            None => break,
        }
    }
    let mut tensors = BTreeMap::new();
    if let Node::Tensor(tensor) = loaded.node(root) {
        tensors.insert("tensor".to_owned(), (**tensor).clone());
    }
    let mut open = vec![(root, String::new(), 0)];
    let mut seen = HashSet::new();
    while let Some((id, prefix, depth)) = open.pop() {
        // A dictionary is visited once: cycles end here.
        let Node::Dict(entries) = loaded.node(id) else { continue };
        if depth > MAX_DEPTH || !seen.insert(id) {
            continue;
        }
        for &(key, value) in entries {
            let key = match loaded.node(key) {
                Node::Text(key) => key.to_string(),
                Node::Int(key) => key.to_string(),
                _ => continue,
            };
            let name = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
            match loaded.node(value) {
                Node::Tensor(tensor) => drop(tensors.insert(name, (**tensor).clone())),
                Node::Dict(_) => open.push((value, name, depth + 1)),
                _ => {}
            }
        }
    }
    if tensors.keys().all(|name| name.len() > 7 && name.starts_with("module.")) {
        tensors =
            tensors.into_iter().map(|(name, tensor)| (name[7..].to_owned(), tensor)).collect();
    }
    tensors
}

/// The dictionary under `key`, if it holds a tensor (at any depth that counts).
fn wrapped(loaded: &Loaded, dict: Id, key: &str) -> Option<Id> {
    let Node::Dict(entries) = loaded.node(dict) else { return None };
    // With tensors of its own this dictionary is the state itself, whatever its keys are called.
    if entries.iter().any(|&(_, value)| matches!(loaded.node(value), Node::Tensor(_))) {
        return None;
    }
    let named = |id: Id| matches!(loaded.node(id), Node::Text(text) if &**text == key);
    let (_, inner) = entries.iter().find(|(key, _)| named(*key))?;
    let Node::Dict(inner_entries) = loaded.node(*inner) else { return None };
    let useful = |&(_, value): &(Id, Id)| {
        matches!(loaded.node(value), Node::Tensor(_) | Node::Dict(_)) && value != dict
    };
    inner_entries.iter().any(useful).then_some(*inner)
}

/// A tensor's element range checked against its storage.
fn layout(storages: &Storages, tensor: &Tensor) -> Result<(u64, TensorInfo, View), TensorFault> {
    let Tensor { storage, dtype, offset, shape, strides } = tensor;
    let other = |reason: String| TensorFault::Other(reason);
    let size = dtype.block_bytes() as u64;
    let &(start, stored) = storages
        .get(&storage.key)
        .ok_or_else(|| other(format!("its storage `{}` is not in the file", storage.key)))?;
    let unit = storage.dtype.map_or(1, |dtype| dtype.block_bytes() as u64);
    if storage.numel.checked_mul(unit) != Some(stored) {
        let reason =
            format!("its storage has {stored} bytes, not {} elements of {unit}", storage.numel);
        return Err(other(reason));
    }
    if storage.dtype.is_some_and(|stored| stored != *dtype) {
        return Err(other("its element type is not that of its storage".to_owned()));
    }
    if shape.len() != strides.len() {
        return Err(other(format!("{} dimensions but {} strides", shape.len(), strides.len())));
    }
    let overflow = || TensorFault::Overflow { shape: shape.clone() };
    let numel = shape.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim)).ok_or_else(overflow)?;
    let nbytes = numel.checked_mul(size).ok_or_else(overflow)?;
    let dims: Vec<usize> = shape
        .iter()
        .map(|&dim| usize::try_from(dim).ok())
        .collect::<Option<_>>()
        .ok_or_else(overflow)?;
    if numel > 0 {
        let last = shape.iter().zip(strides).try_fold(*offset, |at, (&dim, &stride)| {
            at.checked_add((dim - 1).checked_mul(stride)?)
        });
        let end = last.and_then(|last| last.checked_add(1)?.checked_mul(size));
        let end = end.ok_or_else(overflow)?;
        if end > stored {
            let start = offset.saturating_mul(size);
            return Err(TensorFault::OutOfBounds { start, end, available: stored });
        }
        if nbytes > stored {
            return Err(other("it repeats its storage's elements (an expanded view)".to_owned()));
        }
    }
    let mut expected = 1u64;
    let mut contiguous = true;
    for (&dim, &stride) in shape.iter().zip(strides).rev() {
        contiguous &= dim == 1 || stride == expected;
        expected = expected.saturating_mul(dim);
    }
    let view = if contiguous || numel == 0 { View::Plain } else { View::Strided(strides.clone()) };
    let info = TensorInfo { name: String::new(), shape: dims, dtype: *dtype, nbytes };
    let first = if numel == 0 { start } else { start + offset * size };
    Ok((first, info, view))
}

fn place(
    storages: &Storages,
    source: &Arc<Source>,
    name: String,
    tensor: &Tensor,
) -> Result<Entry, TensorFault> {
    let (offset, mut info, view) = layout(storages, tensor)?;
    info.name = name;
    Ok(Entry { info, source: source.clone(), offset, view })
}
