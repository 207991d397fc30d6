//! Adapters on disk: what PEFT, AdapterHub and refit write, read as [`Part`]s of a base model and written again.
//!
//! An adapter is a directory with `adapter_config.json` and one weight file. [`Adapter::open`] reads it whole and
//! strictly: a half pair, a wrong rank, a name that its kind does not have or a value that is not finite is an error
//! that names file and tensor, where PEFT would warn and go on with part of the adapter. [`Adapter::check_base`] holds it against the base model,
//! [`Form::apply`] takes a change into a weight, [`write()`] puts an adapter on disk in PEFT's layout.

mod apply;
mod base;
mod build;
mod change;
mod config;
mod form;
mod hub;
pub(crate) mod pattern;
mod read;
pub mod ternary;
mod write;

use std::fs;
use std::path::{Path, PathBuf};

pub use change::Change;
pub use config::{AdapterConfig, Dialect, FILE_NAME, PEFT_TYPES};
pub use form::{Factor, Form, Part, Prompt, Side, Values};
pub use write::{WEIGHTS_NAME, write};

use crate::artifact::Artifact;
use crate::error::{Error, Result, TensorFault};
use read::{Contents, Reader, Stored};

/// Weight files of an adapter, most preferred first.
const WEIGHTS: [&str; 5] = [
    WEIGHTS_NAME,
    "adapter_model.bin",
    "adapter.safetensors",
    "pytorch_adapter.bin",
    ternary::TERNARY_NAME,
];

/// Keys that say where an adapter comes from and not what it does.
const PROVENANCE: [&str; 6] = [
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
];

/// An adapter on disk, read whole.
#[derive(Debug, Clone)]
pub struct Adapter {
    path: PathBuf,
    weights: PathBuf,
    dialect: Dialect,
    config: AdapterConfig,
    parts: Vec<Part>,
    prompt: Option<Prompt>,
}

impl Adapter {
    /// True for a directory with an `adapter_config.json`.
    pub fn is_adapter(path: &Path) -> bool {
        path.join(FILE_NAME).is_file()
    }

    /// Opens the adapter in a directory, or in its one sub-directory that holds one (PEFT puts an adapter that is not
    /// called `default` into a folder of its name).
    ///
    /// # Errors
    /// A configuration or weight file that is missing or malformed, a kind or an option that refit does not read, and
    /// tensors that do not fit the configuration or each other.
    pub fn open(path: &Path) -> Result<Self> {
        let dir = locate(path)?;
        let config_path = dir.join(FILE_NAME);
        let bytes = fs::read(&config_path).map_err(|e| Error::io(&config_path, "read", e))?;
        let config = AdapterConfig::parse(&config_path, &bytes)?;
        let dialect = config.dialect().ok_or_else(|| Error::AdapterConfig {
            path: config_path.clone(),
            key: "peft_type".to_owned(),
            reason: format!(
                "missing; refit reads PEFT's adapters ({}), AdapterHub's (`config` and `version`) and its own \
                 (`refit_type`)",
                config::PEFT_TYPES.join(", ")
            ),
        })?;
        let weights = weights_of(&dir)?;
        let tensors = load(&weights)?;
        let reader = Reader { config_path: &config_path, weights: &weights, config: &config };
        let Contents { parts, prompt } = match dialect {
            Dialect::AdapterHub => hub::read(&reader, &dir, tensors)?,
            Dialect::Peft | Dialect::Refit => reader.read(tensors)?,
        };
        Ok(Self { path: dir, weights, dialect, config, parts, prompt })
    }

    /// Opens an adapter, gives its sites the base's own names ([`align`](Self::align)) and checks that it fits.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`check_base`](Self::check_base).
    pub fn open_on(path: &Path, base: &Artifact) -> Result<Self> {
        let mut adapter = Self::open(path)?;
        adapter.align(base);
        adapter.check_base(base)?;
        Ok(adapter)
    }

    /// The directory that holds it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which tool's conventions it follows.
    pub fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// Its weights as they are stored where they are signs and one number; `None` for any other adapter.
    ///
    /// # Errors
    /// A weight file that cannot be read any more.
    pub fn ternary(&self) -> Result<Option<ternary::Ternary>> {
        let compressed = self.weights.file_name().is_some_and(|name| name == ternary::TERNARY_NAME);
        compressed.then(|| ternary::Ternary::open(&self.weights)).transpose()
    }

