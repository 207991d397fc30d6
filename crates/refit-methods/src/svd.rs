//! Singular value decompositions on the host: exact and thin, or of a few leading values by random projection.
//!
//! Everything is row-major f32. One matrix is decomposed by one thread, so that a number does not depend on the number of
//! threads; methods decompose many matrices side by side.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::{Mat, MatRef, Par};
use refit_data::rng::Rng;

use crate::linalg::{Strided, multiply_add};

/// Columns of the random projection beyond the rank that is asked for.
const OVERSAMPLE: usize = 8;
/// Power iterations of the random projection.
const ITERATIONS: usize = 2;

/// `A = U diag(s) V^T`, `A` `[m, n]`, singular values in descending order.
#[derive(Clone, Debug, PartialEq)]
pub struct Svd {
    /// Left singular vectors as rows, `[k, m]`: `U^T`.
    pub ut: Vec<f32>,
    /// Singular values, `[k]`.
    pub s: Vec<f32>,
    /// Right singular vectors as rows, `[k, n]`: `V^T`.
    pub vt: Vec<f32>,
    /// Rows of `A`.
    pub m: usize,
    /// Columns of `A`.
    pub n: usize,
}

impl Svd {
    /// Left singular vector `k`, `[m]`.
    pub fn left(&self, k: usize) -> &[f32] {
        &self.ut[k * self.m..(k + 1) * self.m]
    }

    /// Right singular vector `k`, `[n]`.
    pub fn right(&self, k: usize) -> &[f32] {
        &self.vt[k * self.n..(k + 1) * self.n]
    }

    /// Keeps the `rank` largest values.
    #[must_use]
    pub fn truncated(mut self, rank: usize) -> Self {
        let rank = rank.min(self.s.len());
        self.s.truncate(rank);
        self.ut.truncate(rank * self.m);
        self.vt.truncate(rank * self.n);
        self
    }

    /// The balanced factors `(U sqrt(s) [m, k], sqrt(s) V^T [k, n])`, whose columns and rows have equal norms.
    pub fn factors(&self) -> (Vec<f32>, Vec<f32>) {
        let k = self.s.len();
        let (mut up, mut down) = (vec![0f32; self.m * k], self.vt.clone());
        for (j, s) in self.s.iter().enumerate() {
            let root = s.max(0.0).sqrt();
            self.left(j).iter().enumerate().for_each(|(i, u)| up[i * k + j] = u * root);
            down[j * self.n..(j + 1) * self.n].iter_mut().for_each(|v| *v *= root);
        }
        (up, down)
    }
}

/// Why there is no decomposition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its singular values do not converge: are all its values finite?")]
pub struct NoConvergence;

/// The thin decomposition of `a` `[m, n]`: all `min(m, n)` singular values.
///
/// # Errors
/// [`NoConvergence`], where values are not finite.
///
/// # Panics
/// When `a` does not hold `m * n` values: a bug in the caller.
pub fn thin(a: &[f32], m: usize, n: usize) -> Result<Svd, NoConvergence> {
    assert_eq!(a.len(), m * n, "invariant: a matrix of {m} x {n}");
    let k = m.min(n);
    if k == 0 {
        return Ok(Svd { ut: Vec::new(), s: Vec::new(), vt: Vec::new(), m, n });
    }
    if a.iter().any(|x| !x.is_finite()) {
        return Err(NoConvergence);
    }
    let (mut u, mut v) = (Mat::<f32>::zeros(m, k), Mat::<f32>::zeros(n, k));
    let mut s = Diag::<f32>::zeros(k);
    let vectors = ComputeSvdVectors::Thin;
    let par = Par::Seq;
    let scratch = svd_scratch::<f32>(m, n, vectors, vectors, par, Default::default());
    svd(
        MatRef::from_row_major_slice(a, m, n),
        s.as_mut(),
        Some(u.as_mut()),
        Some(v.as_mut()),
        par,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|_| NoConvergence)?;
    let rows = |vectors: &Mat<f32>, length: usize| -> Vec<f32> {
        (0..k).flat_map(|j| (0..length).map(move |i| vectors[(i, j)])).collect()
    };
    let s = (0..k).map(|j| s[j]).collect();
    Ok(Svd { ut: rows(&u, m), s, vt: rows(&v, n), m, n })
}

