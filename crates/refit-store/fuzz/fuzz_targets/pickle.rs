//! `cargo +nightly fuzz run pickle`: checkpoints from arbitrary bytes are parsed or refused, never a crash.
//! Seed it with `tests/fixtures/*.pth`.
#![no_main]

use std::path::Path;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = refit_store::formats::torch::check(Path::new("fuzz"), bytes);
});
