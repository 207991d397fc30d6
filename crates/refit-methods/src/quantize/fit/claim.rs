//! The claim of fit, small: at every size of about 3 bits per weight, what fit chooses is closer to the original, on text that it
//! has not seen, than every uniform grid that fits the same bytes, with text (both by GPTQ) and without (both to nearest).

use refit_train::BoxError;
use refit_train::claim::{Claim, ClaimContext};
use serde_json::{Value, json};

use super::Fit;
use super::menu::{Count, Menu, Uniform};
use crate::inputs::Inputs;
use crate::lab::{Lab, MODEL};
use crate::quantize::chain::Group;
use crate::rewrite::shape_of;

/// The claim.
pub const CLAIM: Claim = Claim {
    method: "fit",
    question: "Is a model that is fitted to a size closer to the original than every uniform grid of that size?",
    paper: "none: a claim of refit's own",
    assets: &[MODEL],
    minutes: 30.0,
    // Everything but the text that is measured on is the same: a "seed" is one of three disjoint slices of it.
    seeds: &[0, 1, 2],
    run,
};

const DOMAINS: [&str; 3] = ["kjv", "man", "wordnet"];
/// Held-out tokens per domain and slice.
const TOKENS: usize = 512;
/// Calibration sequences and their length, for fit and its rivals alike.
const CALIBRATION: (usize, usize) = (16, 256);
/// Uniform grids whose bits per weight lie here are rivals.
const ABOUT_THREE: std::ops::Range<f64> = 2.9..3.75;

/// A uniform grid, its name and its bytes.
struct Rival {
    name: String,
    uniform: Uniform,
    bytes: u64,
    bpw: f64,
}

/// Every uniform grid of about 3 bits that divides all rows, whether fit offers its groups or not, by rising size.
fn rivals(lab: &Lab) -> Result<Vec<Rival>, BoxError> {
    let fit = Fit::default();
    let menu = Menu::of(&fit, &lab.model)?;
    let rows: Vec<usize> = menu.sites.iter().map(|site| shape_of(site).1).collect();
    let shortest = rows.iter().copied().min().unwrap_or(1);
    let sizes =
        (fit.g_min..shortest).filter(|size| rows.iter().all(|row| row.is_multiple_of(*size)));
    let groups: Vec<Group> = sizes.map(Group::Size).chain([Group::Row]).collect();
    let mut all = Vec::new();
    for &bits in &fit.bits {
        for symmetric in [true, false] {
            for &group in &groups {
                let uniform = Uniform { bits, symmetric, group };
                let parts = menu.uniform_cost(uniform, Count::Parts);
                let bpw = 8.0 * parts as f64 / menu.weights() as f64;
                if ABOUT_THREE.contains(&bpw) {
                    let kind = if symmetric { "" } else { " with zero points" };
                    let name = format!("{bits} bits, groups of {group}{kind}");
                    all.push(Rival { name, uniform, bytes: parts, bpw });
                }
            }
        }
    }
    all.sort_by_key(|rival| rival.bytes);
    Ok(all)
}

