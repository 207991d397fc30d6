//! LoRC: *ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation*
//! (arXiv:2303.08302).
//!
//! What a quantizer lost of a matrix is given back as a product of two thin ones, which stands beside the codes and is never added
//! into them:
//!
//! ```text
//! E = W - W_hat = U S V^T,   U_hat = U_m S_m^(1/2),   V_hat = S_m^(1/2) V_m^T,   y = x W_hat^T + (x V_hat^T) U_hat^T
//! ```
//!
//! The equations are recalled and not read again; the memory that factors take is the card's. `--base ORIGINAL` takes a model that
//! any quantizer made; without it the model is quantized first, by `rtn` or `gptq` (the paper's local and global distillation of
//! quantizers are not here). Beyond the paper: `--aware` makes the product the best one for the outputs on text, in full (EoRA,
//! arXiv:2410.21271) or for the sizes of the inputs alone.
//!
//! The result holds `W_hat` under its own name, `X.lorc_u` and `X.lorc_v` beside it ([`refit_store::formats::factored`]), and in
//! `lorc/` the same product as an adapter of PEFT, for every runtime that takes one. refit runs codes and factors as they are;
//! what reads weights reads `W_hat + U_hat V_hat`.

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::calibrated::Calibration;
use crate::emit::Emitter;
use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::method::{
    Claim, Context, Effort, Family, Info, InputSpec, Inputs, Method, Need, Output, OutputKind,
    Paper, Plan, Taxonomy, Touches,
};
use crate::quantize::chain::Group;
use crate::quantize::record;
use crate::registry::{self, Configured};
use crate::rewrite::{self, OutputType, shape_of};

mod claim;
mod compensate;
mod product;

use product::{Found, adapter_files, write};

const NAME: &str = "lorc";
/// Directory of the adapter in the output.
pub const ADAPTER: &str = "lorc";
/// Who quantizes a model that comes as it is.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Quantizer {
    /// Round to nearest; needs no data.
    #[default]
    Rtn,
    /// GPTQ; needs text.
    Gptq,
}

/// What the product is the best for.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Aware {
    /// The weights: LoRC.
    #[default]
    None,
    /// The weights, each column as important as its inputs are large; needs text.
    Diagonal,
    /// The outputs (EoRA); needs text.
    Full,
}

/// Parameters of LoRC.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Lorc {
    /// Rank of the product.
    #[arg(long, default_value_t = 8)]
    pub rank: usize,
    /// Bits of the product's factors: 16 or 8.
    #[arg(long, value_name = "BITS", default_value_t = 16)]
    pub factor_bits: u8,
    /// What the product is the best for.
    #[arg(long, value_enum, default_value_t)]
    pub aware: Aware,
    /// Who quantizes, where no quantized model is given.
    #[arg(long, value_enum, default_value_t)]
    pub quantizer: Quantizer,
    /// Bits per weight, 2 to 8.
    #[arg(long, default_value_t = 4)]
    pub bits: u8,
    /// Consecutive inputs that share a scale, or `row`.
    #[arg(long, default_value = "row")]
    pub group: Group,
    /// Give every group a zero point of its own.
    #[arg(long)]
    pub asymmetric: bool,
    /// Allow factors that take more bits than 16-bit weights would.
    #[arg(long)]
    pub allow_large: bool,
    /// Calibration text.
    #[command(flatten)]
    #[serde(flatten)]
    pub calibration: Calibration,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Lorc);

impl Lorc {
    /// The quantizer with its parameters.
    fn quantizer(&self) -> Result<Box<dyn Configured>> {
        let mut parameters = json!({
            "bits": self.bits,
            "group": self.group,
            "asymmetric": self.asymmetric,
            "dtype": self.dtype,
        });
        let name = match self.quantizer {
            Quantizer::Rtn => "rtn",
            Quantizer::Gptq => {
                parameters["samples"] = json!(self.calibration.samples);
                parameters["sequence_length"] = json!(self.calibration.sequence_length);
                "gptq"
            }
        };
        registry::get(name)?.from_value(&parameters)
    }

