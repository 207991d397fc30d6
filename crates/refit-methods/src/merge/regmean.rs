//! RegMean: *Dataless Knowledge Fusion by Merging Weights of Language Models* (arXiv:2212.09849).
//!
//! A merged linear should answer as each model's does on what that model reads there. Least squares has a closed form, from inner
//! products of inputs alone:
//!
//! ```text
//! W = (sum_k W_k G_k) (sum_k G_k)^-1,   G_k = X_k^T X_k
//! ```
//!
//! with `W` `[out, in]`. Entries of `G_k` off the diagonal are multiplied by `reduce`, 0.95 here, so that `G` is well conditioned.
//! Everything but the linears of blocks is averaged.
//!
//! Decided here: `G_k` is divided by its number of tokens, so that models whose texts differ in length weigh the same; a hundred
//! thousandth of the mean diagonal is added where the factorization asks for it; matrices that are stored `[in, out]` (GPT-2) are
//! averaged, and the plan says so.

use std::collections::BTreeMap;
use std::sync::Arc;

use clap::Args;
use refit_nn::block::Block;
use refit_store::architecture::Layout;
use refit_train::calibrate::{self, BlockStats, Outcome};
use refit_train::observe::StatsRequest;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::informed;
use super::scratch::Scratch;
use crate::calibrated::Calibration;
use crate::error::Result;
use crate::inputs::Inputs;
use crate::linalg::{Strided, cholesky, invert_lower, multiply_add};
use crate::merge::group::Group;
use crate::merge::kernel::{Kernel, Map, Merge, within};
use crate::merge::linear::Linear;
use crate::merge::program::{Program, Work};
use crate::method::{
    Context, Effort, Family, Info, Method, Output, OutputKind, Paper, Plan, Taxonomy, Touches, Unit,
};
use crate::rewrite::OutputType;

const NAME: &str = "regmean";

/// Parameters of RegMean.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RegMean {
    /// Factor on inner products of different inputs, 0 (a mean weighted by the size of inputs) to 1.
    #[arg(long, default_value_t = 0.95)]
    pub reduce: f64,
    /// Sequences that every model reads.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub samples: usize,
    /// Tokens per sequence.
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub sequence_length: usize,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(RegMean);

/// Where the inner products of a linear's inputs lie, for every model.
#[derive(Clone, Debug)]
struct Grams {
    width: usize,
    places: Vec<u64>,
}

impl RegMean {
    fn calibration(&self) -> Calibration {
        Calibration { samples: self.samples, sequence_length: self.sequence_length }
    }

    fn program(&self, inputs: &Inputs) -> Result<Program> {
        let mean = Linear::default().kernel(inputs.models.len())?;
        Program::of_whole_models(inputs, &mean, self.dtype)
    }

    /// The linears that are solved for.
    fn solved(inputs: &Inputs) -> Vec<String> {
        let linears = inputs.models[0].artifact.architecture().linears();
        let held = linears.filter(|site| site.layout == Layout::OutIn && site.stored);
        held.map(|site| site.name.clone()).collect()
    }
}

