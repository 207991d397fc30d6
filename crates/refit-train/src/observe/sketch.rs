//! Quantiles of a stream, deterministic and order-free.

/// A histogram over the 65 536 values that the top 16 bits of an f32 can take (sign, exponent and
/// seven mantissa bits: the bf16 grid). Bins keep the order of the numbers, so a quantile is a walk;
/// inside a bin it interpolates. The relative error is at most 2⁻⁷, usually far below, the two
/// extremes are exact, and two streams with the same values in any order give the same answer.
#[derive(Debug, Clone)]
pub struct Sketch {
    bins: Vec<u64>,
    count: u64,
    min: f32,
    max: f32,
}

impl Default for Sketch {
    fn default() -> Self {
        Self::new()
    }
}

impl Sketch {
    /// An empty sketch (512 KiB).
    pub fn new() -> Self {
        Self { bins: vec![0; 1 << 16], count: 0, min: f32::INFINITY, max: f32::NEG_INFINITY }
    }

    /// Adds a finite value.
    #[inline]
    pub fn insert(&mut self, value: f32) {
        self.bins[bin_of(value)] += 1;
        self.count += 1;
        self.min = self.min.min(value);
        self.max = self.max.max(value);
    }

    /// Adds everything that `other` saw.
    pub fn merge(&mut self, other: &Sketch) {
        self.bins.iter_mut().zip(&other.bins).for_each(|(a, b)| *a += b);
        self.count += other.count;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// Number of values seen.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The `q`-quantile, `q` in [0, 1]; `None` when nothing was inserted.
    pub fn quantile(&self, q: f64) -> Option<f32> {
        if self.count == 0 {
            return None;
        }
        let rank = q.clamp(0.0, 1.0) * (self.count - 1) as f64;
        if rank <= 0.0 {
            return Some(self.min);
        }
        if rank >= (self.count - 1) as f64 {
            return Some(self.max);
        }
        let mut below = 0u64;
        for (bin, &n) in self.bins.iter().enumerate() {
            if n > 0 && rank < (below + n) as f64 {
                let share = (rank - below as f64 + 0.5) / n as f64;
                let (low, high) = (edge(bin), edge(bin + 1));
                let value = low + (high - low) * share.clamp(0.0, 1.0) as f32;
                return Some(value.clamp(self.min, self.max));
            }
            below += n;
        }
        Some(self.max)
    }
}

/// Maps f32 bits to integers in the order of the numbers (the usual sign-magnitude flip).
fn ordered(bits: u32) -> u32 {
    if bits >> 31 == 1 { !bits } else { bits | 0x8000_0000 }
}

fn bin_of(value: f32) -> usize {
    (ordered(value.to_bits()) >> 16) as usize
}

/// Lower edge of a bin.
fn edge(bin: usize) -> f32 {
    let key = ((bin.min(0xFFFF) as u32) << 16) | if bin > 0xFFFF { 0xFFFF } else { 0 };
    let bits = if key >> 31 == 1 { key & 0x7FFF_FFFF } else { !key };
    let value = f32::from_bits(bits);
    if value.is_finite() { value } else { f32::MAX.copysign(value) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;
    use proptest::prelude::*;

    #[test]
    fn quantiles_of_a_normal_sample() {
        let mut rng = SplitMix64::new(5);
        let mut values: Vec<f32> = (0..50_000).map(|_| rng.normal() as f32).collect();
        let mut sketch = Sketch::new();
        values.iter().for_each(|&x| sketch.insert(x));
        values.sort_by(f32::total_cmp);
        for q in [0.0, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0] {
            let exact = values[(q * 49_999.0) as usize];
            let got = sketch.quantile(q).unwrap();
            assert!((got - exact).abs() <= 0.008 * exact.abs() + 1e-3, "{q}: {got} for {exact}");
        }
        assert_eq!(sketch.quantile(0.0), values.first().copied());
        assert_eq!(sketch.quantile(1.0), values.last().copied());
        assert_eq!(Sketch::new().quantile(0.5), None);
    }

    proptest! {
        #[test]
        fn stays_inside_one_bin_of_an_order_statistic(
            mut values in prop::collection::vec(-1e30f32..1e30, 1..60),
            q in 0.0f64..=1.0,
        ) {
            let mut forward = Sketch::new();
            values.iter().for_each(|&x| forward.insert(x));
            values.reverse();
            let (head, tail) = values.split_at(values.len() / 2);
            let (mut parts, mut rest) = (Sketch::new(), Sketch::new());
            head.iter().for_each(|&x| parts.insert(x));
            tail.iter().for_each(|&x| rest.insert(x));
            parts.merge(&rest);
            let got = forward.quantile(q).unwrap();
            prop_assert_eq!(got, parts.quantile(q).unwrap());
            values.sort_by(f32::total_cmp);
            let exact = values[(q * (values.len() - 1) as f64).floor() as usize];
            prop_assert!((got - exact).abs() <= exact.abs() / 64.0 + 1e-30, "{} for {}", got, exact);
        }
    }
}
