//! Fit: a model in the size that is asked for.
//!
//! Every matrix gets bits, a group size and zero points or none, so that the model as `refit export --to compressed-tensors`
//! writes it takes at most `--target` bytes (or its matrices at most `--bpw` bits per weight), and its predictions change least:
//!
//! ```text
//! min sum_s weight_s error_s(c_s)   so that   fixed + sum_s bytes_s(c_s) <= target
//! ```
//!
//! What is counted is in [`menu`], how errors are measured and weighed in [`sensitivity`], and how the sum is minimized in
//! [`allocate`]. The matrices are then quantized on the grids that they got: by GPTQ (arXiv:2210.17323) with
//! text, to nearest without. The report has, beside what each matrix got, what every uniform grid would take and lose by the same
//! measure.
//!
//! The pieces are the literature's: FineQuant chooses groups, ShiftAddLLM and many others bits, GGUF's imatrix mixes types by
//! rule; counting everything and choosing all at once is ours. Other ways of keeping a matrix, such as a low-rank part beside
//! codes, are further candidates of the same sum: [`allocate`] asks for costs and errors only.

use std::collections::BTreeMap;

use clap::Args;
use refit_store::SideFile;
use refit_store::architecture::{Kind, Site};
use refit_train::calibrate::Order;
use refit_train::observe::{ColumnStats, StatsRequest};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::calibrated::{self, Calibration, OneShot, solver_of};
use crate::error::{Error, Result};
use crate::method::{
    Claim, Context, Effort, Family, Info, InputSpec, Inputs, Method, Need, Output, OutputKind,
    Paper, Plan, Taxonomy, Touches,
};
use crate::prune::sparsegpt::check_solver;
use crate::quantize::allocate::{Allocation, Candidate, allocate};
use crate::quantize::chain::Group;
use crate::quantize::gptq::{rule::GridRule, whole_groups};
use crate::quantize::grid::{Grid, ScaleRule};
use crate::quantize::options::check_bits;
use crate::quantize::record::{Record, grid_warnings};
use crate::rewrite::{self, OutputType, shape_of};
use crate::solver::{ColumnSolver, SolverOptions};

mod claim;
pub mod menu;
pub mod sensitivity;
pub mod size;

use menu::{Choice, Count, Menu};
use sensitivity::Measurements;
use size::Size;

const NAME: &str = "fit";
/// Bits per weight where neither a size nor bits are asked for.
const DEFAULT_BPW: f64 = 4.0;

/// How the errors of different matrices are weighed against each other.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Weighing {
    /// By what an error at that matrix alone does to the predictions (KL); needs the whole model in memory.
    #[default]
    Kl,
    /// Relative to the outputs of the matrix, every matrix alike.
    Output,
}

/// Parameters of fit.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Fit {
    /// Bytes of the weight files that `refit export --to compressed-tensors` shall write of the result, such as 60MB or 1.5GiB.
    #[arg(long, value_name = "SIZE", conflicts_with = "bpw")]
    pub target: Option<Size>,
    /// Bits per weight of the quantized matrices, scales and zero points included; 4 where no size is asked for.
    #[arg(long, value_name = "BITS")]
    pub bpw: Option<f64>,
    /// Bits per code to choose from.
    #[arg(long, value_delimiter = ',', default_values_t = [2u8, 3, 4, 5, 6, 8])]
    pub bits: Vec<u8>,
    /// Smallest group; rows that it does not divide are groups.
    #[arg(long, value_name = "SIZE", default_value_t = 32)]
    pub g_min: usize,
    /// Largest group, or `row`.
    #[arg(long, value_name = "SIZE", default_value = "row")]
    pub g_max: Group,
    /// Use no zero points.
    #[arg(long)]
    pub symmetric: bool,
    /// How a symmetric scale follows from the largest weight.
    #[arg(long, value_enum, default_value_t)]
    pub scale_rule: ScaleRule,
    /// How errors of different matrices are weighed, where there is text.
    #[arg(long, value_enum, default_value_t)]
    pub weighing: Weighing,
    /// Tokens on which the weights are measured.
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    pub weighing_tokens: usize,
    /// Added to the diagonal of the Hessian, as a share of its mean.
    #[arg(long, default_value_t = 0.01)]
    pub percdamp: f64,
    /// Columns per block of GPTQ; rounded to whole groups.
    #[arg(long, value_name = "COLUMNS", default_value_t = 128)]
    pub block_size: usize,
    /// Calibration text.
    #[command(flatten)]
    #[serde(flatten)]
    pub calibration: Calibration,
    /// Element type of the weights that are written; what is not quantized counts in it.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Fit);