impl Method for RegMean {
    const INFO: Info = Info {
        name: NAME,
        title: "RegMean",
        summary: "Merges models so that every linear answers as each model's own does on that model's text",
        family: Family::Merge,
        paper: Paper {
            title: "Dataless Knowledge Fusion by Merging Weights of Language Models",
            reference: "arXiv:2212.09849",
            year: 2022,
        },
        inputs: informed::INPUTS,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["reuse", "merging", "data-informed"],
            needs: Effort::Calibration,
            touches: &[Touches::Weights],
            composes_with: &["rtn", "finequant"],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        within(NAME, "reduce", &[self.reduce], (0.0, 1.0))?;
        self.calibration().check(NAME)?;
        for at in 0..inputs.models.len() {
            informed::draw(&self.calibration(), inputs, at, 0)?;
        }
        let program = self.program(inputs)?;
        let mut plan = Plan::of(self);
        program.describe(inputs, &mut plan);
        plan.notes.push(informed::describe(inputs));
        self.calibration().describe(&mut plan, &inputs.models[0]);
        let solved = Self::solved(inputs);
        let all = inputs.models[0].artifact.architecture().linears().count();
        plan.steps.push(format!("solve for {} linears, average everything else", solved.len()));
        if solved.len() < all {
            plan.warnings.push(format!(
                "{} matrices are stored [in, out]: they are averaged",
                all - solved.len()
            ));
        }
        let widest = inputs.models[0]
            .artifact
            .architecture()
            .linears()
            .filter_map(|s| s.out_in())
            .map(|s| s.1)
            .max();
        plan.peak_memory +=
            (3 + inputs.models.len() as u64) * 8 * (widest.unwrap_or(0) as u64).pow(2);
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let scratch = Arc::new(Scratch::new(&cx.temp_dir)?);
        let mut grams: BTreeMap<String, Grams> = BTreeMap::new();
        for (at, model) in inputs.models.iter().enumerate() {
            let sequences = informed::draw(&self.calibration(), inputs, at, cx.seed)?;
            let layers = model.artifact.architecture().layers() as u64;
            cx.progress.begin(&format!("reading with {}", model.source), layers, Unit::Blocks);
            let mut visit = |_: usize, _: &mut Block, stats: &BlockStats| -> Result<Outcome> {
                for group in stats.groups() {
                    let gram = group.stats.gram().expect("invariant: it was asked for");
                    let width = (gram.len() as f64).sqrt() as usize;
                    let share = 1.0 / group.stats.rows().max(1) as f64;
                    let values: Vec<f32> = gram.iter().map(|x| (x * share) as f32).collect();
                    let place = scratch.reserve(values.len());
                    scratch.write(place, &values)?;
                    for site in &group.sites {
                        let grams = grams
                            .entry(format!("{site}.weight"))
                            .or_insert_with(|| Grams { width, places: Vec::new() });
                        grams.places.push(place);
                    }
                }
                Ok(Outcome::Unchanged)
            };
            let options = calibrate::Options::new(StatsRequest::GRAM);
            let advance = |done: u64, _total: u64| cx.progress.advance(u64::from(done > 0));
            let read = cx.install(|| {
                calibrate::run(&model.artifact, &sequences, &options, &mut visit, &advance)
                    .map(drop)
            });
            cx.progress.end();
            read?;
        }
        let mut program = self.program(inputs)?;
        for name in Self::solved(inputs) {
            let (Some(job), Some(found)) = (program.jobs.get_mut(&name), grams.remove(&name))
            else {
                continue;
            };
            if let (Work::Merge { kernel, .. }, true) =
                (&mut job.work, found.places.len() == inputs.models.len())
            {
                let scratch = scratch.clone();
                *kernel = Arc::new(Solve { scratch, grams: found, reduce: self.reduce });
            }
        }
        program.run(inputs, plan, cx)
    }
}

/// One linear.
#[derive(Debug)]
struct Solve {
    scratch: Arc<Scratch>,
    grams: Grams,
    reduce: f64,
}

impl Kernel for Solve {
    fn prepare<'k>(&'k self, group: &Group) -> Result<Map<'k>> {
        let n = self.grams.width;
        let mut grams = Vec::with_capacity(self.grams.places.len());
        for place in &self.grams.places {
            let mut values = vec![0f32; n * n];
            self.scratch.read(*place, &mut values)?;
            let mut gram: Vec<f64> = values.iter().map(|x| f64::from(*x)).collect();
            for (i, row) in gram.chunks_exact_mut(n).enumerate() {
                for (j, x) in row.iter_mut().enumerate() {
                    *x *= if i == j { 1.0 } else { self.reduce };
                }
            }
            grams.push(gram);
        }
        let mixes = mixes(&grams, n).ok_or_else(|| {
            group.error("what its inputs have in common cannot be inverted; give more text")
        })?;
        Ok(Box::new(move |piece, out| {
            let rows = piece.len() / n;
            out.fill(0.0);
            for (input, mix) in piece.inputs.iter().zip(&mixes) {
                let a = Strided { data: input, row: n, column: 1 };
                let b = Strided { data: &mix[..], row: n, column: 1 };
                multiply_add((rows, n, n), 1.0, a, b, out, n);
            }
        }))
    }
}