/// Eigenvalues in ascending order and eigenvectors as rows, `[n, n]`, of a symmetric matrix `a` `[n, n]`.
///
/// # Errors
/// [`NoConvergence`], where values are not finite.
///
/// # Panics
/// When `a` does not hold `n * n` values: a bug in the caller.
pub fn symmetric(a: &[f64], n: usize) -> Result<(Vec<f64>, Vec<f64>), NoConvergence> {
    assert_eq!(a.len(), n * n, "invariant: a square matrix of {n}");
    if a.iter().any(|x| !x.is_finite()) {
        return Err(NoConvergence);
    }
    let mut vectors = Mat::<f64>::zeros(n, n);
    let mut values = Diag::<f64>::zeros(n);
    let (par, wanted) = (Par::Seq, ComputeEigenvectors::Yes);
    let scratch = self_adjoint_evd_scratch::<f64>(n, wanted, par, Default::default());
    self_adjoint_evd(
        MatRef::from_row_major_slice(a, n, n),
        values.as_mut(),
        Some(vectors.as_mut()),
        par,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|_| NoConvergence)?;
    let rows = (0..n).flat_map(|k| (0..n).map(move |i| (i, k))).map(|at| vectors[at]);
    Ok(((0..n).map(|k| values[k]).collect(), rows.collect()))
}

/// The `rank` leading singular values and vectors of `a` `[m, n]` by a randomized range finder with two power iterations
/// (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1): exact where little is left beyond the rank, and never far from
/// it. The whole thin decomposition where the rank is no small part of the matrix.
///
/// # Errors
/// As [`thin`].
///
/// # Panics
/// As [`thin`].
pub fn truncated(
    a: &[f32],
    m: usize,
    n: usize,
    rank: usize,
    seed: u64,
) -> Result<Svd, NoConvergence> {
    assert_eq!(a.len(), m * n, "invariant: a matrix of {m} x {n}");
    let sketch = rank + OVERSAMPLE;
    if rank == 0 || 3 * sketch >= m.min(n) {
        return Ok(thin(a, m, n)?.truncated(rank));
    }
    if a.iter().any(|x| !x.is_finite()) {
        return Err(NoConvergence);
    }
    let mut rng = Rng::named(seed, "range finder");
    // Bases are rows, so that vectors are contiguous: `right` [sketch, n], `left` [sketch, m].
    let mut right: Vec<f32> = (0..sketch * n).map(|_| rng.normal() as f32).collect();
    let mut left = vec![0f32; sketch * m];
    for _ in 0..=ITERATIONS {
        // left = right A^T, and back.
        left.fill(0.0);
        let (b, at) = (
            Strided { data: &right[..], row: n, column: 1 },
            Strided { data: a, row: 1, column: n },
        );
        multiply_add((sketch, m, n), 1.0, b, at, &mut left, m);
        orthonormalize(&mut left, m);
        right.fill(0.0);
        let (b, a) = (
            Strided { data: &left[..], row: m, column: 1 },
            Strided { data: a, row: n, column: 1 },
        );
        multiply_add((sketch, n, m), 1.0, b, a, &mut right, n);
        if right.iter().all(|x| *x == 0.0) {
            break;
        }
    }
    // A is left^T (left A) = left^T right now; the small factor is decomposed.
    let inner = thin(&right, sketch, n)?;
    let mut ut = vec![0f32; sketch * m];
    let (b, q) = (
        Strided { data: &inner.ut[..], row: sketch, column: 1 },
        Strided { data: &left[..], row: m, column: 1 },
    );
    multiply_add((sketch, m, sketch), 1.0, b, q, &mut ut, m);
    Ok(Svd { ut, s: inner.s, vt: inner.vt, m, n }.truncated(rank))
}

