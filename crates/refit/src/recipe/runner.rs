//! Runs a recipe: each step once, finished steps skipped, everything measured written to `run.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use refit_methods::method::{Family, Need};
use refit_methods::quantize::activations;
use refit_methods::registry;
use refit_nn::Decoder;
use refit_nn::rounding::Rounder;
use refit_store::adapter::Adapter;
use refit_store::{Artifact, Lineage, hash};
use refit_train::eval::{self, CausalLm, Options, Reference, ReferenceCache, Rounded, Segment};
use refit_train::stats;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::made::{Made, describe_savings, sizes};
use super::preflight::{self, Found, Preflight};
use super::record::{
    Arm, ArtifactRecord, Contest, Evaluation, Machine, RunRecord, SCHEMA, StepRecord,
};
use super::schema::{ContestSpec, Recipe, Step, Work};
use crate::cli::App;
use crate::failure::{Failure, Result};
use crate::inputs::{self, Text};
use crate::verbs::apply::Request;
use crate::verbs::{eval as eval_verb, interference, write_atomically};
use crate::{engine, report};

/// A recipe under way.
pub struct Runner<'a> {
    app: &'a App,
    recipe: &'a Recipe,
    dir: PathBuf,
    record: RunRecord,
    texts: BTreeMap<String, Vec<Text>>,
    /// Where each model lies, as this process reaches it.
    places: BTreeMap<String, PathBuf>,
}

/// What a finished step left, kept under `steps/`.
#[derive(Serialize, Deserialize)]
struct Done<T> {
    identity: String,
    seconds: f64,
    #[serde(default)]
    note: Option<String>,
    result: T,
}

/// A finished pull.
#[derive(Serialize, Deserialize)]
struct Fetched {
    path: PathBuf,
    artifact: ArtifactRecord,
}

impl<'a> Runner<'a> {
    /// Prepares a run in `dir`: texts are read, so that nothing is missing half-way.
    pub fn new(
        app: &'a App,
        recipe: &'a Recipe,
        path: &Path,
        text: &str,
        dir: PathBuf,
    ) -> Result<Self> {
        let mut texts = BTreeMap::new();
        for (name, sources) in &recipe.data {
            if sources.iter().any(|source| inputs::is_table(source)) {
                // Tables are what models learn; reading them now finds what is missing.
                inputs::training(sources).map_err(|f| f.within(format!("data `{name}`")))?;
                continue;
            }
            let read = inputs::texts(sources).map_err(|f| f.within(format!("data `{name}`")))?;
            texts.insert(name.clone(), read);
        }
        let record = RunRecord {
            schema: SCHEMA,
            refit: env!("CARGO_PKG_VERSION").to_owned(),
            name: recipe.name.clone(),
            title: recipe.title.clone(),
            summary: recipe.summary.clone(),
            recipe: path.display().to_string(),
            recipe_sha256: hash::hex(text.as_bytes()),
            seed: recipe.seed,
            machine: machine(app),
            ..RunRecord::default()
        };
        Ok(Self { app, recipe, dir, record, texts, places: BTreeMap::new() })
    }

    /// Finds everything that is wrong with the recipe before anything is written.
    pub fn check(&self) -> Result<Preflight> {
        check_run_dir(&self.dir)?;
        preflight::check(self.app, self.recipe, &self.texts)
    }

    /// Runs every step that is not done yet and returns the record.
    pub fn run(mut self, mut checked: Preflight) -> Result<RunRecord> {
        let steps = self.dir.join("steps");
        std::fs::create_dir_all(&steps).map_err(|e| Failure::io(&steps, "create", &e))?;
        let total = self.recipe.steps.len();
        for (index, step) in self.recipe.steps.iter().enumerate() {
            self.app.progress.note(&format!("[{}/{total}] {}", index + 1, step.headline()));
            self.step(step, &mut checked)
                .map_err(|failure| failure.within(format!("step `{}`", step.name)))?;
            self.record.seconds = self.record.steps.iter().map(|step| step.seconds).sum();
            self.record.peak_memory = refit_train::measure::peak_memory();
            // Written after each step: an interrupted run can be looked at.
            self.write()?;
        }
        Ok(self.record)
    }

    fn write(&self) -> Result {
        let mut json = serde_json::to_string_pretty(&self.record)
            .map_err(|e| Failure::system(format!("run.json: cannot write: {e}")))?;
        json.push('\n');
        write_atomically(&self.dir.join("run.json"), json.as_bytes())?;
        let page = report::render(&self.record, report::Theme::Auto);
        write_atomically(&self.dir.join("report.html"), page.as_bytes())
    }

