//! Fisher merging: *Merging Models with Fisher-Weighted Averaging* (arXiv:2111.09832).
//!
//! ```text
//! theta = sum_k l_k F_k theta_k / sum_k l_k F_k,   F_k = (1/N) sum_x (d log p(x; theta_k) / d theta)^2
//! ```
//!
//! `F` is the diagonal of the empirical Fisher information over `N` sequences of the text that model `k` is good at, taken
//! parameter by parameter. As in the implementations that others compare with (recalled), each `F_k` is divided by its norm over
//! all parameters, and nothing counts less than `floor`, 1e-6, so that parameters that no text reaches are averaged.
//!
//! Decided here: `log p` is the mean over the tokens of a sequence; tensors that the running model does not hold as parameters are
//! averaged, and embeddings that are tied count once, with both of their uses.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use burn::module::Module;
use clap::Args;
use refit_nn::load::stored_gradient;
use refit_nn::{BurnDevice, Decoder, Run, named};
use refit_train::train::loss::next_token;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::informed;
use super::scratch::Scratch;
use crate::adapt::training::language_model;
use crate::calibrated::Calibration;
use crate::error::{Error, Result};
use crate::inputs::{Inputs, ModelInput};
use crate::merge::group::Group;
use crate::merge::kernel::{Kernel, Map, Merge, one_or_many, per_model, within};
use crate::merge::linear::Linear;
use crate::merge::program::{Program, Work};
use crate::method::{
    Context, Effort, Family, Info, Method, Output, OutputKind, Paper, Plan, Taxonomy, Touches, Unit,
};
use crate::rewrite::OutputType;

const NAME: &str = "fisher";

/// Parameters of Fisher merging.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Fisher {
    /// Weight of every model, or one for all; 1 when left out.
    #[arg(long, value_delimiter = ',', value_name = "W,W,...")]
    #[serde(deserialize_with = "one_or_many")]
    pub weight: Vec<f64>,
    /// Least information that a parameter counts with, where the norm of all is 1.
    #[arg(long, default_value_t = 1e-6)]
    pub floor: f64,
    /// Sequences that every model reads.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub samples: usize,
    /// Tokens per sequence.
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    pub sequence_length: usize,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Fisher);

impl Fisher {
    fn calibration(&self) -> Calibration {
        Calibration { samples: self.samples, sequence_length: self.sequence_length }
    }

    fn weights(&self, count: usize) -> Result<Vec<f64>> {
        let weights = per_model(NAME, "weight", &self.weight, count, 1.0)?;
        match weights.iter().find(|w| **w < 0.0) {
            Some(w) => Err(Error::range(NAME, "weight", w, "a number that is 0 or more")),
            None => Ok(weights),
        }
    }

    fn program(&self, inputs: &Inputs) -> Result<Program> {
        let mean = Linear { weight: self.weights(inputs.models.len())?, ..Linear::default() };
        Program::of_whole_models(inputs, &mean.kernel(inputs.models.len())?, self.dtype)
    }
}

/// Squared gradients of one model, summed over sequences, by the name and in the layout of its files.
fn information(
    model: &ModelInput,
    sequences: &[Vec<u32>],
    advance: &dyn Fn(),
) -> Result<BTreeMap<String, Vec<f32>>> {
    let decoder = Decoder::load(&model.artifact, &BurnDevice::flex())?;
    let config = decoder.config().clone();
    let decoder = decoder.train();
    let mut sums: HashMap<String, Vec<f32>> = HashMap::new();
    for sequence in sequences {
        let (loss, _) = next_token(&decoder, sequence, 1, None, &mut Run::checkpointed())?;
        let mut gradients = loss.backward();
        named::gradients(&decoder, &mut gradients, |name, gradient| {
            let sum = sums.entry(name.to_owned()).or_insert_with(|| vec![0.0; gradient.len()]);
            sum.iter_mut().zip(&gradient).for_each(|(s, g)| *s += g * g);
        });
        advance();
    }
    let mut found = BTreeMap::new();
    for (name, values) in sums {
        if let Ok(info) = model.artifact.tensor(&name) {
            let values = stored_gradient(&config, &name, &info.shape, values);
            found.insert(name, values);
        }
    }
    Ok(found)
}

