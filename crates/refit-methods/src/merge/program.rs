//! What a merge writes, tensor by tensor, and the engine that writes it.
//!
//! Large tensors are merged one after the other, by all threads together; small ones side by side, a thread
//! each. At most one large group, or one small group per thread, is in memory, whatever the size of the models.
//! Every piece has its place in the output, and every number depends on pieces alone, so the bytes do not
//! depend on the number of threads, and an interrupted run goes on after the tensors that are finished.

use std::collections::BTreeMap;
use std::sync::Arc;

use rayon::prelude::*;
use refit_store::{Config, DType, SideFile};
use serde_json::json;

use crate::emit::Emitter;
use crate::error::{Error, Result};
use crate::inputs::{Inputs, ModelInput};
use crate::merge::fold;
use crate::merge::group::{Group, HELD, PIECE, Part};
use crate::merge::kernel::Kernel;
use crate::method::{Action, Context, Output, Plan, PlannedTensor, Unit};
use crate::rewrite::{OutputType, copy_as};

mod fit;

pub use fit::{Stored, is_buffer, is_vocabulary, names, stored};
use fit::{same_bytes, torch_name};

/// Elements from which on a tensor is shared by the threads.
const LARGE: usize = 1 << 20;

/// How one output tensor comes to be.
#[derive(Clone, Debug)]
pub struct Job {
    /// What is written.
    pub tensor: PlannedTensor,
    /// What it is made of.
    pub work: Work,
}

/// What a tensor is made of.
#[derive(Clone, Debug)]
pub enum Work {
    /// One model's tensor as it is.
    Copy(Part),
    /// A merge.
    Merge {
        /// The base's tensor.
        base: Option<Part>,
        /// The tensors beside the base.
        inputs: Vec<Part>,
        /// How they are merged.
        kernel: Arc<dyn Kernel>,
    },
}

/// A whole merge.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// Output tensors by name.
    pub jobs: BTreeMap<String, Job>,
    /// Files beside the weights that differ from the first model's.
    pub side_files: Vec<SideFile>,
    /// Names of the first model's files that do not go along.
    pub dropped: Vec<String>,
    /// A type that values are rounded to when they are read.
    pub rounding: Option<DType>,
    /// Things that are worth knowing.
    pub notes: Vec<String>,
    /// Things that are probably not what the user wants.
    pub warnings: Vec<String>,
}

impl Program {
    /// One kernel for all tensors of models of one shape.
    ///
    /// # Errors
    /// [`Error::Mismatch`] with what does not fit.
    pub fn of_whole_models(
        inputs: &Inputs,
        kernel: &Arc<dyn Kernel>,
        out: OutputType,
    ) -> Result<Self> {
        let models = &inputs.models;
        let mut program = Self::default();
        models[1..].iter().try_for_each(|model| fold::check_alike(&models[0], model, true))?;
        for name in names(models)? {
            let part = |model: usize| Part::plain(model, name.clone());
            let base = inputs.base.map(part);
            let beside = inputs.beside_base().map(part).collect();
            program.add(models, &name, base, beside, kernel.clone(), Stored::Chosen(out))?;
        }
        program.keep_duplicates_in_sight(models)?;
        program.set_config(&models[0], &[], out.fixed());
        Ok(program)
    }

