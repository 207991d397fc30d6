//! The claim of GaLore, small: from scratch it comes near to Adam at half the optimizer state, where LoRA on frozen random
//! weights and a factorized model do not; 8-bit moments cost next to nothing more.

use burn::module::Param;
use refit_data::Rng;
use refit_nn::adapt::Lora;
use refit_nn::operator::{LowRank, Operator};
use refit_nn::{BurnDevice, Decoder};
use refit_train::BoxError;
use refit_train::claim::{Claim, ClaimContext};
use refit_train::train::optimizer::Side;
use refit_train::train::{OptimizerConfig, Recipe, Rule, Schedule, Scope};

use crate::lab::bytes::{self, Fit, Source, Text};

/// The claim.
pub const CLAIM: Claim = Claim {
    method: "galore",
    question: "Does training with low-rank optimizer state reach what Adam reaches, with less than half of its state?",
    paper: "arXiv:2403.03507",
    assets: &[KJV.asset()],
    minutes: 12.0,
    seeds: &[0, 1],
    run,
};

const KJV: Source = Source::Kjv;
const HIDDEN: usize = 128;
const LAYERS: usize = 4;
const WINDOW: usize = 128;
const BATCH: usize = 16;
const RANK: usize = 32;
const GAP: u64 = 50;

/// What trains, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Arm {
    Adam,
    GaLore { eight_bit: bool },
    LoraOnRandom,
    Factorized,
}

/// Name, arm, learning rates tried on dev: three each, so that no arm's best lies beyond what it was given for want of trying.
const ARMS: [(&str, Arm, [f64; 3]); 5] = [
    ("adam", Arm::Adam, [3e-4, 1e-3, 3e-3]),
    ("galore", Arm::GaLore { eight_bit: false }, [5e-3, 1e-2, 2e-2]),
    ("galore 8-bit, per layer", Arm::GaLore { eight_bit: true }, [5e-3, 1e-2, 2e-2]),
    ("lora on random weights", Arm::LoraOnRandom, [1e-3, 3e-3, 1e-2]),
    ("low-rank factors", Arm::Factorized, [1e-3, 3e-3, 1e-2]),
];

fn optimizer(arm: Arm) -> OptimizerConfig {
    match arm {
        Arm::GaLore { eight_bit } => OptimizerConfig::GaLore {
            rank: RANK,
            gap: GAP,
            scale: 0.25,
            side: Side::Std,
            betas: (0.9, 0.999),
            eps: 1e-6,
            eight_bit,
            on_refresh: Default::default(),
            stagger: false,
            targets: vec!["*attn*".into(), "*mlp*".into()],
        },
        _ => OptimizerConfig::AdamW { betas: (0.9, 0.999), eps: 1e-6, eight_bit: false },
    }
}

/// The model of an arm, from the same random weights in every arm.
fn model(arm: Arm, seed: u64) -> Result<(Decoder, Scope), BoxError> {
    let mut decoder = bytes::shape(HIDDEN, LAYERS, 2 * WINDOW).init(seed, &BurnDevice::flex())?;
    let mut rng = Rng::named(seed, "factors");
    let mut scope = Scope::default();
    for block in &mut decoder.blocks {
        for linear in block.linears_mut() {
            let shape = linear.weight().dims();
            let device = linear.weight().device();
            match arm {
                Arm::LoraOnRandom => {
                    linear.attach(Lora::init(shape, RANK, 1.0, &mut rng, &device), true);
                }
                Arm::Factorized => {
                    // Factors whose product has the deviation of the dense start, 0.02.
                    let deviation = (0.02 / (RANK as f64).sqrt()).sqrt() as f32;
                    let mut factor = |rows: usize, columns: usize| {
                        let values: Vec<f32> =
                            (0..rows * columns).map(|_| deviation * rng.normal() as f32).collect();
                        let data = burn::tensor::TensorData::new(values, [rows, columns]);
                        Param::from_tensor(burn::tensor::Tensor::from_data(data, &device))
                    };
                    let [out, inputs] = shape;
                    linear.op = Operator::LowRank(LowRank {
                        down: factor(RANK, inputs),
                        up: factor(out, RANK),
                    });
                }
                _ => {}
            }
        }
    }
    if arm == Arm::LoraOnRandom {
        // Embedding, head and norms train, as in the paper's rival.
        scope.rules = vec![Rule::train("@all")];
        for block in &decoder.blocks {
            scope.rules.extend(
                block.linears().into_iter().map(|l| Rule::freeze(format!("{}.weight", l.site))),
            );
        }
        scope.rules.push(Rule::train("*.lora.*"));
    }
    Ok((decoder, scope))
}

