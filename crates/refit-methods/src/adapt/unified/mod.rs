//! *Towards a Unified View of Parameter-Efficient Transfer Learning* (arXiv:2110.04366): adapters, prefixes and prompts as one
//! design space, and the MAM adapter that the paper finds in it.
//!
//! Every method there is `h <- h + s Δh` with the base frozen. A [`Design`] says which hidden states are changed and by what:
//!
//! | preset | attention | ffn |
//! |---|---|---|
//! | `houlsby` | sequential, after the output projection | sequential |
//! | `pfeiffer` | – | sequential |
//! | `pa-attn` | parallel, on the heads before the output projection | – |
//! | `pa-ffn`, `scaled-pa-ffn` | – | parallel, `s` = 1 or 4 |
//! | `mh-pa` | parallel, on every head by itself | – |
//! | `prefix` | keys and values of virtual tokens | – |
//! | `prompt` | embeddings of virtual tokens before the text | |
//! | `mam` | `prefix` | `scaled-pa-ffn` |
//!
//! LoRA, BitFit and full fine-tuning, the paper's other rivals, are methods of their own. A prefix is trained through
//! `Linear(tanh(Linear(embedding)))` and written as the table that this gives. Ported to pre-norm models (not in the paper): the
//! parallel ffn adapter reads the normed input that feeds gate and up, and adds to down's output before the residual; `pfeiffer`
//! is sequential on the same place; `mh-pa` reads the query before rotary positions. Virtual tokens take positions, as in
//! transformers: the text begins at position `l`.
//!
//! Prefix and prompt are written in PEFT's format. PEFT has no bottleneck adapters: those, and `mam`, are written in refit's own
//! dialect of it.

mod claim;
mod design;

use clap::Args;
use refit_nn::Decoder;
use refit_nn::config::TransformerConfig;
use refit_nn::side::Init;
use refit_store::adapter::{AdapterConfig, Part, Prompt};
use refit_store::architecture::Role;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use design::{Design, Function, Side, learned};

use super::frame::Session;
use super::training::{self, Training};
use super::{adapter_config, adapter_plan};
use crate::error::{Error, Result};
use crate::method::{
    Claim, Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper,
    Plan, Taxonomy, Touches,
};

/// A point of the design space.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// Prefix at attention and a scaled parallel adapter at the ffn: the paper's best mix.
    #[default]
    Mam,
    /// Sequential adapters after attention and ffn (Houlsby et al. 2019).
    Houlsby,
    /// A sequential adapter after the ffn (Pfeiffer et al. 2021).
    Pfeiffer,
    /// A parallel adapter on the heads.
    PaAttn,
    /// A parallel adapter beside the ffn.
    PaFfn,
    /// The same with its output scaled.
    ScaledPaFfn,
    /// A parallel adapter on every head by itself.
    MhPa,
    /// Keys and values of virtual tokens (Li and Liang 2021).
    Prefix,
    /// Embeddings of virtual tokens (Lester et al. 2021).
    Prompt,
}

/// Parameters of the unified adapters.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct UnifiedPeft {
    /// Which adapter.
    #[arg(long, value_enum, default_value_t)]
    pub preset: Preset,
    /// Channels of a bottleneck; of every head for mh-pa.
    #[arg(long, default_value_t = 512)]
    pub bottleneck: usize,
    /// Virtual tokens of a prefix or prompt.
    #[arg(long, default_value_t = 30)]
    pub prefix_length: usize,
    /// Width of the net that a prefix is trained through; 0 trains its table itself.
    #[arg(long, default_value_t = 800)]
    pub prefix_net: usize,
    /// Factor on a bottleneck's output; by default 4 for mam and scaled-pa-ffn, 1 for the others.
    #[arg(long)]
    pub scale: Option<f64>,
    /// Learn that factor, from 1 on, one per layer.
    #[arg(long)]
    pub learnable_scale: bool,
    /// Nonlinearity of a bottleneck.
    #[arg(long, value_enum, default_value_t)]
    pub function: Function,
    /// Share of a bottleneck's channels that is dropped in training.
    #[arg(long, default_value_t = 0.0)]
    pub dropout: f64,
    /// Peak learning rate.
    #[arg(long, default_value_t = 1e-4)]
    pub learning_rate: f64,
    /// The run.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

crate::paper_defaults!(UnifiedPeft);

impl UnifiedPeft {
    /// What the preset and the numbers say.
    pub fn design(&self) -> Design {
        let side = |scale: f64, sequential: bool, init: Init| Side {
            rank: self.bottleneck,
            scale: self.scale.unwrap_or(scale),
            learnable: self.learnable_scale,
            sequential,
            init,
            function: self.function,
        };
        let (parallel, scaled) = (side(1.0, false, Init::Lora), side(4.0, false, Init::Lora));
        let sequential = side(1.0, true, Init::Bert);
        let none = Design::default();
        let prefix = Some((self.prefix_length, self.prefix_net));
        match self.preset {
            Preset::Mam => Design { prefix, ffn: Some(scaled), ..none },
            Preset::Houlsby => {
                Design { attention: Some(sequential), ffn: Some(sequential), ..none }
            }
            Preset::Pfeiffer => Design { ffn: Some(sequential), ..none },
            Preset::PaAttn => Design { heads: Some(parallel), ..none },
            Preset::PaFfn => Design { ffn: Some(parallel), ..none },
            Preset::ScaledPaFfn => Design { ffn: Some(scaled), ..none },
            Preset::MhPa => {
                Design { per_head: Some((self.bottleneck, self.scale.unwrap_or(1.0))), ..none }
            }
            Preset::Prefix => Design { prefix, ..none },
            Preset::Prompt => Design { prompt: Some(self.prefix_length), ..none },
        }
    }

