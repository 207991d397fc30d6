//! Truncated singular value decompositions: the linears of a model as pairs of thin ones, without data and without training.
//!
//! ```text
//! W [out, in] = U S V^T,   W ~ (U_r S_r^(1/2)) (S_r^(1/2) V_r^T),   ||W - W_r||_F^2 = sum_{i > r} s_i^2
//! ```
//!
//! The best that any pair of rank `r` can do for the weights (Eckart and Young 1936), and the baseline of every method that makes
//! pairs: PELA begins here, and LoRC has the same at a lower rank beside the codes.

use clap::Args;
use rayon::prelude::*;
use refit_store::architecture::Site;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::emit::Emitter;
use crate::error::{Error, Result};
use crate::factorize::layout;
use crate::factorize::ranks::{Pair, Thinness};
use crate::method::{
    Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper, Plan,
    Taxonomy, Touches, Unit,
};
use crate::rewrite::{OutputType, read_matrix, shape_of};
use crate::svd;

/// Parameters of truncated decompositions.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Svd {
    /// How thin.
    #[command(flatten)]
    #[serde(flatten)]
    pub thinness: Thinness,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Svd);

/// The plan of a method that begins with decompositions. Singular values are only computed where ranks follow from them.
///
/// # Errors
/// As [`Thinness::pairs`]; matrices that are not finite; a model that is stored in factors already.
pub fn plan<M: Method>(
    method: &M,
    thinness: &Thinness,
    inputs: &Inputs,
    dtype: OutputType,
) -> Result<Plan> {
    let (name, model) = (M::INFO.name, &inputs.models[0]);
    thinness.check(name)?;
    layout::refuse_factored(name, model)?;
    let pairs = thinness.pairs(name, model, |sites| {
        sites
            .par_iter()
            .with_max_len(1)
            .map(|site| {
                let (out, inner) = shape_of(site);
                let weights = read_matrix(model, site)?;
                let found = svd::thin(&weights, out, inner);
                Ok(found.map_err(|error| unsolved(&model.source, site, &error))?.s)
            })
            .collect()
    })?;
    layout::plan(method, model, &pairs, dtype)
}

fn unsolved(model: &str, site: &Site, error: &svd::NoConvergence) -> Error {
    Error::tensor(model, &site.name, error.to_string())
}

/// A pair's factors `(up [out, r], down [r, in])`, and the share of the squared weights that they lose.
///
/// # Errors
/// Files that cannot be read, and matrices that are not finite.
pub fn factors(inputs: &Inputs, pair: &Pair, seed: u64) -> Result<(Vec<f32>, Vec<f32>, f64)> {
    let model = &inputs.models[0];
    let weights = read_matrix(model, pair.site)?;
    let found = svd::truncated(&weights, pair.out, pair.inputs, pair.rank, seed)
        .map_err(|error| unsolved(&model.source, pair.site, &error))?;
    let square = |values: &[f32]| values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    let (all, kept) = (square(&weights), square(&found.s));
    let lost = if all > 0.0 { ((all - kept) / all).max(0.0) } else { 0.0 };
    let (up, down) = found.factors();
    Ok((up, down, lost))
}

/// What a report says of pairs and what each lost.
pub fn report(pairs: &[Pair], lost: &[f64]) -> Value {
    let (before, after) = layout::sizes(pairs);
    let worst = pairs.iter().zip(lost).max_by(|a, b| a.1.total_cmp(b.1));
    let each: serde_json::Map<String, Value> =
        pairs.iter().zip(lost).map(|(pair, lost)| (pair.site.name.clone(), json!(lost))).collect();
    json!({
        "factorized_matrices": pairs.len(),
        "parameters_before": before,
        "parameters_after": after,
        "mean_relative_error": lost.iter().sum::<f64>() / lost.len().max(1) as f64,
        "worst_matrix": worst.map(|(pair, _)| pair.site.name.as_str()),
        "worst_relative_error": worst.map(|(_, lost)| lost),
        "relative_errors": each,
    })
}

impl Method for Svd {
    const INFO: Info = Info {
        name: "svd",
        title: "Truncated SVD",
        summary: "Writes every linear layer as two thin ones, the best ones for its weights, with no data",
        family: Family::Factorize,
        paper: Paper { title: "", reference: "", year: 0 },
        inputs: InputSpec::WEIGHTS,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["compact-architecture", "low-rank"],
            needs: Effort::None,
            touches: &[Touches::Weights, Touches::Architecture],
            composes_with: &["fine-tune", "rtn"],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        plan(self, &self.thinness, inputs, self.dtype)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let model = &inputs.models[0];
        let pairs = layout::planned(model, plan);
        let files = layout::side_files(model, plan, &pairs)?;
        let emitter = Emitter::begin_with(inputs, plan, cx, files)?;
        cx.progress.begin("decomposing", pairs.len() as u64, Unit::Tensors);
        let done: Result<Vec<f64>> = cx.install(|| {
            let one = |pair: &Pair| {
                // Pairs of an interrupted run are decomposed again, for the sake of the report.
                let (up, down, lost) = factors(inputs, pair, cx.seed)?;
                layout::write(&emitter, pair, &up, &down)?;
                cx.progress.advance(1);
                Ok(lost)
            };
            pairs.par_iter().with_max_len(1).map(one).collect()
        });
        cx.progress.end();
        let report = report(&pairs, &done?);
        layout::copy_rest(model, &pairs, &emitter, plan)?;
        let artifact = emitter.finish(inputs, plan, cx, Vec::new(), &report)?;
        Ok(Output { artifact: Some(artifact), report, warnings: Vec::new() })
    }
}
