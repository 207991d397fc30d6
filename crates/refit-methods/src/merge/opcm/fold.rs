//! Adding models, tensor by tensor: the sum under work lies in a scratch file, so that memory does not grow with the number of
//! models or their size.

use std::path::Path;

use half::{bf16, f16};
use rayon::prelude::*;
use refit_store::DType;
use refit_store::architecture::Role;

use super::project::Projection;
use crate::emit::Emitter;
use crate::error::{Error, Result};
use crate::inputs::Inputs;
use crate::merge::program::{Job, Program, Work};
use crate::merge::scratch::Scratch;
use crate::method::{Context, Unit};
use crate::rewrite::{check_finite, copy_as};

/// Where the merge is, between two steps.
#[derive(Clone, Copy, Debug)]
enum Current {
    /// Nothing was merged.
    Nothing,
    /// A model as it is.
    Model(usize),
    /// `theta_0 + factor R`, with `R` in the scratch file.
    Scratch { factor: f64 },
}

/// A merge under work.
pub(super) struct Fold<'a> {
    inputs: &'a Inputs,
    /// Tensors that are merged, with their place in the scratch file, in the order of their names.
    jobs: Vec<(&'a Job, u64)>,
    /// Tensors that are copied.
    copies: Vec<&'a Job>,
    current: Current,
    convolutions: bool,
    scratch: Scratch,
}

impl<'a> Fold<'a> {
    pub fn new(
        inputs: &'a Inputs,
        program: &'a Program,
        merged: Option<usize>,
        convolutions: bool,
        directory: &Path,
    ) -> Result<Self> {
        let scratch = Scratch::new(directory)?;
        let (mut jobs, mut copies) = (Vec::new(), Vec::new());
        for job in program.jobs.values() {
            match &job.work {
                Work::Merge { .. } => {
                    jobs.push((job, scratch.reserve(job.tensor.shape.iter().product())));
                }
                Work::Copy(_) => copies.push(job),
            }
        }
        let current = merged.map_or(Current::Nothing, Current::Model);
        Ok(Self { inputs, jobs, copies, current, convolutions, scratch })
    }

    /// The first ingredient is the merge.
    pub fn start_with(&mut self, model: usize) {
        self.current = Current::Model(model);
    }

    /// `|theta - theta_0|` over all tensors that are merged.
    pub fn norm_of(&self, model: usize, cx: &Context) -> Result<f64> {
        let squares = self.each(cx, "measuring", |job, _| {
            let (base, values) = (self.base(job)?, self.read(job, model)?);
            Ok(values.iter().zip(&base).map(|(x, b)| f64::from(x - b).powi(2)).sum::<f64>())
        })?;
        Ok(squares.iter().sum::<f64>().sqrt())
    }

    /// Adds a model and brings the sum to size `mean`; returns the size that it had.
    pub fn add(
        &mut self,
        model: usize,
        lambda: f64,
        mean: f64,
        projection: Projection,
        cx: &Context,
    ) -> Result<f64> {
        let squares = self.each(cx, "projecting", |job, place| {
            let base = self.base(job)?;
            let mut change = self.read(job, model)?;
            change.iter_mut().zip(&base).for_each(|(x, b)| *x -= b);
            let mut merged = self.merged(job, place, &base)?;
            merged.iter_mut().zip(&base).for_each(|(x, b)| *x -= b);
            if let Some(shape) = self.matrix(job) {
                projection.apply(&merged, &mut change, shape).map_err(|problem| {
                    Error::tensor(
                        &self.inputs.models[model].source,
                        &job.tensor.name,
                        problem.to_string(),
                    )
                })?;
            }
            let mut square = 0.0;
            for (d, t) in change.iter_mut().zip(&merged) {
                *d += (lambda * f64::from(*t)) as f32;
                square += f64::from(*d).powi(2);
            }
            self.scratch.write(place, &change)?;
            Ok(square)
        })?;
        let size = squares.iter().sum::<f64>().sqrt();
        // A sum of nothing keeps its size.
        let factor = if size > 0.0 { mean / size } else { 1.0 };
        self.current = Current::Scratch { factor };
        Ok(if size > 0.0 { size } else { mean })
    }

