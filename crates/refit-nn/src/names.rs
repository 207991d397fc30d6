//! Where each family keeps its tensors, relative to its blocks.
//!
//! `refit_store::architecture` describes the same tensors for methods that touch weights alone; this is the little that the
//! forward pass needs on top: which of a block's norms stands where.

/// Tensor names of one family; an empty string means that the family has no such tensor.
#[derive(Debug)]
pub(crate) struct Names {
    /// Prefixes under which the trunk may be stored, tried in order.
    pub prefixes: &'static [&'static str],
    pub embed: &'static str,
    pub positions: &'static str,
    /// Prefix of block `{}`.
    pub block: &'static str,
    pub mixer_norm: &'static str,
    pub mixer_post_norm: &'static str,
    pub q: &'static str,
    pub k: &'static str,
    pub v: &'static str,
    pub qkv: &'static str,
    pub o: &'static str,
    pub q_norm: &'static str,
    pub k_norm: &'static str,
    pub ffn_norm: &'static str,
    pub ffn_post_norm: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub gate_up: &'static str,
    pub down: &'static str,
    pub final_norm: &'static str,
    /// Head, without the trunk's prefix.
    pub head: &'static str,
}

const LLAMA: Names = Names {
    prefixes: &["model.", ""],
    embed: "embed_tokens",
    positions: "",
    block: "layers.{}.",
    mixer_norm: "input_layernorm",
    mixer_post_norm: "",
    q: "self_attn.q_proj",
    k: "self_attn.k_proj",
    v: "self_attn.v_proj",
    qkv: "",
    o: "self_attn.o_proj",
    q_norm: "self_attn.q_norm",
    k_norm: "self_attn.k_norm",
    ffn_norm: "post_attention_layernorm",
    ffn_post_norm: "",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    gate_up: "",
    down: "mlp.down_proj",
    final_norm: "norm",
    head: "lm_head",
};

const GEMMA2: Names = Names {
    mixer_post_norm: "post_attention_layernorm",
    ffn_norm: "pre_feedforward_layernorm",
    ffn_post_norm: "post_feedforward_layernorm",
    ..LLAMA
};

const PHI3: Names = Names {
    q: "",
    k: "",
    v: "",
    qkv: "self_attn.qkv_proj",
    gate: "",
    up: "",
    gate_up: "mlp.gate_up_proj",
    ..LLAMA
};

const GPT2: Names = Names {
    prefixes: &["transformer.", ""],
    embed: "wte",
    positions: "wpe",
    block: "h.{}.",
    mixer_norm: "ln_1",
    q: "",
    k: "",
    v: "",
    qkv: "attn.c_attn",
    o: "attn.c_proj",
    ffn_norm: "ln_2",
    gate: "",
    up: "mlp.c_fc",
    down: "mlp.c_proj",
    final_norm: "ln_f",
    ..LLAMA
};

const GPT_NEOX: Names = Names {
    prefixes: &["gpt_neox.", ""],
    embed: "embed_in",
    q: "",
    k: "",
    v: "",
    qkv: "attention.query_key_value",
    o: "attention.dense",
    gate: "",
    up: "mlp.dense_h_to_4h",
    down: "mlp.dense_4h_to_h",
    final_norm: "final_layer_norm",
    head: "embed_out",
    ..LLAMA
};

const OPT: Names = Names {
    prefixes: &["model.decoder.", "decoder.", ""],
    positions: "embed_positions",
    mixer_norm: "self_attn_layer_norm",
    o: "self_attn.out_proj",
    ffn_norm: "final_layer_norm",
    gate: "",
    up: "fc1",
    down: "fc2",
    final_norm: "final_layer_norm",
    ..LLAMA
};

const BERT: Names = Names {
    prefixes: &["", "bert.", "roberta."],
    embed: "embeddings.word_embeddings",
    positions: "embeddings.position_embeddings",
    block: "encoder.layer.{}.",
    mixer_norm: "attention.output.LayerNorm",
    q: "attention.self.query",
    k: "attention.self.key",
    v: "attention.self.value",
    o: "attention.output.dense",
    ffn_norm: "output.LayerNorm",
    gate: "",
    up: "intermediate.dense",
    down: "output.dense",
    final_norm: "embeddings.LayerNorm",
    head: "",
    ..LLAMA
};

const DISTILBERT: Names = Names {
    prefixes: &["", "distilbert."],
    block: "transformer.layer.{}.",
    mixer_norm: "sa_layer_norm",
    q: "attention.q_lin",
    k: "attention.k_lin",
    v: "attention.v_lin",
    o: "attention.out_lin",
    ffn_norm: "output_layer_norm",
    up: "ffn.lin1",
    down: "ffn.lin2",
    ..BERT
};

const VIT: Names = Names {
    prefixes: &["", "vit.", "deit."],
    embed: "",
    positions: "embeddings.position_embeddings",
    mixer_norm: "layernorm_before",
    q: "attention.attention.query",
    k: "attention.attention.key",
    v: "attention.attention.value",
    ffn_norm: "layernorm_after",
    final_norm: "layernorm",
    head: "classifier",
    ..BERT
};

/// Names of the family that `model_type` belongs to. [`TransformerConfig::read`](crate::config::TransformerConfig::read) has
/// refused unknown ones before.
pub(crate) fn names(model_type: &str) -> &'static Names {
    match model_type {
        "gemma2" => &GEMMA2,
        "phi3" => &PHI3,
        "gpt2" => &GPT2,
        "gpt_neox" => &GPT_NEOX,
        "opt" => &OPT,
        "bert" | "roberta" | "xlm-roberta" => &BERT,
        "distilbert" => &DISTILBERT,
        "vit" | "deit" => &VIT,
        _ => &LLAMA,
    }
}
