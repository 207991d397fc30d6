//! ComPEFT: *Compression for Communicating Parameter Efficient Updates via Sparsification and Quantization* (arXiv:2311.13171).
//!
//! Of what a fine-tuning changed (`tau`), the largest entries keep their sign, and one number stands for the size of all:
//!
//! ```text
//! tau_hat = alpha sigma(tau) sign(tau) [ |tau| among the k d largest ]
//! ```
//!
//! `sigma` is the standard deviation over all `d` entries before pruning. An adapter's `tau` are its own tensors: LoRA's `A` and `B`,
//! not their product, counted from 0; (IA)^3's factors counted from 1. A model's `tau` is its difference from the base. The
//! result is an adapter as any other: it runs beside its base, merges into it, and its weight file
//! ([`refit_store::adapter::ternary`]) takes the entropy of the signs and one half-precision number.
//!
//! Decided here: exactly `round(k d)` entries are kept, equal ones by their place, where the reference keeps one more and all
//! that are equal; a zero is never kept. `--mode stc` takes the mean *magnitude* of what is kept (Sattler et al. 2019); the
//! reference averages with signs, which is near 0. `alpha` is chosen by perplexity on `--text`, where there is one, among the
//! values that the paper tries (recalled). One adapter pitfall is reported and not mended: `A` begins at random, and one `sigma` for
//! `A` and `B` may prune `B`, whose entries are smaller, to nothing; `kept_by_tensor` shows it, `--scope tensor` avoids it.

use clap::Args;
use half::f16;
use refit_store::adapter::ternary::{Encoder, Header, Origin, Ternary, TernaryTensor, rice};
use refit_store::adapter::{Adapter, AdapterConfig, Dialect};
use refit_train::eval::{self, Reference, Segment};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::emit;
use crate::error::{Error, Result};
use crate::inputs::Inputs;
use crate::merge::kernel::Merge;
use crate::merge::program::{Program, Work};
use crate::merge::task_arithmetic::TaskArithmetic;
use crate::method::{
    Action, Context, Effort, Family, Info, InputSpec, Method, Need, Output, OutputKind, Paper,
    Plan, PlannedTensor, Taxonomy, Touches, Unit,
};
use crate::rewrite::OutputType;

pub mod decompress;
mod update;

use update::{Cut, Moments, Update};

const NAME: &str = "compeft";
/// Factors that are tried on held-out text.
const ALPHAS: [f64; 9] = [0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0];
/// Tokens per window of that text.
const WINDOW: usize = 256;

/// What is kept of the entries that stay.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Their signs, and `alpha` times the standard deviation of all.
    #[default]
    Compeft,
    /// Their signs, and the mean of their magnitudes.
    Stc,
    /// Themselves.
    PruneOnly,
}

/// What is ranked, and measured, together.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// The whole update.
    #[default]
    Global,
    /// Every tensor by itself, with a number of its own.
    Tensor,
}

/// Parameters of ComPEFT.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Compeft {
    /// Share of the entries that is kept, above 0 and at most 1.
    #[arg(long, default_value_t = 0.2)]
    pub density: f64,
    /// Factor on the standard deviation; with --text the best of the paper's is taken.
    #[arg(long, default_value_t = 1.0)]
    pub alpha: f64,
    /// What is kept of the entries that stay.
    #[arg(long, value_enum, default_value_t)]
    pub mode: Mode,
    /// What is ranked together.
    #[arg(long, value_enum, default_value_t)]
    pub scope: Scope,
    /// Most tokens of --text that alpha is chosen on.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub eval_tokens: usize,
}

crate::paper_defaults!(Compeft);

impl Compeft {
    fn check(&self) -> Result<()> {
        if !(self.density > 0.0 && self.density <= 1.0) {
            let expected = "a share above 0 and at most 1 (0.2 keeps a fifth)";
            return Err(Error::range(NAME, "density", self.density, expected));
        }
        if !(self.alpha.is_finite() && self.alpha >= 0.0) {
            return Err(Error::range(NAME, "alpha", self.alpha, "a number that is 0 or more"));
        }
        Ok(())
    }

    fn keep(&self, count: u64) -> u64 {
        (self.density * count as f64).round() as u64
    }
}

/// What is compressed, and how it says so.
struct Source<'a> {
    update: Update<'a>,
    origin: Origin,
    config: AdapterConfig,
}

