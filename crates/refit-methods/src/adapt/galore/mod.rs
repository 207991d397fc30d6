//! GaLore: *GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection* (arXiv:2403.03507).
//!
//! Full-parameter training whose Adam moments live in a rank-`r` projection of each gradient; the projection follows the
//! gradient's singular vectors and is renewed every `T` updates. The rule itself is
//! [`refit_train`'s optimizer](refit_train::train::OptimizerConfig::GaLore), where the equations stand; this method trains a
//! language model with it and writes the whole model.
//!
//! As in the reference, the moments are kept when the basis changes, and embeddings, head, norms and biases get plain Adam. Which
//! matrices are projected follows from the architecture's roles: the reference's rule, names that contain `attn` or `mlp`, misses
//! families that spell them otherwise (GPT-NeoX's `attention.`, OPT's `fc1`). The
//! reference's doubling of `T` in per-layer mode, which works around its hooks firing twice, is not copied.

mod claim;

use clap::Args;
use refit_train::train::optimizer::Side;
use refit_train::train::{OptimizerConfig, Scope, scope};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::finetune::model_plan;
use super::frame::Session;
use super::target;
use super::training::{self, Training};
use crate::error::{Error, Result};
use crate::method::{
    Claim, Context, Effort, Family, Info, InputSpec, Inputs, Method, ModelInput, Output,
    OutputKind, Paper, Plan, Taxonomy, Touches,
};
use crate::rewrite::OutputType;

/// Which side of a gradient is projected, for a weight `[m, n]`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Projection {
    /// The shorter one.
    #[default]
    Std,
    /// The longer one.
    ReverseStd,
    /// Outputs.
    Left,
    /// Inputs.
    Right,
    /// Both.
    Full,
}

/// Parameters of GaLore.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct GaLore {
    /// Rank of the projection.
    #[arg(long, default_value_t = 128)]
    pub rank: usize,
    /// Updates between two projections (T).
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub update_proj_gap: u64,
    /// Factor on the projected update (alpha).
    #[arg(long, default_value_t = 0.25)]
    pub scale: f64,
    /// Side that is projected.
    #[arg(long, value_enum, default_value_t)]
    pub proj_type: Projection,
    /// Matrices that are projected; everything else gets plain Adam: `all-linear` (by their roles, whatever they are called), ends of
    /// module names (`q_proj,down_proj`), or globs on tensor names (`*.attention.*`).
    #[arg(long, value_delimiter = ',', default_value = "all-linear")]
    pub target_modules: Vec<String>,
    /// Moments in 8 bits.
    #[arg(long)]
    pub eight_bit: bool,
    /// Project every gradient as soon as it is there, so that never more than one is held; excludes accumulation and
    /// clipping by the norm of all gradients.
    #[arg(long)]
    pub per_layer: bool,
    /// Peak learning rate.
    #[arg(long, default_value_t = 1e-4)]
    pub learning_rate: f64,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
    /// The run; its optimizer is GaLore's Adam.
    #[command(flatten)]
    #[serde(flatten)]
    pub training: Training,
}

crate::paper_defaults!(GaLore);

impl GaLore {
    /// Names and globs of the tensors that are projected.
    ///
    /// # Errors
    /// A target that matches no matrix.
    fn targets(&self, model: &ModelInput) -> Result<Vec<String>> {
        let is_glob = |target: &&String| target.contains(['*', '?']);
        let (globs, modules): (Vec<&String>, Vec<&String>) =
            self.target_modules.iter().partition(is_glob);
        let matrices = || model.artifact.tensors().iter().filter(|info| info.shape.len() == 2);
        for pattern in &globs {
            if !matrices().any(|info| scope::glob(pattern, &info.name)) {
                let mut kinds: Vec<&str> = model
                    .artifact
                    .architecture()
                    .linears()
                    .filter_map(|site| site.module().rsplit('.').next())
                    .collect();
                kinds.sort_unstable();
                kinds.dedup();
                let expected =
                    format!("it matches no matrix; linears are called {}", kinds.join(", "));
                return Err(Error::range(Self::INFO.name, "target_modules", pattern, expected));
            }
        }
        let mut targets: Vec<String> = globs.into_iter().cloned().collect();
        if !modules.is_empty() || targets.is_empty() {
            let modules: Vec<String> = modules.into_iter().cloned().collect();
            let sites = target::resolve(Self::INFO.name, model, &modules)?;
            targets.extend(sites.into_iter().map(|site| site.name.clone()));
        }
        Ok(targets)
    }

    fn optimizer(&self, names: Vec<String>) -> OptimizerConfig {
        let mut config = OptimizerConfig::galore(self.rank);
        if let OptimizerConfig::GaLore { gap, scale, side, eight_bit, targets, .. } = &mut config {
            *targets = names;
            *gap = self.update_proj_gap;
            *scale = self.scale as f32;
            *eight_bit = self.eight_bit;
            *side = match self.proj_type {
                Projection::Std => Side::Std,
                Projection::ReverseStd => Side::ReverseStd,
                Projection::Left => Side::Left,
                Projection::Right => Side::Right,
                Projection::Full => Side::Full,
            };
        }
        config
    }

