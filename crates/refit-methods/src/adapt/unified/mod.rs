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
//! A preset is a point on four axes, and every axis can be set by itself (`site`, `form`, `function`, `composition`), one value for
//! all sites or one for each:
//!
//! ```text
//! site         per-head    heads, attention, ffn
//! form         parallel    parallel, sequential
//! function     relu, softmax    relu, gelu, silu, linear
//! composition  add, scaled, gated (with softmax: a prefix)    add, scaled
//! ```
//! `mam` is `--site per-head,ffn --function softmax,relu --composition gated,scaled`. A projection matrix, the paper's other site, is
//! LoRA's. `bottleneck` 0 and `prefix_length` 0 attach nothing: the base model, exactly.
//!
//! LoRA, BitFit and full fine-tuning, the paper's other rivals, are methods of their own. A prefix is trained through
//! `Linear(tanh(Linear(embedding)))` and written as the table that this gives. Ported to pre-norm models (not in the paper): the
//! parallel ffn adapter reads the normed input that feeds gate and up, and adds to down's output before the residual; `pfeiffer`
//! is sequential on the same place; `mh-pa` reads the query before rotary positions. Virtual tokens take positions, as in
//! transformers: the text begins at position `l`.
//!
//! Prefix and prompt are written in PEFT's format. PEFT has no bottleneck adapters: those, and `mam`, are written in refit's own
//! dialect of it.

mod axes;
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

