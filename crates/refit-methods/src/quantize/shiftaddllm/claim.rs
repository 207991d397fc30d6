//! The claim of ShiftAddLLM, small: at 2 bits sums of signed scales are better than GPTQ's equal steps, at 3 no worse; knowing the
//! inputs beats coding the weights alone; the score foresees what a matrix loses.

use refit_train::BoxError;
use refit_train::claim::{Claim, ClaimContext};
use serde_json::{Value, json};

use crate::lab::{Lab, MODEL};

/// The claim.
pub const CLAIM: Claim = Claim {
    method: "shiftaddllm",
    question: "Do sums of signed powers of two lose less than equal steps at 2 bits, and no more at 3?",
    paper: "arXiv:2406.05981",
    assets: &[MODEL],
    minutes: 60.0,
    seeds: &[0, 1],
    run,
};

const DOMAINS: [&str; 2] = ["kjv", "man"];
/// Held-out tokens per domain.
const TOKENS: usize = 2048;
/// Calibration sequences and their length.
const CALIBRATION: (usize, usize) = (16, 128);
const ROUNDS: usize = 20;

fn run(cx: &mut ClaimContext) -> Result<(), BoxError> {
    let lab = Lab::open(cx)?;
    let tokens = if cx.quick() { TOKENS / 8 } else { TOKENS };
    cx.param("held-out tokens per domain", tokens);
    cx.param("calibration", format!("{} x {} tokens", CALIBRATION.0, CALIBRATION.1));
    cx.param("rounds", ROUNDS);
    let inputs = lab.inputs(&DOMAINS);
    let mut arms: Vec<(String, &str, Value)> = Vec::new();
    for bits in [2, 3] {
        let ours = |more: Value| {
            let mut parameters = json!({ "bits": bits, "rounds": ROUNDS });
            let more = more.as_object().cloned().unwrap_or_default();
            more.into_iter().for_each(|(key, value)| parameters[key] = value);
            parameters
        };
        let grid = json!({ "bits": bits, "group": 64, "asymmetric": true });
        arms.push((format!("rtn {bits}"), "rtn", grid.clone()));
        arms.push((format!("gptq {bits}"), "gptq", grid));
        arms.push((format!("bcq {bits}"), "shiftaddllm", ours(json!({ "weights_only": true }))));
        arms.push((format!("lat {bits}"), "shiftaddllm", ours(json!({}))));
        arms.push((format!("acc {bits}"), "shiftaddllm", ours(json!({ "mode": "acc" }))));
    }
    // Two widths within one mean, against one width between: what 2.2 bits buy over 2.
    arms.push((
        "lat mixed 2.2".into(),
        "shiftaddllm",
        json!({ "mean_bits": 2.2, "rounds": ROUNDS }),
    ));
    for seed in cx.seeds().to_vec() {
        for (arm, method, parameters) in &arms {
            let out = lab.path(&format!("shiftadd-{arm}-{seed}"));
            let mut parameters = parameters.clone();
            if *method != "rtn" {
                parameters["samples"] = json!(CALIBRATION.0);
                parameters["sequence_length"] = json!(CALIBRATION.1);
            }
            cx.arm(arm, seed, |trial| {
                let done = lab.apply(method, parameters, &inputs, seed, &out)?;
                trial.record(
                    "bits per weight",
                    done.report["bits_per_weight"].as_f64().unwrap_or(f64::NAN),
                );
                if let Some(matrices) = done.report["shiftadd"].as_object() {
                    let all = |key: &str| -> Vec<f64> {
                        matrices.values().filter_map(|matrix| matrix[key].as_f64()).collect()
                    };
                    let (scores, losses) = (all("score"), all("output_error"));
                    trial.record("output error", losses.iter().sum());
                    trial.record("rank correlation of score and error", spearman(&scores, &losses));
                }
                trial.record("perplexity", lab.perplexity(&out, &DOMAINS, tokens, 0)?);
                Ok(std::fs::remove_dir_all(&out)?)
            })?;
        }
    }
    judge(cx);
    Ok(())
}

fn judge(cx: &mut ClaimContext) {
    let most =
        |ratios: &[f64], limit: f64| !ratios.is_empty() && ratios.iter().all(|r| *r <= limit);
    for (bits, limit) in [(2, 0.8), (3, 1.02)] {
        let ratios = cx.ratio(&format!("lat {bits}"), &format!("gptq {bits}"), "perplexity");
        let spent = [format!("lat {bits}"), format!("gptq {bits}")]
            .map(|arm| cx.mean(&arm, "bits per weight"));
        cx.check(
            &format!("lat at {bits} bits has at most {limit} x the perplexity of GPTQ, for no more stored bits"),
            most(&ratios, limit) && spent[0] <= spent[1],
            format!("ratios {ratios:.3?} at {spent:.3?} bits per weight"),
        );
    }
    for bits in [2, 3] {
        let ratios = cx.ratio(&format!("lat {bits}"), &format!("bcq {bits}"), "output error");
        cx.check(
            &format!("knowing the inputs leaves less error at the outputs than the weights alone, {bits} bits"),
            most(&ratios, 0.999),
            format!("ratios {ratios:.3?}"),
        );
    }
    let correlations = cx.values("lat 2", "rank correlation of score and error");
    cx.check(
        "scores and errors of matrices have a rank correlation of at least .6",
        !correlations.is_empty() && correlations.iter().all(|r| *r >= 0.6),
        format!("{correlations:.3?}"),
    );
    let (mixed, two, three) = (
        cx.mean("lat mixed 2.2", "perplexity"),
        cx.mean("lat 2", "perplexity"),
        cx.mean("lat 3", "perplexity"),
    );
    // The same mean bits without a choice: between the logarithms of 2 and of 3 bits, a fifth of the way.
    let between = (0.8 * two.ln() + 0.2 * three.ln()).exp();
    cx.check(
        "2.2 bits on average are better than a fifth of the way from 2 to 3 bits",
        mixed < between,
        format!("{mixed:.2} against {between:.2}"),
    );
    cx.note("no time or energy is claimed here: multiplications are cheap on the processors that this runs on");
    cx.likely_reason(
        "the paper's models are larger and float; this one lies on a grid of equal steps already, which favours GPTQ at 3 bits",
    );
}

/// Spearman's rank correlation; ties go by place.
fn spearman(a: &[f64], b: &[f64]) -> f64 {
    let ranks = |values: &[f64]| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
        let mut ranks = vec![0f64; values.len()];
        order.into_iter().enumerate().for_each(|(rank, at)| ranks[at] = rank as f64);
        ranks
    };
    let n = a.len() as f64;
    let squares: f64 = ranks(a).iter().zip(ranks(b)).map(|(x, y)| (x - y).powi(2)).sum();
    1.0 - 6.0 * squares / (n * (n * n - 1.0))
}

#[cfg(test)]
mod tests {
    use super::spearman;

    #[test]
    fn ranks_correlate() {
        assert_eq!(spearman(&[1.0, 2.0, 5.0], &[10.0, 20.0, 21.0]), 1.0);
        assert_eq!(spearman(&[1.0, 2.0, 5.0], &[3.0, 2.0, 1.0]), -1.0);
    }
}
