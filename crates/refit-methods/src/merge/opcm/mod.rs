//! OPCM: *Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging*
//! (arXiv:2501.09522).
//!
//! Fine-tuned models of one base are added to a merge one at a time. In linear layers a newcomer's change is freed of what lies
//! in the directions of the changes that are merged already ([`project`]), the sum is brought back to the mean size of the
//! ingredients' changes, and its old size is remembered:
//!
//! ```text
//! R_t = lambda_(t-1) T + D',   lambda_t = |R_t| / mean_i |tau_i|,   theta_t = theta_0 + R_t / lambda_t
//! ```
//!
//! `T` is the merge's change, `D'` the newcomer's projected change, norms are over all tensors together. Tensors that are no
//! matrices of linear layers inside blocks (norms, embeddings, biases, convolutions, heads) take `R = lambda T + D`.
//!
//! The state, `refit.opcm.json` ([`ledger`]), travels with the merge: the first model may be a merge, and goes on then. It lists
//! every ingredient with its hash, so that any of them can be checked, and the whole made again from them (`--rebuild`).
//!
//! Decided here: where the reference gives up the block for `alpha` of 1 or more, everything is closed (`--reference-quirks` for
//! the letter); a tensor that nothing was merged into takes the newcomer's change as it is, where the reference divides 0 by 0; a
//! newcomer that equals the base is left out with a warning; order is as given unless asked otherwise. The merge of two steps is
//! that of one step after the other, bit for bit: between steps values are rounded to the type that is written, so write `--dtype
//! f32` where ingredients will follow.

use std::path::PathBuf;

use clap::Args;
use refit_data::rng::Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::emit::Emitter;
use crate::error::{Error, Result};
use crate::inputs::{Inputs, ModelInput};
use crate::merge::kernel::{Merge, within};
use crate::merge::program::{Program, Work};
use crate::merge::task_arithmetic::TaskArithmetic;
use crate::method::{
    Action, Context, Effort, Family, Info, InputSpec, Method, Need, Output, OutputKind, Paper,
    Plan, Taxonomy, Touches,
};
use crate::rewrite::OutputType;

mod fold;
pub mod ledger;
pub mod project;

use fold::Fold;
use ledger::{Ingredient, Ledger};
use project::Projection;

const NAME: &str = "opcm";

/// In which order models are added.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// As they were given.
    #[default]
    Given,
    /// Drawn by the seed.
    Shuffled,
}

/// Parameters of OPCM.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Opcm {
    /// Share of the merge's singular values whose subspace is closed to newcomers, 0 to 1.
    #[arg(long, default_value_t = 0.5)]
    pub alpha: f64,
    /// Order in which models are added; a merge that goes on stays first.
    #[arg(long, value_enum, default_value_t)]
    pub order: Order,
    /// Tensors that stay the base's: those whose name has one of these parts (heads of tasks).
    #[arg(long, value_delimiter = ',', value_name = "PART,...")]
    pub exclude: Vec<String>,
    /// Project kernels of convolutions, too, as `[out, in * k * k]`.
    #[arg(long)]
    pub convolutions: bool,
    /// Close no subspace where alpha is 1, as the reference does.
    #[arg(long)]
    pub reference_quirks: bool,
    /// Check the models against the ledger of this merge, and make it again.
    #[arg(long, value_name = "MERGE")]
    pub rebuild: Option<PathBuf>,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Opcm);

/// What is merged into what, in which order.
struct Task {
    program: Program,
    ledger: Ledger,
    /// The model that is a merge already.
    merged: Option<usize>,
    /// The models that are added, in order, with the alpha of each.
    newcomers: Vec<(usize, f64)>,
}

impl Opcm {
    fn task(&self, inputs: &Inputs, seed: u64) -> Result<Task> {
        within(NAME, "alpha", &[self.alpha], (0.0, 1.0))?;
        let base = inputs.base.expect("invariant: a base is required");
        let mut beside: Vec<usize> = inputs.beside_base().collect();
        let kernel = TaskArithmetic::default().kernel(beside.len())?;
        let mut program = Program::of_whole_models(inputs, &kernel, self.dtype)?;
        for (name, job) in &mut program.jobs {
            if !self.exclude.iter().any(|part| name.contains(part)) {
                continue;
            }
            if let Work::Merge { base: Some(part), .. } = &job.work {
                job.work = Work::Copy(part.clone());
                job.tensor.action = Action::Copy;
            }
        }
        let hash = inputs.models[base].artifact.content_hash()?;
        let mut ledger = Ledger::new(hash.clone());
        let mut merged = None;
        for (place, at) in beside.iter().enumerate() {
            let model = &inputs.models[*at];
            let Some(found) = Ledger::of(model)? else { continue };
            if place > 0 {
                return Err(conflict(format!(
                    "{} is a merge of opcm itself; give it first, and it goes on",
                    model.source
                )));
            }
            check_base(&found, &hash, &model.source)?;
            (ledger, merged) = (found, Some(*at));
        }
        if merged.is_some() {
            beside.remove(0);
        }
        if beside.is_empty() {
            let what = "a model to add to the merge".to_owned();
            return Err(Error::MissingData {
                method: NAME,
                what,
                how: "its directory after the merge",
            });
        }
        if self.order == Order::Shuffled {
            Rng::named(seed, "order").shuffle(&mut beside);
        }
        let mut newcomers: Vec<(usize, f64)> = beside.iter().map(|at| (*at, self.alpha)).collect();
        if let Some(path) = &self.rebuild {
            if merged.is_some() || self.order == Order::Shuffled {
                let problem = "--rebuild makes a merge again from its ingredients: give those alone, in the order of the ledger";
                return Err(conflict(problem.into()));
            }
            let model = ModelInput::open(path.display().to_string(), path)?;
            let Some(wanted) = Ledger::of(&model)? else {
                return Err(conflict(format!("{} has no {}", model.source, ledger::FILE_NAME)));
            };
            check_base(&wanted, &hash, &model.source)?;
            check_ingredients(&wanted, inputs, &beside)?;
            newcomers =
                beside.iter().zip(&wanted.ingredients).map(|(at, one)| (*at, one.alpha)).collect();
        }
        Ok(Task { program, ledger, merged, newcomers })
    }
}

