//! Export: the same weights in the formats that other tools read.
//!
//! Weights that lie on a grid (because refit, or any other tool, quantized them) are written with the codes and steps
//! that they already have; everything else is re-encoded or quantized, and the plan says which is which. What was
//! written is opened again and compared with the source: equal values are proved, not promised.
//!
//! | | says exactly | does not say |
//! |---|---|---|
//! | GGUF | codes of up to 8 bits, zero points of up to 7, groups that are multiples of 32 | other groups: the source's float type |
//! | compressed-tensors | 2 to 8 bits, any group, zero points; several groups in one model | powers of two, codebooks |
//! | GPTQ | 2, 3, 4, 8 bits, zero points but 0 in version 1; one group and one width for a model | outputs or inputs that are no whole words |
//! | safetensors | everything, decoded | |
//!
//! Two grids of one model go to GPTQ as one: groups become their greatest common divisor, codes the widest width. Both say
//! the same values.

use std::str::FromStr;

use clap::Args;
use refit_store::card::Relation;
use refit_store::lattice::Lattice;
use refit_store::{DType, GgmlType};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Value, json};

use crate::emit::{Container, Emitter};
use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::method::{
    Action, Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper,
    Plan, PlannedTensor, Taxonomy, Touches, Unit,
};

use crate::quantize::activations;

mod blocks;
mod decide;
mod inputs;
pub(crate) mod lattices;
pub mod lora;
mod packed;
mod prove;
mod seen;
mod size;
mod write;

pub(crate) use decide::float_of;
pub use decide::{Decision, How};
pub(crate) use seen::Seen;
pub(crate) use size::{Forecast, Foreseen};

/// Name, shape and type of what compressed-tensors keeps of a linear `[out, in]` on a grid, codes in words.
pub(crate) fn packed_parts(
    tensor: &str,
    shape: [usize; 2],
    lattice: Lattice,
) -> Vec<(String, Vec<usize>, DType)> {
    let packed = Decision {
        source: Some(tensor.to_owned()),
        name: tensor.trim_end_matches(".weight").to_owned(),
        shape: shape.to_vec(),
        dtype: DType::F16.to_string(),
        how: How::Codes(lattice),
        packed: Some(decide::Packing { parts: decide::Parts::Words, lattice }),
    };
    packed.parts()
}

/// Name in messages.
const NAME: &str = "export";

/// A file format for other tools.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// One `model.gguf` for llama.cpp and what builds on it.
    #[default]
    Gguf,
    /// Packed codes for vLLM and transformers.
    CompressedTensors,
    /// Packed codes for vLLM, GPTQModel and others.
    Gptq,
    /// Decoded weights.
    Safetensors,
}

/// How compressed-tensors keeps codes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// `int-quantized` where every matrix has 8 bits and activations are quantized, else `pack-quantized`.
    #[default]
    Auto,
    /// Codes in 32-bit words.
    PackQuantized,
    /// One signed byte a code; needs 8 bits.
    IntQuantized,
}

/// What the reader shall do with activations.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Activations {
    /// What the model states of them, where the format has the word: 8 bits, per token or with a fixed scale.
    #[default]
    Stated,
    /// Nothing.
    None,
    /// Round them to 8 bits, with a scale for every token, while the model runs (W8A8).
    Int8,
}

/// Version of the GPTQ layout, as `quantize_config.json` spells it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
pub enum CheckpointFormat {
    /// Zero points stored minus 1: every reader knows it.
    #[default]
    #[value(name = "gptq")]
    #[serde(rename = "gptq")]
    Gptq,
    /// Zero points as they are: newer readers.
    #[value(name = "gptq_v2")]
    #[serde(rename = "gptq_v2")]
    GptqV2,
}

/// An element type, or `auto`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExportType(pub Option<DType>);

