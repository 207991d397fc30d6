//! What an adapter does at one site.

use crate::error::{Error, Result};

/// A dense host tensor, `f32`, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Values {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// The elements.
    pub values: Vec<f32>,
}

impl Values {
    /// A tensor of this shape.
    ///
    /// # Errors
    /// [`Error::AdapterForm`] when the number of values is not the product of the dimensions.
    pub fn new(shape: impl Into<Vec<usize>>, values: Vec<f32>) -> Result<Self> {
        let shape = shape.into();
        let numel = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        if numel != Some(values.len()) {
            let reason = format!("{} values do not fill shape {shape:?}", values.len());
            return Err(Error::AdapterForm { form: "tensor", reason });
        }
        Ok(Self { shape, values })
    }

    /// The first dimension, or 1.
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// The product of the other dimensions: a kernel counts as flattened.
    pub fn columns(&self) -> usize {
        self.shape.iter().skip(1).product()
    }
}

/// Which side of a linear a scaling acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Its outputs: rows of `[out, in]`, and the bias.
    Output,
    /// Its inputs: columns of `[out, in]`.
    Input,
}

/// A factor of a Kronecker product.
#[derive(Debug, Clone, PartialEq)]
pub enum Factor {
    /// The matrix itself.
    Full(Values),
    /// A product `a b` of `[m, r]` and `[r, n]`.
    LowRank(Values, Values),
}

impl Factor {
    /// Rows and columns of the factor.
    pub fn dims(&self) -> (usize, usize) {
        match self {
            Self::Full(full) => (full.rows(), full.columns()),
            Self::LowRank(a, b) => (a.rows(), b.columns()),
        }
    }

    /// Number of stored values.
    pub fn parameters(&self) -> usize {
        match self {
            Self::Full(full) => full.values.len(),
            Self::LowRank(a, b) => a.values.len() + b.values.len(),
        }
    }
}

/// A change at one site: its factors, and how they act on the base weight `W [out, in]`.
#[derive(Debug, Clone, PartialEq)]
pub enum Form {
    /// LoRA (arXiv 2106.09685): `W + s B A`; with a magnitude DoRA (arXiv 2402.09353):
    /// `m (W + s B A) / ||W + s B A||` by rows. Convolutions keep their four dimensions and act flattened.
    Lora {
        /// `A [r, in]` (a kernel: `[r, in, h, w]`).
        a: Values,
        /// `B [out, r]` (a kernel: `[out, r, 1, 1]`).
        b: Values,
        /// `s`: alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA (arXiv 2312.03732).
        scale: f32,
        /// `m [out]`, for DoRA.
        magnitude: Option<Vec<f32>>,
        /// `[out]`, added to the base's bias times `s` (PEFT's `lora_bias`).
        bias: Option<Vec<f32>>,
    },
    /// LoRA on an embedding table `E [vocab, dim]`: `E + s (B A)^T`.
    EmbeddingLora {
        /// `A [r, vocab]`.
        a: Values,
        /// `B [dim, r]`.
        b: Values,
        /// `s`.
        scale: f32,
    },
    /// (IA)^3 (arXiv 2205.05638): rows (and bias) or columns times learned factors.
    Ia3 {
        /// `[out]` or `[in]`.
        factors: Vec<f32>,
        /// Which of the two.
        side: Side,
    },
    /// LoHa (FedPara, arXiv 2108.06098): `W + s (W1a W1b) .* (W2a W2b)`.
    Loha {
        /// `[out, r]`.
        w1_a: Values,
        /// `[r, in]`.
        w1_b: Values,
        /// `[out, r]`.
        w2_a: Values,
        /// `[r, in]`.
        w2_b: Values,
        /// `s`: alpha / r.
        scale: f32,
    },
    /// LoKr (arXiv 2309.14859): `W + s W1 (x) W2`, a Kronecker product.
    Lokr {
        /// The outer factor.
        w1: Factor,
        /// The inner factor.
        w2: Factor,
        /// `s`: alpha / r.
        scale: f32,
    },
    /// A norm's new scale and shift, in place of the base's.
    LayerNorm {
        /// `[hidden]`.
        weight: Vec<f32>,
        /// `[hidden]`.
        bias: Option<Vec<f32>>,
    },
    /// A whole tensor in place of the base's: `modules_to_save`, and biases that were trained along.
    Full {
        /// `.weight` or `.bias`: what the site's name lacks to be the tensor's.
        tensor: String,
        /// The new values, in the base's own layout.
        values: Values,
    },
    /// What a fine-tuning changed in a tensor, added to it.
    Delta {
        /// What the site's name lacks to be the tensor's, with its dot.
        tensor: String,
        /// The difference, in the base's own layout.
        values: Values,
    },
    /// A bottleneck adapter (arXiv 1902.00751, arXiv 2110.04366): `h + s (act(x D^T + d) U^T + u)`. It depends on
    /// the input and cannot be merged.
    Bottleneck {
        /// `D [r, in]`.
        down: Values,
        /// `d [r]`.
        down_bias: Vec<f32>,
        /// `U [out, r]`.
        up: Values,
        /// `u [out]`.
        up_bias: Vec<f32>,
        /// `s`.
        scale: f32,
        /// Name of the activation, as Hugging Face spells it (`relu`, `gelu`, ...).
        activation: String,
        /// `x` is the changed hidden state itself (sequential), else the input of the sub-layer (parallel).
        sequential: bool,
        /// `heads` (before the output projection), `attention` or `ffn`.
        position: String,
    },
    /// An adapter of every attention head by itself (arXiv 2110.04366): `f(q K^T) V` of the head's query is added to the
    /// head, before the output projection at this site. It depends on the input and cannot be merged.
    Heads {
        /// `K [heads, r, head_dim]`.
        keys: Values,
        /// `V [heads, r, head_dim]`.
        values: Values,
        /// Factor on what is added.
        scale: f32,
        /// `f`: `relu`, or `softmax` over the channels.
        activation: String,
    },
}

