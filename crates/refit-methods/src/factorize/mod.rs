//! Thin factors instead of full matrices.
//!
//! Every linear `[out, in]` becomes a pair `[out, r] · [r, in]` with fewer weights in all. [`ranks`] chooses
//! the ranks, [`layout`] declares the pairs as PELA's code lays them out and writes them; the methods say where the factors come from.

pub mod layout;
pub mod pela;
pub mod ranks;
pub mod svd;

use crate::registry::Entry;

/// The methods of this family.
pub const METHODS: &[Entry] = &[Entry::of::<svd::Svd>(), Entry::of::<pela::Pela>()];
