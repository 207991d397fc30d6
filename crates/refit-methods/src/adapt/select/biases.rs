//! Biases for a Llama that has none.

use burn::module::Param;
use burn::tensor::Tensor;
use refit_nn::Decoder;
use refit_store::SideFile;
use refit_store::architecture::Role;
use refit_train::train::{Rule, Scope};
use serde_json::json;

use super::BitFit;
use crate::adapt::frame::{Session, rounds};
use crate::adapt::training;
use crate::emit::serialize;
use crate::error::{Error, Result};
use crate::method::{Action, Context, Inputs, Method, Output, Plan, PlannedTensor};
use crate::rewrite;

const NAME: &str = BitFit::INFO.name;
/// What trains, as patterns on tensor names.
const TRAINED: [&str; 2] = ["*.self_attn.o_proj.bias", "*.mlp.down_proj.bias"];

/// The plan: the model as it is, and a bias for every linear of a block.
///
/// # Errors
/// Models that have biases, and families whose class has no place for them; what [`training::examples`] refuses.
pub(super) fn plan(method: &BitFit, inputs: &Inputs, has_biases: bool) -> Result<Plan> {
    let model = &inputs.models[0];
    let conflict = |problem: String| Err(Error::Conflict { method: NAME, problem });
    if has_biases {
        return conflict(format!(
            "{} has biases of its own; leave --add-biases out and these train",
            model.source
        ));
    }
    let examples = training::examples(NAME, inputs, &method.training, 0)?;
    let config = training::language_model(NAME, model)?;
    if config.model_type != "llama" {
        return conflict(format!(
            "--add-biases: {} is of type `{}`, and only the class of `llama` in transformers has a place for biases that a \
             config switches on; `ln-tuning` trains the norms, `lora` adds what can be trained",
            model.source, config.model_type
        ));
    }
    let mut plan = rewrite::plan(method, model, &[], method.dtype);
    let mut trained = 0;
    for site in model.artifact.architecture().linears() {
        let Some((out, _)) = site.out_in() else { continue };
        let stored = model.artifact.tensor(&site.name)?.dtype;
        let dtype = method.dtype.of(stored);
        let shape = vec![out];
        let bytes = dtype.bytes_of(&shape).unwrap_or(0);
        plan.output_bytes += bytes;
        if matches!(site.role, Role::O | Role::Down) {
            trained += out as u64;
        }
        let name = format!("{}.bias", site.module());
        let action = Action::Transform;
        plan.tensors.push(PlannedTensor { name, shape, dtype: dtype.to_string(), bytes, action });
        if rounds(dtype) && plan.notes.is_empty() {
            plan.notes.push(
                "biases are trained in f32 and rounded once to 16 bits when they are written (--dtype f32 keeps them)"
                    .into(),
            );
        }
    }
    plan.tensors.sort_by(|a, b| a.name.cmp(&b.name));
    training::describe(&mut plan, model, &config, &method.training, &examples, trained);
    Ok(plan)
}

/// Adds the biases, trains those that write to the residual stream, and writes the model.
///
/// # Errors
/// As [`Session::train`].
pub(super) fn run(method: &BitFit, inputs: &Inputs, plan: &Plan, cx: &Context) -> Result<Output> {
    let training = &method.training;
    let examples = training::examples(NAME, inputs, training, 0)?;
    let rate = method.learning_rate;
    let session = Session { inputs, plan, cx, training, rate, dropout: 0.0 };
    let prepare = |model: &mut Decoder, _: &mut refit_data::Rng| -> Result<Scope> {
        for linear in model.blocks.iter_mut().flat_map(|block| block.linears_mut()) {
            let weight = linear.weight();
            let out = weight.dims()[0];
            linear.bias = Some(Param::from_tensor(Tensor::zeros([out], &weight.device())));
        }
        let rules = [Rule::freeze("@all")].into_iter().chain(TRAINED.map(Rule::train));
        Ok(Scope { rules: rules.collect() })
    };
    let mut trained = session.train(&examples, prepare, |_| {})?;
    let mut config = inputs.models[0].artifact.config().raw().clone();
    config.insert("attention_bias".into(), json!(true));
    config.insert("mlp_bias".into(), json!(true));
    let mut bytes = serialize("config.json", &config)?;
    bytes.push(b'\n');
    trained.add_file(SideFile::from_bytes("config.json", bytes));
    trained.write_model(&session)
}
