//! The prune-and-grow loop of DSnoT on one matrix.
//!
//! Row `r` of a layer is expected to contribute `C_rj = W_rj s_j` through input `j`. What a mask takes
//! away, `e_r = sum of C_rj over pruned j`, is the row's expected error. Each swap brings back one
//! pruned weight `g` and drops one kept weight `p`, chosen so that `e_r + C_rp - C_rg` moves towards
//! zero and what is dropped matters least. No weight changes, and no row changes its count.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rayon::prelude::*;

use crate::prune::mask::{Mask, Pattern, RowMask};

/// What the refinement knows about the inputs of a matrix.
#[derive(Clone, Copy, Debug)]
pub struct InputStats<'a> {
    /// `s_j`: mean over sequences of the sum over tokens.
    pub sums: &'a [f32],
    /// `||x_j||`: root of the mean over sequences of the sum of squares.
    pub norms: &'a [f32],
    /// `v_j`: within-sequence variance.
    pub variances: &'a [f32],
}

/// How the refinement goes.
#[derive(Clone, Copy, Debug)]
pub struct RefineOptions {
    /// `T`: most swaps per row.
    pub max_cycle: usize,
    /// A row is done when `|e_r|` is no larger.
    pub epsilon: f32,
    /// `gamma`: how much the variance counts against growing.
    pub gamma: f32,
    /// A row is done when its error changes sign.
    pub same_sign: bool,
}

/// What the refinement did to a matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Refined {
    /// Swaps made.
    pub swaps: u64,
    /// Mean of `|e_r|` before.
    pub error_before: f64,
    /// Mean of `|e_r|` after.
    pub error_after: f64,
}

/// Refines `mask` of `weights` `[rows, inputs]`. `saliency` is the score that the mask came from: the
/// grouped pattern drops by it; unstructured patterns drop by Wanda's score, whatever the start was.
pub fn refine(
    weights: &[f32],
    stats: InputStats<'_>,
    saliency: &[f32],
    mask: &mut Mask,
    pattern: Pattern,
    options: RefineOptions,
) -> Refined {
    let (rows, inputs) = (mask.rows(), mask.columns());
    if rows == 0 || inputs == 0 {
        return Refined::default();
    }
    // v^gamma once per input; the common values need no power.
    let penalty = |variance: &f32| match options.gamma {
        0.0 => 1.0,
        1.0 => variance + 1e-12,
        gamma => (variance + 1e-12).powf(gamma),
    };
    let penalties: Vec<f32> = stats.variances.iter().map(penalty).collect();
    let scratch = || (Vec::new(), Vec::new());
    let per_row: Vec<(u64, f32, f32)> = mask
        .rows_mut()
        .zip(weights.par_chunks(inputs).zip(saliency.par_chunks(inputs)))
        .map_init(scratch, |(contribution, start), (mut mask, (weights, saliency))| {
            contribution.clear();
            contribution.extend(weights.iter().zip(stats.sums).map(|(w, s)| w * s));
            start.clear();
            start.extend((0..inputs).map(|j| mask.keeps(j)));
            let (contribution, start) = (&*contribution, &*start);
            let row = Row::new(weights, stats, &penalties, contribution, start, options);
            match pattern {
                Pattern::Grouped { of, .. } => row.refine_grouped(&mut mask, saliency, of),
                _ => row.refine(&mut mask),
            }
        })
        .collect();
    let mean = |pick: fn(&(u64, f32, f32)) -> f32| {
        per_row.iter().map(|row| f64::from(pick(row).abs())).sum::<f64>() / rows as f64
    };
    Refined {
        swaps: per_row.iter().map(|row| row.0).sum(),
        error_before: mean(|row| row.1),
        error_after: mean(|row| row.2),
    }
}

/// Candidates of a row, best first. Keys are not negative, so their bits order as they do; the index breaks ties. A row makes
/// few swaps and looks at few candidates: a heap is linear to build and pays for those alone.
struct Queue(BinaryHeap<Reverse<u64>>);

