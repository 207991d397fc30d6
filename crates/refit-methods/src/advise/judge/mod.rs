//! One method after the other: is it of use for the question, and if so, with which parameters?

use refit_store::DType;
use refit_store::formats::gguf::WRITABLE;
use refit_store::{GgmlType, TensorInfo};
use serde_json::{Map, Value, json};

use super::facts::{Facts, SizeClass};
use super::files::{self, File, Files, Size};
use super::routes::{self, one, stem};
use super::ways::Way;
use super::{Advised, Budget, Cost, Keep, Needs, Question, Smallest, least};
use crate::emit::file_bytes;
use crate::error::{Error, Result};
use crate::inputs::{Inputs, ModelInput};
use crate::method::{Effort, Family, Info, Need, OutputKind, Plan, PlannedTensor};
use crate::quantize::export::{Export, ExportType, Forecast, Seen, Target};
use crate::quantize::fit::size::Size as Bytes;
use crate::registry::{self, Entry};
use crate::rewrite::OutputType;

mod exporting;
mod quantizing;
mod training;

/// Why a method is not advised.
#[derive(Debug)]
pub struct Refusal {
    /// In words.
    pub reason: String,
    /// Whether a larger budget of text, training or memory would do.
    pub over_budget: bool,
}

/// What judging gives.
pub type Judged<T> = std::result::Result<T, Refusal>;

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        refuse(error.to_string())
    }
}

fn refuse(reason: impl Into<String>) -> Refusal {
    Refusal { reason: reason.into(), over_budget: false }
}

fn too_dear(reason: impl Into<String>) -> Refusal {
    Refusal { reason: reason.into(), over_budget: true }
}

/// Everything that methods are judged by.
pub struct Bench<'a> {
    model: &'a ModelInput,
    question: &'a Question,
    facts: &'a Facts,
    /// Files of quantized matrices, or why there are none.
    files: std::result::Result<Files<'a>, String>,
    forecast: Forecast<'a>,
    as_it_is: Seen,
    /// The size pays for the codes that the model has already.
    keeps_codes: bool,
    stem: String,
}

/// A step that was planned.
struct Planned {
    parameters: Map<String, Value>,
    plan: Plan,
    /// Tokens that it looks at, or trains on.
    tokens: u64,
}

