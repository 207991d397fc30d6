//! What can be known about a recipe before its first step: every method plans, every window is held against the
//! context of its model, and nothing is written.
//!
//! Models that the recipe makes do not exist yet. A method that keeps all names and shapes lets the model that it
//! was applied to stand in for its output; what follows from any other output is checked when it is there.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use refit_methods::method::{Inputs, ModelInput, Need, Plan, TextData};
use refit_methods::registry;
use refit_store::Artifact;
use serde_json::{Value, json};

use super::schema::{Recipe, Step, Work};
use crate::cli::App;
use crate::failure::{Failure, Result};
use crate::inputs::{self, Opened, Text};
use crate::labelled;
use crate::report::number;

/// Everything that was found out.
pub struct Preflight {
    /// Models that the recipe pulls, by step.
    pub pulls: BTreeMap<String, Found>,
    /// Plans of the methods, by step.
    plans: BTreeMap<String, Plan>,
    notes: Vec<String>,
}

/// A model that was pulled.
pub struct Found {
    /// The model.
    pub opened: Opened,
    /// The source it came from: the recipe's, or the fallback.
    pub used: String,
    /// What a reader must know about a fallback that was taken.
    pub note: Option<String>,
    /// Seconds that finding it, or fetching it, took.
    pub seconds: f64,
}

/// Checks a whole recipe: fetches what it pulls, plans what it applies.
pub fn check(app: &App, recipe: &Recipe, texts: &BTreeMap<String, Vec<Text>>) -> Result<Preflight> {
    let mut found = Preflight { pulls: BTreeMap::new(), plans: BTreeMap::new(), notes: Vec::new() };
    let mut models: BTreeMap<&str, Arc<Artifact>> = BTreeMap::new();
    for step in &recipe.steps {
        let checked = match &step.work {
            Work::Pull { source, fallback, .. } => {
                pull(app, source, fallback.as_deref()).map(|pulled| {
                    models.insert(&step.name, pulled.opened.artifact.clone());
                    found.pulls.insert(step.name.clone(), pulled);
                })
            }
            Work::Apply { .. } => apply(app, step, &models, texts, &recipe.data).map(|planned| {
                let Some((plan, stand_in)) = planned else { return };
                models.extend(stand_in.map(|artifact| (step.name.as_str(), artifact)));
                found.plans.insert(step.name.clone(), plan);
            }),
            Work::Eval { .. } => eval(step, &models),
            Work::Report { .. } => Ok(()),
        };
        checked.map_err(|failure| failure.within(format!("step `{}`", step.name)))?;
    }
    Ok(found)
}

/// Finds the model, or the fallback where nobody answers. A source that does answer, with something else than the
/// model, is a mistake or worse: no fallback hides it.
fn pull(app: &App, source: &str, fallback: Option<&str>) -> Result<Found> {
    let start = Instant::now();
    let found = |source: &str, path: PathBuf, note| {
        let opened = inputs::open_at(source, path)?;
        let seconds = start.elapsed().as_secs_f64();
        Ok(Found { opened, used: source.to_owned(), note, seconds })
    };
    match (inputs::reach(app, source, false), fallback) {
        (Ok(pulled), _) => found(source, pulled.path, None),
        (Err(error @ refit_store::Error::Unreachable { .. }), Some(other)) => {
            let note = format!(
                "{source} could not be had, so this run used {other} instead: the numbers are those of \
                 another model. ({error})"
            );
            app.progress.note(&format!("warning: {note}"));
            found(other, inputs::pull(app, other, false)?.path, Some(note))
        }
        (Err(error), _) => Err(error.into()),
    }
}

