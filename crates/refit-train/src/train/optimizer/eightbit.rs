//! Block-wise dynamic 8-bit quantization (Dettmers et al. 2022): one absolute maximum per block, and 256 codes that are dense
//! around zero and reach over seven decades.

use std::sync::OnceLock;

/// Elements that share a scale.
pub const BLOCK: usize = 256;

/// A code book: sorted values in `[-1, 1]` or `[0, 1]`.
#[derive(Debug)]
pub struct Codes {
    values: [f32; 256],
    /// Midpoints between neighbours.
    borders: [f32; 255],
}

impl Codes {
    /// The signed book, for first moments.
    pub fn signed() -> &'static Self {
        static BOOK: OnceLock<Codes> = OnceLock::new();
        BOOK.get_or_init(|| Self::dynamic(true))
    }

    /// The unsigned book, for second moments.
    pub fn unsigned() -> &'static Self {
        static BOOK: OnceLock<Codes> = OnceLock::new();
        BOOK.get_or_init(|| Self::dynamic(false))
    }

    /// Decade `10^(i-6)` holds `2^i` values (twice as many without signs): the centres of equal parts of `[0.1, 1]`.
    fn dynamic(signed: bool) -> Self {
        let mut values = vec![0.0f64, 1.0];
        for i in 0..7 {
            let parts = if signed { 1 << i } else { 2 << i };
            for j in 0..parts {
                let centre = 0.1 + 0.9 * (j as f64 + 0.5) / parts as f64;
                let value = centre * 10f64.powi(i - 6);
                values.push(value);
                if signed {
                    values.push(-value);
                }
            }
        }
        values.sort_by(f64::total_cmp);
        let values: [f32; 256] = std::array::from_fn(|i| values[i] as f32);
        let borders = std::array::from_fn(|i| 0.5 * (values[i] + values[i + 1]));
        Self { values, borders }
    }

    /// The code of zero.
    pub fn zero(&self) -> u8 {
        self.nearest(0.0)
    }

    fn nearest(&self, x: f32) -> u8 {
        self.borders.partition_point(|&border| border < x) as u8
    }

    /// Values of `codes` times `scale`.
    pub fn decode(&self, codes: &[u8], scale: f32, out: &mut [f32]) {
        for (o, &c) in out.iter_mut().zip(codes) {
            *o = self.values[usize::from(c)] * scale;
        }
    }

    /// Nearest codes of `values` over their absolute maximum, which is returned.
    pub fn encode(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let top = values.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let inverse = if top > 0.0 { 1.0 / top } else { 0.0 };
        for (c, x) in codes.iter_mut().zip(values) {
            *c = self.nearest(x * inverse);
        }
        top
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn books_are_sorted_and_hold_zero_and_one() {
        for book in [Codes::signed(), Codes::unsigned()] {
            assert!(book.values.windows(2).all(|w| w[0] < w[1]));
            assert_eq!(book.values[255], 1.0);
            assert_eq!(book.values[usize::from(book.zero())], 0.0);
        }
        assert!(Codes::signed().values[0] < -0.99 && Codes::unsigned().values[0] == 0.0);
    }

    #[test]
    fn a_round_trip_is_close_over_many_decades() {
        let values: Vec<f32> = (0..256).map(|i| (i as f32 - 128.0) * 1e-3).collect();
        let (mut codes, mut back) = (vec![0; 256], vec![0.0; 256]);
        let scale = Codes::signed().encode(&values, &mut codes);
        assert_eq!(scale, 0.128);
        Codes::signed().decode(&codes, scale, &mut back);
        let mut sum = 0.0;
        for (x, y) in values.iter().zip(&back).filter(|(x, _)| **x != 0.0) {
            // Decade i is cut into 2^i parts; at its upper edge the next one's coarser parts begin, five times as wide.
            let decade = ((x.abs() / scale).log10().ceil() + 6.0).clamp(0.0, 6.0);
            let half = scale * 0.45 * 10f32.powf(decade - 6.0) / 2f32.powf(decade);
            assert!((x - y).abs() <= 3.0 * half, "{x} {y}");
            sum += (x / y - 1.0).abs();
        }
        assert!(sum / 255.0 < 0.02, "mean relative error {}", sum / 255.0);
        // A block of zeros stays zero.
        assert_eq!(Codes::unsigned().encode(&[0.0; 4], &mut codes[..4]), 0.0);
        Codes::unsigned().decode(&codes[..4], 0.0, &mut back[..4]);
        assert_eq!(back[..4], [0.0; 4]);
    }
}
