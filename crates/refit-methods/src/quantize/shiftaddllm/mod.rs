//! ShiftAddLLM: *ShiftAddLLM: Accelerating Pretrained LLMs via Post-Training Multiplication-Less Reparameterization*
//! (arXiv:2406.05981).
//!
//! Weights become sums of few signed scales, and scales sums of few powers of two, so that a product needs look-ups, shifts and
//! additions alone ([`lut`]):
//!
//! ```text
//! w_hat = sum_{i<q} alpha_i b_i,   b_i in {-1, +1},   alpha_i = sum_{t<K} ±2^{e_it}
//! ```
//!
//! Scales are fitted in turns with signs ([`bcq`]), to columns as GPTQ's errors have moved them ([`rule`]). In mode `acc` a column
//! has scales of its own; in mode `lat` eight columns share scales, each eighth of the rows its own, so that one table of sums
//! serves eight inputs. Both have `q` scales per column.
//!
//! Bits per matrix: with `U^T U = H^{-1}`, `S = W / diag(U)` and `score = |S|_F std(S)^2`, a matrix of `b` bits counts `score 4^-b`,
//! and the sum is minimized under an exact mean of bits by [`allocate`]. The paper states an integer program; its code
//! sorts, with weights for the layers of the ffn. Here sizes are counted as they are.
//!
//! Decided here: `acc` is QuIP's processing ([`incoherence`]) and then codes; its weights are decoded by turning them back, so that
//! no product with shifts alone gives them. `--no-incoherence` leaves it out. Of the turns the best is kept, not the last. Later
//! terms of scales keep their signs, which the reference drops when it stores them. The rounding of scales
//! applies to one bit, too. A zero's sign is plus. QuIP's permutations beside the turns are left out.

use std::collections::BTreeMap;

use clap::Args;
use refit_store::SideFile;
use refit_store::architecture::Site;
use refit_train::calibrate::{self, BlockStats, Order, Outcome};
use refit_train::observe::{ColumnStats, StatsRequest};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::calibrated::{self, Calibration, OneShot, narrow};
use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::method::{
    Claim, Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper,
    Plan, Taxonomy, Touches, Unit,
};
use crate::prune::sparsegpt::check_solver;
use crate::quantize::allocate::{Candidate, allocate};
use crate::quantize::grid::Grid;
use crate::quantize::output_error::total_error;
use crate::quantize::record::{QuantizedTensor, Record, grid_warnings};
use crate::rewrite::{self, OutputType, linears, shape_of};
use crate::solver::{ColumnSolver, SolverOptions};

pub mod bcq;
mod claim;
pub mod incoherence;
pub mod lut;
pub mod packed;
pub mod rule;

use bcq::Fitting;
use packed::Packed;
use rule::BcqRule;

const NAME: &str = "shiftaddllm";
/// Columns, and patches in a column, of mode `lat`.
const EIGHT: usize = 8;

/// What shares scales.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// One column, after incoherence processing: closest, but no shift undoes the processing.
    Acc,
    /// Eight columns by an eighth of the rows: products by look-ups and shifts.
    #[default]
    Lat,
}

impl Mode {
    /// Columns that share scales, and patches of rows with scales of their own.
    pub fn patches(self, rows: usize, group: Option<usize>) -> (usize, usize) {
        match self {
            Self::Acc => (1, group.map_or(1, |group| rows / group)),
            Self::Lat => (EIGHT, EIGHT),
        }
    }
}