/// Loss in nats on dev and test, bytes of optimizer state on what GaLore projects, and of gradients at their peak.
struct Outcome {
    dev: f64,
    test: f64,
    state: usize,
    gradients: usize,
}

fn train(arm: Arm, rate: f64, steps: u64, seed: u64, text: &Text) -> Result<Outcome, BoxError> {
    let (model, scope) = model(arm, seed)?;
    let mut fit = Fit::new(steps, BATCH, WINDOW, rate, seed);
    let per_layer = arm == Arm::GaLore { eight_bit: true };
    fit.recipe = Recipe {
        optimizer: optimizer(arm),
        scope,
        decay: 0.0,
        clip: None,
        // A tenth of warm-up and a cosine to a tenth, as in the reference's scripts.
        schedule: Schedule::cosine(steps / 10, 0.1),
        per_layer,
        ..fit.recipe
    };
    let fitted = fit.run(model, &text.train)?;
    let nats = |part: &[u32]| -> Result<f64, BoxError> {
        Ok(bytes::bits_per_byte(&fitted.model, part, WINDOW)? * std::f64::consts::LN_2)
    };
    Ok(Outcome {
        dev: nats(&text.dev)?,
        test: nats(&text.test)?,
        state: fitted.states.iter().filter(|(name, _)| projected(name)).map(|(_, b)| b).sum(),
        gradients: fitted.gradient_bytes,
    })
}

/// Is this a matrix that GaLore projects, or what an arm has in its place? The model has no biases.
fn projected(name: &str) -> bool {
    name.contains("attn") || name.contains("mlp")
}

fn run(cx: &mut ClaimContext) -> Result<(), BoxError> {
    let text = bytes::text(cx, "the King James Bible", KJV)?;
    let steps = if cx.quick() { 60 } else { 600 };
    cx.param("steps", steps);
    cx.param("batch", format!("{BATCH} windows of {WINDOW} bytes"));
    cx.param("rank, gap, scale", format!("{RANK}, {GAP}, 0.25"));
    cx.param("refit", env!("CARGO_PKG_VERSION"));
    for (name, arm, rates) in ARMS {
        let rate = bytes::best_rate(cx, name, &rates, |rate| {
            Ok(train(arm, rate, steps / 2, 7, &text)?.dev)
        })?;
        for seed in cx.seeds().to_vec() {
            cx.arm(name, seed, |trial| {
                let done = train(arm, rate, steps, seed, &text)?;
                trial.record("loss (nats)", done.test);
                trial.record("state bytes on target matrices", done.state as f64);
                trial.record("peak gradient bytes", done.gradients as f64);
                trial.record("rate", rate);
                Ok(())
            })?;
        }
    }
    judge(cx);
    Ok(())
}

fn judge(cx: &mut ClaimContext) {
    let loss = |cx: &ClaimContext, arm: &str| cx.mean(arm, "loss (nats)");
    let state = |cx: &ClaimContext, arm: &str| cx.mean(arm, "state bytes on target matrices");
    let adam = loss(cx, "adam");
    let (galore, lora) = (loss(cx, "galore") - adam, loss(cx, "lora on random weights") - adam);
    cx.check(
        "GaLore's loss is within 0.05 nats of Adam's, and its distance at most a quarter of LoRA's",
        // Where LoRA itself beats Adam there is no distance to speak of, and nothing is shown.
        lora > 0.0 && galore <= 0.05 && galore <= 0.25 * lora,
        format!("Adam {adam:.4}, GaLore {galore:+.4}, LoRA on random weights {lora:+.4}"),
    );
    let share = state(cx, "galore") / state(cx, "adam");
    cx.check(
        "GaLore holds at most 45 % of Adam's state on the matrices that it projects",
        share <= 0.45,
        format!("{:.1} %", 100.0 * share),
    );
    let eight = loss(cx, "galore 8-bit, per layer") - loss(cx, "galore");
    let small = state(cx, "galore 8-bit, per layer") / state(cx, "adam");
    cx.check(
        "8-bit moments cost at most 0.02 nats and leave at most 15 % of Adam's state",
        eight <= 0.02 && small <= 0.15,
        format!("{eight:+.4} nats, {:.1} %", 100.0 * small),
    );
    cx.note(format!(
        "per layer, the most gradient bytes at once are {:.0} % of Adam's",
        100.0 * cx.mean("galore 8-bit, per layer", "peak gradient bytes")
            / cx.mean("adam", "peak gradient bytes")
    ));
    cx.likely_reason(match share <= 0.45 {
        true => {
            "on a model and a text this small LoRA on random weights stays below Adam's loss on unseen text too: the gap that the \
             paper closes does not open"
        }
        false => {
            "the basis is kept in f32 and is part of the state; on matrices of 128 a rank of 32 leaves less to save than on the \
             paper's"
        }
    });
}
