//! How far fine-tuned models stand in each other's way, before they are merged: what each changed in the common base
//! (`d_k = theta_k - theta_0`), and whether the changes agree.
//!
//! | measure | of a tensor |
//! |---|---|
//! | relative change | `\|d_k\| / \|theta_0\|` |
//! | cosine | `<d_i, d_j> / (\|d_i\| \|d_j\|)`, for every pair |
//! | sign conflicts | share of the weights that at least two models changed, and not all in one direction (TIES-Merging, arXiv:2306.01708, section 3) |
//! | cancelled | `1 - sum \|sum_k d_k\| / sum_k \|d_k\|`: what adding them up loses of their size |
//!
//! Sums are f64, in the order of the pieces: the same whatever the number of threads. One pass over the files, a piece of every
//! model in memory.

use std::sync::Arc;

use refit_store::architecture::Role;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::inputs::Inputs;
use crate::merge::blend::{Gram, dot};
use crate::merge::group::{Group, Piece};
use crate::merge::kernel::{Kernel, Merge};
use crate::merge::program::{Program, Work};
use crate::merge::task_arithmetic::TaskArithmetic;
use crate::method::{Progress, Unit};
use crate::rewrite::OutputType;

/// What was measured of some models and their base.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Interference {
    /// The base.
    pub base: String,
    /// The models, in their order.
    pub models: Vec<String>,
    /// Over all tensors together.
    pub overall: Overlap,
    /// Tensor by tensor, in the order of their names.
    pub tensors: Vec<TensorOverlap>,
}

/// One tensor.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorOverlap {
    /// Its name.
    pub name: String,
    /// Its block.
    pub layer: Option<usize>,
    /// Its role, in lower case.
    pub role: String,
    /// What was measured.
    #[serde(flatten)]
    pub overlap: Overlap,
}

/// How changes meet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Overlap {
    /// `|d_k| / |theta_0|` of every model; the norm of the change itself where the base is 0.
    pub relative_change: Vec<f64>,
    /// Cosines of the pairs (0, 1), (0, 2), (1, 2), ...; `None` where a model changed nothing.
    pub cosines: Vec<Option<f64>>,
    /// Share of the weights changed by two or more that are pulled in both directions.
    pub sign_conflicts: f64,
    /// Share of the changes that cancels in their sum.
    pub cancelled: f64,
}

impl Overlap {
    /// Mean cosine over the pairs that have one.
    pub fn mean_cosine(&self) -> Option<f64> {
        let known: Vec<f64> = self.cosines.iter().flatten().copied().collect();
        (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
    }
}

/// Sums over elements.
#[derive(Clone, Debug)]
struct Sums {
    gram: Gram,
    base: f64,
    shared: u64,
    conflicts: u64,
    sizes: f64,
    kept: f64,
}

impl Sums {
    fn new(count: usize) -> Self {
        let gram = Gram::of(&vec![Vec::new(); count]);
        Self { gram, base: 0.0, shared: 0, conflicts: 0, sizes: 0.0, kept: 0.0 }
    }

    fn of(piece: &Piece) -> Self {
        let deltas: Vec<Vec<f64>> = (0..piece.inputs.len()).map(|k| piece.delta(k)).collect();
        let mut sums = Self { gram: Gram::of(&deltas), ..Self::new(deltas.len()) };
        let base: Vec<f64> = piece.base.iter().map(|x| f64::from(*x)).collect();
        sums.base = dot(&base, &base);
        for at in 0..piece.len() {
            let (mut up, mut down, mut total, mut size) = (0u32, 0u32, 0f64, 0f64);
            for delta in &deltas {
                let d = delta[at];
                up += u32::from(d > 0.0);
                down += u32::from(d < 0.0);
                total += d;
                size += d.abs();
            }
            sums.shared += u64::from(up + down > 1);
            sums.conflicts += u64::from(up > 0 && down > 0);
            sums.sizes += size;
            sums.kept += total.abs();
        }
        sums
    }

    fn add(&mut self, other: &Self) {
        self.gram.add(&other.gram);
        self.base += other.base;
        self.shared += other.shared;
        self.conflicts += other.conflicts;
        self.sizes += other.sizes;
        self.kept += other.kept;
    }

