//! Streaming statistics of activations.
//!
//! A calibrated method asks for the statistics it needs with a [`StatsRequest`]; a [`ColumnStats`]
//! then eats activation rows (`&[f32]`, row-major `rows × columns`, one row per token) and keeps
//! nothing else. All sums are in f64 and every column is summed in row order, so the result is the
//! same bits for any number of threads.
//!
//! Notation of the literature, with N sequences and T tokens in all:
//!
//! | here | meaning | used by |
//! |---|---|---|
//! | [`sum_squares`](ColumnStats::sum_squares)`[j]` | Σ x_j² | Wanda: ‖x_j‖₂ is its root |
//! | [`sum`](ColumnStats::sum)`[j]` / N | s_j, mean over sequences of sums over tokens | DSnoT |
//! | [`within_variance`](ColumnStats::within_variance)`[j]` | v_j, token-weighted mean of within-sequence population variances | DSnoT |
//! | [`gram`](ColumnStats::gram) | H = Σ x xᵀ | GPTQ, SparseGPT |
//! | [`abs_sum`](ColumnStats::abs_sum)`[j]` / T | mean of the absolute value of x_j | AWQ, Minitron |

use bitflags::bitflags;
use rayon::prelude::*;

mod gram;
mod sketch;

pub use sketch::Sketch;

bitflags! {
    /// Which statistics to collect; what is not asked for costs nothing.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct StatsRequest: u32 {
        /// Σ x_j.
        const SUM = 1;
        /// Σ x_j² (Wanda's squared column norm).
        const SUM_SQUARES = 1 << 1;
        /// Σ of absolute values per column.
        const ABS_SUM = 1 << 2;
        /// Largest absolute value per column.
        const ABS_MAX = 1 << 3;
        /// Smallest and largest value per column.
        const RANGE = 1 << 4;
        /// Population variances: over all tokens, and within sequences.
        const VARIANCE = 1 << 5;
        /// Σ x_j of every sequence apart: `sequences × columns` numbers.
        const SEQUENCE_SUMS = 1 << 6;
        /// H = Σ x xᵀ in f64: `columns²` numbers.
        const GRAM = 1 << 7;
        /// Quantiles of all values together, by a [`Sketch`].
        const QUANTILES = 1 << 8;
    }
}

/// A value that is not finite, found while observing.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("{value} at row {row}, column {column}")]
pub struct NonFinite {
    /// Row, counted over everything observed so far.
    pub row: u64,
    /// Column.
    pub column: usize,
    /// The offending value.
    pub value: f32,
}

/// Statistics of the columns of an activation matrix, fed in pieces.
///
/// ```
/// use refit_train::observe::{ColumnStats, StatsRequest};
/// let mut stats = ColumnStats::new(2, StatsRequest::SUM | StatsRequest::SUM_SQUARES);
/// stats.observe(&[1.0, 2.0, 3.0, 4.0]).unwrap(); // two tokens
/// stats.end_sequence();
/// assert_eq!(stats.sum(), &[4.0, 6.0]);
/// assert_eq!(stats.sum_squares(), &[10.0, 20.0]);
/// ```
#[derive(Debug, Clone)]
pub struct ColumnStats {
    request: StatsRequest,
    columns: usize,
    rows: u64,
    sequences: u64,
    sum: Vec<f64>,
    sum_squares: Vec<f64>,
    abs_sum: Vec<f64>,
    abs_max: Vec<f32>,
    min: Vec<f32>,
    max: Vec<f32>,
    sequence_sums: Vec<f64>,
    variance: Option<VarianceState>,
    gram: Option<gram::Gram>,
    sketch: Option<Sketch>,
}

