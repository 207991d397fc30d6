//! Convolution and pooling against the plain composition, values and gradients, and against finite differences.

use burn::tensor::{Device, Distribution, Tensor};
use rayon::ThreadPoolBuilder;

use super::*;
use crate::ops::to_vec;

fn leaf<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    let device = Device::flex().autodiff();
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &device).require_grad()
}

/// Sum of `y` times fixed, uneven factors: a scalar that gives every element its own gradient.
fn scalar<const D: usize>(y: Tensor<D>) -> Tensor<1> {
    let n = y.dims().iter().product::<usize>();
    let factors: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
    let factors = Tensor::<1>::from_floats(factors.as_slice(), &y.device());
    (y.reshape([n]) * factors).sum()
}

fn close(name: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{name}");
    let size = b.iter().fold(1.0f32, |m, x| m.max(x.abs()));
    let worst = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(worst <= 2e-5 * size, "{name}: largest difference {worst} of values up to {size}");
}

/// `(batch, in, out, groups, [height, width], [kernel rows, columns], spec)`.
type Case = (usize, usize, usize, usize, [usize; 2], [usize; 2], usize, [usize; 4]);

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for stride in [1, 2, 3] {
        for padding in [0, 1, 2] {
            for (inputs, outputs, groups) in [(3, 7, 1), (6, 6, 6), (4, 8, 4), (6, 9, 3)] {
                for (size, kernel) in
                    [([9, 13], [3, 3]), ([7, 7], [5, 5]), ([8, 5], [1, 1]), ([11, 30], [2, 3])]
                {
                    cases.push((3, inputs, outputs, groups, size, kernel, stride, [padding; 4]));
                }
            }
        }
    }
    // Sides of their own, as TensorFlow's "same"; more channels than a tile; one image; a kernel as large as the image.
    cases.push((2, 3, 5, 1, [12, 14], [3, 3], 2, [0, 1, 0, 1]));
    cases.push((2, 4, 4, 4, [12, 14], [5, 5], 2, [1, 2, 2, 1]));
    cases.push((1, 20, 25, 1, [10, 33], [3, 3], 1, [1; 4]));
    cases.push((1, 40, 50, 1, [7, 7], [1, 1], 1, [0; 4]));
    cases.push((17, 1, 8, 1, [28, 28], [3, 3], 1, [1; 4]));
    cases.push((2, 5, 6, 1, [4, 4], [4, 4], 4, [0; 4]));
    cases.push((2, 2, 2, 1, [3, 3], [7, 7], 1, [2; 4]));
    cases
}

fn case(c: &Case) -> (ConvSpec, Tensor<4>, Tensor<4>, Tensor<1>) {
    let &(batch, inputs, outputs, groups, [height, width], [rows, columns], stride, padding) = c;
    (
        ConvSpec { stride, padding, groups },
        leaf([batch, inputs, height, width]),
        leaf([outputs, inputs / groups, rows, columns]),
        leaf([outputs]),
    )
}

#[test]
fn values_and_gradients_match_the_composition() {
    for c in cases() {
        let (spec, x, w, b) = case(&c);
        let name = |part: &str| format!("{part} of {c:?}");
        for bias in [Some(&b), None] {
            let fused = conv2d_with(x.clone(), w.clone(), bias.cloned(), &spec);
            let plain = compose::conv2d(x.clone(), w.clone(), bias.cloned(), &spec);
            assert_eq!(fused.dims(), plain.dims(), "{c:?}");
            let value = to_vec(&plain.clone().inner());
            close(&name("value"), &to_vec(&fused.clone().inner()), &value);
            let inner = |t: &Tensor<1>| t.clone().inner();
            let host = conv2d_with(x.clone().inner(), w.clone().inner(), bias.map(inner), &spec);
            assert_eq!(to_vec(&host), to_vec(&fused.clone().inner()), "{c:?}");
            let (fused, plain) = (scalar(fused).backward(), scalar(plain).backward());
            let (fx, px) = (x.grad(&fused).expect("tracked"), x.grad(&plain).expect("tracked"));
            close(&name("dx"), &to_vec(&fx), &to_vec(&px));
            let (fw, pw) = (w.grad(&fused).expect("tracked"), w.grad(&plain).expect("tracked"));
            close(&name("dw"), &to_vec(&fw), &to_vec(&pw));
            if bias.is_some() {
                let (fb, pb) = (b.grad(&fused).expect("tracked"), b.grad(&plain).expect("tracked"));
                close(&name("db"), &to_vec(&fb), &to_vec(&pb));
            }
        }
    }
}

