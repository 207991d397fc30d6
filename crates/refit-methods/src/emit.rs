//! Writing an artifact the way every method does: declared by the plan, resumable, with lineage and
//! card.

use std::path::PathBuf;

use rayon::prelude::*;
use refit_store::architecture::{Layout, Site};
use refit_store::artifact::Format;
use refit_store::card::{Fact, Relation, licence_union};
use refit_store::formats::gguf::write::Fields;
use refit_store::lineage::{DataUse, Estimate, Measurement, Parent};
use refit_store::writer::ArtifactWriter;
use refit_store::{Card, DType, Lineage, SideFile, TensorSpec, WritePlan};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::inputs::{AdapterInput, Inputs, ModelInput};
use crate::method::{Context, Plan};
use crate::rewrite::transpose;

/// Files above this size become shards, as Hugging Face writes them.
pub(crate) const SHARD: u64 = 5_000_000_000;

/// Bytes of the weight files that hold tensors of these names, shapes and types, headers included; of a GGUF file where there is
/// metadata.
///
/// # Errors
/// Tensors that the container cannot hold.
pub(crate) fn file_bytes(
    tensors: Vec<(String, Vec<usize>, DType)>,
    gguf: Option<Fields>,
) -> Result<u64> {
    let spec = |(name, shape, dtype)| TensorSpec { name, shape, dtype };
    let plan = WritePlan {
        tensors: tensors.into_iter().map(spec).collect(),
        gguf,
        max_shard_bytes: Some(SHARD),
        ..WritePlan::default()
    };
    Ok(plan.file_bytes()?)
}

/// An output under way.
pub struct Emitter {
    writer: ArtifactWriter,
    /// What the models' weight files looked like when the work began.
    fingerprints: Vec<String>,
    /// What the card says where the method's family does not decide it.
    relation: Option<Relation>,
    format: Format,
}

/// How an output is kept, where it is no copy of the first model with other values.
#[derive(Debug, Clone)]
pub struct Container {
    /// Metadata of a GGUF file; `None` for safetensors.
    pub gguf: Option<Fields>,
    /// Files beside the weights.
    pub side_files: Vec<SideFile>,
    /// How the output relates to the first model.
    pub relation: Relation,
}

impl Emitter {
    /// Declares everything that a plan lists. The first model's configuration, tokenizer and other
    /// side files go along untouched.
    ///
    /// # Errors
    /// No output path, an output that exists, a directory that cannot be written.
    pub fn begin(inputs: &Inputs, plan: &Plan, cx: &Context) -> Result<Self> {
        Self::begin_in(inputs, plan, cx, None)
    }

    /// As [`begin`](Self::begin), with other files beside the weights.
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    pub fn begin_with(
        inputs: &Inputs,
        plan: &Plan,
        cx: &Context,
        side_files: Vec<SideFile>,
    ) -> Result<Self> {
        Self::declare(inputs, plan, cx, None, Some(side_files))
    }

    /// As [`begin`](Self::begin), kept in another way.
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    pub fn begin_in(
        inputs: &Inputs,
        plan: &Plan,
        cx: &Context,
        container: Option<Container>,
    ) -> Result<Self> {
        Self::declare(inputs, plan, cx, container, None)
    }

