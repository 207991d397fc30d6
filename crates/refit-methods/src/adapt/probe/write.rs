//! The classifier as a model directory: the trunk under the names of its classification class, the head, and a config that
//! names the classes.

use std::collections::HashMap;
use std::path::PathBuf;

use refit_nn::BurnDevice;
use refit_nn::classifier::{Dense, HeadForm, head_form, own_dense};
use refit_nn::load::Loader;
use refit_nn::operator::Linear;
use refit_nn::ops;
use refit_store::SideFile;
use refit_store::architecture::Kind;
use refit_train::logistic::Head;
use serde_json::{Map, Value, json};

use crate::emit::{Emitter, serialize};
use crate::error::{Error, Result};
use crate::inputs::{Inputs, ModelInput};
use crate::method::{Action, Context, Method, Plan, PlannedTensor, Unit};
use crate::rewrite::{OutputType, copy_as};

/// Where every tensor of the output comes from.
pub(super) struct Layout {
    /// How the family stores its head.
    pub form: HeadForm,
    /// Name in the output and in the model, of what is kept.
    kept: Vec<(String, String)>,
    /// Whether the layer before the head is a new one.
    pub new_dense: bool,
    /// Columns of the head.
    pub width: usize,
}

impl Layout {
    /// The layout of a classifier on `model`. Heads of other kinds, and what the class has no place for, are left out.
    ///
    /// # Errors
    /// Model types without a head; [`Dense::Own`] on a model without such a layer.
    pub fn of(method: &'static str, model: &ModelInput, dense: Dense) -> Result<Self> {
        let artifact = &*model.artifact;
        let architecture = artifact.architecture();
        let family = artifact.config().model_type().unwrap_or(&architecture.model_type);
        let form = head_form(family).ok_or_else(|| Error::Conflict {
            method,
            problem: format!("{}: no classification head for type `{family}`", model.source),
        })?;
        let mut layout = Self { form, kept: Vec::new(), new_dense: false, width: 0 };
        if form.class.is_empty() {
            let head = format!("{}.", form.site);
            let others = artifact.tensors().iter().filter(|info| !info.name.starts_with(&head));
            layout.kept = others.map(|info| (info.name.clone(), info.name.clone())).collect();
            layout.kept.sort();
            let weight = artifact.tensor(&format!("{}.weight", form.site))?;
            layout.width = weight.shape.get(1).copied().unwrap_or(0);
            return Ok(layout);
        }
        let loader = Loader::new(artifact, &BurnDevice::flex())?;
        layout.width = loader.config().hidden;
        for info in artifact.tensors() {
            let Some(bare) = info.name.strip_prefix(loader.prefix()) else { continue };
            let known = architecture.site(&info.name).is_some();
            // Masks of image pretraining have no place in a classifier.
            if known && loader.in_trunk(bare) && bare != "embeddings.mask_token" {
                layout.kept.push((format!("{}{bare}", form.prefix), info.name.clone()));
            }
        }
        if let Some((site, _)) = form.dense {
            match own_dense(artifact, &loader, site).filter(|_| dense != Dense::PassThrough) {
                Some(own) => layout.kept.extend(
                    ["weight", "bias"]
                        .map(|part| (format!("{site}.{part}"), format!("{own}.{part}"))),
                ),
                None if dense == Dense::Own => {
                    return Err(Error::NothingToDo {
                        model: model.source.clone(),
                        what: "layer between the first token and the head",
                        advice: format!(
                            "{} has `{site}` there; `--pooler pass-through` makes one that lets the vector pass",
                            form.class
                        ),
                    });
                }
                None => layout.new_dense = true,
            }
        }
        layout.kept.sort();
        Ok(layout)
    }

    /// The tensor of the model that becomes `name`.
    fn source(&self, name: &str) -> Option<&str> {
        let found = self.kept.binary_search_by(|(to, _)| to.as_str().cmp(name));
        found.ok().map(|at| self.kept[at].1.as_str())
    }

    /// The plan of a method that writes this layout; with `trains`, all of it changes.
    ///
    /// # Errors
    /// Tensors that are not there.
    pub fn plan<M: Method>(
        &self,
        method: &M,
        model: &ModelInput,
        classes: usize,
        dtype: OutputType,
        trains: bool,
    ) -> Result<Plan> {
        let mut plan = Plan::of(method);
        let mut add = |name: String, shape: Vec<usize>, from: refit_store::DType, action| {
            let dtype = dtype.of(from);
            let bytes = dtype.bytes_of(&shape).unwrap_or(0);
            plan.output_bytes += bytes;
            plan.tensors.push(PlannedTensor {
                name,
                shape,
                dtype: dtype.to_string(),
                bytes,
                action,
            });
        };
        for (to, from) in &self.kept {
            let info = model.artifact.tensor(from)?;
            let changes = trains && info.dtype.is_float() && !is_statistic(from);
            let action = if changes { Action::Transform } else { Action::Copy };
            add(to.clone(), info.shape.clone(), info.dtype, action);
        }
        let f32 = refit_store::DType::F32;
        let width = self.width;
        if let Some((site, _)) = self.form.dense.filter(|_| self.new_dense) {
            add(format!("{site}.weight"), vec![width, width], f32, Action::Transform);
            add(format!("{site}.bias"), vec![width], f32, Action::Transform);
        }
        add(format!("{}.weight", self.form.site), vec![classes, width], f32, Action::Transform);
        if self.form.bias {
            add(format!("{}.bias", self.form.site), vec![classes], f32, Action::Transform);
        }
        plan.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(plan)
    }