    fn step(&mut self, step: &Step, checked: &mut Preflight) -> Result {
        match &step.work {
            Work::Pull { label, .. } => match checked.pulls.remove(&step.name) {
                Some(found) => self.pull(&step.name, found, label),
                None => Ok(()),
            },
            Work::Apply { .. } => self.apply(&step.name, &step.work),
            Work::Eval { .. } => self.eval(&step.name, &step.work),
            Work::Report { contests } => {
                let seed = self.recipe.seed;
                let settled: Vec<_> =
                    contests.iter().map(|c| contest(&self.record, c, seed)).collect();
                self.record.contests.extend(settled);
                Ok(())
            }
        }
    }

    fn pull(&mut self, name: &str, found: Found, label: &str) -> Result {
        let start = Instant::now();
        let Found { opened, used, note, seconds: finding } = found;
        let identity = identity(json!({"pull": used, "refit": env!("CARGO_PKG_VERSION")}));
        let (seconds, reused, fetched) = match self.done::<Fetched>(name, &identity)? {
            Some(done) if done.result.path == opened.path => (done.seconds, true, done.result),
            _ => {
                let artifact = ArtifactRecord {
                    name: name.to_owned(),
                    label: label.to_owned(),
                    path: used.clone(),
                    source: Some(used.clone()),
                    content_hash: opened.artifact.content_hash()?,
                    seconds: 0.0,
                    ..sizes(&opened.artifact)
                };
                let fetched = Fetched { path: opened.path.clone(), artifact };
                let seconds = finding + start.elapsed().as_secs_f64();
                self.finish(name, &identity, seconds, &fetched)?;
                (seconds, false, fetched)
            }
        };
        self.record.notes.extend(note);
        self.places.insert(name.to_owned(), fetched.path);
        self.record.artifacts.push(fetched.artifact);
        self.push_step(name, "pull", identity, seconds, reused, format!("refit pull {used}"));
        Ok(())
    }

    fn apply(&mut self, name: &str, work: &Work) -> Result {
        let Work::Apply { method, to, base, with, data, held_out, labelled, label, group } = work
        else {
            return Ok(());
        };
        let entry = registry::get(method)?;
        let configured = entry.from_value(with)?;
        let parameters = configured.parameters();
        let parents: Vec<&ArtifactRecord> =
            base.iter().chain(to).filter_map(|t| self.record.artifact(t)).collect();
        let hashes: Vec<&str> = parents.iter().map(|p| p.content_hash.as_str()).collect();
        let trains = entry.info.inputs.data != Need::No;
        let texts = match if trains { held_out } else { data } {
            Some(name) => self.text(name)?,
            None => &[],
        };
        let text_hashes: Vec<String> = texts.iter().map(Text::sha256).collect();
        let learned = data.as_ref().filter(|_| trains).map(|name| self.recipe.data[name].clone());
        let learned = learned.unwrap_or_default();
        let learned_hashes: Vec<String> =
            inputs::training(&learned)?.iter().map(|data| data.sha256()).collect();
        let mut identified = json!({
            "refit": env!("CARGO_PKG_VERSION"),
            "apply": method,
            "parameters": parameters,
            "parents": hashes,
            "texts": text_hashes,
            "data": learned_hashes,
            "seed": self.recipe.seed,
        });
        if base.is_some() {
            identified["base"] = json!(true);
        }
        if let Some(source) = labelled {
            let examples = crate::labelled::open_for(self.app, source, entry.info.family)?;
            identified["labelled"] = json!(examples.sha256()?);
        }
        let identity = identity(identified);
        let out = self.dir.join(name);
        let mut models: Vec<String> = to.iter().map(|model| self.spelt(model)).collect();
        if let Some(base) = base {
            models.extend(["--base".to_owned(), self.spelt(base)]);
        }
        let mut examples = Vec::new();
        if !learned.is_empty() {
            examples.push(format!("--data {}", learned.join(" ")));
        }
        examples.extend(labelled.iter().map(|source| format!("--labelled {source}")));
        let command = self.apply_command(name, method, &models, with, texts, &examples);
        let finished = self.done::<ArtifactRecord>(name, &identity)?;
        let (seconds, reused, artifact) =
            match finished.filter(|_| Lineage::read(&out).is_ok_and(|l| l.is_some())) {
                Some(done) => (done.seconds, true, done.result),
                None => {
                    let request = Request {
                        entry,
                        method: configured,
                        models: to.iter().map(|t| self.places[t].display().to_string()).collect(),
                        base: base.as_ref().map(|b| self.places[b].display().to_string()),
                        text: texts.iter().map(|t| t.source.clone()).collect(),
                        data: learned,
                        labelled: labelled.clone(),
                        out: Some(out.clone()),
                        seed: self.recipe.seed,
                        // What lies there was made with other parameters, by this run directory.
                        force: out.exists(),
                        resume: true,
                    };
                    let mut applied = request.run(self.app)?;
                    if entry.info.family == Family::Merge && base.is_some() && to.len() > 1 {
                        let inputs = request.inputs(self.app)?;
                        let found = interference::of(self.app, &inputs)?;
                        applied.output.report[report::interference::KEY] = json!(found);
                    }
                    let made = Made::open(&out)?;
                    let mut artifact = ArtifactRecord {
                        name: name.to_owned(),
                        label: label.clone(),
                        group: group.clone(),
                        path: name.to_owned(),
                        method: Some(method.clone()),
                        parameters,
                        parents: base.iter().chain(to).cloned().collect(),
                        content_hash: made.content_hash()?,
                        seconds: applied.seconds,
                        report: applied.output.report,
                        ..made.sizes()
                    };
                    if let Made::Model(made) = &made {
                        describe_savings(&mut artifact, made, &out, entry.info.family)?;
                    }
                    self.finish(name, &identity, applied.seconds, &artifact)?;
                    (applied.seconds, false, artifact)
                }
            };
        self.places.insert(name.to_owned(), out);
        self.record.artifacts.push(artifact);
        self.push_step(name, "apply", identity, seconds, reused, command);
        Ok(())
    }

