//! `refit report RUN`: draws the report of a run again from its `run.json`, or that of one model or adapter from what lies in
//! its directory.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::cli::App;
use crate::failure::{Failure, Result};
use crate::output::Outcome;
use crate::recipe::record::RunRecord;
use crate::report::{self, Theme, number, single};

/// Draw the HTML report of a run from its run.json, or of one model or adapter that a method wrote
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run directory or run.json; or the directory of a model or adapter
    run: PathBuf,
    /// Where the page goes [default: report.html beside run.json; NAME.report.html beside the directory of a model or adapter]
    #[arg(long, short)]
    out: Option<PathBuf>,
    /// Fix the page's look instead of following the reader's system
    #[arg(long, value_enum, default_value_t)]
    theme: Theme,
    /// Replace a file that is not a report
    #[arg(long)]
    force: bool,
    /// Say what would be written, and write nothing
    #[arg(long)]
    dry_run: bool,
}

/// Renders and writes the page.
pub fn run(_app: &App, args: Args) -> Result<Outcome> {
    let one = !args.run.join("run.json").exists() && single::is_artifact(&args.run);
    let record = if one { single::record(&args.run)? } else { RunRecord::read(&args.run)? };
    let page = report::render(&record, args.theme);
    let out = args.out.unwrap_or_else(|| match one {
        // Not inside: what lies there is what the manifest lists.
        true => {
            let beside = if args.run.file_name().is_some() {
                args.run.clone()
            } else {
                args.run.join("..").join("x")
            };
            beside.with_file_name(format!("{}.report.html", record.name))
        }
        false => {
            let dir = if args.run.is_dir() { Some(args.run.as_path()) } else { args.run.parent() };
            dir.map_or_else(|| PathBuf::from("report.html"), |dir| dir.join("report.html"))
        }
    });
    if !args.force {
        check_target(&out)?;
    }
    let size = page.len() as u64;
    if !args.dry_run {
        super::write_atomically(&out, page.as_bytes())?;
    }
    let done = if args.dry_run { "would write" } else { "wrote" };
    let text = format!("{done} {} ({})", out.display(), number::bytes(size));
    let json = json!({"report": out, "bytes": size, "dry_run": args.dry_run});
    Ok(Outcome::new(json, text))
}

/// A report may take the place of an older report, and of nothing else.
fn check_target(out: &Path) -> Result {
    let mut head = Vec::new();
    let read = std::fs::File::open(out).and_then(|file| file.take(4096).read_to_end(&mut head));
    let replaceable = match read {
        Ok(_) => report::is_report(&String::from_utf8_lossy(&head)),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    };
    match replaceable {
        true => Ok(()),
        false => Err(Failure::usage(format!(
            "{}: already exists and is not a report; choose another name, or --force to replace it",
            out.display()
        ))),
    }
}