impl ColumnStats {
    /// An empty collector for `columns` columns.
    pub fn new(columns: usize, request: StatsRequest) -> Self {
        let when = |flag, fill| vec![fill; if request.contains(flag) { columns } else { 0 }];
        let when32 = |flag, fill| vec![fill; if request.contains(flag) { columns } else { 0 }];
        Self {
            request,
            columns,
            rows: 0,
            sequences: 0,
            sum: when(StatsRequest::SUM, 0.0),
            sum_squares: when(StatsRequest::SUM_SQUARES, 0.0),
            abs_sum: when(StatsRequest::ABS_SUM, 0.0),
            abs_max: when32(StatsRequest::ABS_MAX, 0.0f32),
            min: when32(StatsRequest::RANGE, f32::INFINITY),
            max: when32(StatsRequest::RANGE, f32::NEG_INFINITY),
            sequence_sums: Vec::new(),
            variance: request
                .intersects(StatsRequest::VARIANCE | StatsRequest::SEQUENCE_SUMS)
                .then(|| VarianceState::new(columns)),
            gram: request.contains(StatsRequest::GRAM).then(|| gram::Gram::new(columns)),
            sketch: request.contains(StatsRequest::QUANTILES).then(Sketch::new),
        }
    }

    /// Adds rows of one sequence; a sequence may come in several pieces.
    ///
    /// # Errors
    /// A value that is not finite, in which case the statistics must be thrown away.
    ///
    /// # Panics
    /// When `rows` is not a whole number of rows: the caller's shape bookkeeping is wrong.
    pub fn observe(&mut self, rows: &[f32]) -> Result<(), NonFinite> {
        assert_eq!(
            rows.len() % self.columns.max(1),
            0,
            "invariant: whole rows of {}",
            self.columns
        );
        self.check_finite(rows)?;
        self.rows += (rows.len() / self.columns.max(1)) as u64;
        self.observe_columns(rows);
        if let Some(variance) = &mut self.variance {
            variance.observe(rows, self.columns);
        }
        if let Some(gram) = &mut self.gram {
            gram.observe(rows);
        }
        if let Some(sketch) = &mut self.sketch {
            rows.iter().for_each(|&x| sketch.insert(x));
        }
        Ok(())
    }

    fn check_finite(&self, rows: &[f32]) -> Result<(), NonFinite> {
        // 0 · x is NaN exactly when x is not finite: one branch-free sum tells.
        if rows.iter().map(|x| x * 0.0).sum::<f32>() == 0.0 {
            return Ok(());
        }
        let at = rows.iter().position(|x| !x.is_finite()).unwrap_or(0);
        let row = self.rows + (at / self.columns) as u64;
        Err(NonFinite { row, column: at % self.columns, value: rows[at] })
    }

    fn observe_columns(&mut self, rows: &[f32]) {
        if self.columns == 0 {
            return;
        }
        for row in rows.chunks_exact(self.columns) {
            self.sum.iter_mut().zip(row).for_each(|(s, &x)| *s += f64::from(x));
            self.sum_squares
                .iter_mut()
                .zip(row)
                .for_each(|(s, &x)| *s += f64::from(x) * f64::from(x));
            self.abs_sum.iter_mut().zip(row).for_each(|(s, &x)| *s += f64::from(x.abs()));
            self.abs_max.iter_mut().zip(row).for_each(|(m, &x)| *m = m.max(x.abs()));
            self.min.iter_mut().zip(row).for_each(|(m, &x)| *m = m.min(x));
            self.max.iter_mut().zip(row).for_each(|(m, &x)| *m = m.max(x));
        }
    }

    /// Closes the current sequence. Needed once per sequence by everything that counts sequences;
    /// closing a sequence without rows does nothing but count it.
    pub fn end_sequence(&mut self) {
        self.sequences += 1;
        if let Some(variance) = &mut self.variance {
            let sums = variance.end_sequence();
            if self.request.contains(StatsRequest::SEQUENCE_SUMS) {
                self.sequence_sums.extend(sums);
            }
        }
    }

    /// What this collector was asked for.
    pub fn request(&self) -> StatsRequest {
        self.request
    }

    /// Number of columns (features of the site's input).
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Rows (tokens) observed.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Sequences closed.
    pub fn sequences(&self) -> u64 {
        self.sequences
    }

    /// Σ x_j; empty unless [`StatsRequest::SUM`].
    pub fn sum(&self) -> &[f64] {
        &self.sum
    }

    /// Σ x_j²; empty unless [`StatsRequest::SUM_SQUARES`].
    pub fn sum_squares(&self) -> &[f64] {
        &self.sum_squares
    }

    /// ‖x_j‖₂ = √Σ x_j², Wanda's column norm.
    pub fn norms(&self) -> Vec<f64> {
        self.sum_squares.iter().map(|s| s.sqrt()).collect()
    }

