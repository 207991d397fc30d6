//! The arithmetic of LoRC: the best product of low rank for what a quantizer lost, and its factors in few bits.

use refit_train::observe::ColumnStats;

use crate::linalg::{Strided, multiply_add};
use crate::svd::{self, NoConvergence};

/// `U [out, m]` and `V [m, in]`, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Compensation {
    /// `[out, m]`.
    pub u: Vec<f32>,
    /// `[m, in]`.
    pub v: Vec<f32>,
    /// Rank.
    pub rank: usize,
}

/// In which sense the product is the best one.
pub enum Weighting {
    /// `||E - U V||`: what LoRC does.
    Plain,
    /// `||(E - U V) diag(rms(x))||` (as LQER, arXiv:2402.02446).
    Diagonal(Vec<f32>),
    /// `||(E - U V) C^(1/2)||` with `C = X^T X / n` (EoRA, arXiv:2410.21271).
    Full {
        /// `C^(1/2)` in the basis of its eigenvectors: `Q L^(1/2)`, `[in, in]`.
        root: Vec<f32>,
        /// `L^(-1/2) Q^T`, `[in, in]`.
        inverse: Vec<f32>,
    },
}

impl Weighting {
    /// From the mean squares of the inputs. Columns that are never lit weigh as little as the smallest that is.
    pub fn diagonal(stats: &ColumnStats) -> Self {
        let rows = stats.rows().max(1) as f64;
        let rms: Vec<f32> =
            stats.sum_squares().iter().map(|square| (square / rows).sqrt() as f32).collect();
        let least = rms.iter().copied().filter(|x| *x > 0.0).fold(f32::INFINITY, f32::min);
        let least = if least.is_finite() { least } else { 1.0 };
        Self::Diagonal(rms.into_iter().map(|x| x.max(least)).collect())
    }

    /// From `H = X^T X` of `rows` inputs. Eigenvalues up to `max * n * eps` are taken for zero, in both roots.
    ///
    /// # Errors
    /// A matrix that is not finite.
    pub fn full(gram: &[f64], n: usize, rows: u64) -> Result<Self, NoConvergence> {
        let mean: Vec<f64> = gram.iter().map(|x| x / rows.max(1) as f64).collect();
        let (values, vectors) = svd::symmetric(&mean, n)?;
        let most = values.last().copied().unwrap_or(0.0);
        let least = most * n.max(1) as f64 * f64::from(f32::EPSILON);
        let (mut root, mut inverse) = (vec![0f32; n * n], vec![0f32; n * n]);
        for (k, (value, vector)) in values.iter().zip(vectors.chunks(n.max(1))).enumerate() {
            if *value > least {
                let size = value.sqrt();
                for (j, q) in vector.iter().enumerate() {
                    root[j * n + k] = (q * size) as f32;
                    inverse[k * n + j] = (q / size) as f32;
                }
            }
        }
        Ok(Self::Full { root, inverse })
    }
}

/// The compensation of rank `rank` for the error `e` `[out, in]`. Columns of `U` and rows of `V` have equal norms.
///
/// # Errors
/// An error that is not finite.
pub fn compensate(
    e: &[f32],
    (out, inputs): (usize, usize),
    rank: usize,
    weighting: &Weighting,
    seed: u64,
) -> Result<Compensation, NoConvergence> {
    let mut weighted;
    let matrix = match weighting {
        Weighting::Plain => e,
        Weighting::Diagonal(rms) => {
            weighted = e.to_vec();
            for row in weighted.chunks_mut(inputs) {
                row.iter_mut().zip(rms).for_each(|(x, s)| *x *= s);
            }
            &weighted
        }
        Weighting::Full { root, .. } => {
            weighted = product(e, root, (out, inputs, inputs));
            &weighted
        }
    };
    let found = svd::truncated(matrix, out, inputs, rank, seed)?;
    let rank = found.s.len();
    let (u, v) = found.factors();
    let v = match weighting {
        Weighting::Plain => return Ok(Compensation { u, v, rank }),
        Weighting::Diagonal(rms) => {
            let mut v = v;
            for row in v.chunks_mut(inputs) {
                row.iter_mut().zip(rms).for_each(|(x, s)| *x /= s);
            }
            v
        }
        Weighting::Full { inverse, .. } => product(&v, inverse, (rank, inputs, inputs)),
    };
    let mut both = Compensation { u, v, rank };
    both.balance(inputs);
    Ok(both)
}

