//! The claims of this family.

pub mod compander;
pub mod galore;
pub mod hft;
pub mod unified;
