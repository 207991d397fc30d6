//! From what is typed to what the crates take: models by source string, text by file or corpus.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use refit_data::{Records, corpus};
use refit_methods::method::{TextData, TrainingData};
use refit_store::adapter::Adapter;
use refit_store::architecture::Kind;
use refit_store::source::{self, PullOptions, Pulled};
use refit_store::{Artifact, hash};

use crate::cli::App;
use crate::engine;
use crate::failure::{Failure, Result};

/// A model that was found and opened.
#[derive(Clone, Debug)]
pub struct Opened {
    /// As it was typed.
    pub source: String,
    /// Where it lies.
    pub path: PathBuf,
    /// Its headers.
    pub artifact: Arc<Artifact>,
}

/// Finds (or fetches) what a source string names.
pub fn pull(app: &App, source: &str, refresh: bool) -> Result<Pulled> {
    Ok(reach(app, source, refresh)?)
}

/// What a source string names, where it is on this machine already; `None` where it would have to be fetched.
pub fn local(app: &App, source: &str) -> Result<Option<Pulled>> {
    let cache = app.global.cache.clone();
    let options = PullOptions { cache, offline: true, refresh: false };
    match source::resolve(source, &options, &|_, _| {}) {
        Ok(pulled) => Ok(Some(pulled)),
        Err(refit_store::Error::Unreachable { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// As [`pull`], with the store's own error, which tells what cannot be reached from what is wrong.
pub fn reach(app: &App, source: &str, refresh: bool) -> Result<Pulled, refit_store::Error> {
    let options = PullOptions { cache: app.global.cache.clone(), offline: false, refresh };
    // A stage is shown only when something is really fetched.
    let begun = std::cell::Cell::new(false);
    let progress = |done: u64, total: Option<u64>| {
        if !begun.replace(true) {
            app.progress.begin(&format!("fetching {source}"), total.unwrap_or(0), "bytes");
        }
        app.progress.set(done, total);
    };
    let pulled = source::resolve(source, &options, &progress);
    app.progress.end();
    pulled
}

/// For a dry run: says of models that are not on this machine yet that planning fetches them.
pub fn announce(app: &App, sources: &[String]) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    for source in sources {
        if local(app, source)?.is_none() {
            let note = format!("{source} is not in the cache: planning fetches it");
            app.progress.note(&note);
            notes.push(note);
        }
    }
    Ok(notes)
}

/// Finds and opens a model.
pub fn open(app: &App, source: &str) -> Result<Opened> {
    open_at(source, pull(app, source, false)?.path)
}

/// Opens a model that was found.
pub fn open_at(source: &str, path: PathBuf) -> Result<Opened> {
    let artifact = Arc::new(Artifact::open(&path)?);
    Ok(Opened { source: source.to_owned(), path, artifact })
}

/// Refuses a model of another kind than `verb` runs, before anything else is read; the message says which
/// verb does run it.
pub fn check_kind(artifact: &Artifact, verb: &str) -> Result {
    if Adapter::is_adapter(artifact.path()) {
        let path = artifact.path().display();
        return Err(Failure::usage(format!(
            "{path}: this is an adapter and no model; name its base and put it on: refit {verb} MODEL --adapter {path}"
        )));
    }
    let (is, verbs): (_, &[&str]) = match artifact.architecture().kind {
        Kind::Encoder => ("a text encoder", &["embed"]),
        Kind::Vision => ("an image model", &["classify"]),
        _ => ("a language model", &["eval", "generate"]),
    };
    match verbs.contains(&verb) {
        true => Ok(()),
        false => Err(engine::wrong_kind(artifact, verb, is, &format!("refit {}", verbs[0]))),
    }
}

/// What to say about tensors that the architecture does not have: often a model under a wrong `model_type`.
pub fn strays(artifact: &Artifact) -> Option<String> {
    let strays = artifact.load_report().strays()?;
    Some(format!(
        "{}: not part of architecture `{}`: {strays}; ignored where the model runs, copied by methods",
        artifact.path().display(),
        artifact.architecture().model_type
    ))
}

/// What made running a model fail: its weights, where they are not finite, else what was met on the way.
pub fn blame_weights(artifact: &Artifact, failure: Failure) -> Failure {
    match artifact.check_finite() {
        Err(error @ refit_store::Error::NotFinite { .. }) => error.into(),
        _ => failure.about(artifact.path()),
    }
}

/// A text with its name.
#[derive(Clone, Debug)]
pub struct Text {
    /// As it was typed.
    pub source: String,
    /// Its content.
    pub text: String,
}

impl Text {
    /// SHA-256 of the text.
    pub fn sha256(&self) -> String {
        hash::hex(self.text.as_bytes())
    }
}

/// Corpora that travel with refit, as they are typed after `builtin:`.
pub const CORPORA: &[&str] = &[
    "held-out",
    "calibration",
    "kjv",
    "man",
    "wordnet",
    "kjv-calib",
    "man-calib",
    "wordnet-calib",
];

/// Reads texts: files, or `builtin:NAME` from [`CORPORA`]. `held-out` and `calibration` stand for the
/// three domains' halves.
pub fn texts(sources: &[String]) -> Result<Vec<Text>> {
    let mut texts = Vec::new();
    for source in sources {
        let many = match source.strip_prefix("builtin:") {
            Some(name) => builtin(name)?,
            None => vec![Text { source: source.clone(), text: read_text(Path::new(source))? }],
        };
        texts.extend(many);
    }
    if let Some(empty) = texts.iter().find(|text| text.text.trim().is_empty()) {
        return Err(Failure::usage(format!(
            "{}: the text is empty; give a file with words in it",
            empty.source
        )));
    }
    Ok(texts)
}

/// Training data: tables by their extension, everything else as plain text.
pub fn training(sources: &[String]) -> Result<Vec<TrainingData>> {
    let mut all = Vec::new();
    for source in sources {
        if is_table(source) {
            all.push(TrainingData::Records(Arc::new(Records::open(source)?)));
            continue;
        }
        let texts = texts(std::slice::from_ref(source))?;
        all.extend(
            texts
                .into_iter()
                .map(|text| TrainingData::Text(TextData { source: text.source, text: text.text })),
        );
    }
    Ok(all)
}

/// Whether a source is a table of records.
pub fn is_table(source: &str) -> bool {
    let name = source.strip_suffix(".gz").unwrap_or(source).to_lowercase();
    let tables = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"];
    tables.iter().any(|extension| name.ends_with(extension))
}

fn builtin(name: &str) -> Result<Vec<Text>> {
    let found: Vec<Text> = corpus::builtin()
        .iter()
        .flat_map(|domain| {
            let calib = format!("{}-calib", domain.domain);
            [
                (
                    name == "held-out" || name == domain.domain,
                    domain.domain.to_owned(),
                    domain.eval,
                ),
                (name == "calibration" || name == calib, calib.clone(), domain.calib),
            ]
        })
        .filter(|(wanted, ..)| *wanted)
        .map(|(_, name, text)| Text { source: format!("builtin:{name}"), text: text.to_owned() })
        .collect();
    if found.is_empty() {
        let hint = crate::suggest::did_you_mean(name, CORPORA.iter().copied());
        return Err(Failure::usage(format!(
            "builtin:{name}: no such text{hint} (there are {})",
            CORPORA.join(", ")
        )));
    }
    Ok(found)
}

/// A text file; bytes that are not UTF-8 are an error that says where.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => Failure::usage(format!(
            "{}: no such file (texts that travel with refit: builtin:{})",
            path.display(),
            CORPORA.join(", builtin:")
        )),
        _ => Failure::io(path, "read", &source),
    })?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..at].iter().filter(|b| **b == b'\n').count();
        Failure::usage(format!(
            "{}: line {line}: byte {at} is not UTF-8; convert the file (iconv -t utf-8)",
            path.display()
        ))
    })
}
