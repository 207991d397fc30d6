//! An adapter on disk in PEFT's layout, with lineage and card, complete or not at all.

use std::path::{Path, PathBuf};

use super::config::{AdapterConfig, Dialect, FILE_NAME};
use super::form::{Factor, Form, Part, Prompt, Side, Values};
use super::read::{PREFIX, PROMPT, Reader, Stored, sort};
use crate::artifact::SideFile;
use crate::card::{Card, Fact, Relation};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::lineage::Lineage;
use crate::writer::{ArtifactWriter, TensorSpec, WritePlan};

/// Name of the weight file.
pub const WEIGHTS_NAME: &str = "adapter_model.safetensors";

/// Writes an adapter to the directory `out`: `adapter_config.json`, `adapter_model.safetensors` (f32), the manifest
/// and the card. It appears under its name when it is complete. The configuration is written as it is, unknown keys
/// included; [`AdapterConfig::describe`] makes one from the parts.
///
/// What was just laid out is read back by the rules of [`Adapter::open`](super::Adapter::open) before anything is
/// written: a configuration that says another rank or scale than the parts have is an error, not a wrong adapter.
///
/// # Errors
/// [`Error::BadPlan`] when configuration and parts contradict each other, [`Error::OutputExists`] without `force`, and
/// whatever the file system refuses.
#[allow(clippy::too_many_arguments)]
pub fn write(
    out: &Path,
    config: &AdapterConfig,
    parts: &[Part],
    prompt: Option<&Prompt>,
    lineage: Lineage,
    mut card: Card,
    force: bool,
    side_files: Vec<SideFile>,
) -> Result<PathBuf> {
    let tensors = tensors_of(out, config, parts, prompt)?;
    verify(out, config, parts, prompt, &tensors)?;
    let mut files = vec![SideFile::from_bytes(FILE_NAME, config.to_json())];
    files.extend(side_files.into_iter().filter(|file| file.name != FILE_NAME));
    let spec = |(name, values): &Stored| TensorSpec {
        name: name.clone(),
        shape: values.shape.clone(),
        dtype: DType::F32,
    };
    let plan = WritePlan {
        tensors: tensors.iter().map(spec).collect(),
        weights_name: Some(WEIGHTS_NAME),
        side_files: files,
        identity: String::from_utf8_lossy(&config.to_json()).into_owned(),
        force,
        ..WritePlan::default()
    };
    let writer = ArtifactWriter::create(out, plan)?;
    for (name, values) in &tensors {
        writer.write_f32(name, 0, &values.values)?;
        writer.done(name)?;
    }
    card.relation = card.relation.or(Some(Relation::Adapter));
    if config.dialect() == Some(Dialect::Peft) && card.library == "transformers" {
        card.library = "peft".to_owned();
    }
    if card.format.known().is_none() {
        card.format = Fact::Known("safetensors".to_owned());
    }
    if card.parameters.known().is_none() {
        let count = tensors.iter().map(|(_, values)| values.values.len() as u64).sum();
        card.parameters = Fact::Known([(DType::F32.to_string(), count)].into());
    }
    writer.finish(lineage, card)
}

fn bad(out: &Path, reason: String) -> Error {
    Error::BadPlan { out: out.to_owned(), reason }
}

