//! Text classifiers: an encoder or decoder, what stands in front of the head, and the head, as the `...ForSequenceClassification`
//! classes of transformers have them.
//!
//! | family | what the head sees | head |
//! |---|---|---|
//! | BERT | `tanh(dense · h₀ + b)`, the pooler on the first token | `classifier`, with bias |
//! | RoBERTa, XLM-R | `tanh(dense · h₀ + b)`, a dense layer of the head itself | `classifier.out_proj`, with bias |
//! | DistilBERT | `relu(dense · h₀ + b)` | `classifier`, with bias |
//! | decoders | the last token after the final norm | `score`, without bias |

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use refit_store::architecture::Kind;
use refit_store::artifact::Artifact;

use crate::config::TransformerConfig;
use crate::error::{Error, Result};
use crate::load::Loader;
use crate::operator::Linear;
use crate::ops::{self, Activation};
use crate::run::Run;
use crate::{Decoder, Encoder};

/// How the classification class of a family names what it adds to the trunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadForm {
    /// Class of transformers; empty for layouts of refit's own.
    pub class: &'static str,
    /// What the class puts before the names of the trunk.
    pub prefix: &'static str,
    /// Site and nonlinearity of the layer between trunk and head.
    pub dense: Option<(&'static str, Activation)>,
    /// Site of the head.
    pub site: &'static str,
    /// Whether the head has a bias.
    pub bias: bool,
}

/// The form of a model type's head; `None` where refit cannot run the trunk.
pub fn head_form(model_type: &str) -> Option<HeadForm> {
    let tanh = |site| Some((site, Activation::Tanh));
    let text = |class, prefix, dense, site| HeadForm { class, prefix, dense, site, bias: true };
    let score = |class, prefix| HeadForm { class, prefix, dense: None, site: "score", bias: false };
    let image = |class, prefix, site| HeadForm { class, prefix, dense: None, site, bias: true };
    Some(match model_type {
        "bert" => {
            text("BertForSequenceClassification", "bert.", tanh("bert.pooler.dense"), "classifier")
        }
        "roberta" => text(
            "RobertaForSequenceClassification",
            "roberta.",
            tanh("classifier.dense"),
            "classifier.out_proj",
        ),
        "xlm-roberta" => text(
            "XLMRobertaForSequenceClassification",
            "roberta.",
            tanh("classifier.dense"),
            "classifier.out_proj",
        ),
        "distilbert" => text(
            "DistilBertForSequenceClassification",
            "distilbert.",
            Some(("pre_classifier", Activation::Relu)),
            "classifier",
        ),
        "llama" => score("LlamaForSequenceClassification", "model."),
        "mistral" => score("MistralForSequenceClassification", "model."),
        "qwen2" => score("Qwen2ForSequenceClassification", "model."),
        "qwen3" => score("Qwen3ForSequenceClassification", "model."),
        "gemma2" => score("Gemma2ForSequenceClassification", "model."),
        "phi3" => score("Phi3ForSequenceClassification", "model."),
        "gpt2" => score("GPT2ForSequenceClassification", "transformer."),
        "gpt_neox" => score("GPTNeoXForSequenceClassification", "gpt_neox."),
        "opt" => score("OPTForSequenceClassification", "model.decoder."),
        "vit" => image("ViTForImageClassification", "vit.", "classifier"),
        "refit-cnn" | "refit-mlp" => image("", "", "classifier"),
        lite if lite.replace('_', "-").starts_with("efficientnet-lite") => image("", "", "_fc"),
        _ => return None,
    })
}

/// The number of classes of a text classifier; `None` for a model without such a head.
pub fn text_classes(artifact: &Artifact) -> Option<usize> {
    let kind = artifact.architecture().kind;
    let form = head_form(artifact.config().model_type()?)?;
    if !matches!(kind, Kind::Encoder | Kind::Decoder) {
        return None;
    }
    let name = format!("{}.weight", form.site);
    let shape = artifact.contains(&name).then(|| artifact.tensor(&name).ok())??.shape.clone();
    match shape[..] {
        [classes, _] => Some(classes),
        _ => None,
    }
}

/// What reads the text.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // one per run: the weights dwarf it
pub enum Body {
    /// Looks both ways; its first token stands for the text.
    Encoder(Encoder),
    /// Looks back; its last token stands for the text.
    Decoder(Decoder),
}

/// The layer between an encoder and its head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dense {
    /// The artifact's own where it has one, else [`Dense::PassThrough`].
    Auto,
    /// The artifact's own; an error where it has none.
    Own,
    /// One that lets the first token's vector pass, scaled so that the nonlinearity hardly bends it: the class of transformers
    /// insists on a layer here, and a fresh random one would mix what the encoder says.
    PassThrough,
}

