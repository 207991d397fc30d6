//! What an output will hold, and where each tensor will lie in which file.

use std::collections::{HashMap, HashSet};
use std::path::{Component, Path};

use serde_json::{Map, Value as Json, json};
use sha2::{Digest, Sha256};

use crate::artifact::{Artifact, SideFile};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::formats::gguf::write::{self as gguf, Fields};
use crate::hash;

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the output.
    pub name: String,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
    /// Its element type: any that the container has.
    pub dtype: DType,
}

/// Everything that an output will hold, fixed before the first byte is written.
#[derive(Debug, Clone, Default)]
pub struct WritePlan {
    /// Tensors, in any order.
    pub tensors: Vec<TensorSpec>,
    /// Metadata of a GGUF file, which the tensors then become; `None` for safetensors.
    pub gguf: Option<Fields>,
    /// Largest size of one file in bytes; more than that becomes shards with an index. `None`: one file, as GGUF always
    /// is.
    pub max_shard_bytes: Option<u64>,
    /// Name of the weight file where it is not `model.safetensors`; only for outputs of one file.
    pub weights_name: Option<&'static str>,
    /// Files that go beside the weights untouched.
    pub side_files: Vec<SideFile>,
    /// Hash over inputs and parameters: only a run with the same identity resumes another's work.
    pub identity: String,
    /// Replace an output directory that exists.
    pub force: bool,
}

impl WritePlan {
    /// The tensors and side files of an artifact. Floats are stored as `dtype` where one is given; GGUF's block
    /// types, which safetensors does not have, become `F32`. Integers stay as they are.
    pub fn like(artifact: &Artifact, dtype: Option<DType>, identity: impl Into<String>) -> Self {
        let tensors = artifact.tensors().iter().map(|info| TensorSpec {
            name: info.name.clone(),
            shape: info.shape.clone(),
            dtype: match (info.dtype, dtype) {
                (stored, Some(wanted)) if stored.is_float() => wanted,
                (DType::Ggml(_), None) => DType::F32,
                (stored, _) => stored,
            },
        });
        Self {
            tensors: tensors.collect(),
            side_files: artifact.side_files().to_vec(),
            identity: identity.into(),
            ..Self::default()
        }
    }

    /// Bytes of tensor data that the plan will write; `None` if the sizes overflow.
    pub fn tensor_bytes(&self) -> Option<u64> {
        self.tensors
            .iter()
            .try_fold(0u64, |sum, tensor| sum.checked_add(tensor.dtype.bytes_of(&tensor.shape)?))
    }

    /// Bytes of the weight files that the plan will write, headers included, without writing them.
    ///
    /// # Errors
    /// [`Error::BadPlan`] for tensors that cannot be written.
    pub fn file_bytes(&self) -> Result<u64> {
        let layout = FileLayout::new(Path::new(""), self)?;
        Ok(layout.shards.iter().map(|shard| shard.len).sum())
    }
}

/// One weight file of the output.
#[derive(Debug)]
pub(super) struct Shard {
    pub name: String,
    pub header: Vec<u8>,
    pub len: u64,
}

/// Where a tensor will lie.
#[derive(Debug)]
pub(super) struct Slot {
    pub name: String,
    pub dtype: DType,
    pub numel: u64,
    pub nbytes: u64,
    pub shard: usize,
    /// First byte in its file.
    pub offset: u64,
}

/// The files of an output, computed from the plan alone.
#[derive(Debug)]
pub(super) struct FileLayout {
    /// Sorted by name.
    pub slots: Vec<Slot>,
    pub index: HashMap<String, usize>,
    pub shards: Vec<Shard>,
    /// `model.safetensors.index.json`, where there are several shards.
    pub shard_index: Option<Vec<u8>>,
    /// Hash over everything that decides the bytes of the weight files.
    pub fingerprint: String,
}