    /// Mean over tokens; empty unless [`StatsRequest::SUM`] (or before the first row).
    pub fn mean(&self) -> Vec<f64> {
        per(&self.sum, self.rows)
    }

    /// DSnoT's s_j: mean over sequences of the sum over tokens; empty unless [`StatsRequest::SUM`].
    pub fn sequence_mean_sum(&self) -> Vec<f64> {
        per(&self.sum, self.sequences)
    }

    /// DSnoT's q_j: mean over sequences of the sum of squares over tokens; empty unless
    /// [`StatsRequest::SUM_SQUARES`].
    pub fn sequence_mean_squares(&self) -> Vec<f64> {
        per(&self.sum_squares, self.sequences)
    }

    /// Sum of absolute values; empty unless [`StatsRequest::ABS_SUM`].
    pub fn abs_sum(&self) -> &[f64] {
        &self.abs_sum
    }

    /// Mean of absolute values over tokens; empty unless [`StatsRequest::ABS_SUM`].
    pub fn abs_mean(&self) -> Vec<f64> {
        per(&self.abs_sum, self.rows)
    }

    /// Largest absolute value per column; empty unless [`StatsRequest::ABS_MAX`].
    pub fn abs_max(&self) -> &[f32] {
        &self.abs_max
    }

    /// Smallest value per column; empty unless [`StatsRequest::RANGE`].
    pub fn min(&self) -> &[f32] {
        &self.min
    }

    /// Largest value per column; empty unless [`StatsRequest::RANGE`].
    pub fn max(&self) -> &[f32] {
        &self.max
    }

    /// Population variance over all tokens of closed sequences; empty unless
    /// [`StatsRequest::VARIANCE`].
    pub fn variance(&self) -> Vec<f64> {
        self.variance_state().map_or_else(Vec::new, |v| per(&v.total_squares, v.rows))
    }

    /// DSnoT's v_j: within-sequence population variances averaged with the sequences' token counts
    /// as weights (variance between sequences is left out); empty unless
    /// [`StatsRequest::VARIANCE`].
    pub fn within_variance(&self) -> Vec<f64> {
        self.variance_state().map_or_else(Vec::new, |v| per(&v.within_squares, v.rows))
    }

    fn variance_state(&self) -> Option<&VarianceState> {
        self.variance.as_ref().filter(|_| self.request.contains(StatsRequest::VARIANCE))
    }

    /// Σ x_j of every closed sequence, `sequences × columns`; empty unless
    /// [`StatsRequest::SEQUENCE_SUMS`].
    pub fn sequence_sums(&self) -> &[f64] {
        &self.sequence_sums
    }

    /// H = Σ x xᵀ, symmetric, row-major `columns × columns`; `None` unless
    /// [`StatsRequest::GRAM`].
    pub fn gram(&self) -> Option<Vec<f64>> {
        self.gram.as_ref().map(gram::Gram::full)
    }

    /// Quantiles of all values together; `None` unless [`StatsRequest::QUANTILES`].
    pub fn sketch(&self) -> Option<&Sketch> {
        self.sketch.as_ref()
    }

    /// Whether H cannot have full rank because fewer tokens than columns were seen. Methods that
    /// invert H then lean on their damping, and deserve more calibration text.
    pub fn rank_deficient(&self) -> bool {
        self.rows < self.columns as u64
    }
}

fn per(values: &[f64], count: u64) -> Vec<f64> {
    if count == 0 { Vec::new() } else { values.iter().map(|v| v / count as f64).collect() }
}

/// Sums of squared deviations, within the running sequence and merged over sequences.
///
/// Deviations are taken from the sequence's first row, which keeps the cancellation harmless for
/// columns with a large mean; sequences are merged by Chan, Golub & LeVeque's update.
#[derive(Debug, Clone)]
struct VarianceState {
    shift: Vec<f64>,
    shifted_sum: Vec<f64>,
    shifted_squares: Vec<f64>,
    sequence_rows: u64,
    rows: u64,
    mean: Vec<f64>,
    total_squares: Vec<f64>,
    within_squares: Vec<f64>,
}

