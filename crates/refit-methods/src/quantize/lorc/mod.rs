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

use std::collections::BTreeMap;
use std::sync::Mutex;

use clap::Args;
use rayon::prelude::*;
use refit_nn::block::Block;
use refit_store::adapter::{self, AdapterConfig, Form, Part, Values};
use refit_store::architecture::{Layout, Site};
use refit_store::{Card, DType, Lineage, SideFile};
use refit_train::calibrate::{self, BlockStats, Outcome};
use refit_train::observe::StatsRequest;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::calibrated::Calibration;
use crate::emit::Emitter;
use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::method::{
    Action, Claim, Context, Effort, Family, Info, InputSpec, Inputs, Method, Need, Output,
    OutputKind, Paper, Plan, PlannedTensor, Taxonomy, Touches, Unit,
};
use crate::quantize::chain::Group;
use crate::quantize::record::{self, QuantizedTensor, Record};
use crate::registry::{self, Configured};
use crate::rewrite::{self, OutputType, read_matrix, shape_of, transpose};

mod claim;
mod compensate;

use compensate::{Bytes, Compensation, Weighting, compensate};

const NAME: &str = "lorc";
/// Directory of the adapter in the output.
pub const ADAPTER: &str = "lorc";
/// An error below this share of the squared weights is rounding of the floats themselves.
const NOTHING: f64 = 1e-10;

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

/// What was found of one matrix.
struct Found {
    /// Shape `(out, in)`.
    shape: (usize, usize),
    /// The factors as they are stored; none where nothing was lost.
    product: Option<Stored>,
    /// Share of the squared weights that the quantizer lost, and that is lost now.
    before: f64,
    after: f64,
}

/// A product, in the orientation of the stored matrix.
struct Stored {
    /// `lorc_u`, then `lorc_v`.
    factors: [StoredFactor; 2],
    /// What they stand for, `U [out, m]` and `V [m, in]`.
    exact: Compensation,
}

struct StoredFactor {
    values: Vec<f32>,
    bytes: Option<Bytes>,
}

impl Lorc {
    /// Names, shapes and types of one matrix's factors.
    fn tensors(&self, site: &Site, rank: usize) -> Vec<PlannedTensor> {
        let (rows, columns) = (site.shape[0], site.shape[1]);
        let module = module(&site.name);
        let mut tensors = Vec::new();
        for (part, shape) in [("lorc_u", vec![rows, rank]), ("lorc_v", vec![rank, columns])] {
            let mut add = |end: &str, shape: Vec<usize>, dtype: DType| {
                tensors.push(PlannedTensor {
                    name: format!("{module}.{part}{end}"),
                    bytes: dtype.bytes_of(&shape).unwrap_or(0),
                    shape,
                    dtype: dtype.to_string(),
                    action: Action::Transform,
                });
            };
            if self.factor_bits == 8 {
                add("_scale", vec![rank], DType::F32);
                add("", shape, DType::I8);
            } else {
                add("", shape, DType::F16);
            }
        }
        tensors
    }

