//! What compressed-tensors says of the inputs of packed linears.

use refit_nn::rounding::Rounding;
use refit_store::DType;
use refit_store::architecture::Site;
use serde_json::{Value, json};

use super::Activations;
use super::decide::{Decision, How};
use crate::error::Result;
use crate::inputs::ModelInput;
use crate::quantize::activations;

/// What is said.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    /// Nothing.
    Nothing,
    /// 8 bits with a scale for every token.
    Token,
    /// 8 bits with a fixed scale and a zero point from 0 to 255 for every linear, by module.
    Fixed(Vec<(String, f32, f32)>),
}

/// Parts that a fixed scale adds to a linear.
const PARTS: [&str; 2] = ["input_scale", "input_zero_point"];

/// The weight of the linear that a part belongs to, and whether it is the scale; `None` for other tensors.
pub fn linear_of(name: &str) -> Option<(String, bool)> {
    let stem = |part: &str| name.strip_suffix(part)?.strip_suffix('.');
    let (scale, zero) = (stem(PARTS[0]), stem(PARTS[1]));
    Some((format!("{}.weight", scale.or(zero)?), scale.is_some()))
}

/// What is said of the inputs of these linears; notes say what the format has no word for.
///
/// # Errors
/// A statement of the model that cannot be understood.
pub fn decide(
    asked: Activations,
    model: &ModelInput,
    packed: &[&Site],
    notes: &mut Vec<String>,
) -> Result<Said> {
    match asked {
        Activations::None => return Ok(Said::Nothing),
        Activations::Int8 => return Ok(Said::Token),
        Activations::Stated => {}
    }
    let stated = activations::stated(&model.artifact)?;
    if stated.is_empty() {
        return Ok(Said::Nothing);
    }
    let rounding = |site: &&Site| stated.roundings.get(&format!("{}:in", site.module()));
    let found: Vec<Option<&Rounding>> = packed.iter().map(rounding).collect();
    if stated.roundings.len() > found.iter().flatten().count() {
        notes.push(
            "what the model states within attention has no word in compressed-tensors".into(),
        );
    }
    if found.iter().all(|rounding| matches!(rounding, Some(Rounding::Token { bits: 8 }))) {
        return Ok(Said::Token);
    }
    let fixed = |(site, rounding): (&&Site, &Option<&Rounding>)| match rounding {
        Some(Rounding::Tensor { bits: 8, scale, zero })
            if (0.0..=255.0).contains(zero) && zero.fract() == 0.0 =>
        {
            Some((site.module().to_owned(), *scale, *zero))
        }
        _ => None,
    };
    let fixed: Option<Vec<_>> = packed.iter().zip(&found).map(fixed).collect();
    Ok(match fixed {
        Some(fixed) => Said::Fixed(fixed),
        None => {
            notes.push(
                "what the model states of activations has no word in compressed-tensors, which has 8 bits per token, or \
                 with a fixed scale and zero point for every linear: readers will not round them"
                    .into(),
            );
            Said::Nothing
        }
    })
}

impl Said {
    /// The `input_activations` of the configuration.
    pub fn settings(&self) -> Value {
        match self {
            Self::Nothing => Value::Null,
            Self::Token => json!({
                "num_bits": 8, "type": "int", "symmetric": true, "strategy": "token", "dynamic": true,
            }),
            Self::Fixed(_) => json!({
                "num_bits": 8, "type": "int", "symmetric": false, "strategy": "tensor", "dynamic": false,
            }),
        }
    }

    /// Tensors of their own; codes are signed.
    pub fn parts(&self) -> Vec<Decision> {
        let Self::Fixed(fixed) = self else { return Vec::new() };
        let part = |module: &str, part: &str, dtype: DType, value: f32| Decision {
            source: None,
            name: format!("{module}.{part}"),
            shape: vec![1],
            dtype: dtype.to_string(),
            how: How::Made(vec![value]),
            packed: None,
        };
        let parts = |(module, scale, zero): &(String, f32, f32)| {
            [
                part(module, PARTS[0], DType::F32, *scale),
                part(module, PARTS[1], DType::I8, zero - 128.0),
            ]
        };
        fixed.iter().flat_map(parts).collect()
    }
}
