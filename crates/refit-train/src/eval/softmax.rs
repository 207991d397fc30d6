//! Log-softmax over a vocabulary, fused with what is asked of it.
//!
//! A vocabulary of 49 152 means fifty million exponentials per thousand tokens, so the exponential
//! is a polynomial that compilers vectorize (relative error below 2e-7); sums run in f32 lanes over
//! a few hundred values and then in f64.

/// What one row of logits says about the token that came.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowScore {
    /// −log p(target), in nats.
    pub nll: f64,
    /// ln Σ exp(logit).
    pub log_sum_exp: f64,
    /// Index of the largest logit (the first of equals).
    pub top: usize,
    /// Whether that is the target.
    pub target_is_top: bool,
}

/// Scores one row of logits. Any logit that is NaN or +∞ makes `log_sum_exp` not finite.
///
/// A target outside the row has no probability: its loss is infinite.
pub fn score_row(logits: &[f32], target: usize) -> RowScore {
    let log_sum_exp = log_sum_exp(logits);
    let mut top = 0;
    let largest = max(logits);
    if let Some(index) = logits.iter().position(|&x| x == largest) {
        top = index;
    }
    let nll = logits.get(target).map_or(f64::INFINITY, |&z| log_sum_exp - f64::from(z));
    RowScore { nll, log_sum_exp, top, target_is_top: top == target }
}

/// ln Σ exp(x), stable for any finite values; −∞ entries count as absent.
pub fn log_sum_exp(x: &[f32]) -> f64 {
    let largest = max(x);
    if !largest.is_finite() {
        return f64::from(largest);
    }
    let sum: f64 = blocks(x, |v| exp(v - largest));
    // A NaN does not show in the maximum, but it does in the sum.
    f64::from(largest) + sum.ln()
}

/// KL(p ‖ q) in nats between two softmax distributions given by logits and their log-sum-exps:
/// Σ p (p_logit − q_logit) − lse_p + lse_q. Never below zero except for rounding, and exactly zero
/// for equal rows.
pub fn kl_divergence(p: &[f32], p_log_sum: f64, q: &[f32], q_log_sum: f64) -> f64 {
    let shift = p_log_sum as f32;
    // Normalizing by the sum of the very terms that are averaged keeps the rounding of `shift` out.
    let (mut weighted, mut mass) = (0.0f64, 0.0f64);
    for (p, q) in p.chunks(LANES * 32).zip(q.chunks(LANES * 32)) {
        let (mut w, mut m) = ([0.0f32; LANES], [0.0f32; LANES]);
        let (p_body, p_tail) = p.as_chunks::<LANES>();
        let (q_body, q_tail) = q.as_chunks::<LANES>();
        for (p, q) in p_body.iter().zip(q_body) {
            for lane in 0..LANES {
                let share = exp(p[lane] - shift);
                let gap = if share > 0.0 { p[lane] - q[lane] } else { 0.0 };
                w[lane] += share * gap;
                m[lane] += share;
            }
        }
        for (lane, (&p, &q)) in p_tail.iter().zip(q_tail).enumerate() {
            let share = exp(p - shift);
            w[lane] += if share > 0.0 { share * (p - q) } else { 0.0 };
            m[lane] += share;
        }
        weighted += w.iter().map(|&x| f64::from(x)).sum::<f64>();
        mass += m.iter().map(|&x| f64::from(x)).sum::<f64>();
    }
    weighted / mass - p_log_sum + q_log_sum
}

const LANES: usize = 16;

/// Sums `f` in f32 lanes over short stretches, and the stretches in f64.
#[inline(always)]
fn blocks(x: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    x.chunks(LANES * 32)
        .map(|stretch| {
            let mut lanes = [0.0f32; LANES];
            let (body, tail) = stretch.as_chunks::<LANES>();
            for values in body {
                for lane in 0..LANES {
                    lanes[lane] += f(values[lane]);
                }
            }
            for (lane, &value) in lanes.iter_mut().zip(tail) {
                *lane += f(value);
            }
            lanes.iter().map(|&x| f64::from(x)).sum::<f64>()
        })
        .sum()
}

