//! How pairs are declared, written, found again and put into a running model.
//!
//! A linear `X` is written as `X.0.weight` `[r, in]` and `X.1.weight` `[out, r]`, its bias as `X.1.bias`: what
//! `Sequential(Linear(in, r, bias=False), Linear(r, out))` of PyTorch would save. The configuration gets a key `low_rank` that names
//! them ([`refit_store::formats::factored`]); opened again, each pair is one matrix.

use std::collections::{BTreeMap, BTreeSet};

use refit_nn::Decoder;
use refit_store::architecture::{Layout, Site};
use refit_store::formats::factored::{Factors, LOW_RANK};
use refit_store::{DType, SideFile};
use serde_json::{Value, json};

use crate::emit::{Emitter, serialize};
use crate::error::{Error, Result};
use crate::factorize::ranks::Pair;
use crate::inputs::ModelInput;
use crate::method::{Action, Method, Plan, PlannedTensor};
use crate::rewrite::{self, OutputType, shape_of};

/// The plan of a method that writes these pairs.
///
/// # Errors
/// A model of which nothing would become a pair.
pub fn plan<M: Method>(
    method: &M,
    model: &ModelInput,
    pairs: &[Pair],
    dtype: OutputType,
) -> Result<Plan> {
    let Some(largest) = pairs.iter().map(|pair| pair.out * pair.inputs).max() else {
        return Err(Error::NothingToDo {
            model: model.source.clone(),
            what: "linear layer that thin factors would make smaller",
            advice: "a larger --ratio or a smaller --energy makes pairs thinner".into(),
        });
    };
    let mut plan = Plan::of(method);
    let by_name: BTreeMap<&str, &Pair> =
        pairs.iter().map(|pair| (pair.site.name.as_str(), pair)).collect();
    let biases: BTreeMap<String, &Pair> =
        pairs.iter().map(|pair| (format!("{}.bias", pair.module()), pair)).collect();
    for info in model.artifact.tensors() {
        let stored = dtype.of(info.dtype);
        let mut add = |name: String, shape: Vec<usize>, action| {
            let bytes = stored.bytes_of(&shape).unwrap_or(0);
            plan.output_bytes += bytes;
            plan.tensors.push(PlannedTensor {
                name,
                shape,
                dtype: stored.to_string(),
                bytes,
                action,
            });
        };
        if let Some(pair) = by_name.get(info.name.as_str()) {
            let ([first, second], (rows, columns)) = (pair.names(), pair.stored());
            add(first, vec![pair.rank, columns], Action::Transform);
            add(second, vec![rows, pair.rank], Action::Transform);
        } else if let Some(pair) = biases.get(&info.name) {
            add(format!("{}.1.bias", pair.module()), info.shape.clone(), Action::Copy);
        } else {
            add(info.name.clone(), info.shape.clone(), Action::Copy);
        }
    }
    plan.tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let ranks: BTreeMap<&str, usize> =
        pairs.iter().map(|pair| (pair.site.name.as_str(), pair.rank)).collect();
    plan.decided = json!(ranks);
    let (before, after) = sizes(pairs);
    plan.steps.push(format!(
        "write {} linears as pairs of thin ones: {after} weights instead of {before}, ranks {} to {}",
        pairs.len(),
        pairs.iter().map(|pair| pair.rank).min().unwrap_or(0),
        pairs.iter().map(|pair| pair.rank).max().unwrap_or(0),
    ));
    if after >= before {
        plan.warnings.push(format!(
            "the pairs have {after} weights and the matrices that they replace {before}: nothing becomes smaller; a --ratio above \
             1 makes them thinner"
        ));
    }
    let threads = rayon::current_num_threads() as u64;
    plan.peak_memory = threads * 10 * 4 * largest as u64 + (64 << 20);
    Ok(plan)
}

/// The pairs that a plan decided on.
pub fn planned<'a>(model: &'a ModelInput, plan: &Plan) -> Vec<Pair<'a>> {
    let pair = |site: &'a Site| {
        let rank = plan.decided[&site.name].as_u64()? as usize;
        let (out, inputs) = shape_of(site);
        Some(Pair { site, out, inputs, rank })
    };
    model.artifact.architecture().linears().filter_map(pair).collect()
}