impl Form {
    /// The form's name in messages and reports.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Lora { magnitude: Some(_), .. } => "DoRA",
            Self::Lora { .. } => "LoRA",
            Self::EmbeddingLora { .. } => "embedding LoRA",
            Self::Ia3 { .. } => "(IA)^3",
            Self::Loha { .. } => "LoHa",
            Self::Lokr { .. } => "LoKr",
            Self::LayerNorm { .. } => "norm tuning",
            Self::Full { .. } => "full tensor",
            Self::Delta { .. } => "difference",
            Self::Bottleneck { .. } => "bottleneck adapter",
            Self::Heads { .. } => "multi-head adapter",
        }
    }

    /// True where the base weight can take the change in, so that nothing remains to do at inference.
    pub fn mergeable(&self) -> bool {
        !matches!(self, Self::Bottleneck { .. } | Self::Heads { .. })
    }

    /// Number of trained values.
    pub fn parameters(&self) -> usize {
        let optional = |values: &Option<Vec<f32>>| values.as_ref().map_or(0, Vec::len);
        match self {
            Self::Lora { a, b, magnitude, bias, .. } => {
                a.values.len() + b.values.len() + optional(magnitude) + optional(bias)
            }
            Self::EmbeddingLora { a, b, .. } => a.values.len() + b.values.len(),
            Self::Ia3 { factors, .. } => factors.len(),
            Self::Loha { w1_a, w1_b, w2_a, w2_b, .. } => {
                [w1_a, w1_b, w2_a, w2_b].iter().map(|factor| factor.values.len()).sum()
            }
            Self::Lokr { w1, w2, .. } => w1.parameters() + w2.parameters(),
            Self::LayerNorm { weight, bias } => weight.len() + optional(bias),
            Self::Full { values, .. } | Self::Delta { values, .. } => values.values.len(),
            Self::Heads { keys, values, .. } => keys.values.len() + values.values.len(),
            Self::Bottleneck { down, down_bias, up, up_bias, .. } => {
                down.values.len() + down_bias.len() + up.values.len() + up_bias.len()
            }
        }
    }

    /// `(out, in)` of the weight that the form acts on: a kernel is flattened, a vector is `(n, 1)`, a table
    /// `(vocab, dim)`. `None` for the side of (IA)^3 that the form does not know.
    pub fn dims(&self) -> (Option<usize>, Option<usize>) {
        match self {
            Self::Lora { a, b, .. } => (Some(b.rows()), Some(a.columns())),
            Self::EmbeddingLora { a, b, .. } => (Some(a.columns()), Some(b.rows())),
            Self::Ia3 { factors, side: Side::Output } => (Some(factors.len()), None),
            Self::Ia3 { factors, side: Side::Input } => (None, Some(factors.len())),
            Self::Loha { w1_a, w1_b, .. } => (Some(w1_a.rows()), Some(w1_b.columns())),
            Self::Lokr { w1, w2, .. } => {
                let ((rows1, columns1), (rows2, columns2)) = (w1.dims(), w2.dims());
                (rows1.checked_mul(rows2), columns1.checked_mul(columns2))
            }
            Self::LayerNorm { weight, .. } => (Some(weight.len()), Some(1)),
            Self::Full { values, .. } | Self::Delta { values, .. } => {
                (Some(values.rows()), Some(values.columns()))
            }
            Self::Bottleneck { down, up, .. } => (Some(up.rows()), Some(down.columns())),
            Self::Heads { keys, .. } => {
                let dim = keys.shape.last().copied().unwrap_or(0);
                (None, keys.rows().checked_mul(dim))
            }
        }
    }

    /// Place among the parts of one site: what replaces comes before what adds.
    pub(super) fn rank(&self) -> (u8, &str) {
        match self {
            Self::Full { tensor, .. } => (0, tensor),
            Self::LayerNorm { .. } => (1, ""),
            Self::Delta { tensor, .. } => (3, tensor),
            _ => (2, ""),
        }
    }
}

