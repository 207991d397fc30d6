//! Ranks: the processes that train one model together, each on its share of every micro-batch.
//!
//! Every rank holds the whole model, computes the loss and the gradients of its rows, and sums them with the others'; all then
//! make the same update. Rank 0 *leads*: it alone reads and writes files and speaks to the user.
//!
//! | module | what |
//! |---|---|
//! | [`threads`] | ranks that are threads of one process: tests need no MPI |
//! | `mpi` | ranks that a launcher started, over MPI (cargo feature `mpi`) |
//!
//! **Errors.** A rank that fails must not leave the others waiting. The rule that prevents it: what a rank does between two
//! exchanges may fail, and the first thing exchanged afterwards is always a [`Transport::gather`] that carries success or failure
//! ([`Ranks::gather`], [`Ranks::settle`]). So a rank that gave up may go straight to the last `settle` of the program: it meets
//! the next gather of the others, wherever they are. Afterwards every rank holds an error, the lowest one that failed its own
//! and the others [`TrainError::Peer`], and nothing is exchanged any more but exit codes ([`Ranks::last`]).

#[cfg(feature = "mpi")]
pub mod mpi;
pub mod threads;

use std::fmt::Debug;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::error::{Result, TrainError};

/// What carries numbers between ranks. Every operation waits for all ranks, which must ask for the same ones in the same order.
/// None of them fails: what breaks the connection ends the process.
pub trait Transport: Debug + Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn size(&self) -> usize;
    /// One number of every rank, in their order.
    fn gather(&self, own: u64) -> Vec<u64>;
    /// Sums over ranks, element by element, in place; every rank gets the same bits.
    fn sum_f32(&self, values: &mut [f32]);
    /// As [`Self::sum_f32`].
    fn sum_f64(&self, values: &mut [f64]);
    /// Rank 0's bytes to all ranks, in place; the length is the same everywhere.
    fn broadcast(&self, bytes: &mut [u8]);
}

/// What a rank that failed gathers.
const FAILED: u64 = u64::MAX;

/// All ranks, as one of them sees them. The default is a process of its own, for which nothing here costs anything.
#[derive(Debug, Clone, Default)]
pub struct Ranks(Option<Arc<Together>>);

#[derive(Debug)]
struct Together {
    transport: Box<dyn Transport>,
    /// The lowest rank that failed, once all know it.
    failed: OnceLock<usize>,
}

/// Which part of every micro-batch a rank computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// This rank, from 0.
    pub rank: usize,
    /// Number of ranks.
    pub ranks: usize,
}

impl Share {
    /// All of it.
    pub const WHOLE: Self = Self { rank: 0, ranks: 1 };

    /// The rows of a micro-batch of `rows` that are this rank's: consecutive, together all of them, counts that differ by one
    /// at most. Nobody's share is empty unless `rows` is less than the number of ranks.
    pub fn of(self, rows: usize) -> Range<usize> {
        rows * self.rank / self.ranks..rows * (self.rank + 1) / self.ranks
    }
}

impl Ranks {
    /// The ranks that `transport` connects.
    pub fn over(transport: impl Transport + 'static) -> Self {
        let transport = Box::new(transport);
        Self(Some(Arc::new(Together { transport, failed: OnceLock::new() })))
    }

