//! Weighted sums of models, tensor by tensor and piece by piece.
//!
//! Every thread reads the same range of every model into a buffer of its own, adds it up in f32 and
//! writes the result: no model is ever in memory, and the page cache is read once, front to back.

use rayon::prelude::*;

use crate::emit::Emitter;
use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::method::{Action, Context, Plan, PlannedTensor, Unit};
use crate::rewrite::{OutputType, check_finite, copy};

/// Elements per piece: small enough that a thread's two buffers stay in its cache.
const PIECE: usize = 1 << 15;

/// How much of every model goes into a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Weights {
    /// The mean of the listed models: summed first, divided once.
    Mean(Vec<usize>),
    /// One factor per model, for all tensors.
    Global(Vec<f32>),
    /// One factor per model for every tensor, in the plan's order.
    ByTensor(Vec<Vec<f32>>),
}

impl Weights {
    /// `(model, factor)` for the models that take part in tensor `at`, and a final multiplier.
    fn terms(&self, at: usize) -> (Vec<(usize, f32)>, f32) {
        let nonzero = |factors: &[f32]| {
            factors.iter().copied().enumerate().filter(|(_, factor)| *factor != 0.0).collect()
        };
        match self {
            Self::Mean(models) => {
                let terms = models.iter().map(|model| (*model, 1.0)).collect();
                (terms, 1.0 / models.len() as f32)
            }
            Self::Global(factors) => (nonzero(factors), 1.0),
            Self::ByTensor(factors) => (nonzero(&factors[at]), 1.0),
        }
    }
}

/// Writes the weighted sum of `models` as the plan says. Integer tensors come from the first model; a
/// sum of one model with factor 1 is that model, bit for bit.
///
/// # Errors
/// Files that cannot be read or written, and values that are not finite, with model and tensor.
pub fn fold(
    models: &[ModelInput],
    weights: &Weights,
    emitter: &Emitter,
    plan: &Plan,
    cx: &Context,
) -> Result<()> {
    cx.progress.begin("merging", plan.output_bytes, Unit::Bytes);
    let done = cx.install(|| {
        plan.tensors.par_iter().enumerate().with_max_len(1).try_for_each(|(at, tensor)| {
            if !emitter.is_done(&tensor.name) {
                one(models, weights.terms(at), emitter, tensor)?;
            }
            cx.progress.advance(tensor.bytes);
            Ok(())
        })
    });
    cx.progress.end();
    done
}

fn one(
    models: &[ModelInput],
    (terms, multiplier): (Vec<(usize, f32)>, f32),
    emitter: &Emitter,
    tensor: &PlannedTensor,
) -> Result<()> {
    let first = &models[0];
    if tensor.action == Action::Copy {
        return copy(&first.artifact, &first.source, emitter, tensor);
    }
    if let [(only, 1.0)] = terms[..]
        && multiplier == 1.0
    {
        return copy(&models[only].artifact, &models[only].source, emitter, tensor);
    }
    let numel: usize = tensor.shape.iter().product();
    // Large tensors are shared by the threads, small ones are not worth it.
    (0..numel.div_ceil(PIECE)).into_par_iter().try_for_each_init(
        || (vec![0f32; PIECE.min(numel)], vec![0f32; PIECE.min(numel)]),
        |(sum, term), piece| {
            let start = piece * PIECE;
            let length = PIECE.min(numel - start);
            let (sum, term) = (&mut sum[..length], &mut term[..length]);
            for (index, &(model, factor)) in terms.iter().enumerate() {
                let into = if index == 0 { &mut *sum } else { &mut *term };
                models[model].artifact.read_f32_into(&tensor.name, start, into)?;
                add(sum, term, factor, index == 0);
            }
            if multiplier != 1.0 {
                sum.iter_mut().for_each(|value| *value *= multiplier);
            }
            if check_finite("the sum", &tensor.name, sum, start).is_err() {
                return Err(blame(models, &terms, tensor, start, term));
            }
            emitter.write_f32(&tensor.name, start, sum)
        },
    )?;
    emitter.done(&tensor.name)
}

/// `sum += factor term`, or `sum *= factor` for the first term.
fn add(sum: &mut [f32], term: &[f32], factor: f32, first: bool) {
    match (first, factor == 1.0) {
        (true, true) => {}
        (true, false) => sum.iter_mut().for_each(|value| *value *= factor),
        (false, true) => sum.iter_mut().zip(term).for_each(|(sum, term)| *sum += term),
        (false, false) => sum.iter_mut().zip(term).for_each(|(sum, term)| *sum += factor * term),
    }
}

/// The error of the model whose values are not finite.
fn blame(
    models: &[ModelInput],
    terms: &[(usize, f32)],
    tensor: &PlannedTensor,
    start: usize,
    buffer: &mut [f32],
) -> Error {
    for (model, _) in terms {
        let model = &models[*model];
        if let Err(error) = model.artifact.read_f32_into(&tensor.name, start, buffer) {
            return error.into();
        }
        if let Err(error) = check_finite(&model.source, &tensor.name, buffer, start) {
            return error;
        }
    }
    let problem = "the sum overflows: the models' weights are too large to be averaged";
    Error::tensor("the merged model", &tensor.name, problem)
}

