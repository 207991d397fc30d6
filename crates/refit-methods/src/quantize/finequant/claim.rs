//! The claim of FineQuant, small: one scale per row ruins some matrices, groups repair them, and sizes
//! chosen per matrix from the weights give the same for fewer scales.
//!
//! Three settings: SmolLM2 as it is, SmolLM2 with outliers that leave its function alone, and MiniLM, whose weights were never
//! quantized before. The verdict is that of the first two at 3 bits; the others are reported beside it.

use std::path::Path;

use refit_store::architecture::{Role, Site};
use refit_train::BoxError;
use refit_train::claim::{Claim, ClaimContext, Trial};
use serde_json::{Value, json};

use crate::inputs::{Inputs, ModelInput};
use crate::lab::sentences::{self, Bench};
use crate::lab::{Lab, MODEL, smallest_group};
use crate::method::{Context, Plan};
use crate::rewrite::{self, OutputType, shape_of};

/// The claim.
pub const CLAIM: Claim = Claim {
    method: "finequant",
    question: "Do group sizes chosen per matrix keep the quality of small groups at fewer stored bits?",
    paper: "arXiv:2308.09723",
    assets: &[MODEL, sentences::MODEL, sentences::WORDNET],
    minutes: 15.0,
    // Everything is deterministic: a "seed" is one of three disjoint slices of the held-out data.
    seeds: &[0, 1, 2],
    run,
};

const DOMAINS: [&str; 3] = ["kjv", "man", "wordnet"];
/// Held-out tokens per domain and slice.
const TOKENS: usize = 512;
/// The slice that chooses a constant; none of the report's.
const DEV: usize = 3;
/// Factor of the outlier columns of the stressed model, and how many layers get them.
const OUTLIER: f32 = 30.0;
const STRESSED_LAYERS: usize = 4;
/// Calibration sequences of the GPTQ arm that has enough of them.
const GPTQ_SAMPLES: usize = 48;
/// Glosses that teach the classifier, and per slice.
const GLOSSES: (usize, usize) = (3000, 1000);
/// Tolerances that the report shows.
const ALPHAS: [f64; 3] = [0.05, 0.1, 0.2];
/// Tolerances among which the development slice chooses.
const TRIED: [f64; 7] = [0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1];

/// Measures a quantized model on a slice.
type Measure<'a> = &'a dyn Fn(&mut Trial, &Path, usize) -> Result<(), BoxError>;

/// A model whose matrices are quantized in every way of the report.
struct Setting<'a> {
    prefix: &'a str,
    bits: u8,
    inputs: Inputs,
    measure: Measure<'a>,
}

fn run(cx: &mut ClaimContext) -> Result<(), BoxError> {
    let lab = Lab::open(cx)?;
    cx.param("held-out tokens per domain", TOKENS);
    let stressed = lab.path("finequant-stressed");
    if !stressed.exists() {
        cx.progress("making the stressed model");
        stress(&lab.model, &stressed)?;
    }
    let perplexity: Measure = &|trial, model, slice| {
        trial.record("perplexity", lab.perplexity(model, &DOMAINS, TOKENS, slice)?);
        Ok(())
    };
    dense(cx, "", lab.model.artifact.path(), perplexity)?;
    dense(cx, "stressed: ", &stressed, perplexity)?;
    // GPTQ sees text of every domain that it is measured on, though other text.
    let plain = lab.inputs(&DOMAINS);
    let hard = Inputs { models: vec![ModelInput::open("stressed", &stressed)?], ..plain.clone() };
    let smallest = smallest_group(&lab.model);
    for (prefix, bits, inputs) in
        [("", 3, &plain), ("stressed: ", 3, &hard), ("4 bits: ", 4, &plain)]
    {
        let setting = Setting { prefix, bits, inputs: inputs.clone(), measure: perplexity };
        arms(cx, &lab, &setting, smallest)?;
    }
    let group = json!(2 * smallest);
    let three = Setting { prefix: "", bits: 3, inputs: plain, measure: perplexity };
    for samples in [8, GPTQ_SAMPLES] {
        // Fewer tokens are soon fitted instead of followed: see the note.
        let parameters = json!({ "group": group, "samples": samples });
        let arm = format!("gptq g64, {samples} x 256 tokens");
        quantize(cx, &lab, &three, &arm, "gptq", parameters)?;
    }
    encoder(cx, &lab)?;
    judge(cx);
    Ok(())
}

