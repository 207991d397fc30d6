//! Adapters from disk on a model that runs.
//!
//! What a change of weights expresses (LoRA, DoRA, (IA)³, LoHa, LoKr, norms, whole tensors) is merged into the weights in memory,
//! so it costs nothing when the model runs; prefixes, prompts and bottlenecks are attached as parts of their own.

use std::collections::BTreeSet;

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use refit_store::adapter::{Adapter, Change, Form, Part, Prompt, Values};

use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::load::layout_of;
use crate::operator::Linear;
use crate::ops::Activation;
use crate::side::{Bottleneck, HeadAdapter, Prefix};
use crate::{Trainable, named};

/// `decoder` with `adapter` on it.
///
/// # Errors
/// Sites that the model does not hold, shapes that do not fit, activations without an implementation.
pub fn attach(mut decoder: Decoder, adapter: &Adapter) -> Result<Decoder> {
    let device = decoder.frame.embed.weight.val().device();
    for part in adapter.parts() {
        match &part.form {
            Form::Bottleneck { .. } => side(&mut decoder, part, &device)?,
            Form::Heads { .. } => heads(&mut decoder, part, &device)?,
            _ => {}
        }
    }
    let names: BTreeSet<String> = decoder.parameters().into_iter().map(|p| p.name).collect();
    let changes = adapter.changes(|name| names.contains(name));
    for part in adapter.parts().iter().filter(|part| part.form.mergeable()) {
        if !names.contains(&part.tensor()) {
            untie(&mut decoder, part, &device)?;
        }
    }
    let (family, offset) = (decoder.config().model_type.clone(), decoder.config().norm_offset);
    let mut failed = None;
    let mut decoder = named::edit(decoder, |name, shape, values| {
        let mut new = values();
        for change in changes.get(name)? {
            let done = change.apply(&mut new, shape, layout_of(&family, name));
            if let Err(error) = done {
                failed.get_or_insert(error);
            }
            if offset && matches!(change, Change::Weight(Form::LayerNorm { .. })) {
                // Gemma's files hold the scale less one.
                new.iter_mut().for_each(|w| *w += 1.0);
            }
        }
        Some(new)
    });
    if let Some(error) = failed {
        return Err(error.into());
    }
    match adapter.prompt() {
        Some(Prompt::Prefix { table, .. }) => {
            refuse_windows(&decoder)?;
            let columns = 2 * decoder.config().layers * kv_width(&decoder);
            decoder.frame.prefix = Some(Prefix::from_table(matrix(table, columns, &device)?));
        }
        Some(Prompt::Input { table, .. }) => {
            let table = matrix(table, decoder.config().hidden, &device)?;
            decoder.frame.prompt = Some(Param::from_tensor(table));
        }
        None => {}
    }
    Ok(decoder)
}

/// Refuses a prefix where a sliding window would pass over it.
///
/// # Errors
/// Models with sliding windows.
pub fn refuse_windows(decoder: &Decoder) -> Result<()> {
    match decoder.config().windows.iter().any(Option::is_some) {
        true => Err(Error::Invalid(
            "the model attends through sliding windows, which would lose a prefix; take another adapter".into(),
        )),
        false => Ok(()),
    }
}

fn kv_width(decoder: &Decoder) -> usize {
    decoder.config().kv_heads * decoder.config().head_dim
}

/// A head of its own for a model that shares it with the embedding.
fn untie(decoder: &mut Decoder, part: &Part, device: &Device) -> Result<()> {
    let tensor = part.tensor();
    match &part.form {
        Form::Full { values, .. } if tensor == "lm_head.weight" && decoder.frame.head.is_none() => {
            let weight = matrix(values, decoder.config().hidden, device)?;
            decoder.frame.head = Some(Linear::dense("lm_head", weight, None));
            Ok(())
        }
        _ => Err(Error::Missing { name: tensor }),
    }
}

fn matrix(values: &Values, columns: usize, device: &Device) -> Result<Tensor<2>> {
    let rows = values.values.len() / columns.max(1);
    if rows * columns != values.values.len() {
        return Err(Error::Shape {
            name: "prompt_embeddings".into(),
            found: values.shape.clone(),
            expected: vec![rows, columns],
        });
    }
    Ok(Tensor::from_data(TensorData::new(values.values.clone(), [rows, columns]), device))
}

/// Attaches an adapter to every head of the block whose output projection the part names.
fn heads(decoder: &mut Decoder, part: &Part, device: &Device) -> Result<()> {
    let Form::Heads { keys, values, scale, activation } = &part.form else { return Ok(()) };
    let site = part.site.as_str();
    let softmax = match activation.as_str() {
        "relu" => false,
        "softmax" => true,
        name => {
            let problem = "an adapter of every head has relu or softmax";
            return Err(Error::Invalid(format!("{site}: {problem}, found `{name}`")));
        }
    };
    let tensor =
        |part: &Values| -> Result<Param<Tensor<3>>> {
            let shape: [usize; 3] = part.shape.clone().try_into().map_err(|found| {
                Error::Shape { name: format!("{site}.adapter_keys"), found, expected: vec![0; 3] }
            })?;
            let data = TensorData::new(part.values.clone(), shape);
            Ok(Param::from_tensor(Tensor::from_data(data, device)))
        };
    let adapter = HeadAdapter {
        keys: tensor(keys)?,
        values: tensor(values)?,
        scale: f64::from(*scale),
        softmax,
    };
    match decoder.blocks.iter_mut().find(|block| block.mixer.o.site == site) {
        Some(block) => {
            block.mixer.head_adapter = Some(adapter);
            Ok(())
        }
        None => Err(Error::Missing { name: site.to_owned() }),
    }
}

/// Attaches a bottleneck beside the linear that the part names.
fn side(decoder: &mut Decoder, part: &Part, device: &Device) -> Result<()> {
    let Form::Bottleneck { down, down_bias, up, up_bias, scale, activation, sequential, position } =
        &part.form
    else {
        return Ok(());
    };
    let kind = match activation.as_str() {
        "none" | "linear" | "identity" => None,
        name => Some(Activation::from_name(name).ok_or_else(|| {
            Error::Invalid(format!("{}: no activation is called `{name}`", part.site))
        })?),
    };
    let linear = |name: &str, values: &Values, bias: &[f32]| {
        let shape = [values.rows(), values.columns()];
        let weight = Tensor::from_data(TensorData::new(values.values.clone(), shape), device);
        let bias = Tensor::<1>::from_floats(bias, device);
        Linear::dense(format!("{}.{name}", part.site), weight, Some(bias))
    };
    let new = Bottleneck {
        down: linear("adapter_down", down, down_bias),
        up: linear("adapter_up", up, up_bias),
        activation: kind,
        scale: f64::from(*scale),
        gain: None,
        sequential: *sequential,
    };
    let site = part.site.as_str();
    for block in &mut decoder.blocks {
        let place = match position.as_str() {
            "heads" if block.mixer.o.site == site => &mut block.mixer.side,
            "attention" if block.mixer.o.site == site => &mut block.mixer_side,
            "ffn" if block.ffn.down_site() == site => &mut block.ffn_side,
            _ => continue,
        };
        *place = Some(new);
        return Ok(());
    }
    Err(Error::Missing { name: format!("{site} (a bottleneck at `{position}`)") })
}
