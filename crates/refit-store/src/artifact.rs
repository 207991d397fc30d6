//! Artifacts: models on disk, opened by reading headers only.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::architecture::{self, Architecture, LoadReport, Resolved};
use crate::config::Config;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::formats::factored::{Factors, LOW_RANK};
use crate::formats::gguf;
use crate::hash;
use crate::lattice::{self, Lattice};
use crate::layout::{self, Layout};
use crate::storage::{Entry, Source, View};

/// Elements that one thread decodes at a time: whole blocks of every type.
const PARALLEL_ELEMENTS: usize = 1 << 18;

/// File format of an artifact's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// `.safetensors`, single or sharded.
    Safetensors,
    /// `.gguf`.
    Gguf,
    /// `.pth`, `.pt`, `.bin`: a pickle of tensors.
    Torch,
}

/// What is known of a tensor without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, as Hugging Face spells it.
    pub name: String,
    /// Shape, row-major, outermost dimension first.
    pub shape: Vec<usize>,
    /// Stored element type.
    pub dtype: DType,
    /// Stored size in bytes.
    pub nbytes: u64,
}

impl TensorInfo {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A file that travels with the weights untouched: `config.json`, `tokenizer.json`, ...
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SideFile {
    /// Path below the model directory, with `/`.
    pub name: String,
    /// Where its bytes come from.
    pub content: SideContent,
}

/// Where the bytes of a side file come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SideContent {
    /// A file on disk.
    File(PathBuf),
    /// Bytes made by refit (rebuilt from GGUF, or edited).
    Bytes(Arc<[u8]>),
}

impl SideFile {
    /// A side file with these bytes.
    pub fn from_bytes(name: impl Into<String>, bytes: impl Into<Arc<[u8]>>) -> Self {
        Self { name: name.into(), content: SideContent::Bytes(bytes.into()) }
    }

    /// A side file that is copied from `path`.
    pub fn from_path(name: impl Into<String>, path: impl AsRef<Path>) -> Self {
        Self { name: name.into(), content: SideContent::File(path.as_ref().to_owned()) }
    }

    /// Its bytes.
    pub fn read(&self) -> Result<Vec<u8>> {
        match &self.content {
            SideContent::Bytes(bytes) => Ok(bytes.to_vec()),
            SideContent::File(path) => {
                std::fs::read(path).map_err(|error| Error::io(path, "read", error))
            }
        }
    }
}

/// Digest of one file.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FileHash {
    /// Path below the artifact's directory, with `/`.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256, lower-case hexadecimal.
    pub sha256: String,
}

/// A model on disk.
#[derive(Debug)]
pub struct Artifact {
    path: PathBuf,
    format: Format,
    config: Config,
    entries: Vec<Entry>,
    infos: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    gguf: Option<Box<gguf::Header>>,
    on_disk: Vec<SideFile>,
    packed: Option<&'static str>,
    factored: bool,
    resolved: OnceLock<Resolved>,
    side_files: OnceLock<Vec<SideFile>>,
}

