//! What files would take, without writing them.

use std::collections::HashSet;

use refit_store::formats::gguf::write::Fields;

use super::decide::How;
use super::seen::Seen;
use super::{Export, Target, blocks};
use crate::emit::file_bytes;
use crate::error::Result;
use crate::inputs::ModelInput;
use crate::method::Plan;

/// What exports of one model would take: what all of them share is worked out once.
pub struct Forecast<'a> {
    model: &'a ModelInput,
    /// Metadata of a GGUF file; `None` where the model has none.
    fields: Option<Fields>,
    linears: HashSet<&'a str>,
}

/// What an export would take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Foreseen {
    /// Bytes of the weight files, headers and metadata included.
    pub bytes: u64,
    /// Bytes of the linears' codes, scales and zero points, or of their float values.
    pub linears: u64,
    /// Whether every grid that was seen is kept: no codes become float values again.
    pub keeps_grids: bool,
}

impl<'a> Forecast<'a> {
    /// Of a model.
    pub fn of(model: &'a ModelInput) -> Self {
        let linears = model.artifact.architecture().linears().map(|site| &*site.name).collect();
        Self { model, fields: blocks::fields(&Export::default(), model, &[]).ok(), linears }
    }

    /// What an export of the model seen so would take.
    ///
    /// # Errors
    /// As the export's plan.
    pub fn foresee(&self, export: &Export, seen: &Seen) -> Result<Foreseen> {
        let decisions = export.decide(self.model, seen, &mut Plan::of(export))?;
        let mut foreseen = Foreseen { bytes: 0, linears: 0, keeps_grids: true };
        let mut parts = Vec::new();
        for decision in &decisions {
            let source = decision.source.as_deref().unwrap_or_default();
            let own = decision.parts();
            if self.linears.contains(source) {
                let bytes = own.iter().filter_map(|(_, shape, dtype)| dtype.bytes_of(shape));
                foreseen.linears += bytes.sum::<u64>();
            }
            foreseen.keeps_grids &= decision.how != How::Plain || !seen.grids.contains_key(source);
            parts.extend(own);
        }
        let fields = match (export.to, &self.fields) {
            (Target::Gguf, Some(fields)) => Some(fields.clone()),
            (Target::Gguf, None) => Some(blocks::fields(export, self.model, &[])?),
            _ => None,
        };
        foreseen.bytes = file_bytes(parts, fields)?;
        Ok(foreseen)
    }
}
