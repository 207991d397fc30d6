//! What a piece of work costs: seconds, peak memory, tokens per second.

use std::time::Instant;

use serde::{Deserialize, Serialize};

/// What one piece of work cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Peak resident memory of the process while the work ran, in bytes; `None` where the system
    /// does not tell.
    pub peak_bytes: Option<u64>,
    /// Whether `peak_bytes` belongs to this work alone. Where the system's high-water mark cannot
    /// be reset, it is the peak since the process began: an upper bound.
    pub peak_is_own: bool,
}

impl Cost {
    /// Throughput for `tokens` tokens; 0 for work too short to time.
    pub fn tokens_per_second(&self, tokens: u64) -> f64 {
        if self.seconds > 0.0 { tokens as f64 / self.seconds } else { 0.0 }
    }

    /// Cost of two pieces of work done one after the other.
    pub fn then(self, next: Cost) -> Cost {
        Cost {
            seconds: self.seconds + next.seconds,
            peak_bytes: self.peak_bytes.max(next.peak_bytes),
            peak_is_own: self.peak_is_own && next.peak_is_own,
        }
    }
}

/// Runs `work` and says what it cost. Memory is that of the whole process, so measured pieces must
/// not run at the same time.
pub fn measure<T>(work: impl FnOnce() -> T) -> (T, Cost) {
    let peak_is_own = reset_peak_memory();
    let start = Instant::now();
    let value = work();
    let seconds = start.elapsed().as_secs_f64();
    (value, Cost { seconds, peak_bytes: peak_memory(), peak_is_own })
}

/// Peak resident memory of this process in bytes, since the last [`reset_peak_memory`].
pub fn peak_memory() -> Option<u64> {
    status_bytes("VmHWM:").or_else(rusage_peak)
}

/// Resident memory of this process now, in bytes (Linux only).
pub fn resident_memory() -> Option<u64> {
    status_bytes("VmRSS:")
}

/// Starts a new high-water mark; `false` where the system does not allow it.
pub fn reset_peak_memory() -> bool {
    // "5" resets VmHWM to the present resident size (Linux 4.0 and later, proc(5)).
    cfg!(target_os = "linux") && std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

fn status_bytes(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(unix)]
fn rusage_peak() -> Option<u64> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` is a valid, writable rusage; the call fills it or fails.
    let status = unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) };
    if status != 0 {
        return None;
    }
    // SAFETY: all-zero bytes are a valid rusage, and the call succeeded.
    let peak = unsafe { usage.assume_init() }.ru_maxrss;
    // Apple counts bytes, everyone else kibibytes.
    let unit = if cfg!(target_vendor = "apple") { 1 } else { 1024 };
    u64::try_from(peak).ok().map(|peak| peak * unit)
}

#[cfg(not(unix))]
fn rusage_peak() -> Option<u64> {
    None
}

/// The facts about a machine that a measurement depends on: no host name, no path, no user.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Operating system and processor architecture, such as `linux x86_64`.
    pub system: String,
    /// Processor model as the system names it.
    pub processor: String,
    /// Logical processors that this process may use.
    pub threads: usize,
    /// Memory in bytes, where known.
    pub memory_bytes: Option<u64>,
    /// Vector instruction sets that matter for the kernels, widest first.
    pub vector: Vec<String>,
}

impl Machine {
    /// The machine that this process runs on.
    pub fn here() -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let processor = read("/proc/cpuinfo")
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
            .map_or_else(|| std::env::consts::ARCH.into(), |(_, name)| name.trim().to_string());
        let memory_bytes = read("/proc/meminfo")
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB"))
            .and_then(|kibibytes| kibibytes.trim().parse::<u64>().ok())
            .map(|kibibytes| kibibytes * 1024);
        Self {
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            processor,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes,
            vector: vector_sets(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn vector_sets() -> Vec<String> {
    let found = [
        ("avx512-bf16", is_x86_feature_detected!("avx512bf16")),
        ("avx512-vnni", is_x86_feature_detected!("avx512vnni")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
    ];
    found.iter().filter(|(_, here)| *here).map(|(name, _)| (*name).to_string()).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn vector_sets() -> Vec<String> {
    if cfg!(target_arch = "aarch64") { vec!["neon".to_string()] } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_timed_and_its_memory_seen() {
        let (sum, cost) = measure(|| {
            let block: Vec<u8> = (0..64 << 20).map(|i| i as u8).collect();
            std::thread::sleep(std::time::Duration::from_millis(5));
            block.iter().map(|&x| u64::from(x)).sum::<u64>()
        });
        assert!(sum > 0 && cost.seconds >= 0.005);
        if let Some(peak) = cost.peak_bytes {
            assert!(peak >= 64 << 20, "{peak}");
        }
        assert!((cost.tokens_per_second(10) - 10.0 / cost.seconds).abs() < 1e-9);
    }

    #[test]
    fn costs_add_up() {
        let a = Cost { seconds: 1.0, peak_bytes: Some(5), peak_is_own: true };
        let b = Cost { seconds: 2.0, peak_bytes: Some(3), peak_is_own: false };
        assert_eq!(a.then(b), Cost { seconds: 3.0, peak_bytes: Some(5), peak_is_own: false });
    }

    #[test]
    fn the_machine_is_described() {
        let machine = Machine::here();
        assert!(machine.threads >= 1 && machine.system.contains(std::env::consts::OS));
    }
}