    /// Every matrix's compensation, by the tensor's name.
    fn compensations(
        &self,
        inputs: &Inputs,
        original: &ModelInput,
        quantized: &ModelInput,
        cx: &Context,
    ) -> Result<BTreeMap<String, Found>> {
        let sites = rewrite::linears(original)?;
        if self.aware == Aware::None {
            cx.progress.begin("compensating", sites.len() as u64, Unit::Tensors);
            let found = cx.install(|| {
                let one = |site: &&Site| {
                    let found = self.find(original, quantized, site, &Weighting::Plain, cx.seed)?;
                    cx.progress.advance(1);
                    Ok((site.name.clone(), found))
                };
                sites.par_iter().with_max_len(1).map(one).collect()
            });
            cx.progress.end();
            return found;
        }
        let sequences = self.calibration.draw(&alone(original, inputs), cx.seed)?;
        let full = self.aware == Aware::Full;
        let request = if full { StatsRequest::GRAM } else { StatsRequest::SUM_SQUARES };
        let all = Mutex::new(BTreeMap::new());
        let mut visit = |_: usize, _: &mut Block, stats: &BlockStats| -> Result<Outcome> {
            for group in stats.groups() {
                let stats = &group.stats;
                let first = group.sites.first().map_or("", |site| site.as_str());
                let weighting = match stats.gram() {
                    Some(gram) => Weighting::full(&gram, stats.columns(), stats.rows())
                        .map_err(|error| Error::tensor("calibration", first, error.to_string()))?,
                    None => Weighting::diagonal(stats),
                };
                group.sites.par_iter().with_max_len(1).try_for_each(|module| {
                    let name = format!("{module}.weight");
                    let Some(site) = sites.iter().find(|site| site.name == name) else {
                        return Ok(());
                    };
                    let found = self.find(original, quantized, site, &weighting, cx.seed)?;
                    all.lock()
                        .expect("invariant: no thread panics while adding")
                        .insert(name, found);
                    Ok::<_, Error>(())
                })?;
            }
            Ok(Outcome::Unchanged)
        };
        let blocks = original.artifact.architecture().layers() as u64;
        cx.progress.begin("compensating", blocks, Unit::Blocks);
        let progress = |done: u64, _: u64| cx.progress.advance(u64::from(done > 0));
        let options = calibrate::Options::new(request);
        let ran = cx.install(|| {
            calibrate::run(&original.artifact, &sequences, &options, &mut visit, &progress)
        });
        cx.progress.end();
        ran?;
        let mut all = all.into_inner().expect("invariant: no thread panics while adding");
        for site in sites {
            // What no block of the running model holds was not seen.
            if !all.contains_key(&site.name) {
                let found = self.find(original, quantized, site, &Weighting::Plain, cx.seed)?;
                all.insert(site.name.clone(), found);
            }
        }
        Ok(all)
    }

    fn find(
        &self,
        original: &ModelInput,
        quantized: &ModelInput,
        site: &Site,
        weighting: &Weighting,
        seed: u64,
    ) -> Result<Found> {
        let shape @ (out, inputs) = shape_of(site);
        let before = read_matrix(original, site)?;
        let mut error = read_matrix(quantized, site)?;
        error.iter_mut().zip(&before).for_each(|(q, w)| *q = w - *q);
        let square = |values: &[f32]| values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        let norm = square(&before);
        drop(before);
        let share = |left: f64| if norm > 0.0 { left / norm } else { 0.0 };
        let lost = share(square(&error));
        if lost <= NOTHING {
            return Ok(Found { shape, product: None, before: lost, after: lost });
        }
        let both = compensate(&error, shape, self.rank, weighting, seed)
            .map_err(|error| Error::tensor(&original.source, &site.name, error.to_string()))?;
        let stored = self.store(site, both, shape);
        let product = stored.exact.product((out, inputs));
        error.iter_mut().zip(&product).for_each(|(e, p)| *e -= p);
        let after = share(square(&error));
        Ok(Found { shape, product: Some(stored), before: lost, after })
    }

    /// Rounds the factors to what is stored.
    fn store(&self, site: &Site, both: Compensation, (out, inputs): (usize, usize)) -> Stored {
        let Compensation { u, v, rank } = both;
        let turned = site.layout == Layout::InOut;
        let (left, right) = match turned {
            true => (transpose(&v, rank, inputs), transpose(&u, out, rank)),
            false => (u, v),
        };
        let columns = site.shape[1];
        let round = |values: Vec<f32>, rank_of: &dyn Fn(usize) -> usize| match self.factor_bits {
            8 => {
                let bytes = Bytes::round(&values, rank, rank_of);
                StoredFactor { values: bytes.decode(rank_of), bytes: Some(bytes) }
            }
            _ => {
                let half = |x: f32| half::f16::from_f32(x).to_f32();
                StoredFactor { values: values.into_iter().map(half).collect(), bytes: None }
            }
        };
        let left = round(left, &|at| at % rank);
        let right = round(right, &|at| at / columns);
        let (u, v) = match turned {
            true => (transpose(&right.values, rank, out), transpose(&left.values, inputs, rank)),
            false => (left.values.clone(), right.values.clone()),
        };
        Stored { factors: [left, right], exact: Compensation { u, v, rank } }
    }

