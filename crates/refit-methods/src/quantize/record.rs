//! What a quantizer did to each matrix, saved as `refit.quantization.json` beside the weights: the
//! weights themselves are written decoded, so that every tool can run them, and this file says what a
//! packed file would hold.

use std::collections::BTreeMap;
use std::sync::Mutex;

use refit_nn::rounding::{Rounder, Rounding};
use refit_store::{DType, SideFile};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::emit::serialize;
use crate::error::Result;
use crate::inputs::ModelInput;
use crate::quantize::grid::Grid;

/// Name of the file.
pub const FILE_NAME: &str = "refit.quantization.json";

/// What happened to one matrix.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantizedTensor {
    /// Bits per code.
    pub bits: u8,
    /// Whether there is no zero point.
    pub symmetric: bool,
    /// Consecutive inputs that share a scale.
    pub group: usize,
    /// Everything counted.
    pub bits_per_weight: f64,
    /// Bytes of codes, scales and zero points.
    pub packed_bytes: u64,
    /// `||W - W_hat||^2 / ||W||^2`.
    pub relative_error: f64,
}

impl QuantizedTensor {
    /// A matrix of `rows` rows of `inputs` weights on a grid, nothing lost.
    pub fn of(grid: &Grid, rows: usize, inputs: usize, group: usize) -> Self {
        Self {
            bits: grid.bits,
            symmetric: grid.symmetric,
            group,
            bits_per_weight: grid.bits_per_weight(group),
            packed_bytes: grid.packed_bytes(rows, inputs, group),
            relative_error: 0.0,
        }
    }
}

/// What refit wrote beside the weights when it quantized them; empty where it did not, or where the file cannot be read.
/// It is a claim, not a fact: weights may have changed since, so whoever relies on it looks at them.
pub fn read(model: &ModelInput) -> BTreeMap<String, QuantizedTensor> {
    #[derive(Deserialize)]
    struct File {
        tensors: BTreeMap<String, QuantizedTensor>,
    }
    let file = model.artifact.side_files().iter().find(|file| file.name == FILE_NAME);
    let bytes = file.and_then(|file| file.read().ok());
    let parsed = bytes.and_then(|bytes| serde_json::from_slice::<File>(&bytes).ok());
    parsed.map_or_else(BTreeMap::new, |file| file.tensors)
}

/// Collects what happened to every matrix, from any thread.
#[derive(Debug, Default)]
pub struct Record {
    tensors: Mutex<BTreeMap<String, (u64, QuantizedTensor)>>,
    activations: BTreeMap<String, Rounding>,
}

impl Record {
    /// Adds a matrix: what it was and what it became, `[out, inputs]` each.
    pub fn add(
        &self,
        tensor: &str,
        grid: &Grid,
        inputs: usize,
        group: usize,
        before: &[f32],
        after: &[f32],
    ) {
        let rows = before.len() / inputs.max(1);
        self.measure(tensor, QuantizedTensor::of(grid, rows, inputs, group), before, after);
    }

    /// Adds a matrix of which all but the error is known.
    pub fn measure(&self, tensor: &str, entry: QuantizedTensor, before: &[f32], after: &[f32]) {
        let square = |w: f32| f64::from(w) * f64::from(w);
        let norm: f64 = before.iter().map(|w| square(*w)).sum();
        let error: f64 = before.iter().zip(after).map(|(a, b)| square(a - b)).sum();
        let relative_error = if norm > 0.0 { error / norm } else { 0.0 };
        self.put(tensor, before.len() as u64, QuantizedTensor { relative_error, ..entry });
    }

    /// Adds what is known of a matrix of `weights` elements.
    pub fn put(&self, tensor: &str, weights: u64, entry: QuantizedTensor) {
        let mut tensors = self.tensors.lock().expect("invariant: no thread panics while adding");
        tensors.insert(tensor.to_owned(), (weights, entry));
    }

    /// Whether a matrix was added.
    pub fn contains(&self, tensor: &str) -> bool {
        self.tensors.lock().expect("invariant: no thread panics while adding").contains_key(tensor)
    }

