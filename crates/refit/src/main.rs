//! The refit binary.
fn main() {}
