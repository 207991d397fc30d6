//! What loading, running and tuning a model costs, from its config and tensor list alone.

use serde::Serialize;

use super::{Architecture, Role};

/// What to plan for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryOptions {
    /// Tokens per sequence; also the length of the cache.
    pub context: usize,
    /// Sequences at once.
    pub batch: usize,
    /// Bytes of one weight or activation while computing: 4 for f32, 2 for bf16.
    pub element_bytes: usize,
    /// Rank of LoRA's factors.
    pub lora_rank: usize,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        Self { context: 1024, batch: 1, element_bytes: 4, lora_rank: 8 }
    }
}

/// Bytes that each use of a model takes. Estimates of peak resident memory without the program's own few megabytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// Stored elements that are weights (running statistics and buffers left out).
    pub parameters: u64,
    /// Bytes on disk.
    pub stored: u64,
    /// Weights at [`MemoryOptions::element_bytes`].
    pub weights: u64,
    /// Key/value cache of the whole context; `None` when the config does not give heads and layers, or when the
    /// family keeps no cache.
    pub cache: Option<u64>,
    /// Largest activations alive at once in a forward pass of the whole context.
    pub activations: u64,
    /// Weights, cache and activations.
    pub run: u64,
    /// Full tuning with AdamW: weights, gradients, two moments and the activations kept for the backward pass.
    pub tune_adamw: u64,
    /// Parameters of LoRA's factors on every linear of the blocks.
    pub lora_parameters: u64,
    /// Tuning those factors with AdamW.
    pub tune_lora: u64,
}

/// Plans memory for `architecture`, whose tensors take `stored` bytes on disk.
///
/// With s tokens, b sequences, width h, a heads, L blocks, f inner MLP width and V tokens in the vocabulary:
/// - cache: 2 · L · b · min(s, window) · kv_heads · head_dim elements;
/// - a forward pass keeps 4bsh + bs·max(2f, V) + a·b·s·min(s, 256) elements: residual and normed streams, the
///   widest of MLP and logits, one strip of attention scores;
/// - a backward pass keeps, per block, 17bsh + 2.5abs² elements (Korthikanti et al. 2022, equation 1, in
///   elements), and the logits twice.
pub fn memory_plan(
    architecture: &Architecture,
    stored: u64,
    options: &MemoryOptions,
) -> MemoryPlan {
    let dims = &architecture.dims;
    let element = options.element_bytes as u64;
    let (s, b) = (options.context as u64, options.batch as u64);
    let size = |dim: Option<usize>| dim.unwrap_or(0) as u64;
    let (h, a, layers) = (size(dims.hidden), size(dims.heads), size(dims.layers));
    let is_weight = |role| !matches!(role, Role::Stat | Role::Other);
    let parameters: u64 = architecture
        .parameters_by_role()
        .iter()
        .filter(|(role, ..)| is_weight(*role))
        .map(|(.., n)| n)
        .sum();
    let weights = parameters * element;

    let decodes = matches!(
        architecture.kind,
        super::Kind::Decoder
            | super::Kind::EncoderDecoder
            | super::Kind::VisionLanguage
            | super::Kind::Audio
    );
    let cache = (|| {
        let per_token = 2 * dims.layers? as u64 * dims.kv_heads? as u64 * dims.head_dim? as u64;
        let kept = dims.window.map_or(s, |window| s.min(window as u64));
        decodes.then_some(per_token * b * kept * element)
    })();
    let logits =
        if architecture.with_role(Role::Head).next().is_some() { size(dims.vocab) } else { 0 };
    let forward = 4 * b * s * h + b * s * (2 * size(dims.ffn)).max(logits) + a * b * s * s.min(256);
    let activations = forward * element;
    let backward =
        (layers * (17 * b * s * h + 5 * a * b * s * s / 2) + 2 * b * s * logits) * element;

    let rank = options.lora_rank as u64;
    let lora_parameters: u64 = architecture
        .linears()
        .filter_map(|site| site.out_in())
        .map(|(out, inp)| rank * (out + inp) as u64)
        .sum();
    MemoryPlan {
        parameters,
        stored,
        weights,
        cache,
        activations,
        run: weights + cache.unwrap_or(0) + activations,
        // Moments and gradients stay in f32 whatever the weights are.
        tune_adamw: weights + 12 * parameters + backward,
        lora_parameters,
        tune_lora: weights + 16 * lora_parameters + backward,
    }
}
