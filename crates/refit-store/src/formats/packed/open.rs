//! Finds packed linears among the tensors of a safetensors directory and presents each as one matrix.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value as Json;

use super::bits::per_word;
use super::{Packed, Scheme, integers, single, words_of};
use crate::adapter::pattern::Pattern;
use crate::artifact::TensorInfo;
use crate::config::Config;
use crate::dtype::DType;
use crate::error::{Error, Result, TensorFault};
use crate::storage::{Entry, View};

/// What was found.
pub(crate) struct Opened {
    /// The tensors, packed linears as single matrices.
    pub entries: Vec<Entry>,
    /// Name of the format, if anything is packed.
    pub format: Option<&'static str>,
}

/// Puts packed linears together as `quantization_config` says. Methods that refit does not read leave all tensors as
/// they are stored.
pub(crate) fn open(path: &Path, entries: Vec<Entry>, config: &Config) -> Result<Opened> {
    let settings = ["quantization_config", "compression_config"]
        .iter()
        .find_map(|key| config.raw().get(*key))
        .filter(|settings| settings.is_object());
    let method = settings.and_then(|settings| settings["quant_method"].as_str());
    let (format, suffix) = match method {
        Some("compressed-tensors") => ("compressed-tensors", "weight_scale"),
        Some("gptq") => ("GPTQ", "scales"),
        _ => return Ok(Opened { entries, format: None }),
    };
    let settings = settings.expect("invariant: the method was read from it");
    let mut parts: HashMap<String, Entry> =
        entries.into_iter().map(|entry| (entry.info.name.clone(), entry)).collect();
    let mut stems: Vec<String> = parts
        .keys()
        .filter_map(|name| name.strip_suffix(suffix)?.strip_suffix('.').map(str::to_owned))
        .collect();
    stems.sort();
    let mut done = Vec::new();
    for stem in &stems {
        let fault = |reason: String| {
            Error::tensor(path, format!("{stem}.weight"), TensorFault::Other(reason))
        };
        let packed = match format {
            "GPTQ" => gptq(stem, settings, &mut parts).map_err(|fail| fail.into_error(fault))?,
            _ => compressed(stem, settings, &mut parts).map_err(|fail| fail.into_error(fault))?,
        };
        let shape = packed.shape.to_vec();
        let nbytes = DType::F32
            .bytes_of(&shape)
            .ok_or_else(|| fault(format!("the size of {shape:?} overflows")))?;
        let info = TensorInfo { name: format!("{stem}.weight"), shape, dtype: DType::F32, nbytes };
        let (source, offset) = (packed.codes.source.clone(), packed.codes.offset);
        done.push(Entry { info, source, offset, view: View::Packed(Arc::new(packed)) });
    }
    let format = (!done.is_empty()).then_some(format);
    done.extend(parts.into_values());
    Ok(Opened { entries: done, format })
}

/// A rule of the format that is broken, or a failed read.
enum Fail {
    Rule(String),
    Read(Error),
}

impl Fail {
    fn into_error(self, fault: impl Fn(String) -> Error) -> Error {
        match self {
            Self::Rule(reason) => fault(reason),
            Self::Read(error) => error,
        }
    }
}

impl From<String> for Fail {
    fn from(reason: String) -> Self {
        Self::Rule(reason)
    }
}

impl From<Error> for Fail {
    fn from(error: Error) -> Self {
        Self::Read(error)
    }
}

/// Takes the part of a linear that must be there.
fn take(parts: &mut HashMap<String, Entry>, stem: &str, part: &str) -> Result<Entry, Fail> {
    parts.remove(&format!("{stem}.{part}")).ok_or_else(|| {
        Fail::Rule(format!("its part `{part}` is missing; download the model again"))
    })
}

/// Checks a part's type and shape.
fn check(entry: &Entry, dtypes: &[DType], shape: &[usize]) -> Result<(), Fail> {
    let info = &entry.info;
    if dtypes.contains(&info.dtype) && info.shape == shape {
        return Ok(());
    }
    let named: Vec<String> = dtypes.iter().map(ToString::to_string).collect();
    Err(Fail::Rule(format!(
        "its part `{}` is {} {:?}, but {} {shape:?} is what its other parts and the configuration ask for",
        info.name,
        info.dtype,
        info.shape,
        named.join(" or ")
    )))
}