/// Weights before and after.
pub fn sizes(pairs: &[Pair]) -> (usize, usize) {
    (pairs.iter().map(|pair| pair.out * pair.inputs).sum(), pairs.iter().map(Pair::weights).sum())
}

/// Pairs that a model is stored in: those of its configuration.
pub fn stored<'a>(model: &'a ModelInput) -> Vec<Pair<'a>> {
    let artifact = &model.artifact;
    let pair = |site: &'a Site| {
        let rank = artifact.rank(&site.name).filter(|_| !artifact.is_compensated(&site.name))?;
        let (out, inputs) = site.out_in()?;
        Some(Pair { site, out, inputs, rank })
    };
    artifact.architecture().linears().filter_map(pair).collect()
}

/// Pairs that a plan writes, whether it decided on them or found the model in them.
pub fn declared<'a>(model: &'a ModelInput, plan: &Plan) -> Vec<Pair<'a>> {
    let names: BTreeSet<&str> = plan.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    let mut pairs = planned(model, plan);
    if pairs.is_empty() {
        pairs = stored(model);
    }
    pairs.retain(|pair| pair.names().iter().all(|name| names.contains(name.as_str())));
    pairs
}

/// Declares a model's matrices as the pairs that they are stored in, where they are.
pub fn keep_pairs(plan: &mut Plan, model: &ModelInput) {
    for pair in &stored(model) {
        let at = plan.tensors.iter().position(|tensor| tensor.name == pair.site.name);
        let Some(at) = at else { continue };
        let whole = plan.tensors.remove(at);
        let ([first, second], (rows, columns)) = (pair.names(), pair.stored());
        for (name, shape) in [(first, vec![pair.rank, columns]), (second, vec![rows, pair.rank])] {
            let dtype = whole.dtype.clone();
            let bytes = DType::parse(&dtype).and_then(|d| d.bytes_of(&shape)).unwrap_or(0);
            plan.tensors.push(PlannedTensor { name, shape, dtype, bytes, action: whole.action });
        }
        let bias = format!("{}.bias", pair.module());
        if let Some(bias) = plan.tensors.iter_mut().find(|tensor| tensor.name == bias) {
            bias.name = format!("{}.1.bias", pair.module());
        }
    }
    plan.tensors.sort_by(|a, b| a.name.cmp(&b.name));
    plan.output_bytes = plan.tensors.iter().map(|tensor| tensor.bytes).sum();
}

/// The running model's parameter behind every tensor of a pair.
pub fn parameters(pairs: &[Pair]) -> BTreeMap<String, String> {
    let mut names = BTreeMap::new();
    for pair in pairs {
        let module = pair.module();
        // Turned matrices have their factors the other way round.
        let (right, left) = match pair.site.layout {
            Layout::InOut => ("up", "down"),
            _ => ("down", "up"),
        };
        let [first, second] = pair.names();
        names.insert(first, format!("{module}.{right}"));
        names.insert(second, format!("{module}.{left}"));
        names.insert(format!("{module}.1.bias"), format!("{module}.bias"));
    }
    names
}

/// Puts `up [out, rank]` and `down [rank, in]` in the place of a linear's matrix.
///
/// # Errors
/// A linear that the running model does not hold.
pub fn install(
    decoder: &mut Decoder,
    model: &str,
    pair: &Pair,
    up: Vec<f32>,
    down: Vec<f32>,
) -> Result<()> {
    let linear = decoder.linear_mut(pair.module()).ok_or_else(|| {
        Error::tensor(model, &pair.site.name, "the running model does not hold it")
    })?;
    linear.set_factors(down, up, pair.rank);
    Ok(())
}

