//! Leading singular vectors of a gradient.

use super::linalg::{eigen, gram, orthonormalize, product};
use crate::rng::SplitMix64;

/// Smaller extent up to which all singular vectors are computed.
const EXACT: usize = 256;
/// Vectors that the randomized search carries beyond those asked for.
const SPARE: usize = 16;
/// Power steps of the randomized search (Halko, Martinsson and Tropp 2011, algorithm 4.4).
const POWER: usize = 2;

/// Which singular vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Axis {
    /// Left ones: they combine rows.
    Left,
    /// Right ones: they combine columns.
    Right,
}

/// The `rank` leading singular vectors of `g [m, n]` on one side, as orthonormal rows `[rank, m]` or `[rank, n]`;
/// `rank <= min(m, n)`.
///
/// Small matrices, and ranks of half the smaller extent or more, go through the eigenvectors of the smaller Gram matrix in f64.
/// Others go through a randomized subspace iteration with two power steps and a Rayleigh-Ritz step, which costs
/// `O(m n (rank + 16))`. The result is a function of the arguments alone.
///
/// `None` when `g` is zero or holds a number that is not finite.
pub(super) fn leading(g: &[f32], m: usize, n: usize, rank: usize, axis: Axis) -> Option<Vec<f32>> {
    if g.iter().any(|x| !x.is_finite()) || g.iter().all(|x| *x == 0.0) {
        return None;
    }
    let top = g.iter().fold(0.0f32, |top, x| top.max(x.abs()));
    if !(1e-12..1e12).contains(&top) {
        // Squares of such numbers leave the range of f32; directions do not depend on the scale.
        let near: Vec<f32> = g.iter().map(|x| x / top).collect();
        return leading(&near, m, n, rank, axis);
    }
    let small = m.min(n);
    let natural = if n <= m { Axis::Right } else { Axis::Left };
    let vectors = if small <= EXACT || 2 * (rank + SPARE) >= small {
        exact(g, m, n, rank, natural)?
    } else {
        randomized(g, m, n, rank, natural)?
    };
    let (mut vectors, width) = if axis == natural {
        (vectors, small)
    } else {
        (across(g, m, n, &vectors, natural), m.max(n))
    };
    orthonormalize(&mut vectors, width);
    Some(vectors.into_iter().map(|x| x as f32).collect())
}

fn exact(g: &[f32], m: usize, n: usize, rank: usize, axis: Axis) -> Option<Vec<f64>> {
    let small = m.min(n);
    let (_, mut rows) = eigen(gram(g, (m, n), axis == Axis::Left), small)?;
    rows.truncate(rank * small);
    Some(rows)
}

fn randomized(g: &[f32], m: usize, n: usize, rank: usize, axis: Axis) -> Option<Vec<f64>> {
    let (width, other) = if axis == Axis::Right { (n, m) } else { (m, n) };
    let count = (rank + SPARE).min(width);
    let mut rng = SplitMix64::stream(width as u64, other as u64);
    let mut q: Vec<f64> = (0..count * width).map(|_| rng.normal()).collect();
    orthonormalize(&mut q, width);
    for _ in 0..=POWER {
        let mut image = across(g, m, n, &q, axis);
        orthonormalize(&mut image, other);
        q = across(g, m, n, &image, opposite(axis));
        orthonormalize(&mut q, width);
    }
    // Rayleigh-Ritz: inside the subspace, the directions are those of the image's own Gram matrix.
    let image = across(g, m, n, &q, axis);
    let mut small = vec![0.0; count * count];
    product((count, other, count), (&image, other, 1), (&image, 1, other), &mut small, false, 1.0);
    let (_, turn) = eigen(small, count)?;
    let mut vectors = vec![0.0; rank * width];
    product((rank, count, width), (&turn, count, 1), (&q, width, 1), &mut vectors, false, 1.0);
    Some(vectors)
}

fn opposite(axis: Axis) -> Axis {
    if axis == Axis::Right { Axis::Left } else { Axis::Right }
}

