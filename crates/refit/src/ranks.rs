//! Several processes of one command: what the launcher says, how they are connected, and how they end.
//!
//! `mpirun -n 2 refit apply lora ...` starts refit twice. Rank 0 is the one that the user sees; the others are quiet, unless one
//! of them is the first that failed. Everything that cannot be done by several processes is refused before they are connected.

use std::num::NonZero;

use clap::ArgMatches;
use refit_methods::registry;
use refit_train::train::Ranks;

use crate::failure::{Code, Failure, Result};

/// What the launcher says of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launched {
    /// This process, from 0.
    pub rank: usize,
    /// All processes.
    pub size: usize,
    /// This process among those of its machine.
    pub local: usize,
}

impl Launched {
    /// What the environment of this process says; `None` where it was started alone.
    pub fn here() -> Option<Self> {
        Self::read(|name| std::env::var(name).ok())
    }

    /// Open MPI's own launcher, those that speak PMI (MPICH, Intel MPI), and Slurm's `srun --mpi=pmix`, which gives the
    /// number of processes under a name of its own. A Slurm batch script that starts refit without `srun` is no launcher.
    fn read(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let number = |name: &str| variable(name)?.trim().parse::<usize>().ok();
        let either = |names: [&str; 2]| names.into_iter().find_map(number);
        let (rank, size) = if let Some(size) = number("OMPI_COMM_WORLD_SIZE") {
            (number("OMPI_COMM_WORLD_RANK")?, size)
        } else if let Some(size) = number("PMI_SIZE") {
            (number("PMI_RANK")?, size)
        } else {
            (number("PMIX_RANK")?, either(["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"])?)
        };
        let local = number("OMPI_COMM_WORLD_LOCAL_RANK")
            .or_else(|| either(["MPI_LOCALRANKID", "SLURM_LOCALID"]))
            .unwrap_or(rank);
        (size > 1).then_some(Self { rank, size, local })
    }
}

/// Is it this process that the user hears before all are connected?
pub fn speaks() -> bool {
    Launched::here().is_none_or(|launched| launched.rank == 0)
}

/// Connects the processes that were started together, for a command that they can share.
///
/// # Errors
/// A binary without MPI, a command that does not train, an MPI library that refuses.
pub fn start(matches: &ArgMatches) -> Result<Ranks> {
    let Some(launched) = Launched::here() else { return Ok(Ranks::default()) };
    let size = launched.size;
    let trains = matches.subcommand_matches("apply").and_then(|apply| {
        let name = apply.subcommand_name()?;
        registry::all().iter().find(|entry| entry.info.name == name)
    });
    if trains.is_none_or(|entry| !entry.info.trains()) {
        let verb = matches.subcommand_name().unwrap_or_default();
        let what = match matches.subcommand_matches("apply").and_then(ArgMatches::subcommand_name) {
            Some(method) => format!("{verb} {method}"),
            None => verb.to_owned(),
        };
        return Err(Failure::usage(format!(
            "{size} processes were started, and `refit {what}` is work for one: start it without the launcher (methods that \
             learn from --data share the work)"
        )));
    }
    connect(launched)
}

#[cfg(not(feature = "mpi"))]
fn connect(launched: Launched) -> Result<Ranks> {
    Err(Failure::usage(format!(
        "{} processes were started, but this refit was built without MPI, and they would all write the same output; build one \
         with `cargo build --release -p refit --features mpi`, or start it without the launcher",
        launched.size
    )))
}

#[cfg(feature = "mpi")]
fn connect(launched: Launched) -> Result<Ranks> {
    let ranks = Ranks::over(refit_train::train::ranks::mpi::start()?);
    if ranks.size() != launched.size {
        return Err(Failure::usage(format!(
            "the launcher started {} processes, and MPI connects {}: refit was built with another MPI library than the \
             launcher's; build it again with the `mpicc` of that launcher in the path",
            launched.size,
            ranks.size()
        )));
    }
    Ok(ranks)
}

#[cfg(not(feature = "mpi"))]
fn abort() {}

/// What a panic ends with, on all processes.
#[cfg(feature = "mpi")]
fn abort() {
    refit_train::train::ranks::mpi::abort(101);
}

/// Ends MPI in order, with one exit code for all.
pub fn finish(ranks: &Ranks, code: Code) -> Code {
    let code = ranks.last(code as u8);
    #[cfg(feature = "mpi")]
    refit_train::train::ranks::mpi::finish();
    Code::of(code)
}

/// While it lives, a panic of this process ends the others too.
pub struct EndTogether(pub Ranks);

impl Drop for EndTogether {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.0.alone() {
            abort();
        }
    }
}

