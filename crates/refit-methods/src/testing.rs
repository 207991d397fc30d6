//! Numbers for tests: a small deterministic stream of normal deviates.

/// SplitMix64 with a Box–Muller transform.
pub struct Stream(u64);

impl Stream {
    /// A stream of its own for every seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5678))
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1).
    pub fn uniform(&mut self) -> f64 {
        ((self.bits() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.uniform()).cos()) as f32
    }

    /// `count` standard normals.
    pub fn normals(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.normal()).collect()
    }
}

/// `H = X^T X` of `samples` draws of correlated inputs, `[n, n]`.
pub fn correlated_gram(n: usize, samples: usize, seed: u64) -> Vec<f64> {
    let mut stream = Stream::new(seed);
    let mixing = stream.normals(n * 8);
    let mut h = vec![0f64; n * n];
    for _ in 0..samples {
        let z = stream.normals(n.max(8));
        let x: Vec<f64> = (0..n)
            .map(|i| {
                let common: f32 =
                    mixing[i * 8..(i + 1) * 8].iter().zip(&z).map(|(m, z)| m * z).sum();
                f64::from(z[i] + 0.5 * common)
            })
            .collect();
        for i in 0..n {
            for j in 0..n {
                h[i * n + j] += x[i] * x[j];
            }
        }
    }
    h
}

/// `||(W - Q) X||^2` through `H = X X^T`, for `W` and `Q` `[rows, n]`.
pub fn output_error(before: &[f32], after: &[f32], h: &[f64], n: usize) -> f64 {
    before
        .chunks(n)
        .zip(after.chunks(n))
        .map(|(a, b)| {
            let d: Vec<f64> = a.iter().zip(b).map(|(a, b)| f64::from(a - b)).collect();
            (0..n).map(|i| (0..n).map(|j| d[i] * h[i * n + j] * d[j]).sum::<f64>()).sum::<f64>()
        })
        .sum()
}
