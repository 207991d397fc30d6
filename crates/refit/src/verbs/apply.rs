//! `refit apply METHOD MODEL... -o OUT`: one method, its flags made from its parameters.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::{ArgAction, ArgMatches, Command};
use refit_methods::method::{
    AdapterInput, Context, Family, Inputs, ModelInput, Need, OutputKind, Plan, TextData,
    TrainingEvent, Unit,
};
use refit_methods::registry::{self, Entry};
use refit_store::adapter::Adapter;
use refit_store::{Artifact, ArtifactWriter};
use serde_json::{Value, json};

use crate::cli::{App, DeviceName};
use crate::failure::{Code, Failure, Result};
use crate::output::{self, Outcome};
use crate::progress::Progress;
use crate::report::number;
use crate::suggest::did_you_mean;
use crate::{inputs, labelled, ranks};

/// The command with one subcommand per method.
pub fn command() -> Command {
    Command::new("apply")
        .about("Apply a method to models and write the result: `refit apply METHOD MODEL... -o OUT`")
        .long_about(
            "Apply a method to models and write the result as a Hugging Face directory with lineage and card.\n\
             Each method has its own flags, with the paper's defaults: `refit apply METHOD --help`.",
        )
        .subcommand_value_name("METHOD")
        .subcommand_help_heading("Methods")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .allow_external_subcommands(true)
        .disable_help_subcommand(true)
        .subcommands(registry::all().iter().map(method_command))
}

/// The command of one method: its flags, its models, where the result goes.
pub fn method_command(entry: &Entry) -> Command {
    let spec = entry.info.inputs;
    let (value, help) = match spec.adapters {
        Need::No => ("MODEL", "Models: directories, files or sources"),
        _ => ("MODEL_OR_ADAPTER", "The model, and the adapters: directories, files or sources"),
    };
    let models = clap::Arg::new("models")
        .value_name(value)
        .help(help)
        .num_args(1..)
        .required(spec.min_models > 0)
        .help_heading(None::<&str>);
    let mut command = entry.command().arg(models).next_help_heading("Output and inputs");
    if entry.info.output != OutputKind::Report {
        command = command
            .arg(
                clap::Arg::new("out")
                    .long("out")
                    .short('o')
                    .value_name("DIR")
                    .value_parser(clap::value_parser!(PathBuf))
                    .help("Directory to write; it must not exist yet"),
            )
            .arg(flag("force", "Replace an existing output"))
            .arg(flag(
                "no-resume",
                "Start over instead of going on where an interrupted run stopped",
            ));
    }
    if spec.base != Need::No {
        let base = clap::Arg::new("base").long("base").value_name("MODEL");
        command = command.arg(base.help(
            "The model that the others were fine-tuned from; its configuration and tokenizer go along",
        ));
    }
    if spec.data != Need::No {
        command = command.arg(
            clap::Arg::new("data")
                .long("data")
                .value_name("FILE")
                .action(ArgAction::Append)
                .num_args(1..)
                .help(match spec.data {
                    Need::Optional => "Classified texts: .jsonl, .csv or .parquet with the columns `text` and `label`",
                    _ => {
                        "What to learn: .jsonl, .csv or .parquet with `messages`, `prompt` and `completion`, or `text`; else \
                         plain text (files, or builtin:kjv-calib)"
                    }
                }),
        );
    }
    if spec.text != Need::No {
        command = command.arg(
            clap::Arg::new("text")
                .long("text")
                .value_name("FILE")
                .action(ArgAction::Append)
                .num_args(1..)
                .help(format!("{} (files, or builtin:calibration)", data_role(entry))),
        );
    }
    if spec.labelled != Need::No {
        command = command.arg(
            clap::Arg::new("labelled")
                .long("labelled")
                .value_name("PATH")
                .help(format!(
                    "{}: a folder with one folder of images per class, an IDX pair, or a table of texts and labels",
                    match spec.text {
                        Need::No => data_role(entry),
                        _ => "Labelled held-out examples that score candidates by accuracy",
                    }
                )),
        );
    }
    command
        .arg(
            clap::Arg::new("seed")
                .long("seed")
                .value_name("N")
                .value_parser(clap::value_parser!(u64))
                .default_value("0")
                .help("Seed of every random choice"),
        )
        .arg(flag("dry-run", "Print the plan and write nothing"))
        .arg_required_else_help(true)
}

fn data_role(entry: &Entry) -> &'static str {
    match entry.info.inputs.data_role {
        "" => "Data",
        role => role,
    }
}