/// Checks that models can be added, and fills in the plan's tensors: those of the first model.
///
/// # Errors
/// [`Error::Mismatch`] with the first tensor, shape, kind of type, class list or tokenizer that differs.
pub fn compare(models: &[ModelInput], out: OutputType, plan: &mut Plan) -> Result<()> {
    let first = &models[0];
    for model in &models[1..] {
        let mismatch = |problem: String| Error::Mismatch {
            first: first.source.clone(),
            second: model.source.clone(),
            problem,
        };
        for info in first.artifact.tensors() {
            if !model.artifact.contains(&info.name) {
                return Err(mismatch(format!("tensor `{}` is missing in the second", info.name)));
            }
            let other = model.artifact.tensor(&info.name)?;
            if other.shape != info.shape {
                return Err(mismatch(format!(
                    "tensor `{}` is {:?} in the first and {:?} in the second; models of a merge need \
                     the same architecture, head and vocabulary",
                    info.name, info.shape, other.shape
                )));
            }
            if other.dtype.is_float() != info.dtype.is_float() {
                return Err(mismatch(format!(
                    "tensor `{}` has type {} in the first and {} in the second",
                    info.name, info.dtype, other.dtype
                )));
            }
            if out.of(other.dtype) != out.of(info.dtype) {
                return Err(mismatch(format!(
                    "tensor `{}` has type {} in the first and {} in the second; say what to write: --dtype \
                     f32, f16 or bf16",
                    info.name, info.dtype, other.dtype
                )));
            }
        }
        if let Some(extra) =
            model.artifact.tensors().iter().find(|info| !first.artifact.contains(&info.name))
        {
            return Err(mismatch(format!("tensor `{}` is missing in the first", extra.name)));
        }
        check_alike(first, model, true)?;
    }
    for info in first.artifact.tensors() {
        let dtype = out.of(info.dtype);
        let bytes = dtype.bytes_of(&info.shape).unwrap_or(0);
        plan.output_bytes += bytes;
        plan.tensors.push(PlannedTensor {
            name: info.name.clone(),
            shape: info.shape.clone(),
            dtype: dtype.to_string(),
            bytes,
            action: if info.dtype.is_float() { Action::Transform } else { Action::Copy },
        });
    }
    let threads = rayon::current_num_threads() as u64;
    plan.peak_memory = threads * (12 << 20) + (48 << 20);
    Ok(())
}

/// Checks that two models do the same kind of work: architecture, classes and, where it `counts`, the vocabulary.
///
/// # Errors
/// [`Error::Mismatch`].
pub fn check_alike(first: &ModelInput, model: &ModelInput, vocabulary_counts: bool) -> Result<()> {
    let mismatch = |problem: String| Error::Mismatch {
        first: first.source.clone(),
        second: model.source.clone(),
        problem,
    };
    for key in ["model_type", "hidden_size", "id2label", "vocab_size"] {
        let (a, b) = (first.artifact.config().get(key), model.artifact.config().get(key));
        if let (Some(a), Some(b)) = (a, b)
            && a != b
            && (key != "vocab_size" || vocabulary_counts)
        {
            let advice = match key {
                "model_type" => {
                    "; models of different architectures cannot be merged weight by weight"
                }
                "vocab_size" => {
                    "; a mergekit recipe aligns vocabularies with `tokenizer_source: base` (or union)"
                }
                "hidden_size" => "; models of different widths cannot be merged weight by weight",
                _ => "",
            };
            return Err(mismatch(format!(
                "`{key}` of their configurations differs ({} against {}), so their outputs do not \
                 mean the same{advice}",
                short(a),
                short(b)
            )));
        }
    }
    if vocabulary_counts && !same_vocabulary(first, model)? {
        return Err(mismatch(
            "their tokenizers differ, so the same token id means different words; a mergekit recipe aligns them with \
             `tokenizer_source: base` (or union)"
                .into(),
        ));
    }
    Ok(())
}

/// Whether token ids mean the same in both, or one of them has no tokenizer to tell. Only the vocabulary counts: other
/// fields, such as padding, do not change what ids mean. Fine-tuned siblings mostly share the file byte for byte, and then
/// nothing is parsed (0.1 s a tokenizer of 50 000 tokens).
fn same_vocabulary(first: &ModelInput, second: &ModelInput) -> Result<bool> {
    let read = |model: &ModelInput| model.artifact.tokenizer_json();
    let (Some(first), Some(second)) = (read(first)?, read(second)?) else { return Ok(true) };
    if first == second {
        return Ok(true);
    }
    let vocabulary = |bytes: &[u8]| {
        let parsed = serde_json::from_slice::<serde_json::Value>(bytes).ok();
        parsed.map(|mut json| json["model"]["vocab"].take())
    };
    Ok(match (vocabulary(&first), vocabulary(&second)) {
        (Some(first), Some(second)) => first == second,
        _ => true,
    })
}

fn short(value: &serde_json::Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 {
        return text;
    }
    text.chars().take(57).chain("...".chars()).collect()
}

/// Pairs of models that hold the same values as far as samples of every tensor tell; a duplicate
/// silently doubles its weight.
///
/// # Errors
/// Files that cannot be read.
pub fn duplicates(models: &[ModelInput]) -> Result<Vec<(usize, usize)>> {
    let sample = |model: &ModelInput| -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for info in model.artifact.tensors() {
            let mut start = [0u8; 64];
            let length = start.len().min(info.nbytes as usize);
            // Whole blocks of quantized types are not needed: these are stored bytes.
            model.artifact.read_raw_into(&info.name, 0, &mut start[..length])?;
            bytes.extend_from_slice(&start[..length]);
        }
        Ok(bytes)
    };
    let samples: Vec<Vec<u8>> = models.iter().map(sample).collect::<Result<_>>()?;
    let mut pairs = Vec::new();
    for second in 1..samples.len() {
        if let Some(first) = (0..second).find(|first| samples[*first] == samples[second]) {
            pairs.push((first, second));
        }
    }
    Ok(pairs)
}