    /// The plan less the factors of matrices that need none.
    fn without_idle(
        &self,
        plan: &Plan,
        model: &ModelInput,
        found: &BTreeMap<String, Found>,
    ) -> Plan {
        let mut plan = plan.clone();
        let sites = model.artifact.architecture().linears();
        for site in sites.filter(|site| found.get(&site.name).is_some_and(|f| f.product.is_none()))
        {
            for part in self.tensors(site, self.rank) {
                plan.tensors.retain(|tensor| tensor.name != part.name);
            }
        }
        plan.output_bytes = plan.tensors.iter().map(|tensor| tensor.bytes).sum();
        plan
    }

    /// The quantizer's record with the factors counted.
    fn record(
        &self,
        original: &ModelInput,
        quantized: &ModelInput,
        found: &BTreeMap<String, Found>,
    ) -> Result<(Vec<SideFile>, Value)> {
        let (record, known) = (Record::default(), record::read(quantized));
        for (name, entry) in &known {
            let Some(found) = found.get(name) else { continue };
            let (out, inputs) = found.shape;
            let more = match &found.product {
                Some(product) => self.factor_bytes(found.shape, product.exact.rank),
                None => 0,
            };
            let weights = (out * inputs) as u64;
            record.put(
                name,
                weights,
                QuantizedTensor {
                    packed_bytes: entry.packed_bytes + more,
                    bits_per_weight: entry.bits_per_weight + 8.0 * more as f64 / weights as f64,
                    relative_error: found.after,
                    ..*entry
                },
            );
        }
        match known.is_empty() {
            // Nothing is known of the codes: another tool's.
            true => Ok((Vec::new(), json!({}))),
            false => record.finish(original),
        }
    }
}

fn module(tensor: &str) -> &str {
    tensor.strip_suffix(".weight").unwrap_or(tensor)
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

/// Writes one matrix's factors.
fn write(emitter: &Emitter, tensor: &str, product: &Stored) -> Result<()> {
    let module = module(tensor);
    for (part, factor) in ["lorc_u", "lorc_v"].iter().zip(&product.factors) {
        let name = format!("{module}.{part}");
        match &factor.bytes {
            Some(bytes) => {
                let codes: Vec<u8> = bytes.codes.iter().map(|code| *code as u8).collect();
                emitter.write_raw(&name, 0, &codes)?;
                let scale = format!("{name}_scale");
                emitter.write_f32(&scale, 0, &bytes.scales)?;
                emitter.done(&scale)?;
            }
            None => emitter.write_f32(&name, 0, &factor.values)?,
        }
        emitter.done(&name)?;
    }
    Ok(())
}

/// The products as an adapter of PEFT, in the directory [`ADAPTER`] of the output.
fn adapter_files(
    model: &ModelInput,
    found: &BTreeMap<String, Found>,
    scratch: &std::path::Path,
) -> Result<Vec<SideFile>> {
    let mut parts = Vec::new();
    for (name, Found { shape: (out, inputs), product, .. }) in found {
        let Some(Stored { exact: Compensation { u, v, rank }, .. }) = product else { continue };
        let form = Form::Lora {
            a: Values::new([*rank, *inputs], v.clone())?,
            b: Values::new([*out, *rank], u.clone())?,
            scale: 1.0,
            magnitude: None,
            bias: None,
        };
        parts.push(Part { site: module(name).to_owned(), form });
    }
    if parts.is_empty() {
        return Ok(Vec::new());
    }
    let config = AdapterConfig::describe(&parts, None)?;
    let turned = model.artifact.architecture().linears().any(|s| s.layout == Layout::InOut);
    let config = if turned { config.with("fan_in_fan_out", json!(true)) } else { config };
    let out = scratch.join("adapter");
    let (lineage, card) = (Lineage::new(NAME, json!({})), Card::new(NAME));
    adapter::write(&out, &config, &parts, None, lineage, card, true, Vec::new())?;
    let files = [adapter::FILE_NAME, adapter::WEIGHTS_NAME];
    let file = |name: &&str| {
        let bytes = std::fs::read(out.join(name))
            .map_err(|source| Error::Io { path: out.join(name), source })?;
        Ok(SideFile::from_bytes(format!("{ADAPTER}/{name}"), bytes))
    };
    files.iter().map(file).collect()
}
