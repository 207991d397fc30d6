//! GGUF: which type every tensor gets, and the metadata.

use std::collections::BTreeMap;

use refit_store::architecture::Role;
use refit_store::formats::gguf::write::{self, Fields, Naming};
use refit_store::formats::gguf::{self, WRITABLE};
use refit_store::{DType, GgmlType, SideFile, TensorInfo};

use super::decide::{Decision, How, float_of};
use super::lattices::Found;
use super::seen::Seen;
use super::{Export, bits_of};
use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::method::Plan;

/// An error about the model as a whole.
fn bad(model: &ModelInput, problem: String) -> Error {
    Error::BadData { source_name: model.source.clone(), problem }
}

/// Decides about every tensor.
///
/// # Errors
/// A model type that GGUF is not written for, a tensor that has no name there, a tokenizer that cannot be told.
pub fn decide(
    export: &Export,
    model: &ModelInput,
    seen: &Seen,
    plan: &mut Plan,
) -> Result<Vec<Decision>> {
    let artifact = &model.artifact;
    let naming = write::naming(artifact.config()).map_err(|problem| bad(model, problem))?;
    let found = &seen.grids;
    let tied = artifact.config().bool("tie_word_embeddings") == Some(true);
    let mut decisions = Vec::new();
    let mut fallbacks: BTreeMap<(String, String, usize), usize> = BTreeMap::new();
    for info in &seen.tensors {
        if info.name.ends_with("rotary_emb.inv_freq") || info.name.ends_with(".attn.bias") {
            plan.notes
                .push(format!("`{}` follows from the configuration and is left out", info.name));
            continue;
        }
        if tied && info.name == "lm_head.weight" {
            plan.notes.push("`lm_head.weight` is tied to the embedding and left out".into());
            continue;
        }
        let name = naming.tensor(&info.name).ok_or_else(|| {
            let problem = "it has no name in GGUF; remove it, or export to another format";
            Error::tensor(&model.source, &info.name, problem)
        })?;
        let (dtype, how) = match info.shape.len() {
            2 => matrix(export, model, info, found.get(&info.name), &mut fallbacks),
            // llama.cpp computes with norms and biases in single precision.
            _ => (DType::F32, How::Plain),
        };
        decisions.push(Decision::whole(&info.name, name, &info.shape, dtype, how));
    }
    if let Some(factors) = write::rope_factors(artifact.config()) {
        decisions.push(Decision {
            source: None,
            name: "rope_freqs.weight".into(),
            shape: vec![factors.len()],
            dtype: DType::F32.to_string(),
            how: How::Made(factors),
            packed: None,
        });
    }
    for ((wanted, got, row), count) in fallbacks {
        plan.notes.push(format!(
            "{count} matrices have rows of {row}, which are no whole blocks of {wanted}: {got} instead, as llama.cpp does"
        ));
    }
    let off_grid: Vec<&Decision> = decisions
        .iter()
        .filter(|_| export.r#type.0.is_none())
        .filter(|d| d.how == How::Plain && d.source.as_ref().is_some_and(|s| found.contains_key(s)))
        .collect();
    if let Some(first) = off_grid.first() {
        let lattice = found[first.source.as_deref().unwrap_or_default()].lattice;
        plan.notes.push(format!(
            "{} matrices lie on grids that no GGUF type holds exactly (`{}`: {} bits, {}, groups of {}): written as {}. \
             GGUF holds groups that are multiples of 32; --type rounds them again",
            off_grid.len(),
            first.name,
            lattice.bits,
            if lattice.symmetric { "symmetric" } else { "asymmetric" },
            lattice.group,
            first.dtype
        ));
    }
    Ok(decisions)
}

/// Type and way of one matrix.
fn matrix(
    export: &Export,
    model: &ModelInput,
    info: &TensorInfo,
    found: Option<&Found>,
    fallbacks: &mut BTreeMap<(String, String, usize), usize>,
) -> (DType, How) {
    let role = model.artifact.architecture().site(&info.name).map(|site| site.role);
    let is_embedding = matches!(role, Some(Role::Embed | Role::Head));
    let row = info.shape[1];
    let exact = |ggml: GgmlType| {
        let found = found.filter(|found| gguf::holds(ggml, found.range, found.lattice.group))?;
        row.is_multiple_of(ggml.block_len()).then_some(How::Codes(found.lattice))
    };
    let explicit = match is_embedding {
        true => export.embedding_type.0.or(export.r#type.0.map(|dtype| of_embedding(dtype, row))),
        false => export.r#type.0,
    };
    let Some(wanted) = explicit else {
        if let DType::Ggml(_) = info.dtype {
            return (info.dtype, How::Raw);
        }
        let mut holding: Vec<GgmlType> = WRITABLE
            .into_iter()
            .filter(|&ggml| ggml != GgmlType::TQ1_0 && exact(ggml).is_some())
            .collect();
        holding.sort_by(|a, b| bits_of(*a).total_cmp(&bits_of(*b)));
        return match holding.first() {
            Some(&ggml) => (DType::Ggml(ggml), exact(ggml).unwrap_or(How::Plain)),
            None => (float_of(info.dtype), How::Plain),
        };
    };
    let DType::Ggml(ggml) = wanted else { return (wanted, How::Plain) };
    if info.dtype == wanted {
        return (wanted, How::Raw);
    }
    let dtype = fit(ggml, row);
    if dtype != wanted {
        *fallbacks.entry((wanted.to_string(), dtype.to_string(), row)).or_default() += 1;
    }
    match dtype {
        DType::Ggml(_) if dtype == info.dtype => (dtype, How::Raw),
        DType::Ggml(ggml) => (dtype, exact(ggml).unwrap_or(How::Quantize)),
        plain => (plain, How::Plain),
    }
}

/// What embeddings and head get where the other matrices get `dtype`: never fewer than six bits, as in llama.cpp's
/// mixes for a head (and a tied embedding is one).
fn of_embedding(dtype: DType, row: usize) -> DType {
    match dtype {
        DType::Ggml(ggml) if bits_of(ggml) < bits_of(GgmlType::Q6_K) => {
            let six = row.is_multiple_of(GgmlType::Q6_K.block_len());
            DType::Ggml(if six { GgmlType::Q6_K } else { GgmlType::Q8_0 })
        }
        other => other,
    }
}

/// The type itself, or what llama.cpp takes where rows are no whole blocks of it. (For the 2- and 3-bit types it takes
/// `IQ4_NL`, which has the size of `Q4_0`.)
fn fit(ggml: GgmlType, row: usize) -> DType {
    let smaller = match ggml {
        GgmlType::TQ1_0 | GgmlType::TQ2_0 | GgmlType::Q2_K | GgmlType::Q3_K => GgmlType::Q4_0,
        GgmlType::Q4_K => GgmlType::Q5_0,
        GgmlType::Q5_K => GgmlType::Q5_1,
        GgmlType::Q6_K => GgmlType::Q8_0,
        other => other,
    };
    match [ggml, smaller].into_iter().find(|ggml| row.is_multiple_of(ggml.block_len())) {
        Some(ggml) => DType::Ggml(ggml),
        None => DType::F16,
    }
}

/// Metadata and tokenizer.
///
/// # Errors
/// A configuration or a tokenizer that GGUF has no words for.
pub fn fields(export: &Export, model: &ModelInput, decisions: &[Decision]) -> Result<Fields> {
    let artifact = &model.artifact;
    let say = |problem: String| bad(model, problem);
    let naming: Naming = write::naming(artifact.config()).map_err(say)?;
    let name = model.source.trim_end_matches('/').rsplit('/').next().unwrap_or("model");
    let mut fields = write::metadata(artifact, &naming, name).map_err(say)?;
    let weights = decisions
        .iter()
        .filter(|decision| decision.shape.len() == 2)
        .map(|decision| (decision.dtype(), decision.shape.iter().product::<usize>() as u64));
    fields.push(("general.file_type".into(), write::Field::U32(write::file_type(weights))));
    fields.push(("general.quantization_version".into(), write::Field::U32(2)));
    let rows = artifact.architecture().dims.vocab.or(artifact.config().usize("vocab_size"));
    let tokenizer = match export.no_tokenizer {
        true => None,
        false => write::tokenizer_fields(artifact, rows.unwrap_or(0)).map_err(say)?,
    };
    match tokenizer {
        Some(tokenizer) => fields.extend(tokenizer),
        None => fields.push(("tokenizer.ggml.model".into(), "none".into())),
    }
    Ok(fields)
}

/// Licences; everything else is inside the file.
pub fn side_files(model: &ModelInput) -> Vec<SideFile> {
    let is_licence = |file: &&SideFile| {
        ["LICENSE", "LICENCE", "NOTICE", "COPYING"].iter().any(|stem| file.name.starts_with(stem))
    };
    model.artifact.side_files().iter().filter(is_licence).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_are_no_whole_blocks_get_another_type() {
        use GgmlType::{Q2_K, Q3_K, Q4_0, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, TQ2_0};
        for (wanted, got) in
            [(Q2_K, Q4_0), (Q3_K, Q4_0), (Q4_K, Q5_0), (Q5_K, Q5_1), (Q6_K, Q8_0), (TQ2_0, Q4_0)]
        {
            assert_eq!(fit(wanted, 576), DType::Ggml(got));
            assert_eq!(fit(wanted, 1536), DType::Ggml(wanted));
            assert_eq!(fit(wanted, 40), DType::F16);
        }
        assert_eq!(of_embedding(DType::Ggml(Q4_0), 576), DType::Ggml(Q8_0));
        assert_eq!(of_embedding(DType::Ggml(Q4_0), 1024), DType::Ggml(Q6_K));
        assert_eq!(of_embedding(DType::Ggml(Q8_0), 576), DType::Ggml(Q8_0));
        assert_eq!(of_embedding(DType::F16, 576), DType::F16);
    }
}
