//! Gradients handed over while the backward pass still runs.
//!
//! Autodiff keeps the gradient of every parameter until the pass is over. A [`GradientSink`] sees each one the moment its kernel
//! has computed it and may take it away, so that never more than one full gradient exists at a time. It sees what the fused CPU
//! kernels compute; gradients of other operations stay with autodiff.

use std::cell::Cell;
use std::collections::HashMap;
use std::ptr::NonNull;

use burn::backend::autodiff::NodeId;
use burn::tensor::Tensor;

use super::grad::tracked;

/// Identity of a tensor in the graph of one forward pass. A parameter gets another one whenever its value is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Leaf(u64);

impl Leaf {
    pub(crate) fn of(node: NodeId) -> Self {
        Self(node.value)
    }
}

/// The identity of a tensor under autodiff on the CPU; `None` for others.
pub fn leaf<const D: usize>(x: &Tensor<D>) -> Option<Leaf> {
    if !x.is_autodiff() {
        return None;
    }
    tracked(x).filter(|x| x.is_tracked()).map(|x| Leaf::of(x.id()))
}

/// Receives gradients during a backward pass.
pub trait GradientSink {
    /// One contribution to the gradient of `leaf`, row-major. When this returns true the sink has consumed it, and autodiff never
    /// gets it; otherwise autodiff adds it up as usual. A tensor that an operation uses twice is offered twice.
    fn take(&mut self, leaf: Leaf, grad: &[f32]) -> bool;
}

thread_local! {
    static CURRENT: Cell<Option<NonNull<dyn GradientSink>>> = const { Cell::new(None) };
}

/// Puts the former sink back, also when the pass panics.
struct Restore(Option<NonNull<dyn GradientSink>>);

impl Drop for Restore {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

/// Runs `backward` on this thread with `sink` in place.
pub fn with_sink<T>(sink: &mut dyn GradientSink, backward: impl FnOnce() -> T) -> T {
    // SAFETY: only the lifetime changes. The pointer leaves `CURRENT` when `_restore` is dropped, at the end of this function,
    // while `sink` is still borrowed.
    let sink = unsafe {
        std::mem::transmute::<NonNull<dyn GradientSink + '_>, NonNull<dyn GradientSink + 'static>>(
            NonNull::from(sink),
        )
    };
    let _restore = Restore(CURRENT.replace(Some(sink)));
    backward()
}

/// Runs the backward pass of a graph inside another one's: the sink in place, if any, sees the leaves of the inner graph under
/// the names that they have in the outer one.
pub(crate) fn with_aliases<T>(aliases: HashMap<Leaf, Leaf>, backward: impl FnOnce() -> T) -> T {
    struct Alias(HashMap<Leaf, Leaf>, NonNull<dyn GradientSink>);
    impl GradientSink for Alias {
        fn take(&mut self, leaf: Leaf, grad: &[f32]) -> bool {
            let Some(outer) = self.0.get(&leaf) else { return false };
            // SAFETY: `with_aliases` has taken the pointer out of `CURRENT`, whose `with_sink` is still running below it on the
            // stack: nobody else can use it.
            unsafe { self.1.as_mut() }.take(*outer, grad)
        }
    }
    let Some(sink) = CURRENT.take() else { return backward() };
    let _restore = Restore(Some(sink));
    with_sink(&mut Alias(aliases, sink), backward)
}

/// Shows a gradient to the sink, if there is one; true when it took it.
pub(super) fn offer(leaf: Leaf, grad: &[f32]) -> bool {
    // The sink is out of its place while it works: a pass that it might start itself finds none.
    let Some(mut sink) = CURRENT.take() else { return false };
    let _restore = Restore(Some(sink));
    // SAFETY: `with_sink` holds the exclusive borrow that the pointer was made of for as long as `CURRENT` has it, and nobody
    // else can take the pointer now.
    unsafe { sink.as_mut() }.take(leaf, grad)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution};

    use super::*;
    use crate::ops::{linear, to_vec};

    struct Take(Vec<Leaf>, Vec<(Leaf, Vec<f32>)>);

    impl GradientSink for Take {
        fn take(&mut self, leaf: Leaf, grad: &[f32]) -> bool {
            let mine = self.0.contains(&leaf);
            if mine {
                self.1.push((leaf, grad.to_vec()));
            }
            mine
        }
    }

    fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        let device = Device::flex().autodiff();
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), &device).require_grad()
    }

    #[test]
    fn a_sink_takes_what_it_wants_and_nothing_else() {
        let (x, a, b) = (random([1, 3, 4]), random([4, 4]), random([2, 4]));
        let run = || linear(linear(x.clone(), a.clone(), None), b.clone(), None).sum();
        let usual = run().backward();
        let (leaf_a, leaf_b) = (leaf(&a).expect("tracked"), leaf(&b).expect("tracked"));
        let mut sink = Take(vec![leaf_a], Vec::new());
        let loss = run();
        let grads = with_sink(&mut sink, || loss.backward());
        assert!(a.grad(&grads).is_none(), "taken");
        assert_eq!(sink.1, [(leaf_a, to_vec(&a.grad(&usual).expect("tracked")))]);
        let found = b.grad(&grads).expect("left");
        assert_eq!(to_vec(&found), to_vec(&b.grad(&usual).expect("tracked")));
        assert!(x.grad(&grads).is_some() && leaf_a != leaf_b);
        assert!(CURRENT.get().is_none(), "the sink is gone");
        assert!(leaf(&x.inner()).is_none());
    }

    #[test]
    fn a_weight_that_is_used_twice_is_offered_twice() {
        let (x, w) = (random([1, 3, 4]), random([4, 4]));
        let mut sink = Take(vec![leaf(&w).expect("tracked")], Vec::new());
        let loss = linear(linear(x, w.clone(), None), w, None).sum();
        with_sink(&mut sink, || loss.backward());
        assert_eq!(sink.1.len(), 2);
    }
}
