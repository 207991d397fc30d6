//! Roles from names and shapes alone, for model types without a description.
//!
//! Published checkpoints agree on a few dozen words for the same parts. A module's last words decide; where they
//! say nothing, a matrix inside a block that widens its input is taken for the MLP's first half and one that
//! narrows it for the second.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value as Json};

use super::{Architecture, Dims, Kind, Layout, Role, Site};

/// Words that end a module's name, most specific first.
const WORDS: &[(&str, Role)] = &[
    ("word_embeddings", Role::Embed),
    ("embed_tokens", Role::Embed),
    ("tok_embeddings", Role::Embed),
    ("embed_in", Role::Embed),
    ("token_embedding", Role::Embed),
    ("wte", Role::Embed),
    ("shared", Role::Embed),
    ("position_embeddings", Role::Position),
    ("embed_positions", Role::Position),
    ("position_embedding", Role::Position),
    ("positional_embedding", Role::Position),
    ("pos_embed", Role::Position),
    ("relative_attention_bias", Role::Position),
    ("relative_position_bias_table", Role::Position),
    ("wpe", Role::Position),
    ("token_type_embeddings", Role::TokenType),
    ("query_key_value", Role::Qkv),
    ("qkv_proj", Role::Qkv),
    ("in_proj_weight", Role::Qkv),
    ("in_proj", Role::Qkv),
    ("c_attn", Role::Qkv),
    ("wqkv", Role::Qkv),
    ("qkv", Role::Qkv),
    ("q_proj", Role::Q),
    ("query", Role::Q),
    ("q_lin", Role::Q),
    ("to_q", Role::Q),
    ("wq", Role::Q),
    ("k_proj", Role::K),
    ("key", Role::K),
    ("k_lin", Role::K),
    ("to_k", Role::K),
    ("wk", Role::K),
    ("v_proj", Role::V),
    ("value", Role::V),
    ("v_lin", Role::V),
    ("to_v", Role::V),
    ("wv", Role::V),
    ("o_proj", Role::O),
    ("out_proj", Role::O),
    ("out_lin", Role::O),
    ("attention.output.dense", Role::O),
    ("attention.dense", Role::O),
    ("self_attention.dense", Role::O),
    ("attn.c_proj", Role::O),
    ("attn.proj", Role::O),
    ("to_out.0", Role::O),
    ("wo", Role::O),
    ("gate_up_proj", Role::GateUp),
    ("w1w3", Role::GateUp),
    ("gate_proj", Role::Gate),
    ("wi_0", Role::Gate),
    ("block_sparse_moe.gate", Role::Router),
    ("mlp.gate", Role::Router),
    ("router", Role::Router),
    ("up_proj", Role::Up),
    ("dense_h_to_4h", Role::Up),
    ("intermediate.dense", Role::Up),
    ("c_fc", Role::Up),
    ("wi_1", Role::Up),
    ("wi", Role::Up),
    ("lin1", Role::Up),
    ("fc_in", Role::Up),
    ("fc1", Role::Up),
    ("down_proj", Role::Down),
    ("dense_4h_to_h", Role::Down),
    ("output.dense", Role::Down),
    ("mlp.c_proj", Role::Down),
    ("lin2", Role::Down),
    ("fc_out", Role::Down),
    ("fc2", Role::Down),
    ("lm_head", Role::Head),
    ("embed_out", Role::Head),
    ("classifier", Role::Head),
    ("score", Role::Head),
    ("head", Role::Head),
    ("fc", Role::Head),
    ("pooler.dense", Role::Pooler),
    ("visual_projection", Role::Pooler),
    ("text_projection", Role::Pooler),
];

/// Marks of a normalization.
const NORMS: &[&str] = &["norm", "ln_", "_ln", "bn"];

/// A site guessed from one tensor.
pub(super) fn site(name: &str, shape: &[usize]) -> Site {
    let layer = layer_of(name);
    Site {
        name: name.to_owned(),
        role: role_of(name, shape, layer.is_some()),
        layer,
        shape: shape.to_vec(),
        norm: None,
        tied_to: None,
        layout: if shape.len() > 2 { Layout::Conv } else { Layout::OutIn },
        stack: stack_of(name),
        expert: None,
        fused: Vec::new(),
        interleaved: false,
        stored: true,
    }
}

/// An architecture guessed from all tensors.
pub(super) fn infer(
    model_type: &str,
    config: &Map<String, Json>,
    stored: &BTreeMap<&str, &[usize]>,
) -> Architecture {
    let mut sites: Vec<Site> = stored.iter().map(|(name, shape)| site(name, shape)).collect();
    // "layers.10" stands before "layers.2" in name order.
    sites.sort_by(|a, b| natural(&a.name).cmp(&natural(&b.name)));
    let hidden = sites.iter().find(|s| s.role == Role::Embed).and_then(|s| s.shape.get(1).copied());
    guess_by_shape(&mut sites, hidden);
    attach_norms(&mut sites);
    let dims = dims(config, &sites, hidden);
    let kind = kind(&sites);
    let summary =
        "A model without a description in refit; roles are guessed from names and shapes."
            .to_owned();
    Architecture::new(model_type.to_owned(), kind, true, sites, dims, summary)
}

