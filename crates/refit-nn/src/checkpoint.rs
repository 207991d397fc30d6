//! Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): a part of a model keeps its input alone and runs again in the
//! backward pass.
//!
//! Without it every activation inside a block lives from the forward pass to its turn in the backward pass; with it, the inputs
//! of all blocks do, and the inside of one block at a time. The price is one more forward pass. The gradients are the same
//! numbers: the same kernels run on the same values.
//!
//! The recomputation is a graph of its own inside the backward step of the outer one. It shares values with the outer graph, but
//! no nodes: the outer graph is locked while its steps run.

use std::collections::HashMap;
use std::sync::Arc;

use burn::backend::Autodiff;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients as Outer;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Gradients, Tensor};
use burn_flex::{Flex, FlexTensor};

use crate::block::{Block, Context};
use crate::ops::sink::{self, Leaf};
use crate::ops::{Precision, tracked};
use crate::run::Run;

/// Runs `module` on `x`, keeping only `x` for the backward pass. `forward` must compute the same thing each time and must not
/// hold tensors of an autodiff graph; gradients reach `x` and the parameters of `module`.
///
/// Off the CPU, and outside autodiff, this is `forward(module, x)`.
pub fn checkpoint<M: Module + Sync + 'static>(
    module: &M,
    x: Tensor<3>,
    forward: impl Fn(&M, Tensor<3>) -> Tensor<3> + Send + Sync + 'static,
) -> Tensor<3> {
    if !x.is_autodiff() {
        return forward(module, x);
    }
    let mut leaves = Leaves(HashMap::new());
    module.visit(&mut leaves);
    let Some(input) = tracked(&x) else { return forward(module, x) };
    let x = if input.is_tracked() {
        x
    } else if leaves.0.is_empty() {
        return forward(module, x);
    } else {
        // Nothing before this block trains; something has to carry the gradient here.
        x.require_grad()
    };
    let Some(input) = tracked(&x) else { return forward(module, x) };
    let module = module.valid();
    let plain = x.inner();
    let output = forward(&module, plain.clone());
    let Ok(output) = output.try_into_primitive::<Flex>() else {
        unreachable!("a module on the CPU computes on the CPU")
    };
    let again = Again(Arc::new(move |grad: FlexTensor, needs: bool, outer: &mut Outer| {
        let module = module.clone().train();
        let x = Tensor::from_inner(plain.clone()).set_require_grad(needs);
        let y = forward(&module, x.clone());
        let grad: Tensor<3> = Tensor::from_inner(Tensor::from_primitive::<Flex>(grad));
        let mut inner = Leaves(HashMap::new());
        module.visit(&mut inner);
        let aliases = inner
            .0
            .iter()
            .filter_map(|(id, node)| Some((Leaf::of(*node), Leaf::of(*leaves.0.get(id)?))));
        let loss = (y * grad).sum();
        let mut found = sink::with_aliases(aliases.collect(), || loss.backward());
        module.visit(&mut HandOver { found: &mut found, leaves: &leaves.0, outer });
        let dx = if needs { x.grad_remove(&mut found) } else { None };
        dx.and_then(|dx| dx.try_into_primitive::<Flex>().ok())
    }));
    let prepared = Recompute.prepare::<NoCheckpointing>([input.node()]).compute_bound().stateful();
    Tensor::from_primitive::<Autodiff<Flex>>(match prepared {
        OpsKind::Tracked(prep) => prep.finish(again, output),
        OpsKind::UnTracked(prep) => prep.finish(output),
    })
}

/// A transformer block, checkpointed; see [`Block::forward`].
pub fn block(
    block: &Block,
    x: Tensor<3>,
    context: &Context,
    layer: usize,
    precision: Precision,
) -> Tensor<3> {
    let mut context = context.clone();
    let plain = |x: Tensor<2>| if x.is_autodiff() { x.inner() } else { x };
    context.rope = context.rope.map(|(cos, sin)| (plain(cos), plain(sin)));
    checkpoint(block, x, move |block, x| {
        let lift = |t: &Tensor<2>| match x.is_autodiff() {
            true => Tensor::from_inner(t.clone()),
            false => t.clone(),
        };
        let rope = context.rope.as_ref().map(|(cos, sin)| (lift(cos), lift(sin)));
        let context = Context { rope, ..context.clone() };
        block.forward(x, &context, layer, &mut Run { precision, ..Run::plain() })
    })
}

/// From the output's gradient, and whether the input needs one: registers the parameters' gradients, returns the input's.
type Rerun = dyn Fn(FlexTensor, bool, &mut Outer) -> Option<FlexTensor> + Send + Sync;

#[derive(Clone)]
struct Again(Arc<Rerun>);

impl std::fmt::Debug for Again {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Again")
    }
}

#[derive(Debug)]
struct Recompute;

impl Backward<Flex, 1> for Recompute {
    type State = Again;

    fn backward(self, ops: Ops<Again, 1>, grads: &mut Outer, _: &mut Checkpointer) {
        let grad = grads.consume::<Flex>(&ops.node);
        let [parent] = ops.parents;
        let dx = (ops.state.0)(grad, parent.is_some(), grads);
        if let (Some(parent), Some(dx)) = (parent, dx) {
            grads.register::<Flex>(parent.id, dx);
        }
    }
}

/// The nodes of the parameters that get gradients.
struct Leaves(HashMap<ParamId, NodeId>);

impl ModuleVisitor for Leaves {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let base = param.base();
        if base.is_autodiff()
            && let Some(node) = tracked(&base).filter(|x| x.is_tracked())
        {
            self.0.insert(param.id, node.id());
        }
    }
}

/// Moves gradients of the inner graph to the parameters of the outer one.
struct HandOver<'a> {
    found: &'a mut Gradients,
    leaves: &'a HashMap<ParamId, NodeId>,
    outer: &'a mut Outer,
}

impl ModuleVisitor for HandOver<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(&node) = self.leaves.get(&param.id) else { return };
        let Some(grad) = param.base().grad_remove(self.found) else { return };
        let Ok(grad) = grad.try_into_primitive::<Flex>() else {
            unreachable!("gradients of CPU tensors live on the CPU")
        };
        self.outer.register::<Flex>(node, grad);
    }
}
