//! The frame of every method that trains: load, change, train, measure, write.
//!
//! A method on a language model says what it attaches and what trains ([`Session::train`]); what was learned is then written as
//! an adapter ([`Trained::write_adapter`]) or as a model ([`Trained::write_model`]). Other models bring their own objective
//! ([`Session::fit`]). Checkpoints lie beside the output under a hidden
//! name until it is complete, so the same command goes on where an interrupted run stopped.
//!
//! Several ranks ([`Context::ranks`]) share every batch. Rank 0 alone measures and writes; what the others return says nothing
//! but that they are done.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use refit_data::Rng;
use refit_data::examples::Example;
use refit_nn::load::stored;
use refit_nn::{BurnDevice, Decoder, Dropout, Run, Trainable};
use refit_store::adapter::{self, AdapterConfig, Part, Prompt};
use refit_store::{DType, SideFile};
use refit_train::BoxError;
use refit_train::eval::{self, Reference, Segment};
use refit_train::train::loss::next_token;
use refit_train::train::{
    At, Objective, Order, Recipe, RunOptions, Scope, StepReport, Terms, Trainer,
};
use serde_json::{Value, json};

use super::training::Training;
use crate::emit::{self, Emitter};
use crate::error::{Error, Result};
use crate::factorize::layout;
use crate::inputs::Inputs;
use crate::method::{Action, Context, Output, Plan, TrainingEvent, Unit};
use crate::rewrite::copy;

/// One run of training.
pub struct Session<'a> {
    /// What is trained, and on what.
    pub inputs: &'a Inputs,
    /// What was promised.
    pub plan: &'a Plan,
    /// Seed, output, progress.
    pub cx: &'a Context,
    /// How.
    pub training: &'a Training,
    /// Peak learning rate.
    pub rate: f64,
    /// Dropout in adapters.
    pub dropout: f64,
}

/// A trained model and what is known of its training.
pub struct Trained<M = Decoder> {
    /// The model, off autodiff.
    pub model: M,
    /// What goes to the lineage.
    pub report: Value,
    /// What differs from run to run.
    costs: Value,
    /// `training.jsonl` and what the method adds; [`SUMMARY`] joins them when they are written.
    files: Vec<SideFile>,
    /// What the model's weight files looked like when the work began.
    fingerprints: Vec<String>,
    checkpoints: PathBuf,
    warnings: Vec<String>,
}

/// A batch of examples, padded to one length.
pub struct Rows {
    /// Token ids, row by row.
    pub ids: Vec<u32>,
    /// Which of them are learned; nothing of the padding.
    pub learned: Vec<bool>,
    /// Number of rows.
    pub count: usize,
}

/// What a training begins with, beside its model.
pub struct Start {
    /// Examples in all.
    pub examples: usize,
    /// What the objective's terms count: tokens, examples.
    pub unit: &'static str,
    /// Perplexity on held-out text before the first update.
    pub held_out: Option<f64>,
    /// What the model's weight files looked like when they were read.
    pub fingerprints: Vec<String>,
}

/// Held-out perplexity is measured on at most this many tokens of every text.
const HELD_OUT_TOKENS: usize = 8192;

/// What is known of a training, beside what it wrote: its report, without what differs from run to run.
pub const SUMMARY: &str = "refit.training.json";