/// The group of every input where it is not `i / group`.
fn order(
    entry: Option<Entry>,
    group: usize,
    inputs: usize,
    groups: usize,
) -> Result<Option<Arc<[u32]>>, Fail> {
    let Some(entry) = entry else { return Ok(None) };
    check(&entry, &[DType::I32, DType::I64], &[inputs])?;
    let listed = integers(&entry)?;
    if listed.iter().enumerate().all(|(i, &g)| g == (i / group) as i64) {
        return Ok(None);
    }
    match listed.iter().find(|&&g| g < 0 || g >= groups as i64) {
        Some(wrong) => {
            Err(Fail::Rule(format!("`g_idx` names group {wrong}, but there are {groups}")))
        }
        None => Ok(Some(listed.into_iter().map(|g| g as u32).collect())),
    }
}

const SCALES: [DType; 3] = [DType::F16, DType::BF16, DType::F32];

fn compressed(
    stem: &str,
    settings: &Json,
    parts: &mut HashMap<String, Entry>,
) -> Result<Packed, Fail> {
    let weights = settings_of(stem, settings)?;
    let bits = weights["num_bits"].as_u64().filter(|bits| (2..=8).contains(bits));
    let bits = bits
        .ok_or_else(|| format!("`num_bits` is {}, refit reads 2 to 8", weights["num_bits"]))?
        as u8;
    if let Some(kind) = weights["type"].as_str().filter(|kind| *kind != "int") {
        return Err(Fail::Rule(format!("its codes are `{kind}`; refit reads `int`")));
    }
    let scales = take(parts, stem, "weight_scale")?;
    let (scheme, codes, shape) = match parts.remove(&format!("{stem}.weight_packed")) {
        Some(codes) => {
            let listed = integers(&take(parts, stem, "weight_shape")?)?;
            let [outputs, inputs] = listed[..] else {
                return Err(Fail::Rule(format!("`weight_shape` holds {listed:?}, not two sizes")));
            };
            let size = |n: i64| usize::try_from(n).ok().filter(|&n| n > 0 && n < 1 << 40);
            let (Some(outputs), Some(inputs)) = (size(outputs), size(inputs)) else {
                return Err(Fail::Rule(format!("`weight_shape` is {listed:?}")));
            };
            let sparse = [outputs, inputs.div_ceil(per_word(bits))];
            let dense = [outputs, words_of(inputs, bits)];
            let older = sparse != dense && codes.info.shape == sparse;
            check(&codes, &[DType::I32], if older { &sparse } else { &dense })?;
            (Scheme::PackQuantized { dense: !older }, codes, [outputs, inputs])
        }
        None => {
            let codes = take(parts, stem, "weight")?;
            let [outputs, inputs] = codes.info.shape[..] else {
                return Err(Fail::Rule(format!("`weight` is {:?}, no matrix", codes.info.shape)));
            };
            check(&codes, &[DType::I8], &[outputs, inputs])?;
            (Scheme::IntQuantized, codes, [outputs, inputs])
        }
    };
    let [outputs, inputs] = shape;
    let groups = match scales.info.shape[..] {
        [1] | [1, 1] => 1,
        [rows] if rows == outputs => 1,
        [rows, groups] if rows == outputs && groups > 0 && groups <= inputs => groups,
        _ => {
            return Err(Fail::Rule(format!(
                "`weight_scale` is {:?}, but there are {outputs} outputs",
                scales.info.shape
            )));
        }
    };
    check(&scales, &SCALES, &scales.info.shape.clone())?;
    let group = match weights["group_size"].as_u64() {
        Some(group) if group > 0 && groups > 1 => group as usize,
        _ => inputs.div_ceil(groups),
    };
    if inputs.div_ceil(group) != groups {
        return Err(Fail::Rule(format!(
            "`weight_scale` has {groups} groups, but {inputs} inputs in groups of {group} make {}",
            inputs.div_ceil(group)
        )));
    }
    let zeros = parts.remove(&format!("{stem}.weight_zero_point"));
    let symmetric = weights["symmetric"].as_bool() != Some(false);
    // Some writers store the zeros of symmetric grids.
    let zeros = zeros.filter(|_| !symmetric);
    if !symmetric && zeros.is_none() {
        return Err(Fail::Rule("its part `weight_zero_point` is missing".into()));
    }
    if let Some(zeros) = &zeros {
        match scheme {
            Scheme::PackQuantized { dense } => {
                let words =
                    if dense { words_of(outputs, bits) } else { outputs.div_ceil(per_word(bits)) };
                check(zeros, &[DType::I32], &[words, groups])?;
            }
            _ => check(zeros, &[DType::I8], &zeros.info.shape.clone())?,
        }
        if scheme == Scheme::IntQuantized && zeros.info.numel() != outputs * groups {
            return Err(Fail::Rule(format!("`weight_zero_point` is {:?}", zeros.info.shape)));
        }
    }
    let order = order(parts.remove(&format!("{stem}.weight_g_idx")), group, inputs, groups)?;
    let input = input(stem, parts)?;
    Ok(Packed { scheme, bits, group, shape, codes, scales, zeros, order, input })
}