    /// Writes the merge.
    pub fn write(&self, emitter: &Emitter, cx: &Context) -> Result<()> {
        let models = &self.inputs.models;
        for job in &self.copies {
            if let (Work::Copy(part), false) = (&job.work, emitter.is_done(&job.tensor.name)) {
                let model = &models[part.model];
                copy_as(&model.artifact, &part.tensor, &model.source, emitter, &job.tensor)?;
            }
        }
        self.each(cx, "writing", |job, place| {
            if emitter.is_done(&job.tensor.name) {
                return Ok(());
            }
            let values = self.merged(job, place, &self.base(job)?)?;
            check_finite("the merge", &job.tensor.name, &values, 0)?;
            emitter.write_f32(&job.tensor.name, 0, &values)?;
            emitter.done(&job.tensor.name)
        })?;
        Ok(())
    }

    /// Works on every tensor, several at once; answers in the order of their names.
    fn each<T: Send>(
        &self,
        cx: &Context,
        stage: &str,
        work: impl Fn(&Job, u64) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let bytes = self.jobs.iter().map(|(job, _)| job.tensor.bytes).sum();
        cx.progress.begin(stage, bytes, Unit::Bytes);
        let done = cx.install(|| {
            let one = |(job, place): &(&Job, u64)| {
                let answer = work(job, *place);
                cx.progress.advance(job.tensor.bytes);
                answer
            };
            self.jobs.par_iter().with_max_len(1).map(one).collect::<Result<Vec<T>>>()
        });
        cx.progress.end();
        done
    }

    /// `(m, n)` of a tensor that is projected.
    fn matrix(&self, job: &Job) -> Option<(usize, usize)> {
        let base = &self.inputs.models[self.inputs.base.unwrap_or(0)].artifact;
        let architecture = base.architecture();
        match job.tensor.shape[..] {
            [m, n] => {
                architecture.linears().any(|site| site.name == job.tensor.name).then_some((m, n))
            }
            [m, ..] if self.convolutions && job.tensor.shape.len() == 4 => {
                let conv = architecture.site(&job.tensor.name)?.role == Role::Conv;
                conv.then(|| (m, job.tensor.shape[1..].iter().product()))
            }
            _ => None,
        }
    }

    fn base(&self, job: &Job) -> Result<Vec<f32>> {
        match &job.work {
            Work::Merge { base: Some(part), .. } => self.read_part(part.model, &part.tensor),
            _ => unreachable!("invariant: merges here have a base"),
        }
    }

    fn read(&self, job: &Job, model: usize) -> Result<Vec<f32>> {
        let Work::Merge { inputs, .. } = &job.work else {
            unreachable!("invariant: copies are set apart")
        };
        let part = inputs.iter().find(|part| part.model == model);
        let part = part.expect("invariant: every model has a part in every merge");
        self.read_part(model, &part.tensor)
    }

    fn read_part(&self, model: usize, tensor: &str) -> Result<Vec<f32>> {
        let model = &self.inputs.models[model];
        let values = model.artifact.read_f32(tensor)?;
        check_finite(&model.source, tensor, &values, 0)?;
        Ok(values)
    }

    /// The merge's values, as they will be read back.
    fn merged(&self, job: &Job, place: u64, base: &[f32]) -> Result<Vec<f32>> {
        match self.current {
            Current::Nothing => unreachable!("invariant: the first ingredient is the merge"),
            Current::Model(model) => self.read(job, model),
            Current::Scratch { factor } => {
                let mut values = vec![0f32; base.len()];
                self.scratch.read(place, &mut values)?;
                let dtype = DType::parse(&job.tensor.dtype);
                for (x, b) in values.iter_mut().zip(base) {
                    *x = stored((f64::from(*b) + factor * f64::from(*x)) as f32, dtype);
                }
                Ok(values)
            }
        }
    }
}

fn stored(x: f32, dtype: Option<DType>) -> f32 {
    match dtype {
        Some(DType::F16) => f16::from_f32(x).to_f32(),
        Some(DType::BF16) => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}