    fn declare(
        inputs: &Inputs,
        plan: &Plan,
        cx: &Context,
        container: Option<Container>,
        side_files: Option<Vec<SideFile>>,
    ) -> Result<Self> {
        let out = cx.out()?;
        if !cx.resume
            && let Some(name) = out.file_name()
        {
            // What an interrupted run left; the writer would go on from there.
            let staged = out.with_file_name(format!(".{}.refit-partial", name.to_string_lossy()));
            match std::fs::remove_dir_all(&staged) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::Io { path: staged, source });
                }
                _ => {}
            }
        }
        let tensors = plan
            .tensors
            .iter()
            .map(|tensor| TensorSpec {
                name: tensor.name.clone(),
                shape: tensor.shape.clone(),
                dtype: DType::parse(&tensor.dtype)
                    .expect("invariant: plans name types that can be written"),
            })
            .collect();
        let texts: Vec<String> =
            inputs.text.iter().map(|text| refit_store::hash::hex(text.text.as_bytes())).collect();
        let fingerprints = inputs
            .models
            .iter()
            .map(|model| Ok(model.artifact.fingerprint()?))
            .collect::<Result<Vec<String>>>()?;
        let adapters = inputs
            .adapters
            .iter()
            .map(|input| Ok(input.adapter.content_hash()?))
            .collect::<Result<Vec<String>>>()?;
        let data: Vec<String> = inputs.data.iter().map(|data| data.sha256()).collect();
        let labelled = inputs.labelled.as_ref().map(|labelled| labelled.sha256()).transpose()?;
        let identity = json!({
            "labelled": labelled,
            "adapters": adapters,
            "data": data,
            "refit": env!("CARGO_PKG_VERSION"),
            "method": plan.method,
            "parameters": plan.parameters,
            "parents": fingerprints,
            "texts": texts,
            "seed": cx.seed,
        });
        let relation = container.as_ref().map(|container| container.relation);
        let (gguf, side_files) = match container {
            Some(container) => (container.gguf, container.side_files),
            None => {
                let own = || inputs.models[0].artifact.side_files().to_vec();
                (None, side_files.unwrap_or_else(own))
            }
        };
        let format = if gguf.is_some() { Format::Gguf } else { Format::Safetensors };
        let write = WritePlan {
            tensors,
            gguf,
            max_shard_bytes: Some(SHARD),
            side_files,
            identity: refit_store::hash::hex(identity.to_string().as_bytes()),
            force: cx.force,
            weights_name: None,
        };
        let writer = ArtifactWriter::create(out, write)?;
        Ok(Self { writer, fingerprints, relation, format })
    }

    /// Whether an earlier, interrupted run finished this tensor.
    pub fn is_done(&self, tensor: &str) -> bool {
        self.writer.is_done(tensor)
    }

    /// Writes values from element `start` on, encoded as declared.
    ///
    /// # Errors
    /// Values that the declared type cannot hold, and whatever the disk refuses.
    pub fn write_f32(&self, tensor: &str, start: usize, values: &[f32]) -> Result<()> {
        Ok(self.writer.write_f32(tensor, start, values)?)
    }

    /// Writes stored bytes from `start` on.
    ///
    /// # Errors
    /// Whatever the disk refuses.
    pub fn write_raw(&self, tensor: &str, start: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.writer.write_raw(tensor, start, bytes)?)
    }

    /// Marks a tensor as finished.
    ///
    /// # Errors
    /// Whatever the disk refuses.
    pub fn done(&self, tensor: &str) -> Result<()> {
        Ok(self.writer.done(tensor)?)
    }

    /// Writes a whole matrix given as `[out, in]` in its site's own layout, and finishes it.
    ///
    /// # Errors
    /// As [`write_f32`](Self::write_f32).
    pub fn write_matrix(&self, site: &Site, weights: Vec<f32>) -> Result<()> {
        let weights = match (site.layout, site.out_in()) {
            (Layout::InOut, Some((out, inputs))) => transpose(&weights, out, inputs),
            _ => weights,
        };
        self.write_f32(&site.name, 0, &weights)?;
        self.done(&site.name)
    }

    /// Adds side files, lineage and card, and gives the output its name.
    ///
    /// # Errors
    /// Whatever the disk refuses; a model whose files changed while they were worked on.
    pub fn finish(
        self,
        inputs: &Inputs,
        plan: &Plan,
        cx: &Context,
        side_files: Vec<SideFile>,
        report: &Value,
    ) -> Result<PathBuf> {
        let Self { mut writer, fingerprints, relation, format } = self;
        for file in side_files {
            writer.add_side_file(file);
        }
        writer.finish_with(|| {
            let mut parents = parents(inputs, &fingerprints)?;
            parents.extend(adapter_parents(&inputs.adapters)?);
            let (lineage, mut card) = describe(parents, inputs, plan, cx, report)?;
            card.relation = relation.or(card.relation);
            if format == Format::Gguf {
                card.format = Fact::Known("gguf".to_owned());
                card.library = "gguf".to_owned();
            }
            Ok((lineage, card))
        })
    }

    /// Finishes an output that is thrown away: its parents are not hashed.
    ///
    /// # Errors
    /// Whatever the disk refuses.
    pub fn finish_scratch(self, inputs: &Inputs, plan: &Plan, cx: &Context) -> Result<PathBuf> {
        self.writer.finish_with(|| describe(Vec::new(), inputs, plan, cx, &Value::Null))
    }
}