fn run(cx: &mut ClaimContext) -> Result<(), BoxError> {
    let lab = Lab::open(cx)?;
    let tokens = if cx.quick() { TOKENS / 4 } else { TOKENS };
    let (samples, length) = if cx.quick() { (4, 64) } else { CALIBRATION };
    cx.param("held-out tokens per domain", tokens);
    cx.param("calibration", format!("{samples} x {length} tokens"));
    let rivals = rivals(&lab)?;
    if rivals.is_empty() {
        return Err("no uniform grid takes about 3 bits per weight".into());
    }
    // The sizes that fit is asked for: the smallest rival's, the largest one's, and one between.
    let mut sizes = vec![0, rivals.len() / 2, rivals.len() - 1];
    sizes.dedup();
    let texts = [("gptq", lab.inputs(&DOMAINS)), ("rtn", lab.inputs(&[]))];
    for (quantizer, inputs) in &texts {
        let calibrated = |mut parameters: Value| {
            if *quantizer == "gptq" {
                parameters["samples"] = json!(samples);
                parameters["sequence_length"] = json!(length);
            }
            parameters
        };
        for rival in &rivals {
            let Uniform { bits, symmetric, group } = rival.uniform;
            let parameters = json!({ "bits": bits, "group": group, "asymmetric": !symmetric });
            let arm = format!("{quantizer}: {}", rival.name);
            measure(cx, &lab, inputs, &arm, quantizer, calibrated(parameters), tokens, rival.bpw)?;
        }
        for &at in &sizes {
            let rival = &rivals[at];
            let arm = fitted(quantizer, rival);
            let parameters = calibrated(json!({ "bpw": rival.bpw }));
            measure(cx, &lab, inputs, &arm, "fit", parameters, tokens, rival.bpw)?;
        }
    }
    judge(cx, &rivals, &sizes);
    Ok(())
}

/// The arm of fit at the size of a rival.
fn fitted(quantizer: &str, rival: &Rival) -> String {
    let kind = if quantizer == "gptq" { "with text" } else { "without text" };
    format!("fit {kind} at the {:.4} bits of {}", rival.bpw, rival.name)
}

#[allow(clippy::too_many_arguments)]
fn measure(
    cx: &mut ClaimContext,
    lab: &Lab,
    inputs: &Inputs,
    arm: &str,
    method: &str,
    parameters: Value,
    tokens: usize,
    bpw: f64,
) -> Result<(), BoxError> {
    let out = lab.path(&format!("fit-{arm}"));
    let mut made: Option<f64> = None;
    for slice in cx.seeds().to_vec() {
        cx.arm(arm, slice, |trial| {
            // Nothing depends on the slice: the first one that runs quantizes for all.
            let spent = match made {
                Some(spent) => spent,
                None => {
                    let done = lab.apply(method, parameters.clone(), inputs, 0, &out)?;
                    let spent =
                        done.report["fit"]["export_bits_per_weight"].as_f64().unwrap_or(bpw);
                    *made.insert(spent)
                }
            };
            let (kl, perplexity) = lab.divergence(&out, &DOMAINS, tokens, slice as usize)?;
            trial.record("KL to the original", kl);
            trial.record("perplexity", perplexity);
            trial.record("bits per weight", spent);
            Ok(())
        })?;
    }
    if made.is_some() {
        std::fs::remove_dir_all(&out)?;
    }
    Ok(())
}

fn judge(cx: &mut ClaimContext, rivals: &[Rival], sizes: &[usize]) {
    const KL: &str = "KL to the original";
    for quantizer in ["gptq", "rtn"] {
        for &at in sizes {
            let arm = fitted(quantizer, &rivals[at]);
            let within = rivals.iter().filter(|rival| rival.bytes <= rivals[at].bytes);
            let best = within
                .map(|rival| format!("{quantizer}: {}", rival.name))
                .min_by(|a, b| cx.mean(a, KL).total_cmp(&cx.mean(b, KL)));
            let Some(best) = best else { continue };
            let ratios = cx.ratio(&arm, &best, KL);
            let holds = !ratios.is_empty() && ratios.iter().all(|ratio| *ratio < 1.0);
            cx.check(
                &format!(
                    "{arm}: less KL in every slice than the best uniform grid within these bytes"
                ),
                holds,
                format!("{best}: ratios {ratios:.3?}"),
            );
        }
    }
    cx.note("a seed is one of three disjoint slices of the held-out text; nothing else is random");
    cx.note(
        "sizes are those of the compressed-tensors export; fit is asked for the exact size of a uniform grid and stays at or \
         below it",
    );
    cx.likely_reason(
        "the errors of matrices add up to second order only, and the weights of single matrices were measured on a few hundred \
         tokens",
    );
}
