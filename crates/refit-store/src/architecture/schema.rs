//! The shape of an architecture file, the catalogue of embedded files, and the meaning of config keys.
//!
//! ```yaml
//! model_type: llama
//! kind: decoder
//! summary: one sentence for people
//! prefixes: [model., ""]          # what may stand before the names of `tensors` and `blocks`; first is usual
//! let:                            # names for shapes, each from config keys or from earlier names
//!   hidden: hidden_size
//!   kv_heads: num_key_value_heads ?? heads
//! tensors:                        # a module `X` has the tensor `X.weight`, and `X.bias` where `bias` says so
//!   embed_tokens: {role: embed, shape: [vocab, hidden]}
//! blocks:
//!   - at: layers.{layer}.
//!     each: {layer: layers}       # loop variables and their counts
//!     tensors:
//!       self_attn.q_proj: {role: q, shape: [heads * head_dim, hidden], norm: input_layernorm}
//! after:                          # modules behind the blocks
//!   norm: {role: norm, shape: [hidden]}
//! outside:                        # modules that never carry the prefix
//!   lm_head: {role: head, shape: [vocab, hidden], tie: embed_tokens}
//! ignore: ["*.inv_freq"]          # buffers that old files carry; `*` matches anything
//! config: {hidden_size: Width of the residual stream.}
//! unused: [use_cache]
//! ```

use std::collections::BTreeMap;
use std::sync::OnceLock;

use indexmap::IndexMap;
use serde::Deserialize;

use super::{Kind, Layout, Role};

/// One architecture file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Schema {
    pub model_type: String,
    /// Another file whose entries this one takes over where it does not name its own.
    #[serde(default)]
    pub extends: Option<String>,
    #[serde(default)]
    pub kind: Option<Kind>,
    #[serde(default)]
    pub summary: String,
    #[serde(default)]
    pub prefixes: Vec<String>,
    /// Tensors that, all present, reveal the family when there is no config.
    #[serde(default)]
    pub fingerprint: Vec<String>,
    #[serde(default, rename = "let")]
    pub names: IndexMap<String, Expr>,
    #[serde(default)]
    pub tensors: IndexMap<String, Entry>,
    #[serde(default)]
    pub blocks: Vec<Blocks>,
    #[serde(default)]
    pub after: IndexMap<String, Entry>,
    #[serde(default)]
    pub outside: IndexMap<String, Entry>,
    #[serde(default)]
    pub ignore: Vec<String>,
    #[serde(default)]
    pub config: BTreeMap<String, String>,
    #[serde(default)]
    pub unused: Vec<String>,
}

/// A repeated group of modules.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Blocks {
    /// What stands before the modules' names.
    pub at: String,
    /// Loop variables, outermost first. `layer` numbers the blocks; without it they are counted.
    pub each: IndexMap<String, Expr>,
    #[serde(default)]
    pub stack: Option<String>,
    pub tensors: IndexMap<String, Entry>,
}

/// One module.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    pub role: Role,
    pub shape: Vec<Expr>,
    /// Whether there is a bias: an expression, or `maybe`.
    #[serde(default)]
    pub bias: Option<Expr>,
    /// Running mean and variance of a batch normalization stand beside it.
    #[serde(default)]
    pub stats: bool,
    /// The key is the tensor's whole name, without `.weight`.
    #[serde(default)]
    pub raw: bool,
    /// May be absent.
    #[serde(default)]
    pub optional: bool,
    /// Exists only where this holds.
    #[serde(default)]
    pub when: Option<Expr>,
    /// Exists only where this module is stored, which then may not be absent: parts of one head.
    #[serde(default)]
    pub beside: Option<String>,
    /// Exists only where this module's weight is not stored: a head that another one takes the place of.
    #[serde(default)]
    pub unless: Option<String>,
    /// Further loop variables.
    #[serde(default)]
    pub each: IndexMap<String, Expr>,
    /// The norm that feeds it: in the same block, else anywhere. Of several, the first that exists.
    #[serde(default)]
    pub norm: OneOrMany,
    /// The module it shares values with where `tied` holds.
    #[serde(default)]
    pub tie: Option<String>,
    #[serde(default)]
    pub layout: Layout,
    /// Parts of a fused projection.
    #[serde(default)]
    pub fused: IndexMap<Role, Expr>,
    #[serde(default)]
    pub interleaved: bool,
}

/// An expression; a bare number in YAML is one too.
#[derive(Debug, Clone)]
pub(super) struct Expr(pub String);

impl<'de> Deserialize<'de> for Expr {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Bool(bool),
            Int(i64),
            Float(f64),
            Text(String),
        }
        Ok(Self(match Raw::deserialize(deserializer)? {
            Raw::Bool(b) => u8::from(b).to_string(),
            Raw::Int(i) => i.to_string(),
            Raw::Float(f) => f.to_string(),
            Raw::Text(text) => text,
        }))
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    #[default]
    None,
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        match self {
            Self::None => &[],
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many.as_slice(),
        }
        .iter()
        .map(String::as_str)
    }
}

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        /// `(file name, text)` of every embedded description.
        pub(super) const FILES: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../../architectures/", $name, ".yaml")))),*];
    };
}