impl Method for Fisher {
    const INFO: Info = Info {
        name: NAME,
        title: "Fisher merging",
        summary: "Averages models parameter by parameter, each as much as its text depends on that parameter",
        family: Family::Merge,
        paper: Paper {
            title: "Merging Models with Fisher-Weighted Averaging",
            reference: "arXiv:2111.09832",
            year: 2021,
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
        within(NAME, "floor", &[self.floor], (f64::MIN_POSITIVE, 1.0))?;
        self.calibration().check(NAME)?;
        for (at, model) in inputs.models.iter().enumerate() {
            language_model(NAME, model)?;
            informed::draw(&self.calibration(), inputs, at, 0)?;
        }
        let program = self.program(inputs)?;
        let mut plan = Plan::of(self);
        program.describe(inputs, &mut plan);
        plan.notes.push(informed::describe(inputs));
        let numel: u64 = inputs.models[0].artifact.tensors().iter().map(|t| t.numel() as u64).sum();
        // The model, its gradients, and their squares.
        plan.peak_memory = plan.peak_memory.max(4 * 4 * numel);
        plan.steps.insert(
            0,
            format!(
                "take the gradients of {} sequences of {} tokens in every model",
                self.samples, self.sequence_length
            ),
        );
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        refit_train::heap::keep();
        let weights = self.weights(inputs.models.len())?;
        let scratch = Arc::new(Scratch::new(&cx.temp_dir)?);
        let mut places: BTreeMap<String, Vec<(u64, f32)>> = BTreeMap::new();
        for (at, model) in inputs.models.iter().enumerate() {
            let sequences = informed::draw(&self.calibration(), inputs, at, cx.seed)?;
            cx.progress.begin(
                &format!("gradients of {}", model.source),
                sequences.len() as u64,
                Unit::Steps,
            );
            let found = cx.install(|| information(model, &sequences, &|| cx.progress.advance(1)));
            cx.progress.end();
            let found = found?;
            let square =
                |values: &Vec<f32>| values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            let norm = found.values().map(square).sum::<f64>().sqrt();
            if !(norm.is_finite() && norm > 0.0) {
                let problem = "its gradients vanish or overflow on this text".to_owned();
                return Err(Error::BadData { source_name: model.source.clone(), problem });
            }
            let scale = (weights[at] / norm) as f32;
            for (name, values) in found {
                let place = scratch.reserve(values.len());
                scratch.write(place, &values)?;
                places.entry(name).or_default().push((place, scale));
            }
        }
        let mut program = self.program(inputs)?;
        for (name, found) in places {
            let Some(job) = program.jobs.get_mut(&name) else { continue };
            if let (Work::Merge { kernel, .. }, true) =
                (&mut job.work, found.len() == inputs.models.len())
            {
                let floor = weights.iter().map(|w| (w * self.floor) as f32).collect();
                *kernel = Arc::new(Weighted { scratch: scratch.clone(), places: found, floor });
            }
        }
        program.run(inputs, plan, cx)
    }
}

/// One tensor.
#[derive(Debug)]
struct Weighted {
    scratch: Arc<Scratch>,
    /// Where the information of every model lies, and what it is multiplied by.
    places: Vec<(u64, f32)>,
    floor: Vec<f32>,
}

impl Kernel for Weighted {
    fn looks(&self) -> bool {
        false
    }

    fn prepare<'k>(&'k self, _: &Group) -> Result<Map<'k>> {
        Ok(Box::new(move |piece, out| {
            let mut information = vec![0f32; piece.len()];
            let (mut sums, mut weights) = (vec![0f64; piece.len()], vec![0f64; piece.len()]);
            for ((input, (place, scale)), floor) in
                piece.inputs.iter().zip(&self.places).zip(&self.floor)
            {
                let at = place + 4 * piece.start as u64;
                self.scratch.read(at, &mut information).expect(
                    "invariant: it was written by this process, and nobody else has the file",
                );
                for ((sum, weight), (x, f)) in
                    sums.iter_mut().zip(&mut weights).zip(input.iter().zip(&information))
                {
                    let f = f64::from((f * scale).max(*floor));
                    *sum += f * f64::from(*x);
                    *weight += f;
                }
            }
            for ((out, sum), weight) in out.iter_mut().zip(sums).zip(weights) {
                *out = (sum / weight) as f32;
            }
        }))
    }
}
