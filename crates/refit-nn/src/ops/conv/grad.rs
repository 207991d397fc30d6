//! Convolution and pooling under autodiff, by [`record`].

use burn::tensor::{Shape, Tensor};

use super::super::Host;
use super::super::grad::{flex, record, tracked};
use super::{Geometry, cpu, pool};

/// Convolution; keeps the input for the weight's gradient and the weight for the input's, where one is needed.
pub(super) fn conv2d(
    x: &Tensor<4>,
    weight: &Tensor<4>,
    bias: Option<&Tensor<1>>,
    g: Geometry,
) -> Option<Tensor<4>> {
    let run = move |x: &Host, w: &Host, b: Option<&Host>| {
        let [height, width] = g.out();
        let shape = Shape::from([g.batch, g.outputs, height, width]);
        let mut out = vec![0.0; shape.num_elements()];
        cpu::conv2d(x.slice(), w.slice(), b.map(Host::slice), &mut out, &g);
        flex(out, shape)
    };
    let shapes = (x.shape(), weight.shape());
    let pull = move |x: Option<&Host>, w: Option<&Host>, grad: &Host| {
        let (grad, shapes) = (grad.slice(), shapes.clone());
        let dx = w.map(|w| flex(cpu::conv2d_x(grad, w.slice(), &g), shapes.0));
        let dw = x.map(|x| flex(cpu::conv2d_w(grad, x.slice(), &g), shapes.1));
        (dx, dw)
    };
    let (x, weight) = (tracked(x)?, tracked(weight)?);
    Some(match bias {
        None => record([x, weight], |[x, w], needs| {
            let out = run(&x, &w, None);
            let (x, w) = (needs[1].then_some(x), needs[0].then_some(w));
            (
                out,
                Box::new(move |grad, _| {
                    let (dx, dw) = pull(x.as_ref(), w.as_ref(), &grad);
                    [dx, dw]
                }),
            )
        }),
        Some(bias) => record([x, weight, tracked(bias)?], |[x, w, b], needs| {
            let out = run(&x, &w, Some(&b));
            let (x, w) = (needs[1].then_some(x), needs[0].then_some(w));
            (
                out,
                Box::new(move |grad, needs| {
                    let (dx, dw) = pull(x.as_ref(), w.as_ref(), &grad);
                    let plane = g.out().iter().product();
                    let sums = || cpu::channel_sums(grad.slice(), g.outputs, plane);
                    [dx, dw, needs[2].then(|| flex(sums(), Shape::from([g.outputs])))]
                }),
            )
        }),
    })
}

/// Max pooling; keeps one byte for each output.
pub(super) fn max_pool2d(x: &Tensor<4>, k: usize) -> Option<Tensor<4>> {
    let [batch, channels, height, width] = x.dims();
    Some(record([tracked(x)?], |[x], _| {
        let shape = Shape::from([batch, channels, height / k, width / k]);
        let mut out = vec![0.0; shape.num_elements()];
        let mut which = vec![0; out.len()];
        pool::max_pool(x.slice(), &mut out, &mut which, [height, width], k);
        let input = x.shape();
        (
            flex(out, shape),
            Box::new(move |grad, _| {
                let dx = pool::max_pool_x(grad.slice(), &which, [height, width], k);
                [Some(flex(dx, input.clone()))]
            }),
        )
    }))
}

/// Mean of each plane; keeps nothing.
pub(super) fn global_avg_pool2d(x: &Tensor<4>) -> Option<Tensor<2>> {
    let [batch, channels, height, width] = x.dims();
    Some(record([tracked(x)?], |[x], _| {
        let mut out = vec![0.0; batch * channels];
        pool::mean(x.slice(), &mut out, height * width);
        let input = x.shape();
        (
            flex(out, Shape::from([batch, channels])),
            Box::new(move |grad, _| {
                [Some(flex(pool::mean_x(grad.slice(), height * width), input.clone()))]
            }),
        )
    }))
}
