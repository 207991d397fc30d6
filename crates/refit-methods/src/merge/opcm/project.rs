//! What a newcomer may add to a matrix without touching what the merge holds there.

use crate::linalg::{Strided, multiply_add};
use crate::svd::{self, NoConvergence};

/// How much is taken away.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Projection {
    /// Share of the sum of singular values whose subspace is closed to the newcomer.
    pub alpha: f64,
    /// Leave the subspace open where `alpha` is 1 or more, as the reference does.
    pub quirks: bool,
}

/// A row-major matrix with rows of `row` elements.
fn rows(data: &[f32], row: usize) -> Strided<'_, f32> {
    Strided { data, row, column: 1 }
}

/// Its transpose.
fn columns(data: &[f32], row: usize) -> Strided<'_, f32> {
    Strided { data, row: 1, column: row }
}

impl Projection {
    /// The size of the closed block: the 0-based index of the first value with which the sum exceeds `alpha` of the whole.
    fn rank(self, s: &[f32]) -> usize {
        let total: f64 = s.iter().map(|s| f64::from(*s)).sum();
        if self.alpha >= 1.0 && !self.quirks {
            return s.len();
        }
        let mut sum = 0.0;
        let reached = |s: &f32| {
            sum += f64::from(*s);
            sum / total > self.alpha
        };
        s.iter().position(reached).unwrap_or(0)
    }

