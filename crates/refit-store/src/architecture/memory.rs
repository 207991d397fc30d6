//! What loading, running and tuning a model costs, from its config and tensor list alone.

use serde::Serialize;

use super::{Architecture, Kind, Role};

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

/// Bytes that each use of a model takes: estimates of peak resident memory on the CPU, meant to be within a
/// quarter of what is measured (checked on SmolLM2-135M at 256 to 2048 tokens, MiniLM
/// and EfficientNet-Lite0).
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
    /// The program itself and the tokenizer.
    pub program: u64,
    /// Weights that are touched, cache, activations and program.
    pub run: u64,
    /// Full tuning with AdamW: weights, gradients, two moments and the activations kept for the backward pass.
    pub tune_adamw: u64,
    /// Parameters of LoRA's factors on every linear of the blocks.
    pub lora_parameters: u64,
    /// Tuning those factors with AdamW.
    pub tune_lora: u64,
}

/// The program with its threads and buffers.
const PROGRAM: f64 = 25e6;
/// A word of a tokenizer: its text, and its places in two maps and the table of merges.
const WORD: f64 = 400.0;
/// Positions whose logits are computed at a time.
const LOGIT_ROWS: f64 = 256.0;
/// Bytes that are brought in where one is read from a mapped file.
const PAGE: f64 = 4096.0;
/// Positions of a convolutional network's last map: 7 x 7, where the input has 224 x 224 pixels.
const LAST_MAP: f64 = 49.0;
/// Its widest map: that of an inverted bottleneck at half resolution, with the copy that a convolution unrolls.
const WIDEST_MAP: f64 = 96.0 * 224.0 * 224.0;

/// Plans memory for `architecture`, whose tensors take `stored` bytes on disk.
///
/// With s tokens, b sequences, width h, a heads, L blocks, f inner MLP width and V tokens in the vocabulary:
/// - cache: 2 · L · b · min(s, window) · kv_heads · head_dim elements;
/// - a forward pass keeps the larger of bs(6h + 3f), which is a block at its widest, and bsh + min(bs, 256) · V,
///   which is the last stream with a strip of logits (attention scores exist in strips of a few rows only);
/// - files in f32 are mapped, and of an embedding table that no head shares only the rows in use are touched;
/// - a backward pass keeps, per block, 17bsh + 2.5abs² elements (Korthikanti et al. 2022, equation 1, in
///   elements; an upper bound for kernels that compute the scores anew), and the logits twice.
pub fn memory_plan(
    architecture: &Architecture,
    stored: u64,
    options: &MemoryOptions,
) -> MemoryPlan {
    // In f64: sizes that a damaged config claims overflow nothing, and real ones are exact.
    let dims = &architecture.dims;
    let element = options.element_bytes as f64;
    let size = |dim: Option<usize>| dim.unwrap_or(0) as f64;
    let (h, a, f) = (size(dims.hidden), size(dims.heads), size(dims.ffn));
    let (layers, vocab) = (size(dims.layers), size(dims.vocab));
    let vision = architecture.kind == Kind::Vision;
    let convolutional = vision && dims.heads.is_none();
    let s = match dims.context {
        Some(patches) if vision => patches as f64,
        None if vision => LAST_MAP,
        _ => options.context as f64,
    };
    let b = options.batch as f64;
    let is_weight = |role| !matches!(role, Role::Stat | Role::Other);
    let parameters: f64 = architecture
        .parameters_by_role()
        .iter()
        .filter(|(role, ..)| is_weight(*role))
        .map(|(.., n)| *n as f64)
        .sum();
    let weights = parameters * element;

    let cache = (|| {
        let per_token = 2.0 * layers * dims.kv_heads? as f64 * dims.head_dim? as f64;
        let kept = dims.window.map_or(s, |window| s.min(window as f64));
        let decodes = !matches!(architecture.kind, Kind::Encoder | Kind::Vision);
        (decodes && dims.layers.is_some()).then_some(per_token * b * kept * element)
    })();
    let has_head = architecture.with_role(Role::Head).next().is_some();
    let logits = if has_head && !vision { vocab } else { 0.0 };
    let block = b * s * (6.0 * h + 3.0 * f);
    let last = b * s * h + (b * s).min(LOGIT_ROWS) * logits;
    let forward = if convolutional { b * WIDEST_MAP } else { block.max(last) };
    let activations = forward * element;
    let backward =
        (layers * (17.0 * b * s * h + 2.5 * a * b * s * s) + 2.0 * b * s * logits) * element;

    let mapped = stored as f64 >= 4.0 * parameters && element == 4.0;
    let shared = architecture.sites.iter().any(|site| site.tied_to.is_some());
    let table: f64 = architecture
        .with_role(Role::Embed)
        .filter(|site| site.stored && mapped && !shared)
        .map(|site| site.numel() as f64 * element)
        .sum();
    let untouched = (table - b * s * PAGE.max(h * element)).max(0.0);
    let program = PROGRAM + if vision { 0.0 } else { WORD * vocab };

    let rank = options.lora_rank as f64;
    let lora: f64 = architecture
        .linears()
        .filter_map(|site| site.out_in())
        .map(|(out, inp)| rank * (out as f64 + inp as f64))
        .sum();
    // A conversion from f64 ends at the largest u64.
    let bytes = |x: f64| x as u64;
    MemoryPlan {
        parameters: bytes(parameters),
        stored,
        weights: bytes(weights),
        cache: cache.map(bytes),
        activations: bytes(activations),
        program: bytes(program),
        run: bytes(weights - untouched + cache.unwrap_or(0.0) + activations + program),
        // Moments and gradients stay in f32 whatever the weights are.
        tune_adamw: bytes(weights + 12.0 * parameters + backward + program),
        lora_parameters: bytes(lora),
        tune_lora: bytes(weights + 16.0 * lora + backward + program),
    }
}