/// The same on MiniLM at 4 bits.
fn encoder(cx: &mut ClaimContext, lab: &Lab) -> Result<(), BoxError> {
    let (train, test) = GLOSSES;
    let (train, test) = if cx.quick() { (train / 10, test / 10) } else { (train, test) };
    let slices = cx.seeds().iter().max().map_or(1, |last| *last as usize + 1);
    let bench = match Bench::open(cx, train, test, slices) {
        Ok(bench) => bench,
        Err(error) => {
            cx.note(format!("the encoder's arms are missing: {error}"));
            return Ok(());
        }
    };
    let agreement: Measure = &|trial, model, slice| {
        let found = bench.measure(model, slice)?;
        trial.record("mean cosine", found.cosine);
        trial.record("accuracy on 45 classes (%)", found.accuracy);
        Ok(())
    };
    dense(cx, "MiniLM: ", bench.model.artifact.path(), agreement)?;
    let inputs = Inputs { models: vec![bench.model.clone()], ..Inputs::default() };
    let setting = Setting { prefix: "MiniLM: ", bits: 4, inputs, measure: agreement };
    arms(cx, lab, &setting, smallest_group(&bench.model))
}

/// Every arm that needs no data.
fn arms(
    cx: &mut ClaimContext,
    lab: &Lab,
    setting: &Setting,
    smallest: usize,
) -> Result<(), BoxError> {
    let fixed = [
        ("row", json!("row")),
        ("g192", json!(6 * smallest)),
        ("g64", json!(2 * smallest)),
        ("g32", json!(smallest)),
    ];
    for (name, group) in &fixed {
        let arm = format!("rtn {name}");
        quantize(cx, lab, setting, &arm, "rtn", json!({ "group": group }))?;
    }
    for alpha in ALPHAS {
        let parameters = json!({ "alpha": alpha, "g_min": smallest });
        quantize(cx, lab, setting, &format!("finequant alpha {alpha}"), "finequant", parameters)?;
    }
    for (name, _) in &fixed[..3] {
        let spent = cx.mean(&format!("{}rtn {name}", setting.prefix), "bits per weight");
        let parameters = json!({ "target_bpw": spent, "g_min": smallest });
        let arm = format!("finequant at the bits of {name}");
        quantize(cx, lab, setting, &arm, "finequant", parameters)?;
    }
    let log2 = json!({ "group": fixed[2].1, "scheme": "log2" });
    quantize(cx, lab, setting, "rtn log2 g64", "rtn", log2)?;
    if setting.bits == 3 {
        chosen(cx, lab, setting, smallest)?;
    }
    Ok(())
}

/// The tolerance that does best on a slice of its own with at most 80 % of the scales of the smallest groups.
fn chosen(
    cx: &mut ClaimContext,
    lab: &Lab,
    setting: &Setting,
    smallest: usize,
) -> Result<(), BoxError> {
    let finest = scales(cx, &format!("{}rtn g32", setting.prefix), setting.bits);
    let mut best: Option<(f64, f64)> = None;
    for alpha in TRIED {
        let arm = format!("{}alpha {alpha} on the development slice", setting.prefix);
        let out = lab.path(&format!("finequant-{arm}"));
        cx.arm(&arm, DEV as u64, |trial| {
            let parameters = json!({ "bits": setting.bits, "alpha": alpha, "g_min": smallest });
            let done = lab.apply("finequant", parameters, &setting.inputs, 0, &out)?;
            trial.record("bits per weight", done.report["bits_per_weight"].as_f64().unwrap_or(0.0));
            (setting.measure)(trial, &out, DEV)?;
            std::fs::remove_dir_all(&out)?;
            Ok(())
        })?;
        let value = |metric| cx.value(&arm, DEV as u64, metric).unwrap_or(f64::NAN);
        let found = value("perplexity");
        let few = value("bits per weight") - f64::from(setting.bits) <= 0.8 * finest;
        if few && best.is_none_or(|(_, least)| found < least) {
            best = Some((alpha, found));
        }
    }
    let Some((alpha, _)) = best else { return Ok(()) };
    cx.note(format!("{}the development slice chose alpha {alpha}", setting.prefix));
    let parameters = json!({ "alpha": alpha, "g_min": smallest });
    quantize(cx, lab, setting, CHOSEN, "finequant", parameters)
}