impl Session<'_> {
    /// Trains on the next token. `prepare` attaches what is to be trained and says which parameters are; `adjust` may change
    /// the recipe.
    ///
    /// # Errors
    /// Whatever loading, the data, training or the disk meet; the newest checkpoint stays.
    pub fn train(
        &self,
        examples: &[Example],
        prepare: impl FnOnce(&mut Decoder, &mut Rng) -> Result<Scope>,
        adjust: impl FnOnce(&mut Recipe),
    ) -> Result<Trained> {
        self.train_on(examples, prepare, adjust, &|model, rows, run| {
            let Rows { ids, learned, count } = rows;
            let (loss, tokens) = next_token(model, ids, *count, Some(learned), run)?;
            Ok(Terms::one("cross-entropy", loss, tokens))
        })
    }

    /// As [`train`](Self::train), on a loss of one's own.
    ///
    /// # Errors
    /// As [`train`](Self::train).
    pub fn train_on(
        &self,
        examples: &[Example],
        prepare: impl FnOnce(&mut Decoder, &mut Rng) -> Result<Scope>,
        adjust: impl FnOnce(&mut Recipe),
        loss: &dyn Fn(&Decoder, &Rows, &mut Run) -> Result<Terms, BoxError>,
    ) -> Result<Trained> {
        let Self { inputs, cx, training, .. } = self;
        let source = &inputs.models[0];
        let started = Instant::now();
        let mut recipe = training.recipe(examples.len(), self.rate, cx.seed);
        adjust(&mut recipe);
        self.check_ranks(&recipe, examples)?;
        let fingerprints = vec![source.artifact.fingerprint()?];
        let mut model = Decoder::load(&source.artifact, &BurnDevice::flex())?;
        let before = cx.ranks.lead(|| self.perplexity(&model))?.flatten();
        recipe.scope = prepare(&mut model, &mut Rng::named(cx.seed, "init"))?;
        let order = Order::new(cx.seed, examples.len());
        let objective = |model: &Decoder, at: At| -> Result<Terms, BoxError> {
            let share = at.share.of(training.batch);
            let count = share.len();
            // Every rank drops elements of its own rows: its stream is that of its first row.
            let stream = at.batch.wrapping_mul(0x9e37_79b9) ^ ((share.start as u64) << 40);
            let dropout = Dropout::new(self.dropout, cx.seed ^ stream);
            let chosen = &order.batch(at.batch, training.batch)[share];
            let (ids, learned) = batch(chosen.iter().map(|&i| &examples[i]));
            let checkpoint = training.checkpoint_activations;
            let precision = training.precision.precision();
            let mut run = Run { dropout, checkpoint, precision, ..Run::plain() };
            loss(model, &Rows { ids, learned, count }, &mut run)
        };
        let start = Start {
            examples: examples.len(),
            unit: "tokens",
            held_out: before.map(|(perplexity, _)| perplexity),
            fingerprints,
        };
        let mut trained = self.fit(model, recipe, start, &objective)?;
        let after = cx.ranks.lead(|| self.perplexity(&trained.model))?.flatten();
        if let (Some((before, tokens)), Some((after, _))) = (before, after) {
            trained.report["held_out_perplexity_before"] = json!(before);
            trained.report["held_out_perplexity_after"] = json!(after);
            trained.report["held_out_tokens"] = json!(tokens);
        }
        trained.costs["total_seconds"] = json!(started.elapsed().as_secs_f64());
        Ok(trained)
    }

    /// Trains `model` on an objective, with checkpoints.
    ///
    /// # Errors
    /// As [`Self::train`].
    pub fn fit<M: Trainable>(
        &self,
        model: M,
        recipe: Recipe,
        start: Start,
        objective: &impl Objective<M>,
    ) -> Result<Trained<M>> {
        let Self { cx, training, .. } = self;
        let Start { examples, unit, held_out, fingerprints } = start;
        let started = Instant::now();
        let steps = recipe.steps;
        let mut trainer = Trainer::new(model, recipe)?.with_ranks(cx.ranks.clone())?;
        let trained: u64 = self.count(&trainer);
        let checkpoints = self.checkpoints()?;
        if !cx.resume {
            cx.ranks.lead(|| remove(&checkpoints))?;
        }
        cx.progress.begin("training", steps, Unit::Steps);
        let begin = TrainingEvent::Begin { updates: steps, parameters: trained, held_out };
        cx.progress.training(&begin);
        let (mut tokens, mut seconds, mut seen) = (0u64, 0.0, 0u64);
        let mut on_step = |report: &StepReport| {
            if seen == 0 && report.step > 0 {
                cx.progress.advance(report.step);
            }
            seen += 1;
            tokens += report.items as u64;
            seconds += report.seconds;
            cx.progress.training(&TrainingEvent::Update {
                update: report.step + 1,
                loss: report.loss,
                rate: report.rate,
                grad_norm: report.grad_norm,
                items: report.items,
                unit,
                seconds: report.seconds,
            });
            cx.progress.advance(1);
        };
        let mut on_checkpoint =
            |update: u64| cx.progress.training(&TrainingEvent::Checkpoint { update });
        let options = RunOptions {
            dir: Some(checkpoints.clone()),
            every: training.checkpoint_every,
            keep: 2,
            resume: cx.resume,
            identity: self.identity(),
            on_step: Some(&mut on_step),
            on_checkpoint: Some(&mut on_checkpoint),
        };
        // Training runs where it is called: a trainer's hooks may belong to this thread.
        let ran = trainer.run(objective, options);
        cx.progress.end();
        ran?;
        let state_bytes = trainer.state_bytes();
        let model = trainer.into_model();
        let losses = cx.ranks.lead(|| losses(&checkpoints))?.unwrap_or_default();
        let mut report = json!({
            "updates": steps,
            "examples": examples,
            "trained_parameters": trained,
            "optimizer_state_bytes": state_bytes,
            "first_loss": losses.first().map(|r| r.loss),
            "last_loss": losses.last().map(|r| r.loss),
            "loss": thin(&losses, |report| report.loss),
            "learning_rate": thin(&losses, |report| report.rate),
            "grad_norm": thin(&losses, |report| report.grad_norm),
        });
        if !cx.ranks.alone() {
            report["processes"] = json!(cx.ranks.size());
        }
        let costs = json!({
            "training_seconds": seconds,
            "total_seconds": started.elapsed().as_secs_f64(),
            format!("learned_{unit}_per_second"): if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 },
        });
        Ok(Trained {
            model,
            report,
            costs,
            fingerprints,
            files: vec![SideFile::from_bytes("training.jsonl", without_times(&losses))],
            checkpoints,
            warnings: Vec::new(),
        })
    }

    /// The model as it came, where nothing is attached that could train: what is written of it changes nothing.
    ///
    /// # Errors
    /// Whatever loading meets.
    pub fn untrained(&self, examples: usize) -> Result<Trained> {
        let source = &self.inputs.models[0];
        let started = Instant::now();
        let fingerprints = vec![source.artifact.fingerprint()?];
        let model = Decoder::load(&source.artifact, &BurnDevice::flex())?;
        let mut report = json!({
            "updates": 0,
            "examples": examples,
            "trained_parameters": 0,
            "optimizer_state_bytes": 0,
        });
        if let Some((perplexity, tokens)) = self.perplexity(&model)? {
            report["held_out_perplexity_before"] = json!(perplexity);
            report["held_out_perplexity_after"] = json!(perplexity);
            report["held_out_tokens"] = json!(tokens);
        }
        Ok(Trained {
            model,
            report,
            costs: json!({ "total_seconds": started.elapsed().as_secs_f64() }),
            fingerprints,
            files: Vec::new(),
            checkpoints: self.checkpoints()?,
            warnings: Vec::new(),
        })
    }

    /// What several ranks cannot do, found before the model is loaded; and whether they are about to learn from the same
    /// examples.
    fn check_ranks(&self, recipe: &Recipe, examples: &[Example]) -> Result<()> {
        let (ranks, method) = (&self.cx.ranks, self.name());
        if ranks.alone() {
            return Ok(());
        }
        let (batch, size) = (self.training.batch, ranks.size());
        if batch < size {
            let expected = format!(
                "{size} processes share every batch, so that each needs at least one example of it: --batch {size} or more"
            );
            return Err(Error::range(method, "batch", batch, expected));
        }
        if recipe.per_layer {
            let problem = format!(
                "--per-layer projects the gradient of one process's share of the batch, and there are {size}: leave it out"
            );
            return Err(Error::Conflict { method, problem });
        }
        Ok(ranks.same("training data", fingerprint(examples))?)
    }

    /// The method's name as the registry has it.
    fn name(&self) -> &'static str {
        let all = crate::registry::all().iter().map(|entry| entry.info.name);
        all.into_iter().find(|name| *name == self.plan.method).unwrap_or("training")
    }

    fn count<M: Trainable>(&self, trainer: &Trainer<M>) -> u64 {
        let names: std::collections::HashSet<&str> = trainer.trained().collect();
        let all = trainer.model().parameters();
        let trained = all.iter().filter(|p| names.contains(p.name.as_str()));
        trained.map(|p| p.shape.iter().product::<usize>() as u64).sum()
    }

    /// Perplexity on the held-out text, where there is one, and how many tokens were scored.
    ///
    /// # Errors
    /// A text that cannot be tokenized or measured.
    pub fn perplexity(&self, model: &Decoder) -> Result<Option<(f64, usize)>> {
        if self.inputs.text.is_empty() {
            return Ok(None);
        }
        let tokenizer = self.inputs.models[0].tokenizer()?;
        let segments = self
            .inputs
            .text
            .iter()
            .map(|text| Ok(Segment::new(&*text.source, tokenizer.encode(&text.text, false)?)))
            .collect::<Result<Vec<_>>>()?;
        let window = 512.min(eval::CausalLm::context(model));
        let options = eval::Options {
            window: Some(window),
            max_tokens: Some(HELD_OUT_TOKENS),
            resamples: 0,
            ..eval::Options::default()
        };
        self.cx.progress.begin("measuring held-out text", 0, Unit::Tokens);
        let found = eval::perplexity(model, &segments, &options, Reference::None, &|_, _| {});
        self.cx.progress.end();
        let found = found?;
        Ok(Some((found.perplexity, found.tokens)))
    }

    /// Where checkpoints lie until the output is complete.
    fn checkpoints(&self) -> Result<PathBuf> {
        let out = self.cx.out()?;
        let name = out.file_name().map(|name| name.to_string_lossy().into_owned());
        Ok(out.with_file_name(format!(".{}.refit-training", name.unwrap_or_default())))
    }

    /// What the result depends on besides the trainer's recipe.
    fn identity(&self) -> String {
        let data: Vec<String> = self.inputs.data.iter().map(|data| data.sha256()).collect();
        let mut identity = json!({
            "refit": env!("CARGO_PKG_VERSION"),
            "method": self.plan.method,
            "parameters": self.plan.parameters,
            "base": self.inputs.models[0].artifact.fingerprint().ok(),
            "data": data,
        });
        if let Some(labelled) = &self.inputs.labelled {
            identity["labelled"] = json!(labelled.sha256().ok());
        }
        refit_store::hash::hex(identity.to_string().as_bytes())
    }
}

