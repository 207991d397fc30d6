//! What each choice loses at each matrix.
//!
//! **With text.** GPTQ leaves `tr(E H E^T) = sum_ij (e_ij / U_jj)^2` at the outputs of a matrix, where `U^T U = H^{-1}` and `e_ij`
//! is what rounding weight `(i, j)` lost at the moment it was rounded. That is predicted here by what rounding loses of the weights
//! as they are: errors that came before shift a weight within its grid, which leaves the distribution of what rounding loses
//! alone. One Cholesky factor per input then serves all choices, and a choice costs one rounding.
//!
//! How much the loss cares for an error at the outputs of one matrix is measured: the matrix alone is rounded to nearest on a probe
//! grid, the blocks from its own on are run again, and the divergence of the predictions from those of the model as it is
//! (mean KL in nats per token), divided by the error `tr(E G E^T)` that the probe made, is its weight. To second order the
//! divergence is a quadratic form of the error, so a weight holds for errors of other sizes, and what matrices lose adds up.
//!
//! **Without text.** The relative squared error of the weights, every matrix alike: the noise that a layer adds relative to its
//! signal depends on its relative error, not on its number of weights.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use rayon::prelude::*;
use refit_nn::{BurnDevice, Decoder, Frame, Run};
use refit_store::architecture::Site;
use refit_train::calibrate::{self, BlockStats, Outcome};
use refit_train::eval::{self, CausalLm, Head, Options, Reference, ReferenceCache, Segment};
use refit_train::observe::{ColumnStats, StatsRequest};

use super::menu::{Choice, Menu};
use crate::calibrated::{narrow, solver_of};
use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::method::{Context, Unit};
use crate::quantize::grid::{Grid, ScaleRule};
use crate::quantize::output_error::total_error;
use crate::rewrite::{check_finite, read_matrix, shape_of};
use crate::solver::SolverOptions;

/// What is known of one matrix.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// What each choice loses, per token where there are tokens.
    pub errors: Vec<f64>,
    /// The energy of what it loses from: `tr(W G W^T)` per token, or `|W|^2`.
    pub signal: f64,
    /// What the probe loses, rounded to nearest.
    pub probe: f64,
}

/// Measured matrices by name.
pub type Measurements = BTreeMap<String, Measured>;

/// Squared errors of rounding `weights` `[rows, inputs]` to each choice, with a weight for each column, summed.
pub fn rounding_errors(
    weights: &[f32],
    inputs: usize,
    choices: &[Choice],
    rule: ScaleRule,
    columns: &[f32],
) -> Vec<f64> {
    let of_row = |row: &[f32]| -> Vec<f64> {
        let of_choice = |choice: &Choice| {
            let grid = choice.grid(rule);
            let groups = row.chunks(choice.group).zip(columns.chunks(choice.group));
            groups.map(|(group, columns)| group_error(&grid, group, columns)).sum()
        };
        choices.iter().map(of_choice).collect()
    };
    let rows: Vec<Vec<f64>> = weights.par_chunks(inputs.max(1)).map(of_row).collect();
    let mut sums = vec![0.0; choices.len()];
    for row in rows {
        sums.iter_mut().zip(row).for_each(|(sum, error)| *sum += error);
    }
    sums
}

/// Eight sums side by side, which vectorize.
fn group_error(grid: &Grid, group: &[f32], columns: &[f32]) -> f64 {
    const LANES: usize = 8;
    let step = grid.fit(group);
    let lost = |w: f32, c: f32| (w - grid.snap(w, step)).powi(2) * c;
    let mut sums = [0f32; LANES];
    let (weights, columns) = (group.chunks_exact(LANES), columns.chunks_exact(LANES));
    let rest: f32 =
        weights.remainder().iter().zip(columns.remainder()).map(|(w, c)| lost(*w, *c)).sum();
    for (weights, columns) in weights.zip(columns) {
        for lane in 0..LANES {
            sums[lane] += lost(weights[lane], columns[lane]);
        }
    }
    f64::from(sums.iter().sum::<f32>() + rest)
}