/// An encoder or decoder with a classification head.
#[derive(Module, Debug)]
pub struct TextClassifier {
    /// The trunk.
    pub body: Body,
    /// The layer before the head; its site is the one that the class of transformers has.
    pub dense: Option<Linear>,
    /// Class logits; `None` while only features are asked for.
    pub classifier: Option<Linear>,
    /// Nonlinearity after `dense`.
    #[module(skip)]
    pub activation: Option<Activation>,
    /// `pad_token_id`: a decoder's last token is the last that is not this one, as transformers finds it.
    #[module(skip)]
    pub pad: Option<u32>,
}

impl TextClassifier {
    /// Loads a text classifier.
    ///
    /// # Errors
    /// Model types without a forward pass or a head, missing or mis-shaped tensors.
    pub fn load(artifact: &Artifact, device: &Device) -> Result<Self> {
        let (mut model, form, loader) = Self::read(artifact, device, Dense::Own)?;
        let classes = text_classes(artifact).ok_or_else(|| Error::Missing {
            name: format!("{}.weight (without a head the model has no classes)", form.site),
        })?;
        model.classifier =
            Some(loader.linear(form.site.into(), classes, loader.config().hidden)?);
        Ok(model)
    }

    /// Loads what stands under the head.
    ///
    /// # Errors
    /// As [`Self::load`]; a missing layer with [`Dense::Own`].
    pub fn load_trunk(artifact: &Artifact, device: &Device, dense: Dense) -> Result<Self> {
        Ok(Self::read(artifact, device, dense)?.0)
    }