/// Puts the factors that a model is stored in in the place of their products.
///
/// # Errors
/// As [`install`]; files that cannot be read.
pub fn install_stored(decoder: &mut Decoder, model: &ModelInput) -> Result<()> {
    for pair in stored(model) {
        let Some(Factors { left, right, rank }) = model.artifact.factors(&pair.site.name)? else {
            continue;
        };
        let (up, down) = match pair.site.layout {
            Layout::InOut => (
                rewrite::transpose(&right, rank, pair.out),
                rewrite::transpose(&left, pair.inputs, rank),
            ),
            _ => (left, right),
        };
        install(decoder, &model.source, &pair, up, down)?;
    }
    Ok(())
}

/// The model's side files, with a configuration that names the pairs: beside what it said of them before, or the plan's own
/// parameters.
///
/// # Errors
/// A configuration that cannot be read.
pub fn side_files(model: &ModelInput, plan: &Plan, pairs: &[Pair]) -> Result<Vec<SideFile>> {
    let mut said = model.artifact.config().raw().get(LOW_RANK).cloned().unwrap_or_else(|| {
        let of = |key: &str| plan.parameters.get(key).cloned().unwrap_or(Value::Null);
        let ratio = if of("energy").is_null() { of("ratio") } else { Value::Null };
        json!({ "method": plan.method, "ratio": ratio, "energy": of("energy"), "omit": of("omit") })
    });
    let ranks: BTreeMap<&str, usize> =
        pairs.iter().map(|pair| (pair.module(), pair.rank)).collect();
    said["sites"] = json!(ranks);
    let mut files = model.artifact.side_files().to_vec();
    let mut config: Value = match files.iter().position(|file| file.name == "config.json") {
        Some(at) => {
            let bytes = files.remove(at).read()?;
            serde_json::from_slice(&bytes)
                .map_err(|source| Error::Parameters { method: "config.json", source })?
        }
        None => json!({}),
    };
    config[LOW_RANK] = said;
    files.push(SideFile::from_bytes("config.json", serialize("configuration", &config)?));
    Ok(files)
}

/// Writes one pair: `up [out, rank]` and `down [rank, in]`, turned where the matrix is stored `[in, out]`.
///
/// # Errors
/// Values that the declared type cannot hold, and whatever the disk refuses.
pub fn write(emitter: &Emitter, pair: &Pair, up: &[f32], down: &[f32]) -> Result<()> {
    let [first, second] = pair.names();
    let turned = pair.site.layout == Layout::InOut;
    let (left, right) = match turned {
        true => (
            rewrite::transpose(down, pair.rank, pair.inputs),
            rewrite::transpose(up, pair.out, pair.rank),
        ),
        false => (up.to_vec(), down.to_vec()),
    };
    for (name, values) in [(first, right), (second, left)] {
        emitter.write_f32(&name, 0, &values)?;
        emitter.done(&name)?;
    }
    Ok(())
}

/// Copies what is no pair; biases of pairs under their new names.
///
/// # Errors
/// As [`rewrite::copy`].
pub fn copy_rest(model: &ModelInput, pairs: &[Pair], emitter: &Emitter, plan: &Plan) -> Result<()> {
    let moved: BTreeMap<String, String> = pairs
        .iter()
        .map(|pair| (format!("{}.1.bias", pair.module()), format!("{}.bias", pair.module())))
        .collect();
    let copied = plan.tensors.iter().filter(|tensor| tensor.action == Action::Copy);
    for tensor in copied.filter(|tensor| !emitter.is_done(&tensor.name)) {
        let from = moved.get(&tensor.name).unwrap_or(&tensor.name);
        rewrite::copy_as(&model.artifact, from, &model.source, emitter, tensor)?;
    }
    Ok(())
}

/// Refuses a model that is stored in factors already.
///
/// # Errors
/// [`Error::Conflict`].
pub fn refuse_factored(method: &'static str, model: &ModelInput) -> Result<()> {
    let pairs: BTreeSet<&str> = model
        .artifact
        .architecture()
        .linears()
        .map(|site| site.name.as_str())
        .filter(|name| model.artifact.stored_in_factors(name))
        .collect();
    match pairs.len() {
        0 => Ok(()),
        n => Err(Error::Conflict {
            method,
            problem: format!(
                "{}: {n} linears are stored in factors already; multiply them out first: refit export {} --to safetensors -o DENSE",
                model.source, model.source
            ),
        }),
    }
}