/// Rows of one length: shorter examples are padded behind their end, where nothing is learned and nothing looks.
fn batch<'a>(examples: impl Iterator<Item = &'a Example> + Clone) -> (Vec<u32>, Vec<bool>) {
    let longest = examples.clone().map(|example| example.ids.len()).max().unwrap_or(0);
    let (mut ids, mut learned) = (Vec::new(), Vec::new());
    for example in examples {
        let end = ids.len() + longest;
        ids.extend(&example.ids);
        ids.resize(end, 0);
        learned.extend(&example.learned);
        learned.resize(end, false);
    }
    (ids, learned)
}

/// A number that other examples would hardly have.
fn fingerprint(examples: &[Example]) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    examples.iter().for_each(|example| (&example.ids, &example.learned).hash(&mut hasher));
    hasher.finish()
}

/// What every update of the run did, from the file that the trainer keeps.
fn losses(checkpoints: &Path) -> Result<Vec<StepReport>> {
    let path = checkpoints.join("metrics.jsonl");
    let lines = std::fs::read_to_string(&path).map_err(|source| Error::Io { path, source })?;
    Ok(lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// At most two hundred points `[update, value]` of a curve, each the mean of the stretch that ends there.
fn thin(losses: &[StepReport], of: fn(&StepReport) -> f64) -> Vec<(u64, f64)> {
    let stretch = losses.len().div_ceil(200).max(1);
    let mean = |part: &[StepReport]| {
        let sum: f64 = part.iter().map(of).sum();
        (part[part.len() - 1].step + 1, sum / part.len() as f64)
    };
    losses.chunks(stretch).map(mean).collect()
}

/// The metrics as they go into the artifact: the same for every run of the same recipe.
fn without_times(losses: &[StepReport]) -> Vec<u8> {
    let mut lines = String::new();
    for report in losses {
        let line = json!({
            "step": report.step, "loss": report.loss, "grad_norm": report.grad_norm, "rate": report.rate,
            "items": report.items,
        });
        lines.push_str(&line.to_string());
        lines.push('\n');
    }
    lines.into_bytes()
}

fn remove(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::Io { path: dir.to_owned(), source })
        }
        _ => Ok(()),
    }
}