impl Artifact {
    /// Opens a directory in Hugging Face layout, a `.safetensors`, a `.gguf`, or a `.pth`/`.pt`/`.bin`
    /// file. Reads and checks headers only; every malformed header is an error that names file and tensor.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Ok(Self::assemble(path, layout::open(path)?))
    }

    /// As [`open`](Self::open), without the products that are stored beside quantized matrices: those matrices alone.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_uncompensated(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut layout = layout::open(path)?;
        for entry in &mut layout.entries {
            let base = match &entry.view {
                View::Factored(parts) => parts.base.clone(),
                _ => None,
            };
            if let Some(base) = base {
                *entry = base;
            }
        }
        Ok(Self::assemble(path, layout))
    }

    fn assemble(path: &Path, layout: Layout) -> Self {
        let Layout { format, mut entries, config, gguf, packed, factored, side_files } = layout;
        entries.sort_by(|a, b| a.info.name.cmp(&b.info.name));
        let infos: Vec<TensorInfo> = entries.iter().map(|entry| entry.info.clone()).collect();
        let index = infos.iter().enumerate().map(|(at, info)| (info.name.clone(), at)).collect();
        Self {
            path: path.to_owned(),
            format,
            config,
            entries,
            infos,
            index,
            gguf,
            on_disk: side_files,
            packed,
            factored,
            resolved: OnceLock::new(),
            side_files: OnceLock::new(),
        }
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Format of the weight files.
    pub fn format(&self) -> Format {
        self.format
    }

    /// `config.json`, or the same keys rebuilt from GGUF; empty for a bare weight file.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// GGUF's own metadata, where the weights are a GGUF file.
    pub fn gguf(&self) -> Option<&gguf::Header> {
        self.gguf.as_deref()
    }

    /// The format of packed weights that are decoded when they are read, where there are any: `compressed-tensors` or
    /// `GPTQ`. Their tensors are presented as `F32`.
    pub fn packed(&self) -> Option<&'static str> {
        self.packed
    }

    /// The packed form of a tensor, in words; `None` where it is stored as it is.
    pub fn stored_packed(&self, name: &str) -> Result<Option<String>> {
        Ok(match (&self.entry(name)?.view, self.packed) {
            (View::Packed(packed), Some(format)) => Some(format!("{}-bit {format}", packed.bits)),
            (View::Factored(parts), _) if parts.base.is_some() => {
                Some(format!("compensated at rank {}", parts.rank()))
            }
            (View::Factored(parts), _) => Some(format!("factors of rank {}", parts.rank())),
            _ => None,
        })
    }

    /// Bytes that a tensor takes on disk: less than [`TensorInfo::nbytes`] where it is packed.
    pub fn stored_bytes(&self, name: &str) -> Result<u64> {
        let entry = self.entry(name)?;
        Ok(match &entry.view {
            View::Packed(packed) => packed.nbytes(),
            View::Factored(factored) => factored.nbytes(),
            _ => entry.info.nbytes,
        })
    }

    /// The grid of a tensor that is stored as codes of plain multiples of a step; `None` for values that are stored
    /// otherwise.
    pub fn stored_lattice(&self, name: &str) -> Result<Option<Lattice>> {
        let entry = self.entry(name)?;
        Ok(match (&entry.view, entry.info.dtype) {
            (View::Packed(packed), _) if packed.order.is_none() => Some(Lattice {
                bits: packed.bits,
                symmetric: packed.is_symmetric()?,
                group: packed.group,
            }),
            (_, DType::Ggml(ggml)) => lattice::of_blocks(ggml),
            _ => None,
        })
    }

    /// Whether matrices are stored in factors that are multiplied out when they are read.
    pub fn factored(&self) -> bool {
        self.factored
    }

    /// The rank of the factors that a matrix is stored in, or that stand beside it.
    pub fn rank(&self, name: &str) -> Option<usize> {
        match self.entry(name).map(|entry| &entry.view) {
            Ok(View::Factored(parts)) => Some(parts.rank()),
            _ => None,
        }
    }

    /// Whether a matrix is stored in factors, or beside a product of them.
    pub fn stored_in_factors(&self, name: &str) -> bool {
        matches!(self.entry(name).map(|entry| &entry.view), Ok(View::Factored(_)))
    }

    /// The factors of a matrix that is stored so, in the orientation in which it is stored; `None` for any other. Where
    /// [`is_compensated`](Self::is_compensated), their product is beside a matrix.
    ///
    /// # Errors
    /// A tensor that is not there or cannot be read.
    pub fn factors(&self, name: &str) -> Result<Option<Factors>> {
        match &self.entry(name)?.view {
            View::Factored(factored) => factored.factors().map(Some),
            _ => Ok(None),
        }
    }

    /// Whether a matrix is stored as another one and a product of thin matrices that is added to it.
    pub fn is_compensated(&self, name: &str) -> bool {
        matches!(self.entry(name).map(|entry| &entry.view), Ok(View::Factored(parts)) if parts.base.is_some())
    }

    /// The matrix that a compensation is added to, as f32; `None` where there is no compensation.
    ///
    /// # Errors
    /// A tensor that is not there or cannot be read.
    pub fn read_uncompensated(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let View::Factored(parts) = &self.entry(name)?.view else { return Ok(None) };
        let Some(base) = &parts.base else { return Ok(None) };
        let mut values = vec![0.0; base.info.numel()];
        base.read_f32(0, &mut values)?;
        Ok(Some(values))
    }

    /// A tensor as codes may lie under it: that which a compensation is added to, where there is one.
    pub(crate) fn beneath(&self, name: &str) -> Result<&Entry> {
        let entry = self.entry(name)?;
        Ok(match &entry.view {
            View::Factored(parts) => parts.base.as_ref().unwrap_or(entry),
            _ => entry,
        })
    }

    /// Fixed scale and zero point of the activation that a packed linear reads, as stored (codes are signed); none where the
    /// format has none.
    ///
    /// # Errors
    /// A tensor that is not there.
    pub fn stored_input(&self, name: &str) -> Result<Option<(f32, f32)>> {
        let entry = self.entry(name)?;
        Ok(match &entry.view {
            View::Packed(packed) => packed.input,
            _ => None,
        })
    }

    /// Roles of the tensors: by `model_type`, or inferred and marked so.
    pub fn architecture(&self) -> &Architecture {
        &self.resolved().architecture
    }

    /// What of the tensors does not fit the configuration.
    pub fn load_report(&self) -> &LoadReport {
        &self.resolved().report
    }

    /// Refuses a model that cannot be run or changed as a whole: tensors that its configuration promises are missing
    /// or have another shape. Tensors that nothing asks for are no error ([`LoadReport::strays`]).
    ///
    /// # Errors
    /// [`Error::Misfit`] with the counts and the first few names.
    pub fn check_fit(&self) -> Result<()> {
        match self.load_report().misfit() {
            Some(problems) => Err(Error::Misfit { path: self.path.clone(), problems }),
            None => Ok(()),
        }
    }

    fn resolved(&self) -> &Resolved {
        self.resolved.get_or_init(|| {
            let tensors = self.infos.iter().map(|info| (&*info.name, &*info.shape));
            architecture::resolve(self.config.raw(), tensors)
        })
    }

    /// Every tensor, sorted by name. GGUF's names and row orders are translated to Hugging Face's.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    /// Element type and number of elements of every tensor, factors that a matrix is stored in apart.
    pub fn stored_elements(&self) -> Vec<(DType, u64)> {
        let mut all = Vec::with_capacity(self.entries.len());
        let mut add = |info: &TensorInfo| all.push((info.dtype, info.numel() as u64));
        for entry in &self.entries {
            match &entry.view {
                View::Factored(parts) => parts.parts().for_each(|part| add(&part.info)),
                _ => add(&entry.info),
            }
        }
        all
    }

    /// One tensor; the error suggests the nearest names.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.entry(name).map(|entry| &entry.info)
    }

    /// True if there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    pub(crate) fn entry(&self, name: &str) -> Result<&Entry> {
        self.index.get(name).map(|&at| &self.entries[at]).ok_or_else(|| Error::NoSuchTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
            nearest: nearest(name, self.infos.iter().map(|info| &*info.name)),
        })
    }

    /// A whole tensor, decoded, row-major. Large tensors are decoded by all threads.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let mut values = vec![0.0; self.tensor(name)?.numel()];
        self.read_f32_into(name, 0, &mut values)?;
        Ok(values)
    }

    /// Elements `start..start + out.len()`, decoded. Reads by position: no page stays resident.
    pub fn read_f32_into(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        let entry = self.entry(name)?;
        if out.len() < 2 * PARALLEL_ELEMENTS
            || matches!(entry.view, View::Transposed { .. } | View::Factored(_))
        {
            return entry.read_f32(start, out);
        }
        let chunks = out.par_chunks_mut(PARALLEL_ELEMENTS).enumerate();
        chunks.try_for_each(|(at, chunk)| {
            entry.read_f32(start.saturating_add(at * PARALLEL_ELEMENTS), chunk)
        })
    }

    /// Stored bytes `byte_start..`, in the order of [`TensorInfo::shape`] and its element type.
    pub fn read_raw_into(&self, name: &str, byte_start: u64, out: &mut [u8]) -> Result<()> {
        self.entry(name)?.read_raw(byte_start, out)
    }

    /// The stored bytes without copying: a view of the mapped file, aligned to the element type. `None`
    /// where the tensor is not stored in its logical order, is not aligned, or cannot be mapped.
    pub fn shared_bytes(&self, name: &str) -> Option<Bytes> {
        struct Mapped {
            source: Arc<Source>,
            start: usize,
            end: usize,
        }
        impl AsRef<[u8]> for Mapped {
            fn as_ref(&self) -> &[u8] {
                let map = self.source.map().expect("invariant: mapped before the view was made");
                &map[self.start..self.end]
            }
        }
        let entry = self.entry(name).ok()?;
        if !matches!(entry.view, View::Plain) {
            return None;
        }
        let start = usize::try_from(entry.offset).ok()?;
        let end = start.checked_add(usize::try_from(entry.info.nbytes).ok()?)?;
        let bytes = entry.source.map()?.get(start..end)?;
        let aligned = (bytes.as_ptr() as usize).is_multiple_of(entry.info.dtype.alignment());
        aligned.then(|| Bytes::from_owner(Mapped { source: entry.source.clone(), start, end }))
    }

    /// Files that travel with the weights: those on disk, and for a GGUF file the ones rebuilt from it.
    pub fn side_files(&self) -> &[SideFile] {
        self.side_files.get_or_init(|| {
            let mut files = self.on_disk.clone();
            if self.packed.is_some() || self.factored {
                // What is read from here is decoded: the settings of codes and factors would be wrong beside it.
                let mut config = self.config.raw().clone();
                config.retain(|key, _| {
                    let packed = ["quantization_config", "compression_config"];
                    !(packed.contains(&key.as_str()) && self.packed.is_some() || key == LOW_RANK)
                });
                files.retain(|file| !matches!(&*file.name, "config.json" | "quantize_config.json"));
                if !config.is_empty() {
                    files.push(SideFile::from_bytes("config.json", Config::new(config).to_json()));
                }
            }
            let mut add = |file: SideFile| {
                if files.iter().all(|present| present.name != file.name) {
                    files.push(file);
                }
            };
            let Some(header) = &self.gguf else { return files };
            if !self.config.is_empty() {
                add(SideFile::from_bytes("config.json", self.config.to_json()));
            }
            // A tokenizer that cannot be rebuilt is left out here; `tokenizer_json` says why.
            let tokenizer = gguf::tokenizer_json(header).ok().flatten();
            let with_tokenizer = tokenizer.is_some();
            let made = [
                ("tokenizer.json", tokenizer),
                (
                    "tokenizer_config.json",
                    gguf::tokenizer_config(header).filter(|_| with_tokenizer),
                ),
                ("generation_config.json", gguf::generation_config(header)),
            ];
            for (name, bytes) in made {
                if let Some(bytes) = bytes {
                    add(SideFile::from_bytes(name, bytes));
                }
            }
            files
        })
    }

    /// `tokenizer.json`: the file, or built from GGUF's tokenizer keys. `None` where there is neither.
    pub fn tokenizer_json(&self) -> Result<Option<Vec<u8>>> {
        if let Some(file) = self.on_disk.iter().find(|file| file.name == "tokenizer.json") {
            return file.read().map(Some);
        }
        let Some(header) = &self.gguf else { return Ok(None) };
        gguf::tokenizer_json(header)
            .map_err(|reason| Error::Tokenizer { path: self.path.clone(), reason })
    }

    /// A digest that changes when a weight file is replaced or written to: its size and time of change, and the place
    /// and type of every tensor. Costs no reading; two copies of the same weights have different ones.
    ///
    /// # Errors
    /// A file that is gone.
    pub fn fingerprint(&self) -> Result<String> {
        let mut digest = blake3::Hasher::new();
        let mut last = None;
        for entry in &self.entries {
            let source = &*entry.source;
            if last != Some(&source.path) {
                let meta = std::fs::metadata(&source.path)
                    .map_err(|error| Error::io(&source.path, "read", error))?;
                let changed = meta.modified().ok();
                // Not its directory: a run may be resumed from another one.
                let name = source.path.file_name();
                digest.update(format!("{name:?} {} {changed:?}\n", meta.len()).as_bytes());
                last = Some(&source.path);
            }
            digest.update(format!("{:?} {}\n", entry.info, entry.offset).as_bytes());
        }
        Ok(digest.finalize().to_string())
    }

    /// BLAKE3 over (name, element type, shape, BLAKE3 of the stored bytes) of every tensor in name order: the same for
    /// the same weights, however they are sharded.
    pub fn content_hash(&self) -> Result<String> {
        let contents: Vec<blake3::Hash> = self
            .entries
            .par_iter()
            .map(|entry| hash::blake3(entry.info.nbytes, |at, part| entry.read_raw(at, part)))
            .collect::<Result<_>>()?;
        let mut digest = blake3::Hasher::new();
        for (entry, content) in self.entries.iter().zip(&contents) {
            let info = &entry.info;
            for part in [&info.name, &info.dtype.to_string(), &format!("{:?}", info.shape)] {
                digest.update(&(part.len() as u64).to_le_bytes());
                digest.update(part.as_bytes());
            }
            digest.update(content.as_bytes());
        }
        Ok(digest.finalize().to_string())
    }

    /// Digest of every file on disk that belongs to the artifact, sorted by name.
    pub fn file_hashes(&self) -> Result<Vec<FileHash>> {
        let base =
            if self.path.is_dir() { &*self.path } else { self.path.parent().unwrap_or(&self.path) };
        let of_entry = |entry: &Entry| match &entry.view {
            View::Packed(packed) => packed.parts().map(|part| part.source.path.clone()).collect(),
            View::Factored(parts) => parts.parts().map(|part| part.source.path.clone()).collect(),
            _ => vec![entry.source.path.clone()],
        };
        let mut paths: Vec<PathBuf> = self.entries.iter().flat_map(of_entry).collect();
        paths.extend(self.on_disk.iter().filter_map(|file| match &file.content {
            SideContent::File(path) => Some(path.clone()),
            SideContent::Bytes(_) => None,
        }));
        if self.entries.is_empty() && self.path.is_file() {
            paths.push(self.path.clone());
        }
        paths.sort();
        paths.dedup();
        paths.par_iter().map(|path| hash_file(base, path)).collect()
    }
}

