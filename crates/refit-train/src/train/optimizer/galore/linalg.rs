//! The little dense linear algebra that a projection needs: products, the eigenvectors of a symmetric matrix, orthonormal rows.
//!
//! All matrices are row-major slices. No result depends on the number of threads.

use gemm::Parallelism;
use rayon::prelude::*;

/// Multiply-adds below which a product stays on the calling thread.
const SMALL: usize = 1 << 20;
/// Rows of an f32 matrix that are widened to f64 at a time.
const PANEL: usize = 256;

/// A matrix operand: values, row stride, column stride.
type Operand<'a, T> = (&'a [T], usize, usize);

/// f32 and f64.
pub(super) trait Scalar: Copy + Sync + Send + 'static {
    /// 1.
    const ONE: Self;
}
impl Scalar for f32 {
    const ONE: Self = 1.0;
}
impl Scalar for f64 {
    const ONE: Self = 1.0;
}

/// `out[m, n] = scale * a[m, k] · b[k, n]`, added to what `out` holds when `add`.
pub(super) fn product<T: Scalar>(
    (m, k, n): (usize, usize, usize),
    a: Operand<T>,
    b: Operand<T>,
    out: &mut [T],
    add: bool,
    scale: T,
) {
    let holds = |(values, row, column): Operand<T>, rows: usize, columns: usize| {
        rows * columns == 0 || values.len() > (rows - 1) * row + (columns - 1) * column
    };
    assert!(
        holds(a, m, k) && holds(b, k, n) && out.len() == m * n,
        "invariant: operands fit their extents"
    );
    let threads = if m * n * k < SMALL { Parallelism::None } else { Parallelism::Rayon(0) };
    // SAFETY: the operands hold every element that their strides reach, as just checked, and `out` is borrowed alone.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            add,
            a.0.as_ptr(),
            a.2 as isize,
            a.1 as isize,
            b.0.as_ptr(),
            b.2 as isize,
            b.1 as isize,
            T::ONE,
            scale,
            false,
            false,
            false,
            threads,
        );
    }
}

/// `a · aᵀ [m, m]` (`rows`) or `aᵀ · a [n, n]` of `a [m, n]`, in f64; a panel at a time is widened.
pub(super) fn gram(a: &[f32], (m, n): (usize, usize), rows: bool) -> Vec<f64> {
    let size = if rows { m } else { n };
    let mut out = vec![0.0f64; size * size];
    let other = if rows { n } else { m };
    for start in (0..other).step_by(PANEL) {
        let depth = PANEL.min(other - start);
        // `panel [size, depth]`, or its transpose, contiguous either way.
        let (panel, row, column): (Vec<f64>, usize, usize) = if rows {
            let part = a.chunks_exact(n).flat_map(|r| &r[start..start + depth]);
            (part.map(|x| f64::from(*x)).collect(), depth, 1)
        } else {
            let part = &a[start * n..(start + depth) * n];
            (part.iter().map(|x| f64::from(*x)).collect(), 1, n)
        };
        let extents = (size, depth, size);
        product(extents, (&panel, row, column), (&panel, column, row), &mut out, true, 1.0);
    }
    out
}

/// Eigenvalues of the symmetric `a [n, n]`, largest first, and their eigenvectors as orthonormal rows `[n, n]`: Householder's
/// tridiagonal form, then implicit QL (Golub and Van Loan, sections 8.3.1 and 8.3.3).
///
/// `None` when QL does not converge, which finite matrices do not do.
pub(super) fn eigen(mut a: Vec<f64>, n: usize) -> Option<(Vec<f64>, Vec<f64>)> {
    let (mut diagonal, mut off, mut rows) = tridiagonal(&mut a, n);
    drop(a);
    implicit_ql(&mut diagonal, &mut off, &mut rows, n)?;
    let mut order: Vec<usize> = (0..n).collect();
    // A stable sort: equal eigenvalues keep their order.
    order.sort_by(|&i, &j| diagonal[j].total_cmp(&diagonal[i]));
    let sorted = order.iter().flat_map(|&i| &rows[i * n..(i + 1) * n]).copied().collect();
    Some((order.iter().map(|&i| diagonal[i]).collect(), sorted))
}

