//! Running models: device, tokenizer, text to tokens.

use std::path::Path;

use refit_data::Tokenizer;
use refit_nn::{BurnDevice, Decoder, Model};
use refit_store::Artifact;
use refit_store::adapter::Adapter;

use crate::cli::App;
use crate::failure::{Failure, Result};
use crate::inputs::{self, Text};

/// The device of `--device`.
pub fn device(app: &App) -> Result<BurnDevice> {
    Ok(refit_nn::device(app.global.device.as_str())?)
}

/// Brings any model to life. Every tensor that its config promises must be there with its shape; tensors
/// that the architecture does not have are said and left alone.
pub fn load(app: &App, artifact: &Artifact) -> Result<Model> {
    artifact.check_fit()?;
    if let Some(warning) = inputs::strays(artifact) {
        app.progress.note(&format!("warning: {warning}"));
    }
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
