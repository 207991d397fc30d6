//! Running models: device, tokenizer, text to tokens.

use std::path::Path;

use refit_data::Tokenizer;
use refit_nn::load::Weights;
use refit_nn::{BurnDevice, Decoder, Model};
use refit_store::Artifact;
use refit_store::adapter::Adapter;
use refit_store::architecture::Kind;

use crate::cli::App;
use crate::failure::{Failure, Result};
use crate::inputs::{self, Text};

/// The device of `--device`.
pub fn device(app: &App) -> Result<BurnDevice> {
    Ok(refit_nn::device(app.global.device.as_str())?)
}

/// How `--weights` wants quantized weights in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Held {
    /// In the codes in which they are stored; activations are rounded to 8 bits on the way
    Packed,
    /// Decoded: exact
    F32,
}

impl From<Held> for Weights {
    fn from(held: Held) -> Self {
        match held {
            Held::Packed => Self::Packed,
            Held::F32 => Self::Float,
        }
    }
}

/// Brings a language model to life with its weights held as `held` says.
pub fn load_held(
    app: &App,
    artifact: &Artifact,
    adapters: &[Adapter],
    held: Held,
    verb: &str,
) -> Result<Decoder> {
    if held == Held::F32 || artifact.architecture().kind != Kind::Decoder {
        return load_adapted(app, artifact, adapters, verb);
    }
    if let Some(adapter) = adapters.first() {
        return Err(Failure::usage(format!(
            "--weights packed: {} changes weights, and packed ones stay as they are; leave --weights packed out, or merge the \
             adapter first (refit apply merge-adapter)",
            adapter.path().display()
        )));
    }
    ready(app, artifact)?;
    app.progress.begin("loading the model", 0, "");
    let model = Decoder::load_as(artifact, &device(app)?, held.into());
    app.progress.end();
    model.map_err(|error| Failure::from(error).about(artifact.path()))
}

/// What is checked, and said, before any model is loaded.
fn ready(app: &App, artifact: &Artifact) -> Result<()> {
    artifact.check_fit()?;
    if let Some(warning) = inputs::strays(artifact) {
        app.progress.note(&format!("warning: {warning}"));
    }
    Ok(())
}

/// Brings any model to life. Every tensor that its config promises must be there with its shape; tensors
/// that the architecture does not have are said and left alone.
pub fn load(app: &App, artifact: &Artifact) -> Result<Model> {
    ready(app, artifact)?;
    app.progress.begin("loading the model", 0, "");
    let model = Model::load(artifact, &device(app)?);
    app.progress.end();
    model.map_err(|error| Failure::from(error).about(artifact.path()))
}

/// Brings a language model to life; any other kind is an error that says what fits.
pub fn load_decoder(app: &App, artifact: &Artifact, verb: &str) -> Result<Decoder> {
    match load(app, artifact)? {
        Model::Decoder(decoder) => Ok(decoder),
        Model::Encoder(_) => Err(wrong_kind(artifact, verb, "a text encoder", "refit embed")),
        Model::Vision(_) => Err(wrong_kind(artifact, verb, "an image model", "refit classify")),
    }
}

/// Brings a language model to life with `adapters` on it.
pub fn load_adapted(
    app: &App,
    artifact: &Artifact,
    adapters: &[Adapter],
    verb: &str,
) -> Result<Decoder> {
    let mut aligned = adapters.to_vec();
    for adapter in &mut aligned {
        adapter.align(artifact);
        adapter.check_base(artifact)?;
    }
    let mut decoder = load_decoder(app, artifact, verb)?;
    for adapter in &aligned {
        let attached = refit_nn::adapter::attach(decoder, adapter);
        decoder = attached.map_err(|error| Failure::from(error).about(adapter.path()))?;
    }
    Ok(decoder)
}

/// Opens adapters by their sources.
pub fn adapters(app: &App, sources: &[String]) -> Result<Vec<Adapter>> {
    let open = |source: &String| {
        let path = inputs::pull(app, source, false)?.path;
        Ok(Adapter::open(&path)?)
    };
    sources.iter().map(open).collect()
}

/// The failure of a model of the wrong kind.
pub fn wrong_kind(artifact: &Artifact, verb: &str, is: &str, instead: &str) -> Failure {
    let path = artifact.path().display();
    Failure::usage(format!(
        "{path}: this is {is}, which `refit {verb}` cannot use; try `{instead}`"
    ))
}

/// The tokenizer of a model, checked against its embedding.
pub fn tokenizer(artifact: &Artifact) -> Result<Tokenizer> {
    let tokenizer = Tokenizer::from_artifact(artifact)?;
    if let Some(rows) = artifact.architecture().dims.vocab {
        tokenizer.check_embedding(rows)?;
    }
    Ok(tokenizer)
}

/// Texts put together and tokenized without special tokens.
pub fn encode(tokenizer: &Tokenizer, texts: &[Text]) -> Result<Vec<u32>> {
    let whole: String = texts.iter().map(|text| text.text.as_str()).collect();
    Ok(tokenizer.encode(&whole, false)?)
}

/// A JSON side file of a model directory, when it has one.
pub fn side_json(path: &Path, name: &str) -> Result<Option<serde_json::Value>> {
    let file = path.join(name);
    match std::fs::read(&file) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| {
            Failure::usage(format!("{}: line {}: not valid JSON: {e}", file.display(), e.line()))
        }),
        Err(_) => Ok(None),
    }
}
