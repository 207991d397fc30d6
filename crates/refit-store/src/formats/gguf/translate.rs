//! A GGUF file in Hugging Face's terms: tensor names, row orders, `config.json`.

use std::sync::Arc;

use serde_json::{Map, Value as Json, json};

use super::header::{Header, Tensor, Value};
use super::names::{COMMON_KEYS, Constant, EXPERTS, FAMILIES, Family, MIXTRAL, Names};
use crate::artifact::TensorInfo;
use crate::config::Config;
use crate::convert;
use crate::dtype::DType;
use crate::error::{Error, Result, TensorFault};
use crate::storage::{Entry, Source, View};

/// The family of a header; `None` leaves GGUF's own names in place.
pub(crate) fn family(header: &Header) -> Option<&'static Family> {
    let architecture = header.architecture()?;
    if architecture == "llama" && count(header, "llama.expert_count") > 0 {
        return Some(&MIXTRAL);
    }
    FAMILIES.iter().find(|family| family.gguf == architecture)
}

fn count(header: &Header, key: &str) -> u64 {
    header.get(key).and_then(Value::as_u64).unwrap_or(0)
}

fn look_up(names: Names, stem: &str) -> Option<&'static str> {
    names.iter().find(|(gguf, _)| *gguf == stem).map(|(_, hf)| *hf)
}

/// The tensors under Hugging Face's names and in its row order.
pub(crate) fn entries(header: &Header, source: &Arc<Source>) -> Result<Vec<Entry>> {
    let mut entries = Vec::with_capacity(header.tensors.len());
    for tensor in &header.tensors {
        let plain = Entry {
            info: tensor.info.clone(),
            source: source.clone(),
            offset: tensor.offset,
            view: View::Plain,
        };
        match family(header) {
            None => entries.push(plain),
            Some(family) => translate(family, header, tensor, plain, &mut entries)
                .map_err(|reason| Error::tensor(&source.path, &tensor.info.name, reason))?,
        }
    }
    Ok(entries)
}

fn translate(
    family: &Family,
    header: &Header,
    tensor: &Tensor,
    mut entry: Entry,
    out: &mut Vec<Entry>,
) -> Result<(), TensorFault> {
    let name = &*tensor.info.name;
    let (stem, kind) = name.rsplit_once('.').unwrap_or((name, ""));
    let layer = stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    let Some((number, inner)) = layer else {
        if let Some(stem) = look_up(family.outer, stem) {
            entry.info.name = format!("{stem}.{kind}");
        }
        return push_norm(family, stem, entry, out);
    };
    let prefix = format!("{}{number}.", family.layers);
    if let Some(matrix) = look_up(EXPERTS, inner) {
        return split_experts(&prefix, matrix, entry, out);
    }
    if let Some(stem) = look_up(family.inner, inner) {
        entry.info.name = format!("{prefix}{stem}.{kind}");
    }
    let heads = match inner {
        "attn_q" => count(header, &format!("{}.attention.head_count", family.gguf)),
        "attn_k" => match count(header, &format!("{}.attention.head_count_kv", family.gguf)) {
            0 => count(header, &format!("{}.attention.head_count", family.gguf)),
            heads => heads,
        },
        _ => 0,
    };
    if family.interleaved && heads > 0 {
        let rows = entry.info.shape.first().copied().unwrap_or(0) as u64;
        if rows == 0 || !rows.is_multiple_of(heads * 2) {
            let reason = format!("{rows} rows cannot be cut into {heads} heads of even width");
            return Err(TensorFault::Other(reason));
        }
        entry.view = View::Interleaved { head_dim: (rows / heads) as usize };
    }
    if family.transposed && kind == "weight" && entry.info.shape.len() == 2 {
        let view = View::Transposed { stored: entry.info.dtype };
        entry.info.shape.reverse();
        entry = as_f32(entry, view)?;
    }
    push_norm(family, inner, entry, out)
}

fn push_norm(
    family: &Family,
    stem: &str,
    mut entry: Entry,
    out: &mut Vec<Entry>,
) -> Result<(), TensorFault> {
    if family.norm_plus_one && stem.ends_with("norm") {
        let view = View::PlusOne { stored: entry.info.dtype };
        entry = as_f32(entry, view)?;
    }
    out.push(entry);
    Ok(())
}

/// Presents an entry as `F32` because its stored bytes are not Hugging Face's values.
fn as_f32(mut entry: Entry, view: View) -> Result<Entry, TensorFault> {
    let shape = &entry.info.shape;
    let overflow =
        || TensorFault::Overflow { shape: shape.iter().map(|&dim| dim as u64).collect() };
    let nbytes = DType::F32.bytes_of(shape).ok_or_else(overflow)?;
    entry.info.dtype = DType::F32;
    entry.info.nbytes = nbytes;
    entry.view = view;
    Ok(entry)
}

/// One stacked tensor `[experts, rows, columns]` becomes a matrix per expert.
fn split_experts(
    prefix: &str,
    matrix: &str,
    entry: Entry,
    out: &mut Vec<Entry>,
) -> Result<(), TensorFault> {
    let [experts, rows, columns] = entry.info.shape[..] else {
        let reason = format!("expected [experts, rows, columns], found {:?}", entry.info.shape);
        return Err(TensorFault::Other(reason));
    };
    // The stack is not empty and lies in the file, so its length bounds the number of experts.
    let nbytes = entry.info.nbytes / experts.max(1) as u64;
    if nbytes == 0 {
        return Err(TensorFault::Other("it is empty".to_owned()));
    }
    for expert in 0..experts {
        out.push(Entry {
            info: TensorInfo {
                name: format!("{prefix}block_sparse_moe.experts.{expert}.{matrix}.weight"),
                shape: vec![rows, columns],
                dtype: entry.info.dtype,
                nbytes,
            },
            source: entry.source.clone(),
            offset: entry.offset + expert as u64 * nbytes,
            view: View::Plain,
        });
    }
    Ok(())
}

