//! `refit run RECIPE`: a recipe from end to end, resumable, with a report.

use std::path::PathBuf;

use serde_json::json;

use crate::cli::{App, DeviceName};
use crate::failure::{Failure, Result};
use crate::inputs;
use crate::output::{Outcome, Table};
use crate::recipe::record::RunRecord;
use crate::recipe::runner::Runner;
use crate::recipe::schema;
use crate::report::number;

/// Run a recipe: every step, then the report; finished steps are skipped when it is run again
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The YAML file
    recipe: PathBuf,
    /// Run directory [default: runs/NAME]
    #[arg(long, short, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Do every step again
    #[arg(long)]
    fresh: bool,
    /// Check the recipe, print its steps, and run nothing
    #[arg(long)]
    dry_run: bool,
}

/// Checks and runs the recipe.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    let (recipe, text) = schema::read(&args.recipe)?;
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
