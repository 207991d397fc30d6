//! LP-FT: *Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution* (Kumar et al. 2022,
//! arXiv:2202.10054).
//!
//! Fine-tuning from a random head first bends the features towards that head; from the head of a linear probe they have
//! little reason to move. So:
//!
//! 1. fit a linear probe on frozen features ([`super::LinearProbe`]);
//! 2. fine-tune everything from there, on the mean cross-entropy of the same examples.
//!
//! `--from-head random` skips the first step: plain fine-tuning with a new head, so that probe, fine-tuning and both can be
//! compared. The dropout that transformers has in encoders while training is not applied. EfficientNet's normalizations train
//! as they are used at inference, scale and shift with frozen statistics.

use clap::Args;
use refit_nn::vision::Vision;
use refit_nn::{BurnDevice, Run, TextClassifier, Trainable};
use refit_train::BoxError;
use refit_train::logistic::Head;
use refit_train::train::{At, Order, Terms};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::data::{self, Content, Examples, Limits};
use super::features::{self, Trunk};
use super::options::ProbeOptions;
use super::write::{self, Layout};
use super::{Fitted, batch_loss, describe, fit, mixed_kinds, random_head, trained_values};
use crate::adapt::frame::{self, Session, Trained};
use crate::adapt::training::Training;
use crate::error::Result;
use crate::method::{
    Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper, Plan,
    Taxonomy, Touches,
};
use crate::rewrite::OutputType;

/// Where fine-tuning begins.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum FromHead {
    /// The head of a linear probe: LP-FT.
    #[default]
    Probe,
    /// A random head: plain fine-tuning.
    Random,
}

/// Parameters of LP-FT.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct LpFt {
    /// The head that fine-tuning begins with.
    #[arg(long, value_enum, default_value_t)]
    pub from_head: FromHead,
    /// Labels, head and penalty.
    #[command(flatten)]
    #[serde(flatten)]
    pub probe: ProbeOptions,
    /// Peak learning rate.
    #[arg(long, default_value_t = 2e-5)]
    pub learning_rate: f64,
    /// Element type of the weights that are written; `auto` keeps the model's own, and the head is f32.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
    /// The run.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

crate::paper_defaults!(LpFt);

impl Method for LpFt {
    const INFO: Info = Info {
        name: "lp-ft",
        title: "LP-FT",
        summary: "Fits a linear probe and fine-tunes the whole classifier from there",
        family: Family::Adapt,
        paper: Paper {
            title: "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
            reference: "arXiv:2202.10054",
            year: 2022,
        },
        inputs: InputSpec::CLASSIFIED,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["adaptation", "classification", "full"],
            needs: Effort::FineTuning,
            touches: &[Touches::Architecture, Touches::Weights],
            composes_with: &["model-soups", "rtn", "finequant"],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        let name = Self::INFO.name;
        self.training.check(name, self.learning_rate)?;
        self.probe.check(name)?;
        let model = &inputs.models[0];
        let examples = data::examples(name, inputs, &self.probe, self.limits())?;
        let layout = Layout::of(name, model, self.probe.pooler.into())?;
        let classes = examples.classes.len();
        let mut plan = layout.plan(self, model, classes, self.dtype, true)?;
        describe(&mut plan, inputs, &layout, &examples, &self.probe);
        if self.from_head == FromHead::Random {
            plan.steps = vec![format!("draw a head of {classes} classes")];
        }
        let count = self.probe.max_examples.unwrap_or(usize::MAX).min(examples.len());
        plan.steps.push(format!(
            "train everything for {} updates of {} examples",
            self.training.steps(count),
            self.training.batch * self.training.accumulate
        ));
        let trained: u64 =
            plan.tensors.iter().map(|t| t.shape.iter().product::<usize>() as u64).sum();
        plan.peak_memory += 16 * trained;
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let name = Self::INFO.name;
        let model = &inputs.models[0];
        let fingerprints = vec![model.artifact.fingerprint()?];
        let layout = Layout::of(name, model, self.probe.pooler.into())?;
        let examples = data::examples(name, inputs, &self.probe, self.limits())?
            .sample(self.probe.max_examples, cx.seed);
        let trunk = Trunk::load(model, self.probe.pooler.into())?;
        let Fitted { head, report, warnings } = match self.from_head {
            FromHead::Probe => fit(&layout, &trunk, inputs, &examples, &self.probe, cx)?,
            FromHead::Random => Fitted {
                head: random_head(&layout, examples.classes.len(), cx.seed),
                report: json!({"classes": examples.classes.len(), "labels": examples.classes}),
                warnings: Vec::new(),
            },
        };
        let session = Session {
            inputs,
            plan,
            cx,
            training: &self.training,
            rate: self.learning_rate,
            dropout: 0.0,
        };
        let start = Start { head, report, warnings, fingerprints };
        let device = BurnDevice::flex();
        match trunk {
            Trunk::Text(mut text) => {
                let Content::Texts(ids) = &examples.content else { return Err(mixed_kinds()) };
                let site = layout.form.site;
                text.set_head(site, start.head.weight.clone(), start.head.bias.clone(), &device);
                let checkpoint = self.training.checkpoint_activations;
                let precision = self.training.precision.precision();
                let logits = |model: &TextClassifier, chosen: &[usize]| -> Result<_, BoxError> {
                    let sequences: Vec<Vec<u32>> = chosen.iter().map(|&i| ids[i].clone()).collect();
                    Ok(model
                        .forward(&sequences, &mut Run { checkpoint, precision, ..Run::plain() })?)
                };
                let trained = self.train(&session, text, &examples, &start, &logits)?;
                self.write(&session, &layout, &examples, start, trained, Trunk::Text)
            }
            Trunk::Image(mut vision, preprocess) => {
                let Content::Images(labelled, which) = &examples.content else {
                    return Err(mixed_kinds());
                };
                let Head { weight, bias } = start.head.clone();
                *vision.classifier_mut() = refit_nn::classifier::linear(
                    layout.form.site,
                    weight,
                    bias,
                    layout.width,
                    &device,
                );
                let device = BurnDevice::flex().autodiff();
                let precision = self.training.precision.precision();
                let logits = |model: &Vision, chosen: &[usize]| -> Result<_, BoxError> {
                    let chosen: Vec<usize> = chosen.iter().map(|&i| which[i]).collect();
                    let images = features::images(labelled, &chosen, &preprocess, &device)?;
                    Ok(model.forward(images, &mut Run { precision, ..Run::plain() })?)
                };
                let trained = self.train(&session, vision, &examples, &start, &logits)?;
                let whole = |vision| Trunk::Image(vision, preprocess.clone());
                self.write(&session, &layout, &examples, start, trained, whole)
            }
        }
    }
}

