//! Evaluation: perplexity and KL divergence of language models, accuracy of classifiers, agreement
//! of embeddings.
//!
//! **Protocol of perplexity.** The tokens are cut into consecutive, non-overlapping windows; every
//! token but each window's first is scored given the tokens before it in the window; a shorter last
//! window counts if it has at least two tokens. Sums are in f64 and in text order, so results do not
//! depend on the number of threads.
//!
//! **Memory.** Logits are never held for a whole window: the final hidden states are (one window),
//! and the head is applied to a few dozen positions at a time. For the same reason a
//! [`ReferenceCache`] keeps *hidden states* of the reference instead of log-probabilities: they are
//! exact and, for SmolLM2, 85 times smaller; the head is cheap to apply again.

use std::ops::Range;
use std::time::Instant;

use burn::tensor::Tensor;
use rayon::prelude::*;
use refit_nn::rounding::Rounder;
use refit_nn::{Decoder, Frame, Run, ops};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::stats::{self, Interval};

mod classify;
mod examples;
mod softmax;

pub use classify::{Accuracy, EmbeddingAgreement, Scorer, accuracy, embedding_agreement, score};
pub use examples::{ExampleScore, Scored, score_examples};
pub use softmax::{RowScore, kl_divergence, log_sum_exp, score_row};

/// The last layer of a language model: hidden states to logits.
pub trait Head: Sync {
    /// Logits per position.
    fn vocab(&self) -> usize;
    /// Calls `f` with the logits, `positions × vocab`, of some positions of `hidden [1, seq, width]`.
    fn with_logits(&self, hidden: &Tensor<3>, positions: Range<usize>, f: &mut dyn FnMut(&[f32]));
}

/// A left-to-right language model, as evaluation sees it.
pub trait CausalLm {
    /// Longest input in tokens.
    fn context(&self) -> usize;
    /// Hidden states before the head, `[1, seq, width]`.
    ///
    /// # Errors
    /// Ids outside the vocabulary, inputs longer than the context.
    fn hidden(&self, ids: &[u32]) -> Result<Tensor<3>>;
    /// What turns hidden states into logits.
    fn head(&self) -> &dyn Head;
}

impl Head for Frame {
    fn vocab(&self) -> usize {
        self.head.as_ref().map_or_else(|| self.embed.rows(), |head| head.shape()[0])
    }

    fn with_logits(&self, hidden: &Tensor<3>, positions: Range<usize>, f: &mut dyn FnMut(&[f32])) {
        let [batch, _, width] = hidden.dims();
        let part = hidden.clone().slice([0..batch, positions, 0..width]);
        ops::with_values(&self.logits(part, &mut Run::plain()), f);
    }
}

impl CausalLm for Decoder {
    fn context(&self) -> usize {
        self.config().context.saturating_sub(self.frame.virtual_tokens())
    }

    fn hidden(&self, ids: &[u32]) -> Result<Tensor<3>> {
        Ok(Decoder::hidden(self, ids, 1, &mut Run::plain())?)
    }

    fn head(&self) -> &dyn Head {
        &self.frame
    }
}

/// A decoder whose activations are rounded on their way to its linears: what integer arithmetic would give.
#[derive(Debug)]
pub struct Rounded<'a> {
    /// The model.
    pub model: &'a Decoder,
    /// What is rounded, and how.
    pub rounder: &'a Rounder,
}

impl CausalLm for Rounded<'_> {
    fn context(&self) -> usize {
        self.model.context()
    }

    fn hidden(&self, ids: &[u32]) -> Result<Tensor<3>> {
        let mut tap = self.rounder;
        Ok(self.model.hidden(ids, 1, &mut Run::tapped(&mut tap))?)
    }

    fn head(&self) -> &dyn Head {
        &self.model.frame
    }
}

/// A piece of text with a name, such as a file or a domain. Windows never cross its end.
#[derive(Debug, Clone, PartialEq)]
pub struct Segment {
    /// Name in the breakdown.
    pub name: String,
    /// Token ids.
    pub ids: Vec<u32>,
}

