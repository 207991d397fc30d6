//! Error bars and tests for paired comparisons.
//!
//! Everything is deterministic: resampling is seeded per resample, so results do not depend on the
//! number of threads. Functions return `None` where the data cannot support an answer (no values,
//! lengths that differ, a level outside (0, 1)) and never `NaN`.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::rng::SplitMix64;

/// An estimate with a confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The point estimate.
    pub estimate: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Confidence level, such as 0.95.
    pub level: f64,
}

impl Interval {
    /// Whether `value` lies inside the interval, ends included.
    pub fn contains(&self, value: f64) -> bool {
        self.low <= value && value <= self.high
    }
}

/// Sample mean, `None` for no values.
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Sample standard deviation (divisor n − 1), `None` for fewer than two values.
pub fn std_dev(values: &[f64]) -> Option<f64> {
    if values.len() < 2 {
        return None;
    }
    let centre = mean(values)?;
    let squares: f64 = values.iter().map(|x| (x - centre).powi(2)).sum();
    Some((squares / (values.len() - 1) as f64).sqrt())
}

/// Student-t confidence interval of the mean; `None` for fewer than two values.
pub fn mean_interval(values: &[f64], level: f64) -> Option<Interval> {
    let (estimate, spread) = (mean(values)?, std_dev(values)?);
    check_level(level)?;
    let freedom = (values.len() - 1) as f64;
    let half =
        student_t_quantile(0.5 + level / 2.0, freedom) * spread / (values.len() as f64).sqrt();
    Some(Interval { estimate, low: estimate - half, high: estimate + half, level })
}

/// Wilson score interval of a proportion (Wilson, 1927): sound at 0 and 1 and for small `n`, where
/// the textbook normal interval collapses. `None` for `n = 0` or `successes > n`.
pub fn wilson_interval(successes: u64, n: u64, level: f64) -> Option<Interval> {
    check_level(level)?;
    if n == 0 || successes > n {
        return None;
    }
    let (n, p) = (n as f64, successes as f64 / n as f64);
    let z = normal_quantile(0.5 + level / 2.0);
    let denominator = 1.0 + z * z / n;
    let centre = (p + z * z / (2.0 * n)) / denominator;
    let half = z / denominator * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
    let (low, high) = ((centre - half).max(0.0), (centre + half).min(1.0));
    // The ends touch 0 and 1 exactly there; rounding must not push them past the estimate.
    Some(Interval { estimate: p, low: low.min(p), high: high.max(p), level })
}

/// Result of a paired bootstrap.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PairedBootstrap {
    /// Mean of `a − b` with its percentile interval.
    pub difference: Interval,
    /// Two-sided p-value for "no difference".
    pub p_value: f64,
    /// Number of resamples.
    pub resamples: usize,
}

/// Paired bootstrap of the mean difference `a − b` (Efron & Tibshirani, 1993): the same items are
/// drawn for both arms. The interval is the percentile interval at `level`; the two-sided p-value
/// is twice the smaller share of resampled means on either side of zero, with one added to
/// numerator and denominator so that it is never zero.
///
/// `None` when lengths differ, when there is nothing to resample, or when a value is not finite.
pub fn paired_bootstrap(
    a: &[f64],
    b: &[f64],
    resamples: usize,
    level: f64,
    seed: u64,
) -> Option<PairedBootstrap> {
    if a.len() != b.len() {
        return None;
    }
    let differences: Vec<f64> = a.iter().zip(b).map(|(x, y)| x - y).collect();
    let estimate = mean(&differences)?;
    let means = bootstrap(differences.len(), resamples, seed, |draw| {
        draw.iter().map(|&i| differences[i]).sum::<f64>() / draw.len() as f64
    })?;
    check_level(level)?;
    let below = means.iter().filter(|&&m| m <= 0.0).count();
    let above = means.iter().filter(|&&m| m >= 0.0).count();
    let p_value = (2.0 * (below.min(above) + 1) as f64 / (resamples + 1) as f64).min(1.0);
    Some(PairedBootstrap { difference: percentile(estimate, &means, level), p_value, resamples })
}

