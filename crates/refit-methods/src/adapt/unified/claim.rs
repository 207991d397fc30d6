//! The claim of the unified view, small: on generation, mixing a prefix with a scaled parallel adapter comes nearest to full
//! fine-tuning at equal budget; changing the ffn beats changing attention; parallel is no worse than sequential.
//!
//! One byte-level decoder is pretrained on the King James Bible and adapted to German manual pages. Every arm gets the same
//! budget of parameters and its own best learning rate, chosen on a development slice.

use refit_data::Rng;
use refit_nn::adapt::Lora;
use refit_nn::side::Init;
use refit_nn::{Decoder, Trainable};
use refit_train::BoxError;
use refit_train::claim::{Claim, ClaimContext};
use refit_train::stats;
use refit_train::train::Scope;

use super::{Design, Function, Side};
use crate::lab::bytes::{self, Fit, Source, Text};

/// The claim.
pub const CLAIM: Claim = Claim {
    method: "unified-peft",
    question: "At an equal, small budget, does the mix of prefix and scaled parallel adapter come nearest to full fine-tuning?",
    paper: "arXiv:2110.04366",
    assets: &[KJV.asset(), GERMAN.asset()],
    minutes: 15.0,
    seeds: &[0, 1, 2],
    run,
};

const KJV: Source = Source::Kjv;
const GERMAN: Source = Source::Manual("deb:manpages-de");
const LAYERS: usize = 4;
const HIDDEN: usize = 128;
const WINDOW: usize = 128;
const BATCH: usize = 8;
const RATES: [f64; 3] = [1e-3, 3e-3, 1e-2];
/// Virtual tokens that the mix spends on its prefix; the rest of its budget goes to the ffn.
const MAM_PREFIX: usize = 4;

/// The rivals, in the order of the report.
const ARMS: [&str; 7] =
    ["lora (q, v)", "prefix", "pa-attn", "seq-ffn", "pa-ffn", "scaled-pa-ffn", "mam"];

/// Parameters of one bottleneck channel in all layers, inputs and outputs and its bias.
const CHANNEL: usize = LAYERS * (2 * HIDDEN + 1);
/// Parameters of one virtual token in all layers.
const TOKEN: usize = LAYERS * 2 * HIDDEN;

/// What an arm attaches for about `budget` parameters.
fn attach(arm: &str, budget: usize, model: &mut Decoder, rng: &mut Rng) -> Result<Scope, BoxError> {
    let biases = LAYERS * HIDDEN;
    let channels = |left: usize| (left.saturating_sub(biases) / CHANNEL).max(1);
    let side = |rank, scale, sequential| {
        Some(Side {
            rank,
            scale,
            learnable: false,
            sequential,
            init: if sequential { Init::Bert } else { Init::Lora },
            function: Function::Relu,
        })
    };
    let none = Design::default();
    let rank = channels(budget);
    let design = match arm {
        "lora (q, v)" => {
            let rank = (budget / (LAYERS * 2 * 2 * HIDDEN)).max(1);
            let device = model.frame.embed.weight.val().device();
            for block in &mut model.blocks {
                for linear in block.linears_mut() {
                    if linear.site.ends_with("q_proj") || linear.site.ends_with("v_proj") {
                        // The paper's LoRA: alpha is twice the rank.
                        let form = Lora::init([HIDDEN, HIDDEN], rank, 2.0, rng, &device);
                        linear.attach(form, true);
                    }
                }
            }
            return Ok(Scope::only("*.lora.*"));
        }
        "prefix" => Design { prefix: Some(((budget / TOKEN).max(1), HIDDEN)), ..none },
        "pa-attn" => Design { heads: side(rank, 1.0, false), ..none },
        "seq-ffn" => Design { ffn: side(rank, 1.0, true), ..none },
        "pa-ffn" => Design { ffn: side(rank, 1.0, false), ..none },
        "scaled-pa-ffn" => Design { ffn: side(rank, 4.0, false), ..none },
        _ => {
            let tokens = MAM_PREFIX.min((budget / (2 * TOKEN)).max(1));
            let rank = channels(budget - tokens * TOKEN);
            Design { prefix: Some((tokens, HIDDEN)), ffn: side(rank, 4.0, false), ..none }
        }
    };
    Ok(design.attach(model, rng)?)
}

/// Written parameters of an adapted model.
fn parameters(model: &Decoder) -> usize {
    let adapters: usize = model
        .parameters()
        .iter()
        .filter(|p| [".lora.", ".adapter_"].iter().any(|part| p.name.contains(part)))
        .map(|p| p.shape.iter().product::<usize>())
        .sum();
    adapters + model.frame.prefix.as_ref().map_or(0, |prefix| prefix.tokens() * TOKEN)
}

/// Adapts a copy of `base` and gives it back with its number of parameters.
fn adapt(
    base: &Decoder,
    text: &Text,
    arm: &str,
    budget: usize,
    fit: &Fit,
) -> Result<(Decoder, usize), BoxError> {
    let mut model = base.clone();
    let mut fit = fit.clone();
    fit.recipe.scope = match arm {
        "full" => Scope::default(),
        arm => {
            let mut rng = Rng::named(fit.recipe.seed, arm);
            attach(arm, budget, &mut model, &mut rng)?
        }
    };
    let count = if arm == "full" { count(&model) } else { parameters(&model) };
    Ok((fit.run(model, &text.train)?.model, count))
}

