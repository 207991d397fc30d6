//! `cargo +nightly fuzz run safetensors`: headers from arbitrary bytes are parsed or refused, never a crash.
#![no_main]

use std::path::Path;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = refit_store::formats::safetensors::parse(Path::new("fuzz"), bytes, bytes.len() as u64);
});
