//! Every matrix's product: found, rounded to what is stored, counted, and written twice, beside the codes and as an adapter.

use std::collections::BTreeMap;
use std::sync::Mutex;

use rayon::prelude::*;
use refit_nn::block::Block;
use refit_store::adapter::{self, AdapterConfig, Form, Part, Values};
use refit_store::architecture::{Layout, Site};
use refit_store::{Card, DType, Lineage, SideFile};
use refit_train::calibrate::{self, BlockStats, Outcome};
use refit_train::observe::StatsRequest;
use serde_json::{Value, json};

use super::compensate::{Bytes, Compensation, Weighting, compensate};
use super::{ADAPTER, Aware, Lorc, NAME, alone};
use crate::emit::Emitter;
use crate::error::{Error, Result};
use crate::inputs::{Inputs, ModelInput};
use crate::method::{Action, Context, Plan, PlannedTensor, Unit};
use crate::quantize::record::{self, QuantizedTensor, Record};
use crate::rewrite::{self, read_matrix, shape_of, transpose};

/// An error below this share of the squared weights is rounding of the floats themselves.
const NOTHING: f64 = 1e-10;

/// What was found of one matrix.
pub(super) struct Found {
    /// Shape `(out, in)`.
    shape: (usize, usize),
    /// The factors as they are stored; none where nothing was lost.
    pub product: Option<Stored>,
    /// Share of the squared weights that the quantizer lost.
    pub before: f64,
    /// Share that is lost with the product.
    pub after: f64,
}

/// A product, in the orientation of the stored matrix.
pub(super) struct Stored {
    /// `lorc_u`, then `lorc_v`.
    factors: [StoredFactor; 2],
    /// What they stand for, `U [out, m]` and `V [m, in]`.
    exact: Compensation,
}

pub(super) struct StoredFactor {
    values: Vec<f32>,
    bytes: Option<Bytes>,
}

impl Lorc {
    /// Names, shapes and types of one matrix's factors.
    pub(super) fn tensors(&self, site: &Site, rank: usize) -> Vec<PlannedTensor> {
        let (rows, columns) = (site.shape[0], site.shape[1]);
        let module = module(&site.name);
        let mut tensors = Vec::new();
        for (part, shape) in [("lorc_u", vec![rows, rank]), ("lorc_v", vec![rank, columns])] {
            let mut add = |end: &str, shape: Vec<usize>, dtype: DType| {
                tensors.push(PlannedTensor {
                    name: format!("{module}.{part}{end}"),
                    bytes: dtype.bytes_of(&shape).unwrap_or(0),
                    shape,
                    dtype: dtype.to_string(),
                    action: Action::Transform,
                });
            };
            if self.factor_bits == 8 {
                add("_scale", vec![rank], DType::F32);
                add("", shape, DType::I8);
            } else {
                add("", shape, DType::F16);
            }
        }
        tensors
    }