/// SHA-256 of a file, named relative to `base`.
pub(crate) fn hash_file(base: &Path, path: &Path) -> Result<FileHash> {
    let source = Source::open(path)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; source.len.min(1 << 20) as usize];
    let mut at = 0;
    while at < source.len {
        let len = (source.len - at).min(buffer.len() as u64) as usize;
        source.read_at(&mut buffer[..len], at)?;
        digest.update(&buffer[..len]);
        at += len as u64;
    }
    let name = path.strip_prefix(base).unwrap_or(path).to_string_lossy().replace('\\', "/");
    Ok(FileHash { name, bytes: source.len, sha256: hash::format(&digest.finalize()) })
}

/// Up to three candidates within a third of the name's length in edits, nearest first.
pub(crate) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Vec<String> {
    let limit = (name.len() / 3).max(2);
    let mut scored: Vec<(usize, &str)> = candidates
        .filter(|candidate| candidate.len().abs_diff(name.len()) <= limit)
        .map(|candidate| (strsim::levenshtein(name, candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .collect();
    scored.sort();
    scored.into_iter().take(3).map(|(_, candidate)| candidate.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_names_are_suggested() {
        let names = ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"];
        assert_eq!(nearest("model.nrom.weight", names.into_iter()), ["model.norm.weight"]);
        assert!(nearest("zzz", names.into_iter()).is_empty());
    }
}