/// Parameters of ShiftAddLLM.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ShiftAddLlm {
    /// Bits per weight, 2 to 4.
    #[arg(long, default_value_t = 3)]
    pub bits: u8,
    /// Mean bits per weight over all matrices, from 2 to 4, scales not counted: each gets 2, 3 or 4 by its score. Replaces bits.
    #[arg(long, value_name = "BITS")]
    pub mean_bits: Option<f64>,
    /// What shares scales.
    #[arg(long, value_enum, default_value_t)]
    pub mode: Mode,
    /// Turns of fitting scales and signs.
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub rounds: usize,
    /// Powers of two per scale, 1 to 8.
    #[arg(long, value_name = "TERMS", default_value_t = 3)]
    pub apot: usize,
    /// Consecutive rows of a column that share scales in mode acc; all when absent.
    #[arg(long, value_name = "ROWS")]
    pub group: Option<usize>,
    /// Round the columns with the largest inputs first; by eights in mode lat.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub act_order: bool,
    /// Leave out the incoherence processing of mode acc.
    #[arg(long)]
    pub no_incoherence: bool,
    /// Take all inputs as uncorrelated and alike: binary coding of the weights alone.
    #[arg(long)]
    pub weights_only: bool,
    /// Added to the diagonal of the Hessian, as a share of its mean.
    #[arg(long, default_value_t = 0.01)]
    pub percdamp: f64,
    /// Calibration text.
    #[command(flatten)]
    #[serde(flatten)]
    pub calibration: Calibration,
    /// Element type of the decoded weights; only 32-bit floats hold them exactly.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(ShiftAddLlm);

impl ShiftAddLlm {
    fn check(&self, model: &ModelInput, sites: &[&Site]) -> Result<()> {
        if !(2..=4).contains(&self.bits) {
            return Err(Error::range(NAME, "bits", self.bits, "2, 3 or 4"));
        }
        if let Some(mean) = self.mean_bits
            && !(2.0..=4.0).contains(&mean)
        {
            return Err(Error::range(NAME, "mean_bits", mean, "a mean from 2 to 4"));
        }
        if !(1..=8).contains(&self.apot) {
            return Err(Error::range(NAME, "apot", self.apot, "1 to 8 powers of two, usually 3"));
        }
        check_solver(NAME, self.percdamp, 1)?;
        self.calibration.check(NAME)?;
        let conflict =
            |problem: &str| Err(Error::Conflict { method: NAME, problem: problem.into() });
        if self.mode == Mode::Lat && self.group.is_some() {
            return conflict(
                "--group belongs to --mode acc; mode lat always has eighths of the rows",
            );
        }
        if self.mode == Mode::Lat && self.no_incoherence {
            return conflict("--no-incoherence belongs to --mode acc; mode lat has none");
        }
        for site in sites {
            let (rows, inputs) = shape_of(site);
            let bad = |problem: String| Err(Error::tensor(&model.source, &site.name, problem));
            if !inputs.is_multiple_of(32) {
                return bad(format!(
                    "{inputs} inputs are no whole words of 32 signs, which the packed form asks for"
                ));
            }
            if self.mode == Mode::Lat && !rows.is_multiple_of(EIGHT) {
                return bad(format!(
                    "{rows} outputs are not divisible by {EIGHT}; take --mode acc"
                ));
            }
            if let Some(group) = self.group
                && (group == 0 || !rows.is_multiple_of(group))
            {
                return bad(format!("{rows} outputs are not divisible by group = {group}"));
            }
        }
        Ok(())
    }

    fn incoherent(&self) -> bool {
        self.mode == Mode::Acc && !self.no_incoherence
    }

    /// Bits of every matrix.
    fn widths(&self, inputs: &Inputs, cx: &Context) -> Result<BTreeMap<String, (u8, Option<f64>)>> {
        let sites = linears(&inputs.models[0])?;
        let Some(mean) = self.mean_bits else {
            return Ok(sites.iter().map(|site| (site.name.clone(), (self.bits, None))).collect());
        };
        let scores = self.scores(inputs, cx)?;
        let items: Vec<Vec<Candidate>> = sites
            .iter()
            .map(|site| {
                let score = scores.get(&site.name).copied().unwrap_or(0.0);
                let of = |bits: u64| Candidate {
                    cost: bits * site.numel() as u64,
                    error: score * 0.25f64.powi(bits as i32),
                };
                (2..=4).map(of).collect()
            })
            .collect();
        let weights: u64 = sites.iter().map(|site| site.numel() as u64).sum();
        let found = allocate(&items, (mean * weights as f64) as u64)
            .map_err(|_| Error::range(NAME, "mean_bits", mean, "at least 2"))?;
        let bits = |(site, at): (&&Site, usize)| {
            (site.name.clone(), (at as u8 + 2, scores.get(&site.name).copied()))
        };
        Ok(sites.iter().zip(found.chosen).map(bits).collect())
    }