    /// Every tensor of its weight file, by name.
    ///
    /// # Errors
    /// A weight file that cannot be read any more.
    pub fn tensors(&self) -> Result<Vec<(String, Values)>> {
        load(&self.weights)
    }

    /// Its configuration, every key kept.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// What it changes, sorted by site. A site has more than one part only where a whole tensor (a trained bias, a
    /// resized embedding) comes beside its other form; what replaces stands before what adds.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The trained prompt or prefix, where it has one.
    pub fn prompt(&self) -> Option<&Prompt> {
        self.prompt.as_ref()
    }

    /// True where base weights can take in all that it does.
    pub fn mergeable(&self) -> bool {
        self.prompt.is_none() && self.parts.iter().all(|part| part.form.mergeable())
    }

    /// Number of trained values.
    pub fn parameters(&self) -> usize {
        let prompt = self.prompt.as_ref().map_or(0, |prompt| prompt.table().values.len());
        self.parts.iter().map(|part| part.form.parameters()).sum::<usize>() + prompt
    }

    /// BLAKE3 over the stored tensors and those keys of the configuration that say what the adapter does: two
    /// adapters with the same factors and another alpha differ, the same adapter with another `peft_version` does not.
    ///
    /// # Errors
    /// A weight file that cannot be read any more.
    pub fn content_hash(&self) -> Result<String> {
        let mut kept = self.config.raw().clone();
        kept.retain(|key, value| !PROVENANCE.contains(&&**key) && !value.is_null());
        let mut digest = blake3::Hasher::new();
        digest.update(Artifact::open(&self.weights)?.content_hash()?.as_bytes());
        digest.update(&AdapterConfig::new(kept).to_json());
        Ok(digest.finalize().to_string())
    }
}

/// The directory of the adapter at a path.
fn locate(path: &Path) -> Result<PathBuf> {
    if Adapter::is_adapter(path) {
        return Ok(path.to_owned());
    }
    let entries = fs::read_dir(path).map_err(|error| Error::io(path, "open", error))?;
    let mut found = Vec::new();
    for entry in entries {
        let inner = entry.map_err(|error| Error::io(path, "list", error))?.path();
        if Adapter::is_adapter(&inner) {
            found.push(inner);
        }
    }
    found.sort();
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err(not_an_adapter(path, format!("it holds no {FILE_NAME}"))),
        _ => {
            let name =
                |inner: &PathBuf| inner.file_name().map(|n| n.to_string_lossy().into_owned());
            let names: Vec<_> = found.iter().filter_map(name).collect();
            let reason = format!("it holds several adapters ({}); name one", names.join(", "));
            Err(not_an_adapter(path, reason))
        }
    }
}

fn weights_of(dir: &Path) -> Result<PathBuf> {
    let found = WEIGHTS.iter().map(|name| dir.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| {
        not_an_adapter(dir, format!("it has {FILE_NAME} but none of {}", WEIGHTS.join(", ")))
    })
}

fn not_an_adapter(path: &Path, reason: String) -> Error {
    Error::NotAnArtifact { path: path.to_owned(), reason: format!("no adapter: {reason}") }
}

/// Every tensor of the weight file, as finite floats.
fn load(weights: &Path) -> Result<Vec<Stored>> {
    if weights.file_name().is_some_and(|name| name == ternary::TERNARY_NAME) {
        return ternary::load(weights);
    }
    let artifact = Artifact::open(weights)?;
    let mut tensors = Vec::with_capacity(artifact.tensors().len());
    for info in artifact.tensors() {
        let fault = |fault| Error::tensor(weights, &info.name, fault);
        if !info.dtype.is_float() {
            let reason = format!("{} is no element type of an adapter", info.dtype);
            return Err(fault(TensorFault::Other(reason)));
        }
        let values = artifact.read_f32(&info.name)?;
        if let Some(index) = values.iter().position(|x| !x.is_finite()) {
            return Err(fault(TensorFault::NotFinite { index, value: values[index].to_string() }));
        }
        tensors.push((info.name.clone(), Values { shape: info.shape.clone(), values }));
    }
    Ok(tensors)
}
