//! PELA: *Learning Parameter-Efficient Models with Low-Rank Approximation* (arXiv:2310.10700).
//!
//! The linears become pairs of thin ones by truncated decompositions, and a short training with the original model as its teacher
//! makes the pairs good again, before anything downstream:
//!
//! ```text
//! L = L_task + lambda_f L_fd + lambda_l L_logit + lambda_p L_wp
//! L_fd = mean over blocks of MSE(student's output, teacher's),   L_wp = mean over pairs of (max |R L - W| - epsilon)^2
//! ```
//!
//! All parameters of the student train. The reference runs the student twice a step, with different dropped paths; here once, without
//! dropped paths. Its published DeiT script leaves `lambda_p` at 0 and its Swin and ALBEF scripts at 1, which is the default here;
//! `lambda_f` is 1 as in the two former. Language models learn from text or records like those of every other training.

use clap::Args;
use rayon::prelude::*;
use refit_data::Rng;
use refit_nn::{BurnDevice, Decoder, Run};
use refit_train::BoxError;
use refit_train::train::loss::next_token;
use refit_train::train::{Rule, Scope, Terms};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::adapt::frame::{Rows, Session};
use crate::adapt::training::{self, Training};
use crate::error::{Error, Result};
use crate::factorize::layout;
use crate::factorize::ranks::{Pair, Thinness};
use crate::factorize::svd;
use crate::method::{
    Action, Claim, Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind,
    Paper, Plan, Taxonomy, Touches, Unit,
};
use crate::rewrite::{OutputType, read_matrix};

mod claim;
pub mod objective;

use objective::{Blocks, Held, distance, features, pair_of, perturbation};

/// Parameters of PELA.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Pela {
    /// How thin.
    #[command(flatten)]
    #[serde(flatten)]
    pub thinness: Thinness,
    /// Weight of the loss on the next token.
    #[arg(long, default_value_t = 1.0)]
    pub task: f64,
    /// Weight of the distance to the teacher's block outputs.
    #[arg(long, default_value_t = 1.0)]
    pub distill: f64,
    /// Weight of the distance to the teacher's logits.
    #[arg(long, default_value_t = 0.0)]
    pub logits: f64,
    /// Weight of the distance between the farthest entry of each rebuilt matrix and `epsilon`.
    #[arg(long, default_value_t = 1.0)]
    pub perturbation: f64,
    /// How far entries may move freely.
    #[arg(long, default_value_t = 1e-3)]
    pub epsilon: f64,
    /// Peak learning rate.
    #[arg(long, default_value_t = 1e-4)]
    pub learning_rate: f64,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
    /// The run.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

crate::paper_defaults!(Pela);

impl Method for Pela {
    const INFO: Info = Info {
        name: "pela",
        title: "PELA",
        summary: "Writes every linear layer as two thin ones and trains them briefly towards the original model",
        family: Family::Factorize,
        paper: Paper {
            title: "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation",
            reference: "arXiv:2310.10700",
            year: 2023,
        },
        inputs: InputSpec::TUNED,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["compact-architecture", "low-rank"],
            needs: Effort::FineTuning,
            touches: &[Touches::Weights, Touches::Architecture],
            composes_with: &["fine-tune", "rtn"],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        let name = Self::INFO.name;
        self.training.check(name, self.learning_rate)?;
        for (what, weight) in [
            ("task", self.task),
            ("distill", self.distill),
            ("logits", self.logits),
            ("perturbation", self.perturbation),
            ("epsilon", self.epsilon),
        ] {
            if !(weight >= 0.0 && weight.is_finite()) {
                return Err(Error::range(name, what, weight, "0 or more"));
            }
        }
        if self.task + self.distill + self.logits + self.perturbation == 0.0 {
            let problem = "all weights of the loss are 0, so there is nothing to learn; refit apply svd writes the pairs alone";
            return Err(Error::Conflict { method: name, problem: problem.into() });
        }
        let model = &inputs.models[0];
        let examples = training::examples(name, inputs, &self.training, 0)?;
        let config = training::language_model(name, model)?;
        let mut plan = svd::plan(self, &self.thinness, inputs, self.dtype)?;
        // Everything trains.
        for tensor in &mut plan.tensors {
            tensor.action = Action::Transform;
        }
        let trained = plan.tensors.iter().map(|t| t.shape.iter().product::<usize>() as u64).sum();
        let teacher: u64 =
            model.artifact.tensors().iter().map(|info| 4 * info.numel() as u64).sum();
        training::describe(&mut plan, model, &config, &self.training, &examples, trained);
        plan.peak_memory += 2 * teacher;
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let (name, model) = (Self::INFO.name, &inputs.models[0]);
        let examples = training::examples(name, inputs, &self.training, 0)?;
        let pairs = layout::planned(model, plan);
        let rate = self.learning_rate;
        let session = Session { inputs, plan, cx, training: &self.training, rate, dropout: 0.0 };
        let teacher = Decoder::load(&model.artifact, &BurnDevice::flex())?;
        let weights = self.weights(inputs, &pairs)?;
        let mut start = None;
        let mut lost = Vec::new();
        let prepare = |student: &mut Decoder, _: &mut Rng| {
            lost = decompose(student, inputs, &pairs, cx)?;
            start = cx.ranks.lead(|| session.perplexity(student))?.flatten();
            Ok(Scope { rules: vec![Rule::train("@all")] })
        };
        let loss = |student: &Decoder, rows: &Rows, run: &mut Run| {
            self.loss(student, &teacher, &pairs, &weights, rows, run)
        };
        let mut trained = session.train_on(&examples, prepare, |_| {}, &loss)?;
        for (key, value) in svd::report(&pairs, &lost).as_object().into_iter().flatten() {
            trained.report[key] = value.clone();
        }
        if let Some((perplexity, _)) = start {
            trained.report["held_out_perplexity_untrained"] = json!(perplexity);
        }
        trained.write_model(&session)
    }