impl Trained {
    /// Puts the effective weight in place of every training form.
    pub fn fold(&mut self) {
        for block in &mut self.model.blocks {
            for linear in block.linears_mut() {
                let weight = linear.weight();
                let device = weight.device();
                linear.set_weight(refit_nn::ops::to_vec(&weight), &device);
            }
        }
    }

    /// Writes what was learned as an adapter.
    ///
    /// # Errors
    /// Whatever the disk refuses.
    pub fn write_adapter(
        self,
        session: &Session,
        config: &AdapterConfig,
        parts: &[Part],
        prompt: Option<&Prompt>,
    ) -> Result<Output> {
        let Session { inputs, plan, cx, .. } = session;
        if !cx.ranks.leads() {
            return Ok(Output::default());
        }
        let (lineage, card) =
            emit::describe_adapter(inputs, &self.fingerprints, plan, cx, &self.report)?;
        let (out, files) = (cx.out()?, self.files()?);
        let path = adapter::write(out, config, parts, prompt, lineage, card, cx.force, files)?;
        self.output(path)
    }

    /// Writes the whole model: tensors that trained get their new values, the others are copied byte for byte.
    ///
    /// # Errors
    /// Whatever the disk refuses; values that the output's type cannot hold.
    pub fn write_model(self, session: &Session) -> Result<Output> {
        let Session { inputs, plan, cx, .. } = session;
        if !cx.ranks.leads() {
            return Ok(Output::default());
        }
        let model = &inputs.models[0];
        let pairs = layout::declared(model, plan);
        let emitter = match pairs.is_empty() {
            true => Emitter::begin(inputs, plan, cx)?,
            false => {
                Emitter::begin_with(inputs, plan, cx, layout::side_files(model, plan, &pairs)?)?
            }
        };
        let values = named_values(&self.model);
        let names = layout::parameters(&pairs);
        let architecture = model.artifact.architecture();
        cx.progress.begin("writing", plan.tensors.len() as u64, Unit::Tensors);
        for tensor in &plan.tensors {
            // Factors and their biases have other names in the source, or none.
            if tensor.action == Action::Copy && !names.contains_key(&tensor.name) {
                if !emitter.is_done(&tensor.name) {
                    copy(&model.artifact, &model.source, &emitter, tensor)?;
                }
            } else if !emitter.is_done(&tensor.name) {
                let site = architecture.site(&tensor.name);
                let tied = site.and_then(|site| site.tied_to.as_deref());
                let name = names.get(&tensor.name).unwrap_or(&tensor.name);
                let found = values.get(name).or_else(|| values.get(tied?));
                let values = found.ok_or_else(|| {
                    let problem = "the running model does not hold it, so it did not train";
                    Error::tensor(&model.source, &tensor.name, problem)
                })?;
                emitter.write_f32(&tensor.name, 0, values)?;
                emitter.done(&tensor.name)?;
            }
            cx.progress.advance(1);
        }
        cx.progress.end();
        let path = emitter.finish(inputs, plan, cx, self.files()?, &self.report)?;
        self.output(path)
    }
}

