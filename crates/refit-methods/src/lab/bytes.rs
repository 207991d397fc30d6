//! The bench of claims that train: byte-level decoders of about a million parameters on texts that anyone can install.

use std::path::Path;

use refit_data::corpus::{self, Document, Part};
use refit_nn::scratch::DecoderShape;
use refit_nn::{BurnDevice, Decoder, Dropout, Run};
use refit_train::BoxError;
use refit_train::claim::ClaimContext;
use refit_train::eval::{self, Reference, Segment};
use refit_train::train::loss::next_token;
use refit_train::train::{
    At, Hook, Objective, Optimizer, Order, Recipe, RunOptions, Terms, Trainer,
};

use super::find;

/// A text as bytes, split by document: nothing of one part stands in another.
pub struct Text {
    /// What it is called in reports.
    pub name: &'static str,
    /// To learn from.
    pub train: Vec<u32>,
    /// To choose settings on.
    pub dev: Vec<u32>,
    /// To report.
    pub test: Vec<u32>,
}

/// A text that claims use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The King James Bible.
    Kjv,
    /// Manual pages in a language, from the package of that name.
    Manual(&'static str),
}

impl Source {
    /// The asset that it comes from.
    pub const fn asset(self) -> &'static str {
        match self {
            Self::Kjv => "deb:bible-kjv-text",
            Self::Manual(package) => package,
        }
    }

    fn documents(self, root: &Path) -> Result<Vec<Document>, BoxError> {
        Ok(match self {
            Self::Kjv => {
                let file = find(root, &|path| path.ends_with("bible.data"))?;
                let file = file.first().ok_or("the package holds no bible.data")?;
                corpus::kjv::open(file)?
            }
            Self::Manual(_) => {
                let pages = find(root, &|path| {
                    path.extension().is_some_and(|e| e == "gz")
                        && path.components().any(|part| part.as_os_str() == "man")
                })?;
                corpus::man_pages(&pages)?
            }
        })
    }
}

/// Most bytes of one corpus that are read: more than any claim trains on.
const MOST: usize = 3 << 20;
/// Bytes of the held-out parts.
const HELD_OUT: usize = 32 << 10;

/// Fetches and splits a text.
///
/// # Errors
/// Sources that cannot be reached, packages without the files.
pub fn text(cx: &ClaimContext, name: &'static str, source: Source) -> Result<Text, BoxError> {
    let root = cx.asset(source.asset())?;
    let documents = source.documents(&root)?;
    let mut parts = [Vec::new(), Vec::new(), Vec::new()];
    for document in documents {
        let (part, most) = match corpus::part_of(&document.name) {
            Part::Train => (0, MOST),
            Part::Calib => (1, HELD_OUT),
            Part::Eval => (2, HELD_OUT),
        };
        let text = document.text.bytes().map(u32::from).chain([10, 10]);
        if parts[part].len() < most {
            parts[part].extend(text);
        }
    }
    for held_out in &mut parts[1..] {
        held_out.truncate(HELD_OUT);
    }
    if parts.iter().any(|part| part.len() < 8192) {
        return Err(format!("{}: too little text", source.asset()).into());
    }
    let [train, dev, test] = parts;
    Ok(Text { name, train, dev, test })
}

/// The shape of a byte-level decoder.
pub const fn shape(hidden: usize, layers: usize, context: usize) -> DecoderShape {
    DecoderShape {
        hidden,
        intermediate: 3 * hidden,
        layers,
        heads: hidden / 32,
        kv_heads: hidden / 32,
        vocab: 256,
        context,
        tied: false,
    }
}

/// One training run on bytes.
#[derive(Clone, Debug)]
pub struct Fit {
    /// Everything but the data.
    pub recipe: Recipe,
    /// Windows per step.
    pub batch: usize,
    /// Bytes of a window.
    pub window: usize,
    /// Dropout in adapters.
    pub dropout: f64,
}

impl Fit {
    /// `steps` of `batch` windows at `rate`, in the order of `seed`.
    pub fn new(steps: u64, batch: usize, window: usize, rate: f64, seed: u64) -> Self {
        let recipe = Recipe { seed, ..Recipe::new(steps, rate) };
        Self { recipe, batch, window, dropout: 0.0 }
    }

