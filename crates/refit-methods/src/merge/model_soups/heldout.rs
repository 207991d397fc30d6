//! What scores candidates: text by its likelihood, labelled images or texts by accuracy.

use burn::tensor::Tensor;
use refit_data::classes::{Classified, encode_within};
use refit_data::images::Preprocess;
use refit_nn::classifier::text_classes;
use refit_nn::vision::Vision;
use refit_nn::{BurnDevice, Decoder, Run, TextClassifier, ops};
use refit_store::Artifact;
use refit_store::architecture::Kind;
use refit_train::eval::{self, Reference, Segment};

use crate::adapt::probe::images;
use crate::error::{Error, Result};
use crate::inputs::{Inputs, Labelled};
use crate::labelled;
use crate::method::Method;

const NAME: &str = super::ModelSoups::INFO.name;
/// Labelled examples per forward pass.
pub(super) const BATCH: usize = 16;
/// Tokens of a window of text that is learned from.
const WINDOW: usize = 256;

/// Held-out examples, ready to score a candidate.
pub(super) enum HeldOut<'a> {
    /// Text, tokenized.
    Text {
        /// The texts.
        segments: Vec<Segment>,
        /// Tokens to score at most.
        max_tokens: Option<usize>,
    },
    /// Images with their classes.
    Images {
        /// The images.
        data: &'a Labelled,
        /// One class each.
        classes: Vec<usize>,
        /// What the models expect to be done to them.
        preprocess: Preprocess,
    },
    /// Token ids of texts with their classes.
    Texts {
        /// With special tokens.
        ids: Vec<Vec<u32>>,
        /// One class each.
        classes: Vec<usize>,
    },
}

/// A candidate's score.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scored {
    /// What the greedy soup compares, larger is better: accuracy, or minus the loss of a text.
    pub score: f64,
    /// Mean cross-entropy, nats: what learned soups lower.
    pub loss: f64,
}

/// A candidate brought to life.
#[allow(clippy::large_enum_variant)] // one at a time: the weights dwarf it
pub(super) enum Candidate {
    /// Predicts tokens.
    Language(Decoder),
    /// Classifies images.
    Image(Vision),
    /// Classifies texts.
    Text(TextClassifier),
}

impl<'a> HeldOut<'a> {
    /// Checks that candidates can be scored.
    pub(super) fn check(inputs: &Inputs, max_tokens: Option<usize>) -> Result<()> {
        let model = &inputs.models[0];
        let conflict = |problem: String| Err(Error::Conflict { method: NAME, problem });
        match (&inputs.labelled, inputs.text.is_empty()) {
            (None, true) => {
                return Err(Error::MissingData {
                    method: NAME,
                    what: "held-out examples to score candidates, neither trained on nor tested on"
                        .into(),
                    how: "--text FILE for language models, --labelled PATH for classifiers, or --mode uniform",
                });
            }
            (Some(_), false) => return conflict("give --text or --labelled, not both".into()),
            (Some(_), true) => return HeldOut::new(inputs, max_tokens).map(drop),
            (None, false) => {}
        }
        if max_tokens.is_some_and(|tokens| tokens < 2) {
            return Err(Error::range(NAME, "max_tokens", max_tokens.unwrap_or(0), "at least 2"));
        }
        if model.artifact.architecture().kind != Kind::Decoder {
            return conflict(format!(
                "{} is no language model, and soups are scored on text by its likelihood; \
                 give labelled examples (--labelled PATH), or take --mode uniform or wise-ft",
                model.source
            ));
        }
        Ok(())
    }

    /// Reads the examples.
    ///
    /// # Errors
    /// Labels that are no classes of the models, examples of another kind than they take.
    pub(super) fn new(inputs: &'a Inputs, max_tokens: Option<usize>) -> Result<Self> {
        let model = &inputs.models[0];
        let artifact = &model.artifact;
        let names = labelled::class_names(artifact);
        let conflict = |problem: String| Error::Conflict { method: NAME, problem };
        match (&inputs.labelled, text_classes(artifact)) {
            (None, _) => {
                let tokenizer = model.tokenizer()?;
                let segments = inputs
                    .text
                    .iter()
                    .map(|text| {
                        Ok(Segment::new(&*text.source, tokenizer.encode(&text.text, false)?))
                    })
                    .collect::<Result<_>>()?;
                Ok(Self::Text { segments, max_tokens })
            }
            (Some(Labelled::Table(records)), Some(count)) => {
                let texts = Classified::read(records, "text", "label")?;
                let classes = labelled::text_classes(&texts, &names, count)?;
                let tokenizer = model.tokenizer()?;
                let longest = refit_nn::config::TransformerConfig::read(artifact.config())?.context;
                let encode = |text: &String| -> Result<Vec<u32>> {
                    Ok(encode_within(&tokenizer, text, longest)?.0)
                };
                let ids = texts.texts.iter().map(encode).collect::<Result<Vec<_>>>()?;
                if let Some(i) = ids.iter().position(Vec::is_empty) {
                    let problem = "the tokenizer makes no token of this text".to_owned();
                    return Err(Error::BadData { source_name: texts.place(i), problem });
                }
                Ok(Self::Texts { ids, classes })
            }
            (Some(Labelled::Table(_)), None) => Err(conflict(format!(
                "{} does not classify texts; `refit apply linear-probe` puts a head on a model",
                model.source
            ))),
            (Some(data), _) if artifact.architecture().kind == Kind::Vision => {
                let classes = data.image_classes(&names)?;
                let preprocess = Preprocess::from_artifact(artifact)?;
                Ok(Self::Images { data, classes, preprocess })
            }
            (Some(_), _) => Err(conflict(format!("{} does not classify images", model.source))),
        }
    }

