//! The generator behind every seeded choice in refit.
//!
//! SplitMix64 (Steele, Lea, Flood: *Fast splittable pseudorandom number
//! generators*, OOPSLA 2014): one 64-bit word of state, passes BigCrush, and a
//! dozen lines long. We keep our own so that a seed written into a lineage
//! manifest gives the same split in ten years, whatever the `rand` crate does by
//! then. The known-answer tests below freeze it. Not for cryptography.

use sha2::{Digest, Sha256};

/// A SplitMix64 stream.
#[derive(Debug, Clone)]
pub struct Rng {
    state: u64,
}

impl Rng {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Rng { state: seed }
    }

    /// The stream of `seed` for one purpose. Streams of different names are
    /// independent, so adding a consumer never shifts another one's numbers.
    pub fn named(seed: u64, name: &str) -> Self {
        Rng::new(hash(seed, name.as_bytes()))
    }

    /// Uniform over all 64-bit words.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform over `0..n`, without bias (Lemire 2019); 0 when `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        let n = n as u64;
        loop {
            let wide = u128::from(self.next_u64()) * u128::from(n);
            if (wide as u64) >= n.wrapping_neg().checked_rem(n).unwrap_or(0) {
                return (wide >> 64) as usize;
            }
        }
    }

    /// Uniform over `[0, 1)`, 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Standard normal (Box-Muller, cosine branch).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Fisher-Yates, from the end.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// `k` distinct indices of `0..n` in random order; all of them when `k >= n`.
    pub fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        let k = k.min(n);
        let mut items: Vec<usize> = (0..n).collect();
        for i in 0..k {
            let j = i + self.below(n - i);
            items.swap(i, j);
        }
        items.truncate(k);
        items
    }
}

/// The first eight bytes (little-endian) of SHA-256 over the seed and `content`.
pub fn hash(seed: u64, content: &[u8]) -> u64 {
    let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(content).finalize();
    u64::from_le_bytes(digest[..8].try_into().expect("invariant: SHA-256 has 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published outputs of SplitMix64 for seed 1234567.
    #[test]
    fn the_stream_never_changes() {
        let mut rng = Rng::new(1_234_567);
        let got: Vec<u64> = (0..5).map(|_| rng.next_u64()).collect();
        let want = [
            6457827717110365317,
            3203168211198807973,
            9817491932198370423,
            4593380528125082431,
            16408922859458223821,
        ];
        assert_eq!(got, want);
    }

    #[test]
    fn derived_draws_never_change() {
        let mut items: Vec<u32> = (0..8).collect();
        Rng::new(7).shuffle(&mut items);
        let sample = Rng::new(7).sample(1000, 4);
        let named = Rng::named(7, "split").next_u64();
        assert_eq!((items, sample, named), frozen());
    }

    fn frozen() -> (Vec<u32>, Vec<usize>, u64) {
        (vec![7, 4, 6, 1, 2, 5, 0, 3], vec![389, 17, 900, 584], 1790026095272984246)
    }

    #[test]
    fn below_is_unbiased_and_in_range() {
        let mut rng = Rng::new(3);
        let mut counts = [0usize; 6];
        for _ in 0..60_000 {
            counts[rng.below(6)] += 1;
        }
        assert!(counts.iter().all(|c| (9_600..10_400).contains(c)), "{counts:?}");
        assert_eq!(rng.below(0), 0);
        assert_eq!(rng.below(1), 0);
    }

    #[test]
    fn normal_has_unit_variance() {
        let mut rng = Rng::new(5);
        let draws: Vec<f64> = (0..50_000).map(|_| rng.normal()).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let var = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.02 && (var - 1.0).abs() < 0.03, "{mean} {var}");
    }

    #[test]
    fn a_sample_has_no_repeats() {
        let mut sample = Rng::new(1).sample(50, 50);
        sample.sort_unstable();
        assert_eq!(sample, (0..50).collect::<Vec<_>>());
        assert_eq!(Rng::new(1).sample(3, 10).len(), 3);
    }
}