/// The arm of [`chosen`].
const CHOSEN: &str = "finequant, alpha of the development slice";

/// Bits per weight above those of the codes.
fn scales(cx: &ClaimContext, arm: &str, bits: u8) -> f64 {
    cx.mean(arm, "bits per weight") - f64::from(bits)
}

fn dense(
    cx: &mut ClaimContext,
    prefix: &str,
    model: &Path,
    measure: Measure,
) -> Result<(), BoxError> {
    for slice in cx.seeds().to_vec() {
        cx.arm(&format!("{prefix}dense"), slice, |trial| measure(trial, model, slice as usize))?;
    }
    Ok(())
}

fn quantize(
    cx: &mut ClaimContext,
    lab: &Lab,
    setting: &Setting,
    arm: &str,
    method: &str,
    mut parameters: Value,
) -> Result<(), BoxError> {
    let arm = format!("{}{arm}", setting.prefix);
    parameters["bits"] = json!(setting.bits);
    let out = lab.path(&format!("finequant-{arm}"));
    let mut made = None;
    for slice in cx.seeds().to_vec() {
        cx.arm(&arm, slice, |trial| {
            // Nothing depends on the slice: the first one that runs quantizes for all.
            if made.is_none() {
                let done = lab.apply(method, parameters.clone(), &setting.inputs, 0, &out)?;
                made = Some(done.report);
            }
            let report = made.as_ref().unwrap_or(&Value::Null);
            for (metric, key) in [
                ("bits per weight", "bits_per_weight"),
                ("relative error", "mean_relative_error"),
                ("bytes read per token", "packed_bytes_quantized"),
            ] {
                if let Some(value) = report[key].as_f64() {
                    trial.record(metric, value);
                }
            }
            (setting.measure)(trial, &out, slice as usize)
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
    let mut holds = Vec::new();
    for prefix in ["", "stressed: "] {
        let names = ALPHAS.iter().map(|alpha| format!("finequant alpha {alpha}"));
        for name in names.chain([CHOSEN.to_owned()]) {
            let (arm, finest) = (format!("{prefix}{name}"), format!("{prefix}rtn g32"));
            let quality = cx.mean(&arm, "perplexity") / cx.mean(&finest, "perplexity");
            let share = scales(cx, &arm, 3) / scales(cx, &finest, 3);
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
    let wins = |cx: &ClaimContext, prefix: &str, group: &str| {
        let arm = format!("{prefix}finequant at the bits of {group}");
        cx.ratio(&arm, &format!("{prefix}rtn {group}"), "perplexity")
    };
    let most = |ratios: &[f64]| {
        let good = ratios.iter().filter(|ratio| **ratio <= 1.0).count();
        3 * good >= 2 * ratios.len().max(1)
    };
    let (wide, narrow) = (wins(cx, "", "g192"), wins(cx, "", "g64"));
    cx.check(
        "(c) at the bits of fixed groups of 192 and of 64, adaptive sizes are at least as good in 2 of 3 slices",
        most(&wide) && most(&narrow),
        format!("ratios {wide:.4?} and {narrow:.4?}"),
    );
    for prefix in ["stressed: ", "4 bits: "] {
        let (wide, narrow) = (wins(cx, prefix, "g192"), wins(cx, prefix, "g64"));
        cx.note(format!(
            "{prefix}the same, not part of the verdict: ratios {wide:.4?} and {narrow:.4?}"
        ));
    }
    cx.note("a seed is one of three disjoint slices of the held-out data; nothing else is random");
    cx.note(
        "GPTQ is calibrated on other text of the domains that it is measured on; with 8 sequences it fits those so closely that \
         it loses to rounding",
    );
    cx.note("the paper's speed-up on GPUs is not checked here; bytes read per token stand for it");
    cx.likely_reason(
        "at every halving the range of nearly Gaussian rows falls by about the same share, with outliers or without, so one \
         constant sends almost every matrix to the same end of the chain; the criterion and its constant are recalled and not in \
         the abstract. Where sizes are chosen by marginal gain at a given budget instead, they pay",
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