impl VarianceState {
    fn new(columns: usize) -> Self {
        let zero = vec![0.0; columns];
        Self {
            shift: zero.clone(),
            shifted_sum: zero.clone(),
            shifted_squares: zero.clone(),
            sequence_rows: 0,
            rows: 0,
            mean: zero.clone(),
            total_squares: zero.clone(),
            within_squares: zero,
        }
    }

    fn observe(&mut self, rows: &[f32], columns: usize) {
        if columns == 0 {
            return;
        }
        for row in rows.chunks_exact(columns) {
            if self.sequence_rows == 0 {
                self.shift.iter_mut().zip(row).for_each(|(s, &x)| *s = f64::from(x));
            }
            self.sequence_rows += 1;
            let sums = self.shifted_sum.iter_mut().zip(&mut self.shifted_squares);
            for ((sum, squares), (&x, &shift)) in sums.zip(row.iter().zip(&self.shift)) {
                let deviation = f64::from(x) - shift;
                *sum += deviation;
                *squares += deviation * deviation;
            }
        }
    }

    /// Merges the running sequence and returns its column sums.
    fn end_sequence(&mut self) -> Vec<f64> {
        let n = self.sequence_rows as f64;
        if self.sequence_rows == 0 {
            return vec![0.0; self.shift.len()];
        }
        let seen = self.rows as f64;
        let mut sums = Vec::with_capacity(self.shift.len());
        for j in 0..self.shift.len() {
            let mean = self.shift[j] + self.shifted_sum[j] / n;
            let squares =
                (self.shifted_squares[j] - self.shifted_sum[j] * self.shifted_sum[j] / n).max(0.0);
            let apart = mean - self.mean[j];
            self.total_squares[j] += squares + apart * apart * seen * n / (seen + n);
            self.mean[j] += apart * n / (seen + n);
            self.within_squares[j] += squares;
            sums.push(self.shift[j] * n + self.shifted_sum[j]);
        }
        self.rows += self.sequence_rows;
        self.sequence_rows = 0;
        self.shifted_sum.fill(0.0);
        self.shifted_squares.fill(0.0);
        sums
    }
}

