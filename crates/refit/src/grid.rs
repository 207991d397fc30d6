//! Grid detection: do a model's weights already lie on few levels per group? Quantizing such a model
//! again at the same bits and group measures nothing.

use refit_store::{Artifact, DType};
use serde::Serialize;

use crate::failure::Result;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Grid {
    /// Bits per level index; `None` when no grid shows.
    pub bits: Option<u32>,
    /// Inputs per group.
    pub group: Option<usize>,
    /// Most distinct values seen in one group.
    pub distinct: usize,
    /// Matrices that were sampled.
    pub matrices: usize,
    /// Stored type when it is itself a block-quantized one.
    pub stored: Option<String>,
}

/// Rows read from each matrix.
const ROWS: usize = 48;
/// Matrices sampled, spread over the depth.
const MATRICES: usize = 8;

/// Samples linears over the depth and counts distinct values per group of inputs.
pub fn detect(artifact: &Artifact) -> Result<Grid> {
    let linears: Vec<_> =
        artifact.architecture().linears().filter(|site| site.shape.len() == 2).collect();
    let step = linears.len().div_ceil(MATRICES).max(1);
    let mut samples: Vec<(usize, Vec<f32>)> = Vec::new();
    let mut stored = None;
    for site in linears.iter().step_by(step) {
        let columns = site.shape[1];
        let rows = site.shape[0].min(ROWS);
        let mut values = vec![0.0; rows * columns];
        artifact.read_f32_into(&site.name, 0, &mut values)?;
        samples.push((columns, values));
        if let Ok(info) = artifact.tensor(&site.name)
            && matches!(info.dtype, DType::Ggml(_))
        {
            stored.get_or_insert_with(|| info.dtype.to_string());
        }
    }
    let mut best = Grid { bits: None, group: None, distinct: 0, matrices: samples.len(), stored };
    if samples.is_empty() {
        return Ok(best);
    }
    for group in [32, 64, 128, 256] {
        let usable = samples.iter().all(|(columns, _)| columns % group == 0);
        if !usable {
            continue;
        }
        let distinct = samples
            .iter()
            .flat_map(|(_, values)| values.chunks_exact(group))
            .map(distinct)
            .max()
            .unwrap_or(0);
        best.distinct = best.distinct.max(distinct);
        // Fewer levels than half the group's size cannot be chance for float weights.
        let bits = usize::BITS - distinct.saturating_sub(1).leading_zeros();
        if distinct > 1 && distinct * 2 <= group && bits <= 6 {
            best = Grid { bits: Some(bits.max(1)), group: Some(group), distinct, ..best };
        }
    }
    Ok(best)
}

fn distinct(values: &[f32]) -> usize {
    let mut bits: Vec<u32> =
        values.iter().map(|v| if *v == 0.0 { 0 } else { v.to_bits() }).collect();
    bits.sort_unstable();
    bits.dedup();
    bits.len()
}

impl std::fmt::Display for Grid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.bits, self.group) {
            (Some(bits), Some(group)) => write!(
                f,
                "{bits}-bit per {group} inputs (at most {} distinct values); quantizing at {bits} bits in groups of {group} or smaller changes nothing",
                self.distinct
            )?,
            _ => write!(f, "none found in {} sampled matrices", self.matrices)?,
        }
        match &self.stored {
            Some(stored) => write!(f, "; stored as {stored}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinct_values_are_counted_with_both_zeros_as_one() {
        assert_eq!(distinct(&[0.0, -0.0, 1.0, 1.0, 2.0]), 3);
    }
}