impl Queue {
    fn of(candidates: impl Iterator<Item = (usize, u32)>) -> Self {
        let keyed = candidates.map(|(j, key)| Reverse(u64::from(key) << 32 | j as u64));
        Self(keyed.collect::<Vec<_>>().into())
    }

    fn peek(&self) -> Option<usize> {
        self.0.peek().map(|Reverse(keyed)| (keyed & 0xffff_ffff) as usize)
    }

    fn pop(&mut self) {
        self.0.pop();
    }
}

/// One row before its swaps.
struct Row<'a> {
    weights: &'a [f32],
    stats: InputStats<'a>,
    /// `v_j^gamma`.
    penalties: &'a [f32],
    /// `C_rj`.
    contribution: &'a [f32],
    /// Which inputs the mask kept at the start: the candidates of every queue are fixed there.
    start: &'a [bool],
    /// `e_r`.
    error: f32,
    options: RefineOptions,
}

/// Index of the queue with positive and negative contributions.
const POSITIVE: usize = 0;
const NEGATIVE: usize = 1;

impl<'a> Row<'a> {
    fn new(
        weights: &'a [f32],
        stats: InputStats<'a>,
        penalties: &'a [f32],
        contribution: &'a [f32],
        start: &'a [bool],
        options: RefineOptions,
    ) -> Self {
        let removed = contribution.iter().zip(start).filter(|(_, kept)| !**kept);
        let error: f64 = removed.map(|(c, _)| f64::from(*c)).sum();
        Self { weights, stats, penalties, contribution, start, error: error as f32, options }
    }

    /// Inputs of one state and sign.
    fn side(&self, kept: bool, sign: usize) -> impl Iterator<Item = usize> {
        let wanted = move |c: f32| if sign == POSITIVE { c > 0.0 } else { c < 0.0 };
        let all = self.contribution.iter().zip(self.start).enumerate();
        all.filter(move |(_, (c, at))| **at == kept && wanted(**c)).map(|(j, _)| j)
    }

    /// What to bring back, the most useful first.
    fn grow(&self, sign: usize) -> Queue {
        let key = |j: usize| !(self.contribution[j].abs() / self.penalties[j]).to_bits();
        Queue::of(self.side(false, sign).map(|j| (j, key(j))))
    }

    /// What to drop, the least important first.
    fn cut(&self, sign: usize) -> Queue {
        let key = |j: usize| (self.weights[j].abs() * self.stats.norms[j]).to_bits();
        Queue::of(self.side(true, sign).map(|j| (j, key(j))))
    }

    /// Whether the row is still off by more than is tolerated.
    fn is_off(&self, now: f32) -> bool {
        now.abs() > self.options.epsilon
    }

    /// Whether a swap would carry the error past zero.
    fn overshoots(&self, after: f32) -> bool {
        after.signum() != self.error.signum()
    }

    /// Swaps made, error before, error after.
    fn refine(self, mask: &mut RowMask<'_>) -> (u64, f32, f32) {
        // Made when they are first asked for: a row that keeps its sign needs half of them.
        let (mut grow, mut cut) = ([None, None], [None, None]);
        let (mut now, mut swaps) = (self.error, 0);
        while swaps < self.options.max_cycle as u64 && self.is_off(now) {
            // Too much positive contribution is missing: bring some back, and drop a negative one.
            let (from, to) = if now > 0.0 { (POSITIVE, NEGATIVE) } else { (NEGATIVE, POSITIVE) };
            let grow = grow[from].get_or_insert_with(|| self.grow(from));
            let cut = cut[to].get_or_insert_with(|| self.cut(to));
            let (Some(g), Some(p)) = (grow.peek(), cut.peek()) else { break };
            let after = now + self.contribution[p] - self.contribution[g];
            if self.options.same_sign && self.overshoots(after) {
                break;
            }
            grow.pop();
            cut.pop();
            mask.set(g, true);
            mask.set(p, false);
            now = after;
            swaps += 1;
        }
        (swaps, self.error, now)
    }