/// What may be spent.
#[derive(Clone, Copy, Debug)]
struct Budget {
    /// Bytes of all matrices.
    bytes: u64,
    count: Count,
    /// Bits per weight that this comes to.
    bpw: f64,
}

impl Fit {
    fn check(&self) -> Result<()> {
        if self.bits.is_empty() {
            return Err(Error::range(
                NAME,
                "bits",
                "",
                "at least one number of bits, such as 2,3,4",
            ));
        }
        self.bits.iter().try_for_each(|bits| check_bits(NAME, *bits))?;
        if self.target.is_some() && self.bpw.is_some() {
            let problem = "give a size (--target) or bits per weight (--bpw), not both".into();
            return Err(Error::Conflict { method: NAME, problem });
        }
        if self.g_min == 0 {
            return Err(Error::range(NAME, "g_min", 0, "a positive whole number"));
        }
        if let Group::Size(largest) = self.g_max
            && largest < self.g_min
        {
            let expected = format!("at least g_min = {}", self.g_min);
            return Err(Error::range(NAME, "g_max", largest, expected));
        }
        if self.weighing_tokens < 2 {
            return Err(Error::range(NAME, "weighing_tokens", self.weighing_tokens, "at least 2"));
        }
        check_solver(NAME, self.percdamp, self.block_size)?;
        self.calibration.check(NAME)
    }

    /// What may be spent, or why that is not possible; the last is what a target beyond all choices would leave unused.
    fn budget(&self, menu: &Menu) -> Result<(Budget, Option<String>)> {
        let weights = menu.weights().max(1) as f64;
        let bits = |bytes: u64| 8.0 * bytes as f64 / weights;
        let Some(Size(target)) = self.target else {
            let bpw = self.bpw.unwrap_or(DEFAULT_BPW);
            let (least, most) = menu.range(Count::Parts);
            if bpw.is_nan() || bpw * weights < 8.0 * least as f64 {
                // Rounded up, so that it can be asked for.
                let expected = format!(
                    "the smallest possible is {:.4} bits per weight, with {} bits in the largest groups",
                    (bits(least) * 1e4).ceil() / 1e4,
                    self.bits.iter().min().expect("invariant: checked")
                );
                return Err(Error::range(NAME, "bpw", bpw, expected));
            }
            if bpw >= 32.0 {
                let expected = "below 32: float weights have no more, and there is nothing to fit";
                return Err(Error::range(NAME, "bpw", bpw, expected));
            }
            // Bits per weight that were computed from whole bytes give those bytes again.
            let bytes = (bpw * weights / 8.0 + 1e-3) as u64;
            let unused = (most < bytes).then(|| {
                format!(
                    "the finest choice takes {:.3} bits per weight, less than the {bpw} asked for",
                    bits(most)
                )
            });
            return Ok((Budget { bytes, count: Count::Parts, bpw }, unused));
        };
        let (least, most) = menu.range(Count::Files);
        if target < least {
            let others = menu.others_bytes();
            let advice = match menu.others_are_wide() {
                true => "; --dtype f16 keeps these in half of the bytes",
                false => "",
            };
            let expected = format!(
                "the smallest possible is {least} bytes ({}): {} for {} matrices at {} bits, and {} for what is not quantized \
                 (embeddings, norms){advice}",
                Size(least),
                Size(least - menu.fixed(Count::Files)),
                menu.sites.len(),
                self.bits.iter().min().expect("invariant: checked"),
                Size(others),
            );
            return Err(Error::range(NAME, "target", Size(target), expected));
        }
        let float = menu.float_bytes()?;
        if target >= float {
            let expected = format!(
                "the model takes {float} bytes ({}) as it is, which is no more than that: there is nothing to fit",
                Size(float)
            );
            return Err(Error::range(NAME, "target", Size(target), expected));
        }
        let bytes = target - menu.fixed(Count::Files);
        let unused = (most < target).then(|| {
            format!(
                "the finest choice takes {}, less than the {} asked for",
                Size(most),
                Size(target)
            )
        });
        Ok((Budget { bytes, count: Count::Files, bpw: bits(bytes) }, unused))
    }