/// Every tensor under its name in the file.
fn tensors_of(
    out: &Path,
    config: &AdapterConfig,
    parts: &[Part],
    prompt: Option<&Prompt>,
) -> Result<Vec<Stored>> {
    match config.dialect() {
        Some(Dialect::Peft | Dialect::Refit) => {}
        Some(Dialect::AdapterHub) | None => {
            let reason = "refit writes adapters with `peft_type` or `refit_type`; make the configuration with \
                          `AdapterConfig::describe`";
            return Err(bad(out, reason.to_owned()));
        }
    }
    let mut tensors = Vec::new();
    for part in parts {
        let site = &part.site;
        let mut put = |end: &str, shape: &[usize], values: &[f32]| {
            let values = Values { shape: shape.to_vec(), values: values.to_vec() };
            tensors.push((format!("{PREFIX}{site}.{end}"), values));
        };
        let mut whole = |end: &str, v: &Values| put(end, &v.shape, &v.values);
        match &part.form {
            Form::Lora { a, b, magnitude, bias, .. } => {
                whole("lora_A.weight", a);
                whole("lora_B.weight", b);
                if let Some(m) = magnitude {
                    // PEFT keeps a kernel's magnitude in the kernel's own dimensions.
                    let mut shape = vec![m.len()];
                    if a.shape.len() > 2 {
                        shape = vec![1; a.shape.len()];
                        shape[1] = m.len();
                    }
                    put("lora_magnitude_vector", &shape, m);
                }
                if let Some(bias) = bias {
                    put("lora_B.bias", &[bias.len()], bias);
                }
            }
            Form::EmbeddingLora { a, b, .. } => {
                whole("lora_embedding_A", a);
                whole("lora_embedding_B", b);
            }
            Form::Ia3 { factors, side: Side::Output } => put("ia3_l", &[factors.len(), 1], factors),
            Form::Ia3 { factors, side: Side::Input } => put("ia3_l", &[1, factors.len()], factors),
            Form::Loha { w1_a, w1_b, w2_a, w2_b, .. } => {
                whole("hada_w1_a", w1_a);
                whole("hada_w1_b", w1_b);
                whole("hada_w2_a", w2_a);
                whole("hada_w2_b", w2_b);
            }
            Form::Lokr { w1, w2, .. } => {
                for (factor, full, a, b) in [
                    (w1, "lokr_w1", "lokr_w1_a", "lokr_w1_b"),
                    (w2, "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
                ] {
                    match factor {
                        Factor::Full(values) => whole(full, values),
                        Factor::LowRank(left, right) => {
                            whole(a, left);
                            whole(b, right);
                        }
                    }
                }
            }
            Form::LayerNorm { weight, bias } => {
                put("ln_tuning_layers.weight", &[weight.len()], weight);
                if let Some(bias) = bias {
                    put("ln_tuning_layers.bias", &[bias.len()], bias);
                }
            }
            Form::Full { tensor, values } => {
                // Where PEFT wraps the module, the base's own tensor lies one level further down.
                let wrapped = parts
                    .iter()
                    .any(|other| other.site == *site && !matches!(other.form, Form::Full { .. }));
                let below = if wrapped { "base_layer" } else { "" };
                whole(format!("{below}{tensor}").trim_start_matches('.'), values);
            }
            Form::Delta { tensor, values } => whole(&format!("delta{tensor}"), values),
            Form::Heads { keys, values, .. } => {
                whole("adapter_keys", keys);
                whole("adapter_values", values);
            }
            Form::Bottleneck { down, down_bias, up, up_bias, .. } => {
                whole("adapter_down.weight", down);
                whole("adapter_up.weight", up);
                put("adapter_down.bias", &[down_bias.len()], down_bias);
                put("adapter_up.bias", &[up_bias.len()], up_bias);
            }
        }
    }
    if let Some(prompt) = prompt {
        tensors.push((PROMPT.to_owned(), prompt.table().clone()));
    }
    Ok(tensors)
}

/// Reads back what will be written and compares.
fn verify(
    out: &Path,
    config: &AdapterConfig,
    parts: &[Part],
    prompt: Option<&Prompt>,
    tensors: &[Stored],
) -> Result<()> {
    for (name, values) in tensors {
        if let Some(index) = values.values.iter().position(|x| !x.is_finite()) {
            let value = values.values[index];
            return Err(bad(out, format!("tensor `{name}`: element {index} is {value}")));
        }
    }
    let (config_path, weights) = (out.join(FILE_NAME), out.join(WEIGHTS_NAME));
    let reader = Reader { config_path: &config_path, weights: &weights, config };
    let read = reader
        .read(tensors.to_vec())
        .map_err(|error| bad(out, format!("configuration and parts do not agree: {error}")))?;
    let mut wanted = parts.to_vec();
    sort(&mut wanted);
    if let Some((wanted, read)) = wanted.iter().zip(&read.parts).find(|(a, b)| a != b) {
        let (wanted, read) = (describe(wanted), describe(read));
        return Err(bad(out, format!("the part {wanted} would be read back as {read}")));
    }
    if wanted.len() != read.parts.len() || read.prompt.as_ref() != prompt {
        let reason = "the configuration describes another prompt or other parts than those given";
        return Err(bad(out, reason.to_owned()));
    }
    Ok(())
}

fn describe(part: &Part) -> String {
    let scale = match &part.form {
        Form::Lora { scale, .. }
        | Form::EmbeddingLora { scale, .. }
        | Form::Loha { scale, .. }
        | Form::Lokr { scale, .. }
        | Form::Heads { scale, .. }
        | Form::Bottleneck { scale, .. } => format!(" with scale {scale}"),
        _ => String::new(),
    };
    format!("`{}` ({}{scale})", part.site, part.form.name())
}