    fn apply_command(
        &self,
        name: &str,
        method: &str,
        models: &[String],
        with: &Value,
        texts: &[Text],
        examples: &[String],
    ) -> String {
        let mut command = format!("refit apply {method} {}", models.join(" "));
        let defaults = registry::get(method).map(|entry| entry.default().parameters());
        for (key, value) in with.as_object().into_iter().flatten() {
            let flag = key.replace('_', "-");
            match value {
                // A flag that is on by default takes a value.
                Value::Bool(set) if defaults.as_ref().is_ok_and(|all| all[key] == true) => {
                    command.push_str(&format!(" --{flag} {set}"));
                }
                Value::Bool(true) => command.push_str(&format!(" --{flag}")),
                Value::Bool(false) | Value::Null => {}
                Value::String(text) => command.push_str(&format!(" --{flag} {text}")),
                Value::Array(list) => {
                    let word = |v: &Value| v.as_str().map_or(v.to_string(), str::to_owned);
                    let words: Vec<String> = list.iter().map(word).collect();
                    command.push_str(&format!(" --{flag} {}", words.join(",")));
                }
                other => command.push_str(&format!(" --{flag} {other}")),
            }
        }
        for words in examples {
            command.push_str(&format!(" {words}"));
        }
        if !texts.is_empty() {
            let names: Vec<&str> = texts.iter().map(|t| t.source.as_str()).collect();
            command.push_str(&format!(" --text {}", names.join(" ")));
        }
        if self.recipe.seed != 0 {
            command.push_str(&format!(" --seed {}", self.recipe.seed));
        }
        format!("{command} -o {}", self.dir.join(name).display())
    }

    /// A model as a user would type it.
    fn spelt(&self, name: &str) -> String {
        match self.record.artifact(name).and_then(|a| a.source.clone()) {
            Some(source) => source,
            None => self.dir.join(name).display().to_string(),
        }
    }