/// `G_k (sum G)^-1` for every model.
fn mixes(grams: &[Vec<f64>], n: usize) -> Option<Vec<Vec<f32>>> {
    let mut sum = vec![0f64; n * n];
    grams.iter().for_each(|gram| sum.iter_mut().zip(gram).for_each(|(s, g)| *s += g));
    let mean = (0..n).map(|j| sum[j * n + j]).sum::<f64>() / n.max(1) as f64;
    if !(mean.is_finite() && mean > 0.0) {
        return None;
    }
    // Inputs that are always 0 say nothing: there the models are averaged.
    let mut grams = grams.to_vec();
    let count = grams.len() as f64;
    for j in 0..n {
        if sum[j * n + j] <= 1e-12 * mean {
            grams.iter_mut().for_each(|gram| gram[j * n + j] += mean / count);
            sum[j * n + j] += mean;
        }
    }
    let mut damping = 0.0;
    let lower = loop {
        let mut damped = sum.clone();
        (0..n).for_each(|j| damped[j * n + j] += damping * mean);
        if cholesky(&mut damped, n).is_ok() {
            break damped;
        }
        damping = if damping == 0.0 { 1e-5 } else { 10.0 * damping };
        if damping > 1.0 {
            return None;
        }
    };
    if damping > 0.0 {
        // The same is added to every model's share, so that models that agree stay as they are.
        let each = damping * mean / count;
        grams.iter_mut().for_each(|gram| (0..n).for_each(|j| gram[j * n + j] += each));
    }
    let inverse = invert_lower(&lower, n);
    let mut whole = vec![0f64; n * n];
    // (L L^T)^-1 = L^-T L^-1.
    let transposed = Strided { data: &inverse[..], row: 1, column: n };
    let plain = Strided { data: &inverse[..], row: n, column: 1 };
    multiply_add((n, n, n), 1.0, transposed, plain, &mut whole, n);
    let mix = |gram: &Vec<f64>| {
        let mut mix = vec![0f64; n * n];
        let a = Strided { data: &gram[..], row: n, column: 1 };
        multiply_add(
            (n, n, n),
            1.0,
            a,
            Strided { data: &whole[..], row: n, column: 1 },
            &mut mix,
            n,
        );
        mix.into_iter().map(|x| x as f32).collect()
    };
    Some(grams.iter().map(mix).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Stream, correlated_gram};

    fn times(w: &[f32], mix: &[f32], n: usize) -> Vec<f32> {
        let mut out = vec![0f32; w.len()];
        for (out, w) in out.chunks_mut(n).zip(w.chunks(n)) {
            for (w, mix) in w.iter().zip(mix.chunks(n)) {
                out.iter_mut().zip(mix).for_each(|(o, m)| *o += w * m);
            }
        }
        out
    }

    fn merged(weights: &[Vec<f32>], grams: &[Vec<f64>], n: usize) -> Vec<f32> {
        let mixes = mixes(grams, n).unwrap();
        let parts = weights.iter().zip(&mixes).map(|(w, mix)| times(w, mix, n));
        parts.fold(vec![0f32; weights[0].len()], |sum, part| {
            sum.iter().zip(&part).map(|(a, b)| a + b).collect()
        })
    }

    /// `sum_k tr((W - W_k) G_k (W - W_k)^T)`.
    fn loss(w: &[f32], weights: &[Vec<f32>], grams: &[Vec<f64>], n: usize) -> f64 {
        let mut total = 0.0;
        for (own, gram) in weights.iter().zip(grams) {
            for (w, own) in w.chunks(n).zip(own.chunks(n)) {
                let d: Vec<f64> = w.iter().zip(own).map(|(a, b)| f64::from(a - b)).collect();
                for i in 0..n {
                    (0..n).for_each(|j| total += d[i] * gram[i * n + j] * d[j]);
                }
            }
        }
        total
    }

    #[test]
    fn the_solution_is_the_least_squares_one() {
        let n = 12;
        let grams =
            [correlated_gram(n, 60, 1), correlated_gram(n, 60, 2), correlated_gram(n, 60, 3)];
        let mut stream = Stream::new(4);
        let weights: Vec<Vec<f32>> = (0..3).map(|_| stream.normals(5 * n)).collect();
        let found = merged(&weights, &grams, n);
        let best = loss(&found, &weights, &grams, n);
        for step in [1e-2f32, -1e-2] {
            for at in 0..found.len() {
                let mut other = found.clone();
                other[at] += step;
                assert!(loss(&other, &weights, &grams, n) > best);
            }
        }
        let mean: Vec<f32> =
            (0..5 * n).map(|i| weights.iter().map(|w| w[i]).sum::<f32>() / 3.0).collect();
        assert!(loss(&mean, &weights, &grams, n) > 1.05 * best);
    }

    #[test]
    fn equal_models_stay_and_dead_inputs_are_averaged() {
        let n = 8;
        let mut grams = [correlated_gram(n, 30, 5), correlated_gram(n, 4, 6)];
        let same = Stream::new(1).normals(3 * n);
        let found = merged(&[same.clone(), same.clone()], &grams, n);
        assert!(found.iter().zip(&same).all(|(a, b)| (a - b).abs() < 1e-4));
        for gram in &mut grams {
            for j in 0..n {
                (gram[2 * n + j], gram[j * n + 2]) = (0.0, 0.0);
            }
        }
        let other = Stream::new(2).normals(3 * n);
        let found = merged(&[same.clone(), other.clone()], &grams, n);
        for row in 0..3 {
            let mean = f32::midpoint(same[row * n + 2], other[row * n + 2]);
            assert!((found[row * n + 2] - mean).abs() < 1e-4);
        }
        // Few inputs: the sum is singular, and still there is an answer.
        let thin = [correlated_gram(n, 2, 7), correlated_gram(n, 2, 8)];
        assert!(merged(&[same, other], &thin, n).iter().all(|x| x.is_finite()));
        assert!(mixes(&[vec![0.0; n * n]], n).is_none());
    }
}
