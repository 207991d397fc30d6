//! The claim of PELA, small: pairs from a decomposition, trained briefly towards the model that they came from, are nearly as good as
//! it, and better than the decomposition alone, than without the teacher, and than pairs from random weights.
//!
//! A ViT on Fashion-MNIST is the teacher; students train equally long. Then each is tuned on few examples of coarser classes. The
//! card's second part, MiniLM without labels, is not here.

use std::time::Instant;

use refit_data::Rng;
use refit_nn::operator::Linear;
use refit_nn::scratch::VitShape;
use refit_nn::vision::{Vision, VisionTransformer};
use refit_nn::{BurnDevice, Run, Trainable, ops};
use refit_train::BoxError;
use refit_train::claim::{Claim, ClaimContext};
use refit_train::train::loss::cross_entropy;
use refit_train::train::{At, Order, Recipe, RunOptions, Schedule, Terms, Trainer};

use super::objective::{Blocks, Held, features, pair_of, perturbation};
use crate::lab::images::{FASHION_MNIST, Images, fashion_mnist, input};
use crate::lab::vit;
use crate::svd;

/// The claim.
pub const CLAIM: Claim = Claim {
    method: "pela",
    question: "Do thin pairs that are trained briefly towards the original model come within a point of it at half its linears?",
    paper: "arXiv:2310.10700",
    assets: &[FASHION_MNIST],
    minutes: 45.0,
    seeds: &[0, 1, 2],
    run,
};

const BATCH: usize = 128;
/// Updates of the teacher, of a student, and of a student on the coarser classes.
const STEPS: [u64; 3] = [1200, 600, 100];
const RATE: f64 = 1e-3;
const TUNED_RATE: f64 = 3e-4;
/// Labelled examples of the coarser classes.
const FEW: usize = 500;
const EPSILON: f64 = 1e-3;
const ACCURACY: &str = "accuracy (%)";
const COARSE: &str = "accuracy on coarser classes (%)";

/// 16 patches of 7 x 7 pixels, 6 blocks of width 96.
fn shape() -> VitShape {
    VitShape { patch: 7, hidden: 96, intermediate: 384, layers: 6, heads: 4, ..VitShape::default() }
}

/// Where a student begins.
#[derive(Clone, Copy, PartialEq)]
enum From {
    Decomposition,
    Random,
}

/// What a student learns from: the labels, and by weight the teacher's blocks and its matrices.
#[derive(Clone, Copy)]
struct Lesson {
    from: From,
    trains: bool,
    distill: f64,
    perturbation: f64,
}

const fn lesson(from: From, trains: bool, distill: f64, perturbation: f64) -> Lesson {
    Lesson { from, trains, distill, perturbation }
}

const PELA: &str = "pela";
const ARMS: [(&str, Lesson); 5] = [
    ("svd alone", lesson(From::Decomposition, false, 0.0, 0.0)),
    ("svd, task", lesson(From::Decomposition, true, 0.0, 0.0)),
    ("svd, task and features", lesson(From::Decomposition, true, 1.0, 0.0)),
    (PELA, lesson(From::Decomposition, true, 1.0, 1.0)),
    ("random pairs, task and features", lesson(From::Random, true, 1.0, 0.0)),
];