    /// Whether text is needed.
    fn calibrates(&self, inputs: &Inputs) -> bool {
        self.aware != Aware::None || (inputs.base.is_none() && self.quantizer == Quantizer::Gptq)
    }

    /// Stored bytes of the factors of one matrix.
    fn factor_bytes(&self, (out, inputs): (usize, usize), rank: usize) -> u64 {
        let codes = rank * (out + inputs) * usize::from(self.factor_bits) / 8;
        let scales = if self.factor_bits == 8 { 2 * 4 * rank } else { 0 };
        (codes + scales) as u64
    }

    fn check(&self, inputs: &Inputs) -> Result<()> {
        if self.rank == 0 {
            let expected = "at least 1; rank 0 is the quantizer alone";
            return Err(Error::range(NAME, "rank", self.rank, expected));
        }
        if !matches!(self.factor_bits, 8 | 16) {
            return Err(Error::range(NAME, "factor_bits", self.factor_bits, "8 or 16"));
        }
        if self.calibrates(inputs) {
            self.calibration.check(NAME)?;
            if inputs.text.is_empty() {
                let what = Self::INFO.inputs.data_role.to_owned();
                return Err(Error::MissingData { method: NAME, what, how: "--text FILE" });
            }
        }
        Ok(())
    }
}

/// The original and, where there is one, the quantized model.
fn models(inputs: &Inputs) -> (&ModelInput, Option<&ModelInput>) {
    let first = inputs.beside_base().next().expect("invariant: one model beside the base");
    match inputs.base {
        Some(base) => (&inputs.models[base], Some(&inputs.models[first])),
        None => (&inputs.models[first], None),
    }
}

/// A model with no data but the calibration text.
fn alone(model: &ModelInput, inputs: &Inputs) -> Inputs {
    Inputs { models: vec![model.clone()], text: inputs.text.clone(), ..Inputs::default() }
}

