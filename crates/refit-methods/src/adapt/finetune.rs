//! Fine-tuning: every parameter trains, or those that patterns name.
//!
//! What trains is written in the model's own layout; everything else is copied byte for byte.

use clap::Args;
use refit_data::Rng;
use refit_nn::Decoder;
use refit_store::DType;
use refit_train::train::{Rule, Scope};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::frame::{Session, rounds};
use super::training::{self, Training};
use crate::error::{Error, Result};
use crate::factorize::layout;
use crate::method::{
    Action, Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper,
    Plan, Taxonomy, Touches,
};
use crate::rewrite::{self, OutputType};

/// Parameters of fine-tuning.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct FineTune {
    /// Tensors that train: globs on their names (`*.mlp.*`), `@matrix`, `@norm`, `@bias`, `@all`.
    #[arg(long, value_delimiter = ',', default_value = "@all")]
    pub train: Vec<String>,
    /// Tensors that stay as they are, out of those that would train.
    #[arg(long, value_delimiter = ',')]
    pub freeze: Vec<String>,
    /// Peak learning rate.
    #[arg(long, default_value_t = 2e-5)]
    pub learning_rate: f64,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
    /// The run.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

crate::paper_defaults!(FineTune);

impl FineTune {
    fn scope(&self) -> Scope {
        let freeze = self.freeze.iter().map(Rule::freeze);
        let rules = std::iter::once(Rule::freeze("@all"))
            .chain(self.train.iter().map(Rule::train))
            .chain(freeze);
        Scope { rules: rules.collect() }
    }
}

impl Method for FineTune {
    const INFO: Info = Info {
        name: "fine-tune",
        title: "Fine-tuning",
        summary: "Trains all parameters, or those that patterns name, on examples and writes the whole model",
        family: Family::Adapt,
        paper: Paper { title: "", reference: "", year: 0 },
        inputs: InputSpec::TUNED,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["adaptation", "full"],
            needs: Effort::FineTuning,
            touches: &[Touches::Weights],
            composes_with: &["model-soups", "rtn", "finequant"],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        self.training.check(Self::INFO.name, self.learning_rate)?;
        model_plan(self, inputs, &self.training, self.dtype, &self.scope())
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        run_model(
            Self::INFO.name,
            inputs,
            plan,
            cx,
            &self.training,
            self.learning_rate,
            self.scope(),
        )
    }
}

/// The plan of a method that trains tensors of the model itself.
///
/// # Errors
/// As [`training::examples`]; patterns that match nothing.
pub(super) fn model_plan<M: Method>(
    method: &M,
    inputs: &Inputs,
    training: &Training,
    dtype: OutputType,
    scope: &Scope,
) -> Result<Plan> {
    let model = &inputs.models[0];
    let examples = training::examples(M::INFO.name, inputs, training, 0)?;
    let config = training::language_model(M::INFO.name, model)?;
    let parameters: Vec<refit_nn::Parameter> = model
        .artifact
        .tensors()
        .iter()
        .filter(|info| info.dtype.is_float() || matches!(info.dtype, DType::Ggml(_)))
        .map(|info| refit_nn::Parameter {
            id: Default::default(),
            name: info.name.clone(),
            shape: info.shape.clone(),
            trainable: true,
        })
        .collect();
    let groups = scope.resolve(&parameters)?;
    let architecture = model.artifact.architecture();
    let mut trains: std::collections::HashSet<&str> = parameters
        .iter()
        .zip(&groups)
        .filter(|(_, group)| group.train)
        .map(|(parameter, _)| parameter.name.as_str())
        .collect();
    // A tensor that is stored twice is one parameter: the copy follows.
    for site in &architecture.sites {
        match &site.tied_to {
            Some(first) if trains.contains(first.as_str()) => trains.insert(&site.name),
            Some(_) => trains.remove(site.name.as_str()),
            None => false,
        };
    }
    let changed: Vec<_> =
        architecture.sites.iter().filter(|site| trains.contains(site.name.as_str())).collect();
    let mut plan = rewrite::plan(method, model, &changed, dtype);
    for tensor in &mut plan.tensors {
        tensor.action = match trains.contains(tensor.name.as_str()) {
            true => Action::Transform,
            false => Action::Copy,
        };
    }
    layout::keep_pairs(&mut plan, model);
    let trained = parameters
        .iter()
        .filter(|p| trains.contains(p.name.as_str()))
        .filter(|p| architecture.site(&p.name).is_none_or(|site| site.tied_to.is_none()))
        .map(|p| p.shape.iter().product::<usize>() as u64)
        .sum();
    training::describe(&mut plan, model, &config, training, &examples, trained);
    let rounded = |name: &String| DType::from_safetensors(name).is_some_and(rounds);
    if plan.tensors.iter().any(|t| t.action == Action::Transform && rounded(&t.dtype)) {
        plan.notes.push(
            "trained in f32 and rounded once to 16 bits when it is written; updates smaller than half a step are lost \
             (--dtype f32 keeps them)"
                .into(),
        );
    }
    Ok(plan)
}

/// Trains what `scope` says and writes the model.
///
/// # Errors
/// As [`Session::train`].
pub(super) fn run_model(
    method: &'static str,
    inputs: &Inputs,
    plan: &Plan,
    cx: &Context,
    training: &Training,
    rate: f64,
    scope: Scope,
) -> Result<Output> {
    let examples = training::examples(method, inputs, training, 0)?;
    let session = Session { inputs, plan, cx, training, rate, dropout: 0.0 };
    let prepare = |decoder: &mut Decoder, _: &mut Rng| {
        layout::install_stored(decoder, &inputs.models[0])?;
        Ok(scope)
    };
    let trained = session.train(&examples, prepare, |_| {})?;
    trained.write_model(&session)
}

/// Refuses patterns on a model that has nothing of the kind.
pub(super) fn nothing(model: &str, what: &'static str, advice: &str) -> Error {
    Error::NothingToDo { model: model.to_owned(), what, advice: advice.to_owned() }
}