/// Does `work` on rank 0, then on the first process of every other machine, then on the rest: what it leaves in a cache, those
/// that follow find there.
///
/// # Errors
/// As [`Ranks::settle`].
pub fn in_turns<T>(ranks: &Ranks, mut work: impl FnMut() -> Result<T>) -> Result<T> {
    if ranks.alone() {
        return work();
    }
    let local = Launched::here().map_or(0, |launched| launched.local);
    let turn = if ranks.leads() { 0 } else { 1 + usize::from(local > 0) };
    let mut done = None;
    for now in 0..3 {
        done = ranks.settle(if now == turn { work().map(Some) } else { Ok(done.take()) })?;
    }
    Ok(done.expect("invariant: every process has had its turn"))
}

/// Worker threads of this process where `--threads` does not say: the machine's processors, shared between the processes on it.
/// 0 leaves the number to the thread pool: a process of its own, and `RAYON_NUM_THREADS`.
///
/// # Errors
/// As [`Ranks::gather`].
pub fn threads(ranks: &Ranks) -> Result<usize> {
    if ranks.alone() {
        return Ok(0);
    }
    let available = std::thread::available_parallelism().map_or(1, NonZero::get);
    let all = |own: u64| ranks.gather(Ok::<_, Failure>(((), own))).map(|(_, all)| all);
    let machines = all(machine())?;
    let here: Vec<bool> = machines.iter().map(|m| *m == machines[ranks.rank()]).collect();
    let mut own = allowed(&std::fs::read_to_string("/proc/self/status").unwrap_or_default());
    own.resize(32, 0);
    let (mut together, mut mine) = (0, 0);
    for word in own {
        let words = all(word.into())?;
        let union = words.iter().zip(&here).filter(|(_, here)| **here).fold(0, |u, (w, _)| u | w);
        together += union.count_ones() as usize;
        mine += word.count_ones() as usize;
    }
    // All have exchanged by now, whatever each one's environment says.
    Ok(match std::env::var_os("RAYON_NUM_THREADS") {
        Some(_) => 0,
        None => share(available, mine, together, here.iter().filter(|here| **here).count()),
    })
}

/// `available` processors by affinity and quota, `mine` by affinity alone, `together` those of all `local` processes of this
/// machine.
fn share(available: usize, mine: usize, together: usize, local: usize) -> usize {
    // A quota is the whole container's, and affinity does not show it.
    let total = if available < mine || together == 0 { available } else { together };
    available.min(total / local.max(1)).max(1)
}

/// A number for this machine.
fn machine() -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    for file in ["/proc/sys/kernel/hostname", "/proc/sys/kernel/random/boot_id"] {
        std::fs::read(file).unwrap_or_default().hash(&mut hasher);
    }
    hasher.finish()
}

/// The processors that a process may run on, as 32-bit words, the lowest first, from `/proc/self/status`.
fn allowed(status: &str) -> Vec<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed:"));
    let words = line.unwrap_or_default().trim().rsplit(',');
    words.map_while(|word| u32::from_str_radix(word, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Option<(usize, usize, usize)> {
        let find = |name: &str| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        };
        Launched::read(find).map(|l| (l.rank, l.size, l.local))
    }

    #[test]
    fn launchers_are_told_from_single_processes() {
        let open_mpi = [
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_RANK", "3"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("PMIX_RANK", "3"),
        ];
        assert_eq!(read(&open_mpi), Some((3, 4, 1)));
        assert_eq!(read(&[("PMI_SIZE", "2"), ("PMI_RANK", "0")]), Some((0, 2, 0)));
        let srun = [("PMIX_RANK", "5"), ("SLURM_STEP_NUM_TASKS", "8"), ("SLURM_LOCALID", "1")];
        assert_eq!(read(&srun), Some((5, 8, 1)));
        assert_eq!(read(&[("OMPI_COMM_WORLD_SIZE", "1"), ("OMPI_COMM_WORLD_RANK", "0")]), None);
        assert_eq!(read(&[("SLURM_NTASKS", "8"), ("SLURM_PROCID", "0")]), None, "a batch script");
        assert_eq!(read(&[]), None);
    }

    #[test]
    fn processors_are_shared_between_the_processes_of_a_machine() {
        assert_eq!(share(16, 16, 16, 2), 8, "not bound");
        assert_eq!(share(16, 16, 32, 2), 16, "bound to a socket each");
        assert_eq!(share(16, 16, 32, 4), 8, "two on a socket");
        assert_eq!(share(1, 1, 2, 2), 1, "bound to a core each");
        assert_eq!(share(2, 64, 64, 2), 1, "a container with a quota of 2");
        assert_eq!(share(2, 2, 2, 3), 1, "more processes than processors");
        assert_eq!(share(8, 0, 0, 2), 4, "a system that does not say");
    }

    #[test]
    fn affinity_is_read_lowest_word_first() {
        assert_eq!(
            allowed("Name:\tx\nCpus_allowed:\t3,ffffffff\nCpus_allowed_list:\t0-33\n"),
            [u32::MAX, 3]
        );
        assert!(allowed("").is_empty());
    }
}
