//! Half Fine-Tuning: *HFT: Half Fine-Tuning for Large Language Models* (arXiv:2404.18466), and Half-Reset, its pilot study.
//!
//! A seeded plan freezes half of the tensors, by category: in every block two of `{q, k, v, o}`; two of `{gate, up, down}` in half
//! of the blocks and one in the others; one of the block's two norms. Embeddings, head and final norm always train. Frozen
//! tensors get no gradient, no moments and no decay, and are copied byte for byte. Each round (training stage) draws another
//! plan. `half-reset` copies the base's tensors into the frozen half of a model that is tuned already.
//!
//! Not in the paper, or read in a third party's notes of it: biases follow their matrix; ratios other than one half follow
//! gucci-j/ssu (the nearest count of each category, then single matrices until the block's share of parameters is nearest);
//! `layer` freezes whole blocks and `model` draws among all matrices; optimizer state is fresh in every round; a block
//! without attention and ffn loses half of its matrices.

mod claim;
pub mod plan;
pub mod reset;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use self::plan::{Freezing, slots};
use super::finetune::model_plan;
use super::frame::Session;
use super::training::{self, Training};
use crate::error::Result;
use crate::method::{
    Action, Claim, Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind,
    Paper, Plan, Taxonomy, Touches,
};
use crate::rewrite::OutputType;

/// Parameters of half fine-tuning.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Hft {
    /// The plan.
    #[command(flatten)]
    #[serde(flatten)]
    pub freezing: Freezing,
    /// Peak learning rate.
    #[arg(long, default_value_t = 2e-5)]
    pub learning_rate: f64,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
    /// The run.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

crate::paper_defaults!(Hft);

const PAPER: Paper = Paper {
    title: "HFT: Half Fine-Tuning for Large Language Models",
    reference: "arXiv:2404.18466",
    year: 2024,
};

impl Method for Hft {
    const INFO: Info = Info {
        name: "hft",
        title: "Half Fine-Tuning",
        summary: "Fine-tunes half of the tensors, drawn anew in every round, so that less is forgotten",
        family: Family::Adapt,
        paper: PAPER,
        inputs: InputSpec::TUNED,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["adaptation", "partial"],
            needs: Effort::FineTuning,
            touches: &[Touches::Weights],
            composes_with: &["half-reset", "model-soups"],
        },
    };

    fn claim() -> Option<Claim> {
        Some(claim::CLAIM)
    }

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        let model = &inputs.models[0];
        self.training.check(Self::INFO.name, self.learning_rate)?;
        self.freezing.check(Self::INFO.name, model)?;
        let round = self.freezing.round(model);
        // The share of what trains does not depend on the seed by much; the exact plan is drawn when it runs.
        let freeze = self.freezing.draw(&slots(model.artifact.architecture()), round, 0);
        let scope = freeze.scope(model);
        crate::factorize::layout::refuse_factored(Self::INFO.name, &inputs.models[0])?;
        let mut plan = model_plan(self, inputs, &self.training, self.dtype, &scope)?;
        plan.steps
            .insert(0, format!("round {round}: draw which tensors are frozen, from the seed"));
        if self.freezing.ratio == 1.0 {
            plan.warnings.push(
                "ratio 1: every block is frozen, only embeddings, head and final norm train".into(),
            );
        }
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let model = &inputs.models[0];
        let training = &self.training;
        let round = self.freezing.round(model);
        let slots = slots(model.artifact.architecture());
        let freeze = self.freezing.draw(&slots, round, cx.seed);
        let examples = training::examples(Self::INFO.name, inputs, training, 0)?;
        // The plan was made without the seed: what is copied and what is written follows from it.
        let plan = &Plan {
            tensors: plan
                .tensors
                .iter()
                .cloned()
                .map(|mut tensor| {
                    let first = model.artifact.architecture().site(&tensor.name);
                    let name = first.and_then(|s| s.tied_to.clone()).unwrap_or(tensor.name.clone());
                    let frozen = freeze.frozen.contains(&name);
                    tensor.action = if frozen { Action::Copy } else { Action::Transform };
                    tensor
                })
                .collect(),
            ..plan.clone()
        };
        let rate = self.learning_rate;
        let session = Session { inputs, plan, cx, training, rate, dropout: 0.0 };
        let mut trained = session.train(&examples, |_, _| Ok(freeze.scope(model)), |_| {})?;
        trained.report["round"] = json!(round);
        trained.report["frozen_share"] = json!(freeze.frozen_share(&slots));
        trained.add_file(freeze.file(model));
        trained.write_model(&session)
    }
}
