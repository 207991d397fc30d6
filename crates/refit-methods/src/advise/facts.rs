//! What is known of a model before any method is looked at.

use refit_store::WeightGrid;
use refit_store::weight_grid;
use serde::Serialize;

use crate::error::Result;
use crate::inputs::ModelInput;

/// Parameters from which a model counts as a real large one. That the survey splits its literature in two was read; where, is
/// recalled.
pub const REAL_LARGE: u64 = 1_000_000_000;

/// What was found out about a model.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    /// As it was typed.
    pub source: String,
    /// The architecture.
    pub model_type: String,
    /// Whether the architecture is known, and not inferred from names and shapes.
    pub known: bool,
    /// Elements of all tensors.
    pub parameters: u64,
    /// What they take as they are stored.
    pub bytes: u64,
    /// Which defaults suit it.
    pub size_class: SizeClass,
    /// The grid that its weights lie on, if any.
    pub grid: WeightGrid,
}

/// The survey's two classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SizeClass {
    /// Training all weights is an option.
    Medium,
    /// No training, or adapters.
    RealLarge,
}

impl SizeClass {
    /// That of so many parameters.
    pub fn of(parameters: u64) -> Self {
        if parameters < REAL_LARGE { Self::Medium } else { Self::RealLarge }
    }
}

impl Facts {
    /// Of a model.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub fn of(model: &ModelInput) -> Result<Self> {
        let artifact = &*model.artifact;
        let parameters = artifact.tensors().iter().map(|info| info.numel() as u64).sum();
        let stored = |info: &refit_store::TensorInfo| {
            artifact.stored_bytes(&info.name).unwrap_or(info.nbytes)
        };
        Ok(Self {
            source: model.source.clone(),
            model_type: artifact.architecture().model_type.clone(),
            known: !artifact.architecture().inferred,
            parameters,
            bytes: artifact.tensors().iter().map(stored).sum(),
            size_class: SizeClass::of(parameters),
            grid: weight_grid::detect(artifact)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_classes_part_at_a_billion() {
        assert_eq!(SizeClass::of(REAL_LARGE - 1), SizeClass::Medium);
        assert_eq!(SizeClass::of(REAL_LARGE), SizeClass::RealLarge);
    }
}