fn flag(name: &'static str, help: &'static str) -> clap::Arg {
    clap::Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
}

/// Runs the method that was named.
pub fn run(app: &App, matches: &ArgMatches) -> Result<Outcome> {
    let (name, matches) = matches.subcommand().ok_or_else(|| Failure::usage("which method?"))?;
    let Some(entry) = registry::all().iter().find(|entry| entry.info.name == name) else {
        let names = registry::all().iter().map(|entry| entry.info.name);
        let hint = did_you_mean(name, names);
        return Err(Failure::usage(format!(
            "there is no method `{name}`{hint}; `refit methods` lists them"
        )));
    };
    run_method(app, entry, matches)
}

/// Runs a method with the flags of its command.
pub fn run_method(app: &App, entry: &'static Entry, matches: &ArgMatches) -> Result<Outcome> {
    let given = |id: &str| matches.try_get_many::<String>(id).ok().flatten();
    let models: Vec<String> = given("models").into_iter().flatten().cloned().collect();
    let text: Vec<String> = given("text").into_iter().flatten().cloned().collect();
    let data: Vec<String> = given("data").into_iter().flatten().cloned().collect();
    let path = |id: &str| matches.try_get_one::<PathBuf>(id).ok().flatten().cloned();
    let set = |id: &str| matches!(matches.try_get_one::<bool>(id), Ok(Some(true)));
    let request = Request {
        entry,
        method: entry.from_matches(matches)?,
        models,
        base: given("base").into_iter().flatten().next().cloned(),
        text,
        data,
        labelled: matches.try_get_one::<String>("labelled").ok().flatten().cloned(),
        out: path("out"),
        seed: matches.get_one::<u64>("seed").copied().unwrap_or(0),
        force: set("force"),
        resume: !set("no-resume"),
    };
    if app.global.device != DeviceName::Cpu {
        app.progress.note(&on_the_cpu(app));
    }
    match set("dry-run") {
        true => request.dry_run(app),
        false => Ok(request.run(app)?.outcome()),
    }
}

/// What to say where `--device` asks for something that methods do not use.
pub fn on_the_cpu(app: &App) -> String {
    let device = app.global.device.as_str();
    format!("note: --device {device}: methods compute on the CPU; evaluation uses the device")
}

/// One method with its parameters and everything that it is applied to.
pub struct Request {
    /// The method.
    pub entry: &'static Entry,
    /// With its parameters.
    pub method: Box<dyn registry::Configured>,
    /// Source strings of the models.
    pub models: Vec<String>,
    /// Source string of the base of the models; it may be among them.
    pub base: Option<String>,
    /// Text files or corpora.
    pub text: Vec<String>,
    /// Files of training data.
    pub data: Vec<String>,
    /// Labelled examples: a folder, an IDX pair, a table or a source of them.
    pub labelled: Option<String>,
    /// Where the result goes.
    pub out: Option<PathBuf>,
    /// Seed of every random choice.
    pub seed: u64,
    /// Replace an existing output.
    pub force: bool,
    /// Continue an interrupted run.
    pub resume: bool,
}

/// What applying a method gave.
pub struct Applied {
    /// Its plan.
    pub plan: Plan,
    /// What the method returned.
    pub output: refit_methods::method::Output,
    /// Wall time in seconds.
    pub seconds: f64,
}

impl Request {
    /// Everything that the method reads, opened.
    pub fn inputs(&self, app: &App) -> Result<Inputs> {
        let (mut models, mut adapters) = (Vec::new(), Vec::new());
        // The base comes first: its configuration goes along.
        for source in self.sources() {
            let path = inputs::pull(app, source, false)?.path;
            if Adapter::is_adapter(&path) {
                adapters.push((source.clone(), Adapter::open(&path)?));
                continue;
            }
            let artifact = Arc::new(Artifact::open(&path)?);
            artifact.check_fit()?;
            models.push(ModelInput { source: source.clone(), artifact });
        }
        let adapters = adapters
            .into_iter()
            .map(|(source, mut adapter)| {
                models.iter().take(1).for_each(|model| adapter.align(&model.artifact));
                AdapterInput { source, adapter: Arc::new(adapter) }
            })
            .collect();
        let text = inputs::texts(&self.text)?
            .into_iter()
            .map(|text| TextData { source: text.source, text: text.text })
            .collect();
        let family = self.entry.info.family;
        let labelled = self.labelled.as_deref();
        let labelled =
            labelled.map(|source| labelled::open_for(app, source, family)).transpose()?;
        let data = inputs::training(&self.data)?;
        let base = self.base.as_ref().map(|_| 0);
        Ok(Inputs { models, base, text, labelled, data, adapters })
    }

