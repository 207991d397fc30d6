//! Half-Reset: half of a tuned model's tensors back to those of its base, without training.

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::PAPER;
use super::plan::{Freezing, slots};
use crate::emit::Emitter;
use crate::error::{Error, Result};
use crate::merge::fold::compare;
use crate::method::{
    Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Plan, Taxonomy,
    Touches, Unit,
};
use crate::rewrite::{OutputType, copy};

/// Parameters of half-reset.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct HalfReset {
    /// The plan.
    #[command(flatten)]
    #[serde(flatten)]
    pub freezing: Freezing,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(HalfReset);

impl Method for HalfReset {
    const INFO: Info = Info {
        name: "half-reset",
        title: "Half-Reset",
        summary: "Puts half of a tuned model's tensors back to those of its base, without training",
        family: Family::Adapt,
        paper: PAPER,
        inputs: InputSpec { min_models: 2, max_models: Some(2), ..InputSpec::WEIGHTS },
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["adaptation", "partial", "reset"],
            needs: Effort::None,
            touches: &[Touches::Weights],
            composes_with: &["model-soups"],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        let tuned = &inputs.models[0];
        self.freezing.check(Self::INFO.name, tuned)?;
        let mut plan = Plan::of(self);
        compare(&inputs.models, self.dtype, &mut plan)?;
        plan.steps.push("draw which tensors go back to the base's, from the seed".into());
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let [tuned, base] = &inputs.models[..] else {
            return Err(Error::NoOutput);
        };
        let round = self.freezing.round.unwrap_or(0);
        let slots = slots(tuned.artifact.architecture());
        let freeze = self.freezing.draw(&slots, round, cx.seed);
        let emitter = Emitter::begin(inputs, plan, cx)?;
        cx.progress.begin("copying", plan.tensors.len() as u64, Unit::Tensors);
        for tensor in &plan.tensors {
            if !emitter.is_done(&tensor.name) {
                let from = if freeze.frozen.contains(&tensor.name) { base } else { tuned };
                copy(&from.artifact, &from.source, &emitter, tensor)?;
            }
            cx.progress.advance(1);
        }
        cx.progress.end();
        let report = json!({
            "round": round,
            "reset_tensors": freeze.frozen.len(),
            "reset_share": freeze.frozen_share(&slots),
        });
        let files = vec![freeze.file(tuned)];
        let artifact = emitter.finish(inputs, plan, cx, files, &report)?;
        Ok(Output { artifact: Some(artifact), report, warnings: Vec::new() })
    }
}