impl Segment {
    /// A named piece of tokenized text.
    pub fn new(name: impl Into<String>, ids: Vec<u32>) -> Self {
        Self { name: name.into(), ids }
    }
}

/// How perplexity is measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Tokens per window; `None` takes the smaller of 1024 and the model's context.
    pub window: Option<usize>,
    /// Use only this many tokens of every segment.
    pub max_tokens: Option<usize>,
    /// Resamples of the bootstrap over windows; 0 leaves the interval out.
    pub resamples: usize,
    /// Seed of the bootstrap.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { window: None, max_tokens: None, resamples: 1000, seed: 0 }
    }
}

/// What a model is compared with.
#[derive(Default, Clone, Copy)]
pub enum Reference<'a> {
    /// Nothing.
    #[default]
    None,
    /// Another model, run beside it window by window.
    Model(&'a dyn CausalLm),
    /// A model that was run before.
    Cache(&'a ReferenceCache),
}

/// The measurements of one model on one text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// exp(nll).
    pub perplexity: f64,
    /// Mean negative log-likelihood per scored token, in nats.
    pub nll: f64,
    /// Scored tokens.
    pub tokens: usize,
    /// Mean KL(reference ‖ model) over scored positions, in nats.
    pub kl_to_reference: Option<f64>,
    /// Share of scored positions where model and reference put the same token first.
    pub top1_agreement: Option<f64>,
    /// Share of scored tokens that the model puts first.
    pub top1_accuracy: f64,
    /// Tokens read per second by the model alone (the reference's time is not counted).
    pub tokens_per_second: f64,
    /// 95 % interval of the perplexity by bootstrap over windows; absent for a single window.
    pub interval: Option<Interval>,
    /// The same numbers by segment, when there is more than one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<Domain>,
    /// Sums of every window, for paired tests between models.
    #[serde(skip)]
    pub windows: Vec<WindowScore>,
}

/// The part of one segment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Domain {
    /// Name of the segment.
    pub name: String,
    /// exp(nll).
    pub perplexity: f64,
    /// Mean negative log-likelihood per scored token, in nats.
    pub nll: f64,
    /// Scored tokens.
    pub tokens: usize,
    /// Mean KL(reference ‖ model), in nats.
    pub kl_to_reference: Option<f64>,
}

/// Sums over the scored positions of one window.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct WindowScore {
    /// Scored tokens.
    pub tokens: usize,
    /// Σ negative log-likelihood, in nats.
    pub nll: f64,
    /// Σ KL(reference ‖ model), in nats.
    pub kl: f64,
    /// Positions where model and reference agree on the first token.
    pub agree: usize,
    /// Tokens that the model puts first.
    pub correct: usize,
}

impl WindowScore {
    fn add(&mut self, other: &WindowScore) {
        self.tokens += other.tokens;
        self.nll += other.nll;
        self.kl += other.kl;
        self.agree += other.agree;
        self.correct += other.correct;
    }

    fn per_token(&self, sum: f64) -> f64 {
        sum / self.tokens.max(1) as f64
    }
}

/// Final hidden states of a reference on a text, and its head: one pass serves any number of
/// comparisons. Holds `tokens × hidden × 4` bytes and the head.
pub struct ReferenceCache {
    hidden: Vec<Tensor<3>>,
    windows: Vec<Vec<u32>>,
    head: Box<dyn Head>,
}

impl ReferenceCache {
    /// Runs `model` over the text. The blocks of `model` may be dropped afterwards.
    ///
    /// # Errors
    /// As [`perplexity`].
    pub fn fill(model: &Decoder, text: &[Segment], options: &Options) -> Result<Self> {
        let windows: Vec<Vec<u32>> =
            plan(model, text, options)?.into_iter().map(|w| w.ids.to_vec()).collect();
        let hidden =
            windows.iter().map(|ids| CausalLm::hidden(model, ids)).collect::<Result<_>>()?;
        Ok(Self { hidden, windows, head: Box::new(model.frame.clone()) })
    }
}

struct Window<'a> {
    segment: usize,
    ids: &'a [u32],
}