fn run(cx: &mut ClaimContext) -> Result<(), BoxError> {
    let (train, test) = fashion_mnist(cx)?;
    let [teaching, learning, tuning] =
        if cx.quick() { STEPS.map(|steps| steps / 20) } else { STEPS };
    let test = if cx.quick() { test.select(0..1000) } else { test };
    cx.param(
        "updates of teacher, students and tuning",
        format!("{teaching}, {learning}, {tuning}"),
    );
    cx.param("batch", BATCH);
    cx.param("refit", env!("CARGO_PKG_VERSION"));
    let coarse = |images: &Images| Images {
        pixels: images.pixels.clone(),
        labels: images.labels.iter().map(|label| label / 2).collect(),
    };
    let (few, coarse_test) = (coarse(&train.select(0..FEW)), coarse(&test));
    for seed in cx.seeds().to_vec() {
        let teacher =
            fit(shape().init(seed, &BurnDevice::flex())?, &train, teaching, RATE, seed, None)?;
        let tune = |model: &VisionTransformer| -> Result<(f64, f64), BoxError> {
            let started = Instant::now();
            let tuned = fit(model.clone(), &few, tuning, TUNED_RATE, seed, None)?;
            let seconds = started.elapsed().as_secs_f64() / tuning as f64;
            Ok((accuracy(&tuned, &coarse_test)?, seconds))
        };
        let record = |cx: &mut ClaimContext,
                      arm: &str,
                      make: &dyn Fn() -> Result<VisionTransformer, BoxError>| {
            cx.arm(arm, seed, |trial| {
                let model = make()?;
                trial.record(ACCURACY, accuracy(&model, &test)?);
                trial.record("parameters", parameters(&model) as f64);
                let (found, seconds) = tune(&model)?;
                trial.record(COARSE, found);
                trial.record("seconds per update of tuning", seconds);
                Ok(())
            })
        };
        record(cx, "teacher", &|| Ok(teacher.clone()))?;
        // A third of the weights is shown for one seed.
        let ratios: &[f64] = if seed == 0 { &[2.0, 3.0] } else { &[2.0] };
        for &ratio in ratios {
            for (name, lesson) in ARMS {
                let arm = if ratio == 2.0 { name.to_owned() } else { format!("{name}, a third") };
                record(cx, &arm, &|| student(&teacher, ratio, lesson, &train, learning, seed))?;
            }
        }
        let narrow = VitShape { hidden: 48, intermediate: 192, ..shape() };
        record(cx, "half the width from scratch", &|| {
            fit(narrow.init(seed, &BurnDevice::flex())?, &train, learning, RATE, seed, None)
        })?;
    }
    judge(cx);
    Ok(())
}

/// A student in pairs, trained as its lesson says.
fn student(
    teacher: &VisionTransformer,
    ratio: f64,
    lesson: Lesson,
    images: &Images,
    steps: u64,
    seed: u64,
) -> Result<VisionTransformer, BoxError> {
    let mut model = teacher.clone();
    if lesson.from == From::Random {
        model = shape().init(seed + 1000, &BurnDevice::flex())?;
    }
    let mut rng = Rng::named(seed, "factors");
    for linear in model.blocks.iter_mut().flat_map(|block| block.linears_mut()) {
        factorize(linear, ratio, lesson.from, &mut rng)?;
    }
    match lesson.trains {
        true => fit(model, images, steps, RATE, seed, Some((teacher, lesson))),
        false => Ok(model),
    }
}

fn factorize(linear: &mut Linear, ratio: f64, from: From, rng: &mut Rng) -> Result<(), BoxError> {
    let [out, inputs] = linear.shape();
    let rank = ((out * inputs) as f64 / (ratio * (out + inputs) as f64)).floor() as usize;
    let (up, down) = match from {
        From::Decomposition => {
            let weights = ops::to_vec(&linear.weight());
            svd::thin(&weights, out, inputs)?.truncated(rank).factors()
        }
        From::Random => {
            // Factors whose product has the deviation of the dense start, 0.02.
            let deviation = (0.02 / (rank as f64).sqrt()).sqrt();
            let mut draw = |count: usize| -> Vec<f32> {
                (0..count).map(|_| (deviation * rng.normal()) as f32).collect()
            };
            (draw(out * rank), draw(rank * inputs))
        }
    };
    linear.set_factors(down, up, rank);
    Ok(())
}

