//! Fewer bits per weight.
//!
//! Three layers, each ignorant of the next:
//!
//! - [`grid`]: what values a weight may take. A [`grid::Grid`] is fitted to the weights of one group
//!   (consecutive inputs of one output row), encodes them to integers and decodes them again, with
//!   its scales rounded as they will be stored, and knows its own price in bits.
//! - [`chain`]: which group sizes a row allows, each dividing the next.
//! - the methods: which grid each matrix gets, and in which order its columns are rounded.
//!
//! A method here writes the *decoded* weights in an ordinary model directory, so that every tool
//! can run the result, and records bits and group sizes in `refit.quantization.json`, so that the
//! bytes which a packed file would take are known. [`export`] writes such files: GGUF,
//! compressed-tensors, GPTQ.

pub mod activations;
pub mod allocate;
pub mod awq;
pub mod chain;
pub mod compeft;
pub mod export;
pub mod finequant;
pub mod fit;
pub mod fold;
pub mod gptq;
pub mod grid;
pub mod hqq;
pub mod lorc;
pub mod options;
pub mod output_error;
pub mod record;
pub mod regrid;
pub mod repquant;
pub mod rtn;
pub mod shiftaddllm;
pub mod smoothquant;

use crate::registry::Entry;

/// The methods of this family.
pub const METHODS: &[Entry] = &[
    Entry::of::<rtn::Rtn>(),
    Entry::of::<hqq::Hqq>(),
    Entry::of::<finequant::FineQuant>(),
    Entry::of::<gptq::Gptq>(),
    Entry::of::<lorc::Lorc>(),
    Entry::of::<fit::Fit>(),
    Entry::of::<shiftaddllm::ShiftAddLlm>(),
    Entry::of::<awq::Awq>(),
    Entry::of::<smoothquant::SmoothQuant>(),
    Entry::of::<repquant::RepQuant>(),
    Entry::of::<compeft::Compeft>(),
    Entry::of::<compeft::decompress::Decompress>(),
    Entry::of::<export::Export>(),
];