/// Bootstrap of the ratio Σ`numerators` / Σ`denominators` over items, for instance the negative
/// log-likelihood per token over windows of text. `None` as for [`paired_bootstrap`].
pub fn ratio_bootstrap(
    numerators: &[f64],
    denominators: &[f64],
    resamples: usize,
    level: f64,
    seed: u64,
) -> Option<Interval> {
    if numerators.len() != denominators.len() {
        return None;
    }
    check_level(level)?;
    let ratio = |draw: &[usize]| {
        let top: f64 = draw.iter().map(|&i| numerators[i]).sum();
        let bottom: f64 = draw.iter().map(|&i| denominators[i]).sum();
        top / bottom
    };
    let everything: Vec<usize> = (0..numerators.len()).collect();
    let means = bootstrap(numerators.len(), resamples, seed, ratio)?;
    Some(percentile(ratio(&everything), &means, level))
}

/// Sorted statistics of `resamples` draws with replacement from `0..n`.
fn bootstrap(
    n: usize,
    resamples: usize,
    seed: u64,
    statistic: impl Fn(&[usize]) -> f64 + Sync,
) -> Option<Vec<f64>> {
    if n == 0 || resamples == 0 {
        return None;
    }
    let mut values: Vec<f64> = (0..resamples as u64)
        .into_par_iter()
        .map_init(
            || vec![0usize; n],
            |draw, resample| {
                let mut rng = SplitMix64::stream(seed, resample);
                draw.iter_mut().for_each(|slot| *slot = rng.below(n));
                statistic(draw)
            },
        )
        .collect();
    if values.iter().any(|v| !v.is_finite()) {
        return None;
    }
    values.sort_by(f64::total_cmp);
    Some(values)
}

fn percentile(estimate: f64, sorted: &[f64], level: f64) -> Interval {
    let tail = (1.0 - level) / 2.0;
    Interval { estimate, low: quantile(sorted, tail), high: quantile(sorted, 1.0 - tail), level }
}

/// Quantile of sorted values by linear interpolation between order statistics (type 7 of
/// Hyndman & Fan, the default of R and NumPy). `sorted` must not be empty.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let position = q.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let (below, share) = (position.floor() as usize, position.fract());
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + share * (sorted[above] - sorted[below])
}

/// McNemar's test on paired right/wrong answers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct McNemar {
    /// Items that only the first model got right.
    pub only_first: u64,
    /// Items that only the second model got right.
    pub only_second: u64,
    /// Exact two-sided p-value.
    pub p_value: f64,
}

/// Exact McNemar test (McNemar, 1947): under "equally good", each item that exactly one model got
/// right is a fair coin, so the p-value is a two-sided binomial test on the discordant pairs. With
/// no discordant pair it is 1. `None` when lengths differ.
pub fn mcnemar(first: &[bool], second: &[bool]) -> Option<McNemar> {
    if first.len() != second.len() {
        return None;
    }
    let count = |wanted: (bool, bool)| {
        first.iter().zip(second).filter(|&(&a, &b)| (a, b) == wanted).count() as u64
    };
    let (only_first, only_second) = (count((true, false)), count((false, true)));
    let n = only_first + only_second;
    let smaller = only_first.min(only_second);
    let ln_half_n = n as f64 * 0.5f64.ln();
    let tail: f64 = (0..=smaller)
        .map(|k| {
            let ln_choose = ln_gamma(n as f64 + 1.0)
                - ln_gamma(k as f64 + 1.0)
                - ln_gamma((n - k) as f64 + 1.0);
            (ln_choose + ln_half_n).exp()
        })
        .sum();
    Some(McNemar { only_first, only_second, p_value: (2.0 * tail).min(1.0) })
}

fn check_level(level: f64) -> Option<()> {
    (level > 0.0 && level < 1.0).then_some(())
}

/// Quantile of the standard normal distribution, `p` in (0, 1).
///
/// Found by bisection on the t distribution's limit: plain, exact to about 1e-12, and fast enough
/// for the handful of calls that a report makes.
pub fn normal_quantile(p: f64) -> f64 {
    bisect(p, normal_cdf)
}

/// Quantile of Student's t distribution with `freedom` degrees of freedom, `p` in (0, 1).
pub fn student_t_quantile(p: f64, freedom: f64) -> f64 {
    bisect(p, |t| {
        let tail = 0.5 * incomplete_beta(freedom / (freedom + t * t), freedom / 2.0, 0.5);
        if t < 0.0 { tail } else { 1.0 - tail }
    })
}