    /// Notes on choices that the user did not make.
    pub fn notes(&self, model: &ModelInput) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some((site, activation)) = self.form.dense.filter(|_| self.new_dense) {
            notes.push(format!(
                "{} has no `{site}` of its own, or it is not wanted: a diagonal layer lets the first token's vector pass through \
                 {activation:?} nearly unbent",
                model.source
            ));
        }
        let decoder = model.artifact.architecture().kind == Kind::Decoder;
        if decoder && pad_token(model).is_none() {
            notes.push(
                "no padding token is known: transformers will classify one text at a time (set pad_token_id in config.json)".into(),
            );
        }
        notes
    }
}

/// Running statistics of a normalization, which training leaves alone.
fn is_statistic(name: &str) -> bool {
    ["running_mean", "running_var", "num_batches_tracked"].iter().any(|end| name.ends_with(end))
}

/// The padding token: the config's, else the tokenizer's.
fn pad_token(model: &ModelInput) -> Option<u64> {
    let stated = model.artifact.config().usize("pad_token_id").map(|id| id as u64);
    stated.or_else(|| model.tokenizer().ok()?.special().pad.map(u64::from))
}

/// `config.json` of the classifier.
fn config(layout: &Layout, model: &ModelInput, classes: &[String]) -> Result<SideFile> {
    let artifact = &model.artifact;
    let mut config: Map<String, Value> = artifact.config().raw().clone();
    config.entry("model_type").or_insert_with(|| json!(artifact.architecture().model_type.clone()));
    if !layout.form.class.is_empty() {
        config.insert("architectures".into(), json!([layout.form.class]));
    }
    let names = classes.iter().enumerate();
    let id2label: Map<String, Value> =
        names.clone().map(|(i, name)| (i.to_string(), json!(name))).collect();
    let label2id: Map<String, Value> = names.map(|(i, name)| (name.clone(), json!(i))).collect();
    config.insert("num_labels".into(), json!(classes.len()));
    config.insert("id2label".into(), Value::Object(id2label));
    config.insert("label2id".into(), Value::Object(label2id));
    config.insert("problem_type".into(), json!("single_label_classification"));
    if artifact.architecture().kind == Kind::Decoder
        && let Some(pad) = pad_token(model)
    {
        config.insert("pad_token_id".into(), json!(pad));
    }
    let mut bytes = serialize("config.json", &config)?;
    bytes.push(b'\n');
    Ok(SideFile::from_bytes("config.json", bytes))
}

/// Values that the output holds instead of the model's, by the output's names.
#[derive(Default)]
pub(super) struct Values(pub HashMap<String, Vec<f32>>);

impl Values {
    /// Weight and bias of a linear.
    pub fn linear(&mut self, linear: &Linear) {
        self.0.insert(format!("{}.weight", linear.site), ops::to_vec(&linear.weight()));
        if let Some(bias) = &linear.bias {
            self.0.insert(format!("{}.bias", linear.site), ops::to_vec(&bias.val()));
        }
    }

    /// A fitted head.
    pub fn head(&mut self, site: &str, head: Head) {
        self.0.insert(format!("{site}.weight"), head.weight);
        if let Some(bias) = head.bias {
            self.0.insert(format!("{site}.bias"), bias);
        }
    }
}

/// Writes the classifier: new values where there are some, by the output's or the model's names, everything else byte for byte.
///
/// # Errors
/// Whatever the disk refuses; values that the output's type cannot hold.
pub(super) fn write(
    layout: &Layout,
    classes: &[String],
    inputs: &Inputs,
    plan: &Plan,
    cx: &Context,
    values: &Values,
    (report, mut files): (&Value, Vec<SideFile>),
) -> Result<PathBuf> {
    let model = &inputs.models[0];
    let emitter = Emitter::begin(inputs, plan, cx)?;
    cx.progress.begin("writing", plan.tensors.len() as u64, Unit::Tensors);
    for tensor in plan.tensors.iter().filter(|tensor| !emitter.is_done(&tensor.name)) {
        let source = layout.source(&tensor.name);
        match (tensor.action, source) {
            (Action::Copy, Some(source)) => {
                copy_as(&model.artifact, source, &model.source, &emitter, tensor)?;
            }
            _ => {
                let new = values.0.get(&tensor.name).or_else(|| values.0.get(source?));
                let new = new.ok_or_else(|| {
                    let problem = "the running model does not hold it, so it did not train";
                    Error::tensor(&model.source, &tensor.name, problem)
                })?;
                emitter.write_f32(&tensor.name, 0, new)?;
                emitter.done(&tensor.name)?;
            }
        }
        cx.progress.advance(1);
    }
    cx.progress.end();
    files.push(config(layout, model, classes)?);
    emitter.finish(inputs, plan, cx, files, report)
}
