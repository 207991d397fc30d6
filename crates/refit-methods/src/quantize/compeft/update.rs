//! The vector that is compressed: every tensor of an update, one after the other in the order of their names.

use rayon::prelude::*;
use refit_store::adapter::Values;

use crate::error::{Error, Result};
use crate::inputs::{Inputs, ModelInput};
use crate::rewrite::check_finite;

/// Bits of a magnitude that the second count looks at.
const LOW: u32 = 15;

/// An update, tensor by tensor.
pub(super) enum Update<'a> {
    /// Tensors of an adapter, less what they count from.
    Adapter { tensors: Vec<(String, Values)>, origin: f32 },
    /// What a fine-tuning changed in its base.
    Full { base: &'a ModelInput, tuned: &'a ModelInput, tensors: Vec<(String, String, Vec<usize>)> },
}

/// What is known of some entries before any is dropped.
#[derive(Clone, Debug)]
pub(super) struct Moments {
    count: u64,
    sum: f64,
    squares: f64,
    /// By the upper bits of the magnitude.
    high: Vec<u64>,
}

impl Moments {
    fn new() -> Self {
        Self { count: 0, sum: 0.0, squares: 0.0, high: vec![0; 1 << 16] }
    }

    pub fn of(values: &[f32]) -> Self {
        let mut moments = Self::new();
        moments.count = values.len() as u64;
        for x in values {
            moments.sum += f64::from(*x);
            moments.squares += f64::from(*x) * f64::from(*x);
            moments.high[(bits(*x) >> LOW) as usize] += 1;
        }
        moments
    }

    pub fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.sum += other.sum;
        self.squares += other.squares;
        self.high.iter_mut().zip(&other.high).for_each(|(a, b)| *a += b);
    }

    /// Standard deviation with divisor `d - 1`, as torch takes it.
    pub fn sigma(&self) -> f64 {
        let d = self.count as f64;
        if self.count < 2 {
            return 0.0;
        }
        ((self.squares - self.sum * self.sum / d) / (d - 1.0)).max(0.0).sqrt()
    }

    /// Where the `keep` largest magnitudes end: the upper bits of the smallest of them, and how many of its bin are kept.
    pub fn bin(&self, keep: u64) -> (u32, u64) {
        let mut left = keep;
        for (bin, count) in self.high.iter().enumerate().rev() {
            if left <= *count {
                return (bin as u32, left);
            }
            left -= count;
        }
        (0, left)
    }
}