/// Measures the weights alone.
///
/// # Errors
/// Files that cannot be read, values that are not finite.
pub fn of_weights(
    model: &ModelInput,
    menu: &Menu,
    rule: ScaleRule,
    cx: &Context,
) -> Result<Measurements> {
    cx.progress.begin("measuring", menu.sites.len() as u64, Unit::Tensors);
    let measured = cx.install(|| {
        let measure = |(site, choices): (&&Site, &Vec<Choice>)| {
            let weights = read_matrix(model, site)?;
            let inputs = shape_of(site).1;
            let errors = rounding_errors(&weights, inputs, choices, rule, &vec![1.0; inputs]);
            let signal = weights.iter().map(|w| f64::from(*w).powi(2)).sum();
            cx.progress.advance(1);
            Ok((site.name.clone(), Measured { errors, signal, probe: 0.0 }))
        };
        menu.sites.par_iter().zip(&menu.choices).with_max_len(1).map(measure).collect()
    });
    cx.progress.end();
    measured
}

/// Measures at the outputs of matrices while text runs through the model as it is.
///
/// # Errors
/// Whatever running the model meets, inputs that cannot be factored.
pub fn of_outputs(
    model: &ModelInput,
    menu: &Menu,
    rule: ScaleRule,
    percdamp: f64,
    probe: &Grid,
    sequences: &[Vec<u32>],
    cx: &Context,
) -> Result<Measurements> {
    let choices: BTreeMap<&str, (&Site, &[Choice])> = menu
        .sites
        .iter()
        .zip(&menu.choices)
        .map(|(site, choices)| (site.name.as_str(), (*site, choices.as_slice())))
        .collect();
    let mut measured = Measurements::new();
    let mut visit =
        |_: usize, block: &mut refit_nn::block::Block, stats: &BlockStats| -> Result<Outcome> {
            for group in stats.groups() {
                let mut columns = None;
                for module in &group.sites {
                    let tensor = format!("{module}.weight");
                    let (site, choices) = *choices.get(tensor.as_str()).ok_or_else(|| {
                        Error::tensor(&model.source, &tensor, "the architecture does not list it")
                    })?;
                    let linear = block.linear_mut(module).ok_or_else(|| {
                        Error::tensor(&model.source, &tensor, "the block does not hold it")
                    })?;
                    let weights = refit_nn::ops::to_vec(&linear.weight());
                    check_finite(&model.source, &tensor, &weights, 0)?;
                    let columns = match &columns {
                        Some(columns) => columns,
                        None => columns.insert(Columns::of(site, &group.stats, percdamp)?),
                    };
                    measured.insert(tensor, columns.measure(&weights, choices, rule, probe));
                }
            }
            Ok(Outcome::Unchanged)
        };
    cx.progress.begin("measuring", model.artifact.architecture().layers() as u64, Unit::Blocks);
    let progress = |done: u64, _: u64| cx.progress.advance(u64::from(done > 0));
    let options = calibrate::Options::new(StatsRequest::GRAM);
    let done =
        cx.install(|| calibrate::run(&model.artifact, sequences, &options, &mut visit, &progress));
    cx.progress.end();
    done?;
    match menu.sites.iter().find(|site| !measured.contains_key(&site.name)) {
        Some(site) => {
            let problem = "no block of the running model holds it, so it was not measured";
            Err(Error::tensor(&model.source, &site.name, problem))
        }
        None => Ok(measured),
    }
}

/// What the inputs of some matrices say of errors.
struct Columns {
    /// `G`, per token.
    gram: Vec<f32>,
    /// `1 / U_jj^2`, per token.
    prices: Vec<f32>,
}

impl Columns {
    fn of(site: &Site, stats: &ColumnStats, percdamp: f64) -> Result<Self> {
        let solver =
            solver_of(site, stats, SolverOptions { percdamp, act_order: false, block: 128 })?;
        let gram = stats.gram().expect("invariant: the Gram matrix was asked for");
        let (n, rows) = (stats.columns(), stats.rows().max(1) as f64);
        let price = |(j, u): (usize, &f32)| match gram[j * n + j] > 0.0 {
            true => (1.0 / (f64::from(*u).powi(2) * rows)) as f32,
            false => 0.0,
        };
        let prices = solver.diagonal().iter().enumerate().map(price).collect();
        let gram: Vec<f64> = gram.into_iter().map(|value| value / rows).collect();
        Ok(Self { gram: narrow(&gram), prices })
    }