impl<M> Trained<M> {
    /// Adds a file beside the weights.
    pub fn add_file(&mut self, file: SideFile) {
        self.files.push(file);
    }

    /// Adds a warning to the output.
    pub fn warn(&mut self, warning: String) {
        self.warnings.push(warning);
    }

    /// What lies beside the weights.
    ///
    /// # Errors
    /// None in practice: plain data always serializes.
    pub fn files(&self) -> Result<Vec<SideFile>> {
        let mut files = self.files.clone();
        let mut summary = emit::serialize("training", &self.report)?;
        summary.push(b'\n');
        files.push(SideFile::from_bytes(SUMMARY, summary));
        Ok(files)
    }

    /// What a method returns once `path` is written; the checkpoints go.
    ///
    /// # Errors
    /// Checkpoints that cannot be removed.
    pub fn output(self, path: PathBuf) -> Result<Output> {
        remove(&self.checkpoints)?;
        let mut report = self.report;
        for (key, value) in self.costs.as_object().into_iter().flatten() {
            report[key] = value.clone();
        }
        Ok(Output { artifact: Some(path), report, warnings: self.warnings })
    }
}

/// Values of all parameters under the names of the artifact's tensors, as the artifact stores them.
fn named_values(model: &Decoder) -> HashMap<String, Vec<f32>> {
    let mut all = HashMap::new();
    let config = model.config();
    let _ = refit_nn::named::edit(model.clone(), |name, shape, values| {
        all.insert(name.to_owned(), stored(config, name, shape, &values()));
        None
    });
    all
}

/// The stored type that a value must fit: bf16 and f16 sources are trained in f32 and rounded once, at the end.
pub(super) fn rounds(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}
