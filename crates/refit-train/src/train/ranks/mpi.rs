//! Ranks that a launcher (`mpirun`, `srun --mpi=pmix`) started, over MPI.
//!
//! MPI ends the program where a connection breaks (`MPI_ERRORS_ARE_FATAL`), and the launcher ends the other ranks when one is
//! gone, so no operation reports an error. MPI requires that all ranks get the same bits from a reduction (MPI 3.1, 5.9.6).

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::datatype::Equivalence;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Root};

use super::Transport;
use crate::train::error::{Result, TrainError};

/// Ends MPI only when [`finish`] takes it: a static is never dropped, so a process that dies does not wait for the others there.
static UNIVERSE: Mutex<Option<Universe>> = Mutex::new(None);

/// Most bytes of one message: counts are 32-bit, and a sum needs a second buffer of this size.
const MESSAGE: usize = 16 << 20;

/// How long a waiting rank spins before it naps.
const SPIN: Duration = Duration::from_millis(2);
/// The longest nap.
const NAP: Duration = Duration::from_millis(1);

/// All processes that the launcher started.
#[derive(Debug)]
pub struct Mpi {
    rank: usize,
    size: usize,
    /// MPI is told that no two threads call it at once.
    turn: Mutex<()>,
}

/// Connects this process with the others. Once per process, on the thread that [`finish`] will be called on.
///
/// # Errors
/// [`TrainError::Launch`] where MPI runs already or has no place for threads.
pub fn start() -> Result<Mpi> {
    let fail = |problem: &str| Err(TrainError::Launch { problem: problem.into() });
    let Some((universe, given)) = mpi::initialize_with_threading(Threading::Serialized) else {
        return fail("MPI was started before in this process");
    };
    *UNIVERSE.lock().unwrap_or_else(PoisonError::into_inner) = Some(universe);
    if given < Threading::Serialized {
        return fail("this MPI library cannot be called from a process with threads");
    }
    let world = SimpleCommunicator::world();
    let (rank, size) = (world.rank() as usize, world.size() as usize);
    Ok(Mpi { rank, size, turn: Mutex::new(()) })
}

/// Leaves the other ranks in order; all must call it. Does nothing where MPI was not started.
pub fn finish() {
    drop(UNIVERSE.lock().unwrap_or_else(PoisonError::into_inner).take());
}

/// Ends all ranks at once, without order.
pub fn abort(code: i32) -> ! {
    SimpleCommunicator::world().abort(code)
}

impl Mpi {
    /// Waits until all ranks are here. MPI's own waiting keeps a processor busy, and ranks that wait for rank 0 to measure or to
    /// write would take it from rank 0: here a long wait sleeps.
    fn meet(world: &SimpleCommunicator) {
        let mut request = world.immediate_barrier();
        let start = Instant::now();
        while let Err(pending) = request.test() {
            request = pending;
            match start.elapsed() {
                waited if waited > SPIN => std::thread::sleep(NAP.min(waited / 16)),
                _ => std::thread::yield_now(),
            }
        }
    }

    /// Calls MPI when all ranks are here.
    fn together<T>(&self, call: impl FnOnce(&SimpleCommunicator) -> T) -> T {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let world = SimpleCommunicator::world();
        Self::meet(&world);
        call(&world)
    }

    fn sum<T: Equivalence + Copy>(&self, values: &mut [T]) {
        self.together(|world| {
            for part in values.chunks_mut(MESSAGE / size_of::<T>()) {
                let own = part.to_vec();
                world.all_reduce_into(&own[..], part, SystemOperation::sum());
            }
        });
    }
}

impl Transport for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn gather(&self, own: u64) -> Vec<u64> {
        let mut all = vec![0; self.size];
        self.together(|world| world.all_gather_into(&own, &mut all[..]));
        all
    }

    fn sum_f32(&self, values: &mut [f32]) {
        self.sum(values);
    }

    fn sum_f64(&self, values: &mut [f64]) {
        self.sum(values);
    }

    fn broadcast(&self, bytes: &mut [u8]) {
        self.together(|world| {
            let root = world.process_at_rank(0);
            bytes.chunks_mut(MESSAGE).for_each(|part| root.broadcast_into(part));
        });
    }
}
