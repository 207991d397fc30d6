//! What the values of an artifact say about it: broken numbers, empty rows, element types, and grids that an
//! earlier quantization left behind.

use std::collections::BTreeMap;
use std::fmt;

use rayon::prelude::*;
use serde::Serialize;

use crate::architecture::Role;
use crate::artifact::{Artifact, TensorInfo};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Elements read at a time.
const CHUNK: usize = 1 << 16;

/// Rows that grid detection looks at, spread over the tensor.
const SAMPLED_ROWS: usize = 16;

/// Most levels that count as a grid.
const MAX_LEVELS: usize = 256;

/// Something in the values that a user should know before building on them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// NaN or infinite values.
    NotFinite {
        /// The tensor.
        tensor: String,
        /// How many are NaN.
        nan: u64,
        /// How many are infinite.
        infinite: u64,
        /// Flat index of the first.
        first: u64,
    },
    /// Rows (first dimension) that hold nothing but zeros.
    ZeroRows {
        /// The tensor.
        tensor: String,
        /// How many rows.
        rows: u64,
        /// Of how many.
        of: u64,
        /// The first.
        first: u64,
    },
}

impl Finding {
    /// True for a finding that makes every result void, not only remarkable.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::NotFinite { .. })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFinite { tensor, nan, infinite, first } => {
                let counts = [(*nan, "NaN"), (*infinite, "infinite")];
                let counts: Vec<_> = counts
                    .iter()
                    .filter(|(count, _)| *count > 0)
                    .map(|(count, kind)| format!("{count} {kind}"))
                    .collect();
                let (counts, one) = (counts.join(" and "), nan + infinite == 1);
                let values = if one { "value" } else { "values" };
                write!(f, "tensor `{tensor}` holds {counts} {values}, first at index {first}")
            }
            Self::ZeroRows { tensor, rows, of, first } => {
                write!(f, "tensor `{tensor}`: {rows} of {of} rows are all zero, first row {first}")
            }
        }
    }
}

/// Tensors of one element type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct TypeCount {
    /// How many tensors.
    pub tensors: usize,
    /// Their elements.
    pub elements: u64,
    /// Their stored bytes.
    pub bytes: u64,
}

/// Levels on which a tensor's values lie.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Grid {
    /// Levels per group: a power of two.
    pub levels: usize,
    /// Elements along the input that share a grid; `None`: the whole row.
    pub group: Option<usize>,
    /// The levels are equally spaced (a codebook otherwise).
    pub uniform: bool,
    /// The block type that the tensor is stored in, where it is one.
    pub stored: Option<String>,
}

impl Grid {
    /// Bits per weight that the levels need, scales not counted.
    pub fn bits(&self) -> u32 {
        self.levels.ilog2()
    }
}

impl fmt::Display for Grid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.uniform { "grid" } else { "codebook" };
        write!(f, "weights lie on a {}-level {kind} per ", self.levels)?;
        match self.group {
            Some(group) => write!(f, "{group} inputs")?,
            None => f.write_str("row")?,
        }
        match &self.stored {
            Some(stored) => write!(f, ": source was {stored}"),
            None => Ok(()),
        }
    }
}

impl Artifact {
    /// Tensors, elements and bytes by stored element type.
    pub fn census(&self) -> BTreeMap<DType, TypeCount> {
        let mut census = BTreeMap::<DType, TypeCount>::new();
        for info in self.tensors() {
            let count = census.entry(info.dtype).or_default();
            count.tensors += 1;
            count.elements += info.numel() as u64;
            count.bytes += info.nbytes;
        }
        census
    }

    /// Reads every floating-point value once and reports what is broken, in name order.
    pub fn validate(&self) -> Result<Vec<Finding>> {
        let floats: Vec<&TensorInfo> =
            self.tensors().iter().filter(|info| info.dtype.is_float()).collect();
        let found: Vec<Vec<Finding>> =
            floats.par_iter().map(|info| self.findings(info)).collect::<Result<_>>()?;
        Ok(found.into_iter().flatten().collect())
    }