/// Makes the rows of `basis` `[k, width]` orthonormal, by Gram and Schmidt with each projection done twice. A row that depends on
/// those before becomes 0.
fn orthonormalize(basis: &mut [f32], width: usize) {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    for k in 0..basis.len() / width {
        let (before, rest) = basis.split_at_mut(k * width);
        let row = &mut rest[..width];
        let size = dot(row, row).sqrt();
        for _ in 0..2 {
            for other in before.chunks_exact(width) {
                let share = dot(row, other) as f32;
                row.iter_mut().zip(other).for_each(|(x, o)| *x -= share * o);
            }
        }
        let left = dot(row, row).sqrt();
        let scale = if left > 1e-6 * size { (1.0 / left) as f32 } else { 0.0 };
        row.iter_mut().for_each(|x| *x *= scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Stream;

    fn product(svd: &Svd) -> Vec<f32> {
        let (up, down) = svd.factors();
        let (k, mut out) = (svd.s.len(), vec![0f32; svd.m * svd.n]);
        for (row, up) in out.chunks_mut(svd.n).zip(up.chunks(k.max(1))) {
            for (u, down) in up.iter().zip(down.chunks(svd.n)) {
                row.iter_mut().zip(down).for_each(|(x, d)| *x += u * d);
            }
        }
        out
    }

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
    }

    fn orthonormal(rows: &[f32], width: usize) -> f32 {
        let mut worst = 0f32;
        for (i, a) in rows.chunks(width).enumerate() {
            for (j, b) in rows.chunks(width).enumerate() {
                let dot: f32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                worst = worst.max((dot - f32::from(u8::from(i == j))).abs());
            }
        }
        worst
    }

    #[test]
    fn thin_ones_rebuild_the_matrix() {
        for (m, n) in [(7, 7), (20, 5), (5, 33), (64, 96), (1, 4)] {
            let a = Stream::new(m as u64).normals(m * n);
            let svd = thin(&a, m, n).unwrap();
            assert!(distance(&product(&svd), &a) < 1e-5 * distance(&a, &vec![0.0; m * n]) * 4.0);
            assert!(orthonormal(&svd.ut, m) < 1e-5 && orthonormal(&svd.vt, n) < 1e-5);
            assert!(svd.s.windows(2).all(|pair| pair[0] >= pair[1]));
        }
        assert_eq!(thin(&[0.0; 12], 3, 4).unwrap().s, [0.0; 3]);
        assert_eq!(thin(&[f32::NAN; 4], 2, 2), Err(NoConvergence));
    }

    #[test]
    fn truncated_ones_lose_what_the_values_beyond_say() {
        let (m, n) = (160, 120);
        let mut stream = Stream::new(9);
        // A spectrum that falls slowly: the hard case.
        let (u, v) = (stream.normals(m * 60), stream.normals(60 * n));
        let mut a = vec![0f32; m * n];
        for (row, u) in a.chunks_mut(n).zip(u.chunks(60)) {
            for (k, (u, v)) in u.iter().zip(v.chunks(n)).enumerate() {
                row.iter_mut().zip(v).for_each(|(x, v)| *x += u * v / (1.0 + k as f32).sqrt());
            }
        }
        let whole = thin(&a, m, n).unwrap();
        for rank in [1, 8, 20] {
            let best: f64 =
                whole.s[rank..].iter().map(|s| f64::from(*s).powi(2)).sum::<f64>().sqrt();
            let exact = distance(&product(&whole.clone().truncated(rank)), &a);
            assert!((exact / best - 1.0).abs() < 1e-4, "{exact} {best}");
            let found = truncated(&a, m, n, rank, 5).unwrap();
            assert_eq!((found.s.len(), found.ut.len(), found.vt.len()), (rank, rank * m, rank * n));
            let error = distance(&product(&found), &a);
            assert!(error <= 1.05 * best, "rank {rank}: {error} against {best}");
            assert!(orthonormal(&found.ut, m) < 1e-4);
            assert_eq!(found, truncated(&a, m, n, rank, 5).unwrap());
        }
        // A rank below the sketch leaves nothing, and zeros are no trouble.
        let thin_one: Vec<f32> =
            (0..m * n).map(|i| ((i / n) as f32).sin() * ((i % n) as f32).cos()).collect();
        let found = truncated(&thin_one, m, n, 4, 1).unwrap();
        assert!(distance(&product(&found), &thin_one) < 1e-3);
        assert!(truncated(&vec![0.0; m * n], m, n, 4, 1).unwrap().s.iter().all(|s| *s == 0.0));
    }

    #[test]
    fn symmetric_ones_are_rebuilt_from_their_eigenvectors() {
        let n = 24;
        let x = Stream::new(4).normals(40 * n);
        let mut a = vec![0f64; n * n];
        for row in x.chunks(n) {
            for (i, a) in a.chunks_mut(n).enumerate() {
                a.iter_mut().zip(row).for_each(|(a, x)| *a += f64::from(row[i]) * f64::from(*x));
            }
        }
        let (values, vectors) = symmetric(&a, n).unwrap();
        assert!(values[0] > -1e-9 && values.windows(2).all(|pair| pair[0] <= pair[1]));
        for i in 0..n {
            for j in 0..n {
                let rebuilt: f64 =
                    (0..n).map(|k| values[k] * vectors[k * n + i] * vectors[k * n + j]).sum();
                assert!((rebuilt - a[i * n + j]).abs() < 1e-9 * values[n - 1]);
            }
        }
        assert_eq!(symmetric(&[f64::NAN], 1), Err(NoConvergence));
    }

    #[test]
    fn factors_are_balanced() {
        let a = Stream::new(3).normals(12 * 9);
        let (up, down) = thin(&a, 12, 9).unwrap().factors();
        for k in 0..9 {
            let left: f32 = up.iter().skip(k).step_by(9).map(|x| x * x).sum();
            let right: f32 = down[k * 9..(k + 1) * 9].iter().map(|x| x * x).sum();
            assert!((left / right - 1.0).abs() < 1e-4);
        }
    }
}
