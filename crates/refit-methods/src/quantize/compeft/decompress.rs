//! The way back: a compressed adapter as PEFT reads it.

use clap::Args;
use refit_store::adapter::{self, Dialect};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::emit;
use crate::error::{Error, Result};
use crate::inputs::Inputs;
use crate::method::{
    Action, Context, Effort, Family, Info, InputSpec, Method, Need, Output, OutputKind, Paper,
    Plan, PlannedTensor, Taxonomy, Touches,
};

/// Parameters of decompression: none.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Decompress {}

crate::paper_defaults!(Decompress);

impl Method for Decompress {
    const INFO: Info = Info {
        name: "decompress",
        title: "Decompressing an adapter",
        summary: "Writes an adapter that compeft compressed as an ordinary one, which PEFT loads",
        family: Family::Quantize,
        paper: Paper { title: "", reference: "", year: 0 },
        inputs: InputSpec { adapters: Need::Required, ..InputSpec::WEIGHTS },
        output: OutputKind::Adapter,
        taxonomy: Taxonomy {
            path: &["reuse", "update compression"],
            needs: Effort::None,
            touches: &[Touches::Weights],
            composes_with: &["compeft", "merge-adapter"],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        let [one] = &inputs.adapters[..] else {
            return Err(Error::ModelCount {
                method: Self::INFO.name,
                expected: "exactly 1 adapter after the model".into(),
                given: format!("{} given", inputs.adapters.len()),
            });
        };
        let fault = |problem: &str| {
            Err(Error::BadData { source_name: one.source.clone(), problem: problem.to_owned() })
        };
        if one.adapter.ternary()?.is_none() {
            return fault("it is not compressed");
        }
        if one.adapter.dialect() == Dialect::Refit {
            return fault(
                "it is what a fine-tuning changed, and PEFT has no such adapter; refit apply merge-adapter BASE UPDATE -o OUT \
                 gives the model back",
            );
        }
        one.adapter.check_base(&inputs.models[0].artifact)?;
        let mut plan = Plan::of(self);
        for (name, values) in one.adapter.tensors()? {
            let bytes = 4 * values.values.len() as u64;
            plan.output_bytes += bytes;
            let (shape, dtype) = (values.shape, "F32".to_owned());
            plan.tensors.push(PlannedTensor {
                name,
                shape,
                dtype,
                bytes,
                action: Action::Transform,
            });
        }
        plan.peak_memory = 3 * plan.output_bytes + (32 << 20);
        plan.steps.push(format!("write {} as floats", one.source));
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let adapter = &inputs.adapters[0].adapter;
        let fingerprints = inputs
            .models
            .iter()
            .map(|model| Ok(model.artifact.fingerprint()?))
            .collect::<Result<Vec<String>>>()?;
        let report = json!({ "trained_parameters": adapter.parameters() });
        let (lineage, card) = emit::describe_adapter(inputs, &fingerprints, plan, cx, &report)?;
        let (parts, prompt) = (adapter.parts(), adapter.prompt());
        let out = cx.out()?;
        let path = adapter::write(
            out,
            adapter.config(),
            parts,
            prompt,
            lineage,
            card,
            cx.force,
            Vec::new(),
        )?;
        Ok(Output { artifact: Some(path), report, warnings: Vec::new() })
    }
}