    /// `D'` in place of `d`, knowing the merge's task vector `t`; both `[m, n]`.
    ///
    /// With `T = U S V^T` and `C = U^T D V`, the diagonal of `C` and its leading `r x r` block are removed:
    ///
    /// ```text
    /// D' = D - U (diag(C) + B) V^T,   B = C[..r, ..r] without its diagonal
    /// ```
    ///
    /// Only the leading `r` columns and the diagonal of `C` change, so thin factors give what full ones do.
    ///
    /// # Errors
    /// Values that are not finite.
    pub fn apply(
        self,
        t: &[f32],
        d: &mut [f32],
        (m, n): (usize, usize),
    ) -> Result<(), NoConvergence> {
        if t.iter().all(|x| *x == 0.0) {
            // Nothing was merged here yet.
            return Ok(());
        }
        let svd = svd::thin(t, m, n)?;
        let (p, r) = (svd.s.len(), self.rank(&svd.s));
        // G = D V, [m, p].
        let mut g = vec![0f32; m * p];
        multiply_add((m, p, n), 1.0, rows(d, n), columns(&svd.vt[..], n), &mut g, p);
        // The block U_r^T G_r, with its diagonal.
        let mut block = vec![0f32; r * r];
        multiply_add((r, r, m), 1.0, rows(&svd.ut[..], m), rows(&g[..], p), &mut block, r);
        // Y = (diag(C) + B) V^T, [p, n].
        let mut y = vec![0f32; p * n];
        for (k, row) in y.chunks_exact_mut(n).enumerate() {
            let left = svd.left(k);
            let c: f64 = (0..m).map(|i| f64::from(left[i]) * f64::from(g[i * p + k])).sum();
            row.iter_mut().zip(svd.right(k)).for_each(|(y, v)| *y = c as f32 * v);
        }
        (0..r).for_each(|k| block[k * r + k] = 0.0);
        multiply_add((r, n, r), 1.0, rows(&block[..], r), rows(&svd.vt[..], n), &mut y, n);
        // D' = D - U Y.
        multiply_add((m, n, p), -1.0, columns(&svd.ut[..], m), rows(&y[..], n), d, n);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Stream;

    const HALF: Projection = Projection { alpha: 0.5, quirks: false };

    fn inner(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    fn norm(a: &[f32]) -> f64 {
        inner(a, a).sqrt()
    }

    /// `x [m, n]` times `y [n, k]`.
    fn times(x: &[f32], y: &[f32], (m, n, k): (usize, usize, usize)) -> Vec<f32> {
        let mut out = vec![0f32; m * k];
        for i in 0..m {
            for j in 0..n {
                (0..k).for_each(|c| out[i * k + c] += x[i * n + j] * y[j * k + c]);
            }
        }
        out
    }

    fn turned(x: &[f32], rows: usize) -> Vec<f32> {
        let columns = x.len() / rows;
        (0..x.len()).map(|at| x[at % rows * columns + at / rows]).collect()
    }

    /// The same by full square bases, entry by entry, as the reference does it.
    fn full(t: &[f32], d: &[f32], n: usize, alpha: f64) -> Vec<f32> {
        let svd = svd::thin(t, n, n).unwrap();
        let u = turned(&svd.ut, n);
        let mut c = times(&times(&svd.ut, d, (n, n, n)), &turned(&svd.vt, n), (n, n, n));
        let r = Projection { alpha, quirks: false }.rank(&svd.s);
        for i in 0..n {
            for j in 0..n {
                if i == j || (i < r && j < r) {
                    c[i * n + j] = 0.0;
                }
            }
        }
        times(&times(&u, &c, (n, n, n)), &svd.vt, (n, n, n))
    }

    #[test]
    fn what_is_left_is_orthogonal_and_stays_so() {
        for (m, n) in [(12, 12), (20, 9), (9, 20), (1, 6)] {
            let mut stream = Stream::new((m * n) as u64);
            let (t, d) = (stream.normals(m * n), stream.normals(m * n));
            for alpha in [0.0, 0.3, 0.5, 0.9, 1.0] {
                let projection = Projection { alpha, quirks: false };
                let mut left = d.clone();
                projection.apply(&t, &mut left, (m, n)).unwrap();
                assert!(inner(&left, &t).abs() <= 1e-5 * norm(&d) * norm(&t), "{m} {n} {alpha}");
                let svd = svd::thin(&t, m, n).unwrap();
                let c = times(
                    &times(&svd.ut, &left, (svd.s.len(), m, n)),
                    &turned(&svd.vt, svd.s.len()),
                    (svd.s.len(), n, svd.s.len()),
                );
                let (p, r) = (svd.s.len(), projection.rank(&svd.s));
                for i in 0..r {
                    (0..r).for_each(|j| assert!(c[i * p + j].abs() < 1e-5 * norm(&d) as f32));
                }
                let mut again = left.clone();
                projection.apply(&t, &mut again, (m, n)).unwrap();
                let moved: Vec<f32> = again.iter().zip(&left).map(|(a, b)| a - b).collect();
                assert!(norm(&moved) < 1e-5 * norm(&d));
            }
        }
    }

    #[test]
    fn thin_factors_do_what_full_ones_do() {
        let (n, mut stream) = (10, Stream::new(8));
        let (t, d) = (stream.normals(n * n), stream.normals(n * n));
        for alpha in [0.2, 0.5, 0.8, 1.0] {
            let mut found = d.clone();
            Projection { alpha, quirks: false }.apply(&t, &mut found, (n, n)).unwrap();
            let wanted = full(&t, &d, n, alpha);
            let off: Vec<f32> = found.iter().zip(&wanted).map(|(a, b)| a - b).collect();
            assert!(norm(&off) < 1e-5 * norm(&d), "{alpha}");
        }
    }

    #[test]
    fn a_parallel_newcomer_adds_nothing_and_nothing_merged_closes_nothing() {
        let t = Stream::new(1).normals(7 * 5);
        let mut d: Vec<f32> = t.iter().map(|x| -2.5 * x).collect();
        HALF.apply(&t, &mut d, (7, 5)).unwrap();
        assert!(norm(&d) < 1e-5 * norm(&t));
        let mut d = t.clone();
        HALF.apply(&[0.0; 35], &mut d, (7, 5)).unwrap();
        assert_eq!(d, t);
    }

    #[test]
    fn the_block_is_one_smaller_than_the_number_of_values_that_it_takes() {
        let rank = |alpha, quirks, s: &[f32]| Projection { alpha, quirks }.rank(s);
        // 5 of 10 is not more than half; with the second value it is.
        assert_eq!(rank(0.5, false, &[5.0, 3.0, 2.0]), 1);
        assert_eq!(rank(0.4, false, &[5.0, 3.0, 2.0]), 0);
        assert_eq!(rank(0.9, false, &[5.0, 3.0, 2.0]), 2);
        assert_eq!(rank(1.0, false, &[5.0, 3.0, 2.0]), 3);
        assert_eq!(rank(1.0, true, &[5.0, 3.0, 2.0]), 0);
    }
}
