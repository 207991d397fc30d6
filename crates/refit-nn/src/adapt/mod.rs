//! Training forms of a weight: Burn's reparameterizations, attached to a site.
//!
//! Any [`Reparameterization`] (masks, low rank plus sparse, companders, orthogonal maps, fake quantization) may sit on the weight
//! of a [`Linear`]: the forward pass then multiplies with the effective weight that it computes, and autodiff carries the
//! gradient to its own parameters. Forms that have a cheaper forward pass than building the weight implement it in
//! `forward`, the one place that knows them: [`Lora`], [`Dora`] and [`Ia3`] never build `W + BA`.
//!
//! `Linear::weight` gives the effective weight of any form, `Module::materialize` merges it for good.

mod compander;

use burn::module::{Module, Param, Reparameterization, Reparameterizer};
use burn::tensor::{Device, Tensor, TensorData};
use refit_data::Rng;

use crate::operator::{Conv2d, Dense, Linear, Operator};
use crate::ops;
use crate::run::Run;
use crate::side::kaiming;

pub use crate::ops::compand::Curve;
pub use compander::{Compander, CompanderOptions, attach_to, compand_param};

/// Low-rank adaptation (Hu et al. 2021): `W + s B A` on a weight `[out, in]`.
#[derive(Module, Debug)]
pub struct Lora {
    /// `A [rank, in]`.
    pub a: Param<Tensor<2>>,
    /// `B [out, rank]`; zero at the start, so that the model is unchanged.
    pub b: Param<Tensor<2>>,
    /// `s`: `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub scale: f64,
}

impl Lora {
    /// Fresh factors for a weight `[out, in]`: `A` by Kaiming's uniform rule with `a = sqrt 5`, `B` zero.
    pub fn init(
        [out, inputs]: [usize; 2],
        rank: usize,
        scale: f64,
        rng: &mut Rng,
        device: &Device,
    ) -> Self {
        let a = TensorData::new(kaiming(rank, inputs, rng), [rank, inputs]);
        Self {
            a: Param::from_tensor(Tensor::from_data(a, device)),
            b: Param::from_tensor(Tensor::zeros([out, rank], device)),
            scale,
        }
    }
}

impl Dora {
    /// Fresh factors for `weight [out, in]`: those of [`Lora::init`], and the norms of its rows as magnitude.
    pub fn init(weight: Tensor<2>, rank: usize, scale: f64, rng: &mut Rng) -> Self {
        let (shape, device) = (weight.dims(), weight.device());
        let Lora { a, b, scale } = Lora::init(shape, rank, scale, rng, &device);
        let norms = weight.powi_scalar(2).sum_dim(1).sqrt().reshape([shape[0]]);
        Self { a, b, magnitude: Param::from_tensor(norms), scale }
    }
}

impl Dora {
    /// `‖W + s B A‖` of every row, `[out]`, without ever building that matrix, and as a constant: the norm of a sum is
    /// `‖W‖² + 2 s ⟨W Aᵀ, B⟩ + s² ⟨B A Aᵀ, B⟩`, row by row.
    fn row_norms(&self, base: &Tensor<2>) -> Tensor<1> {
        let (w, a, b) = (plain(base), plain(&self.a.val()), plain(&self.b.val()));
        let [out, _] = w.dims();
        let times = |x: &Tensor<2>| ops::linear(x.clone().unsqueeze(), a.clone(), None);
        let wa = times(&w).squeeze_dim::<2>(0);
        let gram = times(&a).squeeze_dim::<2>(0);
        let quadratic = (b.clone().matmul(gram) * b.clone()).sum_dim(1);
        let cross = (wa * b).sum_dim(1);
        let own = w.powi_scalar(2).sum_dim(1);
        let norms = own + cross * (2.0 * self.scale) + quadratic * self.scale.powi(2);
        let norms = norms.clamp_min(0.0).sqrt().reshape([out]);
        if base.is_autodiff() { Tensor::from_inner(norms) } else { norms }
    }
}

/// The tensor outside autodiff.
fn plain(x: &Tensor<2>) -> Tensor<2> {
    if x.is_autodiff() { x.clone().inner() } else { x.clone() }
}

impl Ia3 {
    /// Factors of one for a weight `[out, in]`.
    pub fn init([out, inputs]: [usize; 2], side: Side, device: &Device) -> Self {
        let count = if side == Side::Output { out } else { inputs };
        Self { factors: Param::from_tensor(Tensor::ones([count], device)), side }
    }
}

impl Reparameterization for Lora {
    const NAME: &'static str = "lora";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let delta = self.b.val().matmul(self.a.val()) * self.scale;
        let shape = base.shape();
        base + delta.reshape(shape)
    }
}