/// What an adapter does at one site.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Path of the module in the base model, without `.weight`.
    pub site: String,
    /// The change.
    pub form: Form,
}

impl Part {
    /// Name of the base's tensor that the part changes first: the weight, or the bias for a trained bias.
    pub fn tensor(&self) -> String {
        match &self.form {
            Form::Full { tensor, .. } | Form::Delta { tensor, .. } => {
                format!("{}{tensor}", self.site)
            }
            _ => format!("{}.weight", self.site),
        }
    }
}

/// Trained input that precedes the tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Prefix tuning (arXiv 2101.00190): keys and values put before those of the tokens, in every layer. The keys
    /// stand after rotation, and the tokens' positions begin at `tokens`.
    Prefix {
        /// Number of virtual tokens.
        tokens: usize,
        /// Number of layers.
        layers: usize,
        /// `[tokens, layers * 2 * kv_dim]`, seen as `[tokens, 2 layers, kv_dim]`: index `2 i` is the key and
        /// `2 i + 1` the value of layer `i`.
        table: Values,
    },
    /// Prompt tuning (arXiv 2104.08691) and P-tuning: embeddings put before those of the tokens.
    Input {
        /// Number of virtual tokens.
        tokens: usize,
        /// `[tokens, hidden]`.
        table: Values,
    },
}

impl Prompt {
    /// The trained table.
    pub fn table(&self) -> &Values {
        match self {
            Self::Prefix { table, .. } | Self::Input { table, .. } => table,
        }
    }

    /// Number of virtual tokens.
    pub fn tokens(&self) -> usize {
        match self {
            Self::Prefix { tokens, .. } | Self::Input { tokens, .. } => *tokens,
        }
    }

    /// Elements of one key or value of a prefix (`kv_heads * head_dim`), or of one embedding.
    pub fn width(&self) -> usize {
        match self {
            Self::Prefix { layers, table, .. } => table.columns() / (2 * layers).max(1),
            Self::Input { table, .. } => table.columns(),
        }
    }

    /// Keys and values of one layer, each `[tokens, kv_dim]`; `None` for a prompt that is no prefix or a layer that
    /// it does not have.
    pub fn layer(&self, layer: usize) -> Option<(Vec<f32>, Vec<f32>)> {
        let Self::Prefix { layers, table, .. } = self else { return None };
        let width = self.width();
        if layer >= *layers || width == 0 {
            return None;
        }
        let pick = |index: usize| {
            let rows = table.values.chunks_exact(table.columns());
            rows.flat_map(|row| &row[index * width..(index + 1) * width]).copied().collect()
        };
        Some((pick(2 * layer), pick(2 * layer + 1)))
    }
}