    /// What is minimized: the mean negative log-likelihood of the next byte of windows of `text`.
    pub fn objective<'a>(&self, text: &'a [u32]) -> impl Objective<Decoder> + use<'a> {
        let Self { batch, window, dropout, .. } = *self;
        let seed = self.recipe.seed;
        let order = Order::new(seed, (text.len() / window).max(1));
        move |model: &Decoder, at: At| -> Result<Terms, BoxError> {
            let mut ids = Vec::with_capacity(batch * window);
            for i in order.batch(at.batch, batch) {
                ids.extend(&text[i * window..(i + 1) * window]);
            }
            let dropout = Dropout::new(dropout, seed ^ at.batch);
            let mut run = Run { dropout, ..Run::plain() };
            let (loss, tokens) = next_token(model, &ids, batch, None, &mut run)?;
            Ok(Terms::one("cross-entropy", loss, tokens))
        }
    }

    /// Trains `model` on `text`.
    ///
    /// # Errors
    /// As [`Trainer::run`].
    pub fn run(&self, model: Decoder, text: &[u32]) -> Result<Fitted, BoxError> {
        self.run_with(model, text, None, Vec::new(), RunOptions::default())
    }

    /// As [`Self::run`], with another optimizer, hooks on the updates, or files.
    ///
    /// # Errors
    /// As [`Trainer::run`].
    pub fn run_with(
        &self,
        model: Decoder,
        text: &[u32],
        optimizer: Option<Box<dyn Optimizer>>,
        hooks: Vec<Box<dyn Hook>>,
        options: RunOptions,
    ) -> Result<Fitted, BoxError> {
        let mut trainer = Trainer::new(model, self.recipe.clone())?;
        if let Some(optimizer) = optimizer {
            trainer = trainer.with_optimizer(optimizer);
        }
        for hook in hooks {
            trainer = trainer.with_hook(hook);
        }
        let started = std::time::Instant::now();
        trainer.run(&self.objective(text), options)?;
        let seconds = started.elapsed().as_secs_f64();
        let states = trainer.states().map(|(name, bytes)| (name.to_owned(), bytes)).collect();
        let gradient_bytes = trainer.gradient_bytes();
        Ok(Fitted { model: trainer.into_model(), seconds, states, gradient_bytes })
    }
}

/// A trained decoder.
pub struct Fitted {
    /// Off autodiff.
    pub model: Decoder,
    /// Wall time of the training.
    pub seconds: f64,
    /// Bytes of optimizer state at the end, by parameter.
    pub states: Vec<(String, usize)>,
    /// The most bytes of gradients that existed at once.
    pub gradient_bytes: usize,
}

/// A decoder trained from scratch, kept between runs of a claim.
///
/// # Errors
/// As [`Trainer::run`].
pub fn pretrained(
    cx: &mut ClaimContext,
    shape: &DecoderShape,
    fit: &Fit,
    text: &Text,
) -> Result<Decoder, BoxError> {
    let Fit { recipe, batch, window, .. } = fit;
    cx.param(
        "base",
        format!(
            "{} layers of width {}, {} steps of {batch} x {window} bytes of {}",
            shape.layers, shape.hidden, recipe.steps, text.name
        ),
    );
    cx.progress("pretraining the base");
    let model = shape.init(recipe.seed, &BurnDevice::flex())?;
    let identity = format!("{shape:?}, {batch} x {window} of {}", text.name);
    let dir = cx.work_dir()?.join(refit_store::hash::hex(identity.as_bytes()));
    let options =
        RunOptions { dir: Some(dir), keep: 1, resume: true, identity, ..RunOptions::default() };
    Ok(fit.run_with(model, &text.train, None, Vec::new(), options)?.model)
}

/// Bits per byte of `text` under `model`, in windows of `window`.
///
/// # Errors
/// Logits that are not finite.
pub fn bits_per_byte(model: &Decoder, text: &[u32], window: usize) -> Result<f64, BoxError> {
    let segments = [Segment::new("text", text.to_vec())];
    let options = eval::Options { window: Some(window), resamples: 0, ..eval::Options::default() };
    let found = eval::perplexity(model, &segments, &options, Reference::None, &|_, _| {})?;
    Ok(found.nll / std::f64::consts::LN_2)
}

/// The best of `rates`, by what `loss` says of it (on a development slice, never on the test).
///
/// # Errors
/// Whatever `loss` meets; a rate that diverges only loses.
pub fn best_rate(
    cx: &mut ClaimContext,
    arm: &str,
    rates: &[f64],
    mut loss: impl FnMut(f64) -> Result<f64, BoxError>,
) -> Result<f64, BoxError> {
    let mut best = (f64::INFINITY, rates[0]);
    for &rate in rates {
        let name = format!("{arm}, rate {rate:.0e} on dev");
        cx.arm(&name, 0, |trial| {
            let value = loss(rate).unwrap_or(f64::INFINITY);
            trial.record("dev", if value.is_finite() { value } else { 1e9 });
            Ok(())
        })?;
        let value = cx.value(&name, 0, "dev").unwrap_or(f64::INFINITY);
        if value < best.0 {
            best = (value, rate);
        }
    }
    Ok(best.1)
}