/// Weight-decomposed LoRA (Liu et al. 2024): `m (W + s B A) / ‖W + s B A‖`, rows normed; the norm is a constant in the
/// backward pass, as in the paper's section 4.3.
#[derive(Module, Debug)]
pub struct Dora {
    /// `A [rank, in]`.
    pub a: Param<Tensor<2>>,
    /// `B [out, rank]`.
    pub b: Param<Tensor<2>>,
    /// `m [out]`: the norms of the base weight's rows at the start.
    pub magnitude: Param<Tensor<1>>,
    /// `s`.
    pub scale: f64,
}

impl Reparameterization for Dora {
    const NAME: &'static str = "dora";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let shape = base.shape();
        let delta = self.b.val().matmul(self.a.val()) * self.scale;
        let direction = base.reshape(delta.shape()) + delta;
        let norm = direction.clone().detach().powi_scalar(2).sum_dim(1).sqrt();
        let rows = self.magnitude.val().unsqueeze_dim::<2>(1) / norm;
        (direction * rows).reshape(shape)
    }
}

/// Which side of a weight [`Ia3`] scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The outputs (rows): keys and values.
    Output,
    /// The inputs (columns): feed-forward.
    Input,
}

/// (IA)³ (Liu et al. 2022): one learned factor per output or input of a weight. A bias is scaled with the outputs.
#[derive(Module, Debug)]
pub struct Ia3 {
    /// `[out]` or `[in]`; one at the start.
    pub factors: Param<Tensor<1>>,
    /// The side that it scales.
    #[module(skip)]
    pub side: Side,
}

impl Reparameterization for Ia3 {
    const NAME: &'static str = "ia3";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let mut shape = [1; D];
        let at = if self.side == Side::Output { 0 } else { D - 1 };
        shape[at] = self.factors.shape()[0];
        base * self.factors.val().reshape(shape)
    }
}

/// `x · Wᵀ + bias` with the effective weight of whatever form the weight has.
pub(crate) fn forward(
    dense: &Dense,
    x: Tensor<3>,
    bias: Option<Tensor<1>>,
    run: &mut Run,
) -> Tensor<3> {
    if let Some(lora) = dense.weight.reparameterization::<Lora>() {
        let dropped = run.drop(x.clone());
        let down = run.linear(dropped, lora.a.val(), None);
        let side = run.linear(down * lora.scale, lora.b.val(), None);
        return run.linear(x, dense.weight.base(), bias) + side;
    }
    if let Some(dora) = dense.weight.reparameterization::<Dora>() {
        let base = dense.weight.base();
        let rows = dora.magnitude.val() / dora.row_norms(&base);
        let dropped = run.drop(x.clone());
        let down = run.linear(dropped, dora.a.val(), None);
        let side = run.linear(down * dora.scale, dora.b.val(), None);
        let y = (run.linear(x, base, None) + side) * rows.unsqueeze();
        return match bias {
            Some(bias) => y + bias.unsqueeze(),
            None => y,
        };
    }
    if let Some(ia3) = dense.weight.reparameterization::<Ia3>() {
        let factors = ia3.factors.val().unsqueeze();
        return match ia3.side {
            Side::Input => run.linear(x * factors, dense.weight.base(), bias),
            Side::Output => run.linear(x, dense.weight.base(), bias) * factors,
        };
    }
    run.linear(x, dense.weight.val(), bias)
}

struct Attach<R>(Option<R>);

impl<R: Reparameterization> Reparameterizer for Attach<R> {
    type Reparam = R;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<R>) {
        (param, self.0.take())
    }
}

fn attach<const D: usize, R: Reparameterization>(
    weight: &Param<Tensor<D>>,
    form: R,
    freeze: bool,
) -> Param<Tensor<D>> {
    // Through its parts, so that a form that is there already is dropped.
    let (id, value, mapper) = weight.clone().consume();
    let mut weight = Param::from_mapped_value(id, value, mapper);
    if freeze {
        weight = weight.set_require_grad(false);
    }
    weight.apply_reparameterization(Attach(Some(form)))
}

impl Conv2d {
    /// Puts `form` on the weight, in place of a form that is there already. The base weight is frozen when `freeze`.
    pub fn attach<R: Reparameterization>(&mut self, form: R, freeze: bool) {
        self.weight = attach(&self.weight, form, freeze);
    }

    /// The form on the weight, if it is an `R`.
    pub fn form<R: Reparameterization>(&self) -> Option<&R> {
        self.weight.reparameterization::<R>()
    }
}

impl Linear {
    /// Puts `form` on the weight, in place of a form that is there already. The base weight is frozen when `freeze`.
    ///
    /// Returns false, and changes nothing, when the operator is not a dense weight.
    pub fn attach<R: Reparameterization>(&mut self, form: R, freeze: bool) -> bool {
        let Operator::Dense(dense) = &mut self.op else { return false };
        dense.weight = attach(&dense.weight, form, freeze);
        true
    }

    /// The form on the weight, if it is an `R`.
    pub fn form<R: Reparameterization>(&self) -> Option<&R> {
        match &self.op {
            Operator::Dense(dense) => dense.weight.reparameterization::<R>(),
            Operator::LowRank(_) | Operator::Packed(_) | Operator::Compensated(_) => None,
        }
    }
}
