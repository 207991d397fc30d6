//! Weight Compander (Cakaj et al. 2023, arXiv 2306.16993): every weight is a bounded, S-shaped function of a free parameter.
//!
//! `w = a atan(v / b)` holds large weights back (`|w| < a π/2`) and, for `a > b`, pushes small ones away from zero (slope
//! `a / b` at 0). `v` is the base parameter of the weight, `a` and `b` are learned with it, one pair for each tensor. They are
//! kept as logarithms and so stay positive. After training, `Module::materialize` writes `w` in place of `v`.
//!
//! The paper's body was not at hand: the curve is recalled, and its scope and starting values are inferred. Two control forms
//! ([`Curve::Tanh`], [`Curve::Factor`]) separate the bound from the expansion.

use burn::module::{Module, Param, Reparameterization};
use burn::tensor::{Tensor, TensorData};

use super::Attach;
use crate::error::{Error, Result};
use crate::operator::{Linear, Operator};
use crate::ops::compand::{Curve, compand, inverse};
use crate::ops::to_vec;

/// The form on a weight of any rank; its base is `v`.
#[derive(Module, Debug)]
pub struct Compander {
    /// `log a [1]`.
    pub log_a: Param<Tensor<1>>,
    /// `log b [1]`.
    pub log_b: Param<Tensor<1>>,
    /// The curve.
    #[module(skip)]
    pub curve: Curve,
}

/// How a weight is put under a [`Compander`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CompanderOptions {
    /// The curve.
    pub curve: Curve,
    /// `a / b`, the slope at zero; 1 has no expansion. [`Curve::Tanh`] has the slope 1 and does not read it.
    pub slope: f64,
    /// Largest `|w|` that the curve reaches; unset: three times the largest weight. [`Curve::Factor`] has none and does not read
    /// it.
    pub bound: Option<f64>,
    /// `a` and `b` are trained.
    pub learn: bool,
}

impl Default for CompanderOptions {
    /// The arc tangent with slope 1.1, a bound of three times the largest weight, learned.
    fn default() -> Self {
        Self { curve: Curve::Arctan, slope: 1.1, bound: None, learn: true }
    }
}

impl Reparameterization for Compander {
    const NAME: &'static str = "compander";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        compand(base, self.log_a.val(), self.log_b.val(), self.curve)
    }
}

impl Compander {
    /// The form and the base `v0` that make `w0`, the values of the tensor `name`: `v0 = b tan(w0 / a)` for the arc tangent.
    ///
    /// # Errors
    /// Slopes and bounds that are not positive numbers; weights that are not finite; a weight at or beyond the bound, with the
    /// `a` that it needs; a tensor of zeros without an explicit bound.
    pub fn init_from<const D: usize>(
        name: &str,
        w0: &Tensor<D>,
        options: &CompanderOptions,
    ) -> Result<(Self, Tensor<D>)> {
        let fail =
            |problem: String| Err(Error::Invalid(format!("compander on `{name}`: {problem}")));
        let CompanderOptions { curve, slope, bound, learn } = *options;
        if !(slope > 0.0 && slope.is_finite()) {
            return fail(format!("the slope a/b is {slope}; it must be a number above 0"));
        }
        if let Some(bound) = bound.filter(|b| !(*b > 0.0 && b.is_finite())) {
            return fail(format!("the bound is {bound}; it must be a number above 0"));
        }
        let values = to_vec(w0);
        if let Some(bad) = values.iter().find(|w| !w.is_finite()) {
            return fail(format!("a weight is {bad}; all must be finite"));
        }
        let top = values.iter().fold(0.0f64, |top, w| top.max(f64::from(w.abs())));
        let bound = bound.unwrap_or(3.0 * top);
        if bound == 0.0 && curve != Curve::Factor {
            return fail(
                "all weights are zero, so the bound cannot follow from them; give one".into(),
            );
        }
        let a = match curve {
            Curve::Arctan => bound * std::f64::consts::FRAC_2_PI,
            Curve::Tanh => bound,
            Curve::Factor => slope,
        };
        let b = match curve {
            Curve::Arctan => a / slope,
            Curve::Tanh | Curve::Factor => 1.0,
        };
        let (log_a, log_b) = (a.ln() as f32, b.ln() as f32);
        // What the kernel will make of the rounded logarithms: the inverse must be that curve's.
        let (a, b) = (f64::from(log_a.exp()), f64::from(log_b.exp()));
        let reach = match curve {
            Curve::Arctan => a * std::f64::consts::FRAC_PI_2,
            Curve::Tanh => a,
            Curve::Factor => f64::INFINITY,
        };
        if top >= reach {
            let needed = if curve == Curve::Tanh { top } else { top * std::f64::consts::FRAC_2_PI };
            return fail(format!(
                "the largest weight is {top}, the curve stays below {reach} (a = {a}); it needs an `a` above {needed}, a \
                 bound above {top}"
            ));
        }
        let v0: Vec<f32> = values.iter().map(|w| inverse(*w, a, b, curve) as f32).collect();
        if let Some(at) = v0.iter().position(|v| !v.is_finite()) {
            return fail(format!(
                "the weight {} lies so close to the bound {reach} that its parameter overflows; raise the bound",
                values[at]
            ));
        }
        let device = w0.device();
        let parameter = |x: f32| {
            Param::from_tensor(Tensor::<1>::from_data([x], &device)).set_require_grad(learn)
        };
        let form = Self { log_a: parameter(log_a), log_b: parameter(log_b), curve };
        Ok((form, Tensor::from_data(TensorData::new(v0, w0.dims()), &device)))
    }

