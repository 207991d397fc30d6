//! One file per method: parameters, run and claim.