#[test]
fn an_input_without_gradient_gets_none() {
    let (spec, x, w, b) = case(&cases()[0]);
    let x = x.set_require_grad(false);
    let grads = scalar(conv2d_with(x.clone(), w.clone(), Some(b.clone()), &spec)).backward();
    assert!(x.grad(&grads).is_none());
    assert!(w.grad(&grads).is_some() && b.grad(&grads).is_some());
}

#[test]
fn gradients_follow_finite_differences() {
    for c in
        [(1, 2, 3, 1, [5, 4], [3, 3], 2, [1; 4]), (2, 2, 4, 2, [5, 5], [3, 2], 1, [0, 1, 1, 0])]
    {
        let (spec, x, w, b) = case(&c);
        let device = x.device();
        let run = |x: &Tensor<4>, w: &Tensor<4>| {
            let y = conv2d_with(x.clone(), w.clone(), Some(b.clone()), &spec);
            scalar(y.clone() * y)
        };
        let grads = run(&x, &w).backward();
        for (which, leaf) in [&x, &w].into_iter().enumerate() {
            let slopes = to_vec(&leaf.grad(&grads).expect("tracked"));
            let values = to_vec(&leaf.clone().inner());
            for (i, slope) in slopes.iter().enumerate() {
                let at = |step: f32| {
                    let mut moved = values.clone();
                    moved[i] += step;
                    let data = burn::tensor::TensorData::new(moved, leaf.dims());
                    let moved = Tensor::from_data(data, &device);
                    let y = if which == 0 { run(&moved, &w) } else { run(&x, &moved) };
                    f64::from(to_vec(&y.inner())[0])
                };
                let measured = (at(1e-2) - at(-1e-2)) / 2e-2;
                let error = (measured - f64::from(*slope)).abs();
                assert!(error < 1e-2 * (1.0 + measured.abs()), "{which}[{i}]: {measured} {slope}");
            }
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_byte() {
    let results = |threads: usize| {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().expect("threads start");
        pool.install(|| {
            let mut all = Vec::new();
            for (inputs, outputs, groups) in [(8, 13, 1), (12, 12, 12)] {
                let (batch, [height, width]) = (37, [15, 11]);
                let x: Vec<f32> =
                    (0..batch * inputs * height * width).map(|i| (i as f32 * 0.37).sin()).collect();
                let w: Vec<f32> =
                    (0..outputs * inputs / groups * 9).map(|i| (i as f32 * 0.73).cos()).collect();
                let spec = ConvSpec::new(2, 1, groups);
                let g =
                    spec.geometry([batch, inputs, height, width], [outputs, inputs / groups, 3, 3]);
                let plane: usize = g.out().iter().product();
                let mut y = vec![0.0; batch * outputs * plane];
                cpu::conv2d(&x, &w, None, &mut y, &g);
                all.push(cpu::conv2d_x(&y, &w, &g));
                all.push(cpu::conv2d_w(&y, &x, &g));
                all.push(cpu::channel_sums(&y, outputs, plane));
                all.push(y);
            }
            all
        })
    };
    assert_eq!(results(1), results(2));
    assert_eq!(results(1), results(5));
}

#[test]
fn pools_match_the_composition() {
    for (size, k) in [([8, 6], 2), ([7, 9], 2), ([10, 11], 3), ([5, 5], 5), ([4, 4], 1)] {
        let x = leaf([3, 5, size[0], size[1]]);
        let (fused, plain) = (max_pool2d(x.clone(), k), compose::max_pool2d(x.clone(), k));
        assert_eq!(to_vec(&fused.clone().inner()), to_vec(&plain.clone().inner()));
        assert_eq!(to_vec(&max_pool2d(x.clone().inner(), k)), to_vec(&plain.clone().inner()));
        let (fused, plain) = (scalar(fused).backward(), scalar(plain).backward());
        let (f, p) = (x.grad(&fused).expect("tracked"), x.grad(&plain).expect("tracked"));
        close("max pool", &to_vec(&f), &to_vec(&p));
        let (fused, plain) = (global_avg_pool2d(x.clone()), compose::global_avg_pool2d(x.clone()));
        close("mean", &to_vec(&fused.clone().inner()), &to_vec(&plain.clone().inner()));
        let (fused, plain) = (scalar(fused).backward(), scalar(plain).backward());
        let (f, p) = (x.grad(&fused).expect("tracked"), x.grad(&plain).expect("tracked"));
        close("gradient of the mean", &to_vec(&f), &to_vec(&p));
    }
}

#[test]
fn a_nan_is_the_largest_of_its_window() {
    for place in 0..4 {
        let mut values = [1.0, 2.0, 3.0, 0.5];
        values[place] = f32::NAN;
        let x = Tensor::<1>::from_floats(values, &Device::flex()).reshape([1, 1, 2, 2]);
        assert!(to_vec(&max_pool2d(x, 2))[0].is_nan());
    }
}