    fn claim() -> Option<Claim> {
        Some(claim::CLAIM)
    }
}

/// Puts the best pairs for the weights into the student; what share of each matrix they lose.
fn decompose(
    student: &mut Decoder,
    inputs: &Inputs,
    pairs: &[Pair],
    cx: &Context,
) -> Result<Vec<f64>> {
    cx.progress.begin("decomposing", pairs.len() as u64, Unit::Tensors);
    let found: Result<Vec<_>> = cx.install(|| {
        let one = |pair: &Pair| {
            let found = svd::factors(inputs, pair, cx.seed);
            cx.progress.advance(1);
            found
        };
        pairs.par_iter().with_max_len(1).map(one).collect()
    });
    cx.progress.end();
    let mut lost = Vec::new();
    for (pair, (up, down, share)) in pairs.iter().zip(found?) {
        layout::install(student, &inputs.models[0].source, pair, up, down)?;
        lost.push(share);
    }
    Ok(lost)
}

impl Pela {
    /// The teacher's matrices, where entries are held near them.
    fn weights(&self, inputs: &Inputs, pairs: &[Pair]) -> Result<Vec<Vec<f32>>> {
        match self.perturbation > 0.0 {
            true => pairs.iter().map(|pair| read_matrix(&inputs.models[0], pair.site)).collect(),
            false => Ok(Vec::new()),
        }
    }

    fn loss(
        &self,
        student: &Decoder,
        teacher: &Decoder,
        pairs: &[Pair],
        weights: &[Vec<f32>],
        rows: &Rows,
        run: &mut Run,
    ) -> Result<Terms, BoxError> {
        let Rows { ids, learned, count } = rows;
        let mask = mask(learned, *count);
        let mut seen = Blocks::default();
        let precision = run.precision;
        let mut terms = Terms { items: learned.iter().filter(|l| **l).count(), ..Terms::default() };
        let mut watched = Run { precision, tap: Some(&mut seen), ..Run::plain() };
        if self.logits > 0.0 {
            let hidden = student.hidden(ids, *count, &mut watched)?;
            let ours = student.frame.logits(hidden, &mut Run::plain());
            let theirs = teacher.forward(ids, *count, &mut Run::plain())?;
            terms = terms.with("logits", self.logits, distance(ours, theirs, mask.clone()));
            if self.task > 0.0 {
                let (loss, _) = next_token(student, ids, *count, Some(learned), run)?;
                terms = terms.with("cross-entropy", self.task, loss);
            }
        } else {
            let (loss, _) = next_token(student, ids, *count, Some(learned), &mut watched)?;
            if self.task > 0.0 {
                terms = terms.with("cross-entropy", self.task, loss);
            }
        }
        if self.distill > 0.0 {
            let mut theirs = Blocks::default();
            teacher.hidden(ids, *count, &mut Run { tap: Some(&mut theirs), ..Run::plain() })?;
            if let Some(loss) = features(seen, theirs, mask) {
                terms = terms.with("features", self.distill, loss);
            }
        }
        if self.perturbation > 0.0 {
            let linears = student.blocks.iter().flat_map(|block| block.linears());
            let by_site: std::collections::HashMap<&str, _> =
                linears.filter_map(|l| Some((l.site.as_str(), pair_of(l)?))).collect();
            let held: Vec<Held> = pairs
                .iter()
                .zip(weights)
                .filter_map(|(pair, weight)| {
                    Some(Held { pair: by_site.get(pair.module())?, weight })
                })
                .collect();
            if let Some(loss) = perturbation(&held, self.epsilon) {
                terms = terms.with("perturbation", self.perturbation, loss);
            }
        }
        Ok(terms)
    }
}

/// 1 where a token or a later one of its row is learned, 0 on the padding behind; none where nothing is padded.
fn mask(learned: &[bool], rows: usize) -> Option<burn::tensor::Tensor<3>> {
    let length = learned.len() / rows.max(1);
    let ends: Vec<usize> = learned
        .chunks(length.max(1))
        .map(|row| row.iter().rposition(|l| *l).map_or(0, |at| at + 1))
        .collect();
    if ends.iter().all(|end| *end == length) {
        return None;
    }
    let values: Vec<f32> = ends
        .iter()
        .flat_map(|end| (0..length).map(move |i| f32::from(u8::from(i < *end))))
        .collect();
    let data = burn::tensor::TensorData::new(values, [rows, length, 1]);
    Some(burn::tensor::Tensor::from_data(data, &BurnDevice::flex()))
}
