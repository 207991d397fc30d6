//! The claim of RepQuant, small, on a language model and on a ViT.
//!
//! (A) SmolLM2 with weights of 8 bits and what its norms give out at few: one scale for the tensor, SmoothQuant before that, scales
//! moved out of channels, bounds learned, weights reconstructed; and what no hardware does, scales per channel. (B) A ViT trained on
//! Fashion-MNIST with weights and activations of 4 bits: the same for its norms, and three grids for the softmax.

use std::path::{Path, PathBuf};

use refit_nn::BurnDevice;
use refit_nn::rounding::{Rounder, Rounding};
use refit_nn::vision::Vision;
use refit_store::Artifact;
use refit_train::BoxError;
use refit_train::claim::{Claim, ClaimContext, Trial};
use serde_json::{Value, json};

use crate::inputs::{Inputs, Labelled, ModelInput};
use crate::lab::images::{FASHION_MNIST, Images, fashion_mnist};
use crate::lab::{Lab, MODEL, find, vit};
use crate::labelled::Part;
use crate::quantize::activations;

/// The claim.
pub const CLAIM: Claim = Claim {
    method: "repquant",
    question: "Do scales of channels, moved into norms, let one scale per activation do as well as one per channel?",
    paper: "arXiv:2402.05628",
    assets: &[MODEL, FASHION_MNIST],
    minutes: 20.0,
    seeds: &[0, 1, 2],
    run,
};

const DOMAINS: [&str; 2] = ["man", "wordnet"];
/// Held-out tokens per domain.
const TOKENS: usize = 2048;
/// Calibration sequences and their tokens.
const CALIBRATION: (usize, usize) = (16, 128);
/// Seeds of (A), as the card has it.
const SEEDS: usize = 2;
/// The bits that decide, and those that are shown beside them.
const BITS: u8 = 6;
const OTHERS: [u8; 3] = [8, 5, 4];

/// Updates of the ViT, its test images and its calibration images.
const STEPS: u64 = 1000;
const TEST: usize = 1000;
const IMAGES: usize = 32;
/// Below this mean ratio between the largest and the smallest scale of a norm's channels, the ViT gets a spread of its own.
const SPREAD: f64 = 5.0;
/// Deviation of the logarithm of that spread.
const DEVIATION: f64 = 1.0;

fn run(cx: &mut ClaimContext) -> Result<(), BoxError> {
    language(cx)?;
    images(cx)?;
    judge(cx);
    Ok(())
}

