//! Fine-tuning of a few vectors: BitFit (*BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
//! Language-models*, arXiv:2106.10199) trains biases, LN tuning (*How to Adapt Your Large-Scale Vision-and-Language Model*, Qi et
//! al. 2022) trains the norms' scales and biases.
//!
//! LN tuning is written as a PEFT adapter (`LN_TUNING`), BitFit as a model: PEFT has no word for it.
//!
//! Models of the Llama family have no biases. `--add-biases` gives `o_proj` and `down_proj`, the linears that write to the
//! residual stream, biases that begin at zero, and trains these. transformers knows biases of a Llama by two keys of its config,
//! `attention_bias` for all four projections of attention and `mlp_bias` for all three of the MLP, so the other five get biases
//! too, which stay zero: the model says what it said before until training moves it, and every loader of Llamas reads it. The
//! classes of Mistral, Qwen, Gemma and Phi have no such keys; there it is refused.

use clap::Args;
use refit_nn::load::stored;
use refit_nn::operator::Norm;
use refit_nn::{Decoder, ops};
use refit_store::adapter::{Form, Part};
use refit_store::architecture::{Role, Site};
use refit_train::train::{Rule, Scope};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

mod biases;

use super::finetune::{model_plan, nothing, run_model};
use super::frame::Session;
use super::training::{self, Training};
use super::{adapter_config, adapter_plan, target};
use crate::error::Result;
use crate::method::{
    Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper, Plan,
    Taxonomy, Touches,
};
use crate::rewrite::OutputType;

/// Parameters of BitFit.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct BitFit {
    /// Peak learning rate.
    #[arg(long, default_value_t = 1e-3)]
    pub learning_rate: f64,
    /// Where a Llama has no biases: give `o_proj` and `down_proj` biases of zero and train these.
    #[arg(long)]
    pub add_biases: bool,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
    /// The run.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

/// Parameters of LN tuning.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct LnTuning {
    /// Peak learning rate.
    #[arg(long, default_value_t = 1e-3)]
    pub learning_rate: f64,
    /// The run.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

crate::paper_defaults!(BitFit, LnTuning);

const TAXONOMY: Taxonomy = Taxonomy {
    path: &["adaptation", "parameter-efficient", "selective"],
    needs: Effort::FineTuning,
    touches: &[Touches::Weights],
    composes_with: &[],
};

impl Method for BitFit {
    const INFO: Info = Info {
        name: "bitfit",
        title: "BitFit",
        summary: "Trains the biases alone",
        family: Family::Adapt,
        paper: Paper {
            title: "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
            reference: "arXiv:2106.10199",
            year: 2021,
        },
        inputs: InputSpec::TUNED,
        output: OutputKind::Model,
        taxonomy: TAXONOMY,
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        self.training.check(Self::INFO.name, self.learning_rate)?;
        let model = &inputs.models[0];
        let has_biases = model.artifact.tensors().iter().any(|info| info.name.ends_with(".bias"));
        if self.add_biases {
            return biases::plan(self, inputs, has_biases);
        }
        if !has_biases {
            return Err(nothing(
                &model.source,
                "biases to train",
                "models of the Llama family have none; --add-biases gives a Llama some, `ln-tuning` trains the norms, `lora` \
                 adds what can be trained",
            ));
        }
        model_plan(self, inputs, &self.training, self.dtype, &Scope::only("@bias"))
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        if self.add_biases {
            return biases::run(self, inputs, plan, cx);
        }
        let scope = Scope::only("@bias");
        run_model(Self::INFO.name, inputs, plan, cx, &self.training, self.learning_rate, scope)
    }
}

/// The norms of a model.
fn norms(inputs: &Inputs) -> Vec<&Site> {
    let sites = inputs.models[0].artifact.architecture().with_role(Role::Norm);
    sites.filter(|site| site.name.ends_with(".weight")).collect()
}

impl Method for LnTuning {
    const INFO: Info = Info {
        name: "ln-tuning",
        title: "LN tuning",
        summary: "Trains the norms alone and writes them as a PEFT adapter",
        family: Family::Adapt,
        paper: Paper {
            title: "How to Adapt Your Large-Scale Vision-and-Language Model",
            reference: "ICLR 2022 submission EhwEUb2ynIa",
            year: 2022,
        },
        inputs: InputSpec::TUNED,
        output: OutputKind::Adapter,
        taxonomy: TAXONOMY,
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        self.training.check(Self::INFO.name, self.learning_rate)?;
        let norms = norms(inputs);
        if norms.is_empty() {
            return Err(nothing(
                &inputs.models[0].source,
                "norms to train",
                "`refit inspect` shows which role each tensor has",
            ));
        }
        let artifact = &inputs.models[0].artifact;
        let shapes = norms.iter().flat_map(|site| {
            let own = |part: &str| format!("{}.ln_tuning_layers.{part}", site.module());
            let bias = artifact.contains(&format!("{}.bias", site.module()));
            let bias = bias.then(|| (own("bias"), site.shape.clone()));
            std::iter::once((own("weight"), site.shape.clone())).chain(bias)
        });
        adapter_plan(self, inputs, &self.training, shapes.collect(), 0)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let training = &self.training;
        let examples = training::examples(Self::INFO.name, inputs, training, 0)?;
        let session =
            Session { inputs, plan, cx, training, rate: self.learning_rate, dropout: 0.0 };
        let sites = norms(inputs);
        let mut rules = vec![Rule::freeze("@all")];
        rules.extend(sites.iter().map(|site| Rule::train(format!("{}.*", site.module()))));
        let trained = session.train(&examples, |_, _| Ok(Scope { rules }), |_| {})?;
        let config = trained.model.config();
        let parts: Vec<Part> = all_norms(&trained.model)
            .into_iter()
            .map(|norm| {
                let name = format!("{}.weight", norm.site);
                let held = ops::to_vec(&norm.weight.val());
                let weight = stored(config, &name, &[held.len()], &held);
                let bias = norm.bias.as_ref().map(|bias| ops::to_vec(&bias.val()));
                Part { site: norm.site.clone(), form: Form::LayerNorm { weight, bias } }
            })
            .collect();
        let config = adapter_config(
            inputs,
            json!({
                "peft_type": "LN_TUNING",
                "task_type": "CAUSAL_LM",
                "target_modules": target::names(&sites),
                "exclude_modules": null,
            }),
        );
        trained.write_adapter(&session, &config, &parts, None)
    }
}

/// Every norm of a decoder.
fn all_norms(model: &Decoder) -> Vec<&Norm> {
    let mut all = vec![&model.frame.norm];
    for block in &model.blocks {
        all.extend([&block.mixer_norm, &block.ffn_norm]);
        let rest = [&block.mixer.q_norm, &block.mixer.k_norm];
        all.extend(rest.into_iter().flatten());
        all.extend([&block.mixer_post_norm, &block.ffn_post_norm].into_iter().flatten());
    }
    all
}