/// The magnitude's bits: they order as the magnitudes do.
fn bits(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

/// Exactly `k` of the largest magnitudes, those that come first where they are equal.
#[derive(Clone, Debug)]
pub(super) struct Cut {
    /// Magnitudes above are kept.
    limit: u32,
    /// How many at the limit are kept.
    ties: u64,
}

impl Cut {
    /// Keeps nothing.
    pub fn nothing() -> Self {
        Self { limit: u32::MAX, ties: 0 }
    }

    /// Whether the next entry is kept; zeros never are.
    pub fn keeps(&mut self, x: f32) -> bool {
        let magnitude = bits(x);
        if magnitude == 0 || magnitude < self.limit {
            return false;
        }
        if magnitude > self.limit {
            return true;
        }
        let keep = self.ties > 0;
        self.ties -= u64::from(keep);
        keep
    }
}

/// The lower bits of the magnitudes in one bin.
pub(super) fn low_counts(values: &[f32], bin: u32) -> Vec<u64> {
    let mut low = vec![0u64; 1 << LOW];
    for x in values {
        if bits(*x) >> LOW == bin {
            low[(bits(*x) & ((1 << LOW) - 1)) as usize] += 1;
        }
    }
    low
}

/// The cut in a bin of which `keep` are kept.
pub(super) fn cut(bin: u32, keep: u64, low: &[u64]) -> Cut {
    if keep == 0 {
        // Everything above the bin: its largest magnitude, and none of that.
        return Cut { limit: (bin << LOW) | ((1 << LOW) - 1), ties: 0 };
    }
    let mut left = keep;
    for (at, count) in low.iter().enumerate().rev() {
        if left <= *count {
            return Cut { limit: (bin << LOW) | at as u32, ties: left };
        }
        left -= count;
    }
    Cut { limit: 0, ties: 0 }
}

impl<'a> Update<'a> {
    /// What `tuned` changed in `base`; both of one shape, as a merge has checked. Tensors that are tied to another are left out.
    pub fn full(inputs: &'a Inputs, base: usize, tuned: usize, names: &[String]) -> Result<Self> {
        let (base, tuned) = (&inputs.models[base], &inputs.models[tuned]);
        let architecture = base.artifact.architecture();
        let mut tensors = Vec::new();
        for name in names {
            let info = base.artifact.tensor(name)?;
            let tied = architecture.site(name).is_some_and(|site| site.tied_to.is_some());
            if !info.dtype.is_float() || tied {
                continue;
            }
            let (site, last) = name.rsplit_once('.').unwrap_or(("", name));
            let stored = format!("base_model.model.{site}.delta.{last}");
            tensors.push((stored, name.clone(), info.shape.clone()));
        }
        tensors.sort();
        Ok(Self::Full { base, tuned, tensors })
    }

    /// Names in the adapter's file, and shapes.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        match self {
            Self::Adapter { tensors, .. } => {
                tensors.iter().map(|(name, values)| (name.clone(), values.shape.clone())).collect()
            }
            Self::Full { tensors, .. } => {
                tensors.iter().map(|(stored, _, shape)| (stored.clone(), shape.clone())).collect()
            }
        }
    }

    /// The values of tensor `at`.
    pub fn values(&self, at: usize) -> Result<Vec<f32>> {
        match self {
            Self::Adapter { tensors, origin } => {
                Ok(tensors[at].1.values.iter().map(|x| x - origin).collect())
            }
            Self::Full { base, tuned, tensors } => {
                let name = &tensors[at].1;
                let mut values = tuned.artifact.read_f32(name)?;
                check_finite(&tuned.source, name, &values, 0)?;
                let from = base.artifact.read_f32(name)?;
                check_finite(&base.source, name, &from, 0)?;
                values.iter_mut().zip(&from).for_each(|(x, b)| *x -= b);
                Ok(values)
            }
        }
    }

    /// Looks at every tensor, several at once; answers in their order.
    pub fn each<T: Send>(&self, look: impl Fn(usize, &[f32]) -> T + Sync) -> Result<Vec<T>> {
        let one = |at: usize| Ok::<T, Error>(look(at, &self.values(at)?));
        (0..self.tensors().len()).into_par_iter().with_max_len(1).map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Stream;

    fn kept(values: &[f32], keep: usize) -> Vec<usize> {
        let (bin, left) = Moments::of(values).bin(keep as u64);
        let mut cut = cut(bin, left, &low_counts(values, bin));
        (0..values.len()).filter(|at| cut.keeps(values[*at])).collect()
    }

    #[test]
    fn exactly_the_largest_are_kept_and_ties_by_their_place() {
        let mut values = Stream::new(3).normals(501);
        values.extend([0.5; 20]);
        values.extend([-0.5; 20]);
        values.push(0.0);
        for keep in [0, 1, 7, 100, 250, 400, 541] {
            let mut order: Vec<usize> = (0..values.len()).collect();
            order.sort_by(|a, b| values[*b].abs().total_cmp(&values[*a].abs()).then(a.cmp(b)));
            let mut wanted = order[..keep].to_vec();
            wanted.sort_unstable();
            assert_eq!(kept(&values, keep), wanted, "{keep}");
        }
        // A zero has no sign.
        assert_eq!(kept(&values, 542).len(), 541);
        assert_eq!(kept(&[0.0; 4], 4), Vec::<usize>::new());
    }

    #[test]
    fn sigma_is_torchs() {
        let values = [1.0f32, 2.0, 4.0, -3.0];
        assert!((Moments::of(&values).sigma() - 2.943_920_288).abs() < 1e-6);
        let (mut a, b) = (Moments::of(&values[..1]), Moments::of(&values[1..]));
        a.add(&b);
        assert!((a.sigma() - 2.943_920_288).abs() < 1e-6);
        assert_eq!((Moments::of(&[3.0]).sigma(), Moments::of(&[2.0; 9]).sigma()), (0.0, 0.0));
    }
}
