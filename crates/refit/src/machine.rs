//! What this machine is: for `refit doctor`, and for the record of every run.

use crate::recipe::record::Machine;

/// Describes the machine, with the threads and the device that this process uses.
pub fn describe(device: &str) -> Machine {
    Machine {
        cpu: cpu_name(),
        features: cpu_features().into_iter().map(str::to_owned).collect(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        threads: rayon::current_num_threads(),
        memory: meminfo("MemTotal:"),
        system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        device: device.to_owned(),
    }
}

/// Memory that can be had without swapping, in bytes.
pub fn available_memory() -> Option<u64> {
    meminfo("MemAvailable:")
}

fn meminfo(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kilobytes * 1024)
}

fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned())
}

/// Instruction sets that kernels look for, as far as this processor has them.
pub fn cpu_features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! present {
            ($($name:tt),+ $(,)?) => {
                [$(($name, std::arch::is_x86_feature_detected!($name))),+]
            };
        }
        let known = present!(
            "avx",
            "avx2",
            "fma",
            "f16c",
            "avx512f",
            "avx512bw",
            "avx512vnni",
            "avx512bf16"
        );
        known.into_iter().filter(|(_, found)| *found).map(|(name, _)| name).collect()
    }
    #[cfg(target_arch = "aarch64")]
    {
        vec!["neon"]
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        Vec::new()
    }
}
