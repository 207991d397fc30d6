//! Binary-coding quantization of one vector: `v ~ sum_i alpha_i b_i` with signs `b_i` and few scales, and scales that are sums of
//! powers of two.

/// A code has one bit per scale, set for `+alpha_i`; there are at most this many scales.
pub const MOST_BITS: u8 = 8;
/// A term is no smaller than the first by more than this power of two, so that single precision holds their sum exactly.
const SPAN: i32 = 20;
/// Exponents that are stored; below, a term is 0.
const EXPONENTS: std::ops::RangeInclusive<i32> = -120..=120;
/// What keeps divisions of conjugate gradients away from 0, as in the reference.
const EPSILON: f64 = 1e-6;

/// One signed power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    /// The exponent.
    pub exponent: i8,
    /// Whether it is subtracted.
    pub negative: bool,
}

/// `x` as at most `count` signed powers of two, largest first: `t_1 = sgn(x) 2^round(log2 |x|)`, then the same for what is left.
/// Rounding is in the logarithm, so later terms are often negative.
pub fn apot(x: f64, count: usize) -> Vec<Term> {
    let (mut left, mut terms) = (x, Vec::<Term>::new());
    while terms.len() < count && left != 0.0 && left.is_finite() {
        let exponent = left.abs().log2().round() as i32;
        let near = terms.first().is_none_or(|first| i32::from(first.exponent) - exponent <= SPAN);
        if !near || !EXPONENTS.contains(&exponent) {
            break;
        }
        let negative = left < 0.0;
        terms.push(Term { exponent: exponent as i8, negative });
        left -= if negative { -(exponent as f64).exp2() } else { (exponent as f64).exp2() };
    }
    terms
}

/// The sum of some terms, exactly.
pub fn value_of(terms: &[Term]) -> f32 {
    let term = |term: &Term| {
        let size = f64::from(term.exponent).exp2();
        if term.negative { -size } else { size }
    };
    terms.iter().map(term).sum::<f64>() as f32
}

/// All `2^q` sums `sum_i ±alpha_i`, by code.
pub fn sums(alphas: &[f32]) -> Vec<f32> {
    let sum = |code: usize| {
        let signed = |(i, alpha): (usize, &f32)| if code >> i & 1 == 1 { *alpha } else { -alpha };
        // Adding zero turns -0 into 0.
        alphas.iter().enumerate().map(signed).sum::<f32>() + 0.0
    };
    (0..1usize << alphas.len()).map(sum).collect()
}

/// Finds the nearest sum.
#[derive(Clone, Debug)]
pub struct Nearest {
    /// Codes and sums, by rising sum.
    sorted: Vec<(u8, f32)>,
    /// Between neighbours.
    middles: Vec<f32>,
}

impl Nearest {
    /// The sums of these scales.
    pub fn new(alphas: &[f32]) -> Self {
        let mut sorted: Vec<(u8, f32)> =
            sums(alphas).into_iter().enumerate().map(|(code, sum)| (code as u8, sum)).collect();
        // Of equal sums the one with most plus signs comes first: a vector of zeros gets all of them.
        sorted.sort_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0)));
        sorted.dedup_by(|later, first| later.1 == first.1);
        let middles = sorted.windows(2).map(|pair| 0.5 * (pair[0].1 + pair[1].1)).collect();
        Self { sorted, middles }
    }

    /// Code and sum nearest to `w`.
    #[inline]
    pub fn find(&self, w: f32) -> (u8, f32) {
        let at = match self.middles.len() {
            // A count of comparisons is faster than a search, and vectorizes.
            0..=16 => self.middles.iter().map(|middle| usize::from(w > *middle)).sum(),
            _ => self.middles.partition_point(|middle| w > *middle),
        };
        self.sorted[at]
    }
}

/// How scales are fitted.
#[derive(Clone, Copy, Debug)]
pub struct Fitting {
    /// Scales, and bits per weight.
    pub bits: u8,
    /// Alternations of scales and signs.
    pub rounds: usize,
    /// Powers of two per scale; `None` leaves scales as they are.
    pub terms: Option<usize>,
}

