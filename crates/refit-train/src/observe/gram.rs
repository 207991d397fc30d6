//! H = Σ x xᵀ, accumulated in f64.
//!
//! The upper triangle is cut into fixed square tiles; each tile is one single-threaded f64 matrix
//! product per chunk of rows, and tiles are shared out over threads. Which thread computes a tile
//! changes nothing in its arithmetic, so H does not depend on the number of threads. Products of
//! f32 values are exact in f64, so the only rounding is that of the f64 sums.

use gemm::Parallelism;
use rayon::prelude::*;

/// Side of a tile: large enough for the product to run at full speed, small enough to share out
/// 576 columns over a few threads.
const TILE: usize = 192;
/// Rows converted to f64 at a time, which bounds the scratch memory (512 × 1536 × 8 B = 6 MB).
const CHUNK_ROWS: usize = 512;

#[derive(Debug, Clone)]
pub(super) struct Gram {
    columns: usize,
    /// Row-major; only tiles on or above the diagonal are maintained.
    upper: Vec<f64>,
}

impl Gram {
    pub(super) fn new(columns: usize) -> Self {
        Self { columns, upper: vec![0.0; columns * columns] }
    }

    pub(super) fn observe(&mut self, rows: &[f32]) {
        if self.columns == 0 {
            return;
        }
        for chunk in rows.chunks(CHUNK_ROWS * self.columns) {
            let wide: Vec<f64> = chunk.iter().map(|&x| f64::from(x)).collect();
            self.add(&wide);
        }
    }

    fn add(&mut self, x: &[f64]) {
        let (columns, rows) = (self.columns, x.len() / self.columns);
        let tiles = columns.div_ceil(TILE);
        let pairs: Vec<(usize, usize)> =
            (0..tiles).flat_map(|i| (i..tiles).map(move |j| (i * TILE, j * TILE))).collect();
        let upper = Shared(self.upper.as_mut_ptr());
        pairs.into_par_iter().for_each(|(i, j)| {
            let (height, width) = (TILE.min(columns - i), TILE.min(columns - j));
            let target = upper.at(i * columns + j);
            let stride = columns as isize;
            // SAFETY: `x` holds `rows × columns` values, and columns i..i+height and j..j+width
            // exist. The tile at (i, j) lies inside `upper` (columns²) and no other tile of this
            // parallel loop overlaps it, so nobody else reads or writes it meanwhile.
            unsafe {
                gemm::gemm(
                    height,
                    width,
                    rows,
                    target,
                    1,
                    stride,
                    true,
                    x.as_ptr().add(i),
                    stride,
                    1,
                    x.as_ptr().add(j),
                    1,
                    stride,
                    1.0,
                    1.0,
                    false,
                    false,
                    false,
                    Parallelism::None,
                );
            }
        });
    }

    /// The whole symmetric matrix.
    pub(super) fn full(&self) -> Vec<f64> {
        let n = self.columns;
        let mut full = self.upper.clone();
        for i in 0..n {
            for j in 0..i {
                full[i * n + j] = self.upper[j * n + i];
            }
        }
        full
    }
}

/// A pointer that may cross threads; [`Gram::add`] guarantees disjoint writes.
#[derive(Clone, Copy)]
struct Shared(*mut f64);
// SAFETY: only used by `Gram::add`, whose tiles do not overlap.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn at(&self, offset: usize) -> *mut f64 {
        self.0.wrapping_add(offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    fn data(rows: usize, columns: usize) -> Vec<f32> {
        let mut rng = SplitMix64::new(11);
        (0..rows * columns).map(|_| rng.normal() as f32).collect()
    }

    #[test]
    fn equals_the_definition_across_tile_edges() {
        for (rows, columns) in [(1, 1), (5, 7), (600, 200), (3, TILE + 1)] {
            let x = data(rows, columns);
            let mut gram = Gram::new(columns);
            gram.observe(&x);
            let full = gram.full();
            for (i, j) in [(0, 0), (columns - 1, 0), (columns / 2, columns - 1)] {
                let expected: f64 = (0..rows)
                    .map(|r| f64::from(x[r * columns + i]) * f64::from(x[r * columns + j]))
                    .sum();
                let got = full[i * columns + j];
                assert!((got - expected).abs() < 1e-10, "{rows}x{columns} at {i},{j}");
                assert_eq!(got, full[j * columns + i]);
            }
        }
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let x = data(700, 500);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut gram = Gram::new(500);
                gram.observe(&x);
                gram.full()
            })
        };
        assert!(run(1) == run(3));
    }
}
