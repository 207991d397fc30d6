//! Fewer weights.
//!
//! - [`saliency`]: how much a weight matters, from its value and from what flows through it.
//! - [`mask`]: which weights stay. A mask is an object of its own, saved beside the weights in
//!   `refit.masks.safetensors`; counts are exact and ties go by index, because weights that come
//!   from a quantized file tie everywhere.
//! - the methods: a saliency, a pattern, and what is done to the weights that stay.

pub mod dsnot;
pub mod magnitude;
pub mod mask;
pub mod options;
pub mod saliency;
pub mod sparsegpt;
pub mod wanda;

use crate::registry::Entry;

/// The methods of this family.
pub const METHODS: &[Entry] = &[
    Entry::of::<magnitude::Magnitude>(),
    Entry::of::<wanda::Wanda>(),
    Entry::of::<sparsegpt::SparseGpt>(),
    Entry::of::<dsnot::Dsnot>(),
];