    /// The grid that matrices are probed with: of about the bits that they will have, so that what it does to the predictions is
    /// of the size that matters. Without zero points, which models that were quantized before often lie on.
    fn probe(&self, budget: &Budget) -> Grid {
        Grid { rule: self.scale_rule, ..Grid::symmetric(budget.bpw.floor().clamp(2.0, 4.0) as u8) }
    }

    /// How errors are weighed for a model.
    fn weighing_of(&self, inputs: &Inputs) -> How {
        let decoder = inputs.models[0].artifact.architecture().kind == Kind::Decoder;
        match (inputs.text.is_empty(), self.weighing, decoder) {
            (true, ..) => How::Weights,
            (false, Weighing::Kl, true) => How::Kl,
            (false, ..) => How::Outputs,
        }
    }

    /// Measures every choice and takes the best that the budget pays.
    fn choose(
        &self,
        inputs: &Inputs,
        menu: &Menu,
        budget: &Budget,
        cx: &Context,
    ) -> Result<Chosen> {
        let (model, how) = (&inputs.models[0], self.weighing_of(inputs));
        let probe = self.probe(budget);
        let relative = |measured: &Measurements| -> BTreeMap<String, f64> {
            let of = |signal: f64| if signal > 0.0 { 1.0 / signal } else { 0.0 };
            measured.iter().map(|(name, m)| (name.clone(), of(m.signal))).collect()
        };
        let (measured, weights) = match how {
            How::Weights => {
                let measured = sensitivity::of_weights(model, menu, self.scale_rule, cx)?;
                let weights = relative(&measured);
                (measured, weights)
            }
            _ => {
                let sequences = self.calibration.draw(inputs, cx.seed)?;
                let measured = sensitivity::of_outputs(
                    model,
                    menu,
                    self.scale_rule,
                    self.percdamp,
                    &probe,
                    &sequences,
                    cx,
                )?;
                let weights = match how {
                    How::Kl => {
                        let some = first_tokens(&sequences, self.weighing_tokens);
                        let found = sensitivity::divergences(model, menu, &probe, &some, cx)?;
                        sensitivity::weights(&measured, &found)
                    }
                    _ => relative(&measured),
                };
                (measured, weights)
            }
        };
        let errors: Vec<Vec<f64>> = menu
            .sites
            .iter()
            .map(|site| {
                let weight = weights[&site.name];
                measured[&site.name].errors.iter().map(|error| weight * error).collect()
            })
            .collect();
        let items: Vec<Vec<Candidate>> = menu
            .sites
            .iter()
            .zip(&menu.choices)
            .zip(&errors)
            .map(|((site, choices), errors)| {
                let candidate = |(choice, error): (&Choice, &f64)| Candidate {
                    cost: menu.cost(site, *choice, budget.count),
                    error: *error,
                };
                choices.iter().zip(errors).map(candidate).collect()
            })
            .collect();
        let allocation = allocate(&items, budget.bytes).map_err(|unreachable| {
            Error::range(
                NAME,
                "target",
                budget.bytes,
                format!("at least {} bytes", unreachable.least),
            )
        })?;
        let choices: Vec<Choice> =
            menu.choices.iter().zip(&allocation.chosen).map(|(choices, &at)| choices[at]).collect();
        Ok(Chosen { how, choices, allocation, errors, weights })
    }
}

/// Sequences of so many tokens together, the last one cut; none of a single token.
fn first_tokens(sequences: &[Vec<u32>], mut tokens: usize) -> Vec<Vec<u32>> {
    let mut taken = Vec::new();
    for sequence in sequences {
        let count = tokens.min(sequence.len());
        if count < 2 {
            break;
        }
        taken.push(sequence[..count].to_vec());
        tokens -= count;
    }
    taken
}

/// How errors are measured and weighed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum How {
    /// Relative errors of weights.
    Weights,
    /// Relative errors of outputs.
    Outputs,
    /// Errors of outputs, weighed by divergence.
    Kl,
}

/// What every matrix gets.
struct Chosen {
    how: How,
    choices: Vec<Choice>,
    allocation: Allocation,
    /// Weighed errors of all choices.
    errors: Vec<Vec<f64>>,
    weights: BTreeMap<String, f64>,
}

