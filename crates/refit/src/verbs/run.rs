//! `refit run RECIPE`: a recipe from end to end, resumable, with a report.

use std::path::PathBuf;

use serde_json::json;

use refit_methods::merge::mergekit::{self, Recipe};

use super::apply::Request;
use crate::cli::{App, DeviceName};
use crate::failure::{Failure, Result};
use crate::inputs;
use crate::output::{Outcome, Table};
use crate::recipe::record::RunRecord;
use crate::recipe::runner::Runner;
use crate::recipe::schema;
use crate::report::number;

/// Run a recipe: every step, then the report; finished steps are skipped when it is run again. Recipes of mergekit are
/// merged as they are
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The YAML file: refit's own, or one of mergekit's
    recipe: PathBuf,
    /// Run directory [default: runs/NAME]; of a mergekit recipe, the directory of the merged model [default: runs/FILE]
    #[arg(long, short, value_name = "DIR")]
    out: Option<PathBuf>,
    /// A mergekit recipe: follow mergekit to the letter, also where it is wrong
    #[arg(long)]
    mergekit_compat: bool,
    /// A mergekit recipe: seed of every random choice [default: 0]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Do every step again
    #[arg(long)]
    fresh: bool,
    /// Check the recipe, print its steps, and run nothing
    #[arg(long)]
    dry_run: bool,
}

/// Checks and runs the recipe.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    let text = schema::load(&args.recipe)?;
    if mergekit::is_mergekit(&text) {
        return merge(app, &args, &text);
    }
    for (flag, given) in
        [("--mergekit-compat", args.mergekit_compat), ("--seed", args.seed.is_some())]
    {
        if given {
            let problem = "this is a recipe of refit's own; the flag is for those of mergekit";
            return Err(Failure::usage(format!("{flag}: {}: {problem}", args.recipe.display())));
        }
    }
    let recipe = schema::parse(&text).map_err(|failure| failure.within(args.recipe.display()))?;
    let dir = args.out.clone().unwrap_or_else(|| PathBuf::from("runs").join(&recipe.name));
    let runner = Runner::new(app, &recipe, &args.recipe, &text, dir.clone())?;
    let check = || runner.check().map_err(|failure| failure.within(args.recipe.display()));
    if app.global.device != DeviceName::Cpu {
        app.progress.note(&super::apply::on_the_cpu(app));
    }
    if args.dry_run {
        let sources: Vec<String> = recipe.sources().map(str::to_owned).collect();
        let fetched = inputs::announce(app, &sources)?;
        let checked = check()?.noting(fetched);
        let shown = format!(
            "{} ({} steps) would run in {}\n{}",
            recipe.name,
            recipe.steps.len(),
            dir.display(),
            checked.text(&recipe)
        );
        let (steps, notes) = (checked.json(&recipe), checked.notes());
        let json = json!({"dry_run": true, "run": dir, "steps": steps, "notes": notes});
        return Ok(Outcome::new(json, shown));
    }
    let checked = check()?;
    if args.fresh {
        let steps = dir.join("steps");
        match std::fs::remove_dir_all(&steps) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Failure::io(&steps, "remove", &e));
            }
            _ => {}
        }
    }
    let record = runner.run(checked)?;
    let mut shown = table(&record);
    for note in &record.notes {
        shown.push_str(&format!("\nnote: {note}\n"));
    }
    shown.push_str(&format!(
        "\n{} in all, peak memory {}\nreport  {}\nrecord  {}",
        number::seconds(record.seconds),
        record.peak_memory.map_or_else(|| "unknown".to_owned(), number::bytes),
        dir.join("report.html").display(),
        dir.join("run.json").display()
    ));
    let json = json!({"run": dir, "report": dir.join("report.html"), "record": record});
    Ok(Outcome::new(json, shown))
}

/// Merges as a recipe of mergekit says.
fn merge(app: &App, args: &Args, text: &str) -> Result<Outcome> {
    let within = |failure: Failure| failure.within(args.recipe.display());
    let recipe = Recipe::parse(&args.recipe, text, args.mergekit_compat)
        .map_err(|error| within(Failure::from(error)))?;
    let stem = args.recipe.file_stem().unwrap_or(args.recipe.as_os_str());
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from("runs").join(stem));
    let mut sources: Vec<String> = recipe.models().iter().map(|name| source_of(name)).collect();
    let base = recipe.has_base().then(|| sources.remove(0));
    let request = Request {
        entry: recipe.entry()?,
        method: Box::new(recipe),
        models: sources,
        base,
        text: Vec::new(),
        data: Vec::new(),
        labelled: None,
        out: Some(out),
        seed: args.seed.unwrap_or(0),
        force: args.fresh,
        resume: !args.fresh,
    };
    if app.global.device != DeviceName::Cpu {
        app.progress.note(&super::apply::on_the_cpu(app));
    }
    let done = match args.dry_run {
        true => request.dry_run(app),
        false => request.run(app).map(|applied| applied.outcome()),
    };
    done.map_err(within)
}

/// A model as mergekit names it (a path, or `owner/name[@revision]` on the hub) as a source of refit's.
fn source_of(name: &str) -> String {
    let path = name.split('@').next().unwrap_or(name);
    let on_the_hub = path.matches('/').count() == 1 && !path.starts_with(['.', '/', '~']);
    match on_the_hub && !name.contains(':') && !std::path::Path::new(name).exists() {
        true => format!("hf:{name}"),
        false => name.to_owned(),
    }
}

fn table(record: &RunRecord) -> String {
    let mut text = String::new();
    for evaluation in &record.evaluations {
        let mut table = Table::new(
            2,
            &["model", "group", "perplexity", "KL", "bits/weight", "sparsity", "packed", "made in"],
        );
        for arm in &evaluation.arms {
            let artifact = record.artifact(&arm.artifact);
            let dash = || "–".to_owned();
            let is_reference = Some(&arm.artifact) == evaluation.reference.as_ref();
            table.row([
                record.label(&arm.artifact).to_owned(),
                artifact.map_or_else(String::new, |a| a.group.clone()),
                number::plain(arm.perplexity),
                arm.kl_to_reference.filter(|_| !is_reference).map_or_else(dash, number::plain),
                artifact.and_then(|a| a.bits_per_weight).map_or_else(dash, |b| format!("{b:.3}")),
                artifact
                    .and_then(|a| a.sparsity)
                    .map_or_else(dash, |s| format!("{:.1} %", s * 100.0)),
                artifact.map_or_else(dash, |a| number::bytes(a.packed_bytes.unwrap_or(a.bytes))),
                artifact
                    .filter(|a| a.method.is_some())
                    .map_or_else(dash, |a| number::seconds(a.seconds)),
            ]);
        }
        text.push_str(&table.to_string());
    }
    text
}
