//! One-shot methods that look at a little data: the frame that Wanda, SparseGPT, DSnoT and GPTQ fill.
//!
//! The model is streamed block by block ([`refit_train::calibrate`]): the inputs of a block's linears
//! are observed, the method changes the weights, they are written, the block is run again as it was
//! written, and forgotten. One block is in memory. A method says what it wants to know and what it
//! does with one matrix; everything else is here.

use std::time::Instant;

use clap::Args;
use refit_nn::block::Block;
use refit_store::architecture::Site;
use refit_store::{Artifact, DType, SideFile};
use refit_train::calibrate::{self, BlockStats, Order, Outcome};
use refit_train::observe::{ColumnStats, StatsRequest};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::emit::Emitter;
use crate::error::{Error, Result};
use crate::inputs::{Inputs, ModelInput};
use crate::method::{Action, Context, Output, Plan, Unit};
use crate::rewrite::{check_finite, copy};
use crate::solver::{ColumnSolver, SolverOptions};

/// How much calibration text is read.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Calibration {
    /// Calibration sequences, drawn from the text at places that the seed chooses.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub samples: usize,
    /// Tokens per calibration sequence.
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    pub sequence_length: usize,
}

crate::paper_defaults!(Calibration);

impl Calibration {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Range`].
    pub fn check(&self, method: &'static str) -> Result<()> {
        if self.samples == 0 {
            return Err(Error::range(method, "samples", 0, "at least 1 calibration sequence"));
        }
        if self.sequence_length < 2 {
            let expected = "at least 2 tokens";
            return Err(Error::range(method, "sequence_length", self.sequence_length, expected));
        }
        Ok(())
    }

    /// Says in a plan what will be read, and what it takes.
    pub fn describe(&self, plan: &mut Plan, model: &ModelInput) {
        let hidden = model.artifact.architecture().dims.hidden.unwrap_or(0) as u64;
        let tokens = (self.samples * self.sequence_length) as u64;
        let layers = model.artifact.architecture().layers().max(1) as u64;
        // Two copies of the hidden states, a block with its statistics, the embedding table.
        let embedding = model
            .artifact
            .architecture()
            .with_role(refit_store::architecture::Role::Embed)
            .map(|site| 4 * site.numel() as u64)
            .max();
        let numel: u64 = model.artifact.tensors().iter().map(|info| info.numel() as u64).sum();
        plan.peak_memory += 2 * 4 * tokens * hidden + 8 * numel / layers + embedding.unwrap_or(0);
        plan.steps.push(format!(
            "run {} sequences of {} tokens through {layers} blocks, one at a time",
            self.samples, self.sequence_length
        ));
    }

    /// Draws the sequences. Texts are tokenized one by one and joined; sequences do not overlap as long
    /// as the text is long enough, and their order in the text does not matter to any method.
    ///
    /// # Errors
    /// A text shorter than one sequence.
    pub fn draw(&self, inputs: &Inputs, seed: u64) -> Result<Vec<Vec<u32>>> {
        let tokenizer = inputs.models[0].tokenizer()?;
        let mut ids = Vec::new();
        for text in &inputs.text {
            ids.extend(tokenizer.encode(&text.text, false)?);
        }
        self.cut(&ids, seed).ok_or_else(|| Error::BadData {
            source_name: inputs.text.iter().map(|t| t.source.as_str()).collect::<Vec<_>>().join(", "),
            problem: format!(
                "{} tokens are fewer than one calibration sequence of {}; give more text or a smaller \
                 --sequence-length",
                ids.len(),
                self.sequence_length
            ),
        })
    }

    fn cut(&self, ids: &[u32], seed: u64) -> Option<Vec<Vec<u32>>> {
        let windows: Vec<&[u32]> = ids.chunks_exact(self.sequence_length).collect();
        if windows.is_empty() {
            return None;
        }
        let mut rng = refit_data::rng::Rng::named(seed, "calibration");
        let chosen = rng.sample(windows.len(), self.samples.min(windows.len()));
        Some(chosen.into_iter().map(|at| windows[at].to_vec()).collect())
    }
}

/// A method that changes one matrix at a time, knowing the statistics of its inputs.
pub trait OneShot: Sync {
    /// What must be known of the inputs of every linear.
    fn request(&self) -> StatsRequest;

    /// When it is collected.
    fn order(&self) -> Order {
        Order::WholeBlock
    }

    /// Prepares what linears with a common input share, such as a factored Hessian.
    ///
    /// # Errors
    /// Whatever is wrong with the statistics; `site` is the first of the linears.
    fn prepare(&mut self, _site: &Site, _stats: &ColumnStats) -> Result<()> {
        Ok(())
    }

    /// Changes `weights` `[out, in]`.
    ///
    /// # Errors
    /// Whatever the method meets.
    fn apply(&mut self, site: &Site, weights: &mut [f32], stats: &ColumnStats) -> Result<()>;

    /// Files beside the weights and the report, once all blocks are done.
    ///
    /// # Errors
    /// Whatever the method meets.
    fn finish(&mut self, inputs: &Inputs) -> Result<(Vec<SideFile>, Value)>;
}

/// The stream's visitor.
struct Visit<'a> {
    artifact: &'a Artifact,
    source: &'a str,
    method: &'a mut (dyn OneShot + Send),
    emitter: &'a Emitter,
    plan: &'a Plan,
    seconds: f64,
}

impl Visit<'_> {
    fn visit(&mut self, block: &mut Block, stats: &BlockStats) -> Result<Outcome> {
        let started = Instant::now();
        for group in stats.groups() {
            let mut prepared = false;
            for module in &group.sites {
                let tensor = format!("{module}.weight");
                let site = self.artifact.architecture().site(&tensor).ok_or_else(|| {
                    Error::tensor(self.source, &tensor, "the architecture does not list it")
                })?;
                let linear = block.linear_mut(module).ok_or_else(|| {
                    Error::tensor(self.source, &tensor, "the block does not hold it")
                })?;
                if !prepared {
                    self.method.prepare(site, &group.stats)?;
                    prepared = true;
                }
                let weight = linear.weight();
                let device = weight.device();
                let mut weights = refit_nn::ops::to_vec(&weight);
                drop(weight);
                check_finite(self.source, &tensor, &weights, 0)?;
                self.method.apply(site, &mut weights, &group.stats)?;
                self.round(&tensor, &mut weights);
                if !self.emitter.is_done(&tensor) {
                    self.emitter.write_matrix(site, weights.clone())?;
                }
                linear.set_weight(weights, &device);
            }
        }
        self.seconds += started.elapsed().as_secs_f64();
        Ok(Outcome::Changed)
    }

    /// Rounds to the stored type, so that later blocks see what will be read back.
    fn round(&self, tensor: &str, weights: &mut [f32]) {
        let stored = self.plan.tensors.iter().find(|planned| planned.name == tensor);
        match stored.and_then(|planned| DType::from_safetensors(&planned.dtype)) {
            Some(DType::F16) => {
                weights.iter_mut().for_each(|w| *w = half::f16::from_f32(*w).to_f32());
            }
            Some(DType::BF16) => {
                weights.iter_mut().for_each(|w| *w = half::bf16::from_f32(*w).to_f32());
            }
            _ => {}
        }
    }
}

/// Carries out a plan: streams the blocks through `method`, copies everything else.
///
/// # Errors
/// Whatever reading, running, changing or writing meets.
pub fn run(
    inputs: &Inputs,
    plan: &Plan,
    cx: &Context,
    calibration: &Calibration,
    method: &mut (dyn OneShot + Send),
) -> Result<Output> {
    let model = &inputs.models[0];
    let sequences = calibration.draw(inputs, cx.seed)?;
    let emitter = Emitter::begin(inputs, plan, cx)?;
    let mut options = calibrate::Options::new(method.request());
    options.order = method.order();
    let started = Instant::now();
    cx.progress.begin("calibrating", model.artifact.architecture().layers() as u64, Unit::Blocks);
    let streamed = cx.install(|| {
        let mut visit = Visit {
            artifact: &model.artifact,
            source: &model.source,
            method,
            emitter: &emitter,
            plan,
            seconds: 0.0,
        };
        let progress = |done: u64, _total: u64| cx.progress.advance(u64::from(done > 0));
        let mut visitor =
            |_: usize, block: &mut Block, stats: &BlockStats| visit.visit(block, stats);
        let summary =
            calibrate::run(&model.artifact, &sequences, &options, &mut visitor, &progress)?;
        Ok((summary, visit.seconds))
    });
    cx.progress.end();
    let (summary, method_seconds) = streamed?;
    let seconds = started.elapsed().as_secs_f64();
    for tensor in &plan.tensors {
        if emitter.is_done(&tensor.name) {
            continue;
        }
        if tensor.action == Action::Transform {
            let problem = "no block of the running model holds it, so it was not calibrated";
            return Err(Error::tensor(&model.source, &tensor.name, problem));
        }
        copy(&model.artifact, &model.source, &emitter, tensor)?;
    }
    let (side_files, mut report) = method.finish(inputs)?;
    report["calibration"] = json!({
        "sequences": summary.sequences,
        "tokens": summary.tokens,
        "blocks": summary.blocks,
    });
    let artifact = emitter.finish(inputs, plan, cx, side_files, &report)?;
    // Times go to the caller and not to the lineage: they differ from run to run.
    report["calibration"]["seconds"] = json!(seconds);
    report["calibration"]["method_seconds"] = json!(method_seconds);
    Ok(Output { artifact: Some(artifact), report, warnings: summary.warnings })
}

/// The column solver for linears that read these inputs; `site` is named in errors.
///
/// # Errors
/// Statistics that cannot be factored.
pub fn solver_of(site: &Site, stats: &ColumnStats, options: SolverOptions) -> Result<ColumnSolver> {
    let gram = stats.gram().expect("invariant: methods that solve ask for the Gram matrix");
    ColumnSolver::new(gram, stats.columns(), options)
        .map_err(|problem| Error::tensor("calibration", &site.name, problem))
}

/// A vector of f64 as f32.
pub(crate) fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|value| *value as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_follow_from_the_seed_and_do_not_overlap() {
        let calibration = Calibration { samples: 4, sequence_length: 10 };
        let ids: Vec<u32> = (0..105).collect();
        let first = calibration.cut(&ids, 1).unwrap();
        assert_eq!(first, calibration.cut(&ids, 1).unwrap());
        assert_ne!(first, calibration.cut(&ids, 2).unwrap());
        let mut starts: Vec<u32> = first.iter().map(|sequence| sequence[0]).collect();
        starts.sort_unstable();
        starts.dedup();
        assert_eq!(starts.len(), 4);
        assert_eq!(calibration.cut(&ids[..9], 1), None);
        assert_eq!(calibration.cut(&ids[..25], 1).unwrap().len(), 2);
    }
}