fn count(model: &Decoder) -> usize {
    model.parameters().iter().map(|p| p.shape.iter().product::<usize>()).sum()
}

fn run(cx: &mut ClaimContext) -> Result<(), BoxError> {
    let (kjv, german) = (
        bytes::text(cx, "the King James Bible", KJV)?,
        bytes::text(cx, "German manual pages", GERMAN)?,
    );
    let (pretraining, steps) = if cx.quick() { (60, 10) } else { (600, 100) };
    cx.param("steps", steps);
    cx.param("batch", format!("{BATCH} windows of {WINDOW} bytes"));
    cx.param("learning rates tried on dev", format!("{RATES:?}"));
    cx.param("refit", env!("CARGO_PKG_VERSION"));
    let shape = bytes::shape(HIDDEN, LAYERS, 2 * WINDOW);
    let base = bytes::pretrained(cx, &shape, &Fit::new(pretraining, 16, WINDOW, 3e-3, 0), &kjv)?;
    let all = count(&base);
    let score = |model: &Decoder, text: &[u32]| bytes::bits_per_byte(model, text, WINDOW);
    let frozen = score(&base, &german.test)?;
    for seed in cx.seeds().to_vec() {
        cx.record("frozen", seed, "bits per byte", frozen);
        cx.record("frozen", seed, "parameters", 0.0);
    }
    for share in [0.05, 0.003] {
        let budget = (share * all as f64) as usize;
        let arms = if share > 0.01 { [&["full"][..], &ARMS].concat() } else { ARMS.to_vec() };
        for arm in arms {
            let label = if arm == "full" {
                arm.to_owned()
            } else {
                format!("{arm}, {:.1} %", 100.0 * share)
            };
            let fit = |rate, seed| Fit::new(steps, BATCH, WINDOW, rate, seed);
            let rate = bytes::best_rate(cx, &label, &RATES, |rate| {
                let half = Fit::new(steps / 2, BATCH, WINDOW, rate, 0);
                let (model, _) = adapt(&base, &german, arm, budget, &half)?;
                score(&model, &german.dev)
            })?;
            for seed in cx.seeds().to_vec() {
                cx.arm(&label, seed, |trial| {
                    // The seeds of the report are not the one that chose the rate.
                    let (model, parameters) =
                        adapt(&base, &german, arm, budget, &fit(rate, seed + 1))?;
                    trial.record("bits per byte", score(&model, &german.test)?);
                    trial.record("bits per byte on the base's text", score(&model, &kjv.test)?);
                    trial.record("parameters", parameters as f64);
                    trial.record("rate", rate);
                    Ok(())
                })?;
            }
        }
    }
    judge(cx);
    Ok(())
}

fn judge(cx: &mut ClaimContext) {
    let at = |arm: &str| format!("{arm}, 5.0 %");
    let metric = "bits per byte";
    let mean = |cx: &ClaimContext, arm: &str| cx.mean(arm, metric);
    let (frozen, full) = (mean(cx, "frozen"), mean(cx, "full"));
    let closed = (frozen - mean(cx, &at("mam"))) / (frozen - full);
    cx.check(
        "MAM closes at least 80 % of the gap between the frozen and the fully tuned model",
        closed >= 0.8,
        format!("{:.1} % of {frozen:.3} to {full:.3} bits per byte", 100.0 * closed),
    );
    let best = |cx: &ClaimContext, arms: &[&str]| {
        let means = arms.iter().map(|arm| (mean(cx, &at(arm)), at(arm)));
        means.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((f64::NAN, String::new()))
    };
    let ffn = best(cx, &["seq-ffn", "pa-ffn", "scaled-pa-ffn"]);
    let attention = best(cx, &["lora (q, v)", "prefix", "pa-attn"]);
    let deviation =
        |cx: &ClaimContext, arm: &str| stats::std_dev(&cx.values(arm, metric)).unwrap_or(f64::NAN);
    let spread = deviation(cx, &ffn.1).max(deviation(cx, &attention.1));
    let gap = attention.0 - ffn.0;
    cx.check(
        "the best change of the ffn beats the best change of attention by more than two standard deviations over seeds",
        gap > 2.0 * spread,
        format!("{} {:.4}, {} {:.4}, deviation {spread:.4}", ffn.1, ffn.0, attention.1, attention.0),
    );
    let parallel = cx.difference(&at("pa-ffn"), &at("seq-ffn"), metric);
    let worst = parallel.iter().sum::<f64>() / parallel.len().max(1) as f64;
    cx.check(
        "the parallel adapter is no worse than the sequential one",
        worst <= 0.0,
        format!("paired differences {parallel:.4?}"),
    );
    let small = |arm: &str| format!("{arm}, 0.3 %");
    let lead = mean(cx, &small("pa-attn")) - mean(cx, &small("pa-ffn"));
    cx.note(format!(
        "at 0.3 % of the parameters the ffn's lead over attention (parallel adapters) is {lead:.4} bits per byte, at 5 % {:.4}; \
         the paper finds that it shrinks",
        mean(cx, &at("pa-attn")) - mean(cx, &at("pa-ffn"))
    ));
    cx.likely_reason(
        "the model has a million parameters and a hundred updates to learn another language in: more than a twentieth of it can \
         hold",
    );
}