    fn overlap(&self) -> Overlap {
        let (count, base) = (self.gram.count, self.base.sqrt());
        let scale = if base > 0.0 { 1.0 / base } else { 1.0 };
        let cosine = |i: usize, j: usize| {
            let size = self.gram.norm(i) * self.gram.norm(j);
            (size > 0.0).then(|| (self.gram.at(i, j) / size).clamp(-1.0, 1.0))
        };
        Overlap {
            relative_change: (0..count).map(|k| self.gram.norm(k) * scale).collect(),
            cosines: (1..count).flat_map(|j| (0..j).map(move |i| cosine(i, j))).collect(),
            sign_conflicts: self.conflicts as f64 / self.shared.max(1) as f64,
            cancelled: if self.sizes > 0.0 { 1.0 - self.kept / self.sizes } else { 0.0 },
        }
    }
}

/// Measures the models beside the base, which must be of its shape.
///
/// # Errors
/// No base, fewer than two models, models that differ in shape, files that cannot be read, values that are not finite.
pub fn measure(inputs: &Inputs, progress: &dyn Progress) -> Result<Interference> {
    let Some(base) = inputs.base else {
        return Err(Error::MissingData {
            method: "interference",
            what: "the base that the models were fine-tuned from".to_owned(),
            how: "--base MODEL",
        });
    };
    let beside: Vec<usize> = inputs.beside_base().collect();
    if beside.len() < 2 {
        return Err(Error::ModelCount {
            method: "interference",
            expected: "at least 2 models beside the base".to_owned(),
            given: format!("{} given", beside.len()),
        });
    }
    // The same fitting as before a merge: which tensors there are, and whether they are alike.
    let kernel: Arc<dyn Kernel> = TaskArithmetic::default().kernel(beside.len())?;
    let program = Program::of_whole_models(inputs, &kernel, OutputType::F32)?;
    let architecture = inputs.models[base].artifact.architecture();
    let bytes: u64 = program.jobs.values().map(|job| job.tensor.bytes).sum();
    progress.begin("comparing", bytes, Unit::Bytes);
    let (mut total, mut tensors) = (Sums::new(beside.len()), Vec::new());
    for (name, job) in &program.jobs {
        if let Work::Merge { base, inputs: parts, .. } = &job.work {
            let group = Group::new(&inputs.models, base.as_ref(), parts, name, &job.tensor.shape);
            let mut sums = Sums::new(beside.len());
            group.scan(Sums::of)?.iter().for_each(|part| sums.add(part));
            total.add(&sums);
            let site = architecture.site(name);
            tensors.push(TensorOverlap {
                name: name.clone(),
                layer: site.and_then(|site| site.layer),
                role: role_name(site.map_or(Role::Other, |site| site.role)),
                overlap: sums.overlap(),
            });
        }
        progress.advance(job.tensor.bytes);
    }
    progress.end();
    Ok(Interference {
        base: inputs.models[base].source.clone(),
        models: beside.iter().map(|at| inputs.models[*at].source.clone()).collect(),
        overall: total.overlap(),
        tensors,
    })
}

fn role_name(role: Role) -> String {
    format!("{role:?}").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlap(base: &[f32], models: &[&[f32]]) -> Overlap {
        let piece = Piece { index: 0, start: 0, base, inputs: models.to_vec() };
        Sums::of(&piece).overlap()
    }

    #[test]
    fn the_same_change_agrees_and_the_opposite_one_cancels() {
        let base = [1.0, 2.0, 2.0, 0.0];
        let (a, b) = ([1.5, 2.0, 1.0, 0.25], [2.0, 2.0, 0.0, 0.5]);
        let same = overlap(&base, &[&a, &b]);
        assert!((same.cosines[0].unwrap() - 1.0).abs() < 1e-12);
        assert_eq!((same.sign_conflicts, same.cancelled), (0.0, 0.0));
        assert!((same.relative_change[1] - 2.0 * same.relative_change[0]).abs() < 1e-12);
        let mirror: Vec<f32> = base.iter().zip(&a).map(|(b, a)| 2.0 * b - a).collect();
        let opposite = overlap(&base, &[&a, &mirror]);
        assert!((opposite.cosines[0].unwrap() + 1.0).abs() < 1e-12);
        assert_eq!((opposite.sign_conflicts, opposite.cancelled), (1.0, 1.0));
    }

    #[test]
    fn what_one_model_alone_changed_is_no_conflict_and_nothing_changed_has_no_angle() {
        let base = [1.0, 1.0, 1.0, 1.0];
        let apart = overlap(&base, &[&[2.0, 1.0, 1.0, 1.0], &[1.0, 0.0, 1.0, 1.0]]);
        assert_eq!(
            (apart.cosines[0], apart.sign_conflicts, apart.cancelled),
            (Some(0.0), 0.0, 0.0)
        );
        let still = overlap(&base, &[&base, &[2.0, 1.0, 1.0, 1.0], &[0.0, 1.0, 1.0, 1.0]]);
        assert_eq!(still.cosines, [None, None, Some(-1.0)]);
        assert_eq!((still.sign_conflicts, still.mean_cosine()), (1.0, Some(-1.0)));
        assert_eq!(still.relative_change, [0.0, 0.5, 0.5]);
    }

    #[test]
    fn sums_of_pieces_are_the_sum_of_the_whole() {
        let mut stream = crate::testing::Stream::new(4);
        let (base, a, b) = (stream.normals(60), stream.normals(60), stream.normals(60));
        let whole = overlap(&base, &[&a, &b]);
        let mut parts = Sums::new(2);
        for at in (0..60).step_by(20) {
            let cut = |x: &'_ [f32]| x[at..at + 20].to_vec();
            let (base, a, b) = (cut(&base), cut(&a), cut(&b));
            let piece = Piece { index: 0, start: at, base: &base, inputs: vec![&a, &b] };
            parts.add(&Sums::of(&piece));
        }
        let parts = parts.overlap();
        assert!((parts.cosines[0].unwrap() - whole.cosines[0].unwrap()).abs() < 1e-12);
        assert!((parts.cancelled - whole.cancelled).abs() < 1e-12);
        assert_eq!(parts.sign_conflicts, whole.sign_conflicts);
    }
}
