//! The claim of FineQuant, small: one scale per row ruins some matrices, groups repair them, and sizes
//! chosen per matrix from the weights give the same for fewer scales.

use std::path::Path;

use refit_store::architecture::{Role, Site};
use refit_train::BoxError;
use refit_train::claim::{Claim, ClaimContext};
use serde_json::{Value, json};

use crate::inputs::{Inputs, ModelInput};
use crate::lab::{Lab, MODEL};
use crate::method::{Context, Plan};
use crate::rewrite::{self, OutputType, shape_of};

/// The claim.
pub const CLAIM: Claim = Claim {
    method: "finequant",
    question: "Do group sizes chosen per matrix keep the quality of small groups at fewer stored bits?",
    paper: "arXiv:2308.09723",
    assets: &[MODEL],
    minutes: 12.0,
    // Everything is deterministic: a "seed" is one of three disjoint slices of the held-out text.
    seeds: &[0, 1, 2],
    run,
};

const DOMAINS: [&str; 3] = ["kjv", "man", "wordnet"];
/// Four bits on the grid of the source would be void: its weights are 4-bit already.
const BITS: u8 = 3;
/// Held-out tokens per domain and slice.
const TOKENS: usize = 512;
/// Factor of the outlier columns of the stressed model, and how many layers get them.
const OUTLIER: f32 = 30.0;
const STRESSED_LAYERS: usize = 4;
/// Calibration sequences of the GPTQ arm that has enough of them.
const GPTQ_SAMPLES: usize = 48;

fn run(cx: &mut ClaimContext) -> Result<(), BoxError> {
    let lab = Lab::open(cx)?;
    for (name, value) in [("bits", json!(BITS)), ("held-out tokens per domain", json!(TOKENS))] {
        cx.param(name, value);
    }
    let stressed = lab.path("finequant-stressed");
    if !stressed.exists() {
        cx.progress("making the stressed model");
        stress(&lab.model, &stressed)?;
    }
    measure(cx, &lab, "dense", lab.model.artifact.path())?;
    measure(cx, &lab, "stressed: dense", &stressed)?;

    let smallest = smallest_group(&lab.model);
    for (prefix, path) in [("", None), ("stressed: ", Some(stressed.as_path()))] {
        let inputs = match path {
            None => lab.inputs(&["man", "wordnet"]),
            Some(path) => Inputs {
                models: vec![ModelInput::open("stressed", path)?],
                ..lab.inputs(&["man", "wordnet"])
            },
        };
        let fixed = [("row", json!("row")), ("g64", json!(2 * smallest)), ("g32", json!(smallest))];
        for (name, group) in &fixed {
            let parameters = json!({ "bits": BITS, "group": group });
            quantize(cx, &lab, &format!("{prefix}rtn {name}"), "rtn", parameters, &inputs)?;
        }
        for alpha in [0.05, 0.1, 0.2] {
            let parameters = json!({ "bits": BITS, "alpha": alpha, "g_min": smallest });
            let arm = format!("{prefix}finequant alpha {alpha}");
            quantize(cx, &lab, &arm, "finequant", parameters, &inputs)?;
        }
        for (name, _) in &fixed[..2] {
            let spent = cx.value(&format!("{prefix}rtn {name}"), first_seed(cx), "bits per weight");
            let Some(spent) = spent else { continue };
            let parameters = json!({ "bits": BITS, "target_bpw": spent, "g_min": smallest });
            let arm = format!("{prefix}finequant at the bits of {name}");
            quantize(cx, &lab, &arm, "finequant", parameters, &inputs)?;
        }
        if path.is_none() {
            let parameters = json!({ "bits": BITS, "group": fixed[1].1, "scheme": "log2" });
            quantize(cx, &lab, "rtn log2 g64", "rtn", parameters, &inputs)?;
            // Fewer tokens are soon fitted instead of followed: see the note.
            for samples in [8, GPTQ_SAMPLES] {
                let parameters = json!({ "bits": BITS, "group": fixed[1].1, "samples": samples });
                let arm = format!("gptq g64, {samples} x 256 tokens");
                quantize(cx, &lab, &arm, "gptq", parameters, &inputs)?;
            }
        }
    }
    judge(cx);
    Ok(())
}

fn first_seed(cx: &ClaimContext) -> u64 {
    cx.seeds().first().copied().unwrap_or(0)
}

/// 32, or the largest power of two below it that divides every row.
fn smallest_group(model: &ModelInput) -> usize {
    let inputs: Vec<usize> =
        model.artifact.architecture().linears().map(|site| shape_of(site).1).collect();
    [32, 16, 8, 4, 2]
        .into_iter()
        .find(|group| inputs.iter().all(|n| n.is_multiple_of(2 * group)))
        .unwrap_or(1)
}

fn measure(cx: &mut ClaimContext, lab: &Lab, arm: &str, model: &Path) -> Result<(), BoxError> {
    for slice in cx.seeds().to_vec() {
        cx.arm(arm, slice, |trial| {
            trial.record("perplexity", lab.perplexity(model, &DOMAINS, TOKENS, slice as usize)?);
            Ok(())
        })?;
    }
    Ok(())
}

