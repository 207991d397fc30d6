//! The claim of model soups, small: the greedy soup of a sweep beats the best model of the sweep, in distribution and under
//! shift, and comes near to the ensemble of all of them; the mean of two networks from different starts is worth nothing.

use std::collections::HashMap;

use refit_data::Rng;
use refit_nn::vision::Cnn;
use refit_nn::{BurnDevice, named};
use refit_train::BoxError;
use refit_train::claim::{Claim, ClaimContext};
use refit_train::stats;
use refit_train::train::{Recipe, Schedule};

use super::greedy::greedy;
use super::learn::{Mixture, by_weight};
use crate::lab::images::{self, Augment, CLASSES, Fit, Images, SIZE};

/// The claim.
pub const CLAIM: Claim = Claim {
    method: "model-soups",
    question: "Is the mean of fine-tuned models better than the best of them, at no cost when it runs?",
    paper: "arXiv:2203.05482",
    assets: &[images::FASHION_MNIST],
    minutes: 10.0,
    seeds: &[0, 1, 2],
    run,
};

const CHANNELS: [usize; 3] = [16, 32, 64];
const INGREDIENTS: usize = 10;
const PRETRAIN: usize = 20_000;
const TUNE: usize = 8_000;
const HELD_OUT: usize = 2_000;
const BATCH: usize = 64;

type Values = HashMap<String, Vec<f32>>;

/// All parameters by name.
fn values(model: &Cnn) -> Values {
    let mut all = HashMap::new();
    let _ = named::edit(model.clone(), |name, _, values| {
        all.insert(name.to_owned(), values());
        None
    });
    all
}

/// `Σ w_k θ_k` in the shape of `like`.
fn mix(like: &Cnn, models: &[Values], weights: &[f64]) -> Cnn {
    named::edit(like.clone(), |name, _, _| {
        let mut sum = vec![0.0f32; models[0][name].len()];
        for (model, weight) in models.iter().zip(weights) {
            if *weight != 0.0 {
                sum.iter_mut().zip(&model[name]).for_each(|(s, v)| *s += *weight as f32 * v);
            }
        }
        Some(sum)
    })
}

fn mean_of(like: &Cnn, models: &[Values], kept: &[usize]) -> Cnn {
    let mut weights = vec![0.0; models.len()];
    kept.iter().for_each(|&k| weights[k] = 1.0 / kept.len() as f64);
    mix(like, models, &weights)
}

/// Four corruptions of a test set.
fn shifted(test: &Images) -> [Images; 4] {
    let mut rng = Rng::named(0, "corruptions");
    let noise = test.map(|_, image| {
        image.iter_mut().for_each(|p| *p = (*p + 0.25 * rng.normal() as f32).clamp(0.0, 1.0));
    });
    let blur = test.map(|_, image| {
        let old = image.to_vec();
        for y in 0..SIZE {
            for x in 0..SIZE {
                let (mut sum, mut count) = (0.0, 0.0);
                for v in y.saturating_sub(1)..(y + 2).min(SIZE) {
                    for u in x.saturating_sub(1)..(x + 2).min(SIZE) {
                        sum += old[v * SIZE + u];
                        count += 1.0;
                    }
                }
                image[y * SIZE + x] = sum / count;
            }
        }
    });
    let contrast = test.map(|_, image| {
        let mean = image.iter().sum::<f32>() / image.len() as f32;
        image.iter_mut().for_each(|p| *p = mean + 0.4 * (*p - mean));
    });
    let moved = test.map(|i, image| {
        let old = image.to_vec();
        let (dy, dx) = [(3, 0), (-3, 0), (0, 3), (0, -3)][i % 4];
        for y in 0..SIZE as isize {
            for x in 0..SIZE as isize {
                let (v, u) = (y - dy, x - dx);
                let inside = (0..SIZE as isize).contains(&v) && (0..SIZE as isize).contains(&u);
                image[y as usize * SIZE + x as usize] =
                    if inside { old[v as usize * SIZE + u as usize] } else { 0.0 };
            }
        }
    });
    [noise, blur, contrast, moved]
}

/// A draw of the sweep: rate, decay, smoothing, augmentation, epochs.
fn ingredient(base: &Cnn, data: &Images, seed: u64, k: usize) -> Result<Cnn, BoxError> {
    let mut rng = Rng::named(seed, &format!("sweep {k}"));
    let rate = 3e-4 * 10f64.powf(rng.uniform());
    let decay = [0.0, 1e-2, 1e-1][rng.below(3)];
    let smoothing = [0.0, 0.1][rng.below(2)];
    let augment =
        Augment { shift: rng.below(4), flip: rng.below(2) == 1, erase: [0, 6, 10][rng.below(3)] };
    let epochs = 1 + rng.below(3);
    let steps = (epochs * data.len() / BATCH) as u64;
    fit(steps, rate, decay, smoothing, augment, 1000 * seed + k as u64).run(base.clone(), data)
}