/// `a [m, k] b [k, n]`.
fn product(a: &[f32], b: &[f32], (m, k, n): (usize, usize, usize)) -> Vec<f32> {
    let mut out = vec![0f32; m * n];
    let strided = |data, row| Strided { data, row, column: 1 };
    multiply_add((m, n, k), 1.0, strided(a, k), strided(b, n), &mut out, n);
    out
}

impl Compensation {
    /// `U V`, `[out, in]`.
    pub fn product(&self, (out, inputs): (usize, usize)) -> Vec<f32> {
        product(&self.u, &self.v, (out, self.rank, inputs))
    }

    /// Makes each column of `U` as long as its row of `V`, so that halves and bytes hold both equally well.
    fn balance(&mut self, inputs: usize) {
        for k in 0..self.rank {
            let row = &mut self.v[k * inputs..(k + 1) * inputs];
            let square = |x: &f32| f64::from(*x).powi(2);
            let right: f64 = row.iter().map(square).sum();
            let left: f64 = self.u.iter().skip(k).step_by(self.rank).map(square).sum();
            if left > 0.0 && right > 0.0 {
                let scale = (left / right).powf(0.25);
                row.iter_mut().for_each(|x| *x = (f64::from(*x) * scale) as f32);
                let column = self.u.iter_mut().skip(k).step_by(self.rank);
                column.for_each(|x| *x = (f64::from(*x) / scale) as f32);
            }
        }
    }
}

/// Signed codes of 8 bits and their scales.
#[derive(Clone, Debug, PartialEq)]
pub struct Bytes {
    /// In the order of the factor.
    pub codes: Vec<i8>,
    /// One a rank.
    pub scales: Vec<f32>,
}

impl Bytes {
    /// Rounds a factor of which element `at` belongs to rank `rank_of(at)`; a scale is `max|x| / 127` of its rank.
    pub fn round(values: &[f32], rank: usize, rank_of: impl Fn(usize) -> usize) -> Self {
        let mut most = vec![0f32; rank];
        for (at, x) in values.iter().enumerate() {
            let most = &mut most[rank_of(at)];
            *most = most.max(x.abs());
        }
        let scales: Vec<f32> = most.iter().map(|m| m / 127.0).collect();
        let code = |(at, x): (usize, &f32)| match scales[rank_of(at)] {
            0.0 => 0,
            scale => (x / scale).round().clamp(-127.0, 127.0) as i8,
        };
        Self { codes: values.iter().enumerate().map(code).collect(), scales }
    }

    /// The values that the codes stand for.
    pub fn decode(&self, rank_of: impl Fn(usize) -> usize) -> Vec<f32> {
        let value = |(at, code): (usize, &i8)| f32::from(*code) * self.scales[rank_of(at)];
        self.codes.iter().enumerate().map(value).collect()
    }
}

#[cfg(test)]
mod tests {
    use refit_train::observe::StatsRequest;

    use super::*;
    use crate::testing::Stream;

    fn square(values: &[f32]) -> f64 {
        values.iter().map(|x| f64::from(*x).powi(2)).sum()
    }

    fn rest(e: &[f32], both: &Compensation, shape: (usize, usize)) -> Vec<f32> {
        e.iter().zip(both.product(shape)).map(|(e, p)| e - p).collect()
    }