    /// Every matrix's compensation, by the tensor's name.
    pub(super) fn compensations(
        &self,
        inputs: &Inputs,
        original: &ModelInput,
        quantized: &ModelInput,
        cx: &Context,
    ) -> Result<BTreeMap<String, Found>> {
        let sites = rewrite::linears(original)?;
        if self.aware == Aware::None {
            cx.progress.begin("compensating", sites.len() as u64, Unit::Tensors);
            let found = cx.install(|| {
                let one = |site: &&Site| {
                    let found = self.find(original, quantized, site, &Weighting::Plain, cx.seed)?;
                    cx.progress.advance(1);
                    Ok((site.name.clone(), found))
                };
                sites.par_iter().with_max_len(1).map(one).collect()
            });
            cx.progress.end();
            return found;
        }
        let sequences = self.calibration.draw(&alone(original, inputs), cx.seed)?;
        let full = self.aware == Aware::Full;
        let request = if full { StatsRequest::GRAM } else { StatsRequest::SUM_SQUARES };
        let all = Mutex::new(BTreeMap::new());
        let mut visit = |_: usize, _: &mut Block, stats: &BlockStats| -> Result<Outcome> {
            for group in stats.groups() {
                let stats = &group.stats;
                let first = group.sites.first().map_or("", |site| site.as_str());
                let weighting = match stats.gram() {
                    Some(gram) => Weighting::full(&gram, stats.columns(), stats.rows())
                        .map_err(|error| Error::tensor("calibration", first, error.to_string()))?,
                    None => Weighting::diagonal(stats),
                };
                group.sites.par_iter().with_max_len(1).try_for_each(|module| {
                    let name = format!("{module}.weight");
                    let Some(site) = sites.iter().find(|site| site.name == name) else {
                        return Ok(());
                    };
                    let found = self.find(original, quantized, site, &weighting, cx.seed)?;
                    all.lock()
                        .expect("invariant: no thread panics while adding")
                        .insert(name, found);
                    Ok::<_, Error>(())
                })?;
            }
            Ok(Outcome::Unchanged)
        };
        let blocks = original.artifact.architecture().layers() as u64;
        cx.progress.begin("compensating", blocks, Unit::Blocks);
        let progress = |done: u64, _: u64| cx.progress.advance(u64::from(done > 0));
        let options = calibrate::Options::new(request);
        let ran = cx.install(|| {
            calibrate::run(&original.artifact, &sequences, &options, &mut visit, &progress)
        });
        cx.progress.end();
        ran?;
        let mut all = all.into_inner().expect("invariant: no thread panics while adding");
        for site in sites {
            // What no block of the running model holds was not seen.
            if !all.contains_key(&site.name) {
                let found = self.find(original, quantized, site, &Weighting::Plain, cx.seed)?;
                all.insert(site.name.clone(), found);
            }
        }
        Ok(all)
    }

    fn find(
        &self,
        original: &ModelInput,
        quantized: &ModelInput,
        site: &Site,
        weighting: &Weighting,
        seed: u64,
    ) -> Result<Found> {
        let shape @ (out, inputs) = shape_of(site);
        let before = read_matrix(original, site)?;
        let mut error = read_matrix(quantized, site)?;
        error.iter_mut().zip(&before).for_each(|(q, w)| *q = w - *q);
        let square = |values: &[f32]| values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        let norm = square(&before);
        drop(before);
        let share = |left: f64| if norm > 0.0 { left / norm } else { 0.0 };
        let lost = share(square(&error));
        if lost <= NOTHING {
            return Ok(Found { shape, product: None, before: lost, after: lost });
        }
        let both = compensate(&error, shape, self.rank, weighting, seed)
            .map_err(|error| Error::tensor(&original.source, &site.name, error.to_string()))?;
        let stored = self.store(site, both, shape);
        let product = stored.exact.product((out, inputs));
        error.iter_mut().zip(&product).for_each(|(e, p)| *e -= p);
        let after = share(square(&error));
        Ok(Found { shape, product: Some(stored), before: lost, after })
    }

    /// Rounds the factors to what is stored.
    fn store(&self, site: &Site, both: Compensation, (out, inputs): (usize, usize)) -> Stored {
        let Compensation { u, v, rank } = both;
        let turned = site.layout == Layout::InOut;
        let (left, right) = match turned {
            true => (transpose(&v, rank, inputs), transpose(&u, out, rank)),
            false => (u, v),
        };
        let columns = site.shape[1];
        let round = |values: Vec<f32>, rank_of: &dyn Fn(usize) -> usize| match self.factor_bits {
            8 => {
                let bytes = Bytes::round(&values, rank, rank_of);
                StoredFactor { values: bytes.decode(rank_of), bytes: Some(bytes) }
            }
            _ => {
                let half = |x: f32| half::f16::from_f32(x).to_f32();
                StoredFactor { values: values.into_iter().map(half).collect(), bytes: None }
            }
        };
        let left = round(left, &|at| at % rank);
        let right = round(right, &|at| at / columns);
        let (u, v) = match turned {
            true => (transpose(&right.values, rank, out), transpose(&left.values, inputs, rank)),
            false => (left.values.clone(), right.values.clone()),
        };
        Stored { factors: [left, right], exact: Compensation { u, v, rank } }
    }

