//! Reading a model tensor by tensor, changing some, and writing the result.
//!
//! Tensors that do not change are copied in pieces, byte for byte when their type stays; tensors that
//! change are read whole, in `[out, in]` order whatever their layout, handed to the method's [`Edit`],
//! and written. A few tensors per thread are in memory, however large the model. Every tensor goes to
//! its own place in the output, so the bytes do not depend on the number of threads, and an
//! interrupted run goes on after the tensors that its journal lists.

use std::collections::BTreeMap;

use rayon::prelude::*;
use refit_store::architecture::{Layout, Site};
use refit_store::{Artifact, DType, SideFile};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::emit::Emitter;
use crate::error::{Error, Result};
use crate::inputs::{Inputs, ModelInput};
use crate::method::{Action, Context, Method, Output, Plan, PlannedTensor, Unit};

/// Elements per piece when a tensor is copied.
const PIECE: usize = 1 << 20;

/// Element type of the floating-point tensors that are written.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum OutputType {
    /// That of the source; `f32` where the source is block-quantized, so that no value is rounded
    /// twice.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// 16-bit floats with 11 significant bits: half the bytes; values beyond 65504 do not fit.
    F16,
    /// 16-bit floats with the range of 32-bit ones and 8 significant bits.
    Bf16,
}

impl OutputType {
    /// The type of every floating-point tensor, where it does not depend on the source.
    pub fn fixed(self) -> Option<DType> {
        (self != Self::Auto).then(|| self.of(DType::F32))
    }

    /// The stored type of a tensor whose source has type `from`.
    pub fn of(self, from: DType) -> DType {
        match (self, from) {
            (_, plain) if !plain.is_float() => plain,
            (Self::F32, _) | (Self::Auto, DType::Ggml(_)) => DType::F32,
            (Self::F16, _) => DType::F16,
            (Self::Bf16, _) => DType::BF16,
            (Self::Auto, plain) => plain,
        }
    }
}

/// What a method does to a weight matrix.
pub trait Edit: Sync {
    /// Changes `weights` `[out, in]` of a site in place.
    ///
    /// # Errors
    /// Whatever the method meets.
    fn edit(&self, site: &Site, weights: &mut [f32]) -> Result<()>;
}

impl<F: Fn(&Site, &mut [f32]) -> Result<()> + Sync> Edit for F {
    fn edit(&self, site: &Site, weights: &mut [f32]) -> Result<()> {
        self(site, weights)
    }
}

/// The matrices that weight-only quantizers and pruners change: the linears inside blocks. Embeddings,
/// norms, heads and routers are left alone.
///
/// # Errors
/// [`Error::NothingToDo`] when there are none.
pub fn linears(model: &ModelInput) -> Result<Vec<&Site>> {
    let sites: Vec<&Site> = model.artifact.architecture().linears().collect();
    if sites.is_empty() {
        return Err(Error::NothingToDo {
            model: model.source.clone(),
            what: "linear layers inside blocks",
            advice: "`refit inspect` shows which role each tensor has".into(),
        });
    }
    Ok(sites)
}

/// `(outputs, inputs)` of a linear site.
pub fn shape_of(site: &Site) -> (usize, usize) {
    site.out_in().expect("invariant: `linears` yields matrices only")
}

/// The plan of a method that changes `edited` and copies the rest.
pub fn plan<M: Method>(method: &M, model: &ModelInput, edited: &[&Site], out: OutputType) -> Plan {
    declare(Plan::of(method), model, edited, out)
}

/// Fills in the tensors, bytes and memory of a plan.
pub fn declare(mut plan: Plan, model: &ModelInput, edited: &[&Site], out: OutputType) -> Plan {
    let changed: std::collections::HashSet<&str> =
        edited.iter().map(|site| site.name.as_str()).collect();
    for info in model.artifact.tensors() {
        let dtype = out.of(info.dtype);
        let bytes = dtype.bytes_of(&info.shape).unwrap_or(0);
        let transform = changed.contains(info.name.as_str());
        plan.output_bytes += bytes;
        plan.tensors.push(PlannedTensor {
            name: info.name.clone(),
            shape: info.shape.clone(),
            dtype: dtype.to_string(),
            bytes,
            action: if transform { Action::Transform } else { Action::Copy },
        });
    }
    let largest = edited.iter().map(|site| site.numel()).max().unwrap_or(0) as u64;
    let threads = rayon::current_num_threads() as u64;
    plan.peak_memory = threads * (3 * 4 * largest + 8 * PIECE as u64) + (64 << 20);
    plan
}

