//! The little dense linear algebra that column solvers need: a blocked Cholesky factor and the
//! inverse of a triangle, in f64, on all cores, with the same bits for any number of threads.

use gemm::{Parallelism, gemm};
use rayon::prelude::*;

/// Rows and columns handled at once; small enough for the cache, large enough for the kernel.
const TILE: usize = 96;

/// A strided view of a matrix for [`multiply_add`]: first element, row stride, column stride.
#[derive(Clone, Copy)]
pub struct Strided<'a, T> {
    /// The elements.
    pub data: &'a [T],
    /// Distance between rows.
    pub row: usize,
    /// Distance between columns.
    pub column: usize,
}

/// `c += alpha * a b` for `c` `[m, n]` (row stride `ldc`), `a` `[m, k]` and `b` `[k, n]`, on the
/// calling thread.
///
/// # Panics
/// When a view is too short for the shape: a bug in the caller.
pub fn multiply_add<T: 'static + Copy + unit::One>(
    (m, n, k): (usize, usize, usize),
    alpha: T,
    a: Strided<'_, T>,
    b: Strided<'_, T>,
    c: &mut [T],
    ldc: usize,
) {
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    assert!(a.data.len() > (m - 1) * a.row + (k - 1) * a.column, "a is too short");
    assert!(b.data.len() > (k - 1) * b.row + (n - 1) * b.column, "b is too short");
    assert!(ldc >= n && c.len() >= (m - 1) * ldc + n, "c is too short");
    // SAFETY: the assertions above keep every address inside its slice, `c` is borrowed mutably and
    // so overlaps neither `a` nor `b`, and all strides fit in `isize` because the slices do.
    unsafe {
        gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            ldc as isize,
            true,
            a.data.as_ptr(),
            a.column as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.column as isize,
            b.row as isize,
            T::ONE,
            alpha,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// The unit of a scalar type.
pub mod unit {
    /// Types with a multiplicative unit.
    pub trait One {
        /// The unit.
        const ONE: Self;
    }
    impl One for f32 {
        const ONE: Self = 1.0;
    }
    impl One for f64 {
        const ONE: Self = 1.0;
    }
}

/// Replaces the lower triangle of the symmetric `a` `[n, n]` by its Cholesky factor `L`, with
/// `L L^T = a`. The strict upper triangle is left as it was.
///
/// Returns the index of the first pivot that is not positive when `a` is not positive definite.
pub fn cholesky(a: &mut [f64], n: usize) -> Result<(), usize> {
    assert_eq!(a.len(), n * n, "a must be square");
    for start in (0..n).step_by(TILE) {
        let end = (start + TILE).min(n);
        let width = end - start;
        factor_tile(a, n, start, end)?;
        // Rows below: X L_tile^T = A, one row at a time.
        let (above, below) = a.split_at_mut(end * n);
        let tile = &above[start * n..];
        below.par_chunks_mut(n).for_each(|row| {
            for j in 0..width {
                let factor = &tile[j * n + start..j * n + start + j];
                let dot: f64 = factor.iter().zip(&row[start..start + j]).map(|(x, y)| x * y).sum();
                row[start + j] = (row[start + j] - dot) / tile[j * n + start + j];
            }
        });
        // Everything to the right: A -= X X^T, lower tiles only.
        let panel: Vec<f64> = below.chunks(n).flat_map(|row| &row[start..end]).copied().collect();
        below.par_chunks_mut(TILE * n).enumerate().for_each(|(tile, rows)| {
            let first = tile * TILE;
            let (m, columns) = (rows.len() / n, first + rows.len() / n);
            let a = Strided { data: &panel[first * width..], row: width, column: 1 };
            let b = Strided { data: &panel, row: 1, column: width };
            multiply_add((m, columns, width), -1.0, a, b, &mut rows[end..], n);
        });
    }
    Ok(())
}

/// Unblocked factorization of the tile `[start, end)` on the diagonal.
fn factor_tile(a: &mut [f64], n: usize, start: usize, end: usize) -> Result<(), usize> {
    for i in start..end {
        for j in start..=i {
            let (row_i, row_j) = (&a[i * n + start..i * n + j], &a[j * n + start..j * n + j]);
            let dot: f64 = row_i.iter().zip(row_j).map(|(x, y)| x * y).sum();
            let rest = a[i * n + j] - dot;
            if i == j {
                if !(rest > 0.0 && rest.is_finite()) {
                    return Err(i);
                }
                a[i * n + i] = rest.sqrt();
            } else {
                a[i * n + j] = rest / a[j * n + j];
            }
        }
    }
    Ok(())
}

/// The inverse of the lower triangle `l` `[n, n]`; the result's strict upper triangle is zero.
pub fn invert_lower(l: &[f64], n: usize) -> Vec<f64> {
    assert_eq!(l.len(), n * n, "l must be square");
    let mut inverse = vec![0.0; n * n];
    for start in (0..n).step_by(TILE) {
        let end = (start + TILE).min(n);
        let width = end - start;
        let (above, rest) = inverse.split_at_mut(start * n);
        let rows = &mut rest[..width * n];
        // L_tile^{-1}, by forward substitution on the unit vectors.
        let mut tile = vec![0.0; width * width];
        for column in 0..width {
            for i in column..width {
                let row = &l[(start + i) * n + start..];
                let dot: f64 = (column..i).map(|k| row[k] * tile[k * width + column]).sum();
                tile[i * width + column] = (f64::from(u8::from(i == column)) - dot) / row[i];
            }
        }
        // Left of the tile: -L_tile^{-1} (L_left X_above), in strips of columns.
        let left: Vec<Vec<f64>> = (0..start)
            .into_par_iter()
            .step_by(TILE)
            .map(|first| {
                let columns = TILE.min(start - first);
                let depth = start - first; // X_above is lower triangular: rows before `first` are 0
                let a = Strided { data: &l[start * n + first..], row: n, column: 1 };
                let b = Strided { data: &above[first * n + first..], row: n, column: 1 };
                let mut product = vec![0.0; width * columns];
                multiply_add((width, columns, depth), 1.0, a, b, &mut product, columns);
                let mut strip = vec![0.0; width * columns];
                let a = Strided { data: &tile, row: width, column: 1 };
                let b = Strided { data: &product, row: columns, column: 1 };
                multiply_add((width, columns, width), -1.0, a, b, &mut strip, columns);
                strip
            })
            .collect();
        for (index, strip) in left.iter().enumerate() {
            let first = index * TILE;
            let columns = strip.len() / width;
            for i in 0..width {
                let to = &mut rows[i * n + first..i * n + first + columns];
                to.copy_from_slice(&strip[i * columns..(i + 1) * columns]);
            }
        }
        for i in 0..width {
            rows[i * n + start..i * n + end].copy_from_slice(&tile[i * width..(i + 1) * width]);
        }
    }
    inverse
}

/// The upper triangle `U` with `U^T U = h^{-1}`, for `h` symmetric positive definite `[n, n]`.
///
/// This is the factor that OBS-style solvers walk along. It needs no inverse of `h`: reversing the
/// order of rows and columns turns the Cholesky factor of `h` into an upper `R` with `R R^T = h`,
/// and `U = R^{-1}`.
///
/// # Errors
/// The index of a column whose pivot is not positive.
pub fn inverse_factor(h: &[f64], n: usize) -> Result<Vec<f64>, usize> {
    let mut reversed: Vec<f64> = h.iter().rev().copied().collect();
    cholesky(&mut reversed, n).map_err(|pivot| n - 1 - pivot)?;
    let mut inverse = invert_lower(&reversed, n);
    inverse.reverse();
    Ok(inverse)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Stream;

    fn gram(n: usize, samples: usize) -> Vec<f64> {
        let mut stream = Stream::new(n as u64);
        let x: Vec<f64> = (0..n * samples).map(|_| f64::from(stream.normal())).collect();
        let mut h = vec![0.0; n * n];
        for row in x.chunks(n) {
            for i in 0..n {
                for j in 0..n {
                    h[i * n + j] += row[i] * row[j];
                }
            }
        }
        h
    }

    #[test]
    fn the_factor_of_the_inverse_inverts() {
        for n in [1, 5, TILE - 1, TILE, 2 * TILE + 7] {
            let h = gram(n, 2 * n + 3);
            let u = inverse_factor(&h, n).unwrap();
            // U h U^T = I is the same statement without an inverse.
            let mut uh = vec![0.0; n * n];
            let view = |data| Strided { data, row: n, column: 1 };
            multiply_add((n, n, n), 1.0, view(&u), view(&h), &mut uh, n);
            let mut identity = vec![0.0; n * n];
            let transposed = Strided { data: &u, row: 1, column: n };
            multiply_add((n, n, n), 1.0, view(&uh), transposed, &mut identity, n);
            for i in 0..n {
                for j in 0..n {
                    let expected = f64::from(u8::from(i == j));
                    assert!((identity[i * n + j] - expected).abs() < 1e-8, "{n}: {i} {j}");
                    assert!(j >= i || u[i * n + j] == 0.0, "U must be upper");
                }
            }
        }
    }

    #[test]
    fn an_indefinite_matrix_names_its_pivot() {
        let h = vec![1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0];
        assert_eq!(inverse_factor(&h, 3), Err(1));
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let h = gram(300, 400);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| inverse_factor(&h, 300).unwrap())
        };
        assert_eq!(run(1), run(3));
    }
}
