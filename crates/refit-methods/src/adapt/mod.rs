//! Adapting a model to examples: adapters that are a thousandth of the model, and fine-tuning that touches all or part of it.
//!
//! | file | what |
//! |---|---|
//! | [`training`] | the parameters of a run that all methods share, and the examples |
//! | [`frame`] | load, attach, train, measure, write: what every method here fills |
//! | [`target`] | which linears an adapter sits on |
//! | [`probe`] | classification heads: on frozen features, and with what stands under them |
//! | the others | one method each |
//!
//! Base weights that do not train get no gradient, no optimizer state and no decay.

pub mod compander;
pub mod finetune;
pub mod frame;
pub mod galore;
pub mod hft;
pub mod ia3;
pub mod lora;
pub mod merge;
pub mod probe;
pub mod select;
pub mod target;
pub mod training;
pub mod unified;

use refit_store::adapter::AdapterConfig;
use serde_json::{Value, json};

use crate::error::Result;
use crate::inputs::Inputs;
use crate::method::{Action, Method, Plan, PlannedTensor};
use crate::registry::Entry;

/// The methods of this family.
pub const METHODS: &[Entry] = &[
    Entry::of::<lora::Lora>(),
    Entry::of::<lora::Dora>(),
    Entry::of::<ia3::Ia3>(),
    Entry::of::<unified::UnifiedPeft>(),
    Entry::of::<select::BitFit>(),
    Entry::of::<select::LnTuning>(),
    Entry::of::<probe::LinearProbe>(),
    Entry::of::<probe::LpFt>(),
    Entry::of::<finetune::FineTune>(),
    Entry::of::<hft::Hft>(),
    Entry::of::<galore::GaLore>(),
    Entry::of::<compander::WeightCompander>(),
    Entry::of::<hft::reset::HalfReset>(),
    Entry::of::<merge::MergeAdapter>(),
];

/// The plan of a method that writes an adapter with these tensors.
///
/// # Errors
/// Data and models that cannot be trained on; `reserved` positions are taken by virtual tokens.
fn adapter_plan<M: Method>(
    method: &M,
    inputs: &Inputs,
    training: &training::Training,
    tensors: Vec<(String, Vec<usize>)>,
    reserved: usize,
) -> Result<Plan> {
    let examples = training::examples(M::INFO.name, inputs, training, reserved)?;
    let config = training::language_model(M::INFO.name, &inputs.models[0])?;
    let mut plan = Plan::of(method);
    let mut trained = 0;
    for (name, shape) in tensors {
        let count = shape.iter().product::<usize>() as u64;
        trained += count;
        plan.output_bytes += 4 * count;
        plan.tensors.push(PlannedTensor {
            name,
            shape,
            dtype: "F32".into(),
            bytes: 4 * count,
            action: Action::Transform,
        });
    }
    training::describe(&mut plan, &inputs.models[0], &config, training, &examples, trained);
    Ok(plan)
}

/// A configuration with what every adapter states of itself.
fn adapter_config(inputs: &Inputs, own: Value) -> AdapterConfig {
    let mut config = json!({
        "base_model_name_or_path": inputs.models[0].source,
        "revision": null,
        "inference_mode": true,
        "auto_mapping": null,
        "modules_to_save": null,
    });
    for (key, value) in own.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    let map = config.as_object().cloned().unwrap_or_default();
    AdapterConfig::new(map)
}