/// Observes many `(collector, rows)` pairs at once, one collector per thread.
///
/// # Errors
/// The first collector (in the given order) that met a value that is not finite, with its index.
pub fn observe_all(pairs: &mut [(&mut ColumnStats, &[f32])]) -> Result<(), (usize, NonFinite)> {
    let found: Vec<_> = pairs.par_iter_mut().map(|(stats, rows)| stats.observe(rows)).collect();
    found.into_iter().enumerate().try_for_each(|(i, result)| result.map_err(|e| (i, e)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = SplitMix64::new(seed);
        (0..n).map(|_| rng.normal() as f32).collect()
    }

    #[test]
    fn a_hand_worked_matrix() {
        let mut stats = ColumnStats::new(2, StatsRequest::all());
        stats.observe(&[1.0, -2.0, 3.0, -2.0]).unwrap();
        stats.end_sequence();
        stats.observe(&[10.0, 0.5]).unwrap();
        stats.end_sequence();
        assert_eq!((stats.rows(), stats.sequences()), (3, 2));
        assert_eq!(stats.sum(), &[14.0, -3.5]);
        assert_eq!(stats.sequence_mean_sum(), &[7.0, -1.75]);
        assert_eq!(stats.sum_squares(), &[110.0, 8.25]);
        assert_eq!(stats.sequence_mean_squares(), &[55.0, 4.125]);
        assert_eq!(stats.abs_sum(), &[14.0, 4.5]);
        assert_eq!(stats.abs_max(), &[10.0, 2.0]);
        assert_eq!((stats.min(), stats.max()), (&[1.0, -2.0][..], &[10.0, 0.5][..]));
        assert_eq!(stats.sequence_sums(), &[4.0, -4.0, 10.0, 0.5]);
        // Within sequences: variance 1 over two tokens and 0 over one, so 2/3.
        assert_eq!(stats.within_variance(), &[2.0 / 3.0, 0.0]);
        let mean = 14.0 / 3.0f64;
        let total = (1.0 + 9.0 + 100.0) / 3.0 - mean * mean;
        assert!((stats.variance()[0] - total).abs() < 1e-12);
        assert_eq!(stats.gram().unwrap(), &[110.0, -3.0, -3.0, 8.25]);
    }

    #[test]
    fn nothing_is_computed_unasked() {
        let mut stats = ColumnStats::new(3, StatsRequest::SUM_SQUARES);
        stats.observe(&[1.0, 2.0, 3.0]).unwrap();
        stats.end_sequence();
        assert!(stats.sum().is_empty() && stats.abs_max().is_empty() && stats.mean().is_empty());
        assert!(stats.gram().is_none() && stats.sketch().is_none() && stats.variance().is_empty());
        assert_eq!(stats.norms(), &[1.0, 2.0, 3.0]);
    }

    #[test]
    fn pieces_give_the_same_bits_as_a_whole() {
        let (columns, rows) = (37, 64);
        let data = random(columns * rows, 4);
        let request = StatsRequest::all() - StatsRequest::GRAM;
        let mut whole = ColumnStats::new(columns, request);
        whole.observe(&data).unwrap();
        whole.end_sequence();
        let mut pieces = ColumnStats::new(columns, request);
        for piece in data.chunks(columns * 5) {
            pieces.observe(piece).unwrap();
        }
        pieces.end_sequence();
        assert_eq!(whole.sum(), pieces.sum());
        assert_eq!(whole.sum_squares(), pieces.sum_squares());
        assert_eq!(whole.variance(), pieces.variance());
    }

    #[test]
    fn variance_survives_a_large_mean() {
        let noise = random(500, 8);
        let shifted: Vec<f32> = noise.iter().map(|x| 4096.0 + (x * 64.0).round() / 64.0).collect();
        let mut stats = ColumnStats::new(1, StatsRequest::VARIANCE);
        for sequence in shifted.chunks(100) {
            stats.observe(sequence).unwrap();
            stats.end_sequence();
        }
        let values: Vec<f64> = shifted.iter().map(|&x| f64::from(x)).collect();
        let mean = values.iter().sum::<f64>() / 500.0;
        let expected = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 500.0;
        assert!((stats.variance()[0] - expected).abs() < 1e-9 * expected);
        assert!(stats.within_variance()[0] < stats.variance()[0]);
    }

    #[test]
    fn order_of_sequences_does_not_matter() {
        let data = random(4 * 30 * 8, 2);
        let run = |order: &[usize]| {
            let mut stats = ColumnStats::new(8, StatsRequest::all());
            for &s in order {
                stats.observe(&data[s * 240..(s + 1) * 240]).unwrap();
                stats.end_sequence();
            }
            stats
        };
        let (forward, backward) = (run(&[0, 1, 2, 3]), run(&[3, 1, 0, 2]));
        let near = |a: &[f64], b: &[f64]| {
            a.iter().zip(b).all(|(x, y)| (x - y).abs() <= 1e-9 * (1.0 + x.abs()))
        };
        assert!(near(forward.sum(), backward.sum()));
        assert!(near(&forward.within_variance(), &backward.within_variance()));
        assert!(near(&forward.variance(), &backward.variance()));
        assert!(near(&forward.gram().unwrap(), &backward.gram().unwrap()));
    }

    #[test]
    fn a_nan_is_named() {
        let mut stats = ColumnStats::new(2, StatsRequest::SUM);
        stats.observe(&[0.0; 6]).unwrap();
        let error = stats.observe(&[0.0, 0.0, 1.0, f32::NEG_INFINITY]).unwrap_err();
        assert_eq!((error.row, error.column), (4, 1));
        let mut other = ColumnStats::new(2, StatsRequest::SUM);
        let mut fine = ColumnStats::new(2, StatsRequest::SUM);
        let result =
            observe_all(&mut [(&mut fine, &[0.0, 1.0]), (&mut other, &[f32::NAN, f32::NAN])]);
        assert_eq!(result.unwrap_err().0, 1);
    }

    #[test]
    fn rank_is_judged_by_tokens() {
        let mut stats = ColumnStats::new(3, StatsRequest::GRAM);
        stats.observe(&[0.0; 6]).unwrap();
        assert!(stats.rank_deficient());
        stats.observe(&[0.0; 3]).unwrap();
        assert!(!stats.rank_deficient());
    }
}