    /// The same for `N:M`: the weight dropped is the least salient kept one of the group that grows,
    /// whatever its sign, and the error must keep its sign.
    fn refine_grouped(
        self,
        mask: &mut RowMask<'_>,
        saliency: &[f32],
        of: usize,
    ) -> (u64, f32, f32) {
        let mut saliency = saliency.to_vec();
        let mut grow = [None, None];
        let (mut now, mut swaps) = (self.error, 0);
        for _ in 0..self.options.max_cycle {
            let from = if now > 0.0 { POSITIVE } else { NEGATIVE };
            let queue = grow[from].get_or_insert_with(|| self.grow(from));
            let Some(g) = queue.peek().filter(|_| self.is_off(now)) else { break };
            queue.pop();
            let group = g / of * of..g / of * of + of;
            let kept = group.filter(|&j| mask.keeps(j) && saliency[j] < f32::INFINITY);
            let least = kept.min_by(|&a, &b| saliency[a].total_cmp(&saliency[b]).then(a.cmp(&b)));
            let Some(p) = least else { continue };
            let after = now + self.contribution[p] - self.contribution[g];
            if self.overshoots(after) {
                break;
            }
            // What was brought back is never dropped again.
            saliency[g] = f32::INFINITY;
            mask.set(g, true);
            mask.set(p, false);
            now = after;
            swaps += 1;
        }
        (swaps, self.error, now)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::prune::mask::select;
    use crate::prune::saliency;
    use crate::testing::Stream;

    const OPTIONS: RefineOptions =
        RefineOptions { max_cycle: 50, epsilon: 0.1, gamma: 1.0, same_sign: true };

    struct Layer {
        weights: Vec<f32>,
        sums: Vec<f32>,
        norms: Vec<f32>,
        variances: Vec<f32>,
    }

    impl Layer {
        fn random(rows: usize, inputs: usize, seed: u64) -> Self {
            let mut stream = Stream::new(seed);
            Self {
                weights: stream.normals(rows * inputs),
                sums: stream.normals(inputs).iter().map(|s| 3.0 * s).collect(),
                norms: stream.normals(inputs).iter().map(|s| s.abs() + 0.1).collect(),
                variances: stream.normals(inputs).iter().map(|s| s.abs()).collect(),
            }
        }

        fn stats(&self) -> InputStats<'_> {
            InputStats { sums: &self.sums, norms: &self.norms, variances: &self.variances }
        }

        fn start(&self, pattern: Pattern, sparsity: f64) -> (Vec<f32>, Mask) {
            let scores = saliency::wanda(&self.weights, &self.norms);
            let mask = select(&scores, self.norms.len(), pattern, sparsity);
            (scores, mask)
        }
    }

    #[test]
    fn a_row_worked_out_by_hand() {
        let run = |weights: &[f32; 4], same_sign| {
            let stats = InputStats { sums: &[1.0; 4], norms: &[1.0; 4], variances: &[1.0; 4] };
            let mut mask = Mask::dense(1, 4);
            mask.set(0, 0, false);
            mask.set(0, 1, false);
            let options = RefineOptions { same_sign, ..OPTIONS };
            let done = refine(weights, stats, &[0.0; 4], &mut mask, Pattern::Row, options);
            let kept: Vec<bool> = (0..4).map(|j| mask.keeps(0, j)).collect();
            (done.swaps, done.error_before, done.error_after, kept)
        };
        // C = [2, 1, 2, -0.5], {0, 1} pruned: e = 3. Bring back 0, drop 3: e = 3 - 0.5 - 2 = 0.5. Bring
        // back 1, but nothing negative is left to drop: done.
        let expected = (1, 3.0, 0.5, vec![true, false, true, false]);
        assert_eq!(run(&[2.0, 1.0, 2.0, -0.5], true), expected);
        // C = [4, -1, 2, -3]: e = 3, and bringing back 0 for 3 would make it -4: not done.
        let weights = [4.0, -1.0, 2.0, -3.0];
        assert_eq!(run(&weights, true), (0, 3.0, 3.0, vec![false, false, true, true]));
        // Without the sign stop it is done, and walked back with 1 for 2: e = -4 + 2 + 1 = -1.
        assert_eq!(run(&weights, false), (2, 3.0, 1.0, vec![true, true, false, false]));
    }