    /// `a`.
    pub fn a(&self) -> f32 {
        to_vec(&self.log_a.val())[0].exp()
    }

    /// `b`.
    pub fn b(&self) -> f32 {
        to_vec(&self.log_b.val())[0].exp()
    }

    /// The weight that `v` stands for: what a plain checkpoint holds.
    pub fn fold<const D: usize>(&self, v: Tensor<D>) -> Tensor<D> {
        self.apply(v)
    }

    /// Share of `v` with `|v| / b > 5`, where the arc tangent is nearly flat. Above a fifth, training stalls: `b` is too small.
    pub fn saturated<const D: usize>(&self, v: &Tensor<D>) -> f64 {
        let (limit, v) = (5.0 * self.b(), to_vec(v));
        v.iter().filter(|v| v.abs() > limit).count() as f64 / v.len().max(1) as f64
    }
}

/// Puts `form` on a parameter of any rank (a convolution's, say), in place of a form that is there already. `base` replaces the
/// stored value where it is given; the parameter trains on.
pub fn attach_to<const D: usize, R: Reparameterization>(
    param: Param<Tensor<D>>,
    form: R,
    base: Option<Tensor<D>>,
) -> Param<Tensor<D>> {
    let (id, value, mapper) = param.consume();
    let param = Param::from_mapped_value(id, base.unwrap_or(value), mapper).set_require_grad(true);
    param.apply_reparameterization(Attach(Some(form)))
}

/// Puts a parameter of any rank under a [`Compander`] that leaves its effective value as it is.
///
/// # Errors
/// As [`Compander::init_from`]; the parameter is then untouched.
pub fn compand_param<const D: usize>(
    name: &str,
    param: &mut Param<Tensor<D>>,
    options: &CompanderOptions,
) -> Result<()> {
    let (form, base) = Compander::init_from(name, &param.val(), options)?;
    *param = attach_to(param.clone(), form, Some(base));
    Ok(())
}

