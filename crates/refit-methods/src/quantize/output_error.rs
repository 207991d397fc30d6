//! How far the outputs of a linear move when its weights do: `||(W - W_hat) X||^2`, from the inputs' correlations alone.

use rayon::prelude::*;

use crate::linalg::{Strided, multiply_add};

/// Rows per thread-sized piece.
const STRIP: usize = 64;

/// `d H d^T` of every row `d` of `change` `[rows, width]`, for `H` `[width, width]`: the squared error of that row's outputs
/// over all inputs that `H = X X^T` was made of.
pub fn row_errors(change: &[f32], width: usize, h: &[f32]) -> Vec<f64> {
    assert_eq!(h.len(), width * width, "H must be square");
    change
        .par_chunks(STRIP * width)
        .flat_map_iter(|rows| {
            let count = rows.len() / width;
            let mut product = vec![0f32; rows.len()];
            let a = Strided { data: rows, row: width, column: 1 };
            let b = Strided { data: h, row: width, column: 1 };
            multiply_add((count, width, width), 1.0, a, b, &mut product, width);
            rows.chunks(width)
                .zip(product.chunks(width))
                .map(|(d, p)| {
                    let dot: f64 =
                        d.iter().zip(p).map(|(d, p)| f64::from(*d) * f64::from(*p)).sum();
                    dot.max(0.0)
                })
                .collect::<Vec<f64>>()
        })
        .collect()
}

/// The sum over all rows.
pub fn total_error(change: &[f32], width: usize, h: &[f32]) -> f64 {
    row_errors(change, width, h).iter().sum()
}

/// The part of `h` `[width, width]` among columns `from..from + size`.
pub fn block_of(h: &[f32], width: usize, from: usize, size: usize) -> Vec<f32> {
    (from..from + size)
        .flat_map(|i| h[i * width + from..i * width + from + size].to_vec())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Stream, correlated_gram, output_error};

    #[test]
    fn equals_the_definition() {
        let (n, rows) = (48, 70);
        let h = correlated_gram(n, 200, 3);
        let narrow: Vec<f32> = h.iter().map(|x| *x as f32).collect();
        let a = Stream::new(1).normals(rows * n);
        let b = Stream::new(2).normals(rows * n);
        let change: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a - b).collect();
        let (found, expected) = (total_error(&change, n, &narrow), output_error(&a, &b, &h, n));
        assert!((found / expected - 1.0).abs() < 1e-4, "{found} {expected}");
        let part = block_of(&narrow, n, 16, 8);
        assert_eq!((part[0], part[9]), (narrow[16 * n + 16], narrow[17 * n + 17]));
    }
}