impl<'a> Source<'a> {
    fn of(inputs: &'a Inputs) -> Result<Self> {
        let base = inputs.base.expect("invariant: a base is required");
        let beside: Vec<usize> = inputs.beside_base().collect();
        match (&inputs.adapters[..], &beside[..]) {
            ([adapter], []) => Self::adapter(&adapter.adapter, inputs, base),
            ([], [tuned]) => {
                // The same fitting as before a merge.
                let kernel = TaskArithmetic::default().kernel(1)?;
                let program = Program::of_whole_models(inputs, &kernel, OutputType::F32)?;
                let merged =
                    |job: &&crate::merge::program::Job| matches!(job.work, Work::Merge { .. });
                let names: Vec<String> = program
                    .jobs
                    .values()
                    .filter(merged)
                    .map(|job| job.tensor.name.clone())
                    .collect();
                let raw = Map::from_iter([
                    ("refit_type".to_owned(), json!("delta")),
                    ("base_model_name_or_path".to_owned(), json!(inputs.models[base].source)),
                ]);
                let update = Update::full(inputs, base, *tuned, &names)?;
                Ok(Self { update, origin: Origin::Zero, config: AdapterConfig::new(raw) })
            }
            _ => Err(Error::ModelCount {
                method: NAME,
                expected: "one fine-tuned model or one adapter beside the base".into(),
                given: format!("{} models and {} adapters", beside.len(), inputs.adapters.len()),
            }),
        }
    }

    fn adapter(adapter: &Adapter, inputs: &Inputs, base: usize) -> Result<Self> {
        let fault = |problem: &str| Error::BadData {
            source_name: adapter.path().display().to_string(),
            problem: problem.to_owned(),
        };
        if adapter.ternary()?.is_some() {
            return Err(fault("it is compressed already"));
        }
        if adapter.dialect() == Dialect::AdapterHub {
            return Err(fault("AdapterHub's layout cannot be written; save it with PEFT first"));
        }
        adapter.check_base(&inputs.models[base].artifact)?;
        let mut tensors = adapter.tensors()?;
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let origin = match adapter.config().peft_type() {
            Some("IA3") => Origin::One,
            _ => Origin::Zero,
        };
        let from = if origin == Origin::One { 1.0 } else { 0.0 };
        let update = Update::Adapter { tensors, origin: from };
        Ok(Self { update, origin, config: adapter.config().clone() })
    }
}