    /// What the score is, in words.
    pub(super) fn meaning(&self) -> &'static str {
        match self {
            Self::Text { .. } => "negative log-likelihood per token, negated",
            _ => "accuracy on labelled held-out examples",
        }
    }

    /// Brings a candidate to life.
    ///
    /// # Errors
    /// Model types without a forward pass, missing tensors.
    pub(super) fn load(&self, artifact: &Artifact) -> Result<Candidate> {
        let device = BurnDevice::flex();
        Ok(match self {
            Self::Text { .. } => Candidate::Language(Decoder::load(artifact, &device)?),
            Self::Images { .. } => Candidate::Image(Vision::load(artifact, &device)?),
            Self::Texts { .. } => Candidate::Text(TextClassifier::load(artifact, &device)?),
        })
    }

    /// Scores a candidate.
    ///
    /// # Errors
    /// Whatever running it meets; labels outside its classes.
    pub(super) fn score(&self, artifact: &Artifact) -> Result<Scored> {
        match (self, self.load(artifact)?) {
            (Self::Text { segments, max_tokens }, Candidate::Language(model)) => {
                let options = eval::Options {
                    max_tokens: *max_tokens,
                    resamples: 0,
                    ..eval::Options::default()
                };
                let done =
                    eval::perplexity(&model, segments, &options, Reference::None, &|_, _| {})?;
                Ok(Scored { score: -done.nll, loss: done.nll })
            }
            (_, candidate) => {
                let (mut right, mut loss) = (0, 0.0);
                for batch in self.batches() {
                    let classes = self.classes_of(&batch);
                    let logits = self.logits(&candidate, &batch, &BurnDevice::flex())?;
                    let known = logits.dims()[1];
                    let logits = ops::to_vec(&logits);
                    let found = eval::accuracy(&logits, known, &classes)?;
                    right += found.correct.iter().filter(|right| **right).count();
                    loss += cross_entropy(&logits, known, &classes, 1.0).0;
                }
                let count = self.len().max(1) as f64;
                Ok(Scored { score: right as f64 / count, loss: loss / count })
            }
        }
    }

    /// Examples, or windows of text.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Text { .. } => self.windows().len(),
            Self::Images { classes, .. } | Self::Texts { classes, .. } => classes.len(),
        }
    }

    /// Windows of the texts, at most as many tokens as are to be scored.
    pub(super) fn windows(&self) -> Vec<&[u32]> {
        let Self::Text { segments, max_tokens } = self else { return Vec::new() };
        let windows = segments.iter().flat_map(|segment| segment.ids.chunks(WINDOW));
        let mut left = max_tokens.unwrap_or(usize::MAX);
        windows
            .filter(|window| window.len() > 1)
            .take_while(|window| {
                let some = left > 0;
                left = left.saturating_sub(window.len() - 1);
                some
            })
            .collect()
    }

    /// Which labelled examples run together.
    pub(super) fn batches(&self) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..self.len()).collect();
        if let Self::Texts { ids, .. } = self {
            order.sort_by_key(|&i| ids[i].len());
        }
        order.chunks(BATCH).map(<[usize]>::to_vec).collect()
    }

    /// Classes of some examples.
    pub(super) fn classes_of(&self, batch: &[usize]) -> Vec<usize> {
        match self {
            Self::Text { .. } => Vec::new(),
            Self::Images { classes, .. } | Self::Texts { classes, .. } => {
                batch.iter().map(|&i| classes[i]).collect()
            }
        }
    }

    /// Logits of some labelled examples, `[examples, classes]`; images are made on `device`.
    ///
    /// # Errors
    /// Whatever running the candidate meets.
    pub(super) fn logits(
        &self,
        candidate: &Candidate,
        batch: &[usize],
        device: &BurnDevice,
    ) -> Result<Tensor<2>> {
        let run = &mut Run::plain();
        match (self, candidate) {
            (Self::Images { data, preprocess, .. }, Candidate::Image(model)) => {
                Ok(model.forward(images(data, batch, preprocess, device)?, run)?)
            }
            (Self::Texts { ids, .. }, Candidate::Text(model)) => {
                let sequences: Vec<Vec<u32>> = batch.iter().map(|&i| ids[i].clone()).collect();
                Ok(model.forward(&sequences, run)?)
            }
            _ => Err(Error::Conflict {
                method: NAME,
                problem: "invariant: candidates are loaded for their examples".into(),
            }),
        }
    }
}

/// Summed cross-entropy of logits `[examples, classes]` times `temperature`, and its derivative by the temperature.
pub(super) fn cross_entropy(
    logits: &[f32],
    known: usize,
    classes: &[usize],
    temperature: f64,
) -> (f64, f64) {
    let one = |(row, &class): (&[f32], &usize)| {
        let z: Vec<f64> = row.iter().map(|z| f64::from(*z)).collect();
        let top = z.iter().map(|z| temperature * z).fold(f64::NEG_INFINITY, f64::max);
        let powers: Vec<f64> = z.iter().map(|z| (temperature * z - top).exp()).collect();
        let sum: f64 = powers.iter().sum();
        let mean: f64 = powers.iter().zip(&z).map(|(power, z)| power / sum * z).sum();
        (sum.ln() + top - temperature * z[class], mean - z[class])
    };
    let rows = logits.chunks_exact(known.max(1)).zip(classes).map(one);
    rows.fold((0.0, 0.0), |(loss, slope), (l, s)| (loss + l, slope + s))
}