/// An arm of (A): name, whether SmoothQuant comes first, what RepQuant is told.
fn arms() -> [(&'static str, bool, Value); 6] {
    [
        ("per tensor", false, json!({ "norm_scales": "tensor" })),
        ("smoothquant", true, json!({ "norm_scales": "tensor" })),
        ("per channel, static", false, json!({ "norm_scales": "channel" })),
        ("reparam", false, json!({})),
        ("reparam + clip", false, json!({ "clip": true })),
        ("reparam + clip + reconstruct", false, json!({ "clip": true, "reconstruct": true })),
    ]
}

fn language(cx: &mut ClaimContext) -> Result<(), BoxError> {
    let lab = Lab::open(cx)?;
    let tokens = if cx.quick() { TOKENS / 4 } else { TOKENS };
    cx.param("held-out tokens per domain", tokens);
    cx.param("calibration", json!(format!("{} x {} tokens", CALIBRATION.0, CALIBRATION.1)));
    let seeds: Vec<u64> = cx.seeds().iter().copied().take(SEEDS).collect();
    let inputs = lab.inputs(&["kjv", "man", "wordnet"]);
    let calibrated = |mut parameters: Value| {
        parameters["samples"] = json!(CALIBRATION.0);
        parameters["sequence_length"] = json!(CALIBRATION.1);
        parameters["dtype"] = json!("f16");
        parameters
    };
    for &seed in &seeds {
        cx.arm("dense", seed, |trial| {
            let dense = lab.model.artifact.path();
            trial.record("perplexity", lab.perplexity(dense, &DOMAINS, tokens, 0)?);
            Ok(())
        })?;
        let smooth = lab.path(&format!("repquant-smooth-{seed}"));
        let rounded = lab.path(&format!("repquant-rounded-{seed}"));
        let bits: Vec<u8> = match (cx.quick(), seed == seeds[0]) {
            (false, true) => std::iter::once(BITS).chain(OTHERS).collect(),
            _ => vec![BITS],
        };
        for bits in bits {
            for (name, after_smoothing, mut parameters) in arms() {
                if bits != BITS && name == "per channel, static" {
                    continue;
                }
                cx.arm(&arm(name, bits), seed, |trial| {
                    let mut given = inputs.clone();
                    if after_smoothing {
                        if !smooth.exists() {
                            let fold = calibrated(json!({ "fold_only": true }));
                            lab.apply("smoothquant", fold, &inputs, seed, &smooth)?;
                        }
                        given.models = vec![ModelInput::open("smoothed", &smooth)?];
                    }
                    parameters["rounded"] = json!("norms");
                    parameters["w_bits"] = json!(8);
                    parameters["a_bits"] = json!(bits);
                    let parameters = calibrated(parameters);
                    let done = lab.apply("repquant", parameters, &given, seed, &rounded)?;
                    note_spread(trial, &done.report);
                    let rounder = activations::stated(&Artifact::open(&rounded)?)?;
                    let found = lab.perplexity_through(&rounded, &rounder, &DOMAINS, tokens, 0)?;
                    trial.record("perplexity", found);
                    std::fs::remove_dir_all(&rounded)?;
                    Ok(())
                })?;
            }
        }
        oracle(cx, &lab, &inputs, &rounded, tokens, seed)?;
        if smooth.exists() {
            std::fs::remove_dir_all(&smooth)?;
        }
    }
    Ok(())
}

/// Weights of 8 bits, and a range of its own for every channel in every window.
fn oracle(
    cx: &mut ClaimContext,
    lab: &Lab,
    inputs: &Inputs,
    out: &Path,
    tokens: usize,
    seed: u64,
) -> Result<(), BoxError> {
    cx.arm(&arm("oracle, per channel and window", BITS), seed, |trial| {
        let parameters = json!({ "bits": 8, "asymmetric": true, "dtype": "f16" });
        lab.apply("rtn", parameters, inputs, seed, out)?;
        let folds = crate::quantize::fold::of_norms(&lab.model)?;
        let mut rounder = Rounder::default();
        for site in folds.iter().flat_map(|fold| &fold.consumers) {
            rounder.insert(format!("{site}:in"), Rounding::ChannelDynamic { bits: BITS });
        }
        let found = lab.perplexity_through(out, &rounder, &DOMAINS, tokens, 0)?;
        trial.record("perplexity", found);
        std::fs::remove_dir_all(out)?;
        Ok(())
    })
}

fn arm(name: &str, bits: u8) -> String {
    format!("{bits} bits: {name}")
}

fn note_spread(trial: &mut Trial, report: &Value) {
    if let Some(spread) = report["channel_spread"]["mean"].as_f64().filter(|spread| *spread > 0.0) {
        trial.record("spread of channels", spread);
    }
}

/// An arm of (B).
fn vit_arms() -> [(&'static str, Value); 7] {
    [
        ("W8A8", json!({ "w_bits": 8, "a_bits": 8 })),
        ("W4A4, per tensor", json!({ "norm_scales": "tensor" })),
        ("W4A4", json!({})),
        ("W4A4, softmax by powers of two", json!({ "softmax": "log2" })),
        ("W4A4, softmax in equal steps", json!({ "softmax": "uniform" })),
        ("W4A4 + clip", json!({ "clip": true })),
        ("W4A4 + clip + reconstruct", json!({ "clip": true, "reconstruct": true })),
    ]
}

fn images(cx: &mut ClaimContext) -> Result<(), BoxError> {
    let (train, test) = match fashion_mnist(cx) {
        Ok(images) => images,
        Err(error) => {
            cx.note(format!("part (B) is missing: {error}"));
            return Ok(());
        }
    };
    let (steps, count) = if cx.quick() { (STEPS / 5, TEST / 2) } else { (STEPS, TEST) };
    cx.param("vit", json!(format!("{:?}, {steps} updates", vit::shape())));
    cx.param("test images", json!(count));
    let test = test.select(0..count);
    let labelled = calibration_images(cx)?;
    let work = cx.work_dir()?;
    for seed in cx.seeds().to_vec() {
        let at = |name: &str| work.join(format!("repquant-vit-{steps}-{seed}{name}"));
        let model = trained(cx, &train, steps, seed, &at)?;
        cx.arm("vit: float", seed, |trial| {
            trial.record("accuracy (%)", vit::accuracy(&model, &Rounder::default(), &test)?);
            Ok(())
        })?;
        for (name, parameters) in vit_arms() {
            cx.arm(&format!("vit: {name}"), seed, |trial| {
                let out = at("-rounded");
                let report = apply(&model, parameters, &labelled, seed, &out)?;
                note_spread(trial, &report);
                let rounder = activations::stated(&Artifact::open(&out)?)?;
                trial.record("accuracy (%)", vit::accuracy(&out, &rounder, &test)?);
                std::fs::remove_dir_all(&out)?;
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// The training part, of which calibration draws images; their labels are not read.
fn calibration_images(cx: &ClaimContext) -> Result<Labelled, BoxError> {
    let root = cx.asset(FASHION_MNIST)?;
    let named = |path: &Path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("train-images-idx3"))
    };
    let found = find(&root, &named)?;
    let dir =
        found.first().and_then(|path| path.parent()).ok_or("the package holds no IDX files")?;
    Ok(Labelled::open(dir, Part::Train)?)
}

/// A trained ViT, kept between runs, with a spread of its channels that is worth the name.
fn trained(
    cx: &mut ClaimContext,
    train: &Images,
    steps: u64,
    seed: u64,
    at: &dyn Fn(&str) -> PathBuf,
) -> Result<PathBuf, BoxError> {
    let (path, natural) = (at(""), at("-natural"));
    if !natural.exists() {
        cx.progress("training the ViT");
        vit::save(&vit::train(train, steps, seed)?, &natural)?;
    }
    let labelled = calibration_images(cx)?;
    let probe = json!({ "norm_scales": "channel" });
    let report = apply(&natural, probe, &labelled, seed, &at("-probe"))?;
    std::fs::remove_dir_all(at("-probe"))?;
    let found = report["channel_spread"]["mean"].as_f64().unwrap_or(1.0);
    if !path.exists() {
        let model = Vision::load(&Artifact::open(&natural)?, &BurnDevice::flex())?;
        let model = if found < SPREAD { vit::spread(&model, DEVIATION, seed) } else { model };
        vit::save(&model, &path)?;
    }
    if found < SPREAD {
        cx.note(format!(
            "vit, seed {seed}: its channels' scales differ {found:.2} times in the mean, so this is a synthetic spread: norms \
             are scaled by lognormal factors and the linears behind them by their inverse, which leaves its function alone"
        ));
    }
    Ok(path)
}

fn apply(
    model: &Path,
    mut parameters: Value,
    labelled: &Labelled,
    seed: u64,
    out: &Path,
) -> Result<Value, BoxError> {
    use crate::method::Context;
    parameters["samples"] = json!(IMAGES);
    let inputs = Inputs {
        models: vec![ModelInput::open("vit", model)?],
        labelled: Some(labelled.clone()),
        ..Inputs::default()
    };
    let configured = crate::registry::get("repquant")?.from_value(&parameters)?;
    let plan = configured.plan(&inputs)?;
    let mut cx = Context { seed, force: true, ..Context::new(out) };
    Ok(configured.run(&inputs, &plan, &mut cx)?.report)
}

fn judge(cx: &mut ClaimContext) {
    let mean = |cx: &ClaimContext, name: &str| cx.mean(&arm(name, BITS), "perplexity");
    let tensor = mean(cx, "per tensor");
    let (smooth, reparam) = (mean(cx, "smoothquant"), mean(cx, "reparam"));
    let (clip, channel) = (mean(cx, "reparam + clip"), mean(cx, "per channel, static"));
    cx.check(
        "(A) at 6 bits: per tensor above SmoothQuant, SmoothQuant not below reparam, reparam not below reparam + clip",
        tensor > smooth && smooth >= reparam && reparam >= clip,
        format!("{tensor:.3} > {smooth:.3} >= {reparam:.3} >= {clip:.3}"),
    );
    cx.check(
        "(A) at 6 bits: per tensor is at least 10 % above reparam",
        tensor >= 1.1 * reparam,
        format!("{:.3} times", tensor / reparam),
    );
    cx.check(
        "(A) at 6 bits: reparam lies within 2 % of scales per channel",
        reparam <= 1.02 * channel,
        format!("{:.4} times", reparam / channel),
    );
    let accuracy = |cx: &ClaimContext, name: &str| cx.mean(&format!("vit: {name}"), "accuracy (%)");
    let float = accuracy(cx, "float");
    if float.is_finite() {
        let (ours, tensor) = (accuracy(cx, "W4A4"), accuracy(cx, "W4A4, per tensor"));
        let two = accuracy(cx, "W4A4, softmax by powers of two");
        let steps = accuracy(cx, "W4A4, softmax in equal steps");
        cx.check(
            "(B) W4A4: reparam is more accurate than one scale per tensor",
            ours > tensor,
            format!("{ours:.2} against {tensor:.2} %; float {float:.2} %"),
        );
        cx.check(
            "(B) W4A4: powers of the root of two serve the softmax at least as well as powers of two and equal steps",
            ours >= two && ours >= steps,
            format!("{ours:.2}, {two:.2}, {steps:.2} %"),
        );
        let eight = accuracy(cx, "W8A8");
        cx.check(
            "(B) W8A8 stays within half a point of float",
            eight >= float - 0.5,
            format!("{eight:.2} against {float:.2} %"),
        );
    }
    cx.note(
        "reconstruction (W* and GPTQ) and learned bounds are inferred from the abstract; only their order with reparam is checked, \
         and only for bounds",
    );
    cx.note("SmolLM2 has RMSNorms: scales move, zero points do not, so its grids behind norms are symmetric");
    cx.likely_reason(
        "symmetric grids lose up to half of their codes on channels whose values have one sign, which one asymmetric scale for the \
         tensor and scales per channel do not; and a model of this size has few channels far out of line",
    );
}