impl Chosen {
    /// What the report says of it.
    fn report(&self, menu: &Menu, budget: &Budget) -> Result<Value> {
        let parts: u64 = menu
            .sites
            .iter()
            .zip(&self.choices)
            .map(|(site, choice)| menu.cost(site, *choice, Count::Parts))
            .sum();
        let matrices: BTreeMap<&str, Value> = menu
            .sites
            .iter()
            .enumerate()
            .map(|(at, site)| {
                let choice = self.choices[at];
                let entry = json!({
                    "bits": choice.bits,
                    "symmetric": choice.symmetric,
                    "group": choice.group,
                    "bytes": menu.cost(site, choice, Count::Parts),
                    "weight": self.weights[&site.name],
                    "predicted_error": self.errors[at][self.allocation.chosen[at]],
                });
                (site.name.as_str(), entry)
            })
            .collect();
        let mut uniform: Vec<(f64, Value)> = menu
            .uniform()
            .into_iter()
            .map(|uniform| {
                let error: f64 = (0..menu.sites.len())
                    .map(|at| {
                        let choice = uniform.of(shape_of(menu.sites[at]).1);
                        let place = menu.choices[at].iter().position(|other| *other == choice);
                        place.map_or(f64::NAN, |place| self.errors[at][place])
                    })
                    .sum();
                let cost = menu.uniform_cost(uniform, budget.count);
                let entry = json!({
                    "bits": uniform.bits,
                    "symmetric": uniform.symmetric,
                    "group": uniform.group,
                    "bytes": cost,
                    "within_budget": cost - menu.fixed(budget.count) <= budget.bytes,
                    "predicted_error": error,
                });
                (error, entry)
            })
            .collect();
        uniform.sort_by(|a, b| a.0.total_cmp(&b.0));
        let uniform: Vec<Value> = uniform.into_iter().map(|(_, entry)| entry).collect();
        Ok(json!({
            "budget_bytes": budget.bytes + menu.fixed(budget.count),
            "counted": match budget.count {
                Count::Files => "weight files of the compressed-tensors export",
                Count::Parts => "codes, scales, zero points and shapes of the matrices in the compressed-tensors export",
            },
            "used_bytes": self.allocation.cost + menu.fixed(budget.count),
            "export_bytes": menu.file_bytes(&self.choices)?,
            "export_bits_per_weight": 8.0 * parts as f64 / menu.weights().max(1) as f64,
            "weighing": self.how,
            "predicted_error": self.allocation.error,
            "least_possible_error": self.allocation.bound,
            "optimal": self.allocation.optimal,
            "matrices": matrices,
            "uniform": uniform,
        }))
    }
}

impl Method for Fit {
    const INFO: Info = Info {
        name: NAME,
        title: "Fit",
        summary: "Quantizes to the size you ask: bits, groups and zero points per matrix where they are worth most",
        family: Family::Quantize,
        paper: Paper { title: "", reference: "", year: 0 },
        inputs: InputSpec {
            text: Need::Optional,
            data_role: "calibration text: a few thousand tokens like those the model will see; without, weights alone decide",
            ..InputSpec::WEIGHTS
        },
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["quantization", "post-training", "weight-only", "mixed precision"],
            needs: Effort::Calibration,
            touches: &[Touches::Weights],
            composes_with: &["export"],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        self.check()?;
        let model = &inputs.models[0];
        let menu = Menu::of(self, model)?;
        let (budget, unused) = self.budget(&menu)?;
        let mut plan = rewrite::plan(self, model, &menu.sites, self.dtype);
        plan.warnings = grid_warnings(model, &Grid::symmetric(3), None);
        plan.warnings.extend(unused);
        if let Some(site) = menu.transposed() {
            plan.warnings.push(format!(
                "`{}` is stored transposed, which compressed-tensors has no word for: sizes are those that it would have",
                site.name
            ));
        }
        let how = self.weighing_of(inputs);
        plan.steps.push(format!(
            "choose among {} grids for {} matrices: {} for all, {:.3} bits per weight",
            menu.choices.iter().map(Vec::len).max().unwrap_or(0),
            menu.sites.len(),
            Size(budget.bytes),
            budget.bpw
        ));
        match how {
            How::Weights => plan.steps.push("round to nearest on the grids chosen".into()),
            _ => {
                self.calibration.describe(&mut plan, model);
                if how == How::Kl {
                    let numel: u64 =
                        model.artifact.tensors().iter().map(|info| info.numel() as u64).sum();
                    plan.peak_memory = plan.peak_memory.max(5 * numel);
                    plan.steps.push(format!(
                        "weigh every matrix by what rounding it alone does to the predictions of {} tokens",
                        self.weighing_tokens
                    ));
                } else if self.weighing == Weighing::Kl {
                    plan.notes.push(
                        "the model predicts no next token, so every matrix is weighed by its own outputs".into(),
                    );
                }
                plan.steps.push("round on the grids chosen with GPTQ, repairing as it goes".into());
            }
        }
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let model = &inputs.models[0];
        let menu = Menu::of(self, model)?;
        let (budget, _) = self.budget(&menu)?;
        let chosen = self.choose(inputs, &menu, &budget, cx)?;
        let allocation = chosen.report(&menu, &budget)?;
        let names = menu.sites.iter().map(|site| site.name.clone());
        let choices: BTreeMap<String, Choice> = names.zip(chosen.choices.iter().copied()).collect();
        let mut run =
            Run { parameters: self, choices, allocation, record: Record::default(), solver: None };
        if chosen.how != How::Weights {
            return calibrated::run(inputs, plan, cx, &self.calibration, &mut run);
        }
        let edit = |site: &Site, weights: &mut [f32]| {
            let (columns, choice) = (shape_of(site).1, run.choices[&site.name]);
            let (grid, before) = (choice.grid(self.scale_rule), weights.to_vec());
            weights.chunks_mut(columns).for_each(|row| grid.snap_row(row, choice.group));
            run.record.add(&site.name, &grid, columns, choice.group, &before, weights);
            Ok(())
        };
        rewrite::rewrite(inputs, plan, cx, &edit, || run.result(inputs))
    }