pub use axes::{Axes, Composition, Form, Function, Place, Site};
pub use design::{Design, PerHead, Side, learned};

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
    /// Which adapter: a point of the design space, from which the next four axes depart.
    #[arg(long, value_enum, default_value_t)]
    pub preset: Preset,
    /// Hidden states that are changed, in place of the preset's.
    #[arg(long, value_enum, value_delimiter = ',')]
    #[serde(deserialize_with = "axes::one_or_many")]
    pub site: Vec<Site>,
    /// What each change is computed from: one for all sites, or one for each.
    #[arg(long, value_enum, value_delimiter = ',')]
    #[serde(deserialize_with = "axes::one_or_many")]
    pub form: Vec<Form>,
    /// Nonlinearity of each change: one for all sites, or one for each.
    #[arg(long, value_enum, value_delimiter = ',')]
    #[serde(deserialize_with = "axes::one_or_many")]
    pub function: Vec<Function>,
    /// How each change joins the hidden state: one for all sites, or one for each.
    #[arg(long, value_enum, value_delimiter = ',')]
    #[serde(deserialize_with = "axes::one_or_many")]
    pub composition: Vec<Composition>,
    /// Channels of a bottleneck; of every head at per-head. 0 attaches none.
    #[arg(long, default_value_t = 512)]
    pub bottleneck: usize,
    /// Virtual tokens of a prefix or prompt; 0 attaches none.
    #[arg(long, default_value_t = 30)]
    pub prefix_length: usize,
    /// Width of the net that a prefix is trained through; 0 trains its table itself.
    #[arg(long, default_value_t = 800)]
    pub prefix_net: usize,
    /// Factor on the output where the composition is scaled; 4 by default. Makes `add` of a preset `scaled`.
    #[arg(long)]
    pub scale: Option<f64>,
    /// Learn that factor, from 1 on, one per layer.
    #[arg(long)]
    pub learnable_scale: bool,
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
    /// What preset, axes and numbers say.
    ///
    /// # Errors
    /// Points of the design space that cannot be run, with those that can; numbers out of their range.
    pub fn design(&self) -> Result<Design> {
        let Self { site, form, function, composition, .. } = self;
        let axes = Axes { site, form, function, composition };
        let places = axes.over(self.preset)?;
        self.check(&places)?;
        let mut design = Design::default();
        if self.preset == Preset::Prompt {
            design.prompt = (self.prefix_length > 0).then_some(self.prefix_length);
        }
        for place in &places {
            if place.is_prefix() {
                design.prefix = Some((self.prefix_length, self.prefix_net)).filter(|(l, _)| *l > 0);
                continue;
            }
            if self.bottleneck == 0 {
                continue;
            }
            let (rank, scale) = (self.bottleneck, self.factor(place));
            let sequential = place.form == Form::Sequential;
            let side = Some(Side {
                rank,
                scale,
                learnable: self.learnable_scale,
                sequential,
                // The paper's: sequential adapters change the model a little from the start, parallel ones do not.
                init: if sequential { Init::Bert } else { Init::Lora },
                function: place.function,
            });
            match place.site {
                Site::PerHead => {
                    let softmax = place.function == Function::Softmax;
                    design.per_head = Some(PerHead { rank, scale, softmax });
                }
                Site::Heads => design.heads = side,
                Site::Attention => design.attention = side,
                Site::Ffn => design.ffn = side,
            }
        }
        Ok(design)
    }

    /// The factor `s` at a place.
    fn factor(&self, place: &Place) -> f64 {
        match (self.scale, place.composition) {
            // Said explicitly, `add` is that; of a preset it is where the factor starts from.
            (_, Composition::Add) if !self.composition.is_empty() => 1.0,
            (Some(scale), _) => scale,
            (None, Composition::Scaled) => 4.0,
            (None, _) => 1.0,
        }
    }

    /// Checks the numbers against the places that they are for.
    fn check(&self, places: &[Place]) -> Result<()> {
        let name = Self::INFO.name;
        if let Some(scale) = self.scale {
            if scale == 0.0 || !scale.is_finite() {
                return Err(Error::range(name, "scale", scale, "a number other than 0"));
            }
            let add = |place: &Place| place.composition == Composition::Add;
            let mut others = places.iter().filter(|place| !place.is_prefix()).peekable();
            if others.peek().is_some() && !self.composition.is_empty() && others.all(add) {
                let expected = "scaled where --scale is given (add is h + Δh)";
                return Err(Error::range(name, "composition", "add", expected));
            }
            if places.iter().all(Place::is_prefix) {
                let expected =
                    "nothing: prefix and prompt have no factor, a prefix's gate takes its place";
                return Err(Error::range(name, "scale", scale, expected));
            }
        }
        let sides = |place: &Place| place.site != Site::PerHead;
        if self.learnable_scale && !places.iter().any(sides) {
            let expected =
                "false without a bottleneck at heads, attention or ffn, whose factor it is";
            return Err(Error::range(name, "learnable_scale", true, expected));
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
        let design = self.design()?;
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
        let mut plan = adapter_plan(self, inputs, &self.training, shapes, design.virtual_tokens())?;
        if design.is_empty() {
            plan.steps = vec!["write an adapter that changes nothing".into()];
            plan.warnings.push(
                "no channels and no virtual tokens: nothing is attached and nothing trains; the adapter is the base model \
                 (--bottleneck and --prefix-length above 0 attach something)"
                    .into(),
            );
        }
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let design = self.design()?;
        let training = &self.training;
        let reserved = design.virtual_tokens();
        let examples = training::examples(Self::INFO.name, inputs, training, reserved)?;
        let (rate, dropout) = (self.learning_rate, self.dropout);
        let session = Session { inputs, plan, cx, training, rate, dropout };
        let trained = match design.is_empty() {
            true => session.untrained(examples.len())?,
            false => {
                session.train(&examples, |decoder, rng| design.attach(decoder, rng), |_| {})?
            }
        };
        let (parts, prompt) = learned(&trained.model);
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
                if let Some(part) = design.per_head {
                    let shape = vec![config.heads, part.rank, config.head_dim];
                    for part in ["keys", "values"] {
                        all.push((format!("{}.adapter_{part}", site.module()), shape.clone()));
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
        (true, None) => AdapterConfig::nothing(),
        (false, _) => AdapterConfig::describe(parts, prompt)?,
    })
}