    /// The score of every matrix, on the model as it is.
    fn scores(&self, inputs: &Inputs, cx: &Context) -> Result<BTreeMap<String, f64>> {
        let model = &inputs.models[0];
        let sequences = self.calibration.draw(inputs, cx.seed)?;
        let mut scores = BTreeMap::new();
        let mut visit =
            |_: usize, block: &mut refit_nn::block::Block, stats: &BlockStats| -> Result<Outcome> {
                for group in stats.groups() {
                    let mut diagonal = None;
                    for module in &group.sites {
                        let name = format!("{module}.weight");
                        let linear = block.linear_mut(module).ok_or_else(|| {
                            Error::tensor(&model.source, &name, "the block does not hold it")
                        })?;
                        let weights = refit_nn::ops::to_vec(&linear.weight());
                        let diagonal = match &diagonal {
                            Some(diagonal) => diagonal,
                            None => diagonal.insert(self.solver(&name, &group.stats)?.diagonal()),
                        };
                        scores.insert(name, score(&weights, diagonal));
                    }
                }
                Ok(Outcome::Unchanged)
            };
        cx.progress.begin("scoring", model.artifact.architecture().layers() as u64, Unit::Blocks);
        let progress = |done: u64, _: u64| cx.progress.advance(u64::from(done > 0));
        let options = calibrate::Options::new(StatsRequest::GRAM);
        let done = cx.install(|| {
            calibrate::run(&model.artifact, &sequences, &options, &mut visit, &progress)
        });
        cx.progress.end();
        done?;
        Ok(scores)
    }

    fn solver(&self, name: &str, stats: &ColumnStats) -> Result<ColumnSolver> {
        let h = stats.gram().expect("invariant: the Gram matrix was asked for");
        self.solver_of(name, h, stats.columns())
    }

    /// The solver for `H`, in the order of the mode.
    fn solver_of(&self, name: &str, h: Vec<f64>, n: usize) -> Result<ColumnSolver> {
        let h = match self.weights_only {
            true => (0..n * n).map(|at| if at / n == at % n { 1.0 } else { 0.0 }).collect(),
            false => h,
        };
        let columns = self.mode.patches(EIGHT, None).0;
        let order = match self.act_order {
            true => by_size(&h, n, columns),
            false => (0..n).collect(),
        };
        let options = SolverOptions { percdamp: self.percdamp, act_order: false, block: columns };
        ColumnSolver::in_order(h, n, options, order)
            .map_err(|problem| Error::tensor("calibration", name, problem))
    }