fn bisect(p: f64, cdf: impl Fn(f64) -> f64) -> f64 {
    let (mut low, mut high) = (-1.0, 1.0);
    while cdf(low) > p && low > -1e12 {
        low *= 2.0;
    }
    while cdf(high) < p && high < 1e12 {
        high *= 2.0;
    }
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        if cdf(middle) < p { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

/// Φ(x) through the regularised incomplete gamma function P(1/2, x²/2).
fn normal_cdf(x: f64) -> f64 {
    let half = 0.5 * incomplete_gamma(0.5, x * x / 2.0);
    if x < 0.0 { 0.5 - half } else { 0.5 + half }
}

/// Regularised lower incomplete gamma P(a, x): series below a + 1, continued fraction above.
fn incomplete_gamma(a: f64, x: f64) -> f64 {
    if x <= 0.0 {
        return 0.0;
    }
    let front = (a * x.ln() - x - ln_gamma(a)).exp();
    if x < a + 1.0 {
        let (mut term, mut sum) = (1.0 / a, 1.0 / a);
        for k in 1..1000 {
            term *= x / (a + k as f64);
            sum += term;
            if term < sum * 1e-17 {
                break;
            }
        }
        front * sum
    } else {
        let fraction = lentz(x + 1.0 - a, |k| {
            let k = k as f64;
            (-k * (k - a), x + 2.0 * k + 1.0 - a)
        });
        1.0 - front / fraction
    }
}

/// Regularised incomplete beta I_x(a, b) by its continued fraction.
fn incomplete_beta(x: f64, a: f64, b: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return x.clamp(0.0, 1.0);
    }
    if x > (a + 1.0) / (a + b + 2.0) {
        return 1.0 - incomplete_beta(1.0 - x, b, a);
    }
    let ln_beta = ln_gamma(a) + ln_gamma(b) - ln_gamma(a + b);
    let front = (a * x.ln() + b * (1.0 - x).ln() - ln_beta).exp() / a;
    let fraction = lentz(1.0, |k| {
        let m = (k / 2) as f64;
        let numerator = if k % 2 == 0 {
            m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m))
        } else {
            -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0))
        };
        (numerator, 1.0)
    });
    front / fraction
}

/// Continued fraction b₀ + a₁/(b₁ + a₂/(b₂ + …)) by the modified Lentz method.
fn lentz(b0: f64, term: impl Fn(u32) -> (f64, f64)) -> f64 {
    const TINY: f64 = 1e-300;
    let guard = |x: f64| if x.abs() < TINY { TINY } else { x };
    let (mut value, mut c, mut d) = (guard(b0), guard(b0), 0.0);
    for k in 1..1000 {
        let (a, b) = term(k);
        d = 1.0 / guard(b + a * d);
        c = guard(b + a / c);
        let step = c * d;
        value *= step;
        if (step - 1.0).abs() < 1e-16 {
            break;
        }
    }
    value
}