/// Largest value, ignoring NaN; −∞ for none.
fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (body, tail) = x.as_chunks::<LANES>();
    for values in body {
        for lane in 0..LANES {
            lanes[lane] = if values[lane] > lanes[lane] { values[lane] } else { lanes[lane] };
        }
    }
    lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}

/// exp(x) for x ≤ about 88: 2ᵏ · 2ʳ with |r| ≤ ½, 2ʳ by a polynomial. Values below −87 give 0; NaN
/// stays NaN.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding and taking away 1.5 · 2²³ rounds to the nearest integer without a branch.
    const ROUND: f32 = 12_582_912.0;
    let scaled = x * std::f32::consts::LOG2_E;
    let whole = (scaled + ROUND) - ROUND;
    // ln 2 in two parts, so that the remainder keeps its low bits (Cody and Waite).
    let rest = (x - whole * 0.693_359_4) - whole * -2.121_944_4e-4;
    let series = 1.0
        + rest
            * (1.0
                + rest
                    * (0.5
                        + rest
                            * (1.0 / 6.0
                                + rest * (1.0 / 24.0 + rest * (1.0 / 120.0 + rest / 720.0)))));
    let power = f32::from_bits((((whole as i32) + 127) << 23) as u32);
    let value = series * power;
    if x < -87.0 { 0.0 } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    fn row(n: usize, seed: u64, scale: f64) -> Vec<f32> {
        let mut rng = SplitMix64::new(seed);
        (0..n).map(|_| (scale * rng.normal()) as f32).collect()
    }

    fn exact_lse(x: &[f32]) -> f64 {
        let top = x.iter().map(|&v| f64::from(v)).fold(f64::NEG_INFINITY, f64::max);
        top + x.iter().map(|&v| (f64::from(v) - top).exp()).sum::<f64>().ln()
    }

    #[test]
    fn the_exponential_is_accurate() {
        for i in 0..20_000 {
            let x = -86.9 + i as f32 * 0.0087;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / want - 1.0).abs() < 3e-7, "{x}: {got} for {want}");
        }
        assert_eq!((exp(-88.0), exp(f32::NEG_INFINITY), exp(0.0)), (0.0, 0.0, 1.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn log_sum_exp_and_loss_match_f64() {
        for (n, scale) in [(1, 1.0), (17, 5.0), (49_152, 3.0), (5000, 30.0)] {
            let x = row(n, 4, scale);
            let exact = exact_lse(&x);
            assert!((log_sum_exp(&x) - exact).abs() < 2e-7 * (1.0 + exact.abs()), "{n}");
            let score = score_row(&x, n / 2);
            assert!((score.nll - (exact - f64::from(x[n / 2]))).abs() < 1e-5);
            assert!(x.iter().all(|&v| v <= x[score.top]));
        }
    }

    #[test]
    fn divergence_matches_f64_and_vanishes_for_equals() {
        let (p, q) = (row(3001, 1, 2.0), row(3001, 2, 2.0));
        let (a, b) = (exact_lse(&p), exact_lse(&q));
        let exact: f64 = p
            .iter()
            .zip(&q)
            .map(|(&p, &q)| {
                let (lp, lq) = (f64::from(p) - a, f64::from(q) - b);
                lp.exp() * (lp - lq)
            })
            .sum();
        let got = kl_divergence(&p, log_sum_exp(&p), &q, log_sum_exp(&q));
        assert!((got - exact).abs() < 1e-5 * exact, "{got} for {exact}");
        assert_eq!(kl_divergence(&p, a, &p, a), 0.0);
    }

    #[test]
    fn broken_logits_show() {
        assert!(score_row(&[0.0, f32::NAN, 1.0], 0).log_sum_exp.is_nan());
        assert_eq!(score_row(&[0.0, f32::INFINITY], 0).log_sum_exp, f64::INFINITY);
        assert!(
            score_row(&[f32::NAN; 40], 0).nll.is_nan()
                || !score_row(&[f32::NAN; 40], 0).log_sum_exp.is_finite()
        );
        // A masked vocabulary entry is no error unless it is the target.
        let masked = [0.0, f32::NEG_INFINITY];
        assert_eq!(score_row(&masked, 0).nll, 0.0);
        assert_eq!(score_row(&masked, 1).nll, f64::INFINITY);
        assert_eq!(score_row(&masked, 7).nll, f64::INFINITY);
    }
}
