//! Opens what was written and compares it with the source, tensor by tensor.

use std::path::Path;
use std::sync::Mutex;

use rayon::prelude::*;
use refit_store::{Artifact, DType, convert};
use serde_json::{Value, json};

use super::decide::{Decision, How};
use super::inputs;
use super::lattices::rounding;
use super::write::PIECE;
use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::method::{Context, Unit};

/// What the comparison showed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Proof {
    /// Tensors whose values are those of the source, bit by bit but for the sign of zeros.
    equal: usize,
    /// Tensors that were rounded again, with `||W - W'||^2 / ||W||^2`.
    rounded: Vec<(String, f64)>,
}

impl Proof {
    /// Adds what was found to a report.
    pub fn report(&self, report: &mut Value) {
        report["proved"] = json!(true);
        report["tensors_equal_to_the_source"] = json!(self.equal);
        report["tensors_rounded"] = json!(self.rounded.len());
        let worst = self.rounded.iter().max_by(|a, b| a.1.total_cmp(&b.1));
        if let Some((tensor, error)) = worst {
            let mean = self.rounded.iter().map(|(_, error)| error).sum::<f64>();
            report["relative_error"] = json!(mean / self.rounded.len() as f64);
            report["largest_relative_error"] = json!(error);
            report["largest_relative_error_in"] = json!(tensor);
        }
    }
}

/// Compares the artifact at `out` with the model it was made from.
///
/// # Errors
/// [`Error::Tensor`] for the first tensor that does not say what the source says, and whatever opening and reading meet.
pub fn prove(
    model: &ModelInput,
    out: &Path,
    decisions: &[Decision],
    cx: &Context,
) -> Result<Proof> {
    let written = Artifact::open(out)?;
    written.check_fit()?;
    let total: u64 = decisions.iter().map(|d| 4 * d.shape.iter().product::<usize>() as u64).sum();
    cx.progress.begin("comparing with the source", total, Unit::Bytes);
    let proof = Mutex::new(Proof::default());
    cx.install(|| {
        decisions.par_iter().with_max_len(1).try_for_each(|decision| {
            let error = compare(model, &written, decision)?;
            let mut proof = proof.lock().expect("invariant: no thread panics while adding");
            match error {
                None => proof.equal += 1,
                Some(error) => proof.rounded.push((decision.name.clone(), error)),
            }
            cx.progress.advance(4 * decision.shape.iter().product::<usize>() as u64);
            Ok::<(), Error>(())
        })
    })?;
    let mut proof = proof.into_inner().expect("invariant: no thread panics while adding");
    proof.rounded.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(proof)
}

/// None: equal. Otherwise the relative error of values that were meant to change.
fn compare(model: &ModelInput, written: &Artifact, decision: &Decision) -> Result<Option<f64>> {
    let Some(source) = &decision.source else {
        let How::Made(values) = &decision.how else { return Ok(None) };
        let found = match inputs::linear_of(&decision.name) {
            // Read back as a property of its linear.
            Some((linear, scale)) => {
                let stored = written.stored_input(&linear)?;
                stored.into_iter().map(|(s, z)| if scale { s } else { z }).collect()
            }
            None => written.read_f32(&decision.name)?,
        };
        return match found == *values {
            true => Ok(None),
            false => Err(mismatch(model, &decision.name, 0, f32::NAN, f32::NAN)),
        };
    };
    let info = model.artifact.tensor(source)?;
    let numel = info.numel();
    let (mut wrong, mut norm) = (0.0, 0.0);
    let mut changed = false;
    for start in (0..numel).step_by(PIECE) {
        let count = PIECE.min(numel - start);
        let mut ours = vec![0.0; count];
        let mut theirs = vec![0.0; count];
        model.artifact.read_f32_into(source, start, &mut ours)?;
        written.read_f32_into(source, start, &mut theirs)?;
        match decision.how {
            How::Quantize => {
                changed = true;
                for (a, b) in ours.iter().zip(&theirs) {
                    wrong += f64::from(a - b).powi(2);
                    norm += f64::from(*a).powi(2);
                }
                if theirs.iter().any(|x| !x.is_finite()) {
                    return Err(mismatch(model, source, start, f32::NAN, f32::NAN));
                }
                continue;
            }
            // A float type rounds; that much is asked for.
            How::Plain => through(&mut ours, decision.dtype()),
            // The source may have rounded the products that the written codes give.
            _ => through(&mut theirs, rounding(info.dtype)),
        }
        // -0 equals 0.
        if let Some(at) = ours.iter().zip(&theirs).position(|(a, b)| a != b) {
            return Err(mismatch(model, source, start + at, ours[at], theirs[at]));
        }
    }
    Ok(changed.then(|| if norm > 0.0 { wrong / norm } else { 0.0 }))
}

/// Rounds values to a float type and back.
fn through(values: &mut [f32], dtype: DType) {
    if !matches!(dtype, DType::F16 | DType::BF16) {
        return;
    }
    let mut bytes = vec![0; values.len() * dtype.block_bytes()];
    // Values beyond the type were refused when they were written.
    let _ = convert::encode(dtype, values, &mut bytes);
    convert::decode(dtype, &bytes, values);
}

fn mismatch(model: &ModelInput, tensor: &str, index: usize, source: f32, written: f32) -> Error {
    let problem = format!(
        "element {index} is {source} in the source and {written} in what was written; the output was removed. This is \
         a fault of refit or of the disk: please report it"
    );
    Error::tensor(&model.source, tensor, problem)
}