    /// Source strings of all models, the base first.
    fn sources(&self) -> impl Iterator<Item = &String> {
        let base = self.base.as_ref();
        base.into_iter().chain(self.models.iter().filter(move |source| Some(*source) != base))
    }

    /// Everything that is checked before work starts.
    fn prepare(&self, app: &App) -> Result<(Inputs, Plan)> {
        let fetch =
            || self.sources().try_for_each(|source| inputs::pull(app, source, false).map(drop));
        if !app.ranks.alone() {
            ranks::in_turns(&app.ranks, fetch)?;
        }
        app.ranks.settle(self.prepare_here(app))
    }

    /// What every process of a command checks for itself.
    fn prepare_here(&self, app: &App) -> Result<(Inputs, Plan)> {
        if self.entry.info.output != OutputKind::Report && self.out.is_none() {
            return Err(Failure::usage(format!(
                "{}: say where the result goes: -o DIR",
                self.entry.info.name
            )));
        }
        if let Some(out) = self.out.as_ref().filter(|_| app.ranks.leads()) {
            ArtifactWriter::check(out, self.force)?;
        }
        let inputs = self.inputs(app)?;
        let mut plan = self.method.plan(&inputs)?;
        plan.warnings
            .extend(inputs.models.iter().filter_map(|model| inputs::strays(&model.artifact)));
        Ok((inputs, plan))
    }

    /// Finds broken weights before the work starts. Merges read several models once and check what they
    /// add up, so they are not read twice.
    fn check_values(&self, app: &App, inputs: &Inputs) -> Result {
        if self.entry.info.family == Family::Merge {
            return Ok(());
        }
        app.progress.begin("checking the weights", 0, "");
        let checked = inputs.models.iter().try_for_each(|model| model.artifact.check_finite());
        app.progress.end();
        Ok(checked?)
    }

    /// Prints the plan.
    pub fn dry_run(&self, app: &App) -> Result<Outcome> {
        let sources: Vec<String> = self.sources().cloned().collect();
        let fetched = inputs::announce(app, &sources)?;
        let (_, mut plan) = self.prepare(app)?;
        plan.notes.extend(fetched);
        let mut text = format!("{} would be applied to {}\n", plan.method, sources.join(", "));
        if let Some(out) = &self.out {
            text.push_str(&format!("and written to {}\n", out.display()));
        }
        text.push('\n');
        text.push_str(&output::facts([
            ("tensors", format!("{} changed of {}", plan.changed(), plan.tensors.len())),
            ("output", number::bytes(plan.output_bytes)),
            ("peak memory", format!("about {}", number::bytes(plan.peak_memory))),
            ("parameters", spelt(&plan.parameters)),
        ]));
        for (i, step) in plan.steps.iter().enumerate() {
            text.push_str(&format!("{}. {step}\n", i + 1));
        }
        push_lines(&mut text, "note", &plan.notes);
        push_lines(&mut text, "warning", &plan.warnings);
        Ok(Outcome::new(json!({"dry_run": true, "out": self.out, "plan": plan}), text))
    }

    /// Does the work.
    pub fn run(&self, app: &App) -> Result<Applied> {
        let (inputs, plan) = self.prepare(app)?;
        for warning in &plan.warnings {
            app.progress.note(&format!("warning: {warning}"));
        }
        app.ranks.lead(|| self.check_values(app, &inputs))?;
        let mut cx = Context {
            out: self.out.clone(),
            seed: self.seed,
            threads: app.global.threads.map_or(0, usize::from),
            force: self.force,
            resume: self.resume,
            cache: app.global.cache.clone().unwrap_or_else(refit_store::source::cache_root),
            progress: Arc::new(Bars(app.progress.clone())),
            ranks: app.ranks.clone(),
            ..Context::default()
        };
        let start = Instant::now();
        let absent = self.absent_parents();
        let output = self.method.run(&inputs, &plan, &mut cx);
        app.progress.end();
        let output = output.map_err(|error| self.give_up(app, error, &absent))?;
        Ok(Applied { plan, output, seconds: start.elapsed().as_secs_f64() })
    }
}