impl ExportType {
    /// Types that can be asked for, by name.
    pub fn names() -> Vec<String> {
        let plain = [DType::F32, DType::F16, DType::BF16].into_iter();
        let blocks = refit_store::formats::gguf::WRITABLE.into_iter().map(DType::Ggml);
        std::iter::once("auto".to_owned())
            .chain(plain.chain(blocks).map(|dtype| dtype.to_string()))
            .collect()
    }
}

impl FromStr for ExportType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = Self::names();
        match names.iter().find(|name| name.eq_ignore_ascii_case(text)) {
            Some(name) => Ok(Self(DType::parse(name))),
            None => Err(format!("`{text}` is none of {}", names.join(", "))),
        }
    }
}

impl std::fmt::Display for ExportType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            None => f.write_str("auto"),
            Some(dtype) => dtype.fmt(f),
        }
    }
}

impl Serialize for ExportType {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ExportType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for ExportType {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ExportType".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "enum": Self::names() })
    }
}

/// Parameters of an export.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Export {
    /// Format to write.
    #[arg(long, value_enum, default_value_t)]
    pub to: Target,
    /// Type of the weight matrices in GGUF and safetensors: F32, F16, BF16, or (GGUF) Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to
    /// Q6_K, TQ1_0, TQ2_0. `auto` keeps every value: the smallest type that holds a matrix's grid, else the source's.
    #[arg(long = "type", value_name = "TYPE", default_value_t)]
    pub r#type: ExportType,
    /// Type of embeddings and head in GGUF. `auto`: as `type`, but Q6_K (or Q8_0) where `type` has fewer bits.
    #[arg(long, value_name = "TYPE", default_value_t)]
    pub embedding_type: ExportType,
    /// How compressed-tensors keeps codes.
    #[arg(long, value_enum, default_value_t)]
    pub layout: Layout,
    /// What a reader of compressed-tensors does with activations.
    #[arg(long, value_enum, default_value_t)]
    pub activations: Activations,
    /// Version of the GPTQ layout.
    #[arg(long, value_enum, default_value_t)]
    pub checkpoint_format: CheckpointFormat,
    /// Write a GGUF file without its tokenizer, where GGUF has no word for it.
    #[arg(long)]
    pub no_tokenizer: bool,
    /// Do not open the output again to compare it with the source.
    #[arg(long)]
    pub no_prove: bool,
}

crate::paper_defaults!(Export);

impl Export {
    /// The model as this format is to hold it: compensations are multiplied out in floats, and left out beside codes.
    fn bare(&self, inputs: &Inputs) -> Result<Inputs> {
        match self.to {
            Target::Safetensors => Ok(inputs.clone()),
            _ => lora::bare(inputs),
        }
    }

    /// The plan for a model that is seen so; metadata and tokenizer are checked apart.
    ///
    /// # Errors
    /// As [`Method::plan`].
    pub(crate) fn plan_seen(&self, model: &ModelInput, seen: &Seen) -> Result<Plan> {
        self.check()?;
        let mut plan = Plan::of(self);
        let decisions = self.decide(model, seen, &mut plan)?;
        let mut largest = 0;
        for decision in &decisions {
            if let Some(source) = &decision.source {
                largest = largest.max(model.artifact.tensor(source)?.numel() as u64);
            }
            for (name, shape, dtype) in decision.parts() {
                let bytes = dtype.bytes_of(&shape).unwrap_or(0);
                plan.output_bytes += bytes;
                let action = match decision.how {
                    How::Quantize => Action::Transform,
                    _ => Action::Copy,
                };
                plan.tensors.push(PlannedTensor {
                    name,
                    shape,
                    dtype: dtype.to_string(),
                    bytes,
                    action,
                });
            }
        }
        if self.to != Target::CompressedTensors && self.activations == Activations::Stated {
            let stated = activations::stated(&model.artifact)?;
            if !stated.is_empty() {
                plan.notes.push(format!(
                    "the model states how {} activations are rounded; only --to compressed-tensors has a word for it",
                    stated.roundings.len()
                ));
            }
        }
        plan.tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let threads = rayon::current_num_threads() as u64;
        // GGUF and safetensors go row by row, a few million weights at a time; packed formats matrix by matrix.
        let piece = match self.to {
            Target::Gguf | Target::Safetensors => largest.min(2 * write::PIECE as u64),
            _ => largest,
        };
        plan.peak_memory = threads * 12 * piece + (64 << 20);
        decide::describe(&decisions, &mut plan);
        plan.decided = serde_json::to_value(&decisions)
            .map_err(|source| Error::Parameters { method: NAME, source })?;
        Ok(plan)
    }