    /// Quantizes `weights` in place.
    fn quantize(
        &self,
        name: &str,
        weights: &mut [f32],
        (n, bits): (usize, u8),
        h: &[f64],
        solver: &ColumnSolver,
        seed: u64,
    ) -> Result<Packed> {
        let rows = weights.len() / n;
        let (columns, patches) = self.mode.patches(rows, self.group);
        let fitting = Fitting { bits, rounds: self.rounds, terms: Some(self.apot) };
        let (own, incoherence);
        let solver = match self.incoherent() {
            true => {
                let mut h = h.to_vec();
                // Inputs that are always 0 carry nothing, and turning would spread their weights.
                for j in 0..n {
                    if h[j * n + j] <= 0.0 {
                        h[j * n + j] = 1.0;
                        weights.iter_mut().skip(j).step_by(n).for_each(|w| *w = 0.0);
                    }
                }
                incoherence = Some(incoherence::process(weights, &mut h, n, seed));
                own = self.solver_of(name, h, n)?;
                &own
            }
            false => {
                incoherence = None;
                solver
            }
        };
        let mut rule = BcqRule::new(fitting, (rows, n), (columns, patches), solver.order());
        solver.solve(weights, &mut rule);
        let layout = (columns, patches, usize::from(bits), self.apot);
        let scales = rule.into_scales();
        let packed = Packed::pack(weights, n, layout, &scales, incoherence).ok_or_else(|| {
            Error::tensor(
                "weights",
                name,
                "its values grew beyond what half of the exponents hold; they cannot be packed",
            )
        })?;
        weights.copy_from_slice(&packed.decode());
        Ok(packed)
    }
}

/// Columns by falling `H_jj`, groups of consecutive columns by the sum of theirs.
fn by_size(h: &[f64], n: usize, columns: usize) -> Vec<usize> {
    let size = |block: usize| -> f64 {
        (block * columns..((block + 1) * columns).min(n)).map(|j| h[j * n + j]).sum()
    };
    let mut blocks: Vec<usize> = (0..n.div_ceil(columns)).collect();
    blocks.sort_by(|&a, &b| size(b).total_cmp(&size(a)).then(a.cmp(&b)));
    blocks.into_iter().flat_map(|block| block * columns..((block + 1) * columns).min(n)).collect()
}

/// `|S|_F std(S)^2` of `S = W / diag(U)`.
pub fn score(weights: &[f32], diagonal: &[f32]) -> f64 {
    let (mut sum, mut squares) = (0f64, 0f64);
    for row in weights.chunks(diagonal.len()) {
        for (w, d) in row.iter().zip(diagonal) {
            let s = f64::from(*w) / f64::from(*d);
            sum += s;
            squares += s * s;
        }
    }
    let count = weights.len().max(1) as f64;
    squares.sqrt() * (squares / count - (sum / count).powi(2)).max(0.0)
}

impl Method for ShiftAddLlm {
    const INFO: Info = Info {
        name: NAME,
        title: "ShiftAddLLM",
        summary: "Writes weights as sums of signed powers of two, for products by look-ups, shifts and additions",
        family: Family::Quantize,
        paper: Paper {
            title: "ShiftAddLLM: Accelerating Pretrained LLMs via Post-Training Multiplication-Less Reparameterization",
            reference: "arXiv:2406.05981",
            year: 2024,
        },
        inputs: InputSpec::CALIBRATED,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["quantization", "post-training", "weight-only", "binary coding"],
            needs: Effort::Calibration,
            touches: &[Touches::Weights],
            composes_with: &[],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        let model = &inputs.models[0];
        let sites = linears(model)?;
        self.check(model, &sites)?;
        let mut plan = rewrite::plan(self, model, &sites, self.dtype);
        plan.warnings = grid_warnings(model, &Grid::symmetric(self.bits), None);
        self.calibration.describe(&mut plan, model);
        if let Some(mean) = self.mean_bits {
            plan.steps.push(format!(
                "score {} matrices and give them {mean} bits on average",
                sites.len()
            ));
        }
        let weights: u64 = sites.iter().map(|site| site.numel() as u64).sum();
        // The packed form is kept until the end.
        plan.peak_memory += weights / 2;
        let bits = self.mean_bits.unwrap_or(f64::from(self.bits));
        plan.steps.push(format!(
            "write {} matrices as sums of {bits} signed scales of {} powers of two, repairing as it goes",
            sites.len(),
            self.apot
        ));
        if plan
            .tensors
            .iter()
            .any(|t| t.dtype != "F32" && sites.iter().any(|site| site.name == t.name))
        {
            plan.notes.push(format!(
                "decoded weights are rounded to their element type; {} holds them exactly, and --dtype f32 would, too",
                packed::FILE_NAME
            ));
        }
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let mut method = Run {
            parameters: self,
            widths: self.widths(inputs, cx)?,
            seed: cx.seed,
            record: Record::default(),
            solver: None,
            packed: BTreeMap::new(),
            found: BTreeMap::new(),
        };
        calibrated::run(inputs, plan, cx, &self.calibration, &mut method)
    }