impl Linear {
    /// Puts the weight under a [`Compander`] that leaves it as it is. A form that is there already is merged first.
    ///
    /// # Errors
    /// As [`Compander::init_from`]; an operator that is not a dense weight.
    pub fn compand(&mut self, options: &CompanderOptions) -> Result<()> {
        let name = format!("{}.weight", self.site);
        match &mut self.op {
            Operator::Dense(dense) => compand_param(&name, &mut dense.weight, options),
            _ => Err(Error::Invalid(format!(
                "compander on `{name}`: the operator is no dense weight"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution};

    use super::*;

    const CURVES: [Curve; 3] = [Curve::Arctan, Curve::Tanh, Curve::Factor];

    fn weights<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
        Tensor::random(shape, Distribution::Normal(0.0, 0.05), device)
    }

    fn relative(a: &[f32], b: &[f32], tolerance: f32) {
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() <= tolerance * b.abs(), "{a} {b}");
        }
    }

    #[test]
    fn folding_the_start_gives_the_weights_back() {
        for device in [Device::flex(), Device::flex().autodiff()] {
            for curve in CURVES {
                let w0 = weights([8, 4, 3, 3], &device);
                let options = CompanderOptions { curve, ..CompanderOptions::default() };
                let mut param = Param::from_tensor(w0.clone());
                compand_param("conv", &mut param, &options).unwrap();
                relative(&to_vec(&param.val()), &to_vec(&w0), 1e-6);
                // Folding for good leaves an ordinary parameter, and folding that again changes nothing.
                let folded = param.clone().materialize();
                assert!(folded.reparameterization::<Compander>().is_none());
                assert_eq!(to_vec(&folded.val()), to_vec(&param.val()));
                assert_eq!(to_vec(&folded.clone().materialize().val()), to_vec(&folded.val()));
                assert_eq!((folded.id, folded.dims()), (param.id, [8, 4, 3, 3]));
            }
        }
        // Again on the result: a new parameterization of the same weights, in place of the old one.
        let mut linear = Linear::dense("site", weights([6, 5], &Device::flex()), None);
        let before = to_vec(&linear.weight());
        linear.compand(&CompanderOptions::default()).unwrap();
        linear.compand(&CompanderOptions { slope: 1.4, ..CompanderOptions::default() }).unwrap();
        relative(&to_vec(&linear.weight()), &before, 2e-6);
        let form = linear.form::<Compander>().expect("attached");
        assert!((form.a() / form.b() - 1.4).abs() < 1e-5);
        assert_eq!(form.saturated(&Tensor::<1>::from_floats([0.0], &Device::flex())), 0.0);
    }

    #[test]
    fn curves_are_odd_monotone_bounded_and_of_the_slope_asked_for() {
        let device = Device::flex();
        let w0 = weights([50, 40], &device);
        let top = to_vec(&w0).iter().fold(0.0f32, |t, w| t.max(w.abs()));
        for curve in CURVES {
            let options = CompanderOptions { curve, ..CompanderOptions::default() };
            let (form, _) = Compander::init_from("w", &w0, &options).unwrap();
            let at = |v: &[f32]| to_vec(&form.fold(Tensor::<1>::from_floats(v, &device)));
            let v: Vec<f32> = (-1000..=1000).map(|i| (i as f32 * 0.02).powi(3)).collect();
            let w = at(&v);
            let minus: Vec<f32> = v.iter().map(|v| -v).collect();
            assert!(w.iter().zip(at(&minus)).all(|(w, m)| *w == -m), "{curve:?} is odd");
            assert!(w.windows(2).all(|p| p[0] <= p[1]), "{curve:?} is monotone");
            if curve != Curve::Factor {
                // At most an ulp above: f32's π/2 lies above the real one.
                assert!(w.iter().all(|w| w.abs() <= 3.0 * top * 1.000_001), "{curve:?} is bounded");
            }
            let slope = if curve == Curve::Tanh { 1.0 } else { 1.1 };
            let small = [1e-5, -3e-5, 1e-4];
            for (v, w) in small.iter().zip(at(&small)) {
                assert!((w / v - slope).abs() < 1e-3, "{curve:?}: {w} {v}");
            }
        }
        // |w| > |v| exactly below the crossing.
        let (form, _) = Compander::init_from("w", &w0, &CompanderOptions::default()).unwrap();
        let (a, b) = (f64::from(form.a()), f64::from(form.b()));
        let mut crossing = b;
        (0..200).for_each(|_| crossing = a * (crossing / b).atan());
        let v: Vec<f32> = (1..400).map(|i| i as f32 * crossing as f32 / 200.5).collect();
        for (v, w) in v.iter().zip(to_vec(&form.fold(Tensor::<1>::from_floats(&v[..], &device)))) {
            assert_eq!(w > *v, f64::from(*v) < crossing, "{v} {w} {crossing}");
        }
    }

    /// `steps` of plain descent on `‖w - goal‖² / 2`; the weights after each.
    fn descend(
        param: Param<Tensor<2>>,
        goal: &Tensor<2>,
        rate: f64,
        steps: usize,
    ) -> Vec<Vec<f32>> {
        let mut param = param;
        let mut path = Vec::new();
        for _ in 0..steps {
            let loss = (param.val() - goal.clone()).powi_scalar(2).sum() * 0.5;
            let grads = loss.backward();
            let v = param.base();
            let step = v.clone().grad(&grads).expect("v trains") * rate;
            let moved = Tensor::from_inner(v.inner() - step);
            let mut form = param.reparameterization::<Compander>().cloned();
            if let Some(form) = &mut form {
                let next = |p: &Param<Tensor<1>>| match p.val().grad(&grads) {
                    Some(g) => Param::from_tensor(Tensor::from_inner(p.val().inner() - g * rate)),
                    None => p.clone(),
                };
                (form.log_a, form.log_b) = (next(&form.log_a), next(&form.log_b));
            }
            param = match form {
                Some(form) => attach_to(param, form, Some(moved)),
                None => Param::from_tensor(moved.require_grad()),
            };
            path.push(to_vec(&param.val()));
        }
        path
    }

    #[test]
    fn a_huge_compander_is_plain_descent_and_rate_zero_changes_nothing() {
        let device = Device::flex().autodiff();
        let (w0, goal) = (weights([6, 7], &device), weights([6, 7], &device) * 20.0);
        // a = b = 1e6.
        let options = CompanderOptions {
            slope: 1.0,
            bound: Some(1e6 * std::f64::consts::FRAC_PI_2),
            learn: false,
            ..CompanderOptions::default()
        };
        let mut param = Param::from_tensor(w0.clone().require_grad());
        let plain = descend(param.clone(), &goal, 0.1, 60);
        compand_param("w", &mut param, &options).unwrap();
        for (a, b) in descend(param.clone(), &goal, 0.1, 60).iter().zip(&plain) {
            let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-4, "{worst}");
        }
        let start = to_vec(&param.val());
        assert_eq!(descend(param, &goal, 0.0, 3)[2], start);
    }

