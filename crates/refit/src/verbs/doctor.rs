//! `refit doctor`: what this machine offers and where refit keeps things.

use serde_json::json;

use crate::cli::{App, DeviceName};
use crate::failure::Result;
use crate::output::{self, Outcome};
use crate::{machine, report::number};

/// Show what this machine offers: processor features, threads, memory, devices, cache
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Looks around.
pub fn run(app: &App, _args: Args) -> Result<Outcome> {
    let found = machine::describe(app.global.device.as_str());
    let available = machine::available_memory();
    let all = [
        DeviceName::Cpu,
        DeviceName::Vulkan,
        DeviceName::Metal,
        DeviceName::Cuda,
        DeviceName::Rocm,
    ];
    let (built, absent): (Vec<_>, Vec<_>) = all.into_iter().partition(|d| d.is_built());
    let names = |list: &[DeviceName]| list.iter().map(|d| d.as_str()).collect::<Vec<_>>();
    let cache = super::cache_dir(app)?;
    let entries = std::fs::read_dir(&cache).map_or(0, Iterator::count);
    let unknown = || "unknown".to_owned();
    let text = output::facts([
        ("refit", env!("CARGO_PKG_VERSION").to_owned()),
        ("system", found.system.clone()),
        ("processor", found.cpu.clone()),
        ("features", found.features.join(" ")),
        ("threads", format!("{} of {} logical processors", found.threads, found.cores)),
        ("memory", found.memory.map_or_else(unknown, number::bytes)),
        ("available now", available.map_or_else(unknown, number::bytes)),
        ("devices", names(&built).join(" ")),
        ("not built in", format!("{} (cargo features)", names(&absent).join(" "))),
        (
            "mpi",
            if cfg!(feature = "mpi") { "built in" } else { "not built in (cargo feature)" }
                .to_owned(),
        ),
        ("cache", format!("{} ({entries} entries)", cache.display())),
    ]);
    let json = json!({
        "refit": env!("CARGO_PKG_VERSION"),
        "machine": found,
        "available_memory": available,
        "devices": names(&built),
        "devices_not_built": names(&absent),
        "mpi": cfg!(feature = "mpi"),
        "cache": cache,
        "cache_entries": entries,
    });
    Ok(Outcome::new(json, text))
}
