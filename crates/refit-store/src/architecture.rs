//! Architectures as data: which tensors a model type has, what each is for, and which shapes its config
//! promises.
//!
//! One YAML file per family in `architectures/` describes names, roles, shapes, ties and the meaning of config
//! keys. Methods that only touch weights need this and no forward pass. A model type without a file is inferred
//! from names and shapes and marked so.

mod expr;
mod infer;
mod memory;
mod resolve;
mod schema;

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

pub use memory::{MemoryOptions, MemoryPlan, memory_plan};
pub use resolve::{LoadReport, Misshaped, Resolved, resolve};
pub use schema::{KeyDoc, document_key, known_model_types};

/// What a whole model does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Kind {
    /// Left-to-right language model.
    Decoder,
    /// Bidirectional text encoder.
    Encoder,
    /// Encoder and decoder joined by cross-attention.
    EncoderDecoder,
    /// Image encoder or classifier.
    Vision,
    /// Image and text in one model.
    VisionLanguage,
    /// Speech or sound.
    Audio,
}

/// What a tensor does in its model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Role {
    /// Token embedding table, `[vocab, hidden]`.
    Embed,
    /// Learned position embedding or relative-position bias.
    Position,
    /// Segment (token type) embedding.
    TokenType,
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Query, key and value projections in one matrix; [`Site::fused`] gives the parts.
    Qkv,
    /// Output projection of attention.
    O,
    /// Gate projection of a gated MLP.
    Gate,
    /// Up projection of an MLP (its only first projection when it has no gate).
    Up,
    /// Gate and up projections in one matrix.
    GateUp,
    /// Down projection of an MLP.
    Down,
    /// Router of a mixture of experts.
    Router,
    /// Scale of a normalization.
    Norm,
    /// Output head: vocabulary logits or class logits.
    Head,
    /// Convolution kernel.
    Conv,
    /// Projection of a pooled representation.
    Pooler,
    /// Additive bias of a linear, convolution or normalization.
    Bias,
    /// Running statistics of a batch normalization; not trained by gradients.
    Stat,
    /// Anything else.
    Other,
}

impl Role {
    /// The name used in YAML files, reports and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Position => "position",
            Self::TokenType => "token_type",
            Self::Q => "q",
            Self::K => "k",
            Self::V => "v",
            Self::Qkv => "qkv",
            Self::O => "o",
            Self::Gate => "gate",
            Self::Up => "up",
            Self::GateUp => "gate_up",
            Self::Down => "down",
            Self::Router => "router",
            Self::Norm => "norm",
            Self::Head => "head",
            Self::Conv => "conv",
            Self::Pooler => "pooler",
            Self::Bias => "bias",
            Self::Stat => "stat",
            Self::Other => "other",
        }
    }

    /// True for the projections of attention and MLP.
    pub fn is_projection(self) -> bool {
        matches!(
            self,
            Self::Q
                | Self::K
                | Self::V
                | Self::Qkv
                | Self::O
                | Self::Gate
                | Self::Up
                | Self::GateUp
                | Self::Down
        )
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// Order of the dimensions of a stored weight.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// `[out, in]`: PyTorch's `Linear`, and every embedding, norm and bias.
    #[default]
    OutIn,
    /// `[in, out]`: GPT-2's `Conv1D`.
    InOut,
    /// `[out, in / groups, kernel...]`: convolutions.
    Conv,
}

/// A named place in a model that holds a weight.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Site {
    /// The tensor's name in the artifact.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// Index of its block within [`Site::stack`]; `None` outside the blocks.
    pub layer: Option<usize>,
    /// Shape as stored.
    pub shape: Vec<usize>,
    /// Name of the norm's weight that produces this site's input.
    pub norm: Option<String>,
    /// Name of the tensor that it shares its values with.
    pub tied_to: Option<String>,
    /// Order of the dimensions.
    pub layout: Layout,
    /// Which stack of blocks it belongs to (`encoder`, `decoder`, `vision`, `text`), where a model has several.
    pub stack: Option<String>,
    /// Index of the expert, in a mixture of experts.
    pub expert: Option<usize>,
    /// Parts of a fused projection along its output dimension, in stored order.
    pub fused: Vec<(Role, usize)>,
    /// The parts of [`Site::fused`] alternate head by head (GPT-NeoX) and are not one after the other.
    pub interleaved: bool,
    /// False when the tensor is absent because it is tied to another.
    pub stored: bool,
}

