//! Which group size each matrix gets, from its weights alone.

use rayon::prelude::*;

use crate::quantize::grid::Grid;

/// What a matrix looks like at each size of its chain of group sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Group sizes, ascending, each dividing the next.
    pub chain: Vec<usize>,
    /// `R(g)`: mean over groups of the range of their weights (`2 max|w|` on symmetric grids).
    pub range: Vec<f64>,
    /// `||W - W_hat||^2 / ||W||^2` per size; empty unless asked for.
    pub error: Vec<f64>,
    /// Rows.
    pub rows: usize,
    /// Weights per row.
    pub inputs: usize,
}

impl Profile {
    /// Measures `weights` `[rows, inputs]` at every size of `chain`; the errors only `with_error`.
    pub fn measure(
        grid: &Grid,
        weights: &[f32],
        inputs: usize,
        chain: &[usize],
        with_error: bool,
    ) -> Self {
        let rows = weights.len() / inputs.max(1);
        let error = if with_error {
            let norm: f64 = weights.iter().map(|w| f64::from(*w).powi(2)).sum();
            let relative = |sum: f64| if norm > 0.0 { sum / norm } else { 0.0 };
            chain
                .iter()
                .map(|&g| relative(sum_rows(weights, inputs, |r| grid.row_error(r, g))))
                .collect()
        } else {
            Vec::new()
        };
        Self { chain: chain.to_vec(), range: ranges(grid, weights, chain), error, rows, inputs }
    }

    /// Stored scale bits (and zero points) per weight at a size, on top of the codes.
    fn overhead(&self, grid: &Grid, at: usize) -> f64 {
        grid.bits_per_weight(self.chain[at]) - f64::from(grid.bits)
    }

    fn weights(&self) -> f64 {
        self.rows as f64 * self.inputs as f64
    }
}

/// Sums a function of rows in row order, whatever the number of threads.
fn sum_rows(weights: &[f32], inputs: usize, f: impl Fn(&[f32]) -> f64 + Sync + Send) -> f64 {
    let rows: Vec<f64> = weights.par_chunks(inputs).map(f).collect();
    rows.iter().sum()
}

/// `R(g)` for every size: extremes are found once per smallest group and merged upwards.
fn ranges(grid: &Grid, weights: &[f32], chain: &[usize]) -> Vec<f64> {
    let Some(&smallest) = chain.first() else { return Vec::new() };
    let extremes: Vec<(f32, f32)> = weights
        .par_chunks(smallest)
        .map(|group| group.iter().fold((0f32, 0f32), |(low, high), &w| (low.min(w), high.max(w))))
        .collect();
    chain
        .iter()
        .map(|size| {
            let groups = extremes.chunks(size / smallest);
            let count = groups.len().max(1) as f64;
            let spread = |group: &[(f32, f32)]| {
                let (low, high) =
                    group.iter().fold((0f32, 0f32), |(low, high), e| (low.min(e.0), high.max(e.1)));
                f64::from(if grid.symmetric { 2.0 * high.max(-low) } else { high - low })
            };
            groups.map(spread).sum::<f64>() / count
        })
        .collect()
}

/// Walks down the chain from the largest size while each halving still brings `values` down by more
/// than `alpha` (`power` 1 for ranges, 2 for squared errors, which go with the square of the range).
/// Gives the position in the chain.
pub fn walk(chain: &[usize], values: &[f64], alpha: f64, power: f64) -> usize {
    let mut at = chain.len() - 1;
    // The limits are exact, whatever the rounding of the powers below and for matrices of zeros.
    if alpha >= 1.0 {
        return at;
    }
    if alpha <= 0.0 {
        return 0;
    }
    while at > 0 {
        let halvings = (chain[at] as f64 / chain[at - 1] as f64).log2();
        if values[at - 1] > (1.0 - alpha).powf(power * halvings) * values[at] {
            break;
        }
        at -= 1;
    }
    at
}