files![
    "llama",
    "mistral",
    "gemma",
    "gemma2",
    "qwen2",
    "qwen3",
    "gpt2",
    "gpt_neox",
    "opt",
    "phi3",
    "mixtral",
    "bert",
    "roberta",
    "distilbert",
    "t5",
    "vit",
    "deit",
    "swin",
    "swinv2",
    "clip",
    "whisper",
    "efficientnet-lite0",
    "refit-cnn",
    "refit-mlp",
    "efficientnet-lite1",
    "efficientnet-lite2",
    "efficientnet-lite3",
    "efficientnet-lite4",
];

/// Model types that share a file under another name.
const ALIASES: &[(&str, &str)] = &[
    ("camembert", "roberta"),
    ("efficientnet-lite", "efficientnet-lite0"),
    ("xlm-roberta", "roberta"),
];

const COMMON: &str = include_str!("../../architectures/_common.yaml");

/// The description of a model type, with what it extends folded in. Each is parsed once.
pub(super) fn lookup(model_type: &str) -> Option<&'static Schema> {
    static PARSED: [OnceLock<Schema>; FILES.len()] = [const { OnceLock::new() }; FILES.len()];
    let name =
        ALIASES.iter().find(|(alias, _)| *alias == model_type).map_or(model_type, |(_, name)| name);
    let at = FILES.iter().position(|(file, _)| *file == name)?;
    Some(PARSED[at].get_or_init(|| {
        let schema: Schema = serde_saphyr::from_str(FILES[at].1)
            .expect("invariant: embedded architecture files parse (tested)");
        match &schema.extends {
            Some(parent) => {
                let parent = lookup(parent).expect("invariant: an extended file exists (tested)");
                schema.over(parent.clone())
            }
            None => schema,
        }
    }))
}

impl Schema {
    /// This file's entries over `parent`'s.
    fn over(mut self, parent: Self) -> Self {
        fn merge(
            mut base: IndexMap<String, Entry>,
            over: IndexMap<String, Entry>,
        ) -> IndexMap<String, Entry> {
            base.extend(over);
            base
        }
        self.kind = self.kind.or(parent.kind);
        if self.summary.is_empty() {
            self.summary = parent.summary;
        }
        if self.prefixes.is_empty() {
            self.prefixes = parent.prefixes;
        }
        // Parents' names first, because later ones may use them; an own value replaces in place.
        let mut names = parent.names;
        names.extend(self.names);
        self.names = names;
        self.tensors = merge(parent.tensors, self.tensors);
        self.after = merge(parent.after, self.after);
        self.outside = merge(parent.outside, self.outside);
        let mut blocks = parent.blocks;
        for own in self.blocks {
            match blocks.iter_mut().find(|block| block.at == own.at) {
                Some(block) => {
                    block.tensors = merge(std::mem::take(&mut block.tensors), own.tensors)
                }
                None => blocks.push(own),
            }
        }
        self.blocks = blocks;
        self.ignore.extend(parent.ignore);
        for (key, text) in parent.config {
            self.config.entry(key).or_insert(text);
        }
        self.unused.extend(parent.unused);
        self
    }
}

/// What a key of `config.json` means to refit.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct KeyDoc {
    /// The key.
    pub key: String,
    /// What it means, in words; for a key nobody documented, that refit does not know it.
    pub text: String,
    /// Whether refit reads it.
    pub used: bool,
}

#[derive(Deserialize)]
struct Common {
    config: BTreeMap<String, String>,
    unused: BTreeMap<String, String>,
}

/// The meaning of a config key for a model type. Every key has an answer: undocumented ones say that refit does
/// not read them.
pub fn document_key(model_type: &str, key: &str) -> KeyDoc {
    static COMMON_KEYS: OnceLock<Common> = OnceLock::new();
    let common = COMMON_KEYS.get_or_init(|| {
        serde_saphyr::from_str(COMMON).expect("invariant: embedded common keys parse (tested)")
    });
    let schema = lookup(model_type);
    let own = schema.as_ref().and_then(|schema| schema.config.get(key));
    let doc = |text: &str, used| KeyDoc { key: key.to_owned(), text: text.to_owned(), used };
    if let Some(text) = own.or_else(|| common.config.get(key)) {
        return doc(text, true);
    }
    if let Some(text) = common.unused.get(key) {
        return doc(text, false);
    }
    if schema.is_some_and(|schema| schema.unused.iter().any(|name| name == key)) {
        return doc("Not read by refit for this family.", false);
    }
    doc("Not documented by refit and not read by it; kept unchanged in outputs.", false)
}

/// Every model type that has a description.
pub fn known_model_types() -> Vec<&'static str> {
    let mut names: Vec<_> = FILES
        .iter()
        .map(|(name, _)| *name)
        .chain(ALIASES.iter().map(|(alias, _)| *alias))
        .collect();
    names.sort_unstable();
    names
}
