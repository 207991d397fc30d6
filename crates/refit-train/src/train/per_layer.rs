//! Per-layer updates: the gradient of a target is projected the moment the backward pass has computed it, and dropped.
//!
//! Nothing is updated before the pass is over and all gradients are known to be finite: what is staged here is linear in the
//! gradient, and a step that fails leaves no trace.

use std::collections::HashMap;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;
use refit_nn::Parameter;
use refit_nn::ops::sink::{GradientSink, Leaf, leaf};

use super::optimizer::{Optimizer, Projected, State};
use super::update;

/// A gradient in its low-rank form, and the sum of its squares.
pub(super) type Low = (Projected, f64);

/// The sink of one backward pass.
pub(super) struct Stream<'a> {
    optimizer: &'a dyn Optimizer,
    states: &'a HashMap<ParamId, State>,
    fresh: State,
    parameters: HashMap<Leaf, (&'a Parameter, bool)>,
    /// What has been projected.
    pub found: HashMap<ParamId, Low>,
    /// Bytes of the gradients that exist now; those that autodiff keeps are counted once.
    held: usize,
    counted: Vec<ParamId>,
    /// The most bytes that existed at once.
    pub peak: usize,
}

impl<'a> Stream<'a> {
    /// Ready for the backward pass of a loss of `model`, of which `trained` train.
    pub fn new<M: Module>(
        model: &M,
        trained: impl Iterator<Item = &'a Parameter>,
        optimizer: &'a dyn Optimizer,
        states: &'a HashMap<ParamId, State>,
    ) -> Self {
        let mut leaves = Leaves(HashMap::new());
        model.visit(&mut leaves);
        let parameters = trained.filter_map(|p| {
            let target = optimizer.projects(&p.name, &p.shape);
            Some((*leaves.0.get(&p.id)?, (p, target)))
        });
        Self {
            optimizer,
            states,
            fresh: State::default(),
            parameters: parameters.collect(),
            found: HashMap::new(),
            held: 0,
            counted: Vec::new(),
            peak: 0,
        }
    }
}

impl GradientSink for Stream<'_> {
    fn take(&mut self, leaf: Leaf, grad: &[f32]) -> bool {
        let Some(&(parameter, target)) = self.parameters.get(&leaf) else { return false };
        let (id, bytes) = (parameter.id, size_of_val(grad));
        // A second part of the same gradient stays with autodiff, where the trainer finds it and refuses the step.
        if !target || self.found.contains_key(&id) {
            if !self.counted.contains(&id) {
                self.counted.push(id);
                self.held += bytes;
            }
            self.peak = self.peak.max(self.held);
            return false;
        }
        let state = self.states.get(&id).unwrap_or(&self.fresh);
        let projected = self.optimizer.project(&parameter.name, &parameter.shape, grad, state);
        let Some(projected) = projected else { return false };
        self.held += projected.bytes();
        self.peak = self.peak.max(self.held + bytes);
        self.found.insert(id, (projected, update::squares(grad)));
        true
    }
}

/// Where the parameters stand in the graph.
struct Leaves(HashMap<ParamId, Leaf>);

impl ModuleVisitor for Leaves {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(leaf) = leaf(&param.base()) {
            self.0.insert(param.id, leaf);
        }
    }
}
