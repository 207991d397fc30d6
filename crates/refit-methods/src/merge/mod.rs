//! One model out of several, without training.
//!
//! Every merge here is a fold over tensors: read the same range of every model, combine in f32,
//! write, forget. No model is ever whole in memory.

pub mod fold;
pub mod model_soups;

use crate::registry::Entry;

/// The methods of this family.
pub const METHODS: &[Entry] = &[Entry::of::<model_soups::ModelSoups>()];