fn role_of(name: &str, shape: &[usize], in_block: bool) -> Role {
    let lower = name.to_lowercase();
    if lower.contains("running_mean")
        || lower.contains("running_var")
        || lower.contains("num_batches_tracked")
    {
        return Role::Stat;
    }
    if lower.ends_with("bias") && !lower.ends_with("relative_attention_bias.weight") {
        return Role::Bias;
    }
    let module = lower.strip_suffix(".weight").unwrap_or(&lower);
    let last = module.rsplit('.').next().unwrap_or(module);
    if shape.len() <= 1 {
        return if NORMS.iter().any(|mark| last.contains(mark)) { Role::Norm } else { Role::Other };
    }
    if shape.len() > 2 {
        return Role::Conv;
    }
    let spoken = WORDS.iter().find(|(word, _)| {
        module.strip_suffix(word).is_some_and(|head| head.is_empty() || head.ends_with(['.', '_']))
    });
    match spoken {
        Some((_, Role::Head)) if in_block => Role::Other,
        Some((_, role)) => *role,
        None => Role::Other,
    }
}

/// The first number among the dotted parts of a name.
fn layer_of(name: &str) -> Option<usize> {
    name.split('.').find_map(|part| part.parse().ok())
}

fn stack_of(name: &str) -> Option<String> {
    let before = name.split('.').take_while(|part| part.parse::<usize>().is_err());
    let stack = before.filter_map(|part| match part {
        "encoder" | "decoder" => Some(part),
        "vision_model" | "vision_tower" | "visual" => Some("vision"),
        "text_model" | "language_model" => Some("text"),
        _ => None,
    });
    stack.last().map(str::to_owned)
}

/// Sort key in which numbers compare as numbers.
fn natural(name: &str) -> Vec<(u8, usize, &str)> {
    name.split('.').map(|part| part.parse().map_or((1, 0, part), |n| (0, n, ""))).collect()
}

/// Matrices of a block that no word explains: widening means Up, narrowing means Down.
fn guess_by_shape(sites: &mut [Site], hidden: Option<usize>) {
    let Some(hidden) = hidden else { return };
    for site in sites.iter_mut().filter(|s| s.role == Role::Other && s.layer.is_some()) {
        site.role = match site.shape[..] {
            [out, inp] if inp == hidden && out > hidden => Role::Up,
            [out, inp] if out == hidden && inp > hidden => Role::Down,
            _ => Role::Other,
        };
    }
}

/// In a pre-norm block the first norm feeds attention and the second the MLP; elsewhere names decide.
fn attach_norms(sites: &mut [Site]) {
    let mut of_block = HashMap::<(Option<String>, usize), (Option<String>, Option<String>)>::new();
    for site in sites.iter().filter(|s| s.role == Role::Norm) {
        let Some(layer) = site.layer else { continue };
        let name = site.name.to_lowercase();
        let (attention, mlp) = of_block.entry((site.stack.clone(), layer)).or_default();
        let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
        if has(&[
            "input_layernorm",
            "ln_1",
            "attention_norm",
            "norm1",
            "self_attn_layer_norm",
            "layernorm_before",
        ]) {
            *attention = Some(site.name.clone());
        } else if has(&[
            "post_attention_layernorm",
            "ln_2",
            "ffn_norm",
            "norm2",
            "final_layer_norm",
            "layernorm_after",
        ]) {
            *mlp = Some(site.name.clone());
        }
    }
    for site in sites.iter_mut() {
        let Some(layer) = site.layer else { continue };
        let Some((attention, mlp)) = of_block.get(&(site.stack.clone(), layer)) else { continue };
        site.norm = match site.role {
            Role::Q | Role::K | Role::V | Role::Qkv => attention.clone(),
            Role::Gate | Role::Up | Role::GateUp | Role::Router => mlp.clone(),
            _ => None,
        };
    }
}

fn kind(sites: &[Site]) -> Kind {
    let has_stack = |stack: &str| sites.iter().any(|s| s.stack.as_deref() == Some(stack));
    let has_role = |role| sites.iter().any(|s: &Site| s.role == role);
    if has_stack("encoder") && has_stack("decoder") {
        Kind::EncoderDecoder
    } else if has_stack("vision") && (has_stack("text") || has_role(Role::Embed)) {
        Kind::VisionLanguage
    } else if !has_role(Role::Embed) && has_role(Role::Conv) {
        Kind::Vision
    } else if has_role(Role::TokenType) || has_role(Role::Pooler) {
        Kind::Encoder
    } else {
        Kind::Decoder
    }
}

fn dims(config: &Map<String, Json>, sites: &[Site], hidden: Option<usize>) -> Dims {
    let key = |names: &[&str]| {
        names
            .iter()
            .find_map(|name| config.get(*name)?.as_u64())
            .and_then(|n| usize::try_from(n).ok())
    };
    let heads = key(&["num_attention_heads", "n_head", "n_heads"]);
    let hidden = key(&["hidden_size", "n_embd", "d_model", "dim"]).or(hidden);
    let deepest = sites.iter().filter_map(|s| s.layer).max().map(|last| last + 1);
    Dims {
        hidden,
        layers: key(&["num_hidden_layers", "n_layer", "n_layers", "num_layers"]).or(deepest),
        heads,
        kv_heads: key(&["num_key_value_heads"]).or(heads),
        head_dim: key(&["head_dim"]).or_else(|| Some(hidden? / heads.filter(|&h| h > 0)?)),
        ffn: key(&["intermediate_size", "n_inner", "ffn_dim", "d_ff"]),
        vocab: key(&["vocab_size"]).or_else(|| {
            sites.iter().find(|s| s.role == Role::Embed).and_then(|s| s.shape.first().copied())
        }),
        context: key(&["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"]),
        window: key(&["sliding_window"]),
    }
}