    fn measure(
        &self,
        weights: &[f32],
        choices: &[Choice],
        rule: ScaleRule,
        probe: &Grid,
    ) -> Measured {
        let inputs = self.prices.len();
        let mut change = weights.to_vec();
        change.par_chunks_mut(inputs).for_each(|row| probe.snap_row(row, probe_group(inputs)));
        change.par_iter_mut().zip(weights).for_each(|(rounded, w)| *rounded -= w);
        Measured {
            errors: rounding_errors(weights, inputs, choices, rule, &self.prices),
            signal: total_error(weights, inputs, &self.gram),
            probe: total_error(&change, inputs, &self.gram),
        }
    }
}

/// Groups of the probe: 32 where that divides a row.
fn probe_group(inputs: usize) -> usize {
    if inputs.is_multiple_of(32) { 32 } else { inputs }
}

/// Mean KL per token that the probe causes at each matrix alone, on some text.
///
/// # Errors
/// Whatever running the model meets.
pub fn divergences(
    model: &ModelInput,
    menu: &Menu,
    probe: &Grid,
    sequences: &[Vec<u32>],
    cx: &Context,
) -> Result<BTreeMap<String, f64>> {
    cx.progress.begin("weighing", menu.sites.len() as u64, Unit::Tensors);
    let measured = cx.install(|| {
        let device = BurnDevice::flex();
        let mut decoder = Decoder::load(&model.artifact, &device)?;
        let window = sequences.iter().map(Vec::len).max().unwrap_or(0);
        let options = Options { window: Some(window), resamples: 0, ..Options::default() };
        let text: Vec<Segment> =
            sequences.iter().map(|ids| Segment::new("", ids.clone())).collect();
        let reference = ReferenceCache::fill(&decoder, &text, &options)?;
        let passes: Vec<Pass> =
            sequences.iter().map(|ids| Pass::of(&decoder, ids)).collect::<Result<_>>()?;
        let mut found = BTreeMap::new();
        for site in &menu.sites {
            let inputs = shape_of(site).1;
            let linear = decoder.linear_mut(&site.name).ok_or_else(|| {
                Error::tensor(&model.source, &site.name, "the running model does not hold it")
            })?;
            let original = linear.op.clone();
            let mut weights = refit_nn::ops::to_vec(&linear.weight());
            weights.par_chunks_mut(inputs).for_each(|row| probe.snap_row(row, probe_group(inputs)));
            linear.set_weight(weights, &device);
            let resumed =
                Resumed { decoder: &decoder, from: site.layer.unwrap_or(0), passes: &passes };
            let reference = Reference::Cache(&reference);
            let measured = eval::perplexity(&resumed, &text, &options, reference, &|_, _| {})?;
            found.insert(site.name.clone(), measured.kl_to_reference.unwrap_or(0.0).max(0.0));
            let linear = decoder.linear_mut(&site.name).expect("invariant: it was there before");
            linear.op = original;
            cx.progress.advance(1);
        }
        Ok(found)
    });
    cx.progress.end();
    measured
}

/// What enters each block of the model as it is, for one sequence.
struct Pass {
    ids: Vec<u32>,
    inputs: Vec<Tensor<3>>,
}

impl Pass {
    fn of(decoder: &Decoder, ids: &[u32]) -> Result<Self> {
        let context = decoder.frame.context(0, ids.len());
        let mut inputs = vec![decoder.frame.embed(ids, 1, 0)?];
        for (index, block) in decoder.blocks.iter().enumerate() {
            let x = inputs[index].clone();
            inputs.push(block.forward(x, &context, index, &mut Run::plain()));
        }
        Ok(Self { ids: ids.to_vec(), inputs })
    }
}

/// A decoder that is as it was before block `from`.
struct Resumed<'a> {
    decoder: &'a Decoder,
    from: usize,
    passes: &'a [Pass],
}

impl CausalLm for Resumed<'_> {
    fn context(&self) -> usize {
        CausalLm::context(self.decoder)
    }

    fn hidden(&self, ids: &[u32]) -> refit_train::Result<Tensor<3>> {
        let pass = self.passes.iter().find(|pass| pass.ids == ids);
        let mut x = match pass {
            Some(pass) => pass.inputs[self.from].clone(),
            None => return CausalLm::hidden(self.decoder, ids),
        };
        let frame: &Frame = &self.decoder.frame;
        let context = frame.context(0, ids.len());
        for (index, block) in self.decoder.blocks.iter().enumerate().skip(self.from) {
            x = block.forward(x, &context, index, &mut Run::plain());
        }
        Ok(x)
    }

    fn head(&self) -> &dyn Head {
        &self.decoder.frame
    }
}