impl Fitting {
    /// Scales of `v`, largest first.
    ///
    /// Signs and scales are found greedily, then in turns: least squares by as many steps of conjugate gradients as there are
    /// scales, rounding to powers of two, nearest sums. Where rounding makes a turn for the worse, the best scales met are kept;
    /// the reference keeps the last.
    pub fn fit(&self, v: &[f32]) -> Vec<f32> {
        let (codes, alphas) = greedy(v, usize::from(self.bits));
        if self.bits < 2 {
            return self.stored(alphas);
        }
        let (best, least) = self.turns(v, codes, self.stored(alphas));
        if self.bits <= 4 {
            return best;
        }
        // With many scales turns end far from the best: equal steps over the whole range are a better start.
        let most = v.iter().fold(0f64, |most, w| most.max(f64::from(w.abs())));
        let halves = (1..=i32::from(self.bits)).map(|i| most * f64::from(-i).exp2()).collect();
        let start = self.stored(halves);
        let (other, error) = self.turns(v, assign(v, &start).0, start);
        if error < least { other } else { best }
    }

    /// The best scales met in turns from a start, and their squared error.
    fn turns(&self, v: &[f32], mut codes: Vec<u8>, start: Vec<f32>) -> (Vec<f32>, f64) {
        let (mut best, mut last, mut least) = (start.clone(), start, f64::INFINITY);
        for round in 0..=self.rounds {
            if round > 0 {
                last = self.stored(least_squares(v, &codes, usize::from(self.bits)));
            }
            let (found, error) = assign(v, &last);
            if error < least {
                (least, best) = (error, last.clone());
            }
            // Signs that stay give the same scales again.
            if round > 0 && found == codes {
                break;
            }
            codes = found;
        }
        (best, least)
    }

    /// Scales as they are stored: magnitudes, largest first, in powers of two.
    fn stored(&self, mut alphas: Vec<f64>) -> Vec<f32> {
        alphas.iter_mut().for_each(|alpha| *alpha = alpha.abs());
        alphas.sort_by(|a, b| b.total_cmp(a));
        let round = |alpha: f64| match self.terms {
            Some(terms) => value_of(&apot(alpha, terms)),
            None => alpha as f32,
        };
        alphas.into_iter().map(round).collect()
    }
}

/// `b_i = sign(r)`, `alpha_i = mean |r|`, `r -= alpha_i b_i`; the sign of 0 is plus.
fn greedy(v: &[f32], bits: usize) -> (Vec<u8>, Vec<f64>) {
    let mut left: Vec<f64> = v.iter().map(|w| f64::from(*w)).collect();
    let (mut codes, mut alphas) = (vec![0u8; v.len()], Vec::with_capacity(bits));
    for bit in 0..bits {
        let alpha = left.iter().map(|r| r.abs()).sum::<f64>() / left.len().max(1) as f64;
        for (code, r) in codes.iter_mut().zip(&mut left) {
            let plus = *r >= 0.0;
            *code |= u8::from(plus) << bit;
            *r -= if plus { alpha } else { -alpha };
        }
        alphas.push(alpha);
    }
    (codes, alphas)
}

/// Nearest codes and the squared error.
fn assign(v: &[f32], alphas: &[f32]) -> (Vec<u8>, f64) {
    let nearest = Nearest::new(alphas);
    let mut error = 0.0;
    let codes = v.iter().map(|w| {
        let (code, sum) = nearest.find(*w);
        error += f64::from(w - sum).powi(2);
        code
    });
    (codes.collect(), error)
}