/// `a = Qᵀ T Q` with tridiagonal `T`: its diagonal, its subdiagonal (`off[i]` between `i` and `i + 1`) and the rows of `Q`.
fn tridiagonal(a: &mut [f64], n: usize) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let mut off = vec![0.0; n];
    let mut reflectors: Vec<(Vec<f64>, f64)> = Vec::with_capacity(n);
    for k in 0..n.saturating_sub(2) {
        let rest = n - k - 1;
        let mut v: Vec<f64> = (k + 1..n).map(|i| a[i * n + k]).collect();
        let norm = dot(&v, &v).sqrt();
        let tail = dot(&v[1..], &v[1..]);
        if tail == 0.0 {
            off[k] = v[0];
            reflectors.push((Vec::new(), 0.0));
            continue;
        }
        // Away from the sign of the first element: no cancellation.
        let head = if v[0] > 0.0 { -norm } else { norm };
        off[k] = head;
        v[0] -= head;
        let beta = 2.0 / dot(&v, &v);
        // A ← H A H on the trailing square: A - v wᵀ - w vᵀ.
        let mut w = vec![0.0; rest];
        let square = &mut a[(k + 1) * n..];
        for (w, row) in w.iter_mut().zip(square.chunks_exact(n)) {
            *w = beta * dot(&row[k + 1..], &v);
        }
        let half = 0.5 * beta * dot(&w, &v);
        w.iter_mut().zip(&v).for_each(|(w, v)| *w -= half * v);
        for (i, row) in square.chunks_exact_mut(n).enumerate() {
            let (vi, wi) = (v[i], w[i]);
            for ((x, v), w) in row[k + 1..].iter_mut().zip(&v).zip(&w) {
                *x -= vi * w + wi * v;
            }
        }
        reflectors.push((v, beta));
    }
    if n >= 2 {
        off[n - 2] = a[(n - 1) * n + n - 2];
    }
    let diagonal = (0..n).map(|i| a[i * n + i]).collect();
    // The rows of Q are the columns of H₀ H₁ …; applied from the last one, each touches the trailing rows alone.
    let mut q = vec![0.0; n * n];
    (0..n).for_each(|i| q[i * n + i] = 1.0);
    for (k, (v, beta)) in reflectors.iter().enumerate().rev() {
        if v.is_empty() {
            continue;
        }
        for row in q[(k + 1) * n..].chunks_exact_mut(n) {
            let along = beta * dot(&row[k + 1..], v);
            row[k + 1..].iter_mut().zip(v).for_each(|(x, v)| *x -= along * v);
        }
    }
    (diagonal, off, q)
}