    /// Adds the merge of `base` and `inputs` as `name`; tensors that are no floats are copied, and must agree.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for shapes and types that differ, [`Error::Tensor`] for a missing tensor.
    pub fn add(
        &mut self,
        models: &[ModelInput],
        name: &str,
        mut base: Option<Part>,
        mut inputs: Vec<Part>,
        kernel: Arc<dyn Kernel>,
        out: Stored,
    ) -> Result<()> {
        for part in base.iter_mut().chain(&mut inputs) {
            let model = &models[part.model];
            let Some(found) = stored(&model.artifact, &part.tensor) else {
                let problem = "there is no such tensor, and the other models have it";
                return Err(Error::tensor(&model.source, &part.tensor, problem));
            };
            part.tensor = found.to_owned();
        }
        let parts: Vec<&Part> = base.iter().chain(&inputs).collect();
        let info = |part: &Part| models[part.model].artifact.tensor(&part.tensor).cloned();
        let infos = parts.iter().map(|part| info(part)).collect::<Result<Vec<_>, _>>()?;
        let shape_of = |at: usize| {
            let mut shape = infos[at].shape.clone();
            if let (Some(map), Some(rows)) = (&parts[at].rows, shape.first_mut()) {
                *rows = map.rows.len();
            }
            shape
        };
        let (shape, first) = (shape_of(0), parts[0]);
        for (at, part) in parts.iter().enumerate().skip(1) {
            let mismatch = |problem: String| Error::Mismatch {
                first: models[first.model].source.clone(),
                second: models[part.model].source.clone(),
                problem,
            };
            if shape_of(at) != shape {
                let rows_alone = shape_of(at).get(1..) == shape.get(1..);
                let advice = match rows_alone && is_vocabulary(&models[first.model].artifact, name)
                {
                    true => {
                        "their vocabularies differ: align them with `tokenizer_source: base` (or union) in a mergekit recipe"
                    }
                    false => "models of a merge need one architecture and width",
                };
                return Err(mismatch(format!(
                    "tensor `{name}` is {shape:?} in the first and {:?} in the second; {advice}",
                    shape_of(at)
                )));
            }
            if infos[at].dtype.is_float() != infos[0].dtype.is_float() {
                return Err(mismatch(format!(
                    "tensor `{name}` has type {} in the first and {} in the second",
                    infos[0].dtype, infos[at].dtype
                )));
            }
        }
        let float = infos[0].dtype.is_float();
        let types: Vec<DType> = infos.iter().map(|info| info.dtype).collect();
        let dtype = if float { out.of(&types) } else { Some(infos[0].dtype) };
        let Some(dtype) = dtype else {
            let other = types.iter().position(|other| *other != types[0]).unwrap_or(0);
            return Err(Error::Mismatch {
                first: models[first.model].source.clone(),
                second: models[parts[other].model].source.clone(),
                problem: format!(
                    "tensor `{name}` has type {} in the first and {} in the second; say what to write: --dtype f32, f16 or bf16",
                    types[0], types[other]
                ),
            });
        };
        if !float {
            let agree =
                parts[1..].iter().all(|part| same_bytes(models, first, part).unwrap_or(false));
            if !agree {
                let problem =
                    "its values differ between the models, and it is no float: it cannot be merged";
                return Err(Error::tensor(&models[first.model].source, name, problem));
            }
        }
        let work = match float {
            true => Work::Merge { base, inputs, kernel },
            false => Work::Copy(first.clone()),
        };
        self.push(name, shape, dtype, work);
        Ok(())
    }

    /// Adds a tensor.
    pub fn push(&mut self, name: &str, shape: Vec<usize>, dtype: DType, work: Work) {
        let bytes = dtype.bytes_of(&shape).unwrap_or(0);
        let action = match work {
            Work::Copy(_) => Action::Copy,
            Work::Merge { .. } => Action::Transform,
        };
        let (name, dtype) = (name.to_owned(), dtype.to_string());
        let tensor = PlannedTensor { name: name.clone(), shape, dtype, bytes, action };
        self.jobs.insert(name, Job { tensor, work });
    }

    /// Writes the output's `config.json` where it differs from that of `model`: keys that the merge sets, the
    /// element type, and a head that is no longer tied.
    pub fn set_config(
        &mut self,
        model: &ModelInput,
        set: &[(&str, serde_json::Value)],
        dtype: Option<DType>,
    ) {
        let artifact = &model.artifact;
        if artifact.config().is_empty() {
            return;
        }
        let mut raw = artifact.config().raw().clone();
        for (key, value) in set {
            raw.insert((*key).to_owned(), value.clone());
        }
        let unties = |name: &String| {
            !artifact.contains(name)
                && artifact.architecture().site(name).is_some_and(|site| site.tied_to.is_some())
        };
        if let Some(head) = self.jobs.keys().find(|name| unties(name)).cloned() {
            raw.insert("tie_word_embeddings".to_owned(), json!(false));
            self.warnings.push(format!(
                "`{head}` is tied to the embedding in some models and not in others; the output gets one of its own"
            ));
        }
        if let Some(name) = dtype.and_then(torch_name) {
            let key = if raw.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            raw.insert(key.to_owned(), json!(name));
        }
        if raw != *artifact.config().raw() {
            let file = SideFile::from_bytes("config.json", Config::new(raw).to_json());
            self.side_files.push(file);
        }
    }

    fn keep_duplicates_in_sight(&mut self, models: &[ModelInput]) -> Result<()> {
        for (first, second) in fold::duplicates(models)? {
            let (first, second) = (&models[first].source, &models[second].source);
            let warning = format!("{first} and {second} look identical: a duplicate counts twice");
            self.warnings.push(warning);
        }
        Ok(())
    }