/// The models as the manifest names them.
fn parents(inputs: &Inputs, fingerprints: &[String]) -> Result<Vec<Parent>> {
    let models = &inputs.models;
    let parent = |(at, (model, fingerprint)): (usize, (&ModelInput, &String))| {
        let base = models.len() == 1 || inputs.base == Some(at);
        let part = if base { "base" } else { "ingredient" };
        let manifest = Lineage::read(model.artifact.path())?;
        let content = model.artifact.content_hash()?;
        if model.artifact.fingerprint()? != *fingerprint {
            return Err(Error::Changed { model: model.source.clone() });
        }
        Ok(Parent {
            source: model.source.clone(),
            name: name_of(&model.source),
            content,
            manifest: manifest.map(|manifest| manifest.manifest_hash()),
            part: Some(part.into()),
        })
    };
    models.par_iter().zip(fingerprints).enumerate().map(parent).collect()
}

/// The adapters as the manifest names them.
fn adapter_parents(adapters: &[AdapterInput]) -> Result<Vec<Parent>> {
    let parent = |AdapterInput { source, adapter }: &AdapterInput| {
        let manifest = Lineage::read(adapter.path())?;
        Ok(Parent {
            source: source.clone(),
            name: name_of(source),
            content: adapter.content_hash()?,
            manifest: manifest.map(|manifest| manifest.manifest_hash()),
            part: Some("adapter".into()),
        })
    };
    adapters.iter().map(parent).collect()
}

/// Manifest and card of an adapter that was trained on a model.
///
/// # Errors
/// A model that cannot be read any more, or whose files changed since they had these fingerprints.
pub fn describe_adapter(
    inputs: &Inputs,
    fingerprints: &[String],
    plan: &Plan,
    cx: &Context,
    report: &Value,
) -> Result<(Lineage, Card)> {
    let mut parents = parents(inputs, fingerprints)?;
    parents.extend(adapter_parents(&inputs.adapters)?);
    let (lineage, mut card) = describe(parents, inputs, plan, cx, report)?;
    card.relation = Some(Relation::Adapter);
    card.library = "peft".into();
    Ok((lineage, card))
}

/// Manifest and card of an output.
fn describe(
    parents: Vec<Parent>,
    inputs: &Inputs,
    plan: &Plan,
    cx: &Context,
    report: &Value,
) -> Result<(Lineage, Card)> {
    let mut lineage = Lineage::new(plan.method.clone(), plan.parameters.clone());
    lineage.parents = parents;
    lineage.seeds = vec![cx.seed];
    let purpose = if inputs.data.is_empty() { "calibration" } else { "evaluation" };
    lineage.data = inputs
        .text
        .iter()
        .map(|text| DataUse {
            name: name_of(&text.source),
            sha256: refit_store::hash::hex(text.text.as_bytes()),
            purpose: purpose.into(),
            size: Some(format!("{} bytes of text", text.text.len())),
            license: None,
        })
        .chain(inputs.data.iter().map(|data| DataUse {
            name: name_of(&data.source()),
            sha256: data.sha256(),
            purpose: "training".into(),
            size: Some(data.size()),
            license: None,
        }))
        .collect();
    lineage.measurements.extend(held_out(inputs, report));
    if let Some(labelled) = &inputs.labelled {
        let family = crate::registry::get(&plan.method)?.info.family;
        let purpose = match family {
            crate::method::Family::Adapt => "training",
            crate::method::Family::Quantize => "calibration",
            _ => "evaluation",
        };
        lineage.data.push(DataUse {
            name: name_of(&labelled.source()),
            sha256: labelled.sha256()?,
            purpose: purpose.into(),
            size: Some(labelled.size()),
            license: None,
        });
    }
    lineage.command = Some(command(inputs, plan, cx));
    let name = cx.out()?.file_name().map(|name| name.to_string_lossy().into_owned());
    let mut card = Card::from_lineage(name.unwrap_or_else(|| plan.method.clone()), &lineage);
    card.relation = Some(match crate::registry::get(&plan.method)?.info.family {
        crate::method::Family::Quantize => Relation::Quantized,
        crate::method::Family::Factorize => Relation::Factorized,
        crate::method::Family::Prune => Relation::Pruned,
        crate::method::Family::Merge => Relation::Merge,
        crate::method::Family::Adapt => Relation::Finetune,
    });
    let elements = |shape: &[usize]| shape.iter().map(|n| *n as u64).product();
    let census = plan.tensors.iter().map(|t| (t.dtype.clone(), elements(&t.shape)));
    let architecture = inputs.models[0].artifact.architecture();
    card.take_weights(architecture, Format::Safetensors, census);
    let licences: Vec<(String, Fact<String>)> = inputs.models.iter().map(licence).collect();
    (card.license, card.license_conflicts) = licence_union(&licences);
    card.checks.extend(checks(report));
    Ok((lineage, card))
}

