//! Memory that one step of a long work frees and the next one takes again.
//!
//! A train step allocates and frees the same few hundred tensors every time, a merge the same buffers for every piece. By default
//! glibc hands large blocks back to the system when they are freed, so that every step pays for page faults and for clearing the
//! same pages: a fifth of a train step of a ViT-Tiny, a quarter of a Model Stock merge.

use std::sync::Once;

/// Blocks of up to this size come from the heap: the most that every glibc accepts.
const FROM_HEAP: i32 = 32 << 20;

/// Free memory at the end of the heap that is kept for the next step.
const KEPT: i32 = 1 << 30;

/// Lets the allocator keep what a step frees; once for a process, on glibc, and not where the environment sets its own rules.
/// The most that is resident does not grow by it, only how long it stays.
pub fn keep() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let rules = ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"];
        if rules.iter().all(|name| std::env::var_os(name).is_none()) {
            set();
        }
    });
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn set() {
    // SAFETY: mallopt takes two numbers and changes two settings of the allocator under its own lock; a value that it does not
    // accept changes nothing.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, FROM_HEAP);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn set() {
    let _ = (FROM_HEAP, KEPT);
}