impl Request {
    /// Directories above the output that do not exist yet, innermost first.
    fn absent_parents(&self) -> Vec<&Path> {
        let above = self.out.iter().flat_map(|out| out.ancestors().skip(1));
        above.take_while(|dir| !dir.as_os_str().is_empty() && !dir.exists()).collect()
    }

    /// Clears away the unfinished output of a run that failed for good: the same inputs would fail again,
    /// and other inputs start over. After a failure of the system, or where the output exists by now, the
    /// finished tensors stay for the next run.
    fn give_up(&self, app: &App, error: refit_methods::Error, absent: &[&Path]) -> Failure {
        use refit_methods::Error;
        let runs_the_model = matches!(error, Error::Model(_) | Error::Train(_));
        // Checkpoints stay: the newest is what a run with other settings may want to look at.
        let failure = Failure::from(error);
        if let Some(out) = &self.out
            && failure.code == Code::Usage
            && app.ranks.leads()
            && ArtifactWriter::check(out, self.force).is_ok()
        {
            // The failure that is reported is the one that matters; only empty directories are removed.
            let _ = ArtifactWriter::discard(out);
            absent.iter().for_each(|dir| drop(std::fs::remove_dir(dir)));
        }
        match &self.models[..] {
            [only] if runs_the_model => failure.about(Path::new(only)),
            _ => failure,
        }
    }
}

impl Applied {
    /// What is printed of it.
    pub fn outcome(self) -> Outcome {
        let peak = refit_train::measure::peak_memory();
        let mut facts = Vec::new();
        if let Some(path) = &self.output.artifact {
            facts.push(("wrote", path.display().to_string()));
        }
        facts.push((
            "tensors",
            format!("{} changed of {}", self.plan.changed(), self.plan.tensors.len()),
        ));
        facts.push(("bytes", number::bytes(self.plan.output_bytes)));
        facts.push(("time", number::seconds(self.seconds)));
        if let Some(peak) = peak {
            facts.push(("peak memory", number::bytes(peak)));
        }
        let reported = reported(&self.output.report);
        facts.extend(reported.iter().map(|(name, value)| (name.as_str(), value.clone())));
        let mut text = output::facts(facts);
        push_lines(&mut text, "warning", &self.output.warnings);
        let json = json!({
            "artifact": self.output.artifact,
            "method": self.plan.method,
            "parameters": self.plan.parameters,
            "bytes": self.plan.output_bytes,
            "report": self.output.report,
            "warnings": self.plan.warnings.iter().chain(&self.output.warnings).collect::<Vec<_>>(),
            "seconds": self.seconds,
            "peak_memory": peak,
        });
        Outcome::new(json, text)
    }
}

/// What a method measured, fit for a reader.
fn reported(report: &Value) -> Vec<(String, String)> {
    let words = |key: &str, value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(n) => Some(match (n.as_u64(), key.contains("bytes")) {
            (Some(n), true) => number::bytes(n),
            (Some(n), false) => number::count(n),
            (None, _) => number::plain(n.as_f64()?),
        }),
        _ => None,
    };
    let rows = report.as_object().into_iter().flatten();
    rows.filter_map(|(key, value)| Some((key.replace('_', " "), words(key, value)?))).collect()
}

/// Parameters in the order of their declaration: `bits 3, group 64`.
fn spelt(parameters: &Value) -> String {
    let set = parameters.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    let words = set.map(|(key, value)| match value {
        Value::String(text) => format!("{key} {text}"),
        other => format!("{key} {other}"),
    });
    words.collect::<Vec<_>>().join(", ")
}

fn push_lines(text: &mut String, kind: &str, lines: &[String]) {
    for line in lines {
        text.push_str(&format!("{kind}: {line}\n"));
    }
}

/// Methods' progress, shown as the binary shows progress.
pub struct Bars(pub Arc<Progress>);

impl refit_methods::method::Progress for Bars {
    fn begin(&self, stage: &str, total: u64, unit: Unit) {
        let unit = match unit {
            Unit::Bytes => "bytes",
            Unit::Tensors => "tensors",
            Unit::Blocks => "blocks",
            Unit::Tokens => "tokens",
            Unit::Steps => "steps",
        };
        self.0.begin(stage, total, unit);
    }

    fn advance(&self, by: u64) {
        self.0.advance(by);
    }

    fn end(&self) {
        self.0.end();
    }

    fn training(&self, event: &TrainingEvent) {
        self.0.training(event);
    }

    fn note(&self, message: &str) {
        self.0.note(message);
    }
}