/// What a training measured on held-out text, when it did.
fn held_out(inputs: &Inputs, report: &Value) -> Option<Measurement> {
    let value = |when: &str| report[format!("held_out_perplexity_{when}")].as_f64();
    let names: Vec<String> = inputs.text.iter().map(|text| name_of(&text.source)).collect();
    Some(Measurement {
        metric: "perplexity".into(),
        dataset: names.join(", "),
        n: report["held_out_tokens"].as_u64()?,
        before: Estimate::new(value("before")?, None),
        after: Estimate::new(value("after")?, None),
    })
}

/// The licence that a model's own card states.
fn licence(model: &ModelInput) -> (String, Fact<String>) {
    let path = model.artifact.path();
    // A README beside a single file may be about anything; one that cannot be read states nothing.
    let card = path.is_dir().then(|| Card::read(path).ok().flatten()).flatten();
    let unknown = || Fact::Unknown("it has no card".to_owned());
    (name_of(&model.source), card.map_or_else(unknown, |card| card.license))
}

/// The command that makes the artifact again, into a directory of the reader's choice.
fn command(inputs: &Inputs, plan: &Plan, cx: &Context) -> String {
    if let Some(words) = &plan.command {
        return words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
    }
    let mut words = Vec::new();
    if !cx.ranks.alone() {
        words.extend(["mpirun".to_owned(), "-n".to_owned(), cx.ranks.size().to_string()]);
    }
    words.extend(["refit".to_owned(), "apply".to_owned(), plan.method.clone()]);
    words.extend(inputs.beside_base().map(|at| inputs.models[at].source.clone()));
    words.extend(inputs.adapters.iter().map(|adapter| adapter.source.clone()));
    for data in &inputs.data {
        words.extend(["--data".to_owned(), data.source()]);
    }
    if let Some(base) = inputs.base {
        words.extend(["--base".to_owned(), inputs.models[base].source.clone()]);
    }
    words.extend(flags(&plan.method, &plan.parameters));
    if let Some(labelled) = &inputs.labelled {
        words.extend(["--labelled".to_owned(), labelled.source()]);
    }
    for text in &inputs.text {
        words.extend(["--text".to_owned(), text.source.clone()]);
    }
    words.extend(["--seed".to_owned(), cx.seed.to_string(), "-o".to_owned(), "OUT".to_owned()]);
    words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
}

/// Parameters as they are typed, those that say nothing left out.
pub(crate) fn flags(method: &str, parameters: &Value) -> Vec<String> {
    let mut words = Vec::new();
    let defaults = crate::registry::get(method).map(|entry| entry.default().parameters());
    for (key, value) in parameters.as_object().into_iter().flatten() {
        let flag = format!("--{}", key.replace('_', "-"));
        match value {
            // A flag that is on by default takes a value.
            Value::Bool(set) if defaults.as_ref().is_ok_and(|all| all[key] == true) => {
                words.extend([flag, set.to_string()]);
            }
            Value::Null | Value::Bool(false) => {}
            Value::Bool(true) => words.push(flag),
            Value::String(text) => words.extend([flag, text.clone()]),
            Value::Array(list) if list.is_empty() => {}
            Value::Array(list) => {
                let word = |item: &Value| item.as_str().map_or(item.to_string(), str::to_owned);
                words.extend([flag, list.iter().map(word).collect::<Vec<_>>().join(",")]);
            }
            other => words.extend([flag, other.to_string()]),
        }
    }
    words
}

/// A word as a POSIX shell reads it.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@+,%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

/// One line per number of a report that a reader of the card would ask for.
fn checks(report: &Value) -> Vec<String> {
    [
        "bits_per_weight",
        "packed_bytes",
        "sparsity",
        "ingredients",
        "trained_parameters",
        "processes",
        "classes",
        "l2",
        "held_out_accuracy",
    ]
    .iter()
    .filter_map(|key| Some(format!("{}: {}", key.replace('_', " "), report.get(*key)?)))
    .collect()
}

/// The last part of a path or source string: a name that does not depend on where things lie.
pub(crate) fn name_of(source: &str) -> String {
    let trimmed = source.trim_end_matches('/');
    trimmed.rsplit('/').next().unwrap_or(trimmed).to_owned()
}

/// An error for an output that methods cannot describe.
pub(crate) fn serialize(what: &'static str, value: &impl serde::Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(value).map_err(|source| Error::Parameters { method: what, source })
}