    fn claim() -> Option<Claim> {
        Some(claim::CLAIM)
    }
}

struct Run<'a> {
    parameters: &'a ShiftAddLlm,
    widths: BTreeMap<String, (u8, Option<f64>)>,
    seed: u64,
    record: Record,
    solver: Option<ColumnSolver>,
    packed: BTreeMap<String, Packed>,
    found: BTreeMap<String, Value>,
}

impl OneShot for Run<'_> {
    fn request(&self) -> StatsRequest {
        StatsRequest::GRAM
    }

    fn order(&self) -> Order {
        Order::WithinBlock
    }

    fn prepare(&mut self, site: &Site, stats: &ColumnStats) -> Result<()> {
        self.solver = Some(self.parameters.solver(&site.name, stats)?);
        Ok(())
    }

    fn apply(&mut self, site: &Site, weights: &mut [f32], stats: &ColumnStats) -> Result<()> {
        let solver = self.solver.as_ref().expect("invariant: prepare() comes first");
        let h = stats.gram().expect("invariant: the Gram matrix was asked for");
        let (n, (bits, _)) = (stats.columns(), self.widths[&site.name]);
        let before = weights.to_vec();
        let score = score(&before, &solver.diagonal());
        let packed =
            self.parameters.quantize(&site.name, weights, (n, bits), &h, solver, self.seed)?;
        let change: Vec<f32> = before.iter().zip(&*weights).map(|(a, b)| a - b).collect();
        let loss = total_error(&change, n, &narrow(&h)) / stats.rows().max(1) as f64;
        let bytes = packed.bytes();
        let entry = QuantizedTensor {
            bits,
            symmetric: true,
            // On no grid of equal steps.
            group: 0,
            bits_per_weight: 8.0 * bytes as f64 / before.len().max(1) as f64,
            packed_bytes: bytes,
            relative_error: 0.0,
        };
        self.record.measure(&site.name, entry, &before, weights);
        self.found.insert(
            site.name.clone(),
            json!({ "bits": bits, "score": score, "output_error": loss }),
        );
        self.packed.insert(site.name.clone(), packed);
        Ok(())
    }

    fn finish(&mut self, inputs: &Inputs) -> Result<(Vec<SideFile>, Value)> {
        let (mut files, mut report) = self.record.take().finish(&inputs.models[0])?;
        files.push(SideFile::from_bytes(packed::FILE_NAME, packed::encode(&self.packed)));
        let weights: u64 = self.packed.values().map(|p| (p.rows * p.inputs) as u64).sum();
        let codes: u64 = self.packed.values().map(|p| (p.rows * p.inputs * p.bits) as u64).sum();
        report["mean_bits"] = json!(codes as f64 / weights.max(1) as f64);
        report["shiftadd"] = json!(std::mem::take(&mut self.found));
        Ok((files, report))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Stream, correlated_gram, output_error};

    fn quantized(
        parameters: &ShiftAddLlm,
        weights: &[f32],
        h: &[f64],
        n: usize,
    ) -> (Vec<f32>, Packed) {
        let solver = parameters.solver_of("w", h.to_vec(), n).unwrap();
        let mut out = weights.to_vec();
        let packed =
            parameters.quantize("w", &mut out, (n, parameters.bits), h, &solver, 1).unwrap();
        (out, packed)
    }

    #[test]
    fn repairing_beats_plain_coding_in_both_modes() {
        let (n, rows) = (96, 64);
        let h = correlated_gram(n, 500, 1);
        let weights = Stream::new(2).normals(rows * n);
        for mode in [Mode::Lat, Mode::Acc] {
            for bits in [2, 3] {
                let parameters = ShiftAddLlm { mode, bits, rounds: 20, ..ShiftAddLlm::default() };
                let loss = |p: &ShiftAddLlm| {
                    output_error(&weights, &quantized(p, &weights, &h, n).0, &h, n)
                };
                let plain = ShiftAddLlm { weights_only: true, ..parameters.clone() };
                let (repaired, plain) = (loss(&parameters), loss(&plain));
                assert!(repaired < 0.85 * plain, "{mode:?} {bits}: {repaired} {plain}");
            }
        }
    }

    #[test]
    fn an_identity_gram_makes_it_plain_coding() {
        let (n, rows) = (64, 48);
        let mut h = vec![0.0; n * n];
        (0..n).for_each(|i| h[i * n + i] = 3.0);
        let weights = Stream::new(3).normals(rows * n);
        for (mode, group) in [(Mode::Lat, None), (Mode::Acc, None), (Mode::Acc, Some(16))] {
            let parameters = ShiftAddLlm {
                mode,
                group,
                rounds: 20,
                no_incoherence: true,
                ..ShiftAddLlm::default()
            };
            let (solved, packed) = quantized(&parameters, &weights, &h, n);
            assert_eq!(packed, rule::plain(&weights, n, mode, group, parameters.bits));
            assert_eq!(solved, packed.decode());
        }
    }

    #[test]
    fn files_decode_to_the_same_bits_and_groups_have_few_values() {
        let dir = tempfile::tempdir().unwrap();
        let (n, rows) = (64, 32);
        let mut h = correlated_gram(n, 300, 5);
        // A dead input.
        for k in 0..n {
            (h[9 * n + k], h[k * n + 9]) = (0.0, 0.0);
        }
        let weights = Stream::new(6).normals(rows * n);
        let mut all = BTreeMap::new();
        let mut decoded = BTreeMap::new();
        for (name, mode, no_incoherence) in
            [("lat", Mode::Lat, false), ("acc", Mode::Acc, false), ("plain", Mode::Acc, true)]
        {
            let parameters =
                ShiftAddLlm { mode, bits: 2, no_incoherence, rounds: 10, ..ShiftAddLlm::default() };
            let (solved, packed) = quantized(&parameters, &weights, &h, n);
            assert_eq!(
                packed.decode().iter().map(|w| w.to_bits()).collect::<Vec<_>>(),
                solved.iter().map(|w| w.to_bits()).collect::<Vec<_>>()
            );
            if name == "plain" {
                for column in 0..n {
                    let mut levels: Vec<u32> =
                        solved.iter().skip(column).step_by(n).map(|w| w.to_bits()).collect();
                    levels.sort_unstable();
                    levels.dedup();
                    assert!(levels.len() <= 4);
                }
                assert!(
                    solved.iter().skip(9).step_by(n).all(|w| *w == 0.0),
                    "a dead input keeps weights"
                );
            }
            all.insert(format!("{name}.weight"), packed);
            decoded.insert(format!("{name}.weight"), solved);
        }
        let path = dir.path().join(packed::FILE_NAME);
        std::fs::write(&path, packed::encode(&all)).unwrap();
        let read = packed::read(&path).unwrap();
        assert_eq!(read, all);
        for (name, packed) in read {
            assert_eq!(packed.decode(), decoded[&name], "{name}");
        }
    }

    #[test]
    fn columns_go_by_size_and_stay_together() {
        let n = 16;
        let mut h = vec![0.0; n * n];
        (0..n).for_each(|j| h[j * n + j] = j as f64);
        assert_eq!(by_size(&h, n, 8), (8..16).chain(0..8).collect::<Vec<usize>>());
        assert_eq!(by_size(&h, n, 1), (0..16).rev().collect::<Vec<usize>>());
    }
}
