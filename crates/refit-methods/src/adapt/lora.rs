//! LoRA: *LoRA: Low-Rank Adaptation of Large Language Models* (arXiv:2106.09685), and DoRA:
//! *DoRA: Weight-Decomposed Low-Rank Adaptation* (arXiv:2402.09353).
//!
//! ```text
//! LoRA   W' = W + s B A          s = alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732)
//! DoRA   W' = m (W + s B A) / ‖W + s B A‖        rows normed; m starts as the norms of W's rows
//! ```
//! `A [rank, in]` starts uniform in ±1/sqrt(in), `B [out, rank]` at zero, so the model is unchanged before the first update. The
//! base is frozen and gets no gradient. DoRA's norm is a constant in the backward pass (its section 4.3). What is written is
//! PEFT's format.

use clap::Args;
use refit_nn::adapt::{Dora as DoraForm, Lora as LoraForm};
use refit_nn::ops;
use refit_store::adapter::{AdapterConfig, Form, Part, Values};
use refit_store::architecture::Site;
use refit_train::train::Scope;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::frame::{Session, Trained};
use super::training::{self, Training};
use super::{adapter_config, adapter_plan, target};
use crate::error::{Error, Result};
use crate::method::{
    Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper, Plan,
    Taxonomy, Touches,
};

/// The shape of a low-rank adapter.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct LowRank {
    /// Rank of the update.
    #[arg(long, default_value_t = 8)]
    pub rank: usize,
    /// The update is scaled by alpha / rank.
    #[arg(long, default_value_t = 16.0)]
    pub alpha: f64,
    /// Share of an adapter's inputs that is dropped in training.
    #[arg(long, default_value_t = 0.0)]
    pub dropout: f64,
    /// Linears that get an adapter: ends of their names (`q_proj,v_proj`), or `all-linear`.
    #[arg(long, value_delimiter = ',', default_value = "all-linear")]
    pub target_modules: Vec<String>,
    /// Scale by alpha / sqrt(rank) instead (rsLoRA).
    #[arg(long)]
    pub rslora: bool,
    /// Peak learning rate.
    #[arg(long, default_value_t = 2e-4)]
    pub learning_rate: f64,
}

/// Parameters of LoRA.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Lora {
    /// Shape of the adapter.
    #[command(flatten)]
    #[serde(flatten)]
    pub shape: LowRank,
    /// The run.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

/// Parameters of DoRA.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Dora {
    /// Shape of the adapter.
    #[command(flatten)]
    #[serde(flatten)]
    pub shape: LowRank,
    /// The run.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

crate::paper_defaults!(LowRank, Lora, Dora);

const TAXONOMY: Taxonomy = Taxonomy {
    path: &["adaptation", "parameter-efficient", "reparameterization"],
    needs: Effort::FineTuning,
    touches: &[Touches::Weights],
    composes_with: &["merge-adapter"],
};

impl Method for Lora {
    const INFO: Info = Info {
        name: "lora",
        title: "LoRA",
        summary: "Learns a low-rank update of the linears from examples and writes it as a PEFT adapter",
        family: Family::Adapt,
        paper: Paper {
            title: "LoRA: Low-Rank Adaptation of Large Language Models",
            reference: "arXiv:2106.09685",
            year: 2021,
        },
        inputs: InputSpec::TUNED,
        output: OutputKind::Adapter,
        taxonomy: TAXONOMY,
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        self.shape.plan(self, inputs, &self.training, false)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        self.shape.run(Self::INFO.name, inputs, plan, cx, &self.training, false)
    }
}

impl Method for Dora {
    const INFO: Info = Info {
        name: "dora",
        title: "DoRA",
        summary: "LoRA that learns length and direction of every row apart, written as a PEFT adapter",
        family: Family::Adapt,
        paper: Paper {
            title: "DoRA: Weight-Decomposed Low-Rank Adaptation",
            reference: "arXiv:2402.09353",
            year: 2024,
        },
        inputs: InputSpec::TUNED,
        output: OutputKind::Adapter,
        taxonomy: TAXONOMY,
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        self.shape.plan(self, inputs, &self.training, true)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        self.shape.run(Self::INFO.name, inputs, plan, cx, &self.training, true)
    }
}