/// Reads a site's weights as `[out, in]`.
///
/// # Errors
/// Files that cannot be read, and values that are not finite.
pub fn read_matrix(model: &ModelInput, site: &Site) -> Result<Vec<f32>> {
    let mut weights = model.artifact.read_f32(&site.name)?;
    check_finite(&model.source, &site.name, &weights, 0)?;
    if site.layout == Layout::InOut {
        let (out, inputs) = shape_of(site);
        weights = transpose(&weights, inputs, out);
    }
    Ok(weights)
}

/// `[rows, columns]` to `[columns, rows]`.
pub fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    for (i, row) in values.chunks_exact(columns.max(1)).enumerate() {
        for (j, value) in row.iter().enumerate() {
            out[j * rows + i] = *value;
        }
    }
    out
}

/// Refuses NaN and infinity, naming model, tensor and index; `start` is the index of the first value.
///
/// # Errors
/// [`Error::Tensor`].
pub fn check_finite(model: &str, tensor: &str, values: &[f32], start: usize) -> Result<()> {
    // 0 x is NaN exactly when x is not finite, and sums of zeros vectorize.
    if values.iter().map(|x| x * 0.0).sum::<f32>() == 0.0 {
        return Ok(());
    }
    match values.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(Error::tensor(
            model,
            tensor,
            format!(
                "value {} at index {}: the weights are damaged, or overflowed when they were saved; \
                 `refit inspect --values` lists every tensor that is affected",
                values[at],
                start + at
            ),
        )),
        None => Ok(()),
    }
}

/// Carries out a plan: changes the tensors marked so by `edit`, copies the others. `finally` makes the
/// files that go beside the weights and the report, once all tensors are written.
///
/// # Errors
/// Whatever reading, editing or writing meets; the output keeps its temporary name then.
pub fn rewrite(
    inputs: &Inputs,
    plan: &Plan,
    cx: &Context,
    edit: &dyn Edit,
    finally: impl FnOnce() -> Result<(Vec<SideFile>, serde_json::Value)>,
) -> Result<Output> {
    let model = &inputs.models[0];
    let emitter = Emitter::begin(inputs, plan, cx)?;
    let sites: BTreeMap<&str, &Site> =
        model.artifact.architecture().sites.iter().map(|site| (&*site.name, site)).collect();
    cx.progress.begin("rewriting", plan.output_bytes, Unit::Bytes);
    let done = cx.install(|| {
        plan.tensors.par_iter().with_max_len(1).try_for_each(|tensor| {
            // A changed tensor is done again after a resume, for the sake of what `edit` records;
            // it is not written again.
            let is_done = emitter.is_done(&tensor.name);
            match tensor.action {
                Action::Transform => {
                    let site = sites[tensor.name.as_str()];
                    let mut weights = read_matrix(model, site)?;
                    edit.edit(site, &mut weights)?;
                    if !is_done {
                        emitter.write_matrix(site, weights)?;
                    }
                }
                Action::Copy if !is_done => copy(&model.artifact, &model.source, &emitter, tensor)?,
                Action::Copy => {}
            }
            cx.progress.advance(tensor.bytes);
            Ok(())
        })
    });
    cx.progress.end();
    done?;
    let (side_files, report) = finally()?;
    let artifact = emitter.finish(inputs, plan, cx, side_files, &report)?;
    Ok(Output { artifact: Some(artifact), report, warnings: Vec::new() })
}

/// Copies a tensor: its bytes when the type stays, else its values.
///
/// # Errors
/// Files that cannot be read or written, and values that are not finite.
pub fn copy(from: &Artifact, source: &str, to: &Emitter, tensor: &PlannedTensor) -> Result<()> {
    copy_as(from, &tensor.name, source, to, tensor)
}

/// Copies the tensor `name` to the place of `tensor`, which may have another name.
///
/// # Errors
/// As [`copy`].
pub fn copy_as(
    from: &Artifact,
    name: &str,
    source: &str,
    to: &Emitter,
    tensor: &PlannedTensor,
) -> Result<()> {
    let info = from.tensor(name)?;
    if info.dtype.to_string() == tensor.dtype {
        let mut buffer = vec![0; (8 * PIECE).min(info.nbytes as usize)];
        let mut start = 0;
        while start < info.nbytes {
            let length = buffer.len().min((info.nbytes - start) as usize);
            from.read_raw_into(name, start, &mut buffer[..length])?;
            to.write_raw(&tensor.name, start, &buffer[..length])?;
            start += length as u64;
        }
    } else {
        let numel = info.numel();
        let mut buffer = vec![0f32; PIECE.min(numel)];
        for start in (0..numel).step_by(PIECE) {
            let length = PIECE.min(numel - start);
            from.read_f32_into(name, start, &mut buffer[..length])?;
            check_finite(source, name, &buffer[..length], start)?;
            to.write_f32(&tensor.name, start, &buffer[..length])?;
        }
    }
    to.done(&tensor.name)
}
