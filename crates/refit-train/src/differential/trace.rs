//! Golden traces: activations kept in a safetensors file.

use std::collections::HashMap;
use std::path::Path;

use burn::tensor::Tensor;
use refit_nn::ops;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::{OUTPUT, Traced};
use crate::error::{Error, Result};

/// A named activation, `[1, seq, width]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Activation {
    /// Name of the tap, or [`OUTPUT`].
    pub name: String,
    /// Shape.
    pub shape: [usize; 3],
    /// Values, row-major.
    pub values: Vec<f32>,
}

/// Which activations a trace keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Keep {
    /// Everything: a fault is found to the site.
    All,
    /// The residual stream and the output: a tenth of the size; a fault is found to half a block.
    #[default]
    Residual,
}

/// What a model did on some probes.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// Token ids of each probe.
    pub probes: Vec<Vec<u32>>,
    /// Activations of each probe, in running order.
    pub activations: Vec<Vec<Activation>>,
    /// Whether the output is logits.
    pub logits: bool,
}

/// Runs `model` on one probe and keeps its activations.
pub(super) fn capture(model: &dyn Traced, probe: &[u32], keep: Keep) -> Result<Vec<Activation>> {
    let mut kept = Vec::new();
    let mut tap = |name: &str, value: Tensor<3>| {
        if keep == Keep::All || name.contains(".resid.") {
            kept.push(activation(name, &value));
        }
        value
    };
    let output = model.trace(probe, &mut tap)?;
    kept.push(activation(OUTPUT, &output));
    Ok(kept)
}

fn activation(name: &str, value: &Tensor<3>) -> Activation {
    Activation { name: name.into(), shape: value.dims(), values: ops::to_vec(value) }
}

const FORMAT: &str = "refit-trace-1";

impl Trace {
    /// Records `model` on `probes`.
    ///
    /// # Errors
    /// Whatever running the model meets.
    pub fn record(model: &dyn Traced, probes: &[Vec<u32>], keep: Keep) -> Result<Self> {
        let activations =
            probes.iter().map(|probe| capture(model, probe, keep)).collect::<Result<_>>()?;
        Ok(Self { probes: probes.to_vec(), activations, logits: model.has_logits() })
    }

    /// Saves the trace: tensors `PROBE/INDEX/NAME`, whose index keeps the running order, and the
    /// probes in the header.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let malformed = |e: safetensors::SafeTensorError| Error::Malformed {
            path: path.into(),
            problem: e.to_string(),
        };
        let mut views = Vec::new();
        for (probe, activations) in self.activations.iter().enumerate() {
            for (index, a) in activations.iter().enumerate() {
                let bytes: &[u8] = bytemuck::cast_slice(&a.values);
                let view =
                    TensorView::new(Dtype::F32, a.shape.to_vec(), bytes).map_err(malformed)?;
                views.push((format!("{probe:04}/{index:05}/{}", a.name), view));
            }
        }
        let probes = serde_json::json!(self.probes).to_string();
        let header = HashMap::from([
            ("format".to_string(), FORMAT.to_string()),
            ("probes".to_string(), probes),
            ("logits".to_string(), self.logits.to_string()),
        ]);
        let bytes = safetensors::serialize(views, Some(header)).map_err(malformed)?;
        std::fs::write(path, bytes).map_err(Error::io(path))
    }

    /// Reads a saved trace.
    ///
    /// # Errors
    /// A file that is missing, damaged or no trace.
    pub fn load(path: &Path) -> Result<Self> {
        let malformed = |problem: String| Error::Malformed { path: path.into(), problem };
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let (_, header) =
            SafeTensors::read_metadata(&bytes).map_err(|e| malformed(format!("no trace: {e}")))?;
        let facts = header.metadata().clone().unwrap_or_default();
        if facts.get("format").map(String::as_str) != Some(FORMAT) {
            let problem = format!("not a trace of this version ({FORMAT}); record it again");
            return Err(malformed(problem));
        }
        let probes: Vec<Vec<u32>> = facts
            .get("probes")
            .and_then(|text| serde_json::from_str(text).ok())
            .ok_or_else(|| malformed("the header names no probes".into()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| malformed(e.to_string()))?;
        let mut tensors = file.tensors();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let mut activations = vec![Vec::new(); probes.len()];
        for (key, view) in tensors {
            let mut parts = key.splitn(3, '/');
            let probe = parts.next().and_then(|p| p.parse::<usize>().ok());
            let (_, name) = (parts.next(), parts.next());
            let shape = <[usize; 3]>::try_from(view.shape()).ok();
            let (Some(list), Some(name), Some(shape), Dtype::F32) =
                (probe.and_then(|p| activations.get_mut(p)), name, shape, view.dtype())
            else {
                return Err(malformed(format!("tensor `{key}` does not belong to a trace")));
            };
            let values =
                view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            list.push(Activation { name: name.into(), shape, values });
        }
        Ok(Self { probes, activations, logits: facts.get("logits").is_some_and(|l| l == "true") })
    }
}