    /// Refuses NaN and infinite weights: reads every floating-point tensor once, on all threads. What a described
    /// architecture knows to be a buffer may hold infinities (attention masks do).
    ///
    /// # Errors
    /// [`Error::NotFinite`] with the first few tensors, and whatever reading meets.
    pub fn check_finite(&self) -> Result<()> {
        const SHOWN: usize = 3;
        let architecture = self.architecture();
        let is_weight = |info: &&TensorInfo| {
            let buffer = !architecture.inferred
                && architecture.site(&info.name).is_some_and(|site| site.role == Role::Other);
            info.dtype.is_float() && !buffer
        };
        let weights: Vec<&TensorInfo> = self.tensors().iter().filter(is_weight).collect();
        // A first pass without branches; only what it finds is looked at closely.
        let broken = weights
            .par_iter()
            .with_max_len(1)
            .map(|info| self.is_finite(info).map(|finite| (!finite).then_some(*info)))
            .filter_map(Result::transpose)
            .collect::<Result<Vec<_>>>()?;
        let mut problems = Vec::new();
        for info in broken.iter().take(SHOWN) {
            let fatal = self.findings(info)?.into_iter().filter(Finding::is_fatal);
            problems.extend(fatal.map(|finding| finding.to_string()));
        }
        if broken.is_empty() {
            return Ok(());
        }
        if broken.len() > SHOWN {
            problems.push(format!("{} more tensors", broken.len() - SHOWN));
        }
        Err(Error::NotFinite { path: self.path().to_owned(), problems: problems.join(", ") })
    }