/// Cuts the text into windows.
fn plan<'a>(
    model: &dyn CausalLm,
    text: &'a [Segment],
    options: &Options,
) -> Result<Vec<Window<'a>>> {
    let context = model.context();
    let window = options.window.unwrap_or(context.min(1024));
    if window < 2 || window > context {
        return Err(Error::Window { window, context });
    }
    let mut windows = Vec::new();
    for (segment, piece) in text.iter().enumerate() {
        let most = options.max_tokens.unwrap_or(usize::MAX).min(piece.ids.len());
        let pieces = piece.ids[..most].chunks(window).filter(|ids| ids.len() >= 2);
        windows.extend(pieces.map(|ids| Window { segment, ids }));
    }
    if windows.is_empty() {
        let tokens: usize = text.iter().map(|piece| piece.ids.len()).sum();
        return Err(Error::EmptyText { what: format!("the text has {tokens} tokens") });
    }
    Ok(windows)
}

/// Measures `model` on `text` and, with a reference, how far it is from it; `progress` is told how
/// many windows are done, and of how many.
///
/// # Errors
/// A window outside 2..=context, text without a scorable token, ids outside the vocabulary, logits
/// that are not finite (with their position), a reference with another vocabulary or other windows.
pub fn perplexity(
    model: &dyn CausalLm,
    text: &[Segment],
    options: &Options,
    reference: Reference,
    progress: &dyn Fn(u64, u64),
) -> Result<Perplexity> {
    let windows = plan(model, text, options)?;
    if let Reference::Cache(cache) = reference {
        let same = cache.windows.iter().map(Vec::as_slice).eq(windows.iter().map(|w| w.ids));
        if !same {
            return Err(Error::StaleReference);
        }
    }
    let (mut scores, mut seconds, mut read) = (Vec::new(), 0.0, 0usize);
    progress(0, windows.len() as u64);
    for (index, window) in windows.iter().enumerate() {
        let start = Instant::now();
        let hidden = model.hidden(window.ids)?;
        seconds += start.elapsed().as_secs_f64();
        let other = match reference {
            Reference::None => None,
            Reference::Model(other) => Some((other.hidden(window.ids)?, other.head())),
            Reference::Cache(cache) => Some((cache.hidden[index].clone(), &*cache.head)),
        };
        let own = (&hidden, model.head());
        scores.push(score_window(index, window.ids, own, other, &mut seconds)?);
        read += window.ids.len();
        progress(index as u64 + 1, windows.len() as u64);
    }
    Ok(summarize(text, &windows, scores, options, &reference, read as f64 / seconds.max(1e-9)))
}

/// Scores the positions of one window, a few dozen at a time; adds the model's own time to
/// `seconds`.
fn score_window(
    index: usize,
    ids: &[u32],
    (hidden, head): (&Tensor<3>, &dyn Head),
    reference: Option<(Tensor<3>, &dyn Head)>,
    seconds: &mut f64,
) -> Result<WindowScore> {
    let vocab = head.vocab();
    if let Some((_, other)) = &reference
        && other.vocab() != vocab
    {
        return Err(Error::Vocabulary { model: vocab, reference: other.vocab() });
    }
    // About 32 MB of logits at a time.
    let step = ((8 << 20) / vocab.max(1)).clamp(8, 512);
    let mut total = WindowScore::default();
    let scored = ids.len() - 1;
    for from in (0..scored).step_by(step) {
        let positions = from..(from + step).min(scored);
        let targets = &ids[positions.start + 1..positions.end + 1];
        let start = Instant::now();
        let mut result = Ok(Vec::new());
        let mut own = 0.0;
        head.with_logits(hidden, positions.clone(), &mut |logits| {
            let rows = score_rows(logits, vocab, targets);
            own = start.elapsed().as_secs_f64();
            result = match &reference {
                None => {
                    finite("the model", &rows, None).map(|()| rows.iter().map(own_score).collect())
                }
                Some((hidden, other)) => {
                    let mut compared = Ok(Vec::new());
                    other.with_logits(hidden, positions.clone(), &mut |reference| {
                        compared = compare_rows(logits, reference, vocab, targets, &rows);
                    });
                    compared
                }
            };
        });
        *seconds += own;
        let rows = result.map_err(|(who, row)| {
            let position = positions.start + row;
            Error::Logits { who, window: index, position, token: ids[position] }
        })?;
        rows.iter().for_each(|row| total.add(row));
    }
    Ok(total)
}

