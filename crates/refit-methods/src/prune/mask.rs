//! Which weights stay: a bit per weight, chosen by exact counts.
//!
//! Weights that come from a quantized file tie everywhere, so a rule such as `score <= threshold`
//! prunes more than was asked. Every choice here is a *count*: the smallest scores first, and among
//! equal scores the lower index first.

use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Which weights compete with each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pattern {
    /// Those of an output row: every row loses the same number.
    #[default]
    Row,
    /// Those of a matrix.
    Tensor,
    /// Those of all matrices.
    Global,
    /// Those of `of` consecutive inputs of a row: `pruned` of every `of` go. `2:4` reads the same
    /// whether one counts zeros or non-zeros; elsewhere the first number counts the zeros.
    Grouped {
        /// How many of each group go.
        pruned: usize,
        /// Length of a group.
        of: usize,
    },
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Row => f.write_str("row"),
            Self::Tensor => f.write_str("tensor"),
            Self::Global => f.write_str("global"),
            Self::Grouped { pruned, of } => write!(f, "{pruned}:{of}"),
        }
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}` is no pattern: expected row, tensor, global, or N:M such as 2:4 (N < M)"
            )
        };
        match text {
            "row" => Ok(Self::Row),
            "tensor" => Ok(Self::Tensor),
            "global" => Ok(Self::Global),
            grouped => {
                let (pruned, of) = grouped.split_once(':').ok_or_else(wrong)?;
                let number = |digits: &str| digits.parse().map_err(|_| wrong());
                let (pruned, of) = (number(pruned)?, number(of)?);
                if pruned == 0 || pruned >= of {
                    Err(wrong())
                } else {
                    Ok(Self::Grouped { pruned, of })
                }
            }
        }
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Pattern {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Pattern".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^(row|tensor|global|[0-9]+:[0-9]+)$" })
    }
}

/// A bit per weight of a matrix; 1 means that the weight stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    rows: usize,
    columns: usize,
    /// Rows start on a word, so that threads can share a mask row by row.
    words: Vec<u64>,
}

impl Mask {
    /// A mask that keeps everything.
    pub fn dense(rows: usize, columns: usize) -> Self {
        let mut mask = Self { rows, columns, words: vec![u64::MAX; rows * columns.div_ceil(64)] };
        if !columns.is_multiple_of(64) {
            for row in mask.words.chunks_mut(columns.div_ceil(64)) {
                row[columns / 64] = (1 << (columns % 64)) - 1;
            }
        }
        mask
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Weights per row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Whether a weight stays.
    pub fn keeps(&self, row: usize, column: usize) -> bool {
        assert!(column < self.columns, "column {column} of {}", self.columns);
        let stride = self.columns.div_ceil(64);
        self.words[row * stride + column / 64] >> (column % 64) & 1 == 1
    }

    /// Sets whether a weight stays.
    pub fn set(&mut self, row: usize, column: usize, keep: bool) {
        let stride = self.columns.div_ceil(64);
        RowMask { words: &mut self.words[row * stride..(row + 1) * stride] }.set(column, keep);
    }

    /// The rows, each to be changed by one thread.
    pub fn rows_mut(&mut self) -> impl IndexedParallelIterator<Item = RowMask<'_>> {
        let stride = self.columns.div_ceil(64).max(1);
        self.words.par_chunks_mut(stride).map(|words| RowMask { words })
    }

    /// How many weights stay.
    pub fn kept(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// How many weights of a row go.
    pub fn pruned_in_row(&self, row: usize) -> usize {
        let stride = self.columns.div_ceil(64);
        let words = &self.words[row * stride..(row + 1) * stride];
        self.columns - words.iter().map(|word| word.count_ones() as usize).sum::<usize>()
    }

    /// Share of weights that go.
    pub fn sparsity(&self) -> f64 {
        1.0 - self.kept() as f64 / (self.rows * self.columns).max(1) as f64
    }

    /// Whether every weight kept here is kept there.
    pub fn is_within(&self, other: &Self) -> bool {
        (self.rows, self.columns) == (other.rows, other.columns)
            && self.words.iter().zip(&other.words).all(|(a, b)| a & !b == 0)
    }

    /// Groups of `of` inputs that lose fewer than `pruned`.
    pub fn violations(&self, pruned: usize, of: usize) -> usize {
        (0..self.rows)
            .flat_map(|row| (0..self.columns / of).map(move |group| (row, group)))
            .filter(|&(row, group)| {
                (0..of).filter(|k| !self.keeps(row, group * of + k)).count() < pruned
            })
            .count()
    }

    /// Zeroes what goes; what stays keeps its bits.
    pub fn apply(&self, weights: &mut [f32]) {
        assert_eq!(weights.len(), self.rows * self.columns, "mask and weights differ in size");
        let stride = self.columns.div_ceil(64);
        if self.columns == 0 {
            return;
        }
        weights.par_chunks_mut(self.columns).zip(self.words.par_chunks(stride)).for_each(
            |(row, words)| {
                for (chunk, word) in row.chunks_mut(64).zip(words) {
                    for (bit, weight) in chunk.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *weight = 0.0;
                        }
                    }
                }
            },
        );
    }

    /// As stored: one bit per weight, rows padded to whole bytes, lowest bit first; shape
    /// `[rows, ceil(columns / 8)]`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let (stride, width) = (self.columns.div_ceil(64), self.columns.div_ceil(8));
        let row = |words: &[u64]| {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes[..width].to_vec()
        };
        self.words.chunks(stride.max(1)).flat_map(row).collect()
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote; `None` when the length does not fit.
    pub fn from_bytes(rows: usize, columns: usize, bytes: &[u8]) -> Option<Self> {
        let width = columns.div_ceil(8);
        if bytes.len() != rows * width {
            return None;
        }
        let mut words = Vec::with_capacity(rows * columns.div_ceil(64));
        for row in bytes.chunks(width.max(1)) {
            for chunk in row.chunks(8) {
                let mut word = [0; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                words.push(u64::from_le_bytes(word));
            }
        }
        let mask = Self { rows, columns, words };
        // Bits beyond the last column must be clear, or counts would lie.
        mask.is_within(&Self::dense(rows, columns)).then_some(mask)
    }
}

/// One row of a [`Mask`].
#[derive(Debug)]
pub struct RowMask<'a> {
    words: &'a mut [u64],
}

impl RowMask<'_> {
    /// Whether a weight stays.
    pub fn keeps(&self, column: usize) -> bool {
        self.words[column / 64] >> (column % 64) & 1 == 1
    }

    /// Sets whether a weight stays.
    pub fn set(&mut self, column: usize, keep: bool) {
        let (word, bit) = (&mut self.words[column / 64], 1 << (column % 64));
        if keep { *word |= bit } else { *word &= !bit }
    }
}

/// How many of `count` weights a sparsity prunes: the reference's `int(count * sparsity)`, with a
/// guard against products such as `0.6 * 5 = 2.9999...`.
pub fn pruned_count(count: usize, sparsity: f64) -> usize {
    ((count as f64 * sparsity + 1e-9) as usize).min(count)
}

/// Indices of the `count` smallest scores, in no order; equal scores go by index.
pub fn smallest(scores: &[f32], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    if count == 0 {
        return Vec::new();
    }
    if count < order.len() {
        order.select_nth_unstable_by(count - 1, |&a, &b| {
            scores[a as usize].total_cmp(&scores[b as usize]).then(a.cmp(&b))
        });
        order.truncate(count);
    }
    order
}

/// The mask of a matrix of scores `[rows, columns]` under a pattern within one matrix.
/// [`Pattern::Global`] is treated as [`Pattern::Tensor`]; a threshold over all matrices is found by
/// [`GlobalThreshold`].
///
/// # Panics
/// When a grouped pattern does not divide a row: callers check that first.
pub fn select(scores: &[f32], columns: usize, pattern: Pattern, sparsity: f64) -> Mask {
    let rows = scores.len() / columns.max(1);
    let mut mask = Mask::dense(rows, columns);
    match pattern {
        Pattern::Tensor | Pattern::Global => {
            for index in smallest(scores, pruned_count(scores.len(), sparsity)) {
                mask.set(index as usize / columns, index as usize % columns, false);
            }
        }
        Pattern::Row => {
            let count = pruned_count(columns, sparsity);
            mask.rows_mut().zip(scores.par_chunks(columns)).for_each(|(mut mask, scores)| {
                for column in smallest(scores, count) {
                    mask.set(column as usize, false);
                }
            });
        }
        Pattern::Grouped { pruned, of } => {
            assert!(columns.is_multiple_of(of), "{columns} inputs are not groups of {of}");
            mask.rows_mut().zip(scores.par_chunks(columns)).for_each(|(mut mask, scores)| {
                for (group, scores) in scores.chunks(of).enumerate() {
                    for column in smallest(scores, pruned) {
                        mask.set(group * of + column as usize, false);
                    }
                }
            });
        }
    }
    mask
}

/// The exact threshold over any number of matrices of non-negative scores, found in two passes
/// over them with a fixed amount of memory: a histogram of the upper 16 bits of the scores (which
/// order non-negative floats), then one of the lower 16 bits within the bucket that holds the rank.
#[derive(Clone, Debug)]
pub struct GlobalThreshold {
    counts: Vec<u64>,
    /// Set after the first pass: the bucket, and how many scores of it go.
    bucket: Option<(u32, u64)>,
}

/// What goes under a global threshold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Threshold {
    /// Scores below this go.
    pub value: f32,
    /// How many of the scores equal to `value` go, the first ones in reading order.
    pub ties: u64,
}

impl Default for GlobalThreshold {
    fn default() -> Self {
        Self { counts: vec![0; 1 << 16], bucket: None }
    }
}

impl GlobalThreshold {
    /// Counts scores; call for every matrix in each of the two passes.
    pub fn count(&mut self, scores: &[f32]) {
        for score in scores {
            let bits = score.abs().to_bits();
            match self.bucket {
                None => self.counts[(bits >> 16) as usize] += 1,
                Some((bucket, _)) if bits >> 16 == bucket => {
                    self.counts[(bits & 0xffff) as usize] += 1;
                }
                Some(_) => {}
            }
        }
    }

    /// Ends the first pass: `pruned` scores go.
    pub fn narrow(&mut self, pruned: u64) {
        let (bucket, rest) = rank(&self.counts, pruned);
        self.bucket = Some((bucket, rest));
        self.counts.fill(0);
    }

    /// Ends the second pass.
    pub fn finish(&self) -> Threshold {
        let (bucket, pruned) = self.bucket.expect("invariant: narrow() is called between passes");
        let (low, ties) = rank(&self.counts, pruned);
        Threshold { value: f32::from_bits(bucket << 16 | low), ties }
    }
}

/// The bucket that holds the score of that rank, and how many of its scores lie within the rank.
fn rank(counts: &[u64], pruned: u64) -> (u32, u64) {
    let mut rest = pruned;
    for (bucket, &count) in counts.iter().enumerate() {
        if rest <= count {
            return (bucket as u32, rest);
        }
        rest -= count;
    }
    (counts.len() as u32 - 1, rest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::Stream;

    #[test]
    fn ties_go_by_index_and_counts_are_exact() {
        let mask = select(&[1.0; 8], 4, Pattern::Row, 0.5);
        for row in 0..2 {
            let kept: Vec<bool> = (0..4).map(|column| mask.keeps(row, column)).collect();
            assert_eq!(kept, [false, false, true, true]);
        }
        assert_eq!(pruned_count(5, 0.6), 3);
        assert_eq!(pruned_count(576, 0.6), 345);
    }

    #[test]
    fn grouped_patterns_hold_in_every_group() {
        let scores = Stream::new(1).normals(16 * 64);
        let mask = select(&scores, 64, "2:4".parse().unwrap(), 0.0);
        assert_eq!(mask.violations(2, 4), 0);
        assert_eq!(mask.kept(), 16 * 32);
        for text in ["4:2", "0:4", "2", "a:b", "-1:4", "4:4"] {
            assert!(text.parse::<Pattern>().is_err(), "{text}");
        }
    }

    #[test]
    fn zeroing_keeps_the_other_bits() {
        let weights = Stream::new(2).normals(3 * 70);
        let mask = select(&weights, 70, Pattern::Row, 0.3);
        let mut masked = weights.clone();
        mask.apply(&mut masked);
        for (index, (before, after)) in weights.iter().zip(&masked).enumerate() {
            let expected = if mask.keeps(index / 70, index % 70) { *before } else { 0.0 };
            assert_eq!(expected.to_bits(), after.to_bits());
        }
    }

    #[test]
    fn a_global_threshold_is_the_exact_rank() {
        let mut scores: Vec<f32> = Stream::new(3).normals(5000).iter().map(|w| w.abs()).collect();
        for index in (0..5000).step_by(3) {
            scores[index] = 0.25; // many ties
        }
        for pruned in [0, 1, 700, 2500, 5000] {
            let mut threshold = GlobalThreshold::default();
            threshold.count(&scores[..1234]);
            threshold.count(&scores[1234..]);
            threshold.narrow(pruned);
            threshold.count(&scores);
            let Threshold { value, ties } = threshold.finish();
            let below = scores.iter().filter(|s| **s < value).count() as u64;
            assert_eq!(below + ties, pruned);
            let equal = scores.iter().filter(|s| **s == value).count() as u64;
            assert!(ties <= equal);
        }
    }

    proptest! {
        #[test]
        fn bytes_round_trip(rows in 0usize..5, columns in 1usize..200, seed: u64) {
            let scores = Stream::new(seed).normals(rows * columns);
            let mask = select(&scores, columns, Pattern::Tensor, 0.4);
            let bytes = mask.to_bytes();
            prop_assert_eq!(bytes.len(), rows * columns.div_ceil(8));
            prop_assert_eq!(Mask::from_bytes(rows, columns, &bytes), Some(mask));
        }

        #[test]
        fn the_smallest_are_the_smallest(
            scores in prop::collection::vec(0u8..6, 1..60), share in 0f64..1.0
        ) {
            let scores: Vec<f32> = scores.into_iter().map(f32::from).collect();
            let count = pruned_count(scores.len(), share);
            let mut chosen = smallest(&scores, count);
            chosen.sort_unstable();
            let mut order: Vec<u32> = (0..scores.len() as u32).collect();
            order.sort_by(|a, b| scores[*a as usize].total_cmp(&scores[*b as usize]));
            let mut expected = order[..count].to_vec();
            expected.sort_unstable();
            prop_assert_eq!(chosen, expected);
        }
    }
}