    #[test]
    fn variance_breaks_the_order_of_growing() {
        // Both would help; the steadier input is taken first.
        let weights = [1.0, 1.1, -0.1, -5.0];
        let stats =
            InputStats { sums: &[1.0; 4], norms: &[1.0; 4], variances: &[0.5, 4.0, 1.0, 1.0] };
        let grown = |gamma| {
            let mut mask = Mask::dense(1, 4);
            mask.set(0, 0, false);
            mask.set(0, 1, false);
            let options = RefineOptions { gamma, max_cycle: 1, ..OPTIONS };
            refine(&weights, stats, &[0.0; 4], &mut mask, Pattern::Row, options);
            (mask.keeps(0, 0), mask.keeps(0, 1))
        };
        assert_eq!(grown(1.0), (true, false));
        assert_eq!(grown(0.0), (false, true));
    }

    #[test]
    fn no_cycle_or_no_patience_is_the_start() {
        let layer = Layer::random(10, 64, 1);
        for pattern in [Pattern::Row, "2:4".parse().unwrap()] {
            let (scores, start) = layer.start(pattern, 0.6);
            for options in [
                RefineOptions { max_cycle: 0, ..OPTIONS },
                RefineOptions { epsilon: f32::INFINITY, ..OPTIONS },
            ] {
                let mut mask = start.clone();
                let done =
                    refine(&layer.weights, layer.stats(), &scores, &mut mask, pattern, options);
                assert_eq!((done.swaps, &mask), (0, &start));
            }
        }
    }

    #[test]
    fn inputs_that_never_move_are_never_useful() {
        let mut layer = Layer::random(4, 32, 2);
        layer.sums.fill(0.0);
        let (scores, start) = layer.start(Pattern::Row, 0.5);
        let mut mask = start.clone();
        refine(&layer.weights, layer.stats(), &scores, &mut mask, Pattern::Row, OPTIONS);
        assert_eq!(mask, start);
    }

    proptest! {
        #[test]
        fn counts_never_change_and_errors_fall(
            seed: u64, sparsity in 0f64..0.95, same_sign: bool, cycles in 0usize..60
        ) {
            let (rows, inputs) = (6, 96);
            let layer = Layer::random(rows, inputs, seed);
            let options = RefineOptions { same_sign, max_cycle: cycles, ..OPTIONS };
            let (scores, start) = layer.start(Pattern::Row, sparsity);
            let mut mask = start.clone();
            refine(&layer.weights, layer.stats(), &scores, &mut mask, Pattern::Row, options);
            for row in 0..rows {
                prop_assert_eq!(mask.pruned_in_row(row), start.pruned_in_row(row));
            }
            let grouped: Pattern = "2:4".parse().unwrap();
            let (scores, start) = layer.start(grouped, 0.5);
            let mut mask = start.clone();
            let done = refine(&layer.weights, layer.stats(), &scores, &mut mask, grouped, options);
            prop_assert_eq!(mask.kept(), start.kept());
            prop_assert_eq!(mask.violations(2, 4), 0);
            prop_assert!(done.error_after.is_finite());
        }

        #[test]
        fn with_the_sign_stop_no_swap_raises_the_error(seed: u64) {
            let layer = Layer::random(1, 128, seed);
            let (scores, start) = layer.start(Pattern::Row, 0.5);
            let error = |mask: &Mask| -> f32 {
                (0..128).filter(|j| !mask.keeps(0, *j))
                    .map(|j| layer.weights[j] * layer.sums[j]).sum()
            };
            let mut last = error(&start);
            for max_cycle in 1..20 {
                let mut mask = start.clone();
                let options = RefineOptions { max_cycle, ..OPTIONS };
                refine(&layer.weights, layer.stats(), &scores, &mut mask, Pattern::Row, options);
                let now = error(&mask);
                prop_assert!(now.abs() <= last.abs() + 1e-4);
                last = now;
            }
        }
    }
}