impl Site {
    /// The module's name: the tensor's without `.weight` or `.bias`.
    pub fn module(&self) -> &str {
        self.name
            .strip_suffix(".weight")
            .or_else(|| self.name.strip_suffix(".bias"))
            .unwrap_or(&self.name)
    }

    /// `(outputs, inputs)` of a linear, whichever way it is stored; `None` unless it is a matrix.
    pub fn out_in(&self) -> Option<(usize, usize)> {
        match (self.layout, self.shape.as_slice()) {
            (Layout::OutIn, &[out, inp]) => Some((out, inp)),
            (Layout::InOut, &[inp, out]) => Some((out, inp)),
            _ => None,
        }
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Sizes that memory plans and explanations need, under one name for every family. `None`: the config does not
/// say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Dims {
    /// Width of the residual stream.
    pub hidden: Option<usize>,
    /// Number of blocks of the main stack.
    pub layers: Option<usize>,
    /// Query heads.
    pub heads: Option<usize>,
    /// Key/value heads.
    pub kv_heads: Option<usize>,
    /// Width of one head.
    pub head_dim: Option<usize>,
    /// Inner width of the MLP.
    pub ffn: Option<usize>,
    /// Vocabulary size.
    pub vocab: Option<usize>,
    /// Longest input, in tokens.
    pub context: Option<usize>,
    /// Attention window, in tokens, where it is shorter than the context.
    pub window: Option<usize>,
}

/// A model's tensors with their roles.
#[derive(Debug, Clone, Serialize)]
pub struct Architecture {
    /// Hugging Face's `model_type`, or `unknown`.
    pub model_type: String,
    /// What the model does.
    pub kind: Kind,
    /// True when roles were guessed from names and shapes because no description fits.
    pub inferred: bool,
    /// Every tensor of the artifact, and tied tensors that are not stored, in model order.
    pub sites: Vec<Site>,
    /// Sizes from the config.
    pub dims: Dims,
    /// Words for people: what the family is.
    pub summary: String,
    #[serde(skip)]
    index: HashMap<String, usize>,
}

impl Architecture {
    fn new(
        model_type: String,
        kind: Kind,
        inferred: bool,
        sites: Vec<Site>,
        dims: Dims,
        summary: String,
    ) -> Self {
        let index = sites.iter().enumerate().map(|(i, site)| (site.name.clone(), i)).collect();
        Self { model_type, kind, inferred, sites, dims, summary, index }
    }

    /// The linears inside blocks: what quantizers and pruners touch. Routers, heads, embeddings and
    /// convolutions are not among them.
    pub fn linears(&self) -> impl Iterator<Item = &Site> {
        self.sites.iter().filter(|site| {
            site.stored
                && site.layer.is_some()
                && site.role.is_projection()
                && site.shape.len() == 2
        })
    }

    /// The site of a tensor.
    pub fn site(&self, name: &str) -> Option<&Site> {
        self.index.get(name).map(|&i| &self.sites[i])
    }

    /// Sites of one role, in model order.
    pub fn with_role(&self, role: Role) -> impl Iterator<Item = &Site> {
        self.sites.iter().filter(move |site| site.role == role)
    }

    /// Number of blocks, over all stacks.
    pub fn layers(&self) -> usize {
        let blocks: std::collections::HashSet<_> = self
            .sites
            .iter()
            .filter_map(|site| Some((site.stack.as_deref(), site.layer?)))
            .collect();
        blocks.len()
    }

    /// Stored parameters by role: `(role, tensors, elements)`, in the order of [`Role`].
    pub fn parameters_by_role(&self) -> Vec<(Role, usize, u64)> {
        let mut census = std::collections::BTreeMap::<Role, (usize, u64)>::new();
        for site in self.sites.iter().filter(|site| site.stored) {
            let entry = census.entry(site.role).or_default();
            entry.0 += 1;
            entry.1 += site.numel() as u64;
        }
        census.into_iter().map(|(role, (tensors, elements))| (role, tensors, elements)).collect()
    }
}
