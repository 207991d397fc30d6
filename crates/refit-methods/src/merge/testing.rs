//! Merges of values in memory, for the tests of the methods.

use crate::error::Result;
use crate::merge::group::{Group, Part};
use crate::merge::kernel::Merge;
use crate::testing::Stream;

/// Normal deviates.
pub fn normals(seed: u64, count: usize) -> Vec<f32> {
    Stream::new(seed).normals(count)
}

/// Lets `look` see a tensor whose values are in memory.
pub fn memory<T>(
    inputs: &[Vec<f32>],
    base: Option<Vec<f32>>,
    shape: &[usize],
    look: impl FnOnce(&Group) -> Result<T>,
) -> T {
    see(inputs, base, shape, 0, look).unwrap()
}

fn see<T>(
    inputs: &[Vec<f32>],
    base: Option<Vec<f32>>,
    shape: &[usize],
    seed: u64,
    look: impl FnOnce(&Group) -> Result<T>,
) -> Result<T> {
    let parts: Vec<Part> = (0..inputs.len()).map(|k| Part::plain(k, "x")).collect();
    let part = Part::plain(inputs.len(), "x");
    let mut group = Group::new(&[], base.as_ref().map(|_| &part), &parts, "x", shape);
    group.seed = seed;
    group.hold_values(base.into_iter().chain(inputs.iter().cloned()).collect());
    look(&group)
}

/// Merges one tensor.
pub fn attempt<M: Merge>(
    method: &M,
    inputs: &[Vec<f32>],
    base: Option<Vec<f32>>,
    shape: &[usize],
) -> Result<Vec<f32>> {
    run(method, inputs, base, shape, 0)
}

fn run<M: Merge>(
    method: &M,
    inputs: &[Vec<f32>],
    base: Option<Vec<f32>>,
    shape: &[usize],
    seed: u64,
) -> Result<Vec<f32>> {
    let kernel = method.kernel(inputs.len())?;
    see(inputs, base, shape, seed, |group| {
        let map = kernel.prepare(group)?;
        let pieces = group.scan(|piece| {
            let mut out = vec![0.0; piece.len()];
            map(piece, &mut out);
            out
        })?;
        Ok(pieces.concat())
    })
}

/// As [`attempt`], where nothing can go wrong.
pub fn merge<M: Merge>(
    method: &M,
    inputs: &[Vec<f32>],
    base: Option<Vec<f32>>,
    shape: &[usize],
) -> Vec<f32> {
    run(method, inputs, base, shape, 0).unwrap()
}

/// As [`merge`], with a seed.
pub fn merge_seeded<M: Merge>(
    method: &M,
    inputs: &[Vec<f32>],
    base: Option<Vec<f32>>,
    shape: &[usize],
    seed: u64,
) -> Vec<f32> {
    run(method, inputs, base, shape, seed).unwrap()
}
