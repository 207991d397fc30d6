//! `refit claim METHOD`: the paper's central result as an experiment that anyone can rerun.

use std::path::PathBuf;

use refit_methods::registry;
use refit_train::claim::{RunOptions, Verdict};

use crate::cli::App;
use crate::failure::{Failure, Result};
use crate::inputs;
use crate::output::Outcome;

/// Run a method's claim beside its rivals: arms, seeds, margins, verdict (exit code 1 unless reproduced)
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The method
    method: String,
    /// One seed and, where the experiment allows, less data
    #[arg(long)]
    quick: bool,
    /// Seeds instead of the claim's own
    #[arg(long, num_args = 1.., value_name = "N")]
    seeds: Option<Vec<u64>>,
    /// Also write METHOD.md and METHOD.json into this directory
    #[arg(long, short, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Run every trial again, also those that an interrupted run finished
    #[arg(long)]
    fresh: bool,
    /// Say what would be run, and run nothing
    #[arg(long)]
    dry_run: bool,
}

/// Runs the experiment.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    let entry = registry::get(&args.method)?;
    let Some(claim) = entry.claim() else {
        let with: Vec<&str> =
            registry::all().iter().filter(|e| e.claim().is_some()).map(|e| e.info.name).collect();
        return Err(Failure::usage(format!(
            "{}: this method has no claim of its own; methods with one: {}",
            args.method,
            with.join(", ")
        )));
    };
    if args.dry_run {
        let text = format!(
            "{}\n{}\nassets: {}\nseeds: {:?}, about {} minutes on 2 cores",
            claim.question,
            claim.paper,
            claim.assets.join(", "),
            claim.seeds,
            claim.minutes
        );
        let json = serde_json::json!({
            "dry_run": true,
            "method": claim.method,
            "question": claim.question,
            "assets": claim.assets,
            "seeds": claim.seeds,
            "minutes": claim.minutes,
        });
        return Ok(Outcome::new(json, text));
    }
    if let Some(dir) = &args.out {
        super::check_writable(dir)?;
    }
    let work = super::cache_dir(app)?.join("claims").join(&args.method);
    let resolve = |source: &str| match inputs::pull(app, source, false) {
        Ok(pulled) => Ok(pulled.path),
        Err(failure) => Err(failure.message.into()),
    };
    let progress = |line: &str| app.progress.note(line);
    let report = claim.run(&RunOptions {
        quick: args.quick,
        seeds: args.seeds,
        work: Some(work),
        fresh: args.fresh,
        command: Some(format!(
            "refit claim {}{}",
            args.method,
            if args.quick { " --quick" } else { "" }
        )),
        resolve: &resolve,
        progress: &progress,
    });
    let mut text = report.to_markdown();
    if let Some(dir) = &args.out {
        let paths = report.write(dir)?;
        for path in paths {
            text.push_str(&format!("\nwrote {}", path.display()));
        }
    }
    let json = serde_json::to_value(&report).map_err(|e| {
        Failure::system(format!("the claim's report cannot be printed as JSON: {e}"))
    })?;
    Ok(Outcome::new(json, text).holds(report.verdict == Verdict::Reproduced))
}
