//! `refit scan FILE`: is this file safe to open? Nothing in it is ever executed.

use serde_json::json;

use crate::cli::App;
use crate::failure::Result;
use crate::inputs;
use crate::output::Outcome;

/// Check whether a file or directory is safe to open; nothing in it is executed
#[derive(Debug, clap::Args)]
pub struct Args {
    /// File, directory, or a source that is fetched first
    model: String,
}

/// Scans without running anything; danger is exit code 1.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    let path = inputs::pull(app, &args.model, false)?.path;
    let report = refit_store::scan::scan(&path)?;
    let mut text = String::new();
    for finding in &report.findings {
        let severity = format!("{:?}", finding.severity).to_lowercase();
        text.push_str(&format!("{severity:8} {finding}\n"));
    }
    let safe = report.is_safe();
    let verdict = match (safe, report.findings.is_empty()) {
        (true, true) => "safe: nothing suspicious",
        (true, false) => "safe to open with refit; see the findings before other tools do",
        (false, _) => "NOT SAFE: do not load it anywhere",
    };
    let files = if report.files == 1 { "file" } else { "files" };
    text.push_str(&format!("{} {files} scanned. {verdict}", report.files));
    let json = json!({"safe": safe, "files": report.files, "findings": report.findings});
    Ok(Outcome::new(json, text).holds(safe))
}