/// Chooses sizes so that the model's average bits per weight comes as close to `target` as it can
/// without exceeding it: always the step down some chain that buys the largest drop of relative error
/// per extra stored bit, as long as it can be paid. Gives positions in the chains, and the average.
///
/// The errors of the matrices count alike, whatever their size: the noise that a layer adds relative
/// to its signal depends on its relative error, not on its number of weights.
pub fn allocate(grid: &Grid, profiles: &[Profile], target: f64) -> (Vec<usize>, f64) {
    let total: f64 = profiles.iter().map(Profile::weights).sum::<f64>().max(1.0);
    let mut at: Vec<usize> = profiles.iter().map(|profile| profile.chain.len() - 1).collect();
    let bits = |at: &[usize]| {
        let spent: f64 = profiles
            .iter()
            .zip(at)
            .map(|(profile, &at)| profile.weights() * profile.overhead(grid, at))
            .sum();
        f64::from(grid.bits) + spent / total
    };
    // In bits; half a bit of slack for sums of floats, since real totals are whole bits.
    let mut left = (target - bits(&at)) * total + 0.5;
    loop {
        let mut best: Option<(f64, usize, usize, f64)> = None;
        for (index, profile) in profiles.iter().enumerate() {
            let now = at[index];
            for next in 0..now {
                let price = profile.weights()
                    * (profile.overhead(grid, next) - profile.overhead(grid, now));
                let gain = (profile.error[now] - profile.error[next]).max(0.0) / price;
                if price <= left && best.is_none_or(|(most, ..)| gain > most) {
                    best = Some((gain, index, next, price));
                }
            }
        }
        let Some((_, index, next, price)) = best else { break };
        at[index] = next;
        left -= price;
    }
    let spent = bits(&at);
    (at, spent)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::quantize::chain::nested;
    use crate::testing::Stream;

    const GRID: Grid = Grid::symmetric(4);

    fn profile(weights: &[f32], inputs: usize) -> Profile {
        let chain = nested("w", inputs, 32).unwrap();
        Profile::measure(&GRID, weights, inputs, &chain, true)
    }

    fn outliers(rows: usize, inputs: usize, seed: u64) -> (Vec<f32>, Vec<f32>) {
        let plain = Stream::new(seed).normals(rows * inputs);
        let mut spiked = plain.clone();
        for (index, row) in spiked.chunks_mut(inputs).enumerate() {
            row[index * 37 % inputs] *= 30.0;
        }
        (plain, spiked)
    }

    #[test]
    fn outliers_ask_for_smaller_groups_and_gaussians_stop_early() {
        let (plain, spiked) = outliers(64, 576, 1);
        let size = |weights: &[f32], alpha| {
            let profile = profile(weights, 576);
            profile.chain[walk(&profile.chain, &profile.range, alpha, 1.0)]
        };
        assert!(size(&spiked, 0.15) < size(&plain, 0.15));
        assert_eq!(size(&plain, 0.15), 576);
    }

    #[test]
    fn the_ends_of_alpha_are_exact() {
        for weights in [vec![0.0; 4 * 576], Stream::new(2).normals(4 * 576)] {
            let profile = profile(&weights, 576);
            for (values, power) in [(&profile.range, 1.0), (&profile.error, 2.0)] {
                assert_eq!(walk(&profile.chain, values, 1.0, power), 3);
                assert_eq!(walk(&profile.chain, values, 0.0, power), 0);
                assert_eq!(walk(&profile.chain, values, -1.0, power), 0);
            }
        }
    }

    #[test]
    fn a_budget_is_met_and_never_exceeded() {
        let profiles: Vec<Profile> = (0..40)
            .map(|seed| {
                let (plain, spiked) = outliers(24, 576, seed);
                profile(if seed % 3 == 0 { &spiked } else { &plain }, 576)
            })
            .collect();
        for target in [4.03, 4.1, 4.25, 4.4, 4.49] {
            let (at, bits) = allocate(&GRID, &profiles, target);
            assert!(bits <= target && bits > target - 0.01, "{target}: {bits}");
            // Outlier-ridden matrices are served first.
            let mean = |spiked: bool| {
                let sizes: Vec<f64> = (0..40)
                    .filter(|seed| (seed % 3 == 0) == spiked)
                    .map(|seed| at[seed] as f64)
                    .collect();
                sizes.iter().sum::<f64>() / sizes.len() as f64
            };
            assert!(mean(true) <= mean(false), "{target}");
        }
        let (at, bits) = allocate(&GRID, &profiles, 9.0);
        assert!(at.iter().all(|at| *at == 0) && bits == 4.5);
        let (at, _) = allocate(&GRID, &profiles, 3.0);
        assert!(at.iter().all(|at| *at == 3));
    }

    proptest! {
        #[test]
        fn ranges_never_grow_along_a_chain(seed: u64, symmetric: bool) {
            let weights = Stream::new(seed).normals(3 * 1536);
            let grid = Grid { symmetric, ..GRID };
            let chain = nested("w", 1536, 32).unwrap();
            let profile = Profile::measure(&grid, &weights, 1536, &chain, false);
            for pair in profile.range.windows(2) {
                prop_assert!(pair[0] <= pair[1] * (1.0 + 1e-12));
            }
        }

        #[test]
        fn the_order_of_rows_does_not_matter(seed: u64) {
            let weights = Stream::new(seed).normals(6 * 64);
            let mut turned = weights.clone();
            turned.rotate_left(2 * 64);
            let (a, b) = (profile(&weights, 64), profile(&turned, 64));
            for (a, b) in a.error.iter().zip(&b.error) {
                prop_assert!((a - b).abs() < 1e-12);
            }
        }
    }
}
