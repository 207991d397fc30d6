//! L-BFGS (Liu and Nocedal 1989): smooth functions of many variables, minimized from gradients alone.

/// What was found, and how.
#[derive(Debug, Clone)]
pub struct Minimum {
    /// The point.
    pub x: Vec<f64>,
    /// The function there.
    pub value: f64,
    /// Largest component of the gradient there.
    pub gradient: f64,
    /// Steps made.
    pub iterations: usize,
    /// Whether the gradient fell to the tolerance.
    pub converged: bool,
}

/// Pairs of steps and gradient changes that are remembered.
const MEMORY: usize = 12;
/// Share of the promised decrease that a step must bring (Armijo).
const DECREASE: f64 = 1e-4;
/// Share of the slope that may be left after a step (the weak Wolfe condition).
const SLOPE: f64 = 0.9;

/// Minimizes `f`, which returns value and gradient, from `x` until no component of the gradient exceeds `tolerance`, at most
/// `iterations` steps. Steps meet the weak Wolfe conditions, found by bisection.
pub fn minimize(
    mut f: impl FnMut(&[f64]) -> (f64, Vec<f64>),
    x: Vec<f64>,
    tolerance: f64,
    iterations: usize,
) -> Minimum {
    let (value, mut gradient) = f(&x);
    let mut at =
        Minimum { x, value, gradient: largest(&gradient), iterations: 0, converged: false };
    let mut pairs: Vec<(Vec<f64>, Vec<f64>, f64)> = Vec::new();
    while at.iterations < iterations {
        if at.gradient <= tolerance {
            at.converged = true;
            break;
        }
        let direction = direction(&gradient, &pairs);
        let slope = dot(&direction, &gradient);
        // Without curvature to go by, a step of length 1 at most.
        let first =
            if pairs.is_empty() { 1.0 / dot(&gradient, &gradient).sqrt().max(1.0) } else { 1.0 };
        let (mut low, mut high, mut step) = (0.0, f64::INFINITY, first);
        let mut found = None;
        for _ in 0..40 {
            let x: Vec<f64> = at.x.iter().zip(&direction).map(|(x, d)| x + step * d).collect();
            let (value, new) = f(&x);
            if !value.is_finite() || value > at.value + DECREASE * step * slope {
                high = step;
            } else {
                let steep = dot(&new, &direction) < SLOPE * slope;
                found = Some((x, value, new));
                if !steep {
                    break;
                }
                low = step;
            }
            step = if high.is_finite() { 0.5 * (low + high) } else { 2.0 * low };
        }
        // No point below this one: rounding has the last word.
        let Some((x, value, new)) = found else { break };
        let moved: Vec<f64> = x.iter().zip(&at.x).map(|(new, old)| new - old).collect();
        let change: Vec<f64> = new.iter().zip(&gradient).map(|(new, old)| new - old).collect();
        let curvature = dot(&moved, &change);
        if curvature > 1e-14 * dot(&change, &change) {
            if pairs.len() == MEMORY {
                pairs.remove(0);
            }
            pairs.push((moved, change, 1.0 / curvature));
        }
        let stalled = value >= at.value && largest(&new) >= at.gradient;
        at = Minimum { x, value, gradient: largest(&new), iterations: at.iterations + 1, ..at };
        gradient = new;
        if stalled {
            break;
        }
    }
    at.converged = at.gradient <= tolerance;
    at
}

/// The two-loop recursion: minus the inverse Hessian's estimate times the gradient.
fn direction(gradient: &[f64], pairs: &[(Vec<f64>, Vec<f64>, f64)]) -> Vec<f64> {
    let mut q = gradient.to_vec();
    let mut factors = Vec::with_capacity(pairs.len());
    for (moved, change, rho) in pairs.iter().rev() {
        let factor = rho * dot(moved, &q);
        add(&mut q, change, -factor);
        factors.push(factor);
    }
    if let Some((_, change, rho)) = pairs.last() {
        let scale = 1.0 / (rho * dot(change, change));
        q.iter_mut().for_each(|x| *x *= scale);
    }
    for ((moved, change, rho), factor) in pairs.iter().zip(factors.iter().rev()) {
        let other = rho * dot(change, &q);
        add(&mut q, moved, factor - other);
    }
    q.iter_mut().for_each(|x| *x = -*x);
    q
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f64], what: &[f64], factor: f64) {
    to.iter_mut().zip(what).for_each(|(to, what)| *to += factor * what);
}

fn largest(gradient: &[f64]) -> f64 {
    gradient.iter().fold(0.0, |most, g| g.abs().max(most))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_badly_scaled_quadratic_is_solved() {
        let scale = |i: usize| 10f64.powi(i as i32 % 7 - 3);
        let f = |x: &[f64]| {
            let gradient: Vec<f64> =
                x.iter().enumerate().map(|(i, x)| scale(i) * (x - i as f64)).collect();
            let value = x.iter().enumerate().map(|(i, x)| 0.5 * scale(i) * (x - i as f64).powi(2));
            (value.sum(), gradient)
        };
        let found = minimize(f, vec![0.0; 30], 1e-9, 500);
        assert!(found.converged && found.iterations < 400, "{found:?}");
        for (i, x) in found.x.iter().enumerate() {
            assert!((x - i as f64).abs() < 1e-5, "{i}: {x}");
        }
    }

    #[test]
    fn rosenbrocks_valley_is_followed() {
        let f = |x: &[f64]| {
            let (a, b) = (1.0 - x[0], x[1] - x[0] * x[0]);
            let gradient = vec![-2.0 * a - 400.0 * x[0] * b, 200.0 * b];
            (a * a + 100.0 * b * b, gradient)
        };
        let found = minimize(f, vec![-1.2, 1.0], 1e-8, 200);
        assert!(found.converged, "{found:?}");
        assert!((found.x[0] - 1.0).abs() < 1e-6 && (found.x[1] - 1.0).abs() < 1e-6);
    }

    #[test]
    fn too_few_steps_are_said() {
        let f = |x: &[f64]| ((x[0] - 1e6).powi(4), vec![4.0 * (x[0] - 1e6).powi(3)]);
        let found = minimize(f, vec![0.0], 1e-12, 3);
        assert!(!found.converged && found.iterations <= 3);
    }
}