/// `input_scale` and `input_zero_point` of a linear; the latter is 0 where symmetric grids have none.
fn input(stem: &str, parts: &mut HashMap<String, Entry>) -> Result<Option<(f32, f32)>, Fail> {
    let mut value = |part: &str| -> Result<Option<f32>, Fail> {
        let Some(entry) = parts.remove(&format!("{stem}.{part}")) else { return Ok(None) };
        let found = single(&entry)?;
        let shape = &entry.info.shape;
        found.map(Some).ok_or_else(|| Fail::Rule(format!("`{part}` is {shape:?}, not one number")))
    };
    let (scale, zero) = (value("input_scale")?, value("input_zero_point")?);
    Ok(scale.map(|scale| (scale, zero.unwrap_or(0.0))))
}

/// The group of compressed-tensors' `quantization_config` whose targets name the linear `stem`: by name, by pattern, or by class.
pub fn group_of<'a>(stem: &str, settings: &'a Json) -> Option<&'a Json> {
    let groups = settings["config_groups"].as_object();
    let groups: Vec<&Json> = groups.into_iter().flatten().map(|(_, group)| group).collect();
    let targets = |group: &'a Json| {
        group["targets"].as_array().into_iter().flatten().filter_map(Json::as_str)
    };
    let named = |target: &str| {
        target == stem
            || target.strip_prefix("re:").is_some_and(|pattern| {
                Pattern::new(pattern).is_ok_and(|pattern| pattern.matches_start(stem))
            })
    };
    let by_name = groups.iter().find(|group| targets(group).any(named));
    let by_class = || groups.iter().find(|group| targets(group).any(|target| target == "Linear"));
    by_name.or_else(by_class).copied()
}

/// The `weights` settings of the group that names the linear.
fn settings_of<'a>(stem: &str, settings: &'a Json) -> Result<&'a Json, Fail> {
    let found = group_of(stem, settings).map(|group| &group["weights"]);
    found.filter(|weights| weights.is_object()).ok_or_else(|| {
        Fail::Rule("it is packed, but no group of `quantization_config` names it".to_owned())
    })
}

fn gptq(stem: &str, settings: &Json, parts: &mut HashMap<String, Entry>) -> Result<Packed, Fail> {
    let codes = take(parts, stem, "qweight")?;
    let scales = take(parts, stem, "scales")?;
    let zeros = take(parts, stem, "qzeros")?;
    let g_idx = parts.remove(&format!("{stem}.g_idx"));
    let [words, outputs] = codes.info.shape[..] else {
        return Err(Fail::Rule(format!("`qweight` is {:?}, no matrix", codes.info.shape)));
    };
    // Overrides (`dynamic`) may give a linear bits of its own; its shapes say which.
    let listed = settings["bits"].as_u64();
    let bits = match &g_idx {
        Some(g_idx) if g_idx.info.numel() > 0 => Some((words * 32 / g_idx.info.numel()) as u64),
        _ => listed,
    };
    let bits = bits.filter(|bits| [2, 3, 4, 8].contains(bits));
    let bits = bits
        .ok_or_else(|| format!("`bits` is {}; refit reads 2, 3, 4 and 8", settings["bits"]))?
        as u8;
    let inputs = words * 32 / usize::from(bits);
    let [groups, _] = scales.info.shape[..] else {
        return Err(Fail::Rule(format!("`scales` is {:?}, no matrix", scales.info.shape)));
    };
    if inputs == 0 || groups == 0 || !inputs.is_multiple_of(groups) || outputs == 0 {
        return Err(Fail::Rule(format!(
            "{groups} groups of {inputs} inputs and {outputs} outputs"
        )));
    }
    check(&codes, &[DType::I32], &[inputs * usize::from(bits) / 32, outputs])?;
    check(&scales, &SCALES, &[groups, outputs])?;
    check(&zeros, &[DType::I32], &[groups, outputs * usize::from(bits) / 32])?;
    if !(outputs * usize::from(bits)).is_multiple_of(32) {
        return Err(Fail::Rule(format!("{outputs} outputs of {bits} bits are no whole words")));
    }
    let group = inputs / groups;
    let order = order(g_idx, group, inputs, groups)?;
    let less_one = settings["checkpoint_format"].as_str() != Some("gptq_v2");
    let scheme = Scheme::Gptq { less_one };
    Ok(Packed {
        scheme,
        bits,
        group,
        shape: [outputs, inputs],
        codes,
        scales,
        zeros: Some(zeros),
        order,
        input: None,
    })
}
