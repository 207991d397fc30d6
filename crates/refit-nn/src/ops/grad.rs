//! The fused CPU kernels under autodiff: each operation runs its inference kernel forward and a kernel of its own backward.
//!
//! [`record`] is the only place that talks to the autodiff engine. An operation hands it its inputs, computes its output from
//! their values, and returns a pullback: from the gradient of the output to the gradients of the inputs that need one. What an
//! operation does not need for that it does not keep, and a frozen input costs neither memory nor time.

use std::sync::Arc;

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Bytes, DType, Shape, Tensor};
use burn_flex::{Flex, FlexTensor, Layout};

use super::{Activation, AttentionSpec, Host, Precision, back, cpu, sink};

/// A CPU tensor that autodiff follows.
pub(crate) type Tracked = FloatTensor<Autodiff<Flex>>;
/// Gradient of the output, and which inputs need one, to the inputs' gradients.
pub(super) type Pull<const N: usize> =
    dyn Fn(Host, [bool; N]) -> [Option<FlexTensor>; N] + Send + Sync;

/// The backward half of one recorded operation.
#[derive(Clone)]
pub(super) struct Pullback<const N: usize>(Arc<Pull<N>>);

impl<const N: usize> std::fmt::Debug for Pullback<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pullback")
    }
}

#[derive(Debug)]
struct Fused;

impl<const N: usize> Backward<Flex, N> for Fused {
    type State = Pullback<N>;

    fn backward(self, ops: Ops<Pullback<N>, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = Host(grads.consume::<Flex>(&ops.node).to_contiguous());
        let needs = ops.parents.each_ref().map(Option::is_some);
        let results = (ops.state.0)(grad, needs);
        for (parent, result) in ops.parents.iter().zip(results) {
            if let (Some(parent), Some(result)) = (parent, result) {
                let result = Host(result);
                if !sink::offer(sink::Leaf::of(parent.id), result.slice()) {
                    grads.register::<Flex>(parent.id, result.0);
                }
            }
        }
    }
}

/// The inputs of an operation, if at least one of them is an f32 CPU tensor under autodiff and none lives elsewhere.
pub(crate) fn tracked<const D: usize>(x: &Tensor<D>) -> Option<Tracked> {
    let lifted = if x.is_autodiff() { x.clone() } else { Tensor::from_inner(x.clone()) };
    let x = lifted.try_into_primitive::<Autodiff<Flex>>().ok()?;
    (x.primitive().dtype() == DType::F32).then_some(x)
}

/// Runs one operation: `forward` gets the values of the inputs and which of them need a gradient.
pub(super) fn record<const N: usize, const D: usize>(
    inputs: [Tracked; N],
    forward: impl FnOnce([Host; N], [bool; N]) -> (FlexTensor, Box<Pull<N>>),
) -> Tensor<D> {
    let needs = inputs.each_ref().map(|x| x.is_tracked());
    let guards = inputs.each_ref().map(|x| x.node());
    let values = inputs.map(|x| Host(x.into_primitive().to_contiguous()));
    let (output, pull) = forward(values, needs);
    let output = match Fused.prepare::<NoCheckpointing>(guards).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(Pullback(Arc::from(pull)), output),
        OpsKind::UnTracked(prep) => prep.finish(output),
    };
    Tensor::from_primitive::<Autodiff<Flex>>(output)
}

pub(super) fn flex(values: Vec<f32>, shape: Shape) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), DType::F32)
}

/// `x · wᵀ` with the weight's and the bias's gradients.
pub(super) fn linear(
    x: &Tensor<3>,
    weight: &Tensor<2>,
    bias: Option<&Tensor<1>>,
    precision: Precision,
) -> Option<Tensor<3>> {
    let ([batch, seq, k], [n, _]) = (x.dims(), weight.dims());
    let shape = Shape::from([batch, seq, n]);
    let run = move |x: &Host, w: &Host, b: Option<&Host>| {
        let mut out = vec![0.0; batch * seq * n];
        cpu::linear(x.slice(), w.slice(), b.map(Host::slice), &mut out, k, n, precision);
        flex(out, shape)
    };
    let pull = move |x: Option<Host>, w: Option<Host>, g: &Host| {
        let dx = w.map(|w| {
            let dx = back::linear_x(g.slice(), w.slice(), k, n, precision);
            flex(dx, Shape::from([batch, seq, k]))
        });
        let dw = x.map(|x| {
            flex(back::linear_w(g.slice(), x.slice(), k, n, precision), Shape::from([n, k]))
        });
        (dx, dw)
    };
    Some(match bias {
        None => record([tracked(x)?, tracked(weight)?], |[x, w], needs| {
            let out = run(&x, &w, None);
            let (x, w) = (needs[1].then_some(x), needs[0].then_some(w));
            (
                out,
                Box::new(move |g, _| {
                    let (dx, dw) = pull(x.clone(), w.clone(), &g);
                    [dx, dw]
                }),
            )
        }),
        Some(bias) => {
            record([tracked(x)?, tracked(weight)?, tracked(bias)?], |[x, w, b], needs| {
                let out = run(&x, &w, Some(&b));
                let (x, w) = (needs[1].then_some(x), needs[0].then_some(w));
                (
                    out,
                    Box::new(move |g, needs| {
                        let (dx, dw) = pull(x.clone(), w.clone(), &g);
                        let db = needs[2]
                            .then(|| flex(back::column_sums(g.slice(), n), Shape::from([n])));
                        [dx, dw, db]
                    }),
                )
            })
        }
    })
}

