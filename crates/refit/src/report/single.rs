//! The page of one artifact: what its directory says of itself, as the record of a run with one step.

use std::path::Path;

use refit_methods::registry;
use refit_store::Lineage;

use crate::engine::side_json;
use crate::failure::{Failure, Result};
use crate::recipe::made::Made;
use crate::recipe::record::{ArtifactRecord, RunRecord, SCHEMA, StepRecord};

/// Whether a directory is one that a method wrote.
pub fn is_artifact(dir: &Path) -> bool {
    dir.is_dir() && dir.join(refit_store::lineage::FILE_NAME).is_file()
}

/// The record of the work that made the model or adapter in `dir`: its manifest, and what its training left beside the weights.
/// Times are not in it, since an artifact holds none.
pub fn record(dir: &Path) -> Result<RunRecord> {
    let lineage = Lineage::read(dir)?.ok_or_else(|| {
        Failure::usage(format!("{}: it has no {}", dir.display(), refit_store::lineage::FILE_NAME))
    })?;
    let name = dir.canonicalize().ok();
    let name = name
        .as_deref()
        .unwrap_or(dir)
        .file_name()
        .map_or_else(|| lineage.method.clone(), |name| name.to_string_lossy().into_owned());
    let made = Made::open(dir)?;
    let info = registry::get(&lineage.method).ok().map(|entry| entry.info);
    let parents: Vec<String> = lineage.parents.iter().map(|parent| parent.name.clone()).collect();
    let title = info.map_or(lineage.method.as_str(), |info| info.title);
    let mut artifacts: Vec<ArtifactRecord> = lineage
        .parents
        .iter()
        .map(|parent| ArtifactRecord {
            name: parent.name.clone(),
            path: parent.source.clone(),
            source: Some(parent.source.clone()),
            content_hash: parent.content.clone(),
            ..ArtifactRecord::default()
        })
        .collect();
    artifacts.push(ArtifactRecord {
        name: name.clone(),
        path: dir.display().to_string(),
        method: Some(lineage.method.clone()),
        parameters: lineage.parameters.clone(),
        parents: parents.clone(),
        content_hash: made.content_hash()?,
        report: side_json(dir, refit_methods::adapt::frame::SUMMARY)?.unwrap_or_default(),
        ..made.sizes()
    });
    let command = lineage.command.clone().unwrap_or_default();
    Ok(RunRecord {
        schema: SCHEMA,
        refit: lineage.refit.clone(),
        title: match parents.is_empty() {
            true => title.to_owned(),
            false => format!("{title} of {}", parents.join(", ")),
        },
        summary: info.map_or_else(String::new, |info| format!("{}.", info.summary)),
        seed: lineage.seeds.first().copied().unwrap_or(0),
        steps: vec![StepRecord {
            name: name.clone(),
            kind: "apply".into(),
            command,
            ..StepRecord::default()
        }],
        artifacts,
        name,
        ..RunRecord::default()
    })
}
