//! Ranks that are threads of one process. Sums are taken in the order of ranks.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::{Ranks, Transport};

/// Runs `work` on `size` threads that are ranks to each other; what each returned, in their order.
///
/// # Panics
/// Where `work` does; the other ranks then panic at their next exchange instead of waiting for ever.
pub fn run<T: Send>(size: usize, work: impl Fn(Ranks) -> T + Sync) -> Vec<T> {
    let table = Arc::new(Table::default());
    thread::scope(|scope| {
        let started: Vec<_> = (0..size)
            .map(|rank| {
                let (table, work) = (table.clone(), &work);
                // The stack that a main thread has.
                let thread = thread::Builder::new().stack_size(8 << 20);
                let body = move || {
                    let _leaves = Leaves(rank, table.clone());
                    work(Ranks::over(Seat { rank, size, table }))
                };
                thread.spawn_scoped(scope, body).expect("a thread can be started")
            })
            .collect();
        let mut ended: Vec<_> = started.into_iter().map(thread::ScopedJoinHandle::join).collect();
        let first = table.round.lock().unwrap_or_else(PoisonError::into_inner).broken;
        if let Some(Err(panic)) = first.map(|rank| ended.swap_remove(rank)) {
            std::panic::resume_unwind(panic);
        }
        ended.into_iter().map(|t| t.expect("invariant: the first panic was passed on")).collect()
    })
}

/// Where ranks put what they bring, and take what all brought.
#[derive(Debug, Default)]
struct Table {
    round: Mutex<Round>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Round {
    brought: Vec<(usize, Vec<u8>)>,
    /// Everything, in the order of ranks, until all have taken it.
    complete: Option<Arc<Vec<Vec<u8>>>>,
    taken: usize,
    /// The rank that panicked first.
    broken: Option<usize>,
}

/// Says so when its thread panics.
struct Leaves(usize, Arc<Table>);

impl Drop for Leaves {
    fn drop(&mut self) {
        if thread::panicking() {
            let mut round = self.1.round.lock().unwrap_or_else(PoisonError::into_inner);
            round.broken.get_or_insert(self.0);
            self.1.changed.notify_all();
        }
    }
}

/// One rank's place.
#[derive(Debug)]
struct Seat {
    rank: usize,
    size: usize,
    table: Arc<Table>,
}

impl Seat {
    /// What every rank brought.
    fn exchange(&self, own: Vec<u8>) -> Arc<Vec<Vec<u8>>> {
        let Table { round, changed } = &*self.table;
        let round = round.lock().unwrap_or_else(PoisonError::into_inner);
        let mut round = self.wait(round, |round| round.complete.is_none());
        round.brought.push((self.rank, own));
        if round.brought.len() == self.size {
            let mut all = std::mem::take(&mut round.brought);
            all.sort_unstable_by_key(|(rank, _)| *rank);
            round.complete = Some(Arc::new(all.into_iter().map(|(_, bytes)| bytes).collect()));
            changed.notify_all();
        }
        let mut round = self.wait(round, |round| round.complete.is_some());
        let all = round.complete.clone().expect("invariant: waited for");
        round.taken += 1;
        if round.taken == self.size {
            round.taken = 0;
            round.complete = None;
            changed.notify_all();
        }
        all
    }

    /// Waits for the others to make `until` true.
    fn wait<'a>(
        &self,
        round: MutexGuard<'a, Round>,
        until: fn(&Round) -> bool,
    ) -> MutexGuard<'a, Round> {
        let waiting = |round: &mut Round| round.broken.is_none() && !until(round);
        let round = self.table.changed.wait_while(round, waiting);
        let round = round.unwrap_or_else(PoisonError::into_inner);
        assert!(round.broken.is_none(), "another rank has panicked");
        round
    }

    fn sum<T: bytemuck::Pod + std::ops::AddAssign>(&self, values: &mut [T]) {
        let all = self.exchange(bytemuck::cast_slice(values).to_vec());
        for (rank, bytes) in all.iter().enumerate() {
            // Panics where ranks sum different things.
            let mut theirs = vec![T::zeroed(); values.len()];
            bytemuck::cast_slice_mut::<T, u8>(&mut theirs).copy_from_slice(bytes);
            for (sum, value) in values.iter_mut().zip(theirs) {
                if rank == 0 { *sum = value } else { *sum += value }
            }
        }
    }
}

impl Transport for Seat {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn gather(&self, own: u64) -> Vec<u64> {
        let all = self.exchange(own.to_le_bytes().to_vec());
        let number = |bytes: &Vec<u8>| bytes.as_slice().try_into().map(u64::from_le_bytes);
        all.iter().map(|bytes| number(bytes).expect("ranks gather different things")).collect()
    }

    fn sum_f32(&self, values: &mut [f32]) {
        self.sum(values);
    }

    fn sum_f64(&self, values: &mut [f64]) {
        self.sum(values);
    }

    fn broadcast(&self, bytes: &mut [u8]) {
        let own = if self.rank == 0 { bytes.to_vec() } else { Vec::new() };
        bytes.copy_from_slice(&self.exchange(own)[0]);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    #[should_panic(expected = "gave up")]
    fn a_panic_on_one_rank_ends_all() {
        super::run(2, |ranks| {
            assert!(ranks.leads(), "gave up");
            ranks.sum_f64(&mut [1.0]);
        });
    }
}