    /// Is this a process of its own?
    pub fn alone(&self) -> bool {
        self.0.is_none()
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |all| all.transport.rank())
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.0.as_ref().map_or(1, |all| all.transport.size())
    }

    /// Is this rank 0, which alone touches files?
    pub fn leads(&self) -> bool {
        self.rank() == 0
    }

    /// This rank's part of every micro-batch.
    pub fn share(&self) -> Share {
        Share { rank: self.rank(), ranks: self.size() }
    }

    /// The lowest rank that failed, when all know of it.
    pub fn failed(&self) -> Option<usize> {
        self.0.as_ref().and_then(|all| all.failed.get().copied())
    }

    /// Is it this rank's turn to speak to the user? Rank 0's, or that of the lowest rank that failed.
    pub fn speaks(&self) -> bool {
        self.rank() == self.failed().unwrap_or(0)
    }

    /// What every rank counted, in the order of ranks, if all of them succeeded.
    ///
    /// # Errors
    /// This rank's own error where it is the lowest that failed, else [`TrainError::Peer`].
    pub fn gather<T, E: From<TrainError>>(
        &self,
        result: Result<(T, u64), E>,
    ) -> Result<(T, Vec<u64>), E> {
        let Some(all) = &self.0 else { return result.map(|(value, own)| (value, vec![own])) };
        if let Some(&rank) = all.failed.get() {
            // Nobody listens any more.
            return Err(result.err().unwrap_or_else(|| TrainError::Peer { rank }.into()));
        }
        let own = result.as_ref().map_or(FAILED, |(_, own)| (*own).min(FAILED - 1));
        let counts = all.transport.gather(own);
        let Some(rank) = counts.iter().position(|&count| count == FAILED) else {
            return result.map(|(value, _)| (value, counts));
        };
        let _ = all.failed.set(rank);
        match result {
            Err(own) if rank == self.rank() => Err(own),
            _ => Err(TrainError::Peer { rank }.into()),
        }
    }

    /// `result`, if all ranks succeeded.
    ///
    /// # Errors
    /// As [`Self::gather`].
    pub fn settle<T, E: From<TrainError>>(&self, result: Result<T, E>) -> Result<T, E> {
        self.gather(result.map(|value| (value, 0))).map(|(value, _)| value)
    }

    /// Does `work` on rank 0 alone, for which the others wait; they get `None`.
    ///
    /// # Errors
    /// As [`Self::gather`].
    pub fn lead<T, E: From<TrainError>>(
        &self,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<Option<T>, E> {
        self.settle(if self.leads() { work().map(Some) } else { Ok(None) })
    }

    /// Checks that all ranks hold the same of `what`, of which `digest` is a hash.
    ///
    /// # Errors
    /// [`TrainError::Replica`], on all ranks; as [`Self::gather`].
    pub fn same(&self, what: &'static str, digest: u64) -> Result<()> {
        // The largest number says that a rank failed.
        let (_, all) = self.gather(Ok::<_, TrainError>(((), digest >> 1)))?;
        match all.iter().position(|other| *other != all[0]) {
            Some(rank) => Err(TrainError::Replica { what, rank }),
            None => Ok(()),
        }
    }

    /// Sums over ranks, in place.
    pub fn sum_f32(&self, values: &mut [f32]) {
        if let Some(all) = &self.0 {
            all.transport.sum_f32(values);
        }
    }

    /// Sums over ranks, in place.
    pub fn sum_f64(&self, values: &mut [f64]) {
        if let Some(all) = &self.0 {
            all.transport.sum_f64(values);
        }
    }

    /// Rank 0's values to all, in place; the length is the same everywhere.
    pub fn broadcast_f32(&self, values: &mut [f32]) {
        if let Some(all) = &self.0 {
            all.transport.broadcast(bytemuck::cast_slice_mut(values));
        }
    }

    /// Rank 0's bytes to all, whatever their number.
    pub fn broadcast(&self, bytes: Vec<u8>) -> Vec<u8> {
        let Some(all) = &self.0 else { return bytes };
        let mut length = (bytes.len() as u64).to_le_bytes();
        all.transport.broadcast(&mut length);
        let mut bytes = bytes;
        bytes.resize(u64::from_le_bytes(length) as usize, 0);
        all.transport.broadcast(&mut bytes);
        bytes
    }

    /// The last exchange of a program, after the last [`Self::settle`]: the code that all ranks end with, which is that of the
    /// rank that [`speaks`](Self::speaks).
    pub fn last(&self, code: u8) -> u8 {
        let Some(all) = &self.0 else { return code };
        all.transport.gather(code.into())[self.failed().unwrap_or(0)] as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_even_and_complete() {
        for ranks in 1..6 {
            for rows in ranks..20 {
                let shares: Vec<_> =
                    (0..ranks).map(|rank| Share { rank, ranks }.of(rows)).collect();
                let joined: Vec<usize> = shares.iter().cloned().flatten().collect();
                assert_eq!(joined, (0..rows).collect::<Vec<_>>());
                let lengths = shares.iter().map(ExactSizeIterator::len);
                assert!(lengths.clone().max().unwrap() - lengths.min().unwrap() <= 1);
            }
        }
        assert_eq!(Share::WHOLE.of(7), 0..7);
    }

    #[test]
    fn numbers_reach_every_rank() {
        let seen = threads::run(3, |ranks| {
            let own = ranks.rank() as u64;
            let (_, counts) = ranks.gather(Ok::<_, TrainError>(((), own + 5))).unwrap();
            let mut floats = vec![own as f32, 1.0];
            ranks.sum_f32(&mut floats);
            let mut doubles = vec![0.25 * own as f64];
            ranks.sum_f64(&mut doubles);
            let bytes = ranks.broadcast(if ranks.leads() { vec![1, 2, 3] } else { vec![9] });
            let mut values = vec![own as f32; 2];
            ranks.broadcast_f32(&mut values);
            (counts, floats, doubles, bytes, values)
        });
        let wanted =
            (vec![5u64, 6, 7], vec![3.0f32, 3.0], vec![0.75], vec![1u8, 2, 3], vec![0.0f32; 2]);
        assert_eq!(seen, vec![wanted; 3]);
    }

    /// Rank 1 of 3 gives up before the others' first exchange, rank 2 at it: one error is told, and nobody waits.
    #[test]
    fn the_lowest_rank_that_failed_speaks_and_all_end() {
        let ended = threads::run(3, |ranks| {
            let fails = |step| TrainError::NoTerms { step };
            let work = || -> Result<()> {
                if ranks.rank() == 1 {
                    return Err(fails(1));
                }
                ranks.settle(if ranks.rank() == 2 { Err(fails(2)) } else { Ok(()) })?;
                unreachable!("rank 1 has failed");
            };
            let error = ranks.settle(work()).unwrap_err();
            let code = ranks.last(10 + ranks.rank() as u8);
            (error.to_string(), ranks.speaks(), code)
        });
        let peer = TrainError::Peer { rank: 1 }.to_string();
        let own = TrainError::NoTerms { step: 1 }.to_string();
        assert_eq!(ended, [(peer.clone(), false, 11), (own, true, 11), (peer, false, 11)]);
    }

    #[test]
    fn what_differs_is_named_on_every_rank() {
        let all = threads::run(2, |ranks| {
            ranks.same("weights", 7).unwrap();
            ranks.same("weights", 14 << ranks.rank()).unwrap_err().to_string()
        });
        assert!(
            all.iter().all(|e| e.contains("process 1") && e.contains("the weights")),
            "{all:?}"
        );
    }

    #[test]
    fn alone_nothing_is_exchanged() {
        let ranks = Ranks::default();
        assert!(ranks.alone() && ranks.leads() && ranks.speaks() && ranks.size() == 1);
        assert_eq!(ranks.share(), Share::WHOLE);
        let failed: Result<()> = ranks.settle(Err(TrainError::NoTerms { step: 4 }));
        assert!(matches!(failed, Err(TrainError::NoTerms { step: 4 })));
        assert_eq!((ranks.broadcast(vec![1]), ranks.last(3)), (vec![1], 3));
        ranks.same("anything", 1).unwrap();
    }
}
