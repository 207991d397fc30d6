//! One way of keeping each part of a model out of several, so that all together fit a budget and err least: the
//! multiple-choice knapsack.
//!
//! ```text
//! min sum_i error(i, j_i)   so that   sum_i cost(i, j_i) <= budget
//! ```
//!
//! Costs are whole numbers (bytes, bits), so that a budget is kept exactly. The solution has two halves. A Lagrangian one: with a
//! price `lambda` per unit of cost, every item takes the candidate of least `error + lambda cost`, which lies on the lower convex
//! hull of its candidates; walking the hulls' edges by falling slope until the budget is spent gives the right price, a good
//! choice, and a bound that no choice is below. A repair by dynamic programming: a choice whose items give up more than the gap
//! between that choice and the bound, at that price, cannot be better, which leaves few items undecided and few candidates
//! for them; among these every combination is looked at, worse ones dropped as soon as another has less cost and error. The
//! result is the optimum unless more combinations stay than are kept, and it says so (Pisinger 1995, *A minimal algorithm for the
//! multiple-choice knapsack problem*, has the same halves).

/// One way of keeping an item.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// What it takes of the budget.
    pub cost: u64,
    /// What it loses, in any unit that adds up over items; at least 0.
    pub error: f64,
}

/// A choice for every item.
#[derive(Clone, Debug, PartialEq)]
pub struct Allocation {
    /// The candidate of each item.
    pub chosen: Vec<usize>,
    /// What they cost together.
    pub cost: u64,
    /// What they lose together.
    pub error: f64,
    /// No choice within the budget loses less than this.
    pub bound: f64,
    /// Whether no choice within the budget loses less than this one.
    pub optimal: bool,
}

/// A budget below what the cheapest candidates cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreachable {
    /// What the cheapest candidates cost together.
    pub least: u64,
}

/// Combinations that are kept after each item.
const STATES: usize = 1 << 14;

/// Chooses a candidate for every item. Of candidates that are equal, the first is taken, so that the result is a function of
/// the arguments.
///
/// # Errors
/// A budget that the cheapest candidates exceed.
///
/// # Panics
/// An item without candidates, an error that is negative or not a number: bugs in the caller.
pub fn allocate(items: &[Vec<Candidate>], budget: u64) -> Result<Allocation, Unreachable> {
    let fronts: Vec<Vec<usize>> = items.iter().map(|item| front(item)).collect();
    let mut chosen: Vec<usize> = fronts.iter().map(|front| front[0]).collect();
    let least: u64 = items.iter().zip(&chosen).map(|(item, &at)| item[at].cost).sum();
    if least > budget {
        return Err(Unreachable { least });
    }
    let mut left = budget - least;
    let Some(price) = spend(items, &fronts, &mut chosen, &mut left) else {
        // Everything that is worth its cost fits.
        let (cost, error) = total(items, &chosen);
        return Ok(Allocation { chosen, cost, error, bound: error, optimal: true });
    };
    fill(items, &fronts, &mut chosen, &mut left);
    let (_, reached) = total(items, &chosen);
    let penalized = |candidate: &Candidate| candidate.error + price * candidate.cost as f64;
    let least: Vec<f64> = items
        .iter()
        .zip(&fronts)
        .map(|(item, front)| {
            front.iter().map(|&at| penalized(&item[at])).fold(f64::INFINITY, f64::min)
        })
        .collect();
    let bound = least.iter().sum::<f64>() - price * budget as f64;
    // What a better choice may give up at most; a little more, for the rounding of sums.
    let gap = reached - bound + 1e-12 * (reached + price * budget as f64);
    let core = Core { items, fronts: &fronts, least: &least, price, gap, budget };
    let (repaired, optimal) = core.search();
    if let Some(repaired) = repaired
        && total(items, &repaired).1 < reached
    {
        chosen = repaired;
    }
    let (cost, error) = total(items, &chosen);
    Ok(Allocation { chosen, cost, error, bound: bound.min(error), optimal })
}

fn total(items: &[Vec<Candidate>], chosen: &[usize]) -> (u64, f64) {
    let picked = || items.iter().zip(chosen).map(|(item, &at)| item[at]);
    (picked().map(|c| c.cost).sum(), picked().map(|c| c.error).sum())
}

