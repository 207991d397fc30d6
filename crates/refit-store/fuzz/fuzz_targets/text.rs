//! `cargo +nightly fuzz run text`: model cards, lineage manifests, configs and recipes' YAML are parsed or refused, never
//! a crash.
#![no_main]

use std::collections::BTreeMap;
use std::path::Path;

libfuzzer_sys::fuzz_target!(|text: &str| {
    let _ = refit_store::Card::parse(text);
    let _ = refit_store::Lineage::parse(Path::new("fuzz"), text.as_bytes());
    let _ = refit_store::config::Config::parse(Path::new("fuzz"), text.as_bytes());
    let _ = refit_store::yaml::parse::<BTreeMap<String, String>>(Path::new("fuzz"), text);
});
