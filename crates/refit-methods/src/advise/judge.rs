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

/// Bits per weight from which a size may be hit with codes of 8 bits.
const MANY_BITS: f64 = 5.0;
/// Tokens that a recovery trains on, where there are as many.
const RECOVERY: u64 = 10_000;
/// Most tokens of an example, as trainings have it.
const EXAMPLE: u64 = 512;
/// Examples per update, largest first.
const BATCHES: [u64; 3] = [4, 2, 1];
/// By how much thin factors may shrink the matrices, the least first.
const RATIOS: [u64; 6] = [2, 3, 4, 6, 8, 12];
/// Quantizers that others build on, best first: the first that the budgets pay is taken.
const BASES: [&str; 2] = ["gptq", "rtn"];

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

/// Bytes of an adapter that is exported beside codes: PEFT's holds 32 bits a value, llama.cpp's as many as the values need.
#[derive(Clone, Copy, Default)]
struct Beside {
    packed: u64,
    gguf: u64,
}

impl Beside {
    fn of(self, to: Target) -> u64 {
        if to == Target::Gguf { self.gguf } else { self.packed }
    }
}

/// Matrices that were quantized and exported.
struct Base<'b> {
    file: &'b File,
    commands: Vec<String>,
    /// The directory of decoded weights, and that of the export.
    decoded: String,
    packed: String,
    cost: Cost,
    warnings: Vec<String>,
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

    /// The smallest file, and how it is made: rounding to nearest, or exporting to GGML's types.
    ///
    /// # Errors
    /// None in practice.
    pub fn smallest(&self) -> Result<Option<(Size, Smallest)>> {
        let budget = self.question.budget;
        let mut found: Option<(Size, Smallest)> = None;
        let mut offer = |size: Size, method: &'static str, commands: Vec<String>| {
            if found.as_ref().is_none_or(|(least, _)| budget.of(size) < budget.of(*least)) {
                let smallest =
                    Smallest { bytes: size.bytes, bits_per_weight: size.bpw, method, commands };
                found = Some((size, smallest));
            }
        };
        if let Ok(files) = &self.files
            && let Some(file) = files.smallest(budget)
            && let Some(way) = Way::of(registry::get("rtn")?)
        {
            let parameters = way.parameters(file, files)?;
            let (decoded, packed) = self.names("rtn", &file.export);
            let apply = routes::apply("rtn", &self.model.source, &parameters, &[], &decoded);
            let export = routes::export(&decoded, &file.export, &packed);
            offer(file.size, "rtn", vec![apply, export]);
        }
        for (export, size, _) in self.exports().0 {
            let out = routes::exported(&self.stem, &export);
            offer(size, "export", vec![routes::export(&self.model.source, &export, &out)]);
        }
        Ok(found)
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

    /// Quantizes `input` on the grid of a file and exports it.
    fn base<'b>(
        &self,
        entry: &Entry,
        way: Way,
        file: &'b File,
        files: &Files,
        input: (&str, &str),
    ) -> Judged<Base<'b>> {
        let name = entry.info.name;
        let planned = self.plan_method(entry, &way.parameters(file, files)?)?;
        let export = file.export.plan_seen(self.model, &files.seen(self.model, file.uniform))?;
        if !self.holds(export.peak_memory) {
            return Err(self.out_of_memory(" while it is exported", export.peak_memory));
        }
        let mut cost = self.cost_of(entry, &planned);
        cost.peak_memory = cost.peak_memory.max(export.peak_memory);
        let (source, stem) = input;
        let decoded = format!("{stem}-{name}");
        let packed = routes::exported(&decoded, &file.export);
        let text = [("text", &*self.question.text.0)];
        let data = if planned.tokens > 0 { &text[..] } else { &[] };
        Ok(Base {
            file,
            commands: vec![
                routes::apply(name, source, &planned.parameters, data, &decoded),
                routes::export(&decoded, &file.export, &packed),
            ],
            decoded,
            packed,
            cost,
            warnings: planned.plan.warnings,
        })
    }

    fn here(&self) -> (&str, &str) {
        (&self.model.source, &self.stem)
    }

    fn quantizer(&self, entry: &'static Entry) -> Judged<Advised> {
        let unknown = "its parameters do not say a grid, so its size cannot be foreseen";
        let way = Way::of(entry).ok_or_else(|| refuse(unknown))?;
        if self.keeps_codes && !matches!(way, Way::Activations { .. }) {
            return Err(refuse(format!(
                "could at best change nothing: the weights lie on a grid already ({}), and refit export keeps every code within \
                 the size",
                self.facts.grid.span_in_words()
            )));
        }
        match way {
            Way::Nowhere(why) => Err(refuse(why)),
            Way::Sized => self.sized(entry),
            Way::Activations { weights, activations, symmetric } => {
                self.with_activations(entry, [weights, activations], symmetric)
            }
            Way::Uniform(_) | Way::Mean(_) | Way::Compensated(_) => {
                let (files, budget) = (self.files()?, self.question.budget);
                let beside = match way {
                    Way::Compensated(_) => self.beside(entry)?,
                    _ => Beside::default(),
                };
                let whole = |file: &File| file.size.plus(beside.of(file.export.to), files.weights);
                let fits = |file: &File| way.makes(file) && budget.pays(whole(file));
                let file = files
                    .best(budget, fits)
                    .ok_or_else(|| self.too_large(files, |file| way.makes(file), &whole))?;
                let mut base = self.base(entry, way, file, files, self.here())?;
                let mut reasons = Vec::new();
                if let Way::Compensated(_) = way {
                    let adapter = Bytes(beside.of(file.export.to));
                    reasons.push(format!("a product of low rank beside every matrix, exported as an adapter of {adapter}"));
                    base.warnings
                        .push("engines add it while they run (--lora of llama.cpp, PEFT)".into());
                }
                Ok(self.advised(entry, base, whole(file), reasons))
            }
        }
    }

    /// What a method writes beside the matrices that it quantizes.
    fn beside(&self, entry: &Entry) -> Judged<Beside> {
        let plan = entry.default().plan(&self.inputs())?;
        let own = plan.tensors.iter().filter(|t| !self.model.artifact.contains(&t.name));
        let part = |dtype: DType| {
            let parts = own.clone().map(|t| (t.name.clone(), t.shape.clone(), dtype));
            file_bytes(parts.collect(), None)
        };
        Ok(Beside { packed: part(DType::F32)?, gguf: part(DType::F16)? })
    }

    /// Advice to quantize and export, with what goes before or beside it already among its commands.
    fn advised(&self, entry: &Entry, base: Base, size: Size, mut reasons: Vec<String>) -> Advised {
        let cost = base.cost;
        if cost.calibration_tokens + cost.trained_tokens == 0 {
            reasons.insert(0, "needs no data".into());
        }
        if cost.calibration_tokens > 0 {
            let tokens = cost.calibration_tokens;
            reasons.push(format!("looks at {tokens} tokens of text and trains nothing"));
        }
        let grid = files::in_words(base.file.uniform);
        reasons.push(format!(
            "{grid}: within the size, the grid that loses least on a sample of the weights"
        ));
        Advised {
            method: entry.info.name,
            needs: Needs::of(entry.info.taxonomy.needs),
            runtime: base.file.export.to,
            bytes: size.bytes,
            bits_per_weight: size.bpw,
            rounding_error: Some(base.file.error),
            cost,
            exact: false,
            reasons,
            warnings: base.warnings,
            commands: base.commands,
        }
    }

    /// The method that finds its grids for a size.
    fn sized(&self, entry: &'static Entry) -> Judged<Advised> {
        let (files, budget) = (self.files()?, self.question.budget);
        let packed = |file: &&File| file.export.to == Target::CompressedTensors;
        let own: Vec<Size> = files.all.iter().filter(packed).map(|file| file.size).collect();
        let by_size = |a: &&Size, b: &&Size| budget.of(**a).total_cmp(&budget.of(**b));
        let (Some(least), Some(most)) = (own.iter().min_by(by_size), own.iter().max_by(by_size))
        else {
            return Err(match self.question.runtime {
                Some(Target::CompressedTensors) | None => {
                    self.too_large(files, |_| false, &|file| file.size)
                }
                Some(_) => {
                    refuse("it counts the bytes of compressed-tensors, which was not asked for")
                }
            });
        };
        let weights = files.weights as f64;
        let (mut parameters, size) = match budget {
            Budget::Bytes(target) => {
                let bytes = target.min(most.bytes);
                let more = bytes as f64 - least.bytes as f64;
                (one("target", target), Size { bytes, bpw: least.bpw + 8.0 * more / weights })
            }
            Budget::BitsPerWeight(bits) => {
                let bpw = bits.min(most.bpw);
                let more = (bpw - least.bpw) * weights / 8.0;
                let bytes = (least.bytes as f64 + more) as u64;
                (one("bpw", bits), Size { bytes, bpw })
            }
        };
        let dtype = files.dtype_of(if size.bpw > MANY_BITS { 8 } else { 4 }, false);
        if dtype != OutputType::Auto {
            parameters.insert("dtype".to_owned(), json!(dtype));
        }
        let with_text = match self.question.needs {
            Needs::None => Err(refuse("")),
            _ => self.plan_method(entry, &parameters),
        };
        // Without text, weights alone decide.
        let alone = || self.plan_first(entry, &self.inputs(), vec![(parameters.clone(), 0)], "");
        let planned = with_text.or_else(|_| alone())?;
        let export = Export { to: Target::CompressedTensors, ..Export::default() };
        let (decoded, out) = self.names(entry.info.name, &export);
        let text = [("text", &*self.question.text.0)];
        let looks = planned.tokens > 0;
        let data = if looks { &text[..] } else { &[] };
        let source = &self.model.source;
        let mut reasons = vec![
            "hits any size: bits, groups and zero points for every matrix, where they are worth most"
                .to_owned(),
        ];
        reasons.push(match looks {
            true => format!("looks at {} tokens of text and trains nothing", planned.tokens),
            false => {
                "needs no data; with text it weighs matrices by what they do to predictions".into()
            }
        });
        Ok(Advised {
            method: entry.info.name,
            needs: if looks { Needs::Calibration } else { Needs::None },
            runtime: Target::CompressedTensors,
            bytes: size.bytes,
            bits_per_weight: size.bpw,
            rounding_error: None,
            cost: self.cost_of(entry, &planned),
            exact: false,
            reasons,
            warnings: planned.plan.warnings,
            commands: vec![
                routes::apply(entry.info.name, source, &planned.parameters, data, &decoded),
                routes::export(&decoded, &export, &out),
            ],
        })
    }

    /// Methods that round activations, too: at 8 bits, where a format has words for it.
    fn with_activations(
        &self,
        entry: &'static Entry,
        bits: [&str; 2],
        symmetric: bool,
    ) -> Judged<Advised> {
        let (files, budget) = (self.files()?, self.question.budget);
        let rows = |file: &&File| {
            let uniform = file.uniform;
            (uniform.bits, uniform.symmetric, uniform.group.size()) == (8, symmetric, None)
                && file.export.to == Target::CompressedTensors
        };
        let Some(file) = files.all.iter().find(rows) else {
            return Err(match self.question.runtime {
                Some(Target::CompressedTensors) | None => {
                    self.too_large(files, |_| false, &|file| file.size)
                }
                Some(_) => refuse(
                    "only compressed-tensors has words for rounded activations, and it was not asked for",
                ),
            });
        };
        let seen = files.seen(self.model, file.uniform);
        let size =
            Size::of(self.forecast.foresee(&files::with_activations(), &seen)?, files.weights);
        if !budget.pays(size) {
            return Err(refuse(format!(
                "rounds activations to 8 bits, and weights of 8 bits take {}, more than {}; at fewer bits no format has words \
                 for its activations",
                budget.words_of(size),
                budget.in_words()
            )));
        }
        let mut parameters = Map::new();
        for key in bits {
            if entry.default().parameters()[key] != 8 {
                parameters.insert(key.to_owned(), json!(8));
            }
        }
        if file.dtype != OutputType::Auto {
            parameters.insert("dtype".to_owned(), json!(file.dtype));
        }
        let planned = self.plan_method(entry, &parameters)?;
        let (decoded, packed) = self.names(entry.info.name, &file.export);
        let text = [("text", &*self.question.text.0)];
        let base = Base {
            file,
            commands: vec![
                routes::apply(
                    entry.info.name,
                    &self.model.source,
                    &planned.parameters,
                    &text,
                    &decoded,
                ),
                routes::export(&decoded, &file.export, &packed),
            ],
            decoded,
            packed,
            cost: self.cost_of(entry, &planned),
            warnings: planned.plan.warnings,
        };
        let reason = "products in integers: activations are rounded to 8 bits, too".to_owned();
        Ok(self.advised(entry, base, size, vec![reason]))
    }

    /// Exports of the model as it is, with what they take and whether they keep every value; and what stands in the way of others.
    fn exports(&self) -> (Vec<(Export, Size, bool)>, Vec<String>) {
        let asked = |to: Target| self.question.runtime.is_none_or(|only| only == to);
        let plain = |to: Target| Export { to, ..Export::default() };
        let typed =
            |to: Target, dtype: DType| Export { r#type: ExportType(Some(dtype)), ..plain(to) };
        let halves = [DType::BF16, DType::F16];
        let mut all = Vec::new();
        if asked(Target::Safetensors) {
            all.extend(halves.map(|dtype| typed(Target::Safetensors, dtype)));
        }
        if asked(Target::Gguf) {
            // Ternary types are for models that were trained to be.
            let ternary = |ggml: &GgmlType| matches!(ggml, GgmlType::TQ1_0 | GgmlType::TQ2_0);
            let blocks = WRITABLE.into_iter().filter(|ggml| !ternary(ggml)).map(DType::Ggml);
            all.extend(halves.into_iter().chain(blocks).map(|dtype| typed(Target::Gguf, dtype)));
        }
        // Codes that are there already.
        if !self.as_it_is.grids.is_empty() || self.model.artifact.tensors().iter().any(is_block) {
            all.extend(files::TARGETS.into_iter().filter(|to| asked(*to)).map(plain));
        }
        let weights = self.weights();
        let (mut found, mut refusals) = (Vec::new(), Vec::<String>::new());
        for export in all {
            match self.forecast.foresee(&export, &self.as_it_is) {
                Ok(foreseen) => {
                    let exact = export.r#type.0.is_none() && foreseen.keeps_grids;
                    found.push((export, Size::of(foreseen, weights), exact));
                }
                Err(error) => {
                    let why = error.to_string();
                    if !refusals.contains(&why) {
                        refusals.push(why);
                    }
                }
            }
        }
        (found, refusals)
    }

    /// The model as it is, in another format.
    fn exporter(&self, entry: &'static Entry) -> Judged<Advised> {
        let (budget, (exports, refusals)) = (self.question.budget, self.exports());
        let within = exports.iter().filter(|(_, size, _)| budget.pays(*size));
        // Codes that are kept beat any rounding; of roundings, the one with most bits.
        let key = |(_, size, exact): &&(Export, Size, bool)| {
            let size = budget.of(*size);
            if *exact { (true, -size) } else { (false, size) }
        };
        let by_key = |a: &&(Export, Size, bool), b: &&(Export, Size, bool)| {
            let (a, b) = (key(a), key(b));
            a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
        };
        let Some((export, size, exact)) = within.max_by(by_key) else {
            let least = exports.iter().map(|(_, size, _)| *size);
            let least = least.min_by(|a, b| budget.of(*a).total_cmp(&budget.of(*b)));
            return Err(match least {
                Some(least) => refuse(format!(
                    "the smallest export of the model as it is takes {}, more than {}",
                    budget.words_of(least),
                    budget.in_words()
                )),
                None => refuse(refusals.join("; ")),
            });
        };
        let planned = {
            let stated = files::stated(export);
            let parameters = stated.as_object().cloned().unwrap_or_default();
            self.plan_first(entry, &self.inputs(), vec![(parameters, 0)], "")?
        };
        let out = routes::exported(&self.stem, export);
        let kind = match (exact, export.r#type.0) {
            (true, _) => {
                "keeps every value: the codes that are there are written as they are".to_owned()
            }
            (_, Some(dtype @ DType::Ggml(_))) => {
                format!("rounds the weights to {dtype} blocks, to nearest")
            }
            (_, Some(dtype)) => format!("rounds the weights to {dtype}"),
            _ => "writes what lies on no grid as it is".to_owned(),
        };
        Ok(Advised {
            method: entry.info.name,
            needs: Needs::None,
            runtime: export.to,
            bytes: size.bytes,
            bits_per_weight: size.bpw,
            rounding_error: None,
            cost: Cost { peak_memory: planned.plan.peak_memory, ..Cost::default() },
            exact: *exact,
            reasons: vec!["needs no data".into(), kind],
            warnings: planned.plan.warnings,
            commands: vec![routes::export(&self.model.source, export, &out)],
        })
    }

    /// Pruning, and then quantizing what is left.
    fn pruner(&self, entry: &'static Entry) -> Judged<Advised> {
        let Some(pattern) = self.question.pattern else {
            return Err(refuse(
                "zeros take as many bytes as other values in every format that refit writes; --pattern 2:4 advises it for \
                 runtimes that skip them",
            ));
        };
        let files = self.files()?;
        let then = entry.info.taxonomy.composes_with.iter().find_map(|name| {
            let next = registry::get(name).ok()?;
            let way = Way::of(next)?;
            matches!(way, Way::Uniform(_)).then_some((next, way))
        });
        let none = "it composes with no quantizer that keeps its zeros";
        let (next, way) = then.ok_or_else(|| refuse(none))?;
        let file = files
            .best(self.question.budget, |file| way.makes(file))
            .ok_or_else(|| self.too_large(files, |file| way.makes(file), &|file| file.size))?;
        let planned = self.plan_method(entry, &one("pattern", pattern))?;
        let pruned = format!("{}-{}", self.stem, entry.info.name);
        let mut base = self.base(next, way, file, files, (&pruned, &pruned))?;
        let text = [("text", &*self.question.text.0)];
        let data = if planned.tokens > 0 { &text[..] } else { &[] };
        let source = &self.model.source;
        let first = routes::apply(entry.info.name, source, &planned.parameters, data, &pruned);
        base.commands.insert(0, first);
        let own = self.cost_of(entry, &planned);
        base.cost = Cost { peak_memory: own.peak_memory.max(base.cost.peak_memory), ..own };
        base.warnings.extend(planned.plan.warnings);
        let reason = format!(
            "{pattern} zeros for runtimes that skip them, kept by {}; the file is no smaller for it",
            next.info.name
        );
        Ok(self.advised(entry, base, file.size, vec![reason]))
    }

    /// Ways to train, the largest batch first, each with so many tokens as the budgets pay.
    fn trainings(&self) -> Judged<Vec<(Map<String, Value>, u64)>> {
        let question = self.question;
        let limit = |tokens: Option<u64>| tokens.unwrap_or(u64::MAX);
        let tokens = limit(question.tokens).min(limit(question.train_tokens)).min(RECOVERY);
        let context =
            self.model.artifact.architecture().dims.context.map_or(u64::MAX, |n| n as u64);
        let length = EXAMPLE.min(context).max(1);
        let variants: Vec<_> = BATCHES
            .into_iter()
            .filter(|batch| batch * length <= tokens)
            .map(|batch| {
                let steps = tokens / (batch * length);
                let mut parameters = one("steps", steps);
                if batch != BATCHES[0] {
                    parameters.insert("batch".to_owned(), json!(batch));
                }
                (parameters, steps * batch * length)
            })
            .collect();
        if !variants.is_empty() {
            return Ok(variants);
        }
        let (flag, given) = match question.train_tokens {
            Some(given) if given < limit(question.tokens) => ("--train-tokens", given),
            _ => ("--tokens-available", question.tokens.unwrap_or(0)),
        };
        let flops = |tokens: u64| 6.0 * tokens as f64 * self.facts.parameters as f64;
        Err(too_dear(format!(
            "needs {length} tokens to learn from for a single update, {:.1e} FLOPs (6 per token and parameter), and {flag} {given} \
             pays {:.1e}",
            flops(length),
            flops(given)
        )))
    }

    fn plan_training(&self, entry: &Entry, own: &Map<String, Value>) -> Judged<Planned> {
        let inputs = Inputs { data: self.question.data.1.clone(), ..self.inputs() };
        let mut variants = self.trainings()?;
        variants.iter_mut().for_each(|(parameters, _)| parameters.extend(own.clone()));
        self.plan_first(entry, &inputs, variants, " even with one example per update")
    }

    /// The first base that the budgets pay, with so many bytes left for what stands beside it.
    fn any_base<'b>(
        &self,
        files: &'b Files<'a>,
        beside: u64,
        input: (&str, &str),
    ) -> Judged<(Base<'b>, &'static str)> {
        let mut last = refuse("no quantizer to build on");
        for name in BASES {
            let entry = registry::get(name)?;
            if least(entry.info) > self.question.needs {
                continue;
            }
            let Some(way) = Way::of(entry) else { continue };
            let budget = self.question.budget;
            let fits =
                |file: &File| way.makes(file) && budget.pays(file.size.plus(beside, files.weights));
            let found = match files.best(budget, fits) {
                Some(file) => self.base(entry, way, file, files, input),
                None => Err(refuse(format!(
                    "its adapter takes {}, which leaves no room for the model in {}",
                    Bytes(beside),
                    budget.in_words()
                ))),
            };
            match found {
                Ok(base) => return Ok((base, entry.info.name)),
                Err(refusal) => last = refusal,
            }
        }
        Err(last)
    }

    /// An adapter that recovers what quantization lost, beside the quantized model.
    fn recovery(&self, entry: &'static Entry) -> Judged<Advised> {
        if self.keeps_codes {
            return Err(refuse(
                "recovers what quantizing loses, and refit export keeps every code within the size",
            ));
        }
        let files = self.files()?;
        let planned = self.plan_training(entry, &Map::new())?;
        let adapter = bytes_of(&planned.plan)?;
        let (mut base, name) = self.any_base(files, adapter, self.here())?;
        let out = format!("{}-{}", base.decoded, entry.info.name);
        let data = [("data", &*self.question.data.0)];
        let step = routes::apply(entry.info.name, &base.decoded, &planned.parameters, &data, &out);
        base.commands.push(step);
        let size = base.file.size.plus(adapter, files.weights);
        base.cost = together(base.cost, self.cost_of(entry, &planned));
        base.warnings.extend(planned.plan.warnings.clone());
        if self.question.keep == Keep::General {
            base.warnings.push(
                "what is learned from text of one kind costs the others: give it text of several, and measure all of them".into(),
            );
        }
        let reasons = vec![format!(
            "trains an adapter of {} on {} tokens, beside the model that {name} quantized (refit eval {} --adapter {out})",
            Bytes(adapter),
            planned.tokens,
            base.packed
        )];
        Ok(self.advised(entry, base, size, reasons))
    }

    /// Thin factors in place of matrices, as many weights as the size pays for.
    fn thinner(&self, entry: &'static Entry) -> Judged<Advised> {
        let (question, source) = (self.question, &self.model.source);
        if question.runtime.is_some_and(|only| only != Target::Safetensors) {
            return Err(refuse(
                "only refit reads thin factors (safetensors); --runtime asks for another format",
            ));
        }
        if self.keeps_codes {
            return Err(refuse(
                "the size pays for the codes that the model has, and factors of them are no codes",
            ));
        }
        let trains = Needs::of(entry.info.taxonomy.needs) == Needs::Training;
        let mut smallest = None;
        for ratio in RATIOS {
            let own = one("ratio", ratio);
            let planned = match trains {
                true => self.plan_training(entry, &own)?,
                false => self.plan_method(entry, &own)?,
            };
            let linears = |t: &&PlannedTensor| {
                let site = self.model.artifact.architecture().site(&t.name);
                site.is_none_or(|site| {
                    self.model.artifact.architecture().linears().any(|l| l.name == site.name)
                })
            };
            let tensors = &planned.plan.tensors;
            let size = Size {
                bytes: bytes_of(&planned.plan)?,
                bpw: 8.0 * tensors.iter().filter(linears).map(|t| t.bytes).sum::<u64>() as f64
                    / self.weights().max(1) as f64,
            };
            smallest = Some(size);
            if !question.budget.pays(size) {
                continue;
            }
            let out = format!("{}-{}", self.stem, entry.info.name);
            let data = [("data", &*question.data.0)];
            let data = if trains { &data[..] } else { &[] };
            let command = routes::apply(entry.info.name, source, &planned.parameters, data, &out);
            let mut reasons = vec![format!(
                "pairs of thin matrices with one {ratio}th of the weights, which refit runs as they are"
            )];
            reasons.push(match trains {
                true => format!("trains them on {} tokens towards the original", planned.tokens),
                false => "needs no data".to_owned(),
            });
            let warning = "weights of language models are close to full rank: expect to train afterwards, or quantize instead";
            return Ok(Advised {
                method: entry.info.name,
                needs: Needs::of(entry.info.taxonomy.needs),
                runtime: Target::Safetensors,
                bytes: size.bytes,
                bits_per_weight: size.bpw,
                rounding_error: None,
                cost: self.cost_of(entry, &planned),
                exact: false,
                reasons,
                warnings: [vec![warning.to_owned()], planned.plan.warnings].concat(),
                commands: vec![command],
            });
        }
        Err(match smallest {
            Some(least) => refuse(format!(
                "with one {}th of the weights it takes {}, more than {}",
                RATIOS[RATIOS.len() - 1],
                question.budget.words_of(least),
                question.budget.in_words()
            )),
            None => refuse("it says no size"),
        })
    }

    /// Weights of all matrices.
    fn weights(&self) -> u64 {
        self.model.artifact.architecture().linears().map(|site| site.numel() as u64).sum()
    }

    /// Training that changes the weights themselves, before they are quantized.
    fn specialist(&self, entry: &'static Entry) -> Judged<Advised> {
        if self.question.keep == Keep::General {
            return Err(refuse(
                "trains the weights themselves on one text, which costs the model's other abilities (the survey's second thesis, \
                 recalled); --keep task asks for that",
            ));
        }
        if self.facts.size_class == SizeClass::RealLarge {
            return Err(refuse(format!(
                "trains the weights themselves, and at {} parameters and more (a recalled threshold) methods without training, or \
                 adapters, are the default",
                super::facts::REAL_LARGE
            )));
        }
        let files = self.files()?;
        let planned = self.plan_training(entry, &Map::new())?;
        let trained = format!("{}-{}", self.stem, entry.info.name);
        let (mut base, name) = self.any_base(files, 0, (&trained, &trained))?;
        let data = [("data", &*self.question.data.0)];
        let source = &self.model.source;
        let first = routes::apply(entry.info.name, source, &planned.parameters, &data, &trained);
        base.commands.insert(0, first);
        base.cost = together(base.cost, self.cost_of(entry, &planned));
        base.warnings.extend(planned.plan.warnings.clone());
        let size = base.file.size;
        let reason = format!(
            "trains the model on {} tokens of the task before {name} quantizes it",
            planned.tokens
        );
        Ok(self.advised(entry, base, size, vec![reason]))
    }
}

/// Bytes of the safetensors files that a plan writes.
fn bytes_of(plan: &Plan) -> Result<u64> {
    let part = |tensor: &PlannedTensor| {
        Some((tensor.name.clone(), tensor.shape.clone(), DType::parse(&tensor.dtype)?))
    };
    file_bytes(plan.tensors.iter().filter_map(part).collect(), None)
}

/// What two steps cost.
fn together(a: Cost, b: Cost) -> Cost {
    Cost {
        calibration_tokens: a.calibration_tokens + b.calibration_tokens,
        trained_tokens: a.trained_tokens + b.trained_tokens,
        flops: a.flops + b.flops,
        peak_memory: a.peak_memory.max(b.peak_memory),
    }
}

fn is_block(info: &TensorInfo) -> bool {
    matches!(info.dtype, DType::Ggml(_))
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