/// What training begins with.
struct Start {
    head: Head,
    report: Value,
    warnings: Vec<String>,
    fingerprints: Vec<String>,
}

/// Logits `[chosen, classes]` of the chosen examples under a model.
type Logits<'a, M> = dyn Fn(&M, &[usize]) -> Result<burn::tensor::Tensor<2>, BoxError> + 'a;

impl LpFt {
    fn limits(&self) -> Limits {
        Limits { max: self.training.max_length, truncate: self.training.truncate }
    }

    fn train<M: Trainable>(
        &self,
        session: &Session,
        model: M,
        examples: &Examples,
        start: &Start,
        logits: &Logits<M>,
    ) -> Result<Trained<M>> {
        let training = &self.training;
        let seed = session.cx.seed;
        let order = Order::new(seed, examples.len());
        let objective = |model: &M, at: At| -> Result<Terms, BoxError> {
            let chosen = order.batch(at.batch, training.batch);
            let labels: Vec<u32> = chosen.iter().map(|&i| examples.labels[i]).collect();
            let loss = batch_loss(logits(model, &chosen)?, &labels);
            Ok(Terms::one("cross-entropy", loss, chosen.len()))
        };
        let recipe = training.recipe(examples.len(), self.learning_rate, seed);
        let start = frame::Start {
            examples: examples.len(),
            unit: "examples",
            held_out: None,
            fingerprints: start.fingerprints.clone(),
        };
        session.fit(model, recipe, start, &objective)
    }

    fn write<M>(
        &self,
        session: &Session,
        layout: &Layout,
        examples: &Examples,
        start: Start,
        mut trained: Trained<M>,
        whole: impl Fn(M) -> Trunk,
    ) -> Result<Output>
    where
        M: Clone,
    {
        let Session { inputs, plan, cx, .. } = session;
        let values = trained_values(&whole(trained.model.clone()), &inputs.models[0])?;
        start.warnings.into_iter().for_each(|warning| trained.warn(warning));
        if let (Some(all), Some(probe)) = (trained.report.as_object_mut(), start.report.as_object())
        {
            for (key, value) in probe {
                // Both count the examples, and agree.
                all.entry(key.clone()).or_insert_with(|| value.clone());
            }
        }
        let beside = (&trained.report, trained.files()?);
        let path = write::write(layout, &examples.classes, inputs, plan, cx, &values, beside)?;
        trained.output(path)
    }
}