/// RMSNorm; keeps its input and recomputes the statistic.
pub(super) fn rms_norm<const D: usize>(
    x: &Tensor<D>,
    weight: &Tensor<1>,
    eps: f64,
) -> Option<Tensor<D>> {
    Some(record([tracked(x)?, tracked(weight)?], |[x, w], _| {
        let shape = x.shape();
        let mut out = vec![0.0; x.slice().len()];
        cpu::rms_norm(x.slice(), w.slice(), eps as f32, &mut out);
        (
            flex(out, shape.clone()),
            Box::new(move |g, needs| {
                let (dx, dw) =
                    back::rms_norm(x.slice(), w.slice(), g.slice(), eps as f32, needs[1]);
                [needs[0].then(|| flex(dx, shape.clone())), dw.map(|dw| flex(dw, w.shape()))]
            }),
        )
    }))
}

/// LayerNorm; keeps its input and recomputes the statistics.
pub(super) fn layer_norm<const D: usize>(
    x: &Tensor<D>,
    weight: &Tensor<1>,
    bias: Option<&Tensor<1>>,
    eps: f64,
) -> Option<Tensor<D>> {
    let eps = eps as f32;
    let (x, w) = (tracked(x)?, tracked(weight)?);
    Some(match bias {
        None => record([x, w], |[x, w], _| {
            let mut out = vec![0.0; x.slice().len()];
            cpu::layer_norm(x.slice(), w.slice(), None, eps, &mut out);
            (
                flex(out, x.shape()),
                Box::new(move |g, needs| {
                    let (dx, dw) = back::layer_norm(x.slice(), w.slice(), g.slice(), eps, needs[1]);
                    [needs[0].then(|| flex(dx, x.shape())), dw.map(|dw| flex(dw, w.shape()))]
                }),
            )
        }),
        Some(bias) => record([x, w, tracked(bias)?], |[x, w, b], _| {
            let mut out = vec![0.0; x.slice().len()];
            cpu::layer_norm(x.slice(), w.slice(), Some(b.slice()), eps, &mut out);
            (
                flex(out, x.shape()),
                Box::new(move |g, needs| {
                    let (dx, dw) = back::layer_norm(x.slice(), w.slice(), g.slice(), eps, needs[1]);
                    let db = needs[2].then(|| back::column_sums(g.slice(), w.slice().len()));
                    [
                        needs[0].then(|| flex(dx, x.shape())),
                        dw.map(|dw| flex(dw, w.shape())),
                        db.map(|db| flex(db, w.shape())),
                    ]
                }),
            )
        }),
    })
}

/// An elementwise nonlinearity; keeps its input.
pub(super) fn activation<const D: usize>(x: &Tensor<D>, kind: Activation) -> Option<Tensor<D>> {
    Some(record([tracked(x)?], |[x], _| {
        let mut out = vec![0.0; x.slice().len()];
        cpu::activation(x.slice(), &mut out, kind);
        (
            flex(out, x.shape()),
            Box::new(move |g, _| {
                [Some(flex(back::activation(x.slice(), g.slice(), kind), x.shape()))]
            }),
        )
    }))
}

/// `activation(gate) * up`; keeps both inputs and recomputes the activation.
pub(super) fn gated(gate: &Tensor<3>, up: &Tensor<3>, kind: Activation) -> Option<Tensor<3>> {
    Some(record([tracked(gate)?, tracked(up)?], |[gate, up], _| {
        let mut out = vec![0.0; gate.slice().len()];
        cpu::gated(gate.slice(), up.slice(), &mut out, kind);
        (
            flex(out, gate.shape()),
            Box::new(move |g, _| {
                let (dg, du) = back::gated(gate.slice(), up.slice(), g.slice(), kind);
                [Some(flex(dg, gate.shape())), Some(flex(du, gate.shape()))]
            }),
        )
    }))
}