impl Method for Compeft {
    const INFO: Info = Info {
        name: NAME,
        title: "ComPEFT",
        summary: "Shrinks an adapter, or what a fine-tuning changed, to signs and one number: 8 to 50 times smaller",
        family: Family::Quantize,
        paper: Paper {
            title: "ComPEFT: Compression for Communicating Parameter Efficient Updates via Sparsification and Quantization",
            reference: "arXiv:2311.13171",
            year: 2023,
        },
        inputs: InputSpec {
            min_models: 0,
            max_models: Some(1),
            base: Need::Required,
            adapters: Need::Optional,
            text: Need::Optional,
            data_role: "held-out text that alpha is chosen on",
            ..InputSpec::WEIGHTS
        },
        output: OutputKind::Adapter,
        taxonomy: Taxonomy {
            path: &["reuse", "update compression"],
            needs: Effort::None,
            touches: &[Touches::Weights],
            composes_with: &["merge-adapter", "rtn", "gptq"],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        self.check()?;
        let source = Source::of(inputs)?;
        let mut plan = Plan::of(self);
        let tensors = source.update.tensors();
        let total: u64 =
            tensors.iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
        let k = self.density.min(1.0);
        let bits = match self.mode {
            Mode::PruneOnly => 34.0 * k,
            _ => entropy(k),
        };
        plan.output_bytes = (bits * total as f64 / 8.0) as u64 + 64 * tensors.len() as u64;
        plan.tensors = tensors
            .into_iter()
            .map(|(name, shape)| PlannedTensor {
                bytes: (bits * shape.iter().product::<usize>() as f64 / 8.0) as u64,
                name,
                shape,
                dtype: "F32".into(),
                action: Action::Transform,
            })
            .collect();
        let largest = plan.tensors.iter().map(|t| t.shape.iter().product::<usize>()).max();
        plan.peak_memory = (rayon::current_num_threads() * 8 * largest.unwrap_or(0)) as u64
            + 2 * plan.output_bytes
            + (64 << 20);
        plan.steps.push(format!(
            "keep {} of {total} entries as signs, about {:.2} bits for each entry of the update",
            self.keep(total),
            bits
        ));
        if !inputs.text.is_empty() {
            plan.steps.push(format!("choose alpha among {ALPHAS:?} on held-out text"));
        }
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let source = Source::of(inputs)?;
        let fingerprints = inputs
            .models
            .iter()
            .map(|model| Ok(model.artifact.fingerprint()?))
            .collect::<Result<Vec<String>>>()?;
        let base = &inputs.models[inputs.base.unwrap_or(0)];
        cx.progress.begin("compressing", 0, Unit::Tensors);
        let compressed = cx.install(|| self.compress(&source));
        cx.progress.end();
        let (mut ternary, mut report, mut warnings) = compressed?;
        if let Update::Full { .. } = source.update {
            ternary.header.base = Some(base.artifact.content_hash()?);
        }
        if !inputs.text.is_empty() && self.mode == Mode::Compeft {
            let tried = self.choose(&mut ternary, &source.config, inputs, cx)?;
            report["alpha"] = json!(ternary.header.alpha);
            report["perplexity_by_alpha"] = tried;
        }
        report["scales"] = json!(ternary.header.scales.len());
        if let [scale] = ternary.header.scales[..] {
            report["scale"] = json!(scale);
        }
        // The card counts what the file holds, not what it stands for.
        let mut held = plan.clone();
        held.tensors = parts(&ternary)?;
        let (lineage, card) = emit::describe_adapter(inputs, &fingerprints, &held, cx, &report)?;
        let out = cx.out()?;
        let artifact = ternary.write(out, &source.config, lineage, card, cx.force)?;
        if report["kept"] == 0 {
            warnings.push("the update is zero: the file says so and changes nothing".into());
        }
        Ok(Output { artifact: Some(artifact), report, warnings })
    }
}

/// The tensors of the weight file.
fn parts(ternary: &Ternary) -> Result<Vec<PlannedTensor>> {
    let header = serde_json::to_vec(&ternary.header).map_err(|error| Error::BadData {
        source_name: NAME.into(),
        problem: format!("the header cannot be written: {error}"),
    })?;
    let values = ternary.values.as_ref().map_or(0, Vec::len);
    let sizes = [
        ("header", header.len(), "U8"),
        ("payload", ternary.payload.len(), "U8"),
        ("values", values, "F32"),
    ];
    let part = |(name, count, dtype): (&str, usize, &str)| PlannedTensor {
        name: name.into(),
        shape: vec![count],
        dtype: dtype.into(),
        bytes: if dtype == "F32" { 4 * count as u64 } else { count as u64 },
        action: Action::Transform,
    };
    Ok(sizes.into_iter().filter(|(_, count, _)| *count > 0).map(part).collect())
}

/// Bits per entry that signs of a share `k` need at least.
fn entropy(k: f64) -> f64 {
    let part = |p: f64| if p > 0.0 { -p * p.log2() } else { 0.0 };
    part(1.0 - k) + 2.0 * part(k / 2.0)
}

impl Compeft {
    fn compress(&self, source: &Source) -> Result<(Ternary, Value, Vec<String>)> {
        let update = &source.update;
        let names = update.tensors();
        let moments = update.each(|_, values| Moments::of(values))?;
        let (cuts, sigma) = match self.scope {
            Scope::Global => {
                let mut all = Moments::of(&[]);
                moments.iter().for_each(|one| all.add(one));
                let total: u64 =
                    names.iter().map(|(_, s)| s.iter().product::<usize>() as u64).sum();
                let (bin, left) = all.bin(self.keep(total));
                let mut low = vec![0u64; 1 << 15];
                for counts in update.each(|_, values| update::low_counts(values, bin))? {
                    low.iter_mut().zip(counts).for_each(|(a, b)| *a += b);
                }
                (vec![update::cut(bin, left, &low)], vec![all.sigma()])
            }
            Scope::Tensor => {
                let cuts = update.each(|at, values| {
                    let (bin, left) = moments[at].bin(self.keep(values.len() as u64));
                    update::cut(bin, left, &update::low_counts(values, bin))
                })?;
                (cuts, moments.iter().map(Moments::sigma).collect())
            }
        };
        let mut cuts = cuts;
        if sigma.iter().all(|sigma| *sigma == 0.0) {
            cuts = vec![Cut::nothing(); cuts.len()];
        }
        let rice = rice(self.density);
        let mut encoder = Encoder::new(rice);
        let (mut start, mut values, mut sums) = (0u64, Vec::new(), vec![(0f64, 0u64); cuts.len()]);
        let mut kept_by_tensor = Map::new();
        let mut untrained = Vec::new();
        // One pass in order: ties are kept by their place in the whole update.
        for (at, (name, shape)) in names.iter().enumerate() {
            let tensor = update.values(at)?;
            let which = if cuts.len() == 1 { 0 } else { at };
            let mut kept = 0u64;
            for (i, x) in tensor.iter().enumerate() {
                if cuts[which].keeps(*x) {
                    encoder.push(start + i as u64, *x < 0.0);
                    sums[which].0 += f64::from(x.abs());
                    sums[which].1 += 1;
                    kept += 1;
                    if self.mode == Mode::PruneOnly {
                        values.push(*x);
                    }
                }
            }
            if name.contains("lora_B") && tensor.iter().all(|x| *x == 0.0) {
                untrained.push(name.clone());
            }
            let count = shape.iter().product::<usize>();
            kept_by_tensor.insert(name.clone(), json!(kept as f64 / count.max(1) as f64));
            start += count as u64;
        }
        let (kept, payload) = encoder.finish();
        let half = |x: f64| f16::from_f64(x).to_f32();
        let scales = match self.mode {
            Mode::Compeft => sigma.iter().map(|sigma| half(self.alpha * sigma)).collect(),
            Mode::Stc => sums.iter().map(|(sum, n)| half(sum / (*n).max(1) as f64)).collect(),
            Mode::PruneOnly => Vec::new(),
        };
        let mut warnings = Vec::new();
        if let Some(first) = untrained.first() {
            warnings.push(format!(
                "`{first}` is zero, with {} like it: the adapter was not trained",
                untrained.len() - 1
            ));
        }
        if let Some(scale) =
            scales.iter().zip(&sigma).find(|(s, sigma): &(&f32, &f64)| **s == 0.0 && **sigma > 0.0)
        {
            warnings.push(format!("a scale of {} is below half precision and became 0", scale.1));
        }
        let tensors =
            names.into_iter().map(|(name, shape)| TernaryTensor { name, shape }).collect();
        let header = Header {
            version: 1,
            origin: source.origin,
            base: None,
            density: self.density,
            alpha: self.alpha,
            sigma: sigma.clone(),
            scales,
            rice,
            kept,
            payload: refit_store::hash::blake3_hex(&payload),
            tensors,
        };
        let values = (self.mode == Mode::PruneOnly).then_some(values);
        let ternary = Ternary { header, payload, values };
        let bits = 8.0 * ternary.bytes() as f64 / start.max(1) as f64;
        let report = json!({
            "entries": start,
            "kept": kept,
            "payload_bytes": ternary.bytes(),
            "bits_per_entry": bits,
            "times_smaller_than_fp16": if bits > 0.0 { json!(16.0 / bits) } else { Value::Null },
            "alpha": self.alpha,
            "sigma": if sigma.len() == 1 { json!(sigma[0]) } else { Value::Null },
            "kept_by_tensor": kept_by_tensor,
        });
        Ok((ternary, report, warnings))
    }