impl<'a> Bench<'a> {
    /// Looks at a model.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub fn new(model: &'a ModelInput, question: &'a Question, facts: &'a Facts) -> Result<Self> {
        let forecast = Forecast::of(model);
        let files = match Files::of(model, question, &forecast) {
            Ok(files) => Ok(files),
            Err(error @ (Error::NothingToDo { .. } | Error::Tensor { .. })) => {
                Err(error.to_string())
            }
            Err(error) => return Err(error),
        };
        let mut bench = Self {
            model,
            question,
            facts,
            files,
            forecast,
            as_it_is: Seen::of(model)?,
            keeps_codes: false,
            stem: stem(&model.source),
        };
        let exports = bench.exports().0;
        bench.keeps_codes =
            exports.iter().any(|(_, size, exact)| *exact && question.budget.pays(*size));
        Ok(bench)
    }

    /// Judges a method.
    ///
    /// # Errors
    /// The reason why it is not advised.
    pub fn judge(&self, entry: &'static Entry) -> Judged<Advised> {
        let (info, path) = (entry.info, entry.info.taxonomy.path);
        let helps = path.starts_with(&["quantization", "post-training"])
            || path.starts_with(&["acceleration", "formats"])
            || path.first() == Some(&"pruning")
            || info.family == Family::Factorize
            || info.trains();
        if !helps || info.inputs.max_models != Some(1) || info.inputs.base == Need::Required {
            return Err(refuse(beside_the_point(info)));
        }
        if least(info) > self.question.needs {
            return Err(too_dear(format!(
                "needs {}, and --needs {} allows none",
                least(info).what(),
                self.question.needs.as_str()
            )));
        }
        match path[0] {
            _ if info.family == Family::Factorize => self.thinner(entry),
            "quantization" => self.quantizer(entry),
            "acceleration" => self.exporter(entry),
            "pruning" => self.pruner(entry),
            _ if info.output == OutputKind::Adapter => self.recovery(entry),
            _ => self.specialist(entry),
        }
    }

    fn names(&self, method: &str, export: &Export) -> (String, String) {
        let decoded = format!("{}-{method}", self.stem);
        let packed = routes::exported(&decoded, export);
        (decoded, packed)
    }

    fn files(&self) -> Judged<&Files<'a>> {
        self.files.as_ref().map_err(|why| refuse(why.clone()))
    }

    fn inputs(&self) -> Inputs {
        Inputs { models: vec![self.model.clone()], ..Inputs::default() }
    }

    /// Whether memory is enough.
    fn holds(&self, peak: u64) -> bool {
        self.question.memory.is_none_or(|memory| peak <= memory)
    }

    fn out_of_memory(&self, what: &str, peak: u64) -> Refusal {
        too_dear(format!(
            "takes about {} of memory{what}, and there are {} (--ram)",
            Bytes(peak),
            Bytes(self.question.memory.unwrap_or(u64::MAX))
        ))
    }

    /// Why nothing of so many files is within the size.
    fn too_large(
        &self,
        files: &Files,
        wanted: impl Fn(&File) -> bool,
        whole: &dyn Fn(&File) -> Size,
    ) -> Refusal {
        let budget = self.question.budget;
        let sizes = files.all.iter().filter(|file| wanted(file)).map(whole);
        match sizes.min_by(|a, b| budget.of(*a).total_cmp(&budget.of(*b))) {
            Some(least) => refuse(format!(
                "its smallest file takes {}, more than {}",
                budget.words_of(least),
                budget.in_words()
            )),
            None if files.refusals.is_empty() => {
                refuse("no format that was asked for holds its grids".to_owned())
            }
            None => refuse(format!("no format holds its grids: {}", files.refusals.join("; "))),
        }
    }

    /// The first way to plan a method that memory is enough for; `variants` come from the dearest to the cheapest.
    fn plan_first(
        &self,
        entry: &Entry,
        inputs: &Inputs,
        variants: Vec<(Map<String, Value>, u64)>,
        what: &str,
    ) -> Judged<Planned> {
        let mut least = None;
        for (parameters, tokens) in variants {
            let plan = entry.from_value(&Value::Object(parameters.clone()))?.plan(inputs)?;
            if self.holds(plan.peak_memory) {
                return Ok(Planned { parameters, plan, tokens });
            }
            least = Some(plan.peak_memory);
        }
        Err(self.out_of_memory(what, least.unwrap_or(0)))
    }

    /// Plans a method with parameters of its own, and as much calibration text as the budgets pay where it reads any.
    fn plan_method(&self, entry: &Entry, parameters: &Map<String, Value>) -> Judged<Planned> {
        if Needs::of(entry.info.taxonomy.needs) == Needs::None {
            return self.plan_first(entry, &self.inputs(), vec![(parameters.clone(), 0)], "");
        }
        let inputs = Inputs { text: self.question.text.1.clone(), ..self.inputs() };
        let variants = self.calibrations(entry, parameters)?;
        self.plan_first(entry, &inputs, variants, " even with one calibration sequence")
    }

    /// Parameters with as many calibration sequences as there is text for, half of them, and so on down to one.
    fn calibrations(
        &self,
        entry: &Entry,
        parameters: &Map<String, Value>,
    ) -> Judged<Vec<(Map<String, Value>, u64)>> {
        let defaults = entry.default().parameters();
        let default = |key: &str| defaults[key].as_u64();
        let (Some(samples), Some(length)) = (default("samples"), default("sequence_length")) else {
            return Ok(vec![(parameters.clone(), 0)]);
        };
        let context =
            self.model.artifact.architecture().dims.context.map_or(u64::MAX, |n| n as u64);
        let length_here = length.min(context);
        let most = samples.min(self.question.tokens.unwrap_or(u64::MAX) / length_here.max(1));
        if most == 0 {
            return Err(too_dear(format!(
                "needs calibration text: {length_here} tokens for one sequence, {} with its defaults, and --tokens-available is {}",
                samples * length_here,
                self.question.tokens.unwrap_or(0)
            )));
        }
        let variant = |count: u64| {
            let mut all = parameters.clone();
            for (key, value, usual) in
                [("samples", count, samples), ("sequence_length", length_here, length)]
            {
                if value != usual {
                    all.insert(key.to_owned(), json!(value));
                }
            }
            (all, count * length_here)
        };
        let halves = std::iter::successors(Some(most), |count| Some(count / 2));
        Ok(halves.take_while(|count| *count > 0).map(variant).collect())
    }

    /// A method's own needs, in words and numbers.
    fn cost_of(&self, entry: &Entry, planned: &Planned) -> Cost {
        let parameters = self.facts.parameters as f64;
        let tokens = planned.tokens;
        let trains = Needs::of(entry.info.taxonomy.needs) == Needs::Training;
        Cost {
            calibration_tokens: if trains { 0 } else { tokens },
            trained_tokens: if trains { tokens } else { 0 },
            flops: if trains { 6.0 } else { 4.0 } * tokens as f64 * parameters,
            peak_memory: planned.plan.peak_memory,
        }
    }

    fn here(&self) -> (&str, &str) {
        (&self.model.source, &self.stem)
    }

    /// Weights of all matrices.
    fn weights(&self) -> u64 {
        self.model.artifact.architecture().linears().map(|site| site.numel() as u64).sum()
    }
}

/// Bytes of the safetensors files that a plan writes.
fn bytes_of(plan: &Plan) -> Result<u64> {
    let part = |tensor: &PlannedTensor| {
        Some((tensor.name.clone(), tensor.shape.clone(), DType::parse(&tensor.dtype)?))
    };
    file_bytes(plan.tensors.iter().filter_map(part).collect(), None)
}

/// Why a method that makes no model smaller is none to advise.
fn beside_the_point(info: &Info) -> String {
    let inputs = info.inputs;
    let why = match info.taxonomy.path {
        _ if inputs.adapters == Need::Required => "it works on an adapter",
        _ if inputs.min_models > 1 || inputs.max_models.is_none() => {
            "it makes one model of several"
        }
        _ if inputs.base == Need::Required => "it compares a model with the base that it came from",
        ["reuse", "update compression", ..] => "it compresses what a fine-tuning changed",
        _ if info.taxonomy.needs == Effort::Retraining => "it trains from the beginning",
        _ => "it makes no model smaller",
    };
    format!("beside the point: {why} ({})", info.summary.trim_end_matches('.').to_lowercase())
}
