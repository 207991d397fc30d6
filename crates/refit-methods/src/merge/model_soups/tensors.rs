//! Learned by tensor: one softmax over the models for every tensor, by the exact gradient.
//!
//! Each step mixes the models, brings the mixture to life, and takes the gradient `G` of the mean cross-entropy of all held-out
//! examples by a backward pass. The derivative by the weight of model `k` in tensor `t` is `<G_t, theta_k,t>`: the models are read
//! one tensor at a time. The temperature `b` trains along where examples are labelled, and is dropped.

use std::collections::HashMap;

use burn::module::Module;
use burn::tensor::Tensor;
use refit_nn::config::TransformerConfig;
use refit_nn::load::stored_gradient;
use refit_nn::vision::Vision;
use refit_nn::{BurnDevice, Decoder, Run, Trainable, ops};
use refit_store::Artifact;
use refit_train::train::loss::{self, next_token};
use serde_json::{Value, json};

use super::heldout::{Candidate, HeldOut, cross_entropy};
use super::learn::{Mixture, by_weight};
use super::{Kitchen, ModelSoups};
use crate::error::Result;
use crate::inputs::Inputs;
use crate::merge::fold::Weights;
use crate::method::{Action, Context, Plan, Unit};

/// Gradients of a candidate's tensors by name, as the artifact stores them; mean loss; derivative by the temperature.
struct Backward {
    loss: f64,
    by_temperature: f64,
    by_tensor: HashMap<String, Vec<f32>>,
}

/// Finds the weights.
///
/// # Errors
/// Whatever mixing, running or differentiating the candidates meets.
pub(super) fn learn(
    method: &ModelSoups,
    inputs: &Inputs,
    plan: &Plan,
    cx: &Context,
) -> Result<(Weights, Value)> {
    let held_out = HeldOut::new(inputs, method.max_tokens)?;
    let count = inputs.models.len();
    let kitchen = Kitchen::new(inputs, plan, cx)?;
    let mut mixture = Mixture::uniform(count, plan.tensors.len());
    let rows = rows(inputs, plan);
    let mut losses = Vec::new();
    cx.progress.begin("learning", method.steps as u64 + 1, Unit::Steps);
    let mut work = || -> Result<()> {
        for step in 0..=method.steps {
            let weights = by_tensor(&mixture, &rows);
            let path = kitchen.mix(&weights)?;
            let artifact = Artifact::open(&path)?;
            if step == method.steps {
                losses.push(held_out.score(&artifact)?.loss);
                cx.progress.advance(1);
                break;
            }
            let found = backward(&held_out, &artifact, mixture.temperature)?;
            losses.push(found.loss);
            let mut derivative = vec![0.0; count * plan.tensors.len()];
            for (at, tensor) in plan.tensors.iter().enumerate() {
                let Some(gradient) = found.by_tensor.get(&tensor.name) else { continue };
                for (k, model) in inputs.models.iter().enumerate() {
                    let values = model.artifact.read_f32(&tensor.name)?;
                    derivative[rows[at] * count + k] += by_weight(gradient, &values);
                }
            }
            mixture.step(&derivative, found.by_temperature, method.learning_rate);
            cx.progress.advance(1);
        }
        Ok(())
    };
    let done = work();
    cx.progress.end();
    done?;
    let weights = by_tensor(&mixture, &rows);
    let Weights::ByTensor(all) = &weights else {
        unreachable!("invariant: `by_tensor` makes weights by tensor")
    };
    let named: serde_json::Map<String, Value> = plan
        .tensors
        .iter()
        .zip(all)
        .filter(|(tensor, _)| tensor.action == Action::Transform)
        .map(|(tensor, weights)| (tensor.name.clone(), json!(weights)))
        .collect();
    let report = json!({ "losses": losses, "coefficients_by_tensor": named });
    Ok((weights, report))
}

/// The row of weights that each tensor takes: its own, or that of the tensor it is tied to.
fn rows(inputs: &Inputs, plan: &Plan) -> Vec<usize> {
    let architecture = inputs.models[0].artifact.architecture();
    let place = |name: &str| plan.tensors.iter().position(|tensor| tensor.name == name);
    let tied = |name: &str| place(architecture.site(name)?.tied_to.as_deref()?);
    plan.tensors.iter().enumerate().map(|(at, t)| tied(&t.name).unwrap_or(at)).collect()
}

fn by_tensor(mixture: &Mixture, rows: &[usize]) -> Weights {
    let row = |&row: &usize| mixture.weights(row).into_iter().map(|w| w as f32).collect();
    Weights::ByTensor(rows.iter().map(row).collect())
}