/// Candidates that no other is at least as good as in both respects, by rising cost and falling error.
fn front(item: &[Candidate]) -> Vec<usize> {
    assert!(!item.is_empty(), "invariant: every item has a candidate");
    assert!(
        item.iter().all(|c| c.error >= 0.0 && c.error.is_finite()),
        "invariant: errors are numbers from 0"
    );
    let mut order: Vec<usize> = (0..item.len()).collect();
    order.sort_by(|&a, &b| {
        let (x, y) = (&item[a], &item[b]);
        x.cost.cmp(&y.cost).then(x.error.total_cmp(&y.error)).then(a.cmp(&b))
    });
    let mut kept: Vec<usize> = Vec::new();
    for at in order {
        if kept.last().is_none_or(|&last| item[at].error < item[last].error) {
            kept.push(at);
        }
    }
    kept
}

/// Error saved per unit of cost from one candidate to a dearer one.
fn slope(from: &Candidate, to: &Candidate) -> f64 {
    (from.error - to.error) / (to.cost - from.cost) as f64
}

/// The corners of the lower convex hull of a front: slopes fall from each to the next.
fn hull(item: &[Candidate], front: &[usize]) -> Vec<usize> {
    let mut corners: Vec<usize> = Vec::new();
    for &at in front {
        while let [.., before, last] = corners[..] {
            if slope(&item[before], &item[last]) > slope(&item[last], &item[at]) {
                break;
            }
            corners.pop();
        }
        corners.push(at);
    }
    corners
}

/// Walks the edges of all hulls by falling slope until one cannot be paid; its slope is the price of the budget. `None` when all
/// can be paid.
fn spend(
    items: &[Vec<Candidate>],
    fronts: &[Vec<usize>],
    chosen: &mut [usize],
    left: &mut u64,
) -> Option<f64> {
    let mut edges: Vec<(f64, usize, usize, u64)> = Vec::new();
    for (index, (item, front)) in items.iter().zip(fronts).enumerate() {
        for pair in hull(item, front).windows(2) {
            let (from, to) = (&item[pair[0]], &item[pair[1]]);
            edges.push((slope(from, to), index, pair[1], to.cost - from.cost));
        }
    }
    edges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.3.cmp(&b.3)));
    for (slope, index, to, cost) in edges {
        if cost > *left {
            return Some(slope);
        }
        *left -= cost;
        chosen[index] = to;
    }
    None
}

/// Takes, as long as one can be paid, the change of one item that saves most.
fn fill(items: &[Vec<Candidate>], fronts: &[Vec<usize>], chosen: &mut [usize], left: &mut u64) {
    loop {
        let mut best: Option<(f64, usize, usize)> = None;
        for (index, (item, front)) in items.iter().zip(fronts).enumerate() {
            let now = item[chosen[index]];
            for &at in front {
                let saved = now.error - item[at].error;
                if item[at].cost > now.cost
                    && item[at].cost - now.cost <= *left
                    && best.is_none_or(|(most, ..)| saved > most)
                {
                    best = Some((saved, index, at));
                }
            }
        }
        let Some((saved, index, at)) = best else { return };
        if saved <= 0.0 {
            return;
        }
        *left -= items[index][at].cost - items[index][chosen[index]].cost;
        chosen[index] = at;
    }
}

/// What the dynamic program works on.
struct Core<'a> {
    items: &'a [Vec<Candidate>],
    fronts: &'a [Vec<usize>],
    /// Least `error + price cost` of each item.
    least: &'a [f64],
    price: f64,
    gap: f64,
    budget: u64,
}

/// A combination of the items seen so far.
#[derive(Clone, Copy)]
struct State {
    cost: u64,
    error: f64,
    /// What it gives up against the least at the price.
    penalty: f64,
    /// The state that it extends, and the candidate.
    from: u32,
    candidate: u32,
}

