//! Companding curves: bounded, odd, S-shaped functions of a weight (Weight Compander, Cakaj et al. 2023, arXiv 2306.16993).

use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::grad::{flex, record, tracked};
use super::simd::{fma, simd};
use super::{build, host};

/// Elements of one task.
const CHUNK: usize = 1 << 14;

/// How a weight follows from its free parameter `v`, with shape parameters `a` and `b`, both above 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Curve {
    /// `a atan(v / b)`: slope `a / b` at 0, bound `a π / 2`.
    Arctan,
    /// `a tanh(v / a)`: the bound `a` without expansion; `b` is not used.
    Tanh,
    /// `(a / b) v`: expansion without a bound.
    Factor,
}

/// `curve(v)` elementwise with `a = exp(log_a)`, `b = exp(log_b)`; `log_a`, `log_b` `[1]`, `v` of any shape.
pub fn compand<const D: usize>(
    v: Tensor<D>,
    log_a: Tensor<1>,
    log_b: Tensor<1>,
    curve: Curve,
) -> Tensor<D> {
    if let (Some(hv), Some(a), Some(b)) = (host(&v), host(&log_a), host(&log_b)) {
        let (a, b) = (a.slice()[0].exp(), b.slice()[0].exp());
        return build(hv.shape(), |out| run(hv.slice(), a, b, curve, out));
    }
    fused(&v, &log_a, &log_b, curve).unwrap_or_else(|| plain(v, log_a, log_b, curve))
}

/// Keeps `v` and recomputes the curve in the backward pass.
fn fused<const D: usize>(
    v: &Tensor<D>,
    log_a: &Tensor<1>,
    log_b: &Tensor<1>,
    curve: Curve,
) -> Option<Tensor<D>> {
    let inputs = [tracked(v)?, tracked(log_a)?, tracked(log_b)?];
    Some(record(inputs, |[v, a, b], _| {
        let (a, b) = (a.slice()[0].exp(), b.slice()[0].exp());
        let shape = v.shape();
        let mut out = vec![0.0; v.slice().len()];
        run(v.slice(), a, b, curve, &mut out);
        let one = |x: f64| -> FlexTensor { flex(vec![x as f32], [1].into()) };
        (
            flex(out, shape.clone()),
            Box::new(move |g, needs| {
                let (dv, da, db) = pull(v.slice(), g.slice(), a, b, curve, needs[1] || needs[2]);
                [
                    needs[0].then(|| flex(dv, shape.clone())),
                    needs[1].then(|| one(da)),
                    needs[2].then(|| one(db)),
                ]
            }),
        )
    }))
}

/// The composition of plain operations.
pub(super) fn plain<const D: usize>(
    v: Tensor<D>,
    log_a: Tensor<1>,
    log_b: Tensor<1>,
    curve: Curve,
) -> Tensor<D> {
    let (a, b) = (log_a.exp().reshape([1; D]), log_b.exp().reshape([1; D]));
    match curve {
        Curve::Arctan => (v / b).atan() * a,
        Curve::Tanh => (v / a.clone()).tanh() * a,
        Curve::Factor => v * (a / b),
    }
}

fn run(v: &[f32], a: f32, b: f32, curve: Curve, out: &mut [f32]) {
    out.par_chunks_mut(CHUNK).zip(v.par_chunks(CHUNK)).for_each(|(o, v)| match curve {
        Curve::Arctan => arctan(v, a, b, o),
        Curve::Tanh => o.iter_mut().zip(v).for_each(|(o, v)| *o = a * (v / a).tanh()),
        Curve::Factor => o.iter_mut().zip(v).for_each(|(o, v)| *o = v * (a / b)),
    });
}

/// Gradients of `v` and, when `shape`, of `log_a` and `log_b`.
fn pull(v: &[f32], g: &[f32], a: f32, b: f32, curve: Curve, shape: bool) -> (Vec<f32>, f64, f64) {
    let mut dv = vec![0.0; v.len()];
    let parts: Vec<(f64, f64)> = dv
        .par_chunks_mut(CHUNK)
        .zip(v.par_chunks(CHUNK).zip(g.par_chunks(CHUNK)))
        .map(|(dv, (v, g))| {
            let mut w = vec![0.0; if shape { v.len() } else { 0 }];
            if shape {
                run(v, a, b, curve, &mut w);
            }
            for ((d, v), g) in dv.iter_mut().zip(v).zip(g) {
                let slope = match curve {
                    Curve::Arctan => {
                        let t = v / b;
                        (a / b) / (1.0 + t * t)
                    }
                    Curve::Tanh => 1.0 - (v / a).tanh().powi(2),
                    Curve::Factor => a / b,
                };
                *d = g * slope;
            }
            // Σ g w and Σ g v w'(v): the curves' derivatives in log a and log b are combinations of these two.
            (products(g, &w), if shape { products(dv, v) } else { 0.0 })
        })
        .collect();
    // In order: the sums do not depend on the number of threads.
    let (value, slope) = parts.iter().fold((0.0, 0.0), |(x, y), (p, q)| (x + p, y + q));
    match curve {
        Curve::Arctan | Curve::Factor => (dv, value, -slope),
        Curve::Tanh => (dv, value - slope, 0.0),
    }
}