fn fit(steps: u64, rate: f64, decay: f64, smoothing: f32, augment: Augment, seed: u64) -> Fit {
    let schedule = Schedule::cosine(steps / 10, 0.0);
    let recipe = Recipe { seed, decay, schedule, ..Recipe::new(steps, rate) };
    Fit { recipe, batch: BATCH, smoothing, augment, dropout: 0.0 }
}

/// A learned soup: one set of weights, the exact gradient, AdamW on held-out images.
fn learned(like: &Cnn, models: &[Values], held_out: &Images) -> Result<Cnn, BoxError> {
    let mut mixture = Mixture::uniform(models.len(), 1);
    for step in 0..40 {
        let batch = held_out.select((0..256).map(|i| (step * 256 + i) % held_out.len()));
        let mixed = mix(like, models, &mixture.weights(0));
        let (gradient, by_temperature) = slopes(&mixed, &batch, mixture.temperature)?;
        let by_model: Vec<f64> = models
            .iter()
            .map(|model| gradient.iter().map(|(name, g)| by_weight(g, &model[name])).sum())
            .collect();
        mixture.step(&by_model, by_temperature, 0.05);
    }
    Ok(mix(like, models, &mixture.weights(0)))
}

/// `dL/dθ` by name, and `dL/db` of the temperature `b`.
fn slopes(model: &Cnn, batch: &Images, temperature: f64) -> Result<(Values, f64), BoxError> {
    use burn::module::Module;
    let tracked = model.clone().train();
    let device = BurnDevice::flex().autodiff();
    let x = images::input(batch, &device);
    let logits = tracked.forward(x, &mut refit_nn::Run::plain())?;
    let scaled = logits.clone() * temperature;
    let labels: Vec<Option<u32>> = batch.labels.iter().map(|label| Some(*label)).collect();
    let loss = refit_train::train::loss::cross_entropy(&labels, 0.0);
    // dL/d(b z): the same loss on the host leaves it in place of the logits.
    let mut slope = refit_nn::ops::to_vec(&scaled);
    loss(0..batch.len(), &mut slope);
    let by_temperature =
        slope.iter().zip(refit_nn::ops::to_vec(&logits)).map(|(g, z)| f64::from(g * z)).sum();
    let mut gradients = refit_nn::ops::logit_loss(scaled, &loss).backward();
    let mut found = HashMap::new();
    refit_nn::named::gradients(&tracked, &mut gradients, |name, values| {
        found.insert(name.to_owned(), values);
    });
    Ok((found, by_temperature))
}

struct Bench {
    test: Images,
    shifts: [Images; 4],
}