impl Core<'_> {
    /// The best choice that gives up no more than the gap, and whether every such choice was looked at.
    fn search(&self) -> (Option<Vec<usize>>, bool) {
        // Undecided candidates of each item, and what each gives up.
        let mut open: Vec<(usize, Vec<(usize, f64)>)> = self
            .items
            .iter()
            .zip(self.fronts)
            .enumerate()
            .map(|(index, (item, front))| {
                let lost = |&at: &usize| {
                    let c = item[at];
                    (at, (c.error + self.price * c.cost as f64 - self.least[index]).max(0.0))
                };
                let open = front.iter().map(lost).filter(|(_, lost)| *lost <= self.gap).collect();
                (index, open)
            })
            .collect();
        // Decided items first, then those that cost least to decide otherwise: penalties grow late, when most states are gone.
        let second = |open: &[(usize, f64)]| {
            let mut lost: Vec<f64> = open.iter().map(|(_, lost)| *lost).collect();
            lost.sort_by(f64::total_cmp);
            lost.get(1).copied().unwrap_or(-1.0)
        };
        open.sort_by(|a, b| second(&a.1).total_cmp(&second(&b.1)).then(a.0.cmp(&b.0)));
        // The least that the items after each one cost.
        let mut after = vec![0u64; open.len() + 1];
        for (at, (index, candidates)) in open.iter().enumerate().rev() {
            let least = candidates.iter().map(|(c, _)| self.items[*index][*c].cost).min();
            after[at] = after[at + 1] + least.unwrap_or(0);
        }
        let start = State { cost: 0, error: 0.0, penalty: 0.0, from: 0, candidate: 0 };
        let (mut layers, mut optimal) = (vec![vec![start]], true);
        for (at, (index, candidates)) in open.iter().enumerate() {
            let states = layers.last().expect("invariant: there is a first layer");
            let mut next = Vec::with_capacity(states.len() * candidates.len());
            for (from, state) in states.iter().enumerate() {
                for &(candidate, lost) in candidates {
                    let Candidate { cost, error } = self.items[*index][candidate];
                    let state = State {
                        cost: state.cost + cost,
                        error: state.error + error,
                        penalty: state.penalty + lost,
                        from: from as u32,
                        candidate: candidate as u32,
                    };
                    if state.penalty <= self.gap && state.cost + after[at + 1] <= self.budget {
                        next.push(state);
                    }
                }
            }
            let mut next = undominated(next);
            if next.len() > STATES {
                optimal = false;
                next.sort_by(|a, b| a.penalty.total_cmp(&b.penalty).then(a.cost.cmp(&b.cost)));
                next.truncate(STATES);
            }
            layers.push(next);
        }
        let last = layers.last().expect("invariant: there is a first layer");
        let best = last.iter().min_by(|a, b| a.error.total_cmp(&b.error).then(a.cost.cmp(&b.cost)));
        let Some(best) = best else { return (None, optimal) };
        let (mut chosen, mut state) = (vec![0; self.items.len()], *best);
        for (at, (index, _)) in open.iter().enumerate().rev() {
            chosen[*index] = state.candidate as usize;
            state = layers[at][state.from as usize];
        }
        (Some(chosen), optimal)
    }
}