impl Method for Lorc {
    const INFO: Info = Info {
        name: NAME,
        title: "LoRC",
        summary: "Gives a quantized model back some of what it lost, as two thin matrices beside each of its own",
        family: Family::Quantize,
        paper: Paper {
            title: "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation",
            reference: "arXiv:2303.08302",
            year: 2023,
        },
        inputs: InputSpec {
            text: Need::Optional,
            base: Need::Optional,
            data_role: "calibration text: for `--quantizer gptq` and `--aware`",
            ..InputSpec::WEIGHTS
        },
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["quantization", "post-training", "weight-only"],
            needs: Effort::None,
            touches: &[Touches::Weights, Touches::Architecture],
            composes_with: &[],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        self.check(inputs)?;
        let (original, given) = models(inputs);
        let sites = rewrite::linears(original)?;
        let mut plan = match given {
            Some(quantized) => {
                same_tensors(original, quantized)?;
                crate::factorize::layout::refuse_factored(NAME, quantized)?;
                rewrite::plan(self, quantized, &[], self.dtype)
            }
            None => {
                crate::factorize::layout::refuse_factored(NAME, original)?;
                let inner = self.quantizer()?.plan(&alone(original, inputs))?;
                Plan { method: NAME.into(), parameters: Plan::of(self).parameters, ..inner }
            }
        };
        let (mut weights, mut bytes) = (0u64, 0u64);
        for site in &sites {
            let shape = shape_of(site);
            let full = shape.0.min(shape.1);
            let rank = self.rank.min(full);
            let taken = self.factor_bytes(shape, rank);
            if taken >= 2 * site.numel() as u64 && !self.allow_large {
                let expected = format!(
                    "at this rank the factors of `{}` ({} x {}) take {taken} bytes, more than its weights in 16 bits; a smaller \
                     rank, or --allow-large",
                    site.name, shape.0, shape.1
                );
                return Err(Error::range(NAME, "rank", self.rank, expected));
            }
            weights += site.numel() as u64;
            bytes += taken;
            for tensor in self.tensors(site, rank) {
                plan.output_bytes += tensor.bytes;
                plan.tensors.push(tensor);
            }
        }
        plan.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let overhead = 8.0 * bytes as f64 / weights as f64;
        plan.steps.push(format!(
            "add a product of rank {} beside {} matrices: {overhead:.3} more bits per weight",
            self.rank,
            sites.len()
        ));
        if overhead > 0.5 {
            plan.warnings.push(format!(
                "the factors take {overhead:.2} bits per weight: smaller groups may do as much for the same bytes; the paper's \
                 matrices are several times as wide"
            ));
        }
        if self.aware == Aware::Full {
            let widest = sites.iter().map(|site| shape_of(site).1).max().unwrap_or(0) as u64;
            plan.peak_memory += 4 * 8 * widest * widest;
        }
        if self.calibrates(inputs) && (given.is_some() || self.quantizer == Quantizer::Rtn) {
            self.calibration.describe(&mut plan, original);
        }
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let (original, given) = models(inputs);
        let scratch = tempfile::Builder::new()
            .prefix("refit-lorc-")
            .tempdir_in(&cx.temp_dir)
            .map_err(|source| Error::Io { path: cx.temp_dir.clone(), source })?;
        let mut warnings = Vec::new();
        let quantized = match given {
            Some(quantized) => quantized.clone(),
            None => {
                let path = scratch.path().join("quantized");
                let (inner, alone) = (self.quantizer()?, alone(original, inputs));
                let mut cx = Context { out: Some(path.clone()), force: true, ..cx.clone() };
                warnings = inner.run(&alone, &inner.plan(&alone)?, &mut cx)?.warnings;
                ModelInput::open(original.source.clone(), &path)?
            }
        };
        let found = self.compensations(inputs, original, &quantized, cx)?;
        let plan = &self.without_idle(plan, original, &found);
        let idle = found.iter().filter(|(_, found)| found.product.is_none()).count();
        if idle > 0 {
            warnings.push(format!(
                "{idle} of {} matrices have nothing to compensate: they lie on the grid already",
                found.len()
            ));
        }
        let mut files = quantized.artifact.side_files().to_vec();
        files.retain(|file| file.name != record::FILE_NAME);
        let emitter = Emitter::begin_with(inputs, plan, cx, files)?;
        for tensor in plan.tensors.iter().filter(|tensor| !emitter.is_done(&tensor.name)) {
            if quantized.artifact.contains(&tensor.name) {
                rewrite::copy(&quantized.artifact, &quantized.source, &emitter, tensor)?;
            }
        }
        for (name, found) in &found {
            if let Some(product) = &found.product {
                write(&emitter, name, product)?;
            }
        }
        let (mut files, mut report) = self.record(original, &quantized, &found)?;
        report["rank"] = json!(self.rank);
        report["compensated_matrices"] = json!(found.len() - idle);
        let share = |pick: fn(&Found) -> f64| {
            found.values().map(pick).sum::<f64>() / found.len().max(1) as f64
        };
        report["mean_relative_error_before"] = json!(share(|found| found.before));
        report["mean_relative_error"] = json!(share(|found| found.after));
        files.extend(adapter_files(original, &found, scratch.path())?);
        let artifact = emitter.finish(inputs, plan, cx, files, &report)?;
        Ok(Output { artifact: Some(artifact), report, warnings })
    }

    fn claim() -> Option<Claim> {
        Some(claim::CLAIM)
    }
}

/// Refuses two models that are not one model twice.
fn same_tensors(original: &ModelInput, quantized: &ModelInput) -> Result<()> {
    for site in rewrite::linears(original)? {
        let found = quantized.artifact.tensor(&site.name).ok().map(|info| info.shape.clone());
        if found.as_ref() != Some(&site.shape) {
            let problem = match found {
                Some(shape) => {
                    format!("`{}` is {:?} in one and {shape:?} in the other", site.name, site.shape)
                }
                None => format!("the quantized model has no `{}`", site.name),
            };
            let (first, second) = (original.source.clone(), quantized.source.clone());
            return Err(Error::Mismatch { first, second, problem });
        }
    }
    Ok(())
}