    fn eval(&mut self, name: &str, work: &Work) -> Result {
        let Work::Eval { models, on, reference, window, max_tokens } = work else { return Ok(()) };
        let texts = self.text(on)?;
        // A budget of tokens is spent evenly over the texts.
        let each = max_tokens.map(|most| most.div_ceil(texts.len().max(1)));
        let options = Options {
            window: Some(*window),
            max_tokens: each,
            seed: self.recipe.seed,
            ..Options::default()
        };
        let whole: String = texts.iter().map(|t| t.text.as_str()).collect();
        let text_sha256 = hash::hex(whole.as_bytes());
        let hash_of = |name: &str| self.record.artifact(name).map(|a| a.content_hash.clone());
        let mut cache: Option<(Vec<Segment>, Option<ReferenceCache>)> = None;
        let (mut arms, mut spent, mut all_reused) = (Vec::new(), 0.0, true);
        for model in models {
            // A model that is gone was measured before, or is missed below.
            let rounder = match Artifact::open(self.base(model)) {
                Ok(artifact) => activations::stated(&artifact)?,
                Err(_) => Rounder::default(),
            };
            let identity = identity(json!({
                "refit": env!("CARGO_PKG_VERSION"),
                "eval": hash_of(model),
                "activations": rounder.roundings,
                "reference": reference.as_deref().and_then(hash_of),
                "text": text_sha256,
                "window": window,
                "max_tokens": max_tokens,
                "seed": self.recipe.seed,
            }));
            let key = format!("{name}.{model}");
            if let Some(done) = self.done::<Arm>(&key, &identity)? {
                spent += done.seconds;
                arms.push(done.result);
                continue;
            }
            all_reused = false;
            let start = Instant::now();
            if cache.is_none() {
                cache = Some(self.reference(models, reference.as_deref(), texts, &options)?);
            }
            let Some((segments, reference_cache)) = &cache else { continue };
            let decoder = self.decoder(model)?;
            let against = match reference_cache {
                Some(cache) if reference.as_ref() != Some(model) => Reference::Cache(cache),
                _ => Reference::None,
            };
            let progress = |done: u64, total: u64| match done {
                0 => self.app.progress.begin(&format!("eval {model}"), total, "windows"),
                _ => self.app.progress.set(done, Some(total)),
            };
            let rounded = Rounded { model: &decoder, rounder: &rounder };
            let runs: &dyn CausalLm = if rounder.is_empty() { &decoder } else { &rounded };
            let found = eval::perplexity(runs, segments, &options, against, &progress);
            self.app.progress.end();
            let found = found?;
            let arm = Arm {
                artifact: model.clone(),
                perplexity: found.perplexity,
                nll: found.nll,
                interval: found.interval.map(|i| [i.low, i.high]),
                kl_to_reference: found.kl_to_reference,
                top1_agreement: found.top1_agreement,
                tokens: found.tokens as u64,
                tokens_per_second: found.tokens_per_second,
                window_nll: found.windows.iter().map(|w| w.nll / w.tokens.max(1) as f64).collect(),
            };
            let seconds = start.elapsed().as_secs_f64();
            self.finish(&key, &identity, seconds, &arm)?;
            spent += seconds;
            arms.push(arm);
        }
        let names: Vec<&str> = texts.iter().map(|t| t.source.as_str()).collect();
        let command = models.iter().find(|m| Some(*m) != reference.as_ref()).map_or_else(
            String::new,
            |model| {
                let against = reference
                    .as_ref()
                    .map_or_else(String::new, |r| format!(" --reference {}", self.spelt(r)));
                format!(
                    "refit eval {} --text {} --window {window}{against}",
                    self.spelt(model),
                    names.join(" ")
                )
            },
        );
        self.record.evaluations.push(Evaluation {
            name: name.to_owned(),
            text: format!("Text: {}", names.join(", ")),
            text_sha256: text_sha256.clone(),
            window: *window,
            reference: reference.clone(),
            arms,
        });
        self.push_step(name, "eval", text_sha256, spent, all_reused, command);
        Ok(())
    }

    /// The texts of an entry of `data`.
    fn text(&self, name: &str) -> Result<&[Text]> {
        self.texts.get(name).map(Vec::as_slice).ok_or_else(|| {
            Failure::usage(format!(
                "data `{name}` is a table of records, and plain text is needed here"
            ))
        })
    }

    /// Where the model lies that a name stands for: an adapter's base.
    fn base(&self, name: &str) -> &Path {
        let mut name = name;
        while Adapter::is_adapter(&self.places[name]) {
            let parent = self.record.artifact(name).and_then(|record| record.parents.first());
            match parent {
                Some(parent) => name = parent,
                None => break,
            }
        }
        &self.places[name]
    }

    /// Brings a model to life, or an adapter on its base.
    fn decoder(&self, name: &str) -> Result<Decoder> {
        let artifact = Artifact::open(self.base(name))?;
        let place = &self.places[name];
        let adapters = match Adapter::is_adapter(place) {
            true => vec![Adapter::open(place)?],
            false => Vec::new(),
        };
        engine::load_adapted(self.app, &artifact, &adapters, "run")
    }

