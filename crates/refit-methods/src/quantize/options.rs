//! Parameters that all quantizers share.

use crate::error::{Error, Result};

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