impl LowRank {
    /// The factor on `B A`.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    fn plan<M: Method>(
        &self,
        method: &M,
        inputs: &Inputs,
        training: &Training,
        dora: bool,
    ) -> Result<Plan> {
        let name = M::INFO.name;
        training.check(name, self.learning_rate)?;
        self.check(name)?;
        let model = &inputs.models[0];
        let sites = target::resolve(name, model, &self.target_modules)?;
        target::check_rank(name, self.rank, &sites)?;
        let parts = sites.iter().flat_map(|site| {
            let (out, inputs) = crate::rewrite::shape_of(site);
            let mut shapes = vec![
                (format!("{}.lora_A.weight", site.module()), vec![self.rank, inputs]),
                (format!("{}.lora_B.weight", site.module()), vec![out, self.rank]),
            ];
            if dora {
                shapes.push((format!("{}.lora_magnitude_vector", site.module()), vec![out]));
            }
            shapes
        });
        adapter_plan(method, inputs, training, parts.collect(), 0)
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Range`].
    pub fn check(&self, method: &'static str) -> Result<()> {
        if !self.alpha.is_finite() || self.alpha == 0.0 {
            return Err(Error::range(method, "alpha", self.alpha, "a number other than 0"));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let expected = "a share from 0 up to but not including 1";
            return Err(Error::range(method, "dropout", self.dropout, expected));
        }
        Ok(())
    }

    fn run(
        &self,
        name: &'static str,
        inputs: &Inputs,
        plan: &Plan,
        cx: &Context,
        training: &Training,
        dora: bool,
    ) -> Result<Output> {
        let model = &inputs.models[0];
        let sites = target::resolve(name, model, &self.target_modules)?;
        let examples = training::examples(name, inputs, training, 0)?;
        let (rate, dropout) = (self.learning_rate, self.dropout);
        let session = Session { inputs, plan, cx, training, rate, dropout };
        let trained = session.train(
            &examples,
            |decoder, rng| {
                let scale = self.scale();
                target::for_each(model, decoder, &sites, |_, linear| {
                    let weight = linear.weight();
                    let attached = if dora {
                        linear.attach(DoraForm::init(weight, self.rank, scale, rng), true)
                    } else {
                        let device = weight.device();
                        let form = LoraForm::init(weight.dims(), self.rank, scale, rng, &device);
                        linear.attach(form, true)
                    };
                    debug_assert!(attached, "invariant: loaded linears are dense");
                    Ok(())
                })?;
                Ok(Scope::only(if dora { "*.dora.*" } else { "*.lora.*" }))
            },
            |_| {},
        )?;
        let parts = parts(&trained, &sites)?;
        let config = self.config(inputs, &sites, dora);
        trained.write_adapter(&session, &config, &parts, None)
    }

    /// What PEFT reads.
    fn config(&self, inputs: &Inputs, sites: &[&Site], dora: bool) -> AdapterConfig {
        adapter_config(
            inputs,
            json!({
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": self.rank,
                "lora_alpha": self.alpha,
                "lora_dropout": self.dropout,
                "target_modules": target::names(sites),
                "use_rslora": self.rslora,
                "use_dora": dora,
                "bias": "none",
                "fan_in_fan_out": sites.iter().any(|s| s.layout == refit_store::architecture::Layout::InOut),
                "init_lora_weights": true,
            }),
        )
    }
}

/// The factors of a trained model.
fn parts(trained: &Trained, sites: &[&Site]) -> Result<Vec<Part>> {
    let linears = trained.model.blocks.iter().flat_map(|block| block.linears());
    let wanted: std::collections::HashSet<&str> = sites.iter().map(|s| s.module()).collect();
    let values =
        |x: &burn::tensor::Tensor<2>| Values { shape: x.dims().to_vec(), values: ops::to_vec(x) };
    let mut parts = Vec::new();
    for linear in linears.filter(|linear| wanted.contains(linear.site.as_str())) {
        let form = if let Some(lora) = linear.form::<LoraForm>() {
            Form::Lora {
                a: values(&lora.a.val()),
                b: values(&lora.b.val()),
                scale: lora.scale as f32,
                magnitude: None,
                bias: None,
            }
        } else if let Some(dora) = linear.form::<DoraForm>() {
            Form::Lora {
                a: values(&dora.a.val()),
                b: values(&dora.b.val()),
                scale: dora.scale as f32,
                magnitude: Some(ops::to_vec(&dora.magnitude.val())),
                bias: None,
            }
        } else {
            continue;
        };
        parts.push(Part { site: linear.site.clone(), form });
    }
    Ok(parts)
}
