//! The order of examples as a pure function of (seed, step): resuming replays nothing.

use std::sync::Mutex;

use crate::rng::SplitMix64;

/// Shuffled passes over `len` examples, a fresh permutation per epoch.
#[derive(Debug)]
pub struct Order {
    seed: u64,
    len: usize,
    /// The permutation asked for last.
    epoch: Mutex<Option<(u64, Vec<u32>)>>,
}

impl Order {
    /// The order of `len` examples (at least one) under `seed`.
    pub fn new(seed: u64, len: usize) -> Self {
        assert!(len > 0, "invariant: a data set has at least one example");
        Self { seed, len, epoch: Mutex::new(None) }
    }

    /// The examples of batch number `index` of `size` examples, counted over the whole run. A batch may span two epochs.
    pub fn batch(&self, index: u64, size: usize) -> Vec<usize> {
        let first = index * size as u64;
        (first..first + size as u64).map(|i| self.example(i)).collect()
    }

    /// The pass over the data that batch `index` begins in.
    pub fn epoch(&self, index: u64, size: usize) -> u64 {
        index * size as u64 / self.len as u64
    }

    fn example(&self, i: u64) -> usize {
        let (epoch, at) = (i / self.len as u64, (i % self.len as u64) as usize);
        let mut cached = self.epoch.lock().expect("invariant: no thread panics while holding it");
        match &*cached {
            Some((known, order)) if *known == epoch => order[at] as usize,
            _ => {
                let mut rng = SplitMix64::stream(self.seed, epoch);
                let mut order: Vec<u32> = (0..self.len as u32).collect();
                for i in (1..order.len()).rev() {
                    order.swap(i, rng.below(i + 1));
                }
                let example = order[at] as usize;
                *cached = Some((epoch, order));
                example
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_is_a_permutation_and_any_step_can_be_asked_first() {
        let order = Order::new(3, 10);
        let seen: Vec<usize> = (0..5).flat_map(|i| order.batch(i, 4)).collect();
        for epoch in seen.chunks(10) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(seen[..10], seen[10..]);
        assert_eq!(Order::new(3, 10).batch(4, 4), seen[16..]);
        assert_ne!(Order::new(4, 10).batch(0, 10), seen[..10]);
    }
}