/// Solves `(B^T B) alpha = B^T v`.
fn least_squares(v: &[f32], codes: &[u8], bits: usize) -> Vec<f64> {
    // Weights with the same code are one row of B.
    let (mut counts, mut totals) = ([0f64; 256], [0f64; 256]);
    for (w, code) in v.iter().zip(codes) {
        counts[usize::from(*code)] += 1.0;
        totals[usize::from(*code)] += f64::from(*w);
    }
    let sign = |code: usize, i: usize| if code >> i & 1 == 1 { 1.0 } else { -1.0 };
    let (mut matrix, mut right) = (vec![0f64; bits * bits], vec![0f64; bits]);
    for code in 0..1usize << bits {
        for i in 0..bits {
            right[i] += sign(code, i) * totals[code];
            for j in 0..bits {
                matrix[i * bits + j] += sign(code, i) * sign(code, j) * counts[code];
            }
        }
    }
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut alphas = vec![0f64; bits];
    let mut residual = right;
    let mut direction = residual.clone();
    let mut norm = dot(&residual, &residual);
    for _ in 0..bits {
        let image: Vec<f64> = matrix.chunks(bits).map(|row| dot(row, &direction)).collect();
        let step = norm / (dot(&direction, &image) + EPSILON * norm.max(f64::MIN_POSITIVE));
        for i in 0..bits {
            alphas[i] += step * direction[i];
            residual[i] -= step * image[i];
        }
        let next = dot(&residual, &residual);
        let turn = next / norm.max(f64::MIN_POSITIVE);
        direction.iter_mut().zip(&residual).for_each(|(d, r)| *d = r + turn * *d);
        norm = next;
    }
    alphas
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Stream;

    fn error(v: &[f32], alphas: &[f32]) -> f64 {
        assign(v, alphas).1
    }

    #[test]
    fn scales_are_sums_of_powers_of_two_exactly() {
        for (seed, terms) in [(1, 1), (2, 2), (3, 3)] {
            let v = Stream::new(seed).normals(300);
            for bits in 1..=4 {
                for alpha in (Fitting { bits, rounds: 20, terms: Some(terms) }).fit(&v) {
                    let found = apot(f64::from(alpha), terms);
                    assert!(found.len() <= terms);
                    assert_eq!(value_of(&found), alpha);
                }
            }
        }
        assert_eq!(
            apot(3.0, 3),
            [Term { exponent: 2, negative: false }, Term { exponent: 0, negative: true }]
        );
        assert!(apot(0.0, 3).is_empty());
        // What is left would not fit beside the first term.
        assert_eq!(apot(1.0 + 1e-9, 3).len(), 1);
    }

    #[test]
    fn more_rounds_never_lose_more_without_rounding() {
        let v = Stream::new(4).normals(500);
        for bits in [2, 3, 4] {
            let at = |rounds| error(&v, &Fitting { bits, rounds, terms: None }.fit(&v));
            let mut last = f64::INFINITY;
            for rounds in 0..12 {
                assert!(at(rounds) <= last * (1.0 + 1e-12), "{bits} {rounds}");
                last = at(rounds);
            }
            assert!(last < 0.95 * at(0) || bits == 2, "{bits}");
        }
    }

    #[test]
    fn eight_scales_lose_less_than_a_percent() {
        let v = Stream::new(5).normals(600);
        let norm: f64 = v.iter().map(|w| f64::from(*w).powi(2)).sum();
        let lost = error(&v, &Fitting { bits: 8, rounds: 20, terms: None }.fit(&v));
        assert!((lost / norm).sqrt() < 0.01, "{}", (lost / norm).sqrt());
    }

    #[test]
    fn one_bit_holds_a_constant_magnitude_and_zeros_stay_zeros() {
        let v: Vec<f32> = (0..40).map(|i| if i % 3 == 0 { -0.25 } else { 0.25 }).collect();
        for terms in [Some(1), None] {
            let alphas = Fitting { bits: 1, rounds: 50, terms }.fit(&v);
            assert_eq!(alphas, [0.25]);
            assert_eq!(error(&v, &alphas), 0.0);
        }
        let alphas = Fitting { bits: 3, rounds: 50, terms: Some(3) }.fit(&[0.0; 24]);
        assert_eq!(alphas, [0.0; 3]);
        assert_eq!(Nearest::new(&alphas).find(0.0), (0b111, 0.0));
    }

    #[test]
    fn a_weight_goes_to_the_nearest_sum() {
        let alphas = [0.75f32, 0.25, 0.125, 0.0625, 0.03125];
        let nearest = Nearest::new(&alphas);
        let all = sums(&alphas);
        for w in Stream::new(6).normals(500) {
            let (code, sum) = nearest.find(w);
            assert_eq!(all[usize::from(code)], sum);
            assert!(all.iter().all(|other| (w - sum).abs() <= (w - other).abs() + 1e-6));
        }
    }
}