type Rows = std::result::Result<Vec<WindowScore>, (&'static str, usize)>;

fn score_rows(logits: &[f32], vocab: usize, targets: &[u32]) -> Vec<RowScore> {
    logits
        .par_chunks_exact(vocab)
        .zip(targets)
        .map(|(row, &target)| score_row(row, target as usize))
        .collect()
}

fn own_score(row: &RowScore) -> WindowScore {
    WindowScore {
        tokens: 1,
        nll: row.nll,
        correct: usize::from(row.target_is_top),
        ..WindowScore::default()
    }
}

fn finite(
    who: &'static str,
    rows: &[RowScore],
    extra: Option<&[f64]>,
) -> std::result::Result<(), (&'static str, usize)> {
    let bad = rows.iter().position(|row| !row.nll.is_finite() || !row.log_sum_exp.is_finite());
    let worse = extra.and_then(|values| values.iter().position(|x| x.is_nan()));
    bad.or(worse).map_or(Ok(()), |row| Err((who, row)))
}

fn compare_rows(
    logits: &[f32],
    reference: &[f32],
    vocab: usize,
    targets: &[u32],
    rows: &[RowScore],
) -> Rows {
    let others = score_rows(reference, vocab, targets);
    let divergences: Vec<f64> = logits
        .par_chunks_exact(vocab)
        .zip(reference.par_chunks_exact(vocab))
        .zip(rows.par_iter().zip(&others))
        .map(|((model, reference), (a, b))| {
            kl_divergence(reference, b.log_sum_exp, model, a.log_sum_exp)
        })
        .collect();
    finite("the reference", &others, None)?;
    finite("the model", rows, Some(&divergences))?;
    let scores = rows.iter().zip(&others).zip(divergences).map(|((row, other), kl)| WindowScore {
        kl,
        agree: usize::from(row.top == other.top),
        ..own_score(row)
    });
    Ok(scores.collect())
}

fn summarize(
    text: &[Segment],
    windows: &[Window],
    scores: Vec<WindowScore>,
    options: &Options,
    reference: &Reference,
    tokens_per_second: f64,
) -> Perplexity {
    let compared = !matches!(reference, Reference::None);
    let sum = |segment: Option<usize>| {
        let mut total = WindowScore::default();
        let mine = windows.iter().zip(&scores);
        mine.filter(|(w, _)| segment.is_none_or(|s| s == w.segment))
            .for_each(|(_, score)| total.add(score));
        total
    };
    let total = sum(None);
    let domains = (0..text.len()).filter(|_| text.len() > 1).filter_map(|segment| {
        let part = sum(Some(segment));
        (part.tokens > 0).then(|| Domain {
            name: text[segment].name.clone(),
            perplexity: part.per_token(part.nll).exp(),
            nll: part.per_token(part.nll),
            tokens: part.tokens,
            kl_to_reference: compared.then(|| part.per_token(part.kl)),
        })
    });
    let interval = (scores.len() > 1 && options.resamples > 0).then(|| {
        let nll: Vec<f64> = scores.iter().map(|w| w.nll).collect();
        let tokens: Vec<f64> = scores.iter().map(|w| w.tokens as f64).collect();
        stats::ratio_bootstrap(&nll, &tokens, options.resamples, 0.95, options.seed)
    });
    let interval = interval.flatten().map(|i| Interval {
        estimate: i.estimate.exp(),
        low: i.low.exp(),
        high: i.high.exp(),
        level: i.level,
    });
    let nll = total.per_token(total.nll);
    Perplexity {
        perplexity: nll.exp(),
        nll,
        tokens: total.tokens,
        kl_to_reference: compared.then(|| total.per_token(total.kl)),
        top1_agreement: compared.then(|| total.per_token(total.agree as f64)),
        top1_accuracy: total.per_token(total.correct as f64),
        tokens_per_second,
        interval,
        domains: domains.collect(),
        windows: scores,
    }
}

#[cfg(test)]
mod tests;