    fn check(&self) -> Result<()> {
        let name = Self::INFO.name;
        if self.rank == 0 {
            return Err(Error::range(name, "rank", 0, "at least 1"));
        }
        if self.update_proj_gap == 0 {
            return Err(Error::range(name, "update_proj_gap", 0, "at least 1 update"));
        }
        if !(self.scale > 0.0 && self.scale.is_finite()) {
            return Err(Error::range(name, "scale", self.scale, "a number above 0"));
        }
        if self.per_layer && (self.training.accumulate > 1 || self.training.clip > 0.0) {
            return Err(Error::Conflict {
                method: name,
                problem: "--per-layer drops each gradient as soon as it is used, so there is nothing to accumulate and no norm \
                          of all gradients: take --accumulate 1 and --clip 0"
                    .into(),
            });
        }
        Ok(())
    }
}

impl Method for GaLore {
    const INFO: Info = Info {
        name: "galore",
        title: "GaLore",
        summary: "Trains all parameters with optimizer state of low rank",
        family: Family::Adapt,
        paper: Paper {
            title: "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
            reference: "arXiv:2403.03507",
            year: 2024,
        },
        inputs: InputSpec::TUNED,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["adaptation", "full", "memory-efficient"],
            needs: Effort::FineTuning,
            touches: &[Touches::Weights],
            composes_with: &["model-soups", "rtn", "finequant"],
        },
    };

    fn claim() -> Option<Claim> {
        Some(claim::CLAIM)
    }

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        self.training.check(Self::INFO.name, self.learning_rate)?;
        self.check()?;
        self.targets(&inputs.models[0])?;
        crate::factorize::layout::refuse_factored(Self::INFO.name, &inputs.models[0])?;
        model_plan(self, inputs, &self.training, self.dtype, &Scope::default())
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let training = &self.training;
        let examples = training::examples(Self::INFO.name, inputs, training, 0)?;
        let rate = self.learning_rate;
        let targets = self.targets(&inputs.models[0])?;
        let session = Session { inputs, plan, cx, training, rate, dropout: 0.0 };
        let mut trained = session.train(
            &examples,
            |_, _| Ok(Scope::default()),
            |recipe| {
                recipe.optimizer = self.optimizer(targets);
                recipe.per_layer = self.per_layer;
            },
        )?;
        trained.report["adamw_state_bytes"] = json!(8 * count(&trained.report));
        trained.write_model(&session)
    }
}

fn count(report: &serde_json::Value) -> u64 {
    report["trained_parameters"].as_u64().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use refit_nn::{BurnDevice, Decoder, Trainable};

    use super::*;

    fn fixture(family: &str) -> ModelInput {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../refit-nn/tests/fixtures/hf");
        ModelInput::open(family, folder.join(family)).unwrap()
    }

    fn with(targets: &[&str]) -> GaLore {
        let target_modules = targets.iter().map(|target| (*target).to_owned()).collect();
        GaLore { rank: 2, target_modules, ..GaLore::default() }
    }

    /// Names of the parameters of the running model that are projected.
    fn projected(method: &GaLore, model: &ModelInput) -> Vec<String> {
        let optimizer = method.optimizer(method.targets(model).unwrap()).build().unwrap();
        let decoder = Decoder::load(&model.artifact, &BurnDevice::flex()).unwrap();
        let all = decoder.parameters();
        let targets = all.iter().filter(|p| optimizer.projects(&p.name, &p.shape));
        targets.map(|p| p.name.clone()).collect()
    }

    #[test]
    fn every_linear_of_every_family_is_projected_and_nothing_else() {
        for family in ["gpt-neox", "opt", "gpt2", "llama", "phi3", "gemma2", "qwen3"] {
            let model = fixture(family);
            let mut wanted: Vec<&str> =
                model.artifact.architecture().linears().map(|site| site.name.as_str()).collect();
            let mut found = projected(&GaLore::default(), &model);
            wanted.sort_unstable();
            found.sort_unstable();
            assert!(!wanted.is_empty() && wanted == found, "{family}: {found:?}, not {wanted:?}");
        }
    }

    #[test]
    fn names_and_globs_choose_and_mistakes_are_named() {
        let neox = fixture("gpt-neox");
        for targets in [&["query_key_value", "dense"][..], &["*.attention.*"]] {
            let found = projected(&with(targets), &neox);
            assert!(!found.is_empty(), "{targets:?}");
            assert!(found.iter().all(|name| name.contains(".attention.")), "{found:?}");
        }
        let both = projected(&with(&["*.attention.*", "dense_4h_to_h"]), &neox);
        assert!(both.iter().any(|name| name.contains("4h_to_h")), "{both:?}");
        let refuse = |targets: &[&str]| with(targets).targets(&neox).unwrap_err().to_string();
        let glob = refuse(&["*.attn.*"]);
        assert!(glob.contains("*.attn.*") && glob.contains("query_key_value"), "{glob}");
        let name = refuse(&["query_key_valu"]);
        assert!(name.contains("did you mean `query_key_value`"), "{name}");
    }
}