    /// What was collected, leaving nothing.
    pub fn take(&self) -> Self {
        let mut tensors = self.tensors.lock().expect("invariant: no thread panics while adding");
        Self {
            tensors: Mutex::new(std::mem::take(&mut *tensors)),
            activations: self.activations.clone(),
        }
    }

    /// Says how activations are rounded while the result runs: `refit eval` does so, exports to formats that have the word say
    /// so.
    pub fn with_activations(mut self, rounder: &Rounder) -> Self {
        self.activations.clone_from(&rounder.roundings);
        self
    }

    /// The file and the report. Tensors that were not quantized count with the bytes of the source.
    ///
    /// # Errors
    /// None in practice: plain data always serializes.
    pub fn finish(self, model: &ModelInput) -> Result<(Vec<SideFile>, Value)> {
        let tensors = self.tensors.into_inner().expect("invariant: no thread panics while adding");
        let weights: u64 = tensors.values().map(|(count, _)| count).sum();
        let packed: u64 = tensors.values().map(|(_, entry)| entry.packed_bytes).sum();
        let others: u64 = model
            .artifact
            .tensors()
            .iter()
            .filter(|info| !tensors.contains_key(&info.name))
            .map(|info| info.nbytes)
            .sum();
        let weighted = |pick: fn(&QuantizedTensor) -> f64| {
            tensors.values().map(|(count, entry)| *count as f64 * pick(entry)).sum::<f64>()
                / weights.max(1) as f64
        };
        let mean_error = tensors.values().map(|(_, entry)| entry.relative_error).sum::<f64>()
            / tensors.len().max(1) as f64;
        let mut groups: BTreeMap<usize, u64> = BTreeMap::new();
        for (_, entry) in tensors.values() {
            *groups.entry(entry.group).or_default() += 1;
        }
        let groups: serde_json::Map<String, Value> =
            groups.into_iter().map(|(group, count)| (group.to_string(), json!(count))).collect();
        let summary = json!({
            "quantized_tensors": tensors.len(),
            "quantized_weights": weights,
            "bits_per_weight": weighted(|entry| entry.bits_per_weight),
            "packed_bytes": packed + others,
            "packed_bytes_quantized": packed,
            "mean_relative_error": mean_error,
            "tensors_by_group": groups,
        });
        let entries: BTreeMap<&String, &QuantizedTensor> =
            tensors.iter().map(|(name, (_, entry))| (name, entry)).collect();
        let mut file = json!({ "version": 1, "summary": summary, "tensors": entries });
        if !self.activations.is_empty() {
            file["activations"] = json!(self.activations);
        }
        let bytes = serialize("quantization record", &file)?;
        Ok((vec![SideFile::from_bytes(FILE_NAME, bytes)], summary))
    }
}

/// Warns when the source's weights already lie on a grid like the one asked for, which would make any
/// comparison void.
pub fn grid_warnings(model: &ModelInput, grid: &Grid, group: Option<usize>) -> Vec<String> {
    let mut types: BTreeMap<String, usize> = BTreeMap::new();
    for site in model.artifact.architecture().linears() {
        if let Ok(info) = model.artifact.tensor(&site.name)
            && let DType::Ggml(_) = info.dtype
            && info.dtype.bits() <= 8.5
        {
            *types.entry(info.dtype.to_string()).or_default() += 1;
        }
    }
    let on_grid: usize = types.values().sum();
    if on_grid == 0 {
        return Vec::new();
    }
    let names: Vec<&str> = types.keys().map(String::as_str).collect();
    let names = names.join(", ");
    let file = model
        .artifact
        .path()
        .file_name()
        .map_or(&*model.source, |f| f.to_str().unwrap_or(&model.source));
    let void = !grid.symmetric && grid.bits >= 4 && group.is_none_or(|group| group == 32);
    vec![if void {
        format!(
            "{on_grid} weight matrices of {} are stored as {names}: they already lie on a grid of \
             {} bits or fewer per 32 inputs, and {}-bit asymmetric groups of 32 would change next to \
             nothing. Compare at fewer bits, at whole rows, or on a float source",
            file, grid.bits, grid.bits
        )
    } else {
        format!(
            "{on_grid} weight matrices of {} are stored as {names}: they were quantized before, so \
             differences to them are not differences to the original float weights",
            file
        )
    }]
}