    fn claim() -> Option<Claim> {
        Some(claim::CLAIM)
    }
}

/// Quantizes every matrix on the grid that it got.
struct Run<'a> {
    parameters: &'a Fit,
    choices: BTreeMap<String, Choice>,
    allocation: Value,
    record: Record,
    solver: Option<ColumnSolver>,
}

impl Run<'_> {
    fn result(&self, inputs: &Inputs) -> Result<(Vec<SideFile>, Value)> {
        let (files, mut report) = self.record.take().finish(&inputs.models[0])?;
        report["fit"] = self.allocation.clone();
        Ok((files, report))
    }
}

impl OneShot for Run<'_> {
    fn request(&self) -> StatsRequest {
        StatsRequest::GRAM
    }

    fn order(&self) -> Order {
        Order::WithinBlock
    }

    fn prepare(&mut self, site: &Site, stats: &ColumnStats) -> Result<()> {
        let Fit { percdamp, block_size, .. } = *self.parameters;
        let options = SolverOptions { percdamp, act_order: false, block: block_size };
        self.solver = Some(solver_of(site, stats, options)?);
        Ok(())
    }

    fn apply(&mut self, site: &Site, weights: &mut [f32], _: &ColumnStats) -> Result<()> {
        let solver = self.solver.as_mut().expect("invariant: prepare() comes first");
        let (choice, inputs) = (self.choices[&site.name], shape_of(site).1);
        // Matrices that read the same inputs may have got different groups.
        solver.set_block(whole_groups(self.parameters.block_size, choice.group, inputs));
        let (grid, before) = (choice.grid(self.parameters.scale_rule), weights.to_vec());
        let mut rule = GridRule::new(grid, weights, inputs, choice.group, solver.order(), true);
        solver.solve(weights, &mut rule);
        self.record.add(&site.name, &grid, inputs, choice.group, &before, weights);
        Ok(())
    }

    fn finish(&mut self, inputs: &Inputs) -> Result<(Vec<SideFile>, Value)> {
        self.result(inputs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_taken_from_the_front() {
        let sequences = vec![vec![1u32; 4], vec![2; 4], vec![3; 4]];
        let lengths = |tokens| -> Vec<usize> {
            first_tokens(&sequences, tokens).iter().map(Vec::len).collect()
        };
        assert_eq!(lengths(6), [4, 2]);
        assert_eq!(lengths(5), [4]);
        assert_eq!(lengths(100), [4, 4, 4]);
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        for (fit, word) in [
            (Fit { bits: vec![], ..Fit::default() }, "bits"),
            (Fit { bits: vec![1], ..Fit::default() }, "bits"),
            (Fit { g_min: 0, ..Fit::default() }, "g_min"),
            (Fit { g_min: 64, g_max: Group::Size(32), ..Fit::default() }, "g_max"),
            (Fit { weighing_tokens: 1, ..Fit::default() }, "weighing_tokens"),
            (Fit { target: Some(Size(1)), bpw: Some(3.0), ..Fit::default() }, "not both"),
        ] {
            let error = fit.check().unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        Fit::default().check().unwrap();
    }
}
