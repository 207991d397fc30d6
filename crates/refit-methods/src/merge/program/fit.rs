//! What of several models fits together: which tensors, in which types.

use refit_store::architecture::Role;
use refit_store::{Artifact, DType};

use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::merge::group::Part;
use crate::rewrite::OutputType;

/// The type of a merged tensor.
#[derive(Clone, Copy, Debug)]
pub enum Stored {
    /// As a flag says; models of different types leave the choice to the user.
    Chosen(OutputType),
    /// This one, or the narrowest that holds those of all models, as PyTorch promotes them.
    Promoted(Option<DType>),
}

impl Stored {
    /// The type for a tensor whose sources have these; `None` where they leave it open.
    pub fn of(self, types: &[DType]) -> Option<DType> {
        match self {
            Self::Chosen(out) => {
                let first = out.of(types[0]);
                types.iter().all(|other| out.of(*other) == first).then_some(first)
            }
            Self::Promoted(Some(fixed)) => Some(fixed),
            Self::Promoted(None) => {
                let first = OutputType::Auto.of(types[0]);
                let alike = types.iter().all(|other| OutputType::Auto.of(*other) == first);
                Some(if alike { first } else { DType::F32 })
            }
        }
    }
}

/// The stored tensor that a model has under this name, be it that of the tensor it is tied to.
pub fn stored<'a>(artifact: &'a Artifact, name: &'a str) -> Option<&'a str> {
    if artifact.contains(name) {
        return Some(name);
    }
    let tied = artifact.architecture().site(name)?.tied_to.as_deref()?;
    artifact.contains(tied).then_some(tied)
}

/// Buffers that some versions of a library save and others compute: absent from a model without harm.
pub fn is_buffer(name: &str) -> bool {
    ["rotary_emb.inv_freq", "position_ids", "attn.masked_bias", "attn.bias", "attention.bias"]
        .iter()
        .any(|end| name.ends_with(end))
}

/// The tensors of models of one shape: those of the first, and a head that only some of them tie.
pub fn names(models: &[ModelInput]) -> Result<Vec<String>> {
    let first = &models[0].artifact;
    let mut names: Vec<String> = first.tensors().iter().map(|info| info.name.clone()).collect();
    for model in &models[1..] {
        let everywhere = |name: &String| stored(&model.artifact, name).is_some();
        let absent = names.iter().find(|name| !everywhere(name) && !is_buffer(name));
        if let Some(name) = absent {
            return Err(missing(&models[0], model, name, "second"));
        }
        names.retain(everywhere);
        let extra = model.artifact.tensors().iter().map(|info| &info.name);
        for name in extra.filter(|name| !first.contains(name) && !is_buffer(name)) {
            if models.iter().any(|other| stored(&other.artifact, name).is_none()) {
                return Err(missing(&models[0], model, name, "first"));
            }
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
    }
    Ok(names)
}

fn missing(first: &ModelInput, second: &ModelInput, tensor: &str, in_the: &str) -> Error {
    Error::Mismatch {
        first: first.source.clone(),
        second: second.source.clone(),
        problem: format!(
            "tensor `{tensor}` is missing in the {in_the}; models of a merge have the same tensors"
        ),
    }
}

/// Whether rows of a tensor belong to tokens.
pub fn is_vocabulary(artifact: &Artifact, name: &str) -> bool {
    let architecture = artifact.architecture();
    let Some(site) = architecture.site(name) else { return false };
    let rows = site.shape.first().copied();
    let embed =
        architecture.with_role(Role::Embed).next().and_then(|site| site.shape.first().copied());
    match site.role {
        Role::Embed => true,
        Role::Head | Role::Bias => site.layer.is_none() && rows.is_some() && rows == embed,
        _ => false,
    }
}

/// What PyTorch calls a type in a configuration.
pub(super) fn torch_name(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some("float32"),
        DType::F16 => Some("float16"),
        DType::BF16 => Some("bfloat16"),
        _ => None,
    }
}

pub(super) fn same_bytes(models: &[ModelInput], a: &Part, b: &Part) -> Result<bool> {
    let (left, right) = (&models[a.model].artifact, &models[b.model].artifact);
    let bytes = left.tensor(&a.tensor)?.nbytes;
    if right.tensor(&b.tensor)?.nbytes != bytes {
        return Ok(false);
    }
    let (mut x, mut y) = (vec![0u8; 1 << 16], vec![0u8; 1 << 16]);
    for start in (0..bytes).step_by(1 << 16) {
        let len = (bytes - start).min(1 << 16) as usize;
        left.read_raw_into(&a.tensor, start, &mut x[..len])?;
        right.read_raw_into(&b.tensor, start, &mut y[..len])?;
        if x[..len] != y[..len] {
            return Ok(false);
        }
    }
    Ok(true)
}
