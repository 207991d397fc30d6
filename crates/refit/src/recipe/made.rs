//! What a step wrote, opened again and described.

use std::path::Path;

use refit_methods::method::Family;
use refit_store::Artifact;
use refit_store::adapter::Adapter;
use serde_json::Value;

use super::record::ArtifactRecord;
use crate::engine;
use crate::failure::Result;

/// What a step wrote.
pub enum Made {
    /// A model.
    Model(Box<Artifact>),
    /// An adapter.
    Adapter(Box<Adapter>),
}

impl Made {
    /// Opens what lies there.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(match Adapter::is_adapter(path) {
            true => Self::Adapter(Box::new(Adapter::open(path)?)),
            false => Self::Model(Box::new(Artifact::open(path)?)),
        })
    }

    /// BLAKE3 over its tensors.
    pub fn content_hash(&self) -> Result<String> {
        Ok(match self {
            Self::Model(artifact) => artifact.content_hash()?,
            Self::Adapter(adapter) => adapter.content_hash()?,
        })
    }

    /// A record with its numbers of parameters and bytes.
    pub fn sizes(&self) -> ArtifactRecord {
        match self {
            Self::Model(artifact) => sizes(artifact),
            Self::Adapter(adapter) => {
                let parts: usize = adapter.parts().iter().map(|p| p.form.parameters()).sum();
                let prompt = adapter.prompt().map_or(0, |p| p.table().values.len());
                let parameters = (parts + prompt) as u64;
                ArtifactRecord {
                    parameter_count: parameters,
                    bytes: 4 * parameters,
                    ..ArtifactRecord::default()
                }
            }
        }
    }
}

/// A record with a model's numbers of parameters and bytes.
pub fn sizes(artifact: &Artifact) -> ArtifactRecord {
    ArtifactRecord {
        parameter_count: artifact.tensors().iter().map(|t| t.numel() as u64).sum(),
        bytes: artifact.tensors().iter().map(|t| t.nbytes).sum(),
        ..ArtifactRecord::default()
    }
}

/// Fills in what a packed file would need. Quantizers say it in their report; for pruned models it is
/// one bit per weight for the mask and two bytes per weight that is left.
pub fn describe_savings(
    record: &mut ArtifactRecord,
    made: &Artifact,
    out: &Path,
    family: Family,
) -> Result {
    record.packed_bytes = record.report["packed_bytes"].as_u64();
    record.bits_per_weight = record.report["bits_per_weight"].as_f64();
    if let Some(details) = engine::side_json(out, "refit.quantization.json")?
        && let Some(tensors) = details["tensors"].as_object()
        && let Value::Object(report) = &mut record.report
    {
        let groups = tensors.iter().map(|(name, t)| (name.clone(), t["group"].clone()));
        report.insert("groups".to_owned(), Value::Object(groups.collect()));
    }
    if family == Family::Prune {
        let (mut weights, mut zeros, mut dense) = (0u64, 0u64, 0u64);
        for site in made.architecture().linears() {
            let values = made.read_f32(&site.name)?;
            weights += values.len() as u64;
            zeros += values.iter().filter(|v| **v == 0.0).count() as u64;
            dense += made.tensor(&site.name)?.nbytes;
        }
        record.sparsity = (weights > 0).then(|| zeros as f64 / weights as f64);
        let packed = record.bytes - dense + weights.div_ceil(8) + 2 * (weights - zeros);
        record.packed_bytes.get_or_insert(packed);
    }
    Ok(())
}
