//! Thin factors instead of full matrices.
//!
//! Every linear `[out, in]` becomes a pair `[out, r] · [r, in]` with fewer weights in all. [`layout`] chooses the ranks, declares
//! the pairs in the layout that PELA's code uses and writes them; the methods say where the factors come from.

pub mod layout;
pub mod pela;
pub mod svd;

use crate::registry::Entry;

/// The methods of this family.
pub const METHODS: &[Entry] = &[Entry::of::<svd::Svd>(), Entry::of::<pela::Pela>()];