fn quantize(
    cx: &mut ClaimContext,
    lab: &Lab,
    arm: &str,
    method: &str,
    parameters: Value,
    inputs: &Inputs,
) -> Result<(), BoxError> {
    let out = lab.path(&format!("finequant-{arm}"));
    let mut made = None;
    for slice in cx.seeds().to_vec() {
        cx.arm(arm, slice, |trial| {
            // Nothing depends on the slice of text: the first one that runs quantizes for all.
            if made.is_none() {
                made = Some(lab.apply(method, parameters.clone(), inputs, 0, &out)?.report);
            }
            let report = made.as_ref().unwrap_or(&Value::Null);
            for (metric, key) in [
                ("bits per weight", "bits_per_weight"),
                ("relative error", "mean_relative_error"),
                ("packed bytes", "packed_bytes_quantized"),
            ] {
                if let Some(value) = report[key].as_f64() {
                    trial.record(metric, value);
                }
            }
            trial.record("perplexity", lab.perplexity(&out, &DOMAINS, TOKENS, slice as usize)?);
            Ok(())
        })?;
    }
    if made.is_some() {
        std::fs::remove_dir_all(&out)?;
    }
    Ok(())
}

fn judge(cx: &mut ClaimContext) {
    let collapse =
        cx.mean("stressed: rtn row", "perplexity") / cx.mean("stressed: rtn g64", "perplexity");
    cx.check(
        "(a) whole rows are at least 1.5 times worse than groups of 64 on the stressed model",
        collapse >= 1.5,
        format!("{collapse:.3} times"),
    );
    // Scales are what lies above the bits of the codes.
    let scales = |cx: &ClaimContext, arm: &str| cx.mean(arm, "bits per weight") - f64::from(BITS);
    let mut holds = Vec::new();
    for prefix in ["", "stressed: "] {
        for alpha in [0.05, 0.1, 0.2] {
            let arm = format!("{prefix}finequant alpha {alpha}");
            let finest = format!("{prefix}rtn g32");
            let quality = cx.mean(&arm, "perplexity") / cx.mean(&finest, "perplexity");
            let share = scales(cx, &arm) / scales(cx, &finest);
            holds.push((
                quality <= 1.03 && share <= 0.8,
                format!("{arm}: {quality:.3} x perplexity at {share:.2} of the scales"),
            ));
        }
    }
    let shown = holds.iter().any(|(holds, _)| *holds);
    let detail: Vec<String> = holds.into_iter().map(|(_, detail)| detail).collect();
    cx.check(
        "(b) some alpha reaches 1.03 x the perplexity of groups of 32 with at most 80 % of their scales",
        shown,
        detail.join("; "),
    );
    let wins = cx.ratio("finequant at the bits of g64", "rtn g64", "perplexity");
    let count = wins.iter().filter(|ratio| **ratio <= 1.0).count();
    cx.check(
        "(c) at the bits of groups of 64, adaptive sizes are at least as good in 2 of 3 slices",
        3 * count >= 2 * wins.len().max(1),
        format!("ratios {wins:.4?}"),
    );
    let stressed =
        cx.ratio("stressed: finequant at the bits of g64", "stressed: rtn g64", "perplexity");
    cx.note(format!("the same on the stressed model: ratios {stressed:.4?}"));
    cx.note("a seed is one of three disjoint slices of the held-out text; nothing else is random");
    cx.note(
        "GPTQ is given manual pages and glosses, and none of the Bible that is in the held-out text: with \
         8 sequences it fits them so closely that it loses to rounding",
    );
    cx.note("the paper's speed-up on GPUs is not checked here");
    cx.likely_reason(
        "the model is homogeneous: without outliers every matrix wants the same group size, and the \
         constant of the stop test is not in the abstract",
    );
}

/// Writes the model with outliers that do not change its function: in some layers one input column of
/// each matrix is scaled up and what produces it is scaled down, the norm in front of q, k, v and of
/// gate and up, and the matching row of up for down.
fn stress(model: &ModelInput, out: &Path) -> Result<(), BoxError> {
    let architecture = model.artifact.architecture();
    let layers = architecture.layers();
    let chosen: Vec<usize> =
        (0..STRESSED_LAYERS).map(|k| (2 * k + 1) * layers / (2 * STRESSED_LAYERS)).collect();
    let in_chosen = |site: &&Site| site.layer.is_some_and(|layer| chosen.contains(&layer));
    let column = |layer: usize, width: usize| (layer * 7919 + 13) % width;
    let norms: Vec<&str> = architecture
        .linears()
        .filter(in_chosen)
        .filter(|site| !matches!(site.role, Role::O | Role::Down))
        .filter_map(|site| site.norm.as_deref())
        .collect();
    let edited: Vec<&Site> = architecture
        .sites
        .iter()
        .filter(|site| {
            let matrix = in_chosen(site) && site.role.is_projection() && site.role != Role::O;
            matrix || norms.contains(&site.name.as_str())
        })
        .collect();
    let plan = Plan {
        method: "finequant".into(),
        parameters: json!({ "claim": "outlier columns", "factor": OUTLIER, "layers": chosen }),
        ..Plan::default()
    };
    let plan = rewrite::declare(plan, model, &edited, OutputType::Auto);
    let edit = |site: &Site, weights: &mut [f32]| {
        let layer = site.layer.unwrap_or(0);
        if site.role == Role::Norm {
            weights[column(layer, weights.len())] /= OUTLIER;
            return Ok(());
        }
        let (rows, width) = shape_of(site);
        let scale_column = |weights: &mut [f32]| {
            let at = column(layer, width);
            weights.chunks_mut(width).for_each(|row| row[at] *= OUTLIER);
        };
        match site.role {
            Role::Up => {
                scale_column(weights);
                let row = column(layer, rows);
                weights[row * width..(row + 1) * width].iter_mut().for_each(|w| *w /= OUTLIER);
            }
            _ => scale_column(weights),
        }
        Ok(())
    };
    let inputs = Inputs { models: vec![model.clone()], ..Inputs::default() };
    let cx = Context { force: true, ..Context::new(out) };
    rewrite::rewrite(&inputs, &plan, &cx, &edit, || Ok((Vec::new(), json!({}))))?;
    Ok(())
}
