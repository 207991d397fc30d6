//! Between Burn's modules and the host: gradients out, values in and out, freezing.

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Gradients, Tensor, TensorData};
use rayon::prelude::*;

/// Gradients on the host.
pub(super) type Host = HashMap<ParamId, Vec<f32>>;

/// The values of a tensor; no copy when nobody else holds it.
fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let data = tensor.into_data().convert::<f32>();
    data.try_into_vec().expect("invariant: converted to f32")
}

struct Collect<'a>(&'a mut Gradients, &'a mut Host, usize);

impl ModuleVisitor for Collect<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(grad) = param.base().grad_remove(self.0) else { return };
        let grad = values(grad);
        self.2 += size_of_val(grad.as_slice());
        match self.1.get_mut(&param.id) {
            Some(sum) => {
                sum.par_chunks_mut(1 << 15)
                    .zip(grad.par_chunks(1 << 15))
                    .for_each(|(s, g)| s.iter_mut().zip(g).for_each(|(s, g)| *s += g));
            }
            None => {
                self.1.insert(param.id, grad);
            }
        }
    }
}

/// Adds the gradients of a backward pass to `sums`; returns their bytes.
pub(super) fn collect<M: Module>(model: &M, grads: &mut Gradients, sums: &mut Host) -> usize {
    let mut collect = Collect(grads, sums, 0);
    model.visit(&mut collect);
    collect.2
}

/// Bytes of gradients on the host.
pub(super) fn bytes(gradients: &Host) -> usize {
    gradients.values().map(|g| size_of_val(g.as_slice())).sum()
}

struct Read<F>(F);

impl<F: FnMut(ParamId, &[usize], &dyn Fn() -> Vec<f32>)> ModuleVisitor for Read<F> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let base = param.base();
        let shape = base.dims();
        (self.0)(param.id, &shape, &|| values(inner(base.clone())));
    }
}

/// Shows every parameter with its shape and a way to its values.
pub(super) fn read<M: Module>(model: &M, f: impl FnMut(ParamId, &[usize], &dyn Fn() -> Vec<f32>)) {
    model.visit(&mut Read(f));
}

fn inner<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    if tensor.is_autodiff() { tensor.inner() } else { tensor }
}

/// A change of one tensor's values, in place.
type Edit<'a> = dyn FnMut(ParamId, &[usize], &mut Vec<f32>) + 'a;

struct Change<'a> {
    edit: &'a mut Edit<'a>,
    chosen: &'a dyn Fn(ParamId) -> bool,
}

impl ModuleMapper for Change<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !(self.chosen)(param.id) {
            return param;
        }
        let (id, tensor, mapper) = param.consume();
        let (tracked, autodiff) = (tensor.is_require_grad(), tensor.is_autodiff());
        let shape = tensor.dims();
        let plain = inner(tensor);
        let device = plain.device();
        let mut host = values(plain);
        (self.edit)(id, &shape, &mut host);
        let plain = Tensor::<D>::from_data(TensorData::new(host, shape), &device);
        let tensor = if autodiff { Tensor::from_inner(plain) } else { plain };
        Param::from_mapped_value(id, tensor.set_require_grad(tracked), mapper)
    }
}

/// Changes the values of the parameters that `chosen` names.
pub(super) fn change<'a, M: Module>(
    model: M,
    edit: &'a mut Edit<'a>,
    chosen: &'a dyn Fn(ParamId) -> bool,
) -> M {
    model.map(&mut Change { edit, chosen })
}

struct Freeze<'a>(&'a HashMap<ParamId, bool>);

impl ModuleMapper for Freeze<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.0.get(&param.id) {
            Some(&train) => param.set_require_grad(train),
            None => param,
        }
    }
}

/// Sets which parameters get gradients.
pub(super) fn freeze<M: Module>(model: M, train: &HashMap<ParamId, bool>) -> M {
    model.map(&mut Freeze(train))
}

struct Tracked(bool);

impl ModuleVisitor for Tracked {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0 |= param.base().is_autodiff();
    }
}

/// The model on the autodiff device.
pub(super) fn tracked<M: Module>(model: M) -> M {
    let mut found = Tracked(false);
    model.visit(&mut found);
    if found.0 { model } else { model.train() }
}

/// A hash of the bits of `values`, which does not depend on the number of threads; it finds accidents, not attacks.
pub(super) fn digest(values: &[f32]) -> u64 {
    let parts = values
        .par_chunks(1 << 14)
        .map(|part| part.iter().fold(part.len() as u64, |hash, x| mix(hash, x.to_bits().into())));
    parts.collect::<Vec<u64>>().into_iter().fold(0, mix)
}

/// One round of FNV-1a on a whole word, with the high half folded down so that every bit of it counts.
pub(super) fn mix(hash: u64, word: u64) -> u64 {
    let mixed = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 32)
}

/// Sum of squares in f64, in an order that does not depend on the number of threads.
pub(super) fn squares(values: &[f32]) -> f64 {
    let parts: Vec<f64> = values
        .par_chunks(1 << 14)
        .map(|part| {
            // Eight lanes so that the sum vectorizes.
            let mut lanes = [0.0f64; 8];
            let (blocks, tail) = part.as_chunks::<8>();
            for block in blocks {
                for (lane, x) in lanes.iter_mut().zip(block) {
                    *lane += f64::from(*x) * f64::from(*x);
                }
            }
            lanes.iter().sum::<f64>() + tail.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>()
        })
        .collect();
    parts.iter().sum()
}