/// Rotary positions; the pullback rotates the other way and keeps the tables alone.
pub(super) fn rope(
    x: &Tensor<3>,
    cos: &Tensor<2>,
    sin: &Tensor<2>,
    heads: usize,
) -> Option<Tensor<3>> {
    let [_, seq, width] = x.dims();
    let (cos, sin) = (tracked(cos)?, tracked(sin)?);
    if cos.is_tracked() || sin.is_tracked() {
        return None; // Learned tables: the plain composition knows their gradient.
    }
    let cos = Host(cos.into_primitive().to_contiguous());
    let sin = Host(sin.into_primitive().to_contiguous());
    Some(record([tracked(x)?], |[x], _| {
        let shape = x.shape();
        let mut values = x.into_vec();
        cpu::rope(&mut values, cos.slice(), sin.slice(), heads, width / heads, seq);
        (
            flex(values, shape.clone()),
            Box::new(move |g, _| {
                let mut values = g.into_vec();
                let back: Vec<f32> = sin.slice().iter().map(|s| -s).collect();
                cpu::rope(&mut values, cos.slice(), &back, heads, width / heads, seq);
                [Some(flex(values, shape.clone()))]
            }),
        )
    }))
}

/// Softmax attention; keeps q, k and v and recomputes the probabilities block by block.
pub(super) fn attention(
    q: &Tensor<3>,
    k: &Tensor<3>,
    v: &Tensor<3>,
    spec: &AttentionSpec,
) -> Option<Tensor<3>> {
    let ([batch, seq, _], [_, keys, _]) = (q.dims(), k.dims());
    let spec = spec.clone();
    Some(record([tracked(q)?, tracked(k)?, tracked(v)?], |[q, k, v], _| {
        let mut out = vec![0.0; q.slice().len()];
        cpu::attention(q.slice(), k.slice(), v.slice(), &mut out, batch, seq, keys, &spec);
        (
            flex(out, q.shape()),
            Box::new(move |g, _| {
                let (dq, dk, dv) = back::attention(
                    q.slice(),
                    k.slice(),
                    v.slice(),
                    g.slice(),
                    batch,
                    seq,
                    keys,
                    &spec,
                );
                [Some(flex(dq, q.shape())), Some(flex(dk, k.shape())), Some(flex(dv, k.shape()))]
            }),
        )
    }))
}

/// Table look-up; the pullback adds the rows' gradients up.
pub(super) fn embedding(
    table: &Tensor<2>,
    ids: &[u32],
    batch: usize,
    seq: usize,
) -> Option<Tensor<3>> {
    let width = table.dims()[1];
    let ids = ids.to_vec();
    Some(record([tracked(table)?], |[table], _| {
        let mut out = vec![0.0; ids.len() * width];
        cpu::embedding(table.slice(), &ids, &mut out, width);
        let shape = table.shape();
        (
            flex(out, Shape::from([batch, seq, width])),
            Box::new(move |g, _| {
                let mut sums = vec![0.0f32; shape.num_elements()];
                for (row, &id) in g.slice().chunks_exact(width).zip(&ids) {
                    let sum = &mut sums[id as usize * width..(id as usize + 1) * width];
                    for (s, r) in sum.iter_mut().zip(row) {
                        *s += r;
                    }
                }
                [Some(flex(sums, shape.clone()))]
            }),
        )
    }))
}

/// A loss on the logits `x · weightᵀ`, see [`super::head_loss`].
pub(super) fn head_loss(
    x: &Tensor<3>,
    weight: &Tensor<2>,
    loss: &super::LogitLoss,
    precision: Precision,
) -> Option<Tensor<1>> {
    Some(record([tracked(x)?, tracked(weight)?], |[x, w], needs| {
        let k = weight.dims()[1];
        let (value, dx, dw) = back::head_loss(x.slice(), w.slice(), k, needs, loss, precision);
        let (shape_x, shape_w) = (x.shape(), w.shape());
        (
            flex(vec![value as f32], Shape::from([1])),
            Box::new(move |g, _| {
                let factor = g.slice()[0];
                let scaled =
                    |values: &[f32]| -> Vec<f32> { values.iter().map(|v| v * factor).collect() };
                [
                    dx.as_deref().map(|d| flex(scaled(d), shape_x.clone())),
                    dw.as_deref().map(|d| flex(scaled(d), shape_w.clone())),
                ]
            }),
        )
    }))
}

/// A loss on logits, see [`super::logit_loss`]; its gradient is known as soon as its value is.
pub(super) fn logit_loss(logits: &Tensor<2>, loss: &super::LogitLoss) -> Option<Tensor<1>> {
    let rows = logits.dims()[0];
    Some(record([tracked(logits)?], |[logits], _| {
        let shape = logits.shape();
        let mut slope = logits.into_vec();
        let value = loss(0..rows, &mut slope);
        (
            flex(vec![value as f32], Shape::from([1])),
            Box::new(move |g, _| {
                let factor = g.slice()[0];
                let scaled = slope.iter().map(|s| s * factor).collect();
                [Some(flex(scaled, shape.clone()))]
            }),
        )
    }))
}