    /// Fills in a plan.
    pub fn describe(&self, inputs: &Inputs, plan: &mut Plan) {
        plan.tensors = self.jobs.values().map(|job| job.tensor.clone()).collect();
        plan.output_bytes = plan.tensors.iter().map(|tensor| tensor.bytes).sum();
        plan.notes.extend(self.notes.iter().cloned());
        plan.warnings.extend(self.warnings.iter().cloned());
        let parts = |job: &Job| match &job.work {
            Work::Copy(_) => 1,
            Work::Merge { base, inputs, .. } => base.iter().count() + inputs.len(),
        };
        let looks = |job: &&Job| matches!(&job.work, Work::Merge { kernel, .. } if kernel.looks());
        let numel = |job: &Job| job.tensor.shape.iter().product::<usize>();
        let held = |job: &Job| Some(4 * numel(job) * parts(job)).filter(|bytes| *bytes <= HELD);
        let threads = rayon::current_num_threads();
        let (small, large): (Vec<&Job>, Vec<&Job>) =
            self.jobs.values().filter(looks).partition(|job| numel(job) < LARGE);
        let most = |jobs: &[&Job]| jobs.iter().filter_map(|job| held(job)).max().unwrap_or(0);
        let row = |job: &Job| job.tensor.shape.last().copied().unwrap_or(1).max(PIECE);
        let widest = self.jobs.values().map(|job| (3 * parts(job) + 2) * 4 * row(job)).max();
        let tables =
            if large.is_empty() && small.is_empty() { 0 } else { parts_most(&self.jobs) << 19 };
        let bytes =
            most(&large).max(threads * most(&small)) + threads * (widest.unwrap_or(0) + tables);
        plan.peak_memory = bytes as u64 + (48 << 20);
        plan.steps.push(format!(
            "merge {} models, {} tensors",
            inputs.models.len(),
            self.jobs.len()
        ));
    }

    /// Merges and writes.
    ///
    /// # Errors
    /// Files that cannot be read or written, and values that are not finite.
    pub fn run(&self, inputs: &Inputs, plan: &Plan, cx: &Context) -> Result<Output> {
        refit_train::heap::keep();
        let dropped = |file: &&SideFile| !self.dropped.contains(&file.name);
        let side_files = inputs.models[0].artifact.side_files().iter().filter(dropped).cloned();
        let emitter = Emitter::begin_with(inputs, plan, cx, side_files.collect())?;
        cx.progress.begin("merging", plan.output_bytes, Unit::Bytes);
        let (large, small): (Vec<&Job>, Vec<&Job>) =
            self.jobs.values().partition(|job| job.tensor.shape.iter().product::<usize>() >= LARGE);
        let one = |job: &&Job, parallel: bool| -> Result<()> {
            if !emitter.is_done(&job.tensor.name) {
                self.write(job, &inputs.models, &emitter, parallel, cx.seed)?;
            }
            cx.progress.advance(job.tensor.bytes);
            Ok(())
        };
        let done = cx.install(|| {
            large.iter().try_for_each(|job| one(job, true))?;
            small.par_iter().with_max_len(1).try_for_each(|job| one(job, false))
        });
        cx.progress.end();
        done?;
        let sources: Vec<&str> = inputs.models.iter().map(|model| model.source.as_str()).collect();
        let mut report = json!({"ingredients": sources});
        if let Some(base) = inputs.base {
            report["base"] = json!(inputs.models[base].source);
        }
        let artifact = emitter.finish(inputs, plan, cx, self.side_files.clone(), &report)?;
        Ok(Output { artifact: Some(artifact), report, warnings: Vec::new() })
    }

    fn write(
        &self,
        job: &Job,
        models: &[ModelInput],
        emitter: &Emitter,
        parallel: bool,
        seed: u64,
    ) -> Result<()> {
        let tensor = &job.tensor;
        let (base, inputs, kernel) = match &job.work {
            Work::Copy(part) => {
                let model = &models[part.model];
                return copy_as(&model.artifact, &part.tensor, &model.source, emitter, tensor);
            }
            Work::Merge { base, inputs, kernel } => (base, inputs, kernel),
        };
        let mut group = Group::new(models, base.as_ref(), inputs, &tensor.name, &tensor.shape);
        (group.seed, group.parallel, group.rounding) = (seed, parallel, self.rounding);
        if kernel.looks() {
            group.hold()?;
        }
        let map = kernel.prepare(&group)?;
        group.each(|piece| {
            let mut out = vec![0f32; piece.len()];
            map(piece, &mut out);
            // 0 x is NaN exactly when x is not finite, and sums of zeros vectorize.
            if out.iter().map(|x| x * 0.0).sum::<f32>() != 0.0 {
                let at = piece.start + out.iter().position(|x| !x.is_finite()).unwrap_or(0);
                return Err(group
                    .error(format!("value {at} overflows; weights this large cannot be merged")));
            }
            emitter.write_f32(&tensor.name, piece.start, &out)
        })?;
        emitter.done(&tensor.name)
    }
}

fn parts_most(jobs: &BTreeMap<String, Job>) -> usize {
    let parts = |job: &Job| match &job.work {
        Work::Copy(_) => 0,
        Work::Merge { inputs, .. } => inputs.len(),
    };
    jobs.values().map(parts).max().unwrap_or(0)
}