    fn decide(&self, model: &ModelInput, seen: &Seen, plan: &mut Plan) -> Result<Vec<Decision>> {
        match self.to {
            Target::Gguf => blocks::decide(self, model, seen, plan),
            Target::Safetensors => decide::plain(self, model, seen),
            Target::CompressedTensors | Target::Gptq => packed::decide(self, model, seen, plan),
        }
    }

    /// Parameters of one format given for another.
    fn check(&self) -> Result<()> {
        let conflict = |problem: String| Err(Error::Conflict { method: NAME, problem });
        let to = serde_json::to_value(self.to).unwrap_or_default();
        let only = |flag: &str, format: &str| {
            conflict(format!(
                "{flag} belongs to --to {format}, not to --to {}",
                to.as_str().unwrap_or_default()
            ))
        };
        let typed = self.r#type.0;
        match self.to {
            Target::Gguf => {}
            Target::Safetensors => {
                if let Some(dtype @ DType::Ggml(_)) = typed {
                    return conflict(format!(
                        "safetensors has no type {dtype}; take F32, F16 or BF16, or --to gguf"
                    ));
                }
            }
            _ if typed.is_some() => return only("--type", "gguf or safetensors"),
            _ => {}
        }
        if self.to != Target::Gguf && self.embedding_type.0.is_some() {
            return only("--embedding-type", "gguf");
        }
        if self.to != Target::Gguf && self.no_tokenizer {
            return only("--no-tokenizer", "gguf");
        }
        if self.to != Target::CompressedTensors {
            if self.layout != Layout::Auto {
                return only("--layout", "compressed-tensors");
            }
            if self.activations == Activations::Int8 {
                return only("--activations", "compressed-tensors");
            }
        }
        if self.to != Target::Gptq && self.checkpoint_format != CheckpointFormat::Gptq {
            return only("--checkpoint-format", "gptq");
        }
        Ok(())
    }
}

/// Bits per weight of a block type, for order.
fn bits_of(ggml: GgmlType) -> f64 {
    DType::Ggml(ggml).bits()
}