/// States that no other equals or beats in cost and error.
fn undominated(mut states: Vec<State>) -> Vec<State> {
    states.sort_by(|a, b| {
        let order = a.cost.cmp(&b.cost).then(a.error.total_cmp(&b.error));
        order.then(a.from.cmp(&b.from)).then(a.candidate.cmp(&b.candidate))
    });
    let mut least = f64::INFINITY;
    states.retain(|state| {
        let better = state.error < least;
        least = least.min(state.error);
        better
    });
    states
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::Stream;

    fn item(pairs: &[(u64, f64)]) -> Vec<Candidate> {
        pairs.iter().map(|&(cost, error)| Candidate { cost, error }).collect()
    }

    /// The least error of all combinations within a budget.
    fn brute(items: &[Vec<Candidate>], budget: u64) -> Option<f64> {
        let Some((first, rest)) = items.split_first() else { return Some(0.0) };
        first
            .iter()
            .filter(|c| c.cost <= budget)
            .filter_map(|c| Some(c.error + brute(rest, budget - c.cost)?))
            .min_by(f64::total_cmp)
    }

    /// Items as quantizers make them: errors fall about fourfold for every bit.
    fn like_models(count: usize, seed: u64) -> Vec<Vec<Candidate>> {
        let mut stream = Stream::new(seed);
        (0..count)
            .map(|_| {
                let rows = [192, 576, 1536][(stream.bits() % 3) as usize];
                let weight = f64::from(stream.normal()).exp();
                let mut all = Vec::new();
                for bits in 2..9u64 {
                    for groups in [1, 3, 9, 18] {
                        let noise = 0.8 + 0.2 * stream.uniform();
                        let finer = (groups as f64).powf(-0.3);
                        all.push(Candidate {
                            cost: rows * (72 * bits + 2 * groups),
                            error: weight * noise * finer * 0.25f64.powi(bits as i32),
                        });
                    }
                }
                all
            })
            .collect()
    }

    #[test]
    fn a_candidate_inside_the_hull_is_taken_where_only_it_fits() {
        // The hull goes straight from 0 to 10; 6 lies above it, and a budget of 9 leaves only that.
        let items = [item(&[(0, 10.0), (6, 6.0), (10, 0.0)])];
        let got = allocate(&items, 9).unwrap();
        assert_eq!((got.chosen, got.cost, got.optimal), (vec![1], 6, true));
        assert!((got.bound - 1.0).abs() < 1e-12, "{}", got.bound);
    }

    #[test]
    fn the_ends_are_exact() {
        let items = [item(&[(5, 2.0), (3, 4.0), (3, 5.0)]), item(&[(1, 1.0)])];
        assert_eq!(allocate(&items, 3), Err(Unreachable { least: 4 }));
        let least = allocate(&items, 4).unwrap();
        assert_eq!((least.chosen, least.cost), (vec![1, 0], 4));
        let most = allocate(&items, u64::MAX).unwrap();
        assert_eq!((most.chosen, most.cost, most.optimal), (vec![0, 0], 6, true));
        assert_eq!(allocate(&[], 0).unwrap().chosen, [0usize; 0]);
    }

    #[test]
    fn nothing_is_paid_for_nothing() {
        // Dearer candidates that save nothing, a straight line of candidates, and equals.
        let items = [
            item(&[(1, 3.0), (2, 3.0), (9, 3.0)]),
            item(&[(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.0)]),
            item(&[(2, 1.0), (2, 1.0)]),
        ];
        for budget in 4..20 {
            let got = allocate(&items, budget).unwrap();
            assert_eq!(got.chosen[0], 0);
            assert_eq!(got.chosen[2], 0);
            assert_eq!(got.cost, budget.min(7));
        }
    }

    #[test]
    fn whole_models_come_close_to_budget_and_bound() {
        let items = like_models(210, 7);
        let least: u64 = items.iter().map(|item| item.iter().map(|c| c.cost).min().unwrap()).sum();
        for share in [1.001, 1.05, 1.3, 1.55, 2.0, 3.0] {
            let budget = (least as f64 * share) as u64;
            let got = allocate(&items, budget).unwrap();
            assert!(
                got.cost <= budget && got.cost as f64 > 0.995 * budget as f64,
                "{share} {got:?}"
            );
            // Just above the least there is little to choose from: the bound of fractions is further away.
            let gap = if share < 1.01 { 1.005 } else { 1.0005 };
            assert!(got.error <= got.bound * gap, "{share}: {} {}", got.error, got.bound);
            assert_eq!(got, allocate(&items, budget).unwrap());
        }
    }

    #[test]
    fn more_budget_never_loses_more() {
        let items = like_models(12, 3);
        let mut last = f64::INFINITY;
        let least: u64 = items.iter().map(|item| item.iter().map(|c| c.cost).min().unwrap()).sum();
        for step in 0..60 {
            let got = allocate(&items, least + step * least / 20).unwrap();
            assert!(got.error <= last * (1.0 + 1e-12));
            last = got.error;
        }
    }

    fn small_items() -> impl Strategy<Value = Vec<Vec<Candidate>>> {
        let candidate = (0u64..30, 0u32..40)
            .prop_map(|(cost, error)| Candidate { cost, error: f64::from(error) });
        prop::collection::vec(prop::collection::vec(candidate, 1..6), 1..6)
    }

    proptest! {
        #[test]
        fn small_instances_are_solved_exactly(items in small_items(), budget in 0u64..120) {
            match (allocate(&items, budget), brute(&items, budget)) {
                (Ok(got), Some(best)) => {
                    prop_assert!(got.optimal);
                    prop_assert_eq!(got.error, best);
                    prop_assert!(got.cost <= budget);
                    prop_assert!(got.bound <= best + 1e-9);
                    let (cost, error) = total(&items, &got.chosen);
                    prop_assert_eq!((cost, error), (got.cost, got.error));
                }
                (Err(Unreachable { least }), None) => prop_assert!(least > budget),
                (got, best) => prop_assert!(false, "{:?} {:?}", got, best),
            }
        }

        #[test]
        fn errors_of_any_size_are_solved_too(seed: u64, share in 0f64..1.0) {
            let items: Vec<Vec<Candidate>> =
                like_models(5, seed).into_iter().map(|item| item.into_iter().step_by(6).collect()).collect();
            let ends = |pick: fn(u64, u64) -> u64| -> u64 {
                items.iter().map(|item| item.iter().map(|c| c.cost).reduce(pick).unwrap()).sum()
            };
            let budget = ends(u64::min) + (share * (ends(u64::max) - ends(u64::min)) as f64) as u64;
            let got = allocate(&items, budget).unwrap();
            let best = brute(&items, budget).unwrap();
            prop_assert!((got.error - best).abs() <= 1e-9 * best, "{} {}", got.error, best);
        }
    }
}
