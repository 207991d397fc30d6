//! What a merge remembers of its ingredients: enough to go on, to check them, and to make it again.

use refit_store::SideFile;
use serde::{Deserialize, Serialize};

use crate::emit::serialize;
use crate::error::{Error, Result};
use crate::inputs::ModelInput;

/// Name of the file beside the weights.
pub const FILE_NAME: &str = "refit.opcm.json";

/// The state of a merge.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    /// Layout of this file.
    pub version: u32,
    /// Content hash of the base.
    pub base: String,
    /// `lambda_t`: what the sum of the parts was divided by.
    pub lambda: f64,
    /// The models that were added, in their order.
    pub ingredients: Vec<Ingredient>,
}

/// One model that was added.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ingredient {
    /// What the user typed.
    pub source: String,
    /// Content hash of the model.
    pub content_hash: String,
    /// `|theta_i - theta_0|` over all tensors that are merged.
    pub norm: f64,
    /// `lambda` after it was added.
    pub lambda: f64,
    /// `alpha` with which it was added.
    pub alpha: f64,
}

impl Ledger {
    /// An empty one.
    pub fn new(base: String) -> Self {
        Self { version: 1, base, lambda: 1.0, ingredients: Vec::new() }
    }

    /// The ledger that travels with a model, where there is one.
    ///
    /// # Errors
    /// A file that is no ledger of this version.
    pub fn of(model: &ModelInput) -> Result<Option<Self>> {
        let files = model.artifact.side_files();
        let Some(file) = files.iter().find(|file| file.name == FILE_NAME) else { return Ok(None) };
        let bad = |problem: String| Error::BadData {
            source_name: format!("{}/{FILE_NAME}", model.source),
            problem: format!("{problem}; without its ledger a merge cannot go on"),
        };
        let bytes = file.read().map_err(|error| bad(error.to_string()))?;
        let ledger: Self =
            serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
        let sound = ledger.lambda > 0.0
            && ledger.lambda.is_finite()
            && !ledger.ingredients.is_empty()
            && ledger.ingredients.iter().all(|one| one.norm > 0.0 && one.norm.is_finite());
        match (ledger.version, sound) {
            (1, true) => Ok(Some(ledger)),
            (1, false) => Err(bad("its numbers make no sense".into())),
            (version, _) => Err(bad(format!("version {version} is not known here"))),
        }
    }

    /// Mean norm of the ingredients.
    pub fn mean_norm(&self) -> f64 {
        let sum: f64 = self.ingredients.iter().map(|one| one.norm).sum();
        sum / self.ingredients.len().max(1) as f64
    }

    /// As a file beside the weights.
    ///
    /// # Errors
    /// None in practice: plain data always serializes.
    pub fn file(&self) -> Result<SideFile> {
        Ok(SideFile::from_bytes(FILE_NAME, serialize("ledger", &serde_json::json!(self))?))
    }
}