impl FileLayout {
    pub fn new(out: &Path, plan: &WritePlan) -> Result<Self> {
        let bad = |reason: String| Error::BadPlan { out: out.to_owned(), reason };
        let mut slots = Vec::with_capacity(plan.tensors.len());
        let mut shapes = HashMap::new();
        for tensor in &plan.tensors {
            let TensorSpec { name, shape, dtype } = tensor;
            if name.is_empty() || name == "__metadata__" {
                return Err(bad(format!("`{name}` cannot be the name of a tensor")));
            }
            check_type(plan.gguf.is_some(), name, *dtype).map_err(bad)?;
            let nbytes = dtype.bytes_of(shape).ok_or_else(|| {
                bad(format!(
                    "tensor `{name}`: the size of {shape:?} overflows, or its rows are no whole blocks of {dtype}"
                ))
            })?;
            if shapes.insert(&**name, shape).is_some() {
                return Err(bad(format!("tensor `{name}` is declared twice")));
            }
            let numel = nbytes / dtype.block_bytes() as u64 * dtype.block_len() as u64;
            slots.push(Slot {
                name: name.clone(),
                dtype: *dtype,
                numel,
                nbytes,
                shard: 0,
                offset: 0,
            });
        }
        slots.sort_by(|a, b| a.name.cmp(&b.name));
        let limit = plan.max_shard_bytes.filter(|_| plan.gguf.is_none());
        let count = assign_shards(&mut slots, limit)
            .ok_or_else(|| bad("the total size overflows".to_owned()))?;
        if let Some(name) = plan.weights_name.filter(|_| count > 1) {
            return Err(bad(format!("{name} cannot be cut into shards; raise the shard size")));
        }
        let mut shards: Vec<Shard> = match &plan.gguf {
            Some(fields) => vec![place_gguf(fields, &mut slots, &shapes)],
            None => (0..count).map(|at| place(&mut slots, &shapes, at, count)).collect(),
        };
        if let Some(name) = plan.weights_name {
            name.clone_into(&mut shards[0].name);
        }
        check_side_files(&plan.side_files, &shards).map_err(bad)?;
        let shard_index = (count > 1).then(|| shard_index(&slots, &shards));
        let index = slots.iter().enumerate().map(|(at, slot)| (slot.name.clone(), at)).collect();
        let mut digest = Sha256::new();
        for part in std::iter::once(plan.identity.as_bytes())
            .chain(shards.iter().flat_map(|shard| [shard.name.as_bytes(), &shard.header]))
        {
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        let fingerprint = hash::format(&digest.finalize());
        Ok(Self { slots, index, shards, shard_index, fingerprint })
    }
}

/// Whether a container has an element type, and takes the name of a tensor.
fn check_type(is_gguf: bool, name: &str, dtype: DType) -> Result<(), String> {
    /// Longest name that llama.cpp reads.
    const LONGEST: usize = 63;
    if is_gguf && name.len() > LONGEST {
        return Err(format!(
            "tensor `{name}`: GGUF's readers take names of {LONGEST} bytes at most"
        ));
    }
    let (container, known) = match is_gguf {
        true => ("GGUF", gguf::type_id(dtype).is_some()),
        false => ("safetensors", dtype.safetensors_name().is_some()),
    };
    match known {
        true => Ok(()),
        false => {
            Err(format!("tensor `{name}`: {container} has no type {dtype}; choose another one"))
        }
    }
}

/// Fills shards in name order, so that a layer's tensors stay together; returns how many there are.
fn assign_shards(slots: &mut [Slot], limit: Option<u64>) -> Option<usize> {
    let (mut shard, mut size, mut total) = (0, 0u64, 0u64);
    for slot in slots {
        total = total.checked_add(slot.nbytes)?;
        if size > 0 && limit.is_some_and(|limit| size + slot.nbytes > limit) {
            shard += 1;
            size = 0;
        }
        slot.shard = shard;
        size += slot.nbytes;
    }
    Some(shard + 1)
}

/// Lays out one file. Wide elements come first, so that every tensor is aligned to its own type.
fn place(
    slots: &mut [Slot],
    shapes: &HashMap<&str, &Vec<usize>>,
    at: usize,
    count: usize,
) -> Shard {
    let mut order: Vec<&mut Slot> = slots.iter_mut().filter(|slot| slot.shard == at).collect();
    order.sort_by_key(|slot| std::cmp::Reverse(slot.dtype.block_bytes()));
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut end = 0;
    for slot in &mut order {
        slot.offset = end;
        end += slot.nbytes;
        let entry = json!({
            "dtype": slot.dtype.safetensors_name(),
            "shape": shapes[&*slot.name],
            "data_offsets": [slot.offset, end],
        });
        entries.insert(slot.name.clone(), entry);
    }
    let mut json = serde_json::to_vec(&entries).expect("invariant: maps serialize");
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    for slot in order {
        slot.offset += header.len() as u64;
    }
    let name = match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", at + 1),
    };
    Shard { name, len: header.len() as u64 + end, header }
}

/// Lays out a GGUF file: tensors in name order, each at a multiple of the alignment.
fn place_gguf(fields: &Fields, slots: &mut [Slot], shapes: &HashMap<&str, &Vec<usize>>) -> Shard {
    let mut end = 0u64;
    for slot in slots.iter_mut() {
        slot.offset = end;
        end = (end + slot.nbytes).next_multiple_of(gguf::ALIGNMENT);
    }
    let entries = slots
        .iter()
        .map(|slot| (&*slot.name, shapes[&*slot.name].as_slice(), slot.dtype, slot.offset));
    let header = gguf::header(fields, entries);
    let start = header.len() as u64;
    slots.iter_mut().for_each(|slot| slot.offset += start);
    Shard { name: GGUF_NAME.to_owned(), len: start + end, header }
}

/// Name of a GGUF file in the directory that is written.
pub const GGUF_NAME: &str = "model.gguf";

fn shard_index(slots: &[Slot], shards: &[Shard]) -> Vec<u8> {
    let map: Map<String, Json> =
        slots.iter().map(|slot| (slot.name.clone(), json!(shards[slot.shard].name))).collect();
    let total: u64 = slots.iter().map(|slot| slot.nbytes).sum();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
    let mut bytes = serde_json::to_vec_pretty(&index).expect("invariant: maps serialize");
    bytes.push(b'\n');
    bytes
}

/// Name of the index of a sharded model.
pub(super) const INDEX_NAME: &str = "model.safetensors.index.json";

fn check_side_files(files: &[SideFile], shards: &[Shard]) -> Result<(), String> {
    let mut names: HashSet<&str> = shards.iter().map(|shard| &*shard.name).collect();
    names.extend([INDEX_NAME, crate::lineage::FILE_NAME]);
    for file in files {
        let mut parts = Path::new(&file.name).components().peekable();
        if parts.peek().is_none() || !parts.all(|part| matches!(part, Component::Normal(_))) {
            return Err(format!("side file `{}` does not lie in the output", file.name));
        }
        if !names.insert(&file.name) {
            return Err(format!("side file `{}` would be written twice", file.name));
        }
    }
    Ok(())
}
