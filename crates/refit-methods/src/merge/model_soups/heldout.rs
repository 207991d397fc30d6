//! Scoring a language model on held-out text.

use refit_nn::Decoder;
use refit_store::Artifact;
use refit_store::architecture::Kind;
use refit_train::eval::{self, Reference, Segment};

use crate::error::{Error, Result};
use crate::inputs::Inputs;
use crate::method::Method;

const NAME: &str = super::ModelSoups::INFO.name;

/// Held-out text, tokenized.
pub(super) struct HeldOut {
    segments: Vec<Segment>,
    max_tokens: Option<usize>,
}

impl HeldOut {
    /// Checks that candidates can be scored.
    pub(super) fn check(inputs: &Inputs, max_tokens: Option<usize>) -> Result<()> {
        if inputs.text.is_empty() {
            return Err(Error::MissingData {
                method: NAME,
                what: "held-out text to score candidates, neither trained on nor tested on".into(),
                how: "--text FILE, or --mode uniform",
            });
        }
        if max_tokens.is_some_and(|tokens| tokens < 2) {
            return Err(Error::range(NAME, "max_tokens", max_tokens.unwrap_or(0), "at least 2"));
        }
        let model = &inputs.models[0];
        if model.artifact.architecture().kind != Kind::Decoder {
            return Err(Error::Conflict {
                method: NAME,
                problem: format!(
                    "{} is no language model, and soups are scored on text by its likelihood; \
                     take --mode uniform or wise-ft",
                    model.source
                ),
            });
        }
        Ok(())
    }

    pub(super) fn new(inputs: &Inputs, max_tokens: Option<usize>) -> Result<Self> {
        let tokenizer = inputs.models[0].tokenizer()?;
        let segments = inputs
            .text
            .iter()
            .map(|text| Ok(Segment::new(&*text.source, tokenizer.encode(&text.text, false)?)))
            .collect::<Result<_>>()?;
        Ok(Self { segments, max_tokens })
    }

    /// Minus the mean negative log-likelihood per token: larger is better.
    pub(super) fn score(&self, artifact: &Artifact) -> Result<f64> {
        let model = Decoder::load(artifact, &refit_nn::BurnDevice::flex())?;
        let options =
            eval::Options { max_tokens: self.max_tokens, resamples: 0, ..eval::Options::default() };
        let done = eval::perplexity(&model, &self.segments, &options, Reference::None, &|_, _| {})?;
        Ok(-done.nll)
    }
}