    fn read<'a>(
        artifact: &'a Artifact,
        device: &Device,
        dense: Dense,
    ) -> Result<(Self, HeadForm, Loader<'a>)> {
        let loader = Loader::new(artifact, device)?;
        let model_type = loader.config().model_type.clone();
        let form = head_form(&model_type).ok_or_else(|| Error::Unsupported {
            model_type,
            reason: "refit knows no classification head for it".into(),
        })?;
        loader.decode_ahead()?;
        let body = match artifact.architecture().kind {
            Kind::Encoder => Body::Encoder(Encoder::read(&loader)?),
            _ => Body::Decoder(Decoder::load_trunk(&loader)?),
        };
        let pad = artifact.config().usize("pad_token_id").and_then(|id| u32::try_from(id).ok());
        let mut model = Self { body, dense: None, classifier: None, activation: None, pad };
        if let Some((site, activation)) = form.dense {
            model.activation = Some(activation);
            model.dense = Some(match own_dense(artifact, &loader, site) {
                Some(stored) if dense != Dense::PassThrough => {
                    let width = loader.config().hidden;
                    let own = loader.linear(stored, width, width)?;
                    Linear { site: site.to_owned(), ..own }
                }
                None if dense == Dense::Own => {
                    return Err(Error::Missing { name: format!("{site}.weight") });
                }
                _ => model.pass_through(site, activation, device)?,
            });
        }
        Ok((model, form, loader))
    }

    /// A dense layer whose output determines its input. The vectors that it sees come from a layer norm with scale `γ` and
    /// shift `β`, so their size is known: `tanh` gets them scaled to about a quarter, where it is nearly linear; `relu` gets
    /// them raised by a bound on their size, where it is the identity.
    fn pass_through(&self, site: &str, activation: Activation, device: &Device) -> Result<Linear> {
        let Body::Encoder(encoder) = &self.body else {
            return Err(Error::Invalid("only encoders have a layer before the head".into()));
        };
        let last = encoder
            .blocks
            .last()
            .ok_or_else(|| Error::Invalid("an encoder without blocks has no output".into()))?;
        let scale = ops::to_vec(&last.ffn_norm.weight.val());
        let shift = last.ffn_norm.bias.as_ref().map(|bias| ops::to_vec(&bias.val()));
        let width = scale.len();
        let root = (width as f32).sqrt();
        let (mut weight, mut bias) = (vec![0.0; width * width], vec![0.0; width]);
        for i in 0..width {
            let shift = shift.as_ref().map_or(0.0, |shift| shift[i].abs());
            match activation {
                Activation::Relu => {
                    weight[i * width + i] = 1.0;
                    bias[i] = scale[i].abs() * root + shift;
                }
                _ => weight[i * width + i] = 0.25 / (scale[i].abs() + shift).max(1e-3),
            }
        }
        let weight = Tensor::from_data(TensorData::new(weight, [width, width]), device);
        let bias = Tensor::from_data(TensorData::new(bias, [width]), device);
        Ok(Linear::dense(site, weight, Some(bias)))
    }

    /// The config of the trunk.
    pub fn config(&self) -> &TransformerConfig {
        match &self.body {
            Body::Encoder(encoder) => encoder.config(),
            Body::Decoder(decoder) => decoder.config(),
        }
    }

    /// Longest input in tokens.
    pub fn max_tokens(&self) -> usize {
        match &self.body {
            Body::Encoder(encoder) => encoder.max_tokens(),
            Body::Decoder(decoder) => decoder.config().context,
        }
    }

    /// Puts a head of these values on: `weight [classes, hidden]`, `bias [classes]`.
    pub fn set_head(
        &mut self,
        site: &str,
        weight: Vec<f32>,
        bias: Option<Vec<f32>>,
        device: &Device,
    ) {
        let width = self.config().hidden;
        self.classifier = Some(linear(site, weight, bias, width, device));
    }

    /// What the head sees of each sequence of token ids (with special tokens), `[sequences, hidden]`.
    ///
    /// # Errors
    /// Empty sequences, ids outside the vocabulary, inputs longer than the context.
    pub fn features(&self, sequences: &[Vec<u32>], run: &mut Run) -> Result<Tensor<2>> {
        let count = sequences.len();
        let x = match &self.body {
            Body::Encoder(encoder) => {
                let x = encoder.forward(sequences, run)?;
                let width = x.dims()[2];
                x.slice([0..count, 0..1, 0..width])
            }
            Body::Decoder(decoder) => self.last_tokens(decoder, sequences, run)?,
        };
        let x = match (&self.dense, self.activation) {
            (Some(dense), Some(activation)) => activation.apply(dense.forward(x, run)),
            _ => x,
        };
        let width = x.dims()[2];
        Ok(x.reshape([count, width]))
    }

    /// The last token of each sequence after the final norm, `[sequences, 1, hidden]`.
    fn last_tokens(
        &self,
        decoder: &Decoder,
        sequences: &[Vec<u32>],
        run: &mut Run,
    ) -> Result<Tensor<3>> {
        let count = sequences.len();
        let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
        if sequences.iter().any(Vec::is_empty) || count == 0 {
            return Err(Error::Invalid("every sequence needs at least one token".into()));
        }
        let mut ids = vec![0; count * longest];
        for (to, from) in ids.chunks_exact_mut(longest).zip(sequences) {
            to[..from.len()].copy_from_slice(from);
        }
        // Nothing looks ahead, so what stands behind a sequence's end changes nothing before it.
        let x = decoder.hidden(&ids, count, run)?;
        let width = x.dims()[2];
        let places: Vec<i64> = sequences
            .iter()
            .enumerate()
            .map(|(row, ids)| (row * longest + last_token(ids, self.pad)) as i64)
            .collect();
        let device = x.device();
        let places = Tensor::<1, Int>::from_data(TensorData::new(places, [count]), &device);
        let x = x.reshape([count * longest, width]).select(0, places);
        Ok(decoder.frame.norm.forward(x.reshape([count, 1, width])))
    }

    /// Logits `[sequences, classes]`.
    ///
    /// # Errors
    /// As [`Self::features`]; a model without a head.
    pub fn forward(&self, sequences: &[Vec<u32>], run: &mut Run) -> Result<Tensor<2>> {
        let features = self.features(sequences, run)?;
        self.head(features, run)
    }

    /// Features `[rows, hidden]` to logits `[rows, classes]`.
    ///
    /// # Errors
    /// A model without a head.
    pub fn head(&self, features: Tensor<2>, run: &mut Run) -> Result<Tensor<2>> {
        let [rows, width] = features.dims();
        let head = self.classifier.as_ref();
        let head =
            head.ok_or_else(|| Error::Invalid("the model has no classification head".into()))?;
        let logits = head.forward(features.reshape([1, rows, width]), run);
        let classes = logits.dims()[2];
        Ok(logits.reshape([rows, classes]))
    }
}

/// A dense linear of these values.
pub fn linear(
    site: &str,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    width: usize,
    device: &Device,
) -> Linear {
    let classes = weight.len() / width.max(1);
    let weight = Tensor::from_data(TensorData::new(weight, [classes, width]), device);
    let bias = bias.map(|bias| Tensor::from_data(TensorData::new(bias, [classes]), device));
    let mut linear = Linear::dense(site, weight, None);
    linear.bias = bias.map(Param::from_tensor);
    linear
}

/// Where the artifact keeps the layer that its class would call `site`.
pub fn own_dense(artifact: &Artifact, loader: &Loader, site: &str) -> Option<String> {
    // A bare BertModel has its pooler without the class's prefix.
    let bare =
        site.split_once("pooler.").map(|(_, rest)| format!("{}pooler.{rest}", loader.prefix()));
    let has = |site: &String| artifact.contains(&format!("{site}.weight"));
    [Some(site.to_owned()), bare].into_iter().flatten().find(has)
}

/// The place of the last token that is not `pad`; the first where all are.
fn last_token(ids: &[u32], pad: Option<u32>) -> usize {
    match pad {
        Some(pad) => ids.iter().rposition(|id| *id != pad).unwrap_or(0),
        None => ids.len() - 1,
    }
}
