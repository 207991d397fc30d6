//! What all pruners share: parameters, checks, and the masks that are saved beside the weights.

use std::collections::BTreeMap;
use std::sync::Mutex;

use refit_store::SideFile;
use refit_store::architecture::Site;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::method::Plan;
use crate::prune::mask::{Mask, Pattern};
use crate::rewrite::shape_of;

/// Name of the file that holds the masks: for every pruned matrix a `U8` tensor
/// `[out, ceil(in / 8)]`, one bit per weight, lowest bit first, 1 for weights that stay.
pub const FILE_NAME: &str = "refit.masks.safetensors";

/// Checks a sparsity, and that groups divide every row.
///
/// # Errors
/// [`Error::Range`], [`Error::Tensor`].
pub fn check(
    method: &'static str,
    model: &str,
    sites: &[&Site],
    sparsity: f64,
    pattern: Pattern,
) -> Result<()> {
    if !(0.0..1.0).contains(&sparsity) {
        let expected = "the share of weights to prune, from 0 up to but not including 1";
        return Err(Error::range(method, "sparsity", sparsity, expected));
    }
    if let Pattern::Grouped { pruned, of } = pattern {
        if of > 64 {
            return Err(Error::range(method, "pattern", pattern, "groups of at most 64 inputs"));
        }
        for site in sites {
            let inputs = shape_of(site).1;
            if !inputs.is_multiple_of(of) {
                return Err(Error::tensor(
                    model,
                    &site.name,
                    format!(
                        "its rows of {inputs} weights are not groups of {of}; \
                         take M of {pruned}:M from the divisors of {inputs}"
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// Refuses the global pattern, which no method can use that sees one block at a time.
///
/// # Errors
/// [`Error::Range`].
pub fn check_calibrated(method: &'static str, pattern: Pattern) -> Result<()> {
    if pattern == Pattern::Global {
        let expected = "row, tensor or N:M: blocks are pruned one after the other, so weights of \
                        different blocks cannot compete";
        return Err(Error::range(method, "pattern", pattern, expected));
    }
    Ok(())
}

/// The share of weights that a pattern prunes.
pub fn effective(sparsity: f64, pattern: Pattern) -> f64 {
    match pattern {
        Pattern::Grouped { pruned, of } => pruned as f64 / of as f64,
        _ => sparsity,
    }
}

/// Says in a plan what will be pruned.
pub fn describe(plan: &mut Plan, sites: &[&Site], sparsity: f64, pattern: Pattern) {
    let share = effective(sparsity, pattern);
    let weights: usize = sites.iter().map(|site| site.numel()).sum();
    plan.steps.push(format!(
        "zero {:.1} % of the {weights} weights of {} matrices, pattern {pattern}",
        100.0 * share,
        sites.len()
    ));
    if share != sparsity && matches!(pattern, Pattern::Grouped { .. }) {
        plan.notes.push(format!("pattern {pattern} fixes the sparsity at {share}"));
    }
    plan.notes.push(format!(
        "pruned weights are stored as zeros, so the file does not shrink by itself; the masks are \
         saved in {FILE_NAME}"
    ));
}

/// Collects masks from any thread.
#[derive(Debug, Default)]
pub struct Masks(Mutex<BTreeMap<String, Mask>>);

impl Masks {
    /// Adds the mask of a matrix.
    pub fn add(&self, tensor: &str, mask: Mask) {
        let mut masks = self.0.lock().expect("invariant: no thread panics while adding");
        masks.insert(tensor.to_owned(), mask);
    }

    /// The masks file and the report.
    ///
    /// # Errors
    /// [`Error::BadData`] when the masks do not serialize.
    pub fn finish(&self) -> Result<(Vec<SideFile>, Value)> {
        let masks = self.0.lock().expect("invariant: no thread panics while adding");
        let (mut kept, mut total) = (0, 0);
        let mut by_tensor = BTreeMap::new();
        for (name, mask) in masks.iter() {
            kept += mask.kept();
            total += mask.rows() * mask.columns();
            by_tensor.insert(name, mask.sparsity());
        }
        let report = json!({
            "pruned_tensors": masks.len(),
            "weights": total,
            "pruned": total - kept,
            "sparsity": 1.0 - kept as f64 / total.max(1) as f64,
            "tensors": by_tensor,
        });
        Ok((vec![SideFile::from_bytes(FILE_NAME, encode(&masks))], report))
    }
}

/// The masks as a safetensors file, written by hand because it must be the same bytes every time.
fn encode(masks: &BTreeMap<String, Mask>) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt", "refit": "bit masks, 1 = kept"}));
    let mut data = Vec::new();
    for (name, mask) in masks {
        let start = data.len();
        data.extend(mask.to_bytes());
        header.insert(
            name.clone(),
            json!({
                "dtype": "U8",
                "shape": [mask.rows(), mask.columns().div_ceil(8)],
                "data_offsets": [start, data.len()],
            }),
        );
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    // Readers expect the data to start on a multiple of 8.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend(text);
    file.extend(data);
    file
}