fn products(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

simd! {
    /// `a atan(v / b)`. The arc tangent is reduced to `|t| <= tan(π/8)` and taken by an odd polynomial of degree 9; its relative
    /// error is below 3e-7 everywhere.
    fn arctan(v: &[f32], a: f32, b: f32, out: &mut [f32]) {
        const LOW: f32 = 0.414_213_56; // tan(π/8)
        const HIGH: f32 = 2.414_213_6; // tan(3π/8)
        for (o, v) in out.iter_mut().zip(v) {
            let x = v / b;
            let t = x.abs();
            let (top, bottom, offset) = if t > HIGH {
                (-1.0, t, std::f32::consts::FRAC_PI_2)
            } else if t > LOW {
                (t - 1.0, t + 1.0, std::f32::consts::FRAC_PI_4)
            } else {
                (t, 1.0, 0.0)
            };
            let t = top / bottom;
            let z = t * t;
            let p = fma::<FMA>(8.053_744_5e-2, z, -0.138_776_86);
            let p = fma::<FMA>(p, z, 0.199_777_11);
            let p = fma::<FMA>(p, z, -0.333_329_5);
            let y = offset + fma::<FMA>(p * z, t, t);
            *o = a * y.copysign(x);
        }
    }
}

/// `v` that `curve` maps to `w`, in f64; outside the curve's bound the result is not finite or wraps around.
pub(crate) fn inverse(w: f32, a: f64, b: f64, curve: Curve) -> f64 {
    let w = f64::from(w);
    match curve {
        Curve::Arctan => b * (w / a).tan(),
        Curve::Tanh => a * (w / a).atanh(),
        Curve::Factor => w * b / a,
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution};

    use super::*;
    use crate::ops::to_vec;

    #[test]
    fn the_arc_tangent_is_close_to_std_and_odd() {
        let x: Vec<f32> = (-40_000..40_000)
            .map(|i| (i as f32 * 1e-3).sinh() * 1e-3)
            .chain([1e-30, -1e-30, 0.0, 1e30, f32::INFINITY, 0.414_213_6, 2.414_213_4])
            .collect();
        let mut y = vec![0.0; x.len()];
        arctan(&x, 1.0, 1.0, &mut y);
        for (x, y) in x.iter().zip(&y) {
            let want = f64::from(*x).atan();
            let error = (f64::from(*y) - want).abs();
            assert!(error <= 3e-7 * want.abs(), "{x}: {y} {want}");
        }
        let minus: Vec<f32> = x.iter().map(|x| -x).collect();
        let mut z = vec![0.0; x.len()];
        arctan(&minus, 1.0, 1.0, &mut z);
        assert!(y.iter().zip(&z).all(|(y, z)| *y == -z));
    }

    #[test]
    fn gradients_follow_finite_differences_and_the_composition() {
        let device = Device::flex().autodiff();
        let scalar = |x: f32| Tensor::<1>::from_floats([x], &device).require_grad();
        for curve in [Curve::Arctan, Curve::Tanh, Curve::Factor] {
            let v = Tensor::<4>::random([3, 2, 3, 3], Distribution::Normal(0.0, 1.0), &device)
                .require_grad();
            let (la, lb) = (scalar(0.4), scalar(-0.3));
            let factors =
                Tensor::<4>::random([3, 2, 3, 3], Distribution::Normal(0.0, 1.0), &device);
            let loss = |v: &Tensor<4>, a: &Tensor<1>, b: &Tensor<1>| {
                (compand(v.clone(), a.clone(), b.clone(), curve) * factors.clone()).sum()
            };
            let value = |v: &Tensor<4>, a: &Tensor<1>, b: &Tensor<1>| {
                // In f64 on the host: the differences of f32 sums would drown the slopes.
                let (a, b) = (f64::from(to_vec(a)[0]).exp(), f64::from(to_vec(b)[0]).exp());
                let pairs = to_vec(v).into_iter().zip(to_vec(&factors));
                pairs
                    .map(|(v, f)| {
                        let v = f64::from(v);
                        let w = match curve {
                            Curve::Arctan => a * (v / b).atan(),
                            Curve::Tanh => a * (v / a).tanh(),
                            Curve::Factor => a / b * v,
                        };
                        w * f64::from(f)
                    })
                    .sum::<f64>()
            };
            let found = f64::from(to_vec(&loss(&v, &la, &lb))[0]);
            assert!((found - value(&v, &la, &lb)).abs() < 1e-4, "{curve:?}");
            let grads = loss(&v, &la, &lb).backward();
            let h = 1e-3f32;
            let slope = |up: f64, down: f64| (up - down) / (2.0 * f64::from(h));
            let check = |what: &str, found: f32, want: f64| {
                let error = (f64::from(found) - want).abs();
                assert!(error < 1e-3 * (1.0 + want.abs()), "{curve:?} {what}: {found} {want}");
            };
            let (va, vb) = (la.grad(&grads), lb.grad(&grads));
            let by_a = slope(value(&v, &(la.clone() + h), &lb), value(&v, &(la.clone() - h), &lb));
            check("log a", to_vec(&va.expect("tracked"))[0], by_a);
            let by_b = slope(value(&v, &la, &(lb.clone() + h)), value(&v, &la, &(lb.clone() - h)));
            check("log b", to_vec(&vb.expect("tracked"))[0], by_b);
            let dv = to_vec(&v.grad(&grads).expect("tracked"));
            let at = to_vec(&v);
            for i in 0..at.len() {
                let moved = |by: f32| {
                    let mut at = at.clone();
                    at[i] += by;
                    let data = burn::tensor::TensorData::new(at, [3, 2, 3, 3]);
                    value(&Tensor::from_data(data, &device), &la, &lb)
                };
                check(&format!("v[{i}]"), dv[i], slope(moved(h), moved(-h)));
            }
            let composed = plain(v.clone(), la.clone(), lb.clone(), curve) * factors.clone();
            let plain = composed.sum().backward();
            for (x, y) in dv.iter().zip(to_vec(&v.grad(&plain).expect("tracked"))) {
                assert!((x - y).abs() < 1e-5, "{curve:?}: {x} {y}");
            }
        }
    }
}