impl Bench {
    /// Accuracy on the test set, and its mean over the shifted ones.
    fn measure(&self, model: &Cnn) -> Result<[(&'static str, f64); 2], BoxError> {
        let shifted: Vec<f64> =
            self.shifts.iter().map(|s| images::accuracy(model, s)).collect::<Result<_, _>>()?;
        Ok([
            ("accuracy", images::accuracy(model, &self.test)?),
            ("accuracy under shift", stats::mean(&shifted).unwrap_or(f64::NAN)),
        ])
    }
}

fn run(cx: &mut ClaimContext) -> Result<(), BoxError> {
    let (train, test) = images::fashion_mnist(cx)?;
    let quick = cx.quick();
    let part = |n: usize| if quick { n / 4 } else { n };
    cx.param("ingredients", INGREDIENTS);
    cx.param("images", format!("{} + {} + {HELD_OUT}", part(PRETRAIN), part(TUNE)));
    cx.param("refit", env!("CARGO_PKG_VERSION"));
    let pretraining = train.select(0..part(PRETRAIN));
    let tuning = train.select(PRETRAIN..PRETRAIN + part(TUNE));
    let held_out = train.select(PRETRAIN + TUNE..PRETRAIN + TUNE + HELD_OUT);
    let bench = Bench { shifts: shifted(&test), test };
    for seed in cx.seeds().to_vec() {
        let start = |seed: u64| -> Result<Cnn, BoxError> {
            let steps = (2 * pretraining.len() / BATCH) as u64;
            let run = fit(steps, 2e-3, 0.0, 0.0, Augment::default(), seed);
            run.run(images::cnn(&CHANNELS, seed)?, &pretraining)
        };
        // Everything of a seed is one trial: the arms share its ingredients.
        cx.arm("best of the sweep", seed, |trial| {
            let base = start(seed)?;
            let models: Vec<Cnn> = (0..INGREDIENTS)
                .map(|k| ingredient(&base, &tuning, seed, k))
                .collect::<Result<_, _>>()?;
            let theta: Vec<Values> = models.iter().map(values).collect();
            let mut scorer = |kept: &[usize]| {
                let soup = mean_of(&base, &theta, kept);
                images::accuracy(&soup, &held_out).map_err(|e| crate::Error::BadData {
                    source_name: "held-out images".into(),
                    problem: e.to_string(),
                })
            };
            let recipe = greedy(INGREDIENTS, false, &mut scorer)?;
            let best = recipe.kept[0];
            for (metric, value) in bench.measure(&models[best])? {
                trial.record(metric, value);
            }
            trial.record("accuracy on held-out", recipe.steps[0].alone);
            let mut arm = |name: &str, model: &Cnn| -> Result<(), BoxError> {
                for (metric, value) in bench.measure(model)? {
                    trial.record(&format!("{name}: {metric}"), value);
                }
                Ok(())
            };
            arm("uniform soup", &mean_of(&base, &theta, &(0..INGREDIENTS).collect::<Vec<_>>()))?;
            arm("greedy soup", &mean_of(&base, &theta, &recipe.kept))?;
            arm("learned soup", &learned(&base, &theta, &held_out)?)?;
            arm("the start of all", &base)?;
            let other = start(seed + 100)?;
            arm("mean of two starts", &mean_of(&base, &[values(&base), values(&other)], &[0, 1]))?;
            let singles: Vec<f64> = models
                .iter()
                .map(|model| images::accuracy(model, &bench.test))
                .collect::<Result<_, _>>()?;
            trial.record("mean of the sweep", stats::mean(&singles).unwrap_or(f64::NAN));
            // Logit ensemble: K times the cost.
            let ensemble = |set: &Images| -> Result<f64, BoxError> {
                let mut sum = vec![0.0f32; set.len() * CLASSES];
                for model in &models {
                    let logits = images::logits(model, set)?;
                    sum.iter_mut().zip(logits).for_each(|(s, l)| *s += l);
                }
                let right = images::correct(&sum, &set.labels);
                Ok(100.0 * right.iter().filter(|r| **r).count() as f64 / right.len() as f64)
            };
            trial.record("ensemble", ensemble(&bench.test)?);
            trial.record("kept by greedy", recipe.kept.len() as f64);
            Ok(())
        })?;
        // Spread over arms of their own, also when the trial came from the cache.
        for name in [
            "uniform soup",
            "greedy soup",
            "learned soup",
            "the start of all",
            "mean of two starts",
        ] {
            for metric in ["accuracy", "accuracy under shift"] {
                let key = format!("{name}: {metric}");
                if let Some(value) = cx.value("best of the sweep", seed, &key) {
                    cx.record(name, seed, metric, value);
                }
            }
        }
    }
    judge(cx);
    Ok(())
}

fn judge(cx: &mut ClaimContext) {
    let (test, shift, best) = ("accuracy", "accuracy under shift", "best of the sweep");
    let gain = cx.mean("greedy soup", test) - cx.mean(best, test);
    cx.check(
        "the greedy soup is at least 0.2 points above the model that is best on held-out images",
        gain >= 0.2,
        format!("{gain:+.2} points, by seed {:.2?}", cx.difference("greedy soup", best, test)),
    );
    let under_shift = cx.mean("uniform soup", shift).max(cx.mean("greedy soup", shift));
    let robust = under_shift - cx.mean(best, shift);
    cx.check(
        "the uniform or the greedy soup is at least 0.5 points above it under shift",
        robust >= 0.5,
        format!("{robust:+.2} points"),
    );
    let ensemble = cx.mean(best, "ensemble") - cx.mean("greedy soup", test);
    cx.check(
        "the ensemble of all, at ten times the cost, is at most 0.3 points below or any number above the greedy soup",
        ensemble >= -0.3,
        format!("ensemble {:.2}, greedy {:.2}", cx.mean(best, "ensemble"), cx.mean("greedy soup", test)),
    );
    let control = cx.mean("the start of all", test) - cx.mean("mean of two starts", test);
    cx.check(
        "the mean of two networks from different starts loses at least 20 points",
        control >= 20.0,
        format!("{control:.1} points"),
    );
    cx.likely_reason(
        "networks trained for seconds are far from converged: ingredients with strong augmentation end up below their start, and \
         a mean pays for them",
    );
}
