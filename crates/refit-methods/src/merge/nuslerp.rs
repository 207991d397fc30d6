//! NuSLERP, mergekit's second SLERP: two models with a weight each, over the whole tensor, row by row or column by
//! column, of the models themselves or of what they changed in a base. `t = w_2 / (w_1 + w_2)`.

use std::sync::Arc;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::merge::blend::{Gram, combine, gram};
use crate::merge::group::{Group, Piece};
use crate::merge::kernel::{About, Kernel, Map, Merge, one_or_many, per_model};
use crate::merge::slerp::factors;
use crate::method::{Need, Paper};
use crate::rewrite::OutputType;

/// Cosine from which on vectors count as parallel: `1 - cos^2 <= 1e-12`.
const PARALLEL: f64 = 1.0 - 5e-13;

/// Parameters of NuSLERP.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Nuslerp {
    /// Weight of either model; 1 when left out.
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, value_name = "W,W")]
    #[serde(deserialize_with = "one_or_many")]
    pub weight: Vec<f64>,
    /// Take a tensor as one vector.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub nuslerp_flatten: bool,
    /// Not flattened: the vectors lie along the first dimension (mergekit's name) instead of the last.
    #[arg(long)]
    pub nuslerp_row_wise: bool,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Nuslerp);

impl Merge for Nuslerp {
    const ABOUT: About = About {
        name: "nuslerp",
        title: "NuSLERP",
        summary: "Mixes two models, or what they changed in a base, over the sphere, with a weight each",
        paper: Paper { title: "", reference: "mergekit", year: 2024 },
        base: Need::Optional,
        models: (2, Some(2)),
        path: &["reuse", "merging", "interpolation"],
    };

    fn dtype(&self) -> OutputType {
        self.dtype
    }

    fn kernel(&self, count: usize) -> Result<Arc<dyn Kernel>> {
        let weight = per_model(Self::ABOUT.name, "weight", &self.weight, count, 1.0)?;
        let sum: f64 = weight.iter().sum();
        let t = if sum.abs() < 1e-6 { 0.5 } else { weight[1] / sum };
        let along = match (self.nuslerp_flatten, self.nuslerp_row_wise) {
            (true, _) => Along::All,
            (false, true) => Along::First,
            (false, false) => Along::Last,
        };
        Ok(Arc::new(Way { t, along }))
    }
}

/// Which elements are one vector.
#[derive(Clone, Copy, Debug)]
enum Along {
    All,
    First,
    Last,
}

/// The way between two vectors.
#[derive(Debug)]
struct Way {
    t: f64,
    along: Along,
}

impl Way {
    /// Factors of both inputs, from their three inner products.
    fn factors(&self, aa: f64, bb: f64, ab: f64) -> [f64; 2] {
        let (a, b) = factors(self.t, ab / (aa.sqrt().max(1e-7) * bb.sqrt().max(1e-7)), PARALLEL);
        [a, b]
    }

    fn of(&self, gram: &Gram) -> [f64; 2] {
        self.factors(gram.at(0, 0), gram.at(1, 1), gram.at(0, 1))
    }
}

impl Kernel for Way {
    fn looks(&self) -> bool {
        !matches!(self.along, Along::Last)
    }

    fn prepare<'k>(&'k self, group: &Group) -> Result<Map<'k>> {
        match self.along {
            Along::All => {
                let factors = self.of(&gram(group)?);
                let rest = if group.base.is_some() { 1.0 - factors[0] - factors[1] } else { 0.0 };
                Ok(Box::new(move |piece, out| combine(piece, rest, &factors, out)))
            }
            Along::Last => {
                let columns = group.columns();
                Ok(Box::new(move |piece, out| {
                    let (a, b) = (piece.delta(0), piece.delta(1));
                    for at in (0..out.len()).step_by(columns) {
                        let row = at..at + columns;
                        let rows = [a[row.clone()].to_vec(), b[row.clone()].to_vec()];
                        let [p, q] = self.of(&Gram::of(&rows));
                        row.for_each(|i| out[i] = mix(piece, i, p * a[i] + q * b[i]));
                    }
                }))
            }
            Along::First => {
                let width = group.numel() / group.shape.first().copied().unwrap_or(1).max(1);
                let sums = group.scan(|piece| {
                    let mut sums = vec![[0f64; 3]; width];
                    let (a, b) = (piece.delta(0), piece.delta(1));
                    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
                        let sum = &mut sums[(piece.start + i) % width];
                        *sum = [sum[0] + a * a, sum[1] + b * b, sum[2] + a * b];
                    }
                    sums
                })?;
                let mut total = vec![[0f64; 3]; width];
                for sums in &sums {
                    for (total, sum) in total.iter_mut().zip(sums) {
                        (0..3).for_each(|i| total[i] += sum[i]);
                    }
                }
                let factors: Vec<[f64; 2]> =
                    total.iter().map(|[aa, bb, ab]| self.factors(*aa, *bb, *ab)).collect();
                Ok(Box::new(move |piece, out| {
                    let (a, b) = (piece.delta(0), piece.delta(1));
                    for (i, out) in out.iter_mut().enumerate() {
                        let [p, q] = factors[(piece.start + i) % width];
                        *out = mix(piece, i, p * a[i] + q * b[i]);
                    }
                }))
            }
        }
    }
}

/// The base, where there is one, plus a change.
fn mix(piece: &Piece, i: usize, change: f64) -> f32 {
    (piece.base.get(i).map_or(0.0, |base| f64::from(*base)) + change) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::testing::{merge, normals};

    #[test]
    fn one_long_row_or_column_is_the_whole_and_copies_are_themselves() {
        let (a, b, base) = (normals(1, 200), normals(2, 200), normals(3, 200));
        let run = |nuslerp_flatten, nuslerp_row_wise, shape: &[usize], base: Option<Vec<f32>>| {
            let weight = vec![0.25, 0.75];
            let method =
                Nuslerp { weight, nuslerp_flatten, nuslerp_row_wise, ..Nuslerp::default() };
            merge(&method, &[a.clone(), b.clone()], base, shape)
        };
        for base in [None, Some(base.clone())] {
            let whole = run(true, false, &[10, 20], base.clone());
            assert_eq!(whole, run(false, false, &[1, 200], base.clone()));
            assert_eq!(whole, run(false, true, &[200], base.clone()));
            assert_ne!(whole, run(false, false, &[10, 20], base.clone()));
            assert_ne!(
                run(false, true, &[10, 20], base.clone()),
                run(false, false, &[10, 20], base)
            );
        }
        let same = merge(&Nuslerp::default(), &[a.clone(), a.clone()], Some(base), &[10, 20]);
        assert!(same.iter().zip(&a).all(|(x, y)| (x - y).abs() <= 1e-6));
    }

    #[test]
    fn opposite_vectors_are_mixed_and_not_blown_up() {
        let a = normals(4, 50);
        let minus: Vec<f32> = a.iter().map(|x| -x).collect();
        let weight = vec![0.75, 0.25];
        let mixed =
            merge(&Nuslerp { weight, ..Nuslerp::default() }, &[a.clone(), minus], None, &[50]);
        assert!(mixed.iter().zip(&a).all(|(x, y)| (x - 0.5 * y).abs() < 1e-6));
    }
}
