//! What a model says about its activations: how they are rounded while it runs.
//!
//! Two files may say it. compressed-tensors has `input_activations` in the configuration of its groups; what refit's own methods
//! write beside decoded weights is `activations` in `refit.quantization.json`, by the names of taps. Either becomes a
//! [`Rounder`], and `refit eval` measures the model through it.

use std::collections::BTreeMap;

use refit_nn::rounding::{Rounder, Rounding};
use refit_store::Artifact;
use refit_store::architecture::Site;
use refit_store::formats::packed::group_of;
use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::quantize::record::FILE_NAME;

/// The rounding of activations that an artifact states; empty when it states none.
///
/// # Errors
/// A statement that cannot be understood or simulated: files with another content than they should have, floating-point or
/// grouped activations.
pub fn stated(artifact: &Artifact) -> Result<Rounder> {
    let bad = |file: &str, problem: String| Error::BadData {
        source_name: artifact.path().join(file).display().to_string(),
        problem,
    };
    let settings = artifact.config().raw().get("quantization_config");
    let packed = artifact.packed() == Some("compressed-tensors");
    if let Some(settings) = settings.filter(|_| packed) {
        return compressed(artifact, settings).map_err(|problem| bad("config.json", problem));
    }
    let Some(file) = artifact.side_files().iter().find(|file| file.name == FILE_NAME) else {
        return Ok(Rounder::default());
    };
    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        activations: BTreeMap<String, Rounding>,
    }
    let file: File = serde_json::from_slice(&file.read()?)
        .map_err(|error| bad(FILE_NAME, format!("not a record of quantization: {error}")))?;
    for (name, rounding) in &file.activations {
        check(rounding).map_err(|problem| bad(FILE_NAME, format!("`{name}`: {problem}")))?;
        if let (Some(width), Some(site)) = (rounding.width(), name.strip_suffix(":in")) {
            let site = artifact.architecture().site(&format!("{site}.weight"));
            let inputs = site.and_then(|site| site.out_in()).map(|(_, inputs)| inputs);
            if inputs.is_some_and(|inputs| inputs != width) {
                let problem = format!("`{name}`: {width} scales for {inputs:?} inputs");
                return Err(bad(FILE_NAME, problem));
            }
        }
    }
    Ok(Rounder { roundings: file.activations })
}

fn check(rounding: &Rounding) -> Result<(), String> {
    let good = |x: &f32| x.is_finite();
    let numbers = match rounding {
        Rounding::Tensor { scale, zero, .. } => good(scale) && good(zero) && *scale > 0.0,
        Rounding::Channel { scales, zeros, .. } => {
            scales.len() == zeros.len() && scales.iter().chain(zeros).all(good)
        }
        Rounding::Log2 { scale, .. } | Rounding::LogSqrt2 { scale, .. } => {
            good(scale) && *scale > 0.0
        }
        Rounding::Token { .. } | Rounding::ChannelDynamic { .. } => true,
    };
    match (2..=8).contains(&rounding.bits()) && numbers {
        true => Ok(()),
        false => Err("2 to 8 bits and positive scales were expected".into()),
    }
}

/// Every linear of the blocks rounded alike, token by token.
pub fn per_token(artifact: &Artifact, bits: u8) -> Rounder {
    let mut rounder = Rounder::default();
    for site in artifact.architecture().linears() {
        rounder.insert(format!("{}:in", site.module()), Rounding::Token { bits });
    }
    rounder
}

/// What compressed-tensors' settings say of the inputs of packed linears.
fn compressed(artifact: &Artifact, settings: &Value) -> Result<Rounder, String> {
    let mut rounder = Rounder::default();
    for site in artifact.architecture().linears() {
        let module = site.module();
        let lattice = artifact.stored_lattice(&site.name).map_err(|error| error.to_string())?;
        let Some(inputs) = group_of(module, settings)
            .filter(|_| lattice.is_some())
            .and_then(|group| group["input_activations"].as_object())
        else {
            continue;
        };
        let says = |key: &str| inputs.get(key).and_then(Value::as_str).unwrap_or_default();
        let bits = inputs.get("num_bits").and_then(Value::as_u64).unwrap_or(8);
        let dynamic = inputs.get("dynamic").is_some_and(|set| *set == true);
        let symmetric = inputs.get("symmetric").is_none_or(|set| *set == true);
        let rounding = match (says("type"), says("strategy"), dynamic) {
            ("int" | "", "token", true) if symmetric => Rounding::Token { bits: bits as u8 },
            ("int" | "", "tensor", false) if (2..=8).contains(&bits) => {
                fixed_of(artifact, site, bits as u8)?
            }
            (kind, strategy, _) => {
                return Err(format!(
                    "activations of type `{kind}` with strategy `{strategy}`, dynamic {dynamic}, symmetric {symmetric} are                      not simulated; symmetric dynamic scales per token and fixed ones per tensor are. `--activations none`                      measures the weights alone"
                ));
            }
        };
        check(&rounding).map_err(|problem| format!("`{module}`: {problem}"))?;
        rounder.insert(format!("{module}:in"), rounding);
    }
    Ok(rounder)
}

/// `input_scale` and `input_zero_point` of a linear; codes there are signed.
fn fixed_of(artifact: &Artifact, site: &Site, bits: u8) -> Result<Rounding, String> {
    let found = artifact.stored_input(&site.name).map_err(|error| error.to_string())?;
    let (scale, zero) = found.ok_or_else(|| {
        format!("`{}` has no input_scale; download the model again", site.module())
    })?;
    Ok(Rounding::Tensor { bits, scale, zero: zero + f32::from(1u16 << (bits - 1)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_numbers_are_refused() {
        let tensor = |bits, scale| Rounding::Tensor { bits, scale, zero: 3.0 };
        assert!(check(&tensor(8, 0.1)).is_ok());
        assert!(check(&tensor(9, 0.1)).is_err());
        assert!(check(&tensor(8, 0.0)).is_err());
        assert!(check(&tensor(8, f32::NAN)).is_err());
        let channel = Rounding::Channel { bits: 4, scales: vec![1.0], zeros: vec![] };
        assert!(check(&channel).is_err());
        assert!(check(&Rounding::LogSqrt2 { bits: 4, scale: -1.0 }).is_err());
    }
}
