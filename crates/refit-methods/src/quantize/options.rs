//! Parameters that all quantizers share.

use refit_store::architecture::Site;

use crate::error::{Error, Result};
use crate::quantize::chain::Group;
use crate::rewrite::shape_of;

/// Bits that a grid can have.
pub const BITS: std::ops::RangeInclusive<u8> = 2..=8;

/// Checks a number of bits.
///
/// # Errors
/// [`Error::Range`].
pub fn check_bits(method: &'static str, bits: u8) -> Result<()> {
    if BITS.contains(&bits) {
        Ok(())
    } else {
        Err(Error::range(method, "bits", bits, "a whole number from 2 to 8"))
    }
}

/// Bits per weight over all sites, where a group of a size takes `bits` per weight.
///
/// # Errors
/// A group that does not divide a site's inputs.
pub fn mean_bits(sites: &[&Site], group: Group, bits: impl Fn(usize) -> f64) -> Result<f64> {
    let (mut weights, mut total) = (0.0, 0.0);
    for site in sites {
        let size = group.resolve(&site.name, shape_of(site).1)?;
        weights += site.numel() as f64;
        total += site.numel() as f64 * bits(size);
    }
    Ok(total / weights)
}