    /// The plan less the factors of matrices that need none.
    pub(super) fn without_idle(
        &self,
        plan: &Plan,
        model: &ModelInput,
        found: &BTreeMap<String, Found>,
    ) -> Plan {
        let mut plan = plan.clone();
        let sites = model.artifact.architecture().linears();
        for site in sites.filter(|site| found.get(&site.name).is_some_and(|f| f.product.is_none()))
        {
            for part in self.tensors(site, self.rank) {
                plan.tensors.retain(|tensor| tensor.name != part.name);
            }
        }
        plan.output_bytes = plan.tensors.iter().map(|tensor| tensor.bytes).sum();
        plan
    }

    /// The quantizer's record with the factors counted.
    pub(super) fn record(
        &self,
        original: &ModelInput,
        quantized: &ModelInput,
        found: &BTreeMap<String, Found>,
    ) -> Result<(Vec<SideFile>, Value)> {
        let (record, known) = (Record::default(), record::read(quantized));
        for (name, entry) in &known {
            let Some(found) = found.get(name) else { continue };
            let (out, inputs) = found.shape;
            let more = match &found.product {
                Some(product) => self.factor_bytes(found.shape, product.exact.rank),
                None => 0,
            };
            let weights = (out * inputs) as u64;
            record.put(
                name,
                weights,
                QuantizedTensor {
                    packed_bytes: entry.packed_bytes + more,
                    bits_per_weight: entry.bits_per_weight + 8.0 * more as f64 / weights as f64,
                    relative_error: found.after,
                    ..*entry
                },
            );
        }
        match known.is_empty() {
            // Nothing is known of the codes: another tool's.
            true => Ok((Vec::new(), json!({}))),
            false => record.finish(original),
        }
    }
}

fn module(tensor: &str) -> &str {
    tensor.strip_suffix(".weight").unwrap_or(tensor)
}

/// Writes one matrix's factors.
pub(super) fn write(emitter: &Emitter, tensor: &str, product: &Stored) -> Result<()> {
    let module = module(tensor);
    for (part, factor) in ["lorc_u", "lorc_v"].iter().zip(&product.factors) {
        let name = format!("{module}.{part}");
        match &factor.bytes {
            Some(bytes) => {
                let codes: Vec<u8> = bytes.codes.iter().map(|code| *code as u8).collect();
                emitter.write_raw(&name, 0, &codes)?;
                let scale = format!("{name}_scale");
                emitter.write_f32(&scale, 0, &bytes.scales)?;
                emitter.done(&scale)?;
            }
            None => emitter.write_f32(&name, 0, &factor.values)?,
        }
        emitter.done(&name)?;
    }
    Ok(())
}

/// The products as an adapter of PEFT, in the directory [`ADAPTER`] of the output.
pub(super) fn adapter_files(
    model: &ModelInput,
    found: &BTreeMap<String, Found>,
    scratch: &std::path::Path,
) -> Result<Vec<SideFile>> {
    let mut parts = Vec::new();
    for (name, Found { shape: (out, inputs), product, .. }) in found {
        let Some(Stored { exact: Compensation { u, v, rank }, .. }) = product else { continue };
        let form = Form::Lora {
            a: Values::new([*rank, *inputs], v.clone())?,
            b: Values::new([*out, *rank], u.clone())?,
            scale: 1.0,
            magnitude: None,
            bias: None,
        };
        parts.push(Part { site: module(name).to_owned(), form });
    }
    if parts.is_empty() {
        return Ok(Vec::new());
    }
    let config = AdapterConfig::describe(&parts, None)?;
    let turned = model.artifact.architecture().linears().any(|s| s.layout == Layout::InOut);
    let config = if turned { config.with("fan_in_fan_out", json!(true)) } else { config };
    let out = scratch.join("adapter");
    let (lineage, card) = (Lineage::new(NAME, json!({})), Card::new(NAME));
    adapter::write(&out, &config, &parts, None, lineage, card, true, Vec::new())?;
    let files = [adapter::FILE_NAME, adapter::WEIGHTS_NAME];
    let file = |name: &&str| {
        let bytes = std::fs::read(out.join(name))
            .map_err(|source| Error::Io { path: out.join(name), source })?;
        Ok(SideFile::from_bytes(format!("{ADAPTER}/{name}"), bytes))
    };
    files.iter().map(file).collect()
}