fn conflict(problem: String) -> Error {
    Error::Conflict { method: NAME, problem }
}

fn check_base(ledger: &Ledger, base: &str, source: &str) -> Result<()> {
    match ledger.base == base {
        true => Ok(()),
        false => Err(conflict(format!(
            "{source} was merged on another base (its hash begins with {}, this one's with {})",
            &ledger.base[..ledger.base.len().min(12)],
            &base[..base.len().min(12)]
        ))),
    }
}

/// The models are those of the ledger, in its order.
fn check_ingredients(ledger: &Ledger, inputs: &Inputs, given: &[usize]) -> Result<()> {
    let wanted = &ledger.ingredients;
    if wanted.len() != given.len() {
        let names: Vec<&str> = wanted.iter().map(|one| one.source.as_str()).collect();
        return Err(conflict(format!(
            "the ledger lists {} models ({}), and {} were given",
            wanted.len(),
            names.join(", "),
            given.len()
        )));
    }
    for (place, (at, wanted)) in given.iter().zip(wanted).enumerate() {
        let model = &inputs.models[*at];
        if model.artifact.content_hash()? != wanted.content_hash {
            return Err(conflict(format!(
                "{} is not ingredient {} of the ledger, which was {} (hash {}...)",
                model.source,
                place + 1,
                wanted.source,
                &wanted.content_hash[..wanted.content_hash.len().min(12)]
            )));
        }
    }
    Ok(())
}

impl Method for Opcm {
    const INFO: Info = Info {
        name: NAME,
        title: "OPCM",
        summary: "Adds fine-tuned models to a merge one at a time, each in directions that the others leave free",
        family: Family::Merge,
        paper: Paper {
            title: "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging",
            reference: "arXiv:2501.09522",
            year: 2025,
        },
        inputs: InputSpec {
            min_models: 1,
            max_models: None,
            base: Need::Required,
            ..InputSpec::WEIGHTS
        },
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["reuse", "merging", "continual"],
            needs: Effort::None,
            touches: &[Touches::Weights],
            composes_with: &["rtn", "finequant"],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        let task = self.task(inputs, 0)?;
        let mut plan = Plan::of(self);
        task.program.describe(inputs, &mut plan);
        let largest = plan.tensors.iter().map(|t| t.shape.iter().product::<usize>()).max();
        // Base, newcomer, merge, and the factors of a matrix, for every thread.
        plan.peak_memory =
            (rayon::current_num_threads() * 8 * 4 * largest.unwrap_or(0)) as u64 + (64 << 20);
        plan.steps = match task.merged {
            Some(_) => {
                vec![format!("go on with a merge of {} models", task.ledger.ingredients.len())]
            }
            None => Vec::new(),
        };
        plan.steps.push(format!("add {} models", task.newcomers.len()));
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let Task { program, mut ledger, merged, newcomers } = self.task(inputs, cx.seed)?;
        let emitter = Emitter::begin(inputs, plan, cx)?;
        let quirks = self.reference_quirks;
        let mut fold = Fold::new(inputs, &program, merged, self.convolutions, &cx.temp_dir)?;
        let mut warnings = Vec::new();
        for (at, alpha) in newcomers {
            let model = &inputs.models[at];
            let norm = fold.norm_of(at, cx)?;
            if norm == 0.0 {
                let warning =
                    format!("{} equals the base: it adds nothing and is left out", model.source);
                warnings.push(warning);
                continue;
            }
            let content_hash = model.artifact.content_hash()?;
            let source = model.source.clone();
            ledger.ingredients.push(Ingredient { source, content_hash, norm, lambda: 1.0, alpha });
            if ledger.ingredients.len() == 1 {
                fold.start_with(at);
                continue;
            }
            let mean = ledger.mean_norm();
            let projection = Projection { alpha, quirks };
            let size = fold.add(at, ledger.lambda, mean, projection, cx)?;
            ledger.lambda = size / mean;
            if let Some(last) = ledger.ingredients.last_mut() {
                last.lambda = ledger.lambda;
            }
        }
        if ledger.ingredients.is_empty() {
            return Err(conflict("every model equals the base: there is nothing to merge".into()));
        }
        fold.write(&emitter, cx)?;
        let report = json!({
            "base": inputs.models[inputs.base.unwrap_or(0)].source,
            "ingredients": ledger.ingredients,
            "lambda": ledger.lambda,
            "mean_norm": ledger.mean_norm(),
        });
        let mut side_files = program.side_files.clone();
        side_files.push(ledger.file()?);
        let artifact = emitter.finish(inputs, plan, cx, side_files, &report)?;
        Ok(Output { artifact: Some(artifact), report, warnings })
    }
}