    /// Sets the alpha that is best on held-out text; returns the perplexity of each.
    fn choose(
        &self,
        ternary: &mut Ternary,
        config: &AdapterConfig,
        inputs: &Inputs,
        cx: &Context,
    ) -> Result<Value> {
        let base = &inputs.models[inputs.base.unwrap_or(0)];
        let tokenizer = base.tokenizer()?;
        let segments = inputs
            .text
            .iter()
            .map(|text| Ok(Segment::new(text.source.clone(), tokenizer.encode(&text.text, false)?)))
            .collect::<Result<Vec<_>>>()?;
        let each = self.eval_tokens.div_ceil(segments.len().max(1));
        let options = eval::Options {
            window: Some(WINDOW),
            max_tokens: Some(each),
            resamples: 0,
            ..eval::Options::default()
        };
        let scratch = tempfile::tempdir_in(&cx.temp_dir)
            .map_err(|source| Error::Io { path: cx.temp_dir.clone(), source })?;
        let (mut best, mut tried) = ((f64::INFINITY, self.alpha), Map::new());
        cx.progress.begin("choosing alpha", ALPHAS.len() as u64, Unit::Steps);
        for alpha in ALPHAS {
            let mut candidate = ternary.clone();
            candidate.header.alpha = alpha;
            candidate.header.scales = candidate
                .header
                .sigma
                .iter()
                .map(|sigma| f16::from_f64(alpha * sigma).to_f32())
                .collect();
            let place = scratch.path().join(format!("{alpha}"));
            let lineage = refit_store::Lineage::new(NAME, json!({}));
            candidate.write(&place, config, lineage, refit_store::Card::new(NAME), true)?;
            let mut adapter = Adapter::open(&place)?;
            adapter.align(&base.artifact);
            let decoder = refit_nn::Decoder::load(&base.artifact, &refit_nn::BurnDevice::flex())?;
            let decoder = refit_nn::adapter::attach(decoder, &adapter)?;
            let found =
                eval::perplexity(&decoder, &segments, &options, Reference::None, &|_, _| {})?;
            tried.insert(alpha.to_string(), json!(found.perplexity));
            if found.perplexity < best.0 {
                best = (found.perplexity, alpha);
                *ternary = candidate;
            }
            cx.progress.advance(1);
        }
        cx.progress.end();
        Ok(json!(tried))
    }
}