impl Method for Export {
    const INFO: Info = Info {
        name: NAME,
        title: "Export",
        summary: "Writes the same weights as GGUF, compressed-tensors, GPTQ or safetensors, and proves that they are the same",
        family: Family::Quantize,
        paper: Paper { title: "", reference: "", year: 0 },
        inputs: InputSpec::WEIGHTS,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["acceleration", "formats"],
            needs: Effort::None,
            touches: &[Touches::Weights],
            composes_with: &[],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        self.check()?;
        let compensated = lora::compensated(&inputs.models[0].artifact).len();
        let inputs = &self.bare(inputs)?;
        let model = &inputs.models[0];
        if self.to == Target::Gguf {
            // Everything that can be wrong with metadata and tokenizer is found before weights are looked at.
            blocks::fields(self, model, &[])?;
        }
        let seen = match self.to {
            Target::Safetensors => Seen::without_grids(model),
            _ => Seen::of(model)?,
        };
        let mut plan = self.plan_seen(model, &seen)?;
        if compensated > 0 && self.to != Target::Safetensors {
            plan.notes.push(format!(
                "{compensated} matrices have a product beside their codes, for which this format has no word: it goes into an \
                 adapter in `lorc/`"
            ));
        }
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let adapter = match lora::compensated(&inputs.models[0].artifact).is_empty() {
            true => Vec::new(),
            false => match self.to {
                Target::Safetensors => Vec::new(),
                Target::Gguf => vec![lora::gguf(&inputs.models[0])?],
                _ => lora::peft(&inputs.models[0])?,
            },
        };
        let inputs = &self.bare(inputs)?;
        let model = &inputs.models[0];
        let decisions: Vec<Decision> = serde_json::from_value(plan.decided.clone())
            .map_err(|source| Error::Parameters { method: NAME, source })?;
        let changed = decisions.iter().any(|decision| matches!(decision.how, How::Quantize));
        let (gguf, side_files) = match self.to {
            Target::Gguf => {
                (Some(blocks::fields(self, model, &decisions)?), blocks::side_files(model))
            }
            Target::Safetensors => (None, model.artifact.side_files().to_vec()),
            _ => (None, packed::side_files(self, model, &decisions)?),
        };
        let relation = if changed { Relation::Quantized } else { Relation::Converted };
        let container = Container { gguf, side_files, relation };
        let emitter = Emitter::begin_in(inputs, plan, cx, Some(container))?;
        cx.progress.begin("writing", plan.output_bytes, Unit::Bytes);
        let written = cx.install(|| write::all(self, model, &decisions, &emitter, cx));
        cx.progress.end();
        written?;
        let mut report = json!({
            "format": serde_json::to_value(self.to).unwrap_or(Value::Null),
            "output_bytes": plan.output_bytes,
        });
        let artifact = emitter.finish(inputs, plan, cx, adapter, &report)?;
        if !self.no_prove {
            let proof = prove::prove(model, &artifact, &decisions, cx);
            cx.progress.end();
            match proof {
                Ok(proof) => proof.report(&mut report),
                Err(error) => {
                    // Nobody shall use what is not the same model.
                    let _ = std::fs::remove_dir_all(&artifact);
                    return Err(error);
                }
            }
        }
        Ok(Output { artifact: Some(artifact), report, warnings: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_spelt_as_ggml_does() {
        assert_eq!("auto".parse::<ExportType>().unwrap(), ExportType(None));
        for name in ["q4_K", "Q4_K", "bf16", "TQ2_0"] {
            let parsed: ExportType = name.parse().unwrap();
            assert!(parsed.to_string().eq_ignore_ascii_case(name), "{name}");
            let json = serde_json::to_string(&parsed).unwrap();
            assert_eq!(serde_json::from_str::<ExportType>(&json).unwrap(), parsed);
        }
        let error = "IQ4_NL".parse::<ExportType>().unwrap_err();
        assert!(error.contains("Q4_0") && error.contains("auto"), "{error}");
        assert!("I32".parse::<ExportType>().is_err());
    }

    #[test]
    fn parameters_of_another_format_are_refused() {
        let typed = ExportType(DType::parse("Q4_0"));
        for (export, word) in [
            (Export { to: Target::Gptq, r#type: typed, ..Export::default() }, "--type"),
            (Export { to: Target::Safetensors, r#type: typed, ..Export::default() }, "Q4_0"),
            (Export { layout: Layout::PackQuantized, ..Export::default() }, "--layout"),
            (Export { activations: Activations::Int8, ..Export::default() }, "--activations"),
            (
                Export { checkpoint_format: CheckpointFormat::GptqV2, ..Export::default() },
                "--checkpoint-format",
            ),
            (
                Export { to: Target::Gptq, embedding_type: typed, ..Export::default() },
                "--embedding-type",
            ),
            (
                Export { to: Target::Gptq, no_tokenizer: true, ..Export::default() },
                "--no-tokenizer",
            ),
        ] {
            let error = export.check().unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        Export { r#type: typed, ..Export::default() }.check().unwrap();
    }
}