/// The plan of a step whose inputs are known, and the model that has its output's shapes.
fn apply(
    app: &App,
    step: &Step,
    models: &BTreeMap<&str, Arc<Artifact>>,
    texts: &BTreeMap<String, Vec<Text>>,
    sources: &BTreeMap<String, Vec<String>>,
) -> Result<Option<(Plan, Option<Arc<Artifact>>)>> {
    let Work::Apply { method, to, base, with, data, held_out, labelled, .. } = &step.work else {
        return Ok(None);
    };
    let entry = registry::get(method)?;
    let family = entry.info.family;
    let open = |source: &String| labelled::open_for(app, source, family);
    let labelled = labelled.as_ref().map(open).transpose()?;
    let method = entry.from_value(with)?;
    let trains = entry.info.inputs.data != Need::No;
    // The base comes first, as when the method is applied.
    let members: Vec<&String> =
        base.iter().chain(to.iter().filter(|name| Some(*name) != base.as_ref())).collect();
    let Some(parents) =
        members.iter().map(|name| models.get(name.as_str()).cloned()).collect::<Option<Vec<_>>>()
    else {
        return Ok(None);
    };
    parents.iter().try_for_each(|parent| parent.check_fit())?;
    let model = |(source, artifact): (&&String, &Arc<Artifact>)| ModelInput {
        source: (*source).clone(),
        artifact: artifact.clone(),
    };
    let learned = data.as_ref().filter(|_| trains).map_or(&[][..], |name| &sources[name]);
    let text = if trains { held_out } else { data };
    let text = text
        .iter()
        .flat_map(|name| texts.get(name).into_iter().flatten())
        .map(|text| TextData { source: text.source.clone(), text: text.text.clone() });
    let inputs = Inputs {
        models: members.iter().zip(&parents).map(model).collect(),
        base: base.as_ref().map(|_| 0),
        text: text.collect(),
        data: inputs::training(learned)?,
        labelled,
        ..Inputs::default()
    };
    let plan = method.plan(&inputs)?;
    let keeps = |artifact: &&Arc<Artifact>| {
        let tensors = artifact.tensors();
        plan.tensors.len() == tensors.len()
            && plan.tensors.iter().all(|planned| {
                artifact.tensor(&planned.name).is_ok_and(|tensor| tensor.shape == planned.shape)
            })
    };
    let stand_in = parents.iter().find(keeps).cloned();
    Ok(Some((plan, stand_in)))
}

/// Kind, window and budget against every model that is known.
fn eval(step: &Step, models: &BTreeMap<&str, Arc<Artifact>>) -> Result {
    let Work::Eval { models: measured, reference, window, max_tokens, .. } = &step.work else {
        return Ok(());
    };
    if let Some(few @ 0..2) = max_tokens {
        return Err(Failure::usage(format!(
            "`max_tokens: {few}`: at least 2 tokens are needed, since a window's first token is not scored"
        )));
    }
    if *window < 2 {
        return Err(Failure::usage(format!(
            "`window: {window}`: at least 2 tokens are needed, since a window's first token is not scored"
        )));
    }
    for name in measured.iter().chain(reference) {
        let Some(artifact) = models.get(name.as_str()) else { continue };
        inputs::check_kind(artifact, "eval")?;
        let context = artifact.architecture().dims.context;
        if let Some(context) = context.filter(|context| window > context) {
            return Err(Failure::usage(format!(
                "`window: {window}`: larger than the context of `{name}`, {context} tokens; use {context} or less"
            )));
        }
    }
    Ok(())
}

impl Preflight {
    /// Adds what planning itself had to do.
    #[must_use]
    pub fn noting(mut self, notes: Vec<String>) -> Self {
        self.notes.extend(notes);
        self
    }

    /// The steps for people: a headline each, with bytes and memory where a method was planned.
    pub fn text(&self, recipe: &Recipe) -> String {
        let mut text = String::new();
        for (i, step) in recipe.steps.iter().enumerate() {
            text.push_str(&format!("{}. {}\n", i + 1, step.headline()));
            if let Some(plan) = self.plans.get(&step.name) {
                text.push_str(&format!(
                    "   writes {}, peak memory about {}\n",
                    number::bytes(plan.output_bytes),
                    number::bytes(plan.peak_memory)
                ));
                for warning in &plan.warnings {
                    text.push_str(&format!("   warning: {warning}\n"));
                }
            } else if matches!(step.work, Work::Apply { .. }) {
                text.push_str("   planned when the models it takes are there\n");
            }
        }
        let bytes: u64 = self.plans.values().map(|plan| plan.output_bytes).sum();
        let memory = self.plans.values().map(|plan| plan.peak_memory).max();
        if let Some(memory) = memory {
            text.push_str(&format!(
                "in all {} on disk; the largest step of a method takes about {} of memory\n",
                number::bytes(bytes),
                number::bytes(memory)
            ));
        }
        for note in self.notes() {
            text.push_str(&format!("note: {note}\n"));
        }
        text
    }

    /// The same for programs.
    pub fn json(&self, recipe: &Recipe) -> Vec<Value> {
        let step = |step: &Step| {
            let plan = self.plans.get(&step.name);
            json!({
                "name": step.name,
                "does": step.headline(),
                "output_bytes": plan.map(|plan| plan.output_bytes),
                "peak_memory": plan.map(|plan| plan.peak_memory),
                "warnings": plan.map(|plan| &plan.warnings),
            })
        };
        recipe.steps.iter().map(step).collect()
    }

    /// What a reader of the plan must know.
    pub fn notes(&self) -> Vec<&str> {
        let taken = self.pulls.values().filter_map(|found| found.note.as_deref());
        self.notes.iter().map(String::as_str).chain(taken).collect()
    }
}