/// A weight for each matrix from divergences and what the probe lost; matrices whose divergence is lost in rounding count a
/// hundredth of the median.
pub fn weights(
    measured: &Measurements,
    divergences: &BTreeMap<String, f64>,
) -> BTreeMap<String, f64> {
    let ratio = |name: &String| {
        let probe = measured[name].probe;
        let found = divergences.get(name).copied().unwrap_or(0.0);
        if probe > 0.0 { Some(found / probe) } else { None }
    };
    let mut known: Vec<f64> = measured.keys().filter_map(ratio).collect();
    known.sort_by(f64::total_cmp);
    let median = known.get(known.len() / 2).copied().unwrap_or(1.0);
    let least = if median > 0.0 { median / 100.0 } else { 1.0 };
    let weight = |name: &String| (name.clone(), ratio(name).unwrap_or(median).max(least));
    measured.keys().map(weight).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::gptq::rule::GridRule;
    use crate::solver::ColumnSolver;
    use crate::testing::{Stream, correlated_gram, output_error};

    #[test]
    fn what_gptq_leaves_is_foreseen() {
        let (n, rows) = (128, 48);
        let h = correlated_gram(n, 700, 1);
        let weights = Stream::new(2).normals(rows * n);
        let options = SolverOptions { percdamp: 0.01, act_order: false, block: 128 };
        let solver = ColumnSolver::new(h.clone(), n, options).unwrap();
        let prices: Vec<f32> = solver.diagonal().iter().map(|u| 1.0 / (u * u)).collect();
        let mut choices = Vec::new();
        for bits in [2, 3, 4] {
            for symmetric in [true, false] {
                choices.extend([32, 128].map(|group| Choice { bits, symmetric, group }));
            }
        }
        let foreseen = rounding_errors(&weights, n, &choices, ScaleRule::Full, &prices);
        let mut naive = 0.0;
        for (choice, foreseen) in choices.iter().zip(foreseen) {
            let grid = choice.grid(ScaleRule::Full);
            let mut rule = GridRule::new(grid, &weights, n, choice.group, solver.order(), true);
            let mut solved = weights.clone();
            solver.solve(&mut solved, &mut rule);
            let left = output_error(&weights, &solved, &h, n);
            let ratio = foreseen / left;
            // Damping is part of the prediction, and clamping is not foreseen at 2 bits.
            assert!((0.7..1.3).contains(&ratio), "{choice:?}: {foreseen} for {left}");
            let mut rounded = weights.clone();
            rounded.chunks_mut(n).for_each(|row| grid.snap_row(row, choice.group));
            naive += output_error(&weights, &rounded, &h, n) / left;
        }
        assert!(
            naive / choices.len() as f64 > 1.5,
            "rounding to nearest would foresee as well: {naive}"
        );
    }

    #[test]
    fn errors_of_weights_are_those_of_the_grid() {
        let weights = Stream::new(3).normals(6 * 72);
        let choices = [
            Choice { bits: 3, symmetric: true, group: 36 },
            Choice { bits: 2, symmetric: false, group: 72 },
        ];
        let found = rounding_errors(&weights, 72, &choices, ScaleRule::Full, &[1.0; 72]);
        for (choice, found) in choices.iter().zip(found) {
            let grid = choice.grid(ScaleRule::Full);
            let expected: f64 =
                weights.chunks(72).map(|row| grid.row_error(row, choice.group)).sum();
            assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
        }
    }

    #[test]
    fn weights_have_a_floor_and_unknown_ones_the_median() {
        let of = |probe| Measured { probe, ..Measured::default() };
        let measured: Measurements = [("a", 1.0), ("b", 2.0), ("c", 1.0), ("d", 0.0)]
            .map(|(n, p)| (n.to_owned(), of(p)))
            .into();
        let divergences =
            [("a", 0.5), ("b", 4.0), ("c", 0.0)].map(|(n, d)| (n.to_owned(), d)).into();
        let weights = weights(&measured, &divergences);
        assert_eq!(weights["a"], 0.5);
        assert_eq!(weights["b"], 2.0);
        assert_eq!(weights["c"], 0.005);
        assert_eq!(weights["d"], 0.5);
    }
}