    /// Tokens of the texts, and the reference's answers to them, computed once for all arms.
    fn reference(
        &self,
        models: &[String],
        reference: Option<&str>,
        texts: &[Text],
        options: &Options,
    ) -> Result<(Vec<Segment>, Option<ReferenceCache>)> {
        let Some(first) = reference.or(models.first().map(String::as_str)) else {
            return Err(Failure::usage("there is no model to measure"));
        };
        let artifact = Artifact::open(self.base(first))?;
        let tokenizer = engine::tokenizer(&artifact)?;
        for other in models.iter().filter(|m| *m != first) {
            engine::tokenizer(&Artifact::open(self.base(other))?)?.check_same(&tokenizer)?;
        }
        let mut segments = Vec::new();
        for text in texts {
            let ids = tokenizer.encode(&text.text, false)?;
            let window = options.window.unwrap_or(2);
            eval_verb::check_window(
                std::slice::from_ref(text),
                ids.len(),
                window,
                artifact.architecture().dims.context,
            )?;
            segments.push(Segment::new(text.source.clone(), ids));
        }
        let cache = match reference {
            Some(_) => {
                let decoder = self.decoder(first)?;
                self.app.progress.begin("reference", 0, "");
                let cache = ReferenceCache::fill(&decoder, &segments, options);
                self.app.progress.end();
                Some(cache?)
            }
            None => None,
        };
        Ok((segments, cache))
    }

    fn push_step(
        &mut self,
        name: &str,
        kind: &str,
        identity: String,
        seconds: f64,
        reused: bool,
        command: String,
    ) {
        if reused {
            self.app.progress.note("      already done, skipped");
        }
        self.record.steps.push(StepRecord {
            name: name.to_owned(),
            kind: kind.to_owned(),
            identity,
            seconds,
            reused,
            command,
        });
    }

    fn step_file(&self, name: &str) -> PathBuf {
        self.dir.join("steps").join(format!("{name}.json"))
    }

    /// What an earlier run left for this very step.
    fn done<T: for<'de> Deserialize<'de>>(
        &self,
        name: &str,
        identity: &str,
    ) -> Result<Option<Done<T>>> {
        // An unreadable or older file only means that the step is done again.
        let Ok(bytes) = std::fs::read(self.step_file(name)) else { return Ok(None) };
        let done: Option<Done<T>> = serde_json::from_slice(&bytes).ok();
        Ok(done.filter(|done| done.identity == identity))
    }

    fn finish<T: Serialize>(&self, name: &str, identity: &str, seconds: f64, result: &T) -> Result {
        let done = Done { identity: identity.to_owned(), seconds, note: None, result };
        let json = serde_json::to_vec(&done)
            .map_err(|e| Failure::system(format!("steps/{name}.json: cannot write: {e}")))?;
        write_atomically(&self.step_file(name), &json)
    }
}

/// A run directory is new, empty, or one that an earlier run began: another one's files are not mixed with ours.
fn check_run_dir(dir: &Path) -> Result {
    let foreign = match std::fs::read_dir(dir) {
        Ok(mut entries) => entries.next().is_some() && !dir.join("steps").is_dir(),
        Err(error) => {
            error.kind() != std::io::ErrorKind::NotFound && dir.symlink_metadata().is_ok()
        }
    };
    match foreign {
        true => Err(Failure::usage(format!(
            "{}: already exists and is not the directory of a run; choose another one with -o DIR",
            dir.display()
        ))),
        false => Ok(()),
    }
}

fn identity(of: Value) -> String {
    hash::hex(of.to_string().as_bytes())
}

fn machine(app: &App) -> Machine {
    crate::machine::describe(app.global.device.as_str())
}

/// Sets two arms side by side, with a paired bootstrap over windows where both have them.
fn contest(record: &RunRecord, spec: &ContestSpec, seed: u64) -> Contest {
    let windows = |name: &str| record.arm(name).map(|arm| arm.window_nll.as_slice());
    let difference = match (windows(&spec.candidate), windows(&spec.baseline)) {
        (Some(a), Some(b)) if a.len() == b.len() && a.len() > 1 => {
            stats::paired_bootstrap(a, b, 2000, 0.95, seed)
                .map(|b| [b.difference.low, b.difference.high])
        }
        _ => None,
    };
    Contest {
        title: spec.title.clone(),
        baseline: spec.baseline.clone(),
        candidate: spec.candidate.clone(),
        difference,
    }
}
