//! What becomes of every tensor: decided while planning, carried out by [`super::write`], checked by [`super::prove`].

use std::collections::BTreeMap;

use refit_store::DType;
use refit_store::formats::packed::words_of;
use refit_store::lattice::Lattice;
use serde::{Deserialize, Serialize};

use super::seen::Seen;
use super::{Export, NAME};
use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::method::Plan;

/// How the values of a tensor are said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum How {
    /// Its blocks are copied.
    Raw,
    /// As a float type that holds them, or is asked for.
    Plain,
    /// With the codes and steps that they have.
    Codes(Lattice),
    /// Rounded to a block type's own grid: values change.
    Quantize,
    /// Made by the export; the source has no such tensor.
    Made(Vec<f32>),
}

/// One tensor of the output, or the parts of one packed linear.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// Name in the source, which is that of Hugging Face.
    pub source: Option<String>,
    /// Name in the output; the stem of the parts of a packed linear.
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Type in the output, by name; that of the scales of a packed linear.
    pub dtype: String,
    /// How.
    pub how: How,
    /// A packed linear: codes, scales and zero points in tensors of their own.
    pub packed: Option<Packing>,
}

/// How a linear is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packing {
    /// The layout.
    pub parts: Parts,
    /// The grid that the format says: at least as wide as the source's, in groups that divide its groups.
    pub lattice: Lattice,
}

/// The layout of a packed linear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Parts {
    /// compressed-tensors, words.
    Words,
    /// compressed-tensors, bytes.
    Bytes,
    /// GPTQ.
    Gptq,
}

impl Decision {
    /// A tensor of its own.
    pub fn whole(source: &str, name: String, shape: &[usize], dtype: DType, how: How) -> Self {
        let (source, shape) = (Some(source.to_owned()), shape.to_vec());
        Self { source, name, shape, dtype: dtype.to_string(), how, packed: None }
    }

    /// Its type.
    pub fn dtype(&self) -> DType {
        DType::parse(&self.dtype).expect("invariant: decisions name types by their display")
    }

    /// Name, shape and type of everything that is written.
    pub fn parts(&self) -> Vec<(String, Vec<usize>, DType)> {
        let Some(Packing { parts, lattice }) = self.packed else {
            return vec![(self.name.clone(), self.shape.clone(), self.dtype())];
        };
        let (out, inputs) = (self.shape[0], self.shape[1]);
        let groups = inputs / lattice.group;
        let part = |name: &str, shape: &[usize], dtype| {
            (format!("{}.{name}", self.name), shape.to_vec(), dtype)
        };
        let words = |codes: usize| words_of(codes, lattice.bits);
        match parts {
            Parts::Words => {
                let mut all = vec![
                    part("weight_packed", &[out, words(inputs)], DType::I32),
                    part("weight_scale", &[out, groups], self.dtype()),
                    part("weight_shape", &[2], DType::I64),
                ];
                if !lattice.symmetric {
                    all.push(part("weight_zero_point", &[words(out), groups], DType::I32));
                }
                all
            }
            Parts::Bytes => {
                let mut all = vec![
                    part("weight", &[out, inputs], DType::I8),
                    part("weight_scale", &[out, groups], self.dtype()),
                ];
                if !lattice.symmetric {
                    all.push(part("weight_zero_point", &[out, groups], DType::I8));
                }
                all
            }
            Parts::Gptq => vec![
                part("qweight", &[words(inputs), out], DType::I32),
                part("qzeros", &[groups, words(out)], DType::I32),
                part("scales", &[groups, out], self.dtype()),
                part("g_idx", &[inputs], DType::I32),
            ],
        }
    }
}

/// The float type that holds every value of a stored type.
pub fn float_of(dtype: DType) -> DType {
    match dtype {
        DType::Ggml(_) | DType::F64 => DType::F32,
        DType::F8E4M3 | DType::F8E5M2 => DType::F16,
        plain => plain,
    }
}

/// Decoded weights in safetensors.
///
/// # Errors
/// None beyond those of the plan's other parts.
pub fn plain(export: &Export, model: &ModelInput, seen: &Seen) -> Result<Vec<Decision>> {
    let decide = |info: &refit_store::TensorInfo| {
        let dtype = match (info.dtype.is_float(), export.r#type.0) {
            (true, Some(dtype)) => dtype,
            (true, None) if matches!(info.dtype, DType::Ggml(_)) => DType::F32,
            _ => info.dtype,
        };
        Decision::whole(&info.name, info.name.clone(), &info.shape, dtype, How::Plain)
    };
    let decisions: Vec<Decision> = seen.tensors.iter().map(decide).collect();
    match decisions.is_empty() {
        false => Ok(decisions),
        true => Err(Error::NothingToDo {
            model: model.source.clone(),
            what: "tensors",
            advice: format!("{NAME} writes weights; `refit inspect` shows what the file holds"),
        }),
    }
}

/// Says in the plan what becomes of how many tensors.
pub fn describe(decisions: &[Decision], plan: &mut Plan) {
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for decision in decisions {
        let what = match (&decision.how, decision.packed) {
            (How::Raw, _) => format!("copy the {} blocks", decision.dtype),
            (How::Plain, _) => format!("write as {}", decision.dtype),
            (How::Codes(lattice), None) => {
                format!(
                    "say the codes of a {}-bit grid per {} as {}",
                    lattice.bits, lattice.group, decision.dtype
                )
            }
            (How::Codes(_), Some(Packing { lattice, .. })) => {
                let kind = if lattice.symmetric { "symmetric" } else { "asymmetric" };
                format!(
                    "pack the codes of a {kind} {}-bit grid per {}",
                    lattice.bits, lattice.group
                )
            }
            (How::Quantize, _) => format!("quantize to {} (values change)", decision.dtype),
            (How::Made(_), _) if super::inputs::linear_of(&decision.name).is_some() => {
                "say the fixed scale of an input".to_owned()
            }
            (How::Made(_), _) => format!("make `{}`", decision.name),
        };
        *kinds.entry(what).or_default() += 1;
    }
    for (what, count) in kinds {
        let tensors = if count == 1 { "tensor" } else { "tensors" };
        plan.steps.push(format!("{what}: {count} {tensors}"));
    }
}