/// ln Γ(x) for x > 0: Stirling's series after shifting the argument above 12.
fn ln_gamma(x: f64) -> f64 {
    let (mut shifted, mut product) = (x, 1.0);
    while shifted < 12.0 {
        product *= shifted;
        shifted += 1.0;
    }
    let inverse = 1.0 / (shifted * shifted);
    let series = (1.0 / 12.0
        - inverse * (1.0 / 360.0 - inverse * (1.0 / 1260.0 - inverse * (1.0 / 1680.0))))
        / shifted;
    (shifted - 0.5) * shifted.ln() - shifted + 0.5 * std::f64::consts::TAU.ln() + series
        - product.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64, tolerance: f64) {
        assert!((a - b).abs() <= tolerance, "{a} is not within {tolerance} of {b}");
    }

    #[test]
    fn quantiles_match_the_tables() {
        close(normal_quantile(0.975), 1.959_963_984_540_054, 1e-10);
        close(normal_quantile(0.5), 0.0, 1e-12);
        close(normal_quantile(0.001), -3.090_232_306_167_813, 1e-9);
        close(student_t_quantile(0.975, 2.0), 4.302_652_729_911_275, 1e-9);
        close(student_t_quantile(0.975, 9.0), 2.262_157_162_740_992, 1e-9);
        close(student_t_quantile(0.05, 30.0), -1.697_260_886_593_957, 1e-9);
    }

    #[test]
    fn mean_interval_of_three_seeds() {
        let interval = mean_interval(&[1.0, 2.0, 3.0], 0.95).unwrap();
        close(interval.estimate, 2.0, 1e-15);
        close(interval.high - 2.0, 4.302_652_729_911_275 / 3f64.sqrt(), 1e-9);
        assert_eq!(mean_interval(&[1.0], 0.95), None);
        assert_eq!(mean_interval(&[1.0, 2.0], 1.0), None);
    }

    #[test]
    fn wilson_matches_published_values() {
        let ten = wilson_interval(0, 10, 0.95).unwrap();
        assert_eq!(ten.low, 0.0);
        close(ten.high, 0.277_533, 1e-5);
        let half = wilson_interval(50, 100, 0.95).unwrap();
        close(half.low, 0.403_832, 1e-5);
        close(half.high, 0.596_168, 1e-5);
        let all = wilson_interval(10, 10, 0.95).unwrap();
        assert_eq!((all.estimate, all.high), (1.0, 1.0));
        assert_eq!(wilson_interval(1, 0, 0.95), None);
        assert_eq!(wilson_interval(3, 2, 0.95), None);
    }

    #[test]
    fn bootstrap_sees_a_clear_difference_and_no_difference() {
        let mut rng = SplitMix64::new(3);
        let a: Vec<f64> = (0..200).map(|_| rng.normal()).collect();
        let better: Vec<f64> = a.iter().map(|x| x - 0.5 + 0.1 * rng.normal()).collect();
        let clear = paired_bootstrap(&a, &better, 2000, 0.95, 1).unwrap();
        close(clear.difference.estimate, 0.5, 0.05);
        assert!(clear.difference.low > 0.4 && clear.p_value < 0.002, "{clear:?}");

        let same = paired_bootstrap(&a, &a, 2000, 0.95, 1).unwrap();
        assert_eq!((same.difference.low, same.difference.high, same.p_value), (0.0, 0.0, 1.0));
        assert_eq!(paired_bootstrap(&a, &a[1..], 10, 0.95, 1), None);
        assert_eq!(paired_bootstrap(&[], &[], 10, 0.95, 1), None);
        assert_eq!(paired_bootstrap(&[f64::NAN], &[0.0], 10, 0.95, 1), None);
    }

    #[test]
    fn bootstrap_interval_agrees_with_theory_and_with_any_thread_count() {
        let mut rng = SplitMix64::new(9);
        let a: Vec<f64> = (0..400).map(|_| rng.normal()).collect();
        let zero = vec![0.0; a.len()];
        let run = || paired_bootstrap(&a, &zero, 4000, 0.95, 5).unwrap();
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(run);
        let three = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap().install(run);
        assert_eq!(one, three);
        let theory = mean_interval(&a, 0.95).unwrap();
        close(one.difference.low, theory.low, 0.01);
        close(one.difference.high, theory.high, 0.01);
    }

    #[test]
    fn ratio_weights_by_the_denominator() {
        let interval = ratio_bootstrap(&[2.0, 30.0], &[1.0, 10.0], 500, 0.9, 2).unwrap();
        close(interval.estimate, 32.0 / 11.0, 1e-15);
        assert!(interval.low >= 2.0 && interval.high <= 3.0);
    }

    #[test]
    fn mcnemar_is_the_exact_binomial_test() {
        // 1 against 8 discordant pairs: 2 * (1 + 9) / 2^9.
        let first: Vec<bool> = (0..20).map(|i| !(8..12).contains(&i)).collect();
        let second: Vec<bool> = (0..20).map(|i| i == 8 || i >= 12).collect();
        let test = mcnemar(&first, &second).unwrap();
        assert_eq!((test.only_first, test.only_second), (8, 1));
        close(test.p_value, 20.0 / 512.0, 1e-12);
        assert_eq!(mcnemar(&first, &first).unwrap().p_value, 1.0);
        assert_eq!(mcnemar(&first, &second[1..]), None);
    }

    #[test]
    fn ln_gamma_of_integers_and_halves() {
        close(ln_gamma(1.0), 0.0, 1e-12);
        close(ln_gamma(0.5), std::f64::consts::PI.sqrt().ln(), 1e-12);
        close(ln_gamma(11.0), 3_628_800f64.ln(), 1e-12);
    }
}