    #[test]
    fn learned_shapes_move_fixed_ones_do_not_and_the_bound_holds() {
        let device = Device::flex().autodiff();
        let (w0, goal) = (weights([6, 7], &device), weights([6, 7], &device) * 100.0);
        for learn in [true, false] {
            let mut param = Param::from_tensor(w0.clone().require_grad());
            let options = CompanderOptions { learn, ..CompanderOptions::default() };
            compand_param("w", &mut param, &options).unwrap();
            let form = param.reparameterization::<Compander>().expect("attached");
            let (a, reach) = (form.a(), form.a() * std::f32::consts::FRAC_PI_2);
            let loss = (param.val() - goal.clone()).powi_scalar(2).sum();
            let moved = form.log_a.val().grad(&loss.backward()).is_some();
            assert_eq!(moved, learn);
            if !learn {
                for weights in descend(param, &goal, 0.5, 1000) {
                    assert!(weights.iter().all(|w| w.abs() <= reach * 1.000_001), "a = {a}");
                }
            }
        }
    }

    #[test]
    fn mistakes_are_named() {
        let w0 = Tensor::<2>::from_floats([[0.5, -2.0]], &Device::flex());
        let error = |options: CompanderOptions, w0: &Tensor<2>| {
            Compander::init_from("layer.weight", w0, &options).unwrap_err().to_string()
        };
        let usual = CompanderOptions::default();
        let text = error(CompanderOptions { bound: Some(1.5), ..usual }, &w0);
        assert!(text.contains("`layer.weight`") && text.contains("`a` above 1.2732"), "{text}");
        let tanh = CompanderOptions { curve: Curve::Tanh, bound: Some(1.5), ..usual };
        assert!(error(tanh, &w0).contains("`a` above 2"));
        assert!(error(CompanderOptions { slope: -1.0, ..usual }, &w0).contains("slope"));
        assert!(error(CompanderOptions { bound: Some(f64::NAN), ..usual }, &w0).contains("bound"));
        assert!(error(usual, &(w0.clone() * 0.0)).contains("all weights are zero"));
        assert!(error(usual, &(w0 * f32::NAN)).contains("finite"));
    }
}