/// Loss and gradients of a candidate over all held-out examples.
fn backward(held_out: &HeldOut, artifact: &Artifact, temperature: f64) -> Result<Backward> {
    let mut found = Backward { loss: 0.0, by_temperature: 0.0, by_tensor: HashMap::new() };
    match held_out.load(artifact)? {
        Candidate::Language(model) => language(held_out, artifact, model, &mut found)?,
        Candidate::Image(model) => {
            let candidate = Candidate::Image(model.train());
            labelled(held_out, &candidate, temperature, &mut found)?;
            if let Candidate::Image(Vision::EfficientNetLite(net)) = &candidate {
                for conv in net.convs() {
                    let read = |part: &str| artifact.read_f32(&format!("{}.{part}", conv.norm()));
                    let (mean, variance) = (read("running_mean")?, read("running_var")?);
                    let take = |all: &mut HashMap<String, Vec<f32>>, part: &str| {
                        all.remove(&format!("{}.{part}", conv.site)).unwrap_or_default()
                    };
                    let scale = take(&mut found.by_tensor, "scale");
                    let shift = take(&mut found.by_tensor, "shift");
                    let [weight, bias] = conv.unfold_gradient(&scale, &shift, &mean, &variance);
                    found.by_tensor.insert(format!("{}.weight", conv.norm()), weight);
                    found.by_tensor.insert(format!("{}.bias", conv.norm()), bias);
                }
            }
        }
        Candidate::Text(model) => {
            let config = model.config().clone();
            labelled(held_out, &Candidate::Text(model.train()), temperature, &mut found)?;
            as_stored(&config, artifact, &mut found)?;
        }
    }
    Ok(found)
}

/// A classifier: cross-entropy of its logits times the temperature.
fn labelled(
    held_out: &HeldOut,
    candidate: &Candidate,
    temperature: f64,
    found: &mut Backward,
) -> Result<()> {
    let device = BurnDevice::flex().autodiff();
    let count = held_out.len().max(1) as f64;
    for batch in held_out.batches() {
        let classes = held_out.classes_of(&batch);
        let logits = held_out.logits(candidate, &batch, &device)?;
        let known = logits.dims()[1];
        let (loss, slope) = cross_entropy(&ops::to_vec(&logits), known, &classes, temperature);
        found.loss += loss / count;
        found.by_temperature += slope / count;
        let targets: Vec<Option<u32>> = classes.iter().map(|class| Some(*class as u32)).collect();
        let mean = loss::cross_entropy(&targets, 0.0);
        let value = ops::logit_loss(logits * temperature, &mean) * (batch.len() as f64 / count);
        match candidate {
            Candidate::Image(model) => collect(model, value, found),
            Candidate::Text(model) => collect(model, value, found),
            Candidate::Language(model) => collect(model, value, found),
        }
    }
    Ok(())
}

/// A language model: next-token cross-entropy of windows of the held-out text.
fn language(
    held_out: &HeldOut,
    artifact: &Artifact,
    model: Decoder,
    found: &mut Backward,
) -> Result<()> {
    let windows = held_out.windows();
    let count = windows.iter().map(|window| window.len() - 1).sum::<usize>().max(1) as f64;
    let config = model.config().clone();
    let model = model.train();
    for window in windows {
        let (loss, tokens) = next_token(&model, window, 1, None, &mut Run::checkpointed())?;
        let share = tokens as f64 / count;
        let value: f32 = ops::to_vec(&loss.clone().inner())[0];
        found.loss += f64::from(value) * share;
        collect(&model, loss * share, found);
    }
    as_stored(&config, artifact, found)
}

/// Gradients of a transformer under the names and in the layout of its artifact.
fn as_stored(config: &TransformerConfig, artifact: &Artifact, found: &mut Backward) -> Result<()> {
    for (name, gradient) in std::mem::take(&mut found.by_tensor) {
        // A bare trunk keeps the layer before the head without its class's prefix.
        let bare = name.split_once('.').map(|(_, bare)| bare.to_owned());
        let name = match bare {
            Some(bare) if !artifact.contains(&name) => bare,
            _ => name,
        };
        let shape = &artifact.tensor(&name)?.shape;
        found.by_tensor.insert(name.clone(), stored_gradient(config, &name, shape, gradient));
    }
    Ok(())
}

/// Adds the gradients of a loss.
fn collect<M: Trainable>(model: &M, loss: Tensor<1>, found: &mut Backward) {
    let mut gradients = loss.backward();
    refit_nn::named::gradients(model, &mut gradients, |name, values| {
        match found.by_tensor.get_mut(name) {
            Some(sum) => sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
            None => drop(found.by_tensor.insert(name.to_owned(), values)),
        }
    });
}
