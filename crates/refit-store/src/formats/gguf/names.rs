//! GGUF's names and keys in Hugging Face's words, as data: one [`Family`] per model type.

/// How one `general.architecture` of GGUF corresponds to a Hugging Face model type.
#[derive(Debug)]
pub struct Family {
    /// GGUF's name of the architecture.
    pub gguf: &'static str,
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// `architectures[0]` in `config.json`.
    pub class: &'static str,
    /// What stands before the layer number in Hugging Face's tensor names.
    pub layers: &'static str,
    /// Tensors outside the layers: GGUF stem, Hugging Face stem (`.weight`/`.bias` are kept).
    pub outer: Names,
    /// Tensors of a layer, after `blk.N.` and after `layers.N.`.
    pub inner: Names,
    /// Metadata keys (after `ARCH.`) and configuration keys, beside [`COMMON_KEYS`].
    pub keys: Names,
    /// Configuration that GGUF implies but does not store.
    pub constants: &'static [(&'static str, Constant)],
    /// Query and key rows are interleaved for llama.cpp's rotary embedding.
    pub interleaved: bool,
    /// Linear weights are stored as the transpose of Hugging Face's (`Conv1D` of GPT-2).
    pub transposed: bool,
    /// Norm weights have 1 added (Gemma).
    pub norm_plus_one: bool,
}

/// Pairs of GGUF and Hugging Face names.
pub type Names = &'static [(&'static str, &'static str)];

/// A JSON scalar that can be written in a table.
#[derive(Debug, Clone, Copy)]
pub enum Constant {
    /// A string.
    Text(&'static str),
    /// A boolean.
    Flag(bool),
    /// A number.
    Number(f64),
}

use Constant::{Flag, Number, Text};

/// Keys that every decoder shares.
pub const COMMON_KEYS: Names = &[
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("attention.sliding_window", "sliding_window"),
    ("rope.freq_base", "rope_theta"),
    ("vocab_size", "vocab_size"),
];

const DECODER_OUTER: Names =
    &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

const LLAMA_INNER: Names = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

const GEMMA2_INNER: Names = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

const PHI3_INNER: Names = &[
    ("attn_norm", "input_layernorm"),
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_up", "mlp.gate_up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

const GPT2_OUTER: Names = &[
    ("token_embd", "transformer.wte"),
    ("position_embd", "transformer.wpe"),
    ("output_norm", "transformer.ln_f"),
    ("output", "lm_head"),
];

const GPT2_INNER: Names = &[
    ("attn_norm", "ln_1"),
    ("attn_qkv", "attn.c_attn"),
    ("attn_output", "attn.c_proj"),
    ("ffn_norm", "ln_2"),
    ("ffn_up", "mlp.c_fc"),
    ("ffn_down", "mlp.c_proj"),
];

const GPT2_KEYS: Names = &[
    ("block_count", "n_layer"),
    ("context_length", "n_positions"),
    ("embedding_length", "n_embd"),
    ("feed_forward_length", "n_inner"),
    ("attention.head_count", "n_head"),
    ("attention.layer_norm_epsilon", "layer_norm_epsilon"),
];

const BERT_OUTER: Names = &[
    ("token_embd", "embeddings.word_embeddings"),
    ("position_embd", "embeddings.position_embeddings"),
    ("token_types", "embeddings.token_type_embeddings"),
    ("token_embd_norm", "embeddings.LayerNorm"),
];

const BERT_INNER: Names = &[
    ("attn_q", "attention.self.query"),
    ("attn_k", "attention.self.key"),
    ("attn_v", "attention.self.value"),
    ("attn_output", "attention.output.dense"),
    ("attn_output_norm", "attention.output.LayerNorm"),
    ("ffn_up", "intermediate.dense"),
    ("ffn_down", "output.dense"),
    ("layer_output_norm", "output.LayerNorm"),
];

/// What most decoders share; the others override it.
const DECODER: Family = Family {
    gguf: "llama",
    model_type: "llama",
    class: "LlamaForCausalLM",
    layers: "model.layers.",
    outer: DECODER_OUTER,
    inner: LLAMA_INNER,
    keys: &[],
    constants: &[("hidden_act", Text("silu"))],
    interleaved: false,
    transposed: false,
    norm_plus_one: false,
};

/// Experts stacked in one GGUF tensor, and their Hugging Face stems (Mixtral).
pub const EXPERTS: Names =
    &[("ffn_gate_exps", "w1"), ("ffn_down_exps", "w2"), ("ffn_up_exps", "w3")];

/// Mixtral travels as `llama` with experts.
pub const MIXTRAL: Family = Family {
    model_type: "mixtral",
    class: "MixtralForCausalLM",
    inner: &[
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate_inp", "block_sparse_moe.gate"),
    ],
    keys: &[("expert_count", "num_local_experts"), ("expert_used_count", "num_experts_per_tok")],
    interleaved: true,
    ..DECODER
};

/// Every architecture that is translated; others keep GGUF's names.
pub const FAMILIES: &[Family] = &[
    // Mistral travels under this name too: same tensors, same rotary layout.
    Family { interleaved: true, ..DECODER },
    Family { gguf: "qwen2", model_type: "qwen2", class: "Qwen2ForCausalLM", ..DECODER },
    Family { gguf: "qwen3", model_type: "qwen3", class: "Qwen3ForCausalLM", ..DECODER },
    Family {
        gguf: "gemma2",
        model_type: "gemma2",
        class: "Gemma2ForCausalLM",
        inner: GEMMA2_INNER,
        keys: &[
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ],
        constants: &[
            ("hidden_act", Text("gelu_pytorch_tanh")),
            ("hidden_activation", Text("gelu_pytorch_tanh")),
        ],
        norm_plus_one: true,
        ..DECODER
    },
    Family {
        gguf: "phi3",
        model_type: "phi3",
        class: "Phi3ForCausalLM",
        inner: PHI3_INNER,
        ..DECODER
    },
    Family {
        gguf: "gpt2",
        model_type: "gpt2",
        class: "GPT2LMHeadModel",
        layers: "transformer.h.",
        outer: GPT2_OUTER,
        inner: GPT2_INNER,
        keys: GPT2_KEYS,
        constants: &[("activation_function", Text("gelu_new"))],
        transposed: true,
        ..DECODER
    },
    Family {
        gguf: "bert",
        model_type: "bert",
        class: "BertModel",
        layers: "encoder.layer.",
        outer: BERT_OUTER,
        inner: BERT_INNER,
        keys: &[
            ("attention.layer_norm_epsilon", "layer_norm_eps"),
            ("tokenizer.ggml.token_type_count", "type_vocab_size"),
        ],
        constants: &[
            ("hidden_act", Text("gelu")),
            ("is_decoder", Flag(false)),
            ("initializer_range", Number(0.02)),
        ],
        ..DECODER
    },
];
