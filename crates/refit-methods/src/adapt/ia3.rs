//! (IA)³: *Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning* (arXiv:2205.05638).
//!
//! One learned factor per channel: on the keys and values of attention, and on what enters the last matrix of the MLP. All
//! start at one. What is written is PEFT's format, with its targets for Llama-like models (`k_proj`, `v_proj`, `down_proj`) where
//! the model has them.

use clap::Args;
use refit_nn::adapt::{Ia3 as Ia3Form, Side as FormSide};
use refit_nn::ops;
use refit_store::adapter::{Form, Part, Side};
use refit_store::architecture::{Role, Site};
use refit_train::train::Scope;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::frame::Session;
use super::training::{self, Training};
use super::{adapter_config, adapter_plan, target};
use crate::error::{Error, Result};
use crate::method::{
    Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper, Plan,
    Taxonomy, Touches,
};

/// Parameters of (IA)³.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Ia3 {
    /// Linears that are scaled: ends of their names; by default keys, values and the last one of the MLP.
    #[arg(long, value_delimiter = ',')]
    pub target_modules: Vec<String>,
    /// Peak learning rate.
    #[arg(long, default_value_t = 3e-3)]
    pub learning_rate: f64,
    /// The run.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

crate::paper_defaults!(Ia3);

impl Ia3 {
    fn sites<'a>(&self, inputs: &'a Inputs) -> Result<Vec<&'a Site>> {
        let model = &inputs.models[0];
        if !self.target_modules.is_empty() {
            return target::resolve(Self::INFO.name, model, &self.target_modules);
        }
        let chosen = |site: &&Site| matches!(site.role, Role::K | Role::V | Role::Down);
        let sites: Vec<&Site> = model.artifact.architecture().linears().filter(chosen).collect();
        match sites.iter().any(|site| site.role == Role::K) {
            true => Ok(sites),
            false => Err(Error::Conflict {
                method: Self::INFO.name,
                problem: format!(
                    "{} keeps queries, keys and values in one matrix, so keys and values have no factors of their own; name \
                     what to scale with --target-modules",
                    model.source
                ),
            }),
        }
    }
}

impl Method for Ia3 {
    const INFO: Info = Info {
        name: "ia3",
        title: "(IA)³",
        summary: "Learns one factor per key, value and MLP channel and writes them as a PEFT adapter",
        family: Family::Adapt,
        paper: Paper {
            title: "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
            reference: "arXiv:2205.05638",
            year: 2022,
        },
        inputs: InputSpec::TUNED,
        output: OutputKind::Adapter,
        taxonomy: Taxonomy {
            path: &["adaptation", "parameter-efficient", "scaling"],
            needs: Effort::FineTuning,
            touches: &[Touches::Weights],
            composes_with: &["merge-adapter"],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        self.training.check(Self::INFO.name, self.learning_rate)?;
        let shapes = self.sites(inputs)?.into_iter().map(|site| {
            let (out, inputs) = crate::rewrite::shape_of(site);
            let shape = if target::is_feedforward(site) { vec![1, inputs] } else { vec![out, 1] };
            (format!("{}.ia3_l", site.module()), shape)
        });
        adapter_plan(self, inputs, &self.training, shapes.collect(), 0)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let model = &inputs.models[0];
        let sites = self.sites(inputs)?;
        let training = &self.training;
        let examples = training::examples(Self::INFO.name, inputs, training, 0)?;
        let session =
            Session { inputs, plan, cx, training, rate: self.learning_rate, dropout: 0.0 };
        let trained = session.train(
            &examples,
            |decoder, _| {
                target::for_each(model, decoder, &sites, |site, linear| {
                    let weight = linear.weight();
                    let side = match target::is_feedforward(site) {
                        true => FormSide::Input,
                        false => FormSide::Output,
                    };
                    linear.attach(Ia3Form::init(weight.dims(), side, &weight.device()), true);
                    Ok(())
                })?;
                Ok(Scope::only("*.ia3.*"))
            },
            |_| {},
        )?;
        let linears = trained.model.blocks.iter().flat_map(|block| block.linears());
        let parts: Vec<Part> = linears
            .filter_map(|linear| {
                let form = linear.form::<Ia3Form>()?;
                let side = match form.side {
                    FormSide::Input => Side::Input,
                    FormSide::Output => Side::Output,
                };
                let factors = ops::to_vec(&form.factors.val());
                Some(Part { site: linear.site.clone(), form: Form::Ia3 { factors, side } })
            })
            .collect();
        let forward: Vec<&Site> =
            sites.iter().copied().filter(|site| target::is_feedforward(site)).collect();
        let config = adapter_config(
            inputs,
            json!({
                "peft_type": "IA3",
                "task_type": "CAUSAL_LM",
                "target_modules": target::names(&sites),
                "feedforward_modules": target::names(&forward),
                "fan_in_fan_out": false,
                "init_ia3_weights": true,
            }),
        );
        trained.write_adapter(&session, &config, &parts, None)
    }
}
