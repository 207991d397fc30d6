//! Compensations of a quantized model, for formats that have no word for a product beside codes: the codes are written as those of
//! any quantized model, and the products as an adapter in [`ADAPTER`], which llama.cpp (`--lora`) and PEFT add while they run.

use refit_store::formats::gguf::write::{self, Field, Naming};
use refit_store::{Artifact, DType, SideFile, codes::all_halves};

use super::write::interleave;
use crate::error::{Error, Result};
use crate::inputs::{Inputs, ModelInput};
use crate::quantize::lorc::ADAPTER;

/// Name of the adapter of a GGUF file: not beside it, where it would be a second model.
pub const GGUF_NAME: &str = "lorc/lora.gguf";

/// Tensors that are stored with a compensation.
pub fn compensated(artifact: &Artifact) -> Vec<&str> {
    let names = artifact.tensors().iter().map(|info| info.name.as_str());
    names.filter(|name| artifact.is_compensated(name)).collect()
}

/// The inputs with compensations left out of the weights; as they are where there are none.
///
/// # Errors
/// Files that are gone.
pub fn bare(inputs: &Inputs) -> Result<Inputs> {
    let mut inputs = inputs.clone();
    if let Some(model) = inputs.models.first_mut()
        && !compensated(&model.artifact).is_empty()
    {
        let artifact = Artifact::open_uncompensated(model.artifact.path())?;
        *model = ModelInput { source: model.source.clone(), artifact: artifact.into() };
    }
    Ok(inputs)
}

/// The products of `model` as llama.cpp reads an adapter: `NAME.lora_a` `[r, in]` and `NAME.lora_b` `[out, r]`, rows of the second
/// in llama.cpp's order of a head's, and `alpha` so that every product counts once.
///
/// # Errors
/// A matrix that has no name in GGUF.
pub fn gguf(model: &ModelInput) -> Result<SideFile> {
    let artifact = &model.artifact;
    let bad = |problem| Error::BadData { source_name: model.source.clone(), problem };
    let naming: Naming = write::naming(artifact.config()).map_err(bad)?;
    let names = compensated(artifact);
    let mut alpha = 0;
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    for name in &names {
        let Some(factors) = artifact.factors(name)? else { continue };
        let [rows, columns] = artifact.tensor(name)?.shape[..] else { continue };
        let theirs = naming.tensor(name).ok_or_else(|| {
            Error::tensor(&model.source, *name, "its compensation has no name in GGUF")
        })?;
        let rank = factors.rank;
        alpha = alpha.max(rank);
        let b = interleave(factors.left, rank, naming.head_rows(name, rows));
        tensors.push((format!("{theirs}.lora_a"), vec![rank, columns], factors.right));
        tensors.push((format!("{theirs}.lora_b"), vec![rows, rank], b));
    }
    for (name, shape, values) in &mut tensors {
        // What counts as alpha over rank there counts once here.
        if name.ends_with(".lora_b") && shape[1] != alpha {
            values.iter_mut().for_each(|x| *x *= shape[1] as f32 / alpha as f32);
        }
    }
    let fields = [
        ("general.architecture", Field::Text(naming.architecture().to_owned())),
        ("general.type", Field::from("adapter")),
        ("adapter.type", Field::from("lora")),
        ("adapter.lora.alpha", Field::F32(alpha as f32)),
    ];
    let fields: Vec<(String, Field)> =
        fields.into_iter().map(|(key, field)| (key.to_owned(), field)).collect();
    let typed: Vec<(DType, u64)> = tensors
        .iter()
        .map(|(_, _, values)| {
            let dtype = if all_halves(values) { DType::F16 } else { DType::F32 };
            (dtype, dtype.bytes_of(&[values.len()]).unwrap_or(0))
        })
        .collect();
    let mut offset = 0;
    let offsets: Vec<u64> = typed
        .iter()
        .map(|(_, bytes)| {
            let at = offset;
            offset += bytes.next_multiple_of(write::ALIGNMENT);
            at
        })
        .collect();
    let table = tensors.iter().zip(&typed).zip(&offsets);
    let table: Vec<_> = table
        .map(|(((name, shape, _), (dtype, _)), at)| (&**name, &**shape, *dtype, *at))
        .collect();
    let mut file = write::header(&fields, table.into_iter());
    for ((_, _, values), (dtype, bytes)) in tensors.iter().zip(&typed) {
        let start = file.len();
        file.resize(start + *bytes as usize, 0);
        refit_store::convert::encode(*dtype, values, &mut file[start..])
            .expect("invariant: the type was chosen to hold every value");
        file.resize(file.len().next_multiple_of(write::ALIGNMENT as usize), 0);
    }
    Ok(SideFile::from_bytes(GGUF_NAME, file))
}

/// The adapter of PEFT that lies in the model's directory.
///
/// # Errors
/// A directory that lacks it.
pub fn peft(model: &ModelInput) -> Result<Vec<SideFile>> {
    let directory = model.artifact.path().join(ADAPTER);
    let names = [refit_store::adapter::FILE_NAME, refit_store::adapter::WEIGHTS_NAME];
    let file = |name: &&str| {
        let path = directory.join(name);
        match path.is_file() {
            true => Ok(SideFile::from_path(format!("{ADAPTER}/{name}"), &path)),
            false => Err(Error::BadData {
                source_name: path.display().to_string(),
                problem: "the adapter of the compensations is missing; make the model again with refit apply lorc".into(),
            }),
        }
    };
    names.iter().map(file).collect()
}