    #[test]
    fn what_is_left_are_the_smaller_singular_values() {
        let shape = (24, 40);
        let e = Stream::new(1).normals(24 * 40);
        let all = svd::thin(&e, 24, 40).unwrap();
        let mut last = f64::INFINITY;
        for rank in [0, 1, 4, 8, 23, 24] {
            let both = compensate(&e, shape, rank, &Weighting::Plain, 0).unwrap();
            let left = square(&rest(&e, &both, shape));
            let expected: f64 = all.s[rank..].iter().map(|s| f64::from(*s).powi(2)).sum();
            assert!((left - expected).abs() <= 1e-4 * square(&e), "{rank}: {left} {expected}");
            assert!(left < last);
            last = left;
        }
        assert!(last < 1e-8 * square(&e));
    }

    /// Inputs of a few directions, so that some errors matter and others do not.
    fn inputs(n: usize, rows: usize) -> (Vec<f32>, ColumnStats) {
        let mut stream = Stream::new(7);
        let (mix, noise) = (stream.normals(6 * n), stream.normals(rows * n));
        let mut x: Vec<f32> = noise.iter().map(|x| 0.05 * x).collect();
        for row in x.chunks_mut(n) {
            for mix in mix.chunks(n) {
                let share = stream.normals(1)[0];
                row.iter_mut().zip(mix).for_each(|(x, m)| *x += share * m);
            }
        }
        let mut stats = ColumnStats::new(n, StatsRequest::GRAM | StatsRequest::SUM_SQUARES);
        stats.observe(&x).unwrap();
        (x, stats)
    }

    #[test]
    fn knowing_the_inputs_helps_their_outputs() {
        let (shape, rows) = ((24, 40), 300);
        let e = Stream::new(2).normals(24 * 40);
        let (x, stats) = inputs(40, rows);
        let output = |both: &Compensation| {
            let rest = rest(&e, both, shape);
            let mut turned = vec![0f32; 24 * 40];
            rest.chunks(40).enumerate().for_each(|(i, row)| {
                row.iter().enumerate().for_each(|(j, value)| turned[j * 24 + i] = *value);
            });
            square(&product(&x, &turned, (rows, 40, 24)))
        };
        let found = |weighting| output(&compensate(&e, shape, 4, &weighting, 0).unwrap());
        let plain = found(Weighting::Plain);
        let full = found(Weighting::full(&stats.gram().unwrap(), 40, stats.rows()).unwrap());
        assert!(full < 0.5 * plain, "{full} {plain}");
        assert!(found(Weighting::diagonal(&stats)) <= plain);
    }

    #[test]
    fn inputs_that_are_all_alike_change_nothing() {
        let shape = (12, 16);
        let e = Stream::new(3).normals(12 * 16);
        let mut unit = vec![0f64; 16 * 16];
        (0..16).for_each(|i| unit[17 * i] = 8.0);
        let plain = compensate(&e, shape, 3, &Weighting::Plain, 0).unwrap().product(shape);
        let full = Weighting::full(&unit, 16, 8).unwrap();
        let full = compensate(&e, shape, 3, &full, 0).unwrap().product(shape);
        let apart = plain.iter().zip(&full).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-4, "{apart}");
    }

    #[test]
    fn bytes_lose_little_and_norms_agree() {
        let shape = (48, 64);
        let e = Stream::new(5).normals(48 * 64);
        let (_, stats) = inputs(64, 200);
        let full = Weighting::full(&stats.gram().unwrap(), 64, stats.rows()).unwrap();
        for weighting in [Weighting::Plain, full] {
            let both = compensate(&e, shape, 8, &weighting, 0).unwrap();
            for k in 0..8 {
                let column: Vec<f32> = both.u.iter().skip(k).step_by(8).copied().collect();
                let ratio = square(&column) / square(&both.v[64 * k..64 * (k + 1)]);
                assert!((ratio - 1.0).abs() < 1e-3, "{ratio}");
            }
            let u = Bytes::round(&both.u, 8, |at| at % 8);
            let v = Bytes::round(&both.v, 8, |at| at / 64);
            let rounded =
                Compensation { u: u.decode(|at| at % 8), v: v.decode(|at| at / 64), rank: 8 };
            let (exact, coarse) = (rest(&e, &both, shape), rest(&e, &rounded, shape));
            assert!(square(&coarse) < 1.02 * square(&exact));
        }
    }
}
