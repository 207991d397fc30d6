//! `refit card ARTIFACT`: the model card, made from facts and the manifest; people's text is kept.

use refit_store::adapter::Adapter;
use refit_store::card::{Card, FILE_NAME, Fact};
use refit_store::{Lineage, lineage::FileRecord};
use serde_json::json;

use crate::cli::App;
use crate::failure::{Failure, Result};
use crate::inputs;
use crate::output::Outcome;

/// Print a model card made from the files; with --write, put it beside them as README.md
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model
    artifact: String,
    /// Write it as README.md into the model's directory, keeping what people wrote there
    #[arg(long)]
    write: bool,
    /// With --write: say what would be written, and write nothing
    #[arg(long)]
    dry_run: bool,
}

/// Gathers the facts and renders them.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    let model = inputs::open(app, &args.artifact)?;
    let artifact = &*model.artifact;
    let dir = if model.path.is_dir() { model.path.clone() } else { super::parent(&model.path) };
    let name = model
        .path
        .file_stem()
        .map_or_else(|| args.artifact.clone(), |n| n.to_string_lossy().into_owned());

    let older = Card::read(&dir)?;
    let mut card = match Lineage::read(&dir)? {
        Some(lineage) => {
            // What only the writing run knew (relation, resources, checks) lives in its card.
            let mut card = older.clone().unwrap_or_else(|| Card::new(name));
            card.take_lineage(&lineage);
            card
        }
        None => Card::new(name),
    };
    if let Some(older) = &older {
        card.merge_human(older);
    }
    let census = artifact.stored_elements().into_iter();
    let census = census.map(|(dtype, count)| (dtype.to_string(), count));
    let base = card.architecture.clone();
    card.take_weights(artifact.architecture(), artifact.format(), census);
    if Adapter::is_adapter(&dir) && matches!(base, Fact::Known(_)) {
        // An adapter's own tensors do not show the model that it is for; the run that wrote it knew.
        card.architecture = base;
    }
    if card.files.is_empty() {
        card.files = artifact
            .file_hashes()?
            .into_iter()
            .map(|file| FileRecord { name: file.name, size: file.bytes, sha256: file.sha256 })
            .collect();
    }
    let text = card.render();
    let complete = card.completeness();
    let mut written = None;
    if args.write {
        let path = dir.join(FILE_NAME);
        if !model.path.is_dir() {
            return Err(Failure::usage(format!(
                "{}: a single file has no directory of its own for a README.md; redirect the output instead",
                model.path.display()
            )));
        }
        if !args.dry_run {
            super::write_atomically(&path, text.as_bytes())?;
        }
        written = Some(path);
    }
    let json = json!({
        "card": card,
        "markdown": text,
        "completeness": {"score": complete.score(), "filled": complete.filled, "required": complete.required, "unknown": complete.unknown},
        "written": written.as_ref().filter(|_| !args.dry_run),
        "dry_run": args.dry_run,
    });
    let shown = match &written {
        Some(path) if args.dry_run => format!("would write {}", path.display()),
        Some(path) => format!(
            "wrote {} ({} of {} required fields known)",
            path.display(),
            complete.filled,
            complete.required
        ),
        None => text,
    };
    Ok(Outcome::new(json, shown))
}