/// Diagonalizes a tridiagonal matrix in place and turns `rows` along.
fn implicit_ql(d: &mut [f64], e: &mut [f64], rows: &mut [f64], n: usize) -> Option<()> {
    for l in 0..n {
        let mut turns = 0;
        loop {
            let negligible = |i: usize| e[i].abs() <= f64::EPSILON * (d[i].abs() + d[i + 1].abs());
            let m = (l..n - 1).find(|&i| negligible(i)).unwrap_or(n - 1);
            if m == l {
                break;
            }
            turns += 1;
            if turns > 80 {
                return None;
            }
            // Wilkinson's shift.
            let gap = (d[l + 1] - d[l]) / (2.0 * e[l]);
            let root = gap.hypot(1.0);
            let mut g = d[m] - d[l] + e[l] / (gap + root.copysign(gap));
            let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
            let mut broke = false;
            for i in (l..m).rev() {
                let (f, b) = (s * e[i], c * e[i]);
                let r = f.hypot(g);
                e[i + 1] = r;
                if r == 0.0 {
                    d[i + 1] -= p;
                    e[m] = 0.0;
                    broke = true;
                    break;
                }
                (s, c) = (f / r, g / r);
                let shifted = d[i + 1] - p;
                let mixed = (d[i] - shifted) * s + 2.0 * c * b;
                p = s * mixed;
                d[i + 1] = shifted + p;
                g = c * mixed - b;
                let (low, high) = rows[i * n..(i + 2) * n].split_at_mut(n);
                for (x, y) in low.iter_mut().zip(high) {
                    (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
                }
            }
            if !broke {
                d[l] -= p;
                e[l] = g;
                e[m] = 0.0;
            }
        }
    }
    Some(())
}

/// Makes the rows of `q [rows, width]` orthonormal: Gram-Schmidt, twice for each row. A row that lies in the span of those
/// before it is replaced by a direction outside of it. `rows <= width`.
pub(super) fn orthonormalize(q: &mut [f64], width: usize) {
    let rows = q.len() / width.max(1);
    let mut spare = 0;
    for i in 0..rows {
        let (done, rest) = q.split_at_mut(i * width);
        let row = &mut rest[..width];
        loop {
            let before = dot(row, row).sqrt();
            for _ in 0..2 {
                // All coefficients first: they do not depend on each other, so threads may share them.
                let along: Vec<f64> = match done.len() < SMALL {
                    true => done.chunks_exact(width).map(|d| dot(d, row)).collect(),
                    false => done.par_chunks_exact(width).map(|d| dot(d, row)).collect(),
                };
                for (done, along) in done.chunks_exact(width).zip(&along) {
                    row.iter_mut().zip(done).for_each(|(x, d)| *x -= along * d);
                }
            }
            let after = dot(row, row).sqrt();
            if after > 1e-9 * before && after > 0.0 {
                row.iter_mut().for_each(|x| *x /= after);
                break;
            }
            // `rows <= width`: one of the unit vectors lies outside the span.
            row.fill(0.0);
            row[spare] = 1.0;
            spare += 1;
        }
    }
}

/// A dot product in a fixed order that vectorizes.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0f64; 16];
    let (ab, at) = a.as_chunks::<16>();
    let (bb, bt) = b.as_chunks::<16>();
    for (a, b) in ab.iter().zip(bb) {
        for ((lane, x), y) in lanes.iter_mut().zip(a).zip(b) {
            *lane += x * y;
        }
    }
    lanes.iter().sum::<f64>() + at.iter().zip(bt).map(|(x, y)| x * y).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64 as Rng;

    fn symmetric(n: usize, seed: u64) -> Vec<f64> {
        let mut rng = Rng::new(seed);
        let mut a = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                let x = rng.normal();
                (a[i * n + j], a[j * n + i]) = (x, x);
            }
        }
        a
    }

    /// Eigenvalues by plain cyclic Jacobi, largest first.
    fn jacobi(mut a: Vec<f64>, n: usize) -> Vec<f64> {
        for _ in 0..30 {
            for p in 0..n {
                for q in p + 1..n {
                    if a[p * n + q].abs() < 1e-300 {
                        continue;
                    }
                    let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * a[p * n + q]);
                    let t = 1.0f64.copysign(theta) / (theta.abs() + theta.hypot(1.0));
                    let c = 1.0 / t.hypot(1.0);
                    let s = t * c;
                    for k in 0..n {
                        let (x, y) = (a[k * n + p], a[k * n + q]);
                        (a[k * n + p], a[k * n + q]) = (c * x - s * y, s * x + c * y);
                    }
                    for k in 0..n {
                        let (x, y) = (a[p * n + k], a[q * n + k]);
                        (a[p * n + k], a[q * n + k]) = (c * x - s * y, s * x + c * y);
                    }
                }
            }
        }
        let mut values: Vec<f64> = (0..n).map(|i| a[i * n + i]).collect();
        values.sort_by(|x, y| y.total_cmp(x));
        values
    }

    #[test]
    fn eigenvectors_diagonalize_and_eigenvalues_are_those_of_jacobi() {
        for n in [1, 2, 3, 7, 40, 65] {
            let a = symmetric(n, n as u64);
            let (values, rows) = eigen(a.clone(), n).expect("converges");
            for (x, y) in values.iter().zip(jacobi(a.clone(), n)) {
                assert!((x - y).abs() < 1e-10 * n as f64, "{n}: {x} {y}");
            }
            let mut along = vec![0.0; n * n];
            product((n, n, n), (&rows, n, 1), (&a, n, 1), &mut along, false, 1.0);
            for i in 0..n {
                for j in 0..n {
                    let same = f64::from(u8::from(i == j));
                    let inner = dot(&rows[i * n..(i + 1) * n], &rows[j * n..(j + 1) * n]);
                    assert!((inner - same).abs() < 1e-12, "{n}: rows {i} and {j}: {inner}");
                    let (x, y) = (along[i * n + j], values[i] * rows[i * n + j]);
                    assert!((x - y).abs() < 1e-10 * n as f64, "{n}: {x} {y}");
                }
            }
        }
    }

    #[test]
    fn matrices_that_are_diagonal_or_singular_are_no_exception() {
        let (values, rows) = eigen(vec![0.0; 9], 3).expect("converges");
        assert_eq!(values, [0.0; 3]);
        assert_eq!(rows, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
        // Rank one: x xᵀ.
        let x: Vec<f64> = (1..=5).map(f64::from).collect();
        let a = x.iter().flat_map(|a| x.iter().map(move |b| a * b)).collect();
        let (values, rows) = eigen(a, 5).expect("converges");
        assert!((values[0] - 55.0).abs() < 1e-12 && values[1].abs() < 1e-12, "{values:?}");
        assert!((rows[4] / rows[0] - 5.0).abs() < 1e-12, "{rows:?}");
    }

    #[test]
    fn rows_become_orthonormal_even_when_they_repeat() {
        let mut rng = Rng::new(3);
        let mut q: Vec<f64> = (0..6 * 9).map(|_| rng.normal()).collect();
        q.copy_within(0..9, 18); // row 2 is row 0 again
        q[36..45].fill(0.0);
        orthonormalize(&mut q, 9);
        for i in 0..6 {
            for j in 0..6 {
                let inner = dot(&q[i * 9..(i + 1) * 9], &q[j * 9..(j + 1) * 9]);
                assert!((inner - f64::from(u8::from(i == j))).abs() < 1e-12, "{i} {j}: {inner}");
            }
        }
    }

    #[test]
    fn a_gram_matrix_is_the_product_with_its_transpose() {
        let a: Vec<f32> = (0..300 * 5).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
        for (shape, rows, size) in [((300, 5), false, 5), ((5, 300), true, 5)] {
            let found = gram(&a, shape, rows);
            let at =
                |i: usize, k: usize| f64::from(if rows { a[i * 300 + k] } else { a[k * 5 + i] });
            for i in 0..size {
                for j in 0..size {
                    let want: f64 = (0..300).map(|k| at(i, k) * at(j, k)).sum();
                    assert!((found[i * size + j] - want).abs() < 1e-10, "{i} {j}");
                }
            }
        }
    }
}