    fn is_finite(&self, info: &TensorInfo) -> Result<bool> {
        let numel = info.numel();
        let mut buffer = vec![0.0f32; CHUNK.min(numel)];
        for start in (0..numel).step_by(CHUNK) {
            let values = &mut buffer[..CHUNK.min(numel - start)];
            self.read_f32_into(&info.name, start, values)?;
            // 0 x is NaN exactly when x is not finite, and sums of zeros vectorize.
            if values.iter().map(|x| x * 0.0).sum::<f32>() != 0.0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn findings(&self, info: &TensorInfo) -> Result<Vec<Finding>> {
        let numel = info.numel();
        let row = if info.shape.len() > 1 { numel / info.shape[0].max(1) } else { 0 };
        let (mut nan, mut infinite, mut first) = (0, 0, None);
        let mut rows = ZeroRows::new(row);
        let mut buffer = vec![0.0; CHUNK.min(numel)];
        for start in (0..numel).step_by(CHUNK) {
            let values = &mut buffer[..CHUNK.min(numel - start)];
            self.read_f32_into(&info.name, start, values)?;
            // The usual case is one pass without branches.
            if !values.iter().all(|x| x.is_finite()) {
                for (at, x) in values.iter().enumerate().filter(|(_, x)| !x.is_finite()) {
                    nan += u64::from(x.is_nan());
                    infinite += u64::from(x.is_infinite());
                    first.get_or_insert((start + at) as u64);
                }
            }
            rows.feed(values);
        }
        let tensor = || info.name.clone();
        let mut findings = Vec::new();
        if let Some(first) = first {
            findings.push(Finding::NotFinite { tensor: tensor(), nan, infinite, first });
        }
        if let Some(first) = rows.first {
            let of = info.shape[0] as u64;
            findings.push(Finding::ZeroRows { tensor: tensor(), rows: rows.count, of, first });
        }
        Ok(findings)
    }

    /// The grid on which a matrix's values lie, if they do: weights that were quantized once and stored wide, or
    /// that are stored in a block type. Looks at a few rows only.
    pub fn grid(&self, name: &str) -> Result<Option<Grid>> {
        let info = self.tensor(name)?;
        let numel = info.numel();
        if info.shape.len() < 2 || numel == 0 || !info.dtype.is_float() {
            return Ok(None);
        }
        let columns = numel / info.shape[0];
        let count = info.shape[0].min(SAMPLED_ROWS);
        let mut rows = vec![0.0; count * columns];
        for (at, row) in rows.chunks_exact_mut(columns).enumerate() {
            self.read_f32_into(name, at * info.shape[0] / count * columns, row)?;
        }
        let stored = match info.dtype {
            DType::Ggml(ggml) => Some(ggml.to_string()),
            _ => self.stored_packed(name)?,
        };
        let unit = match info.dtype {
            DType::BF16 => 2f64.powi(-10),
            DType::F16 => 2f64.powi(-13),
            _ => f64::from(f32::EPSILON),
        };
        Ok(detect(&rows, columns, unit).map(|grid| Grid { stored, ..grid }))
    }
}

/// Counts rows of zeros in a stream of values.
struct ZeroRows {
    width: usize,
    filled: usize,
    zero: bool,
    row: u64,
    count: u64,
    first: Option<u64>,
}

impl ZeroRows {
    fn new(width: usize) -> Self {
        Self { width, filled: 0, zero: true, row: 0, count: 0, first: None }
    }

    fn feed(&mut self, mut values: &[f32]) {
        while self.width > 0 && !values.is_empty() {
            let (part, rest) = values.split_at(values.len().min(self.width - self.filled));
            self.zero &= part.iter().all(|&x| x == 0.0);
            self.filled += part.len();
            values = rest;
            if self.filled == self.width {
                if self.zero {
                    self.count += 1;
                    self.first.get_or_insert(self.row);
                }
                self.row += 1;
                (self.filled, self.zero) = (0, true);
            }
        }
    }
}

/// The coarsest grouping of rows of `columns` values whose groups lie on a grid; failing that, the coarsest whose
/// groups use few distinct values. `unit` is the rounding of the stored type, relative to a value.
fn detect(rows: &[f32], columns: usize, unit: f64) -> Option<Grid> {
    let finer = [512, 384, 256, 192, 128, 96, 64, 48, 32].map(Some);
    let groupings = std::iter::once(None).chain(finer.into_iter().filter(|group| {
        group.is_some_and(|group| group < columns && columns.is_multiple_of(group))
    }));
    let groupings: Vec<Option<usize>> = groupings.filter(|_| columns >= 32).collect();
    let grid = |uniform: bool| {
        groupings.iter().find_map(|&group| {
            let width = group.unwrap_or(columns);
            let count = |sorted: &[f32]| match uniform {
                true => levels(sorted, unit),
                false => (sorted.len() <= MAX_LEVELS.min(width / 4)).then_some(sorted.len()),
            };
            let levels = most_levels(rows, width, count)?.next_power_of_two();
            Some(Grid { levels, group, uniform, stored: None })
        })
    };
    grid(true).or_else(|| grid(false))
}

/// Largest number of levels in any group, `None` if a group has no grid or none of them tells.
fn most_levels(
    rows: &[f32],
    width: usize,
    count: impl Fn(&[f32]) -> Option<usize>,
) -> Option<usize> {
    let mut most = None;
    for values in rows.chunks_exact(width) {
        let mut sorted = values.to_vec();
        sorted.sort_by(f32::total_cmp);
        sorted.dedup();
        // Groups of one or two values lie on any grid.
        if sorted.len() >= 3 {
            most = most.max(Some(count(&sorted)?));
        }
    }
    most
}

/// Number of equally spaced levels that hold these distinct, sorted values; `None` if there are none.
fn levels(sorted: &[f32], unit: f64) -> Option<usize> {
    let (low, high) = (f64::from(sorted[0]), f64::from(sorted[sorted.len() - 1]));
    if !low.is_finite() || !high.is_finite() {
        return None;
    }
    // Neighbours closer than rounding are one level.
    let noise = low.abs().max(high.abs()) * 4.0 * unit;
    let gaps = sorted.windows(2).map(|pair| f64::from(pair[1]) - f64::from(pair[0]));
    let step = gaps.filter(|&gap| gap > noise).fold(f64::INFINITY, f64::min);
    let range = high - low;
    // Steps as fine as the rounding would put anything on a grid.
    if !step.is_finite() || step < 8.0 * noise {
        return None;
    }
    // The shortest gap carries the rounding of two values, so the true step may be a little longer.
    let most = (range / step).round() as usize;
    let least = ((range / (step + noise)).floor() as usize).max(1);
    let on_grid = |count: &usize| {
        let step = range / *count as f64;
        sorted.iter().all(|&x| {
            let level = (f64::from(x) - low) / step;
            (level - level.round()).abs() < 0.02 + 2.0 * noise / step
        })
    };
    let counts = least..=most.min(MAX_LEVELS - 1);
    counts.rev().find(on_grid).map(|count| count + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small generator, so that the test needs no crate.
    fn noise(count: usize) -> Vec<f32> {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..count).map(|_| (0..4).map(|_| next()).sum()).collect()
    }

    fn quantized(values: &[f32], group: usize, levels: f32) -> Vec<f32> {
        values
            .chunks(group)
            .flat_map(|values| {
                let low = values.iter().copied().fold(f32::MAX, f32::min);
                let high = values.iter().copied().fold(f32::MIN, f32::max);
                let step = (high - low) / (levels - 1.0);
                values.iter().map(move |x| ((x - low) / step).round() * step + low)
            })
            .collect()
    }

    /// Rounding of f32.
    const FINE: f64 = f32::EPSILON as f64;

    #[test]
    fn grids_are_found_at_their_own_grouping() {
        let plain = noise(16 * 512);
        assert_eq!(detect(&plain, 512, FINE), None);
        for (group, levels, named) in [
            (32, 16, Some(32)),
            (64, 8, Some(64)),
            (512, 16, None),
            (256, 256, Some(256)),
            (128, 4, Some(128)),
        ] {
            let grid = detect(&quantized(&plain, group, levels as f32), 512, FINE).unwrap();
            assert_eq!((grid.levels, grid.group, grid.uniform), (levels, named, true));
        }
        // Widths such as 576 are cut into groups that are no powers of two.
        let plain = noise(16 * 576);
        for group in [48, 96, 192] {
            let grid = detect(&quantized(&plain, group, 16.0), 576, FINE).unwrap();
            assert_eq!((grid.levels, grid.group), (16, Some(group)));
        }
    }

    #[test]
    fn codebooks_are_told_from_grids() {
        let book = [
            -1.0, -0.7, -0.52, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56,
            0.72, 1.0,
        ];
        let values: Vec<f32> =
            noise(8 * 256).iter().map(|x| book[((x + 2.0) * 4.0) as usize % 16]).collect();
        let grid = detect(&values, 256, FINE).unwrap();
        assert_eq!((grid.levels, grid.group, grid.uniform), (16, None, false));
        assert_eq!(grid.to_string(), "weights lie on a 16-level codebook per row");
    }

    #[test]
    fn rounding_to_bfloat16_is_no_grid() {
        let values: Vec<f32> =
            noise(16 * 512).iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
        for unit in [FINE, 2f64.powi(-10)] {
            assert_eq!(detect(&values, 512, unit), None);
        }
    }

    #[test]
    fn grids_survive_storage_in_bfloat16() {
        for (group, levels) in [(32, 8), (32, 16), (64, 16), (128, 32)] {
            let snapped = quantized(&noise(16 * 512), group, levels as f32);
            let stored: Vec<f32> =
                snapped.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
            let grid = detect(&stored, 512, 2f64.powi(-10)).unwrap();
            assert_eq!((grid.levels, grid.group, grid.uniform), (levels, Some(group), true));
        }
    }

    #[test]
    fn zero_rows_are_counted_across_chunks() {
        let mut rows = ZeroRows::new(3);
        for part in [&[1.0, 0.0][..], &[0.0, 0.0, 0.0], &[0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]] {
            rows.feed(part);
        }
        assert_eq!((rows.count, rows.first, rows.row), (2, Some(1), 4));
    }
}
