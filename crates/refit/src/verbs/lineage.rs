//! `refit lineage ARTIFACT`: verifies the manifest against the bytes on disk and walks the parents.

use refit_store::Lineage;
use refit_store::lineage::{ParentStatus, Verification};
use refit_store::source::{self, PullOptions};
use serde_json::json;

use crate::cli::App;
use crate::failure::Result;
use crate::inputs;
use crate::output::Outcome;

/// Verify an artifact's lineage: recompute every hash, here and in every parent that can be found
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model that refit wrote: a directory, or any other source
    artifact: String,
}

/// Verifies; a mismatch is exit code 1.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    // A check fetches nothing: sources that are in the cache are looked at, others end the chain.
    let options =
        PullOptions { cache: app.global.cache.clone(), offline: true, ..PullOptions::default() };
    let find = |source: &str| source::resolve(source, &options, &|_, _| {}).ok().map(|p| p.path);
    let artifact = inputs::pull(app, &args.artifact, false)?.path;
    let checked = Lineage::verify_with(&artifact, &find)?;
    let manifest = Lineage::read(&artifact)?;
    let mut text = String::new();
    if let Some(manifest) = &manifest {
        text.push_str(&format!(
            "{} · {} (refit {})\n",
            artifact.display(),
            manifest.method,
            manifest.refit
        ));
        if let Some(command) = &manifest.command {
            text.push_str(&format!("  {command}\n"));
        }
    }
    tree(&checked, 1, &mut text);
    let ok = checked.is_ok();
    text.push_str(match (ok, checked.is_truncated()) {
        (true, false) => "verified: every hash is as recorded, back to the roots",
        (true, true) => "verified as far as the parents could be found",
        (false, _) => "NOT verified: something differs from what was recorded",
    });
    let json = json!({
        "verified": ok,
        "truncated": checked.is_truncated(),
        "verification": checked,
        "manifest": manifest,
    });
    Ok(Outcome::new(json, text).holds(ok))
}

fn tree(checked: &Verification, depth: usize, out: &mut String) {
    let pad = "  ".repeat(depth);
    out.push_str(&format!("{pad}{} files, {} tensors checked\n", checked.files, checked.tensors));
    for problem in &checked.problems {
        out.push_str(&format!("{pad}! {problem}\n"));
    }
    for parent in &checked.parents {
        out.push_str(&format!("{pad}from {}", parent.source));
        match &parent.status {
            ParentStatus::Found(below) => {
                out.push('\n');
                tree(below, depth + 1, out);
            }
            ParentStatus::Root => out.push_str(": content hash as recorded\n"),
            ParentStatus::Differs(what) => out.push_str(&format!("\n{pad}! {what}\n")),
            ParentStatus::NotFound => out.push_str(": not found, the chain ends here\n"),
            ParentStatus::Seen => out.push_str(": checked above\n"),
        }
    }
}