/// Takes row vectors on side `from` to the other side: `q gᵀ` from the right, `q g` from the left.
fn across(g: &[f32], m: usize, n: usize, q: &[f64], from: Axis) -> Vec<f64> {
    let (width, other, operand) = match from {
        Axis::Right => (n, m, (g, 1, n)),
        Axis::Left => (m, n, (g, n, 1)),
    };
    let count = q.len() / width;
    // The gradient itself stays in f32: a copy in f64 would be the largest thing of the whole step.
    let narrow: Vec<f32> = q.iter().map(|x| *x as f32).collect();
    let mut out = vec![0.0f32; count * other];
    product((count, width, other), (&narrow, width, 1), operand, &mut out, false, 1.0);
    out.into_iter().map(f64::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `Σ σᵢ uᵢ vᵢᵀ` with the given singular values; also the `uᵢ` and `vᵢ` as rows.
    fn matrix(m: usize, n: usize, sigma: &[f64]) -> (Vec<f32>, Vec<f64>, Vec<f64>) {
        let mut rng = SplitMix64::new((m * n) as u64);
        let mut basis = |width: usize| {
            let mut q: Vec<f64> = (0..sigma.len() * width).map(|_| rng.normal()).collect();
            orthonormalize(&mut q, width);
            q
        };
        let (u, v) = (basis(m), basis(n));
        let mut g = vec![0.0f64; m * n];
        for (k, s) in sigma.iter().enumerate() {
            for i in 0..m {
                for j in 0..n {
                    g[i * n + j] += s * u[k * m + i] * v[k * n + j];
                }
            }
        }
        (g.into_iter().map(|x| x as f32).collect(), u, v)
    }

    #[test]
    fn singular_vectors_are_those_that_the_matrix_was_made_of() {
        let sigma: Vec<f64> = (0..16).map(|i| 0.8f64.powi(i)).collect();
        for (m, n) in [(40, 30), (30, 40), (420, 300), (300, 420)] {
            let (g, u, v) = matrix(m, n, &sigma);
            for (axis, width, want) in [(Axis::Left, m, &u), (Axis::Right, n, &v)] {
                let found = leading(&g, m, n, 8, axis).expect("not zero");
                assert_eq!(found.len(), 8 * width);
                for k in 0..8 {
                    let pair = found[k * width..].iter().zip(&want[k * width..(k + 1) * width]);
                    let along: f64 = pair.map(|(x, y)| f64::from(*x) * y).sum();
                    assert!(along.abs() > 1.0 - 1e-4, "{m}x{n} {axis:?} {k}: {along}");
                }
            }
        }
    }

    #[test]
    fn rows_are_orthonormal_beyond_the_rank_of_the_matrix() {
        for (m, n) in [(20, 12), (12, 20), (400, 300)] {
            let (g, _, _) = matrix(m, n, &[3.0, 1.0]);
            for (axis, width) in [(Axis::Left, m), (Axis::Right, n)] {
                let q = leading(&g, m, n, 10, axis).expect("not zero");
                for i in 0..10 {
                    for j in 0..10 {
                        let (a, b) =
                            (&q[i * width..(i + 1) * width], &q[j * width..(j + 1) * width]);
                        let inner: f32 = a.iter().zip(b).map(|(x, y)| x * y).sum();
                        let same = f32::from(u8::from(i == j));
                        assert!((inner - same).abs() < 1e-5, "{m}x{n} {axis:?}: {i} {j} {inner}");
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_leads_a_matrix_of_zeros_or_of_numbers_that_are_not_finite() {
        assert!(leading(&[0.0; 12], 3, 4, 2, Axis::Left).is_none());
        for bad in [f32::NAN, f32::INFINITY] {
            let mut g = [1.0; 12];
            g[5] = bad;
            assert!(leading(&g, 3, 4, 2, Axis::Left).is_none());
        }
    }

    #[test]
    fn scale_does_not_matter() {
        let sigma: Vec<f64> = (0..16).map(|i| 0.7f64.powi(i)).collect();
        for (m, n) in [(30, 20), (400, 300)] {
            let (g, _, _) = matrix(m, n, &sigma);
            let usual = leading(&g, m, n, 4, Axis::Right).expect("not zero");
            let tiny: Vec<f32> = g.iter().map(|x| x * 1e-22).collect();
            let found = leading(&tiny, m, n, 4, Axis::Right).expect("not zero");
            for k in 0..4 {
                let pair = usual[k * n..(k + 1) * n].iter().zip(&found[k * n..(k + 1) * n]);
                let along: f32 = pair.map(|(x, y)| x * y).sum();
                assert!(along.abs() > 0.999, "{m}x{n} {k}: {along}");
            }
        }
    }
}