/// `config.json` rebuilt from metadata.
pub(crate) fn config(header: &Header, source: &Source) -> Config {
    let mut config = Map::new();
    let Some(family) = family(header) else {
        if let Some(architecture) = header.architecture() {
            config.insert("model_type".into(), json!(architecture));
        }
        return Config::new(config);
    };
    config.insert("architectures".into(), json!([family.class]));
    config.insert("model_type".into(), json!(family.model_type));
    // A family's own keys win: GPT-2 spells its sizes `n_embd`, `n_layer`.
    let own = |gguf: &str| family.keys.iter().any(|(key, _)| *key == gguf);
    let common = COMMON_KEYS.iter().filter(|(gguf, _)| !own(gguf));
    for (gguf, hf) in family.keys.iter().chain(common) {
        let value = header
            .get(&format!("{}.{gguf}", family.gguf))
            .or_else(|| header.get(gguf).filter(|_| gguf.starts_with("tokenizer.")));
        if let Some(value) = value {
            config.insert((*hf).into(), one_or_list(value));
        }
    }
    for (key, constant) in family.constants {
        let value = match *constant {
            Constant::Text(text) => json!(text),
            Constant::Flag(flag) => json!(flag),
            Constant::Number(number) => json!(number),
        };
        config.insert((*key).into(), value);
    }
    let find = |name: &str| header.tensors.iter().find(|tensor| tensor.info.name == name);
    if let Some(embedding) = find("token_embd.weight") {
        config.insert("vocab_size".into(), json!(embedding.info.shape.first()));
    }
    let tied = find("output.weight").is_none();
    config.insert("tie_word_embeddings".into(), json!(tied));
    if matches!(family.model_type, "llama" | "qwen3" | "gemma2") {
        config.insert("attention_bias".into(), json!(find("blk.0.attn_q.bias").is_some()));
    }
    if family.model_type == "llama" {
        config.insert("mlp_bias".into(), json!(find("blk.0.ffn_up.bias").is_some()));
    }
    if let Some(scalar) = query_scalar(family, &config) {
        config.insert("query_pre_attn_scalar".into(), json!(scalar));
    }
    for key in ["bos", "eos", "pad"] {
        let gguf = if key == "pad" { "padding" } else { key };
        if let Some(id) = header.get(&format!("tokenizer.ggml.{gguf}_token_id")) {
            config.insert(format!("{key}_token_id"), id.to_json());
        }
    }
    if let Some(scaling) = rope_scaling(header, family, source, &config) {
        config.insert("rope_scaling".into(), scaling);
    }
    Config::new(config)
}

/// What Gemma 2 divides scores by the root of, which GGUF leaves to be known: the width of a head, but in the release
/// with 46 layers the width of the model over its heads.
fn query_scalar(family: &Family, config: &Map<String, Json>) -> Option<u64> {
    let size = |key: &str| config.get(key).and_then(Json::as_u64);
    match family.model_type {
        "gemma2" if size("num_hidden_layers") == Some(46) => {
            size("hidden_size")?.checked_div(size("num_attention_heads")?)
        }
        "gemma2" => size("head_dim"),
        _ => None,
    }
}

/// Per-layer lists whose elements agree become the one number that `config.json` holds.
fn one_or_list(value: &Value) -> Json {
    let Some(numbers) = value.as_numbers() else { return value.to_json() };
    let mut elements = numbers.iter();
    match elements.next() {
        Some(first) if elements.all(|x| x == first) => first.to_json(),
        _ => value.to_json(),
    }
}

/// Rotary scaling: from its keys, or from the factors tensor that Llama 3.1 and later carry.
fn rope_scaling(
    header: &Header,
    family: &Family,
    source: &Source,
    config: &Map<String, Json>,
) -> Option<Json> {
    let key = |name: &str| header.get(&format!("{}.rope.scaling.{name}", family.gguf));
    let original = key("original_context_length").and_then(Value::as_u64);
    if let Some(kind) = key("type").and_then(Value::as_str).filter(|kind| *kind != "none") {
        let factor = key("factor").and_then(Value::as_f64).unwrap_or(1.0);
        let mut scaling = json!({ "rope_type": kind, "factor": factor });
        if let Some(original) = original {
            scaling["original_max_position_embeddings"] = json!(original);
        }
        return Some(scaling);
    }
    let factors = header.tensors.iter().find(|tensor| tensor.info.name == "rope_freqs.weight")?;
    if factors.info.dtype != DType::F32 || factors.info.nbytes > 1 << 20 {
        return None;
    }
    let bytes = source.read_vec(factors.offset, factors.info.nbytes, "rope_freqs.weight").ok()?;
    let mut values = vec![0.0; factors.info.numel()];
    convert::decode(DType::F32, &bytes, &mut values);
    // The longest wavelengths are divided by the whole factor; the rest of the recipe is constant in
    // every release of this scheme.
    let factor = values.into_iter().fold(1.0, f32::max);
    let context = config.get("max_position_embeddings").and_then(Json::as_u64).unwrap_or(8192);
    Some(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original.unwrap_or(context.min(8192)),
    }))
}