/// Trains on the labels, and where there is a teacher as the lesson says.
fn fit(
    model: VisionTransformer,
    images: &Images,
    steps: u64,
    rate: f64,
    seed: u64,
    teacher: Option<(&VisionTransformer, Lesson)>,
) -> Result<VisionTransformer, BoxError> {
    let weights: Vec<Vec<f32>> = teacher.map_or_else(Vec::new, |(teacher, _)| {
        let linears = teacher.blocks.iter().flat_map(|block| block.linears());
        linears.map(|linear| ops::to_vec(&linear.weight())).collect()
    });
    let schedule = Schedule::cosine(steps / 20, 0.0);
    let recipe = Recipe { seed, schedule, ..Recipe::new(steps, rate) };
    let mut trainer = Trainer::new(Vision::Vit(model), recipe)?;
    let order = Order::new(seed, images.len());
    let (device, plain) = (BurnDevice::flex().autodiff(), BurnDevice::flex());
    let batch_size = BATCH.min(images.len());
    let objective = |model: &Vision, at: At| -> Result<Terms, BoxError> {
        let Vision::Vit(model) = model else { return Err("a ViT trains here".into()) };
        let batch = images.select(order.batch(at.batch, batch_size));
        let labels: Vec<Option<u32>> = batch.labels.iter().copied().map(Some).collect();
        let mut seen = Blocks::default();
        let logits = model.forward(input(&batch, &device), &mut Run::tapped(&mut seen))?;
        let task = ops::logit_loss(logits, &cross_entropy(&labels, 0.0));
        let mut terms = Terms::one("cross-entropy", task, batch_size);
        let Some((teacher, lesson)) = teacher else { return Ok(terms) };
        if lesson.distill > 0.0 {
            let mut theirs = Blocks::default();
            teacher.forward(input(&batch, &plain), &mut Run::tapped(&mut theirs))?;
            if let Some(loss) = features(seen, theirs, None) {
                terms = terms.with("features", lesson.distill, loss);
            }
        }
        if lesson.perturbation > 0.0 {
            let linears = model.blocks.iter().flat_map(|block| block.linears());
            let held: Vec<Held> = linears
                .zip(&weights)
                .filter_map(|(linear, weight)| Some(Held { pair: pair_of(linear)?, weight }))
                .collect();
            if let Some(loss) = perturbation(&held, EPSILON) {
                terms = terms.with("perturbation", lesson.perturbation, loss);
            }
        }
        Ok(terms)
    };
    trainer.run(&objective, RunOptions::default())?;
    match trainer.into_model() {
        Vision::Vit(model) => Ok(model),
        _ => Err("a ViT trains here".into()),
    }
}

fn parameters(model: &VisionTransformer) -> usize {
    model.parameters().iter().map(|p| p.shape.iter().product::<usize>()).sum()
}

fn accuracy(model: &VisionTransformer, images: &Images) -> Result<f64, BoxError> {
    vit::accuracy_of(&Vision::Vit(model.clone()), &Default::default(), images)
}

fn judge(cx: &mut ClaimContext) {
    let mean = |cx: &ClaimContext, arm: &str| cx.mean(arm, ACCURACY);
    let (teacher, pela, svd) = (mean(cx, "teacher"), mean(cx, PELA), mean(cx, "svd alone"));
    cx.check(
        "at half the weights of its linears PELA is within 1 point of the teacher, and the decomposition alone loses 3 or more",
        teacher - pela <= 1.0 && teacher - svd >= 3.0,
        format!("teacher {teacher:.2}, PELA {pela:.2}, decomposition {svd:.2}"),
    );
    let gains = paired(cx, "svd, task and features", "svd, task");
    let gain = gains.iter().sum::<f64>() / gains.len().max(1) as f64;
    cx.check(
        "the teacher's features gain 0.3 points or more over the labels alone, mean over seeds",
        gain >= 0.3,
        format!("{gains:.2?}"),
    );
    let gains = paired(cx, "svd, task and features", "random pairs, task and features");
    cx.check(
        "pairs from the decomposition are better than random ones in every seed",
        !gains.is_empty() && gains.iter().all(|gain| *gain > 0.0),
        format!("{gains:.2?}"),
    );
    cx.note(format!(
        "the penalty on the farthest entries alone, not part of the verdict: {:.2?} points over task and features",
        paired(cx, PELA, "svd, task and features")
    ));
    let tuned = |cx: &ClaimContext, arm: &str| cx.mean(arm, COARSE);
    let all: Vec<String> = ["teacher", "svd alone", PELA, "half the width from scratch"]
        .iter()
        .map(|arm| format!("{arm} {:.2}", tuned(cx, arm)))
        .collect();
    cx.note(format!("tuned on {FEW} examples of 5 coarser classes: {}", all.join(", ")));
    let share =
        |cx: &ClaimContext, metric: &str| cx.mean(PELA, metric) / cx.mean("teacher", metric);
    cx.note(format!(
        "PELA has {:.2} of the teacher's parameters and takes {:.2} of its time per update of tuning",
        share(cx, "parameters"),
        share(cx, "seconds per update of tuning")
    ));
    cx.likely_reason(
        "a teacher this small is trained within minutes, so that its students may reach it from the labels alone",
    );
}

/// Differences of the accuracies of two arms, seed by seed.
fn paired(cx: &ClaimContext, arm: &str, rival: &str) -> Vec<f64> {
    let value = |arm: &str, seed: u64| cx.value(arm, seed, ACCURACY);
    cx.seeds().iter().filter_map(|seed| Some(value(arm, *seed)? - value(rival, *seed)?)).collect()
}