    fn check(&self) -> Result<()> {
        let name = Self::INFO.name;
        let design = self.design();
        let sides = [design.heads, design.attention, design.ffn];
        if self.bottleneck == 0 && (sides.iter().any(Option::is_some) || design.per_head.is_some())
        {
            return Err(Error::range(name, "bottleneck", 0, "at least 1 channel"));
        }
        if self.prefix_length == 0 && (design.prefix.is_some() || design.prompt.is_some()) {
            return Err(Error::range(name, "prefix_length", 0, "at least 1 virtual token"));
        }
        if self.scale.is_some_and(|scale| scale == 0.0 || !scale.is_finite()) {
            let expected = "a number other than 0";
            return Err(Error::range(name, "scale", self.scale.unwrap_or_default(), expected));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let expected = "a share from 0 up to but not including 1";
            return Err(Error::range(name, "dropout", self.dropout, expected));
        }
        Ok(())
    }
}

impl Method for UnifiedPeft {
    const INFO: Info = Info {
        name: "unified-peft",
        title: "Unified adapters (MAM adapter)",
        summary: "Learns prefixes, prompts and bottleneck adapters in every combination of the unified view",
        family: Family::Adapt,
        paper: Paper {
            title: "Towards a Unified View of Parameter-Efficient Transfer Learning",
            reference: "arXiv:2110.04366",
            year: 2021,
        },
        inputs: InputSpec::TUNED,
        output: OutputKind::Adapter,
        taxonomy: Taxonomy {
            path: &["adaptation", "parameter-efficient", "additive"],
            needs: Effort::FineTuning,
            touches: &[Touches::Activations],
            composes_with: &[],
        },
    };

    fn claim() -> Option<Claim> {
        Some(claim::CLAIM)
    }

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        self.training.check(Self::INFO.name, self.learning_rate)?;
        self.check()?;
        let design = self.design();
        let config = training::language_model(Self::INFO.name, &inputs.models[0])?;
        if design.prefix.is_some() && config.windows.iter().any(Option::is_some) {
            return Err(Error::Conflict {
                method: Self::INFO.name,
                problem: format!(
                    "{} attends through sliding windows, which would pass over a prefix; take a preset without one",
                    inputs.models[0].source
                ),
            });
        }
        let shapes = tensors(&design, inputs, &config);
        adapter_plan(self, inputs, &self.training, shapes, design.virtual_tokens())
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let design = self.design();
        let training = &self.training;
        let reserved = design.virtual_tokens();
        let examples = training::examples(Self::INFO.name, inputs, training, reserved)?;
        let (rate, dropout) = (self.learning_rate, self.dropout);
        let session = Session { inputs, plan, cx, training, rate, dropout };
        let trained =
            session.train(&examples, |decoder, rng| design.attach(decoder, rng), |_| {})?;
        let (parts, prompt) = learned(&trained.model, self.function);
        let base = adapter_config(inputs, serde_json::json!({ "task_type": "CAUSAL_LM" }));
        let mut config = describe(&trained.model, &parts, prompt.as_ref())?;
        for (key, value) in base.raw() {
            config = config.with(key, value.clone());
        }
        trained.write_adapter(&session, &config, &parts, prompt.as_ref())
    }
}

/// Names and shapes of what is written.
fn tensors(
    design: &Design,
    inputs: &Inputs,
    config: &TransformerConfig,
) -> Vec<(String, Vec<usize>)> {
    let (hidden, heads) = (config.hidden, config.heads * config.head_dim);
    let mut all = Vec::new();
    let architecture = inputs.models[0].artifact.architecture();
    for site in architecture.linears() {
        let mut side = |side: Option<Side>, outputs: usize| {
            let Some(side) = side else { return };
            let inputs = if side.sequential { outputs } else { hidden };
            let at = |part: &str| format!("{}.{part}", site.module());
            all.extend([
                (at("adapter_down.weight"), vec![side.rank, inputs]),
                (at("adapter_down.bias"), vec![side.rank]),
                (at("adapter_up.weight"), vec![outputs, side.rank]),
                (at("adapter_up.bias"), vec![outputs]),
            ]);
        };
        match site.role {
            Role::O => {
                side(design.heads, heads);
                side(design.attention, hidden);
                if let Some((rank, _)) = design.per_head {
                    let shape = vec![config.heads, rank, config.head_dim];
                    for part in ["keys", "values"] {
                        all.push((format!("{}.head_adapter.{part}", site.module()), shape.clone()));
                    }
                }
            }
            Role::Down => side(design.ffn, hidden),
            _ => {}
        }
    }
    let kv = config.kv_heads * config.head_dim;
    if let Some((tokens, _)) = design.prefix {
        all.push(("prompt_embeddings".into(), vec![tokens, 2 * config.layers * kv]));
    }
    if let Some(tokens) = design.prompt {
        all.push(("prompt_embeddings".into(), vec![tokens, hidden]));
    }
    all
}

/// The configuration of what was learned.
fn describe(model: &Decoder, parts: &[Part], prompt: Option<&Prompt>) -> Result<AdapterConfig> {
    let config = model.config();
    Ok(match (parts.is_empty(), prompt) {
        (true, Some(Prompt::Prefix { tokens, .. })) => {
            AdapterConfig::prefix(*tokens, config.layers, config.kv_heads, config.head_dim)
        }
        (true, Some(Prompt::Input { tokens, .. })) => {
            AdapterConfig::prompt(*tokens, config.hidden, config.layers, config.heads)
        }
        _ => AdapterConfig::describe(parts, prompt)?,
    })
}
