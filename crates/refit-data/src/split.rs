//! Deterministic splits that leak nothing: equal records always land on the same
//! side, and the same seed gives the same split for ever (see [`crate::rng`]).

use crate::rng::{Rng, hash};
use crate::{Error, Result};
use std::collections::HashMap;

/// Indices of each part, in ascending order.
pub type Parts = Vec<Vec<usize>>;

/// Splits by content alone: the part of a record is decided by the hash of its
/// key and the seed. Records that are added or removed never move others; the
/// parts have the asked sizes only on average.
///
/// # Errors
/// Fractions that are not positive or do not sum to 1.
pub fn by_content<K: AsRef<[u8]>>(keys: &[K], fractions: &[f64], seed: u64) -> Result<Parts> {
    let bounds = bounds(fractions)?;
    let mut parts = vec![Vec::new(); fractions.len()];
    for (i, key) in keys.iter().enumerate() {
        let at = (hash(seed, key.as_ref()) >> 11) as f64 / (1u64 << 53) as f64;
        let part = bounds.iter().position(|b| at < *b).unwrap_or(fractions.len() - 1);
        parts[part].push(i);
    }
    Ok(parts)
}

/// Splits a shuffled list: the parts have the asked sizes, rounded. Records with
/// equal keys stay together, so sizes are off by up to the largest group.
///
/// # Errors
/// Fractions that are not positive or do not sum to 1, or a part that would be
/// empty.
pub fn by_index<K: AsRef<[u8]>>(keys: &[K], fractions: &[f64], seed: u64) -> Result<Parts> {
    let bounds = bounds(fractions)?;
    let mut group_of: HashMap<&[u8], usize> = HashMap::new();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (i, key) in keys.iter().enumerate() {
        let group = *group_of.entry(key.as_ref()).or_insert_with(|| {
            groups.push(Vec::new());
            groups.len() - 1
        });
        groups[group].push(i);
    }
    Rng::named(seed, "split").shuffle(&mut groups);
    let mut parts = vec![Vec::new(); fractions.len()];
    let (mut part, mut done) = (0, 0);
    for group in groups {
        // The next part begins where its bound lies nearest.
        while part + 1 < bounds.len()
            && done as f64 + group.len() as f64 / 2.0 > bounds[part] * keys.len() as f64
        {
            part += 1;
        }
        done += group.len();
        parts[part].extend(group);
    }
    if let Some(empty) = parts.iter().position(Vec::is_empty) {
        let message = format!(
            "{} records are too few to split {fractions:?}: part {} would be empty",
            keys.len(),
            empty + 1
        );
        return Err(Error::Invalid(message));
    }
    parts.iter_mut().for_each(|part| part.sort_unstable());
    Ok(parts)
}

/// Cumulative sums of `fractions`.
fn bounds(fractions: &[f64]) -> Result<Vec<f64>> {
    let sum: f64 = fractions.iter().sum();
    if fractions.is_empty() || (sum - 1.0).abs() > 1e-6 || !fractions.iter().all(|f| *f > 0.0) {
        let message = format!(
            "fractions {fractions:?} must be positive and sum to 1, for example [0.8, 0.1, 0.1]"
        );
        return Err(Error::Invalid(message));
    }
    let mut total = 0.0;
    Ok(fractions
        .iter()
        .map(|f| {
            total += f;
            total
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn a_split_never_changes() {
        let keys: Vec<String> = (0..10).map(|i| format!("record {i}")).collect();
        let content = by_content(&keys, &[0.5, 0.5], 1).unwrap();
        let index = by_index(&keys, &[0.7, 0.3], 1).unwrap();
        assert_eq!((content, index), frozen());
    }

    fn frozen() -> (Parts, Parts) {
        (
            vec![vec![0, 1, 4], vec![2, 3, 5, 6, 7, 8, 9]],
            vec![vec![2, 3, 4, 5, 6, 8, 9], vec![0, 1, 7]],
        )
    }

    #[test]
    fn fractions_are_checked() {
        for bad in [&[][..], &[0.5, 0.4], &[1.5, -0.5], &[f64::NAN, 1.0]] {
            assert!(by_content(&["a"], bad, 0).is_err(), "{bad:?}");
        }
        let error = by_index(&["a", "a"], &[0.5, 0.5], 0).unwrap_err().to_string();
        assert!(error.contains("too few"), "{error}");
    }

    proptest! {
        #[test]
        fn parts_are_whole_disjoint_and_leak_nothing(
            keys in proptest::collection::vec("[a-e]{1,2}", 1..80), seed: u64
        ) {
            for parts in [by_content(&keys, &[0.6, 0.2, 0.2], seed), by_index(&keys, &[0.6, 0.2, 0.2], seed)] {
                let Ok(parts) = parts else { continue };
                let mut all = parts.concat();
                all.sort_unstable();
                prop_assert_eq!(all, (0..keys.len()).collect::<Vec<_>>());
                let texts: Vec<HashSet<&str>> = parts.iter().map(|p| p.iter().map(|i| &keys[*i][..]).collect()).collect();
                prop_assert!(texts[0].is_disjoint(&texts[1]) && texts[0].is_disjoint(&texts[2]) && texts[1].is_disjoint(&texts[2]));
            }
        }

        #[test]
        fn sizes_are_right_without_duplicates(n in 20usize..300, seed: u64) {
            let keys: Vec<String> = (0..n).map(|i| i.to_string()).collect();
            let parts = by_index(&keys, &[0.75, 0.25], seed).unwrap();
            prop_assert!((parts[0].len() as f64 - 0.75 * n as f64).abs() <= 1.0);
        }
    }
}
