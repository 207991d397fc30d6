//! Elements by rank, without sorting and without holding the tensor: two looks count where values lie
//! (upper, then lower half of their bits), a third numbers equal values where a cut falls between them.

use crate::error::Result;
use crate::merge::group::{Group, Piece};

/// A place in the ascending order of a tensor's values; equal values are in the order of their index.
#[derive(Clone, Debug, PartialEq)]
pub struct Cut {
    /// The value at the cut, as [`order`] maps it.
    value: u32,
    /// How many of the elements that equal it lie below the cut.
    skip: u64,
    /// How many equal elements lie in earlier pieces; empty when none is skipped.
    before: Vec<u64>,
}

impl Cut {
    /// The value of the element at the cut.
    pub fn value(&self) -> f32 {
        let bits = if self.value >> 31 == 1 { self.value ^ (1 << 31) } else { !self.value };
        f32::from_bits(bits)
    }

    /// Zeroes the changes whose value of piece `index` ranks at the cut or higher, or those below it.
    pub fn zero(&self, index: usize, keys: &[f32], above: bool, changes: &mut [f64]) {
        // Those that equal the cut are above it, unless some are skipped; they are seen to afterwards then. A select for every
        // element vectorizes, a store for some does not.
        let from = self.value + u32::from(self.skip > 0);
        match above {
            true => changes.iter_mut().zip(keys).for_each(|(change, key)| {
                *change = if order(*key) >= from { 0.0 } else { *change };
            }),
            false => changes.iter_mut().zip(keys).for_each(|(change, key)| {
                *change = if order(*key) < self.value { 0.0 } else { *change };
            }),
        }
        if self.skip == 0 {
            return;
        }
        let mut equal = self.before[index];
        for (change, key) in changes.iter_mut().zip(keys) {
            if order(*key) == self.value {
                if (equal >= self.skip) == above {
                    *change = 0.0;
                }
                equal += 1;
            }
        }
    }
}

/// Bits that sort as the values do.
fn order(value: f32) -> u32 {
    // Zero has two signs and one place.
    let bits = (value + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits ^ (1 << 31) }
}

/// The cuts at `ranks[channel]` of every channel's values; `keys(piece, channel)` gives them. Ranks count from 0 and
/// must be below the number of elements.
///
/// # Errors
/// As [`Group::scan`].
pub fn cuts(
    group: &Group,
    ranks: &[Vec<u64>],
    keys: impl Fn(&Piece, usize) -> Vec<f32> + Sync,
) -> Result<Vec<Vec<Cut>>> {
    let channels = ranks.len();
    let add = |total: &mut Vec<u32>, more: Vec<u32>| {
        total.iter_mut().zip(more).for_each(|(a, b)| *a += b);
    };
    let upper = group.tally(
        || vec![0u32; channels << 16],
        |counts, piece| {
            for (channel, counts) in counts.chunks_mut(1 << 16).enumerate() {
                if !ranks[channel].is_empty() {
                    keys(piece, channel)
                        .iter()
                        .for_each(|x| counts[(order(*x) >> 16) as usize] += 1);
                }
            }
        },
        add,
    )?;
    // The bucket of every cut, with the rank inside it.
    let wanted: Vec<(usize, u32, u64)> = ranks
        .iter()
        .enumerate()
        .flat_map(|(channel, ranks)| ranks.iter().map(move |rank| (channel, *rank)))
        .map(|(channel, rank)| {
            let (bucket, inside) = find(&upper[channel << 16..(channel + 1) << 16], rank);
            (channel, bucket, inside)
        })
        .collect();
    let lower = group.tally(
        || vec![0u32; wanted.len() << 16],
        |counts, piece| {
            let mut last: Option<(usize, Vec<f32>)> = None;
            for ((channel, bucket, _), counts) in wanted.iter().zip(counts.chunks_mut(1 << 16)) {
                if last.as_ref().is_none_or(|(of, _)| of != channel) {
                    last = Some((*channel, keys(piece, *channel)));
                }
                for key in last.iter().flat_map(|(_, values)| values) {
                    let key = order(*key);
                    if key >> 16 == *bucket {
                        counts[(key & 0xffff) as usize] += 1;
                    }
                }
            }
        },
        add,
    )?;
    let mut found: Vec<(usize, Cut)> = wanted
        .iter()
        .enumerate()
        .map(|(at, (channel, bucket, inside))| {
            let (low, skip) = find(&lower[at << 16..(at + 1) << 16], *inside);
            (*channel, Cut { value: bucket << 16 | low, skip, before: Vec::new() })
        })
        .collect();
    if found.iter().any(|(_, cut)| cut.skip > 0) {
        let equal = group.scan(|piece| -> Vec<u64> {
            let count = |(channel, cut): &(usize, Cut)| match cut.skip {
                0 => 0,
                _ => {
                    keys(piece, *channel).iter().filter(|x| order(**x) == cut.value).count() as u64
                }
            };
            found.iter().map(count).collect()
        })?;
        for (at, (_, cut)) in found.iter_mut().enumerate().filter(|(_, (_, cut))| cut.skip > 0) {
            let mut before = 0;
            for counts in &equal {
                cut.before.push(before);
                before += counts[at];
            }
        }
    }
    let mut all = vec![Vec::new(); channels];
    found.into_iter().for_each(|(channel, cut)| all[channel].push(cut));
    Ok(all)
}

/// The bucket that holds `rank`, and the rank inside it.
fn find(counts: &[u32], mut rank: u64) -> (u32, u64) {
    for (bucket, count) in counts.iter().enumerate() {
        match rank.checked_sub(u64::from(*count)) {
            Some(rest) => rank = rest,
            None => return (bucket as u32, rank),
        }
    }
    unreachable!("invariant: ranks are below the number of elements")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::testing::memory;
    use proptest::prelude::*;

    #[test]
    fn bits_sort_as_values() {
        let sorted =
            [f32::MIN, -1.0, -f32::MIN_POSITIVE, -0.0, 0.0, 1e-40, 0.5, 0.500_001, f32::MAX];
        assert!(sorted.windows(2).all(|pair| order(pair[0]) <= order(pair[1])));
        assert_eq!(order(-0.0), order(0.0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// A cut is what a stable sort says, with as many equal values as one likes.
        #[test]
        fn cuts_are_places_in_a_stable_sort(
            values in proptest::collection::vec((-6i8..6).prop_map(|x| f32::from(x) * 0.25), 1..300),
            at in any::<prop::sample::Index>(),
        ) {
            let rank = at.index(values.len());
            let shape = [values.len(), 1];
            let found = memory(std::slice::from_ref(&values), None, &shape, |group| {
                let cut = cuts(group, &[vec![rank as u64]], |piece, k| piece.inputs[k].to_vec())?;
                let cut = cut[0][0].clone();
                let keep = group.scan(|piece| {
                    // What zeroing the lower ones leaves, and what zeroing the higher ones takes.
                    let side = |above: bool| {
                        let mut changes = vec![1.0; piece.len()];
                        cut.zero(piece.index, piece.inputs[0], above, &mut changes);
                        changes.into_iter().map(move |change| (change == 0.0) == above)
                    };
                    let keep: Vec<bool> = side(false).collect();
                    assert!(side(true).eq(keep.iter().copied()));
                    keep
                })?;
                Ok((cut.value(), keep.concat()))
            });
            let mut order: Vec<usize> = (0..values.len()).collect();
            order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
            prop_assert_eq!(found.0, values[order[rank]]);
            let mut keep = vec![false; values.len()];
            order[rank..].iter().for_each(|i| keep[*i] = true);
            prop_assert_eq!(found.1, keep);
        }
    }
}
