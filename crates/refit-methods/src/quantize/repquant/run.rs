//! One block after the other, one group of linears after the other.

use burn::tensor::Tensor;
use refit_nn::block::Block;
use refit_nn::rounding::{Rounder, Rounding};
use refit_nn::{Tap, ops};
use refit_store::SideFile;
use refit_train::calibrate::{self, BlockStats, Group, Order};
use refit_train::observe::StatsRequest;
use serde_json::{Value, json};

use super::clip::{Learning, learn};
use super::range::{Range, grid_of, row_steps, search, search_powers, sort};
use super::reconstruct::Reconstruction;
use super::reparam::{Channels, Reparam, reparametrize};
use super::{NormScales, PATCH_BITS, RepQuant, Rounded, Softmax, is_patch};
use crate::blockwise::{BlockMethod, Stored};
use crate::error::{Error, Result};
use crate::inputs::Inputs;
use crate::method::PlannedTensor;
use crate::quantize::fold::{Fold, Producer};
use crate::quantize::grid::Grid;
use crate::quantize::record::Record;

/// What is collected on the way.
pub struct Run<'a> {
    parameters: &'a RepQuant,
    folds: Vec<Fold>,
    record: Record,
    rounder: Rounder,
    /// Largest over smallest scale of the channels behind every norm.
    spreads: Vec<f64>,
}

impl<'a> Run<'a> {
    pub fn new(parameters: &'a RepQuant, folds: Vec<Fold>) -> Self {
        Self {
            parameters,
            folds,
            record: Record::default(),
            rounder: Rounder::default(),
            spreads: Vec::new(),
        }
    }

    /// One grid for a whole activation.
    fn tensor_grid(&self, values: &mut [f32]) -> Option<Rounding> {
        let bits = self.parameters.a_bits;
        sort(values);
        let range = search(values, &self.parameters.percentiles, bits, false);
        grid_of(range, bits, false).map(|(scale, zero)| Rounding::Tensor { bits, scale, zero })
    }

    /// The grid of something within attention.
    fn within_attention(&mut self, site: &str, group: &Group) {
        let mut values = values_of(&group.inputs);
        let bits = self.parameters.a_bits;
        let percentiles = &self.parameters.percentiles;
        let power = |values: &mut [f32], make: &dyn Fn(f32) -> Rounding| {
            sort(values);
            Some(search_powers(values, percentiles, make))
        };
        let rounding = match (site.ends_with(".probs"), self.parameters.softmax) {
            (true, Softmax::LogSqrt2) => {
                power(&mut values, &|scale| Rounding::LogSqrt2 { bits, scale })
            }
            (true, Softmax::Log2) => power(&mut values, &|scale| Rounding::Log2 { bits, scale }),
            _ => self.tensor_grid(&mut values),
        };
        if let Some(rounding) = rounding {
            self.rounder.insert(site, rounding);
        }
    }

    /// Fits the channels behind a norm, and moves their scales into it where that is asked for. Returns the rounding of the
    /// input, and what was moved.
    fn behind_norm(
        &mut self,
        fold: &Fold,
        block: &mut Block,
        rows: &mut [f32],
        stored: &Stored,
    ) -> Result<Option<Rounding>> {
        let RepQuant { a_bits: bits, norm_scales, clip, .. } = *self.parameters;
        if norm_scales == NormScales::Tensor {
            return Ok(self.tensor_grid(&mut rows.to_vec()));
        }
        let shifts = matches!(fold.producer, Producer::Norm { shifts: true, .. });
        // Per-channel grids of the rival may have any zero point.
        let symmetric = norm_scales == NormScales::Reparam && !shifts;
        let width = width_of(block, &fold.consumers[0]);
        let columns: Vec<Vec<f32>> = (0..width)
            .map(|c| {
                let mut column: Vec<f32> = rows.iter().skip(c).step_by(width).copied().collect();
                column.sort_unstable_by(f32::total_cmp);
                column
            })
            .collect();
        let percentiles = &self.parameters.percentiles;
        let ranges: Vec<Range> =
            columns.iter().map(|column| search(column, percentiles, bits, symmetric)).collect();
        let mut channels = Channels::of(&ranges, bits, symmetric);
        if clip {
            let ends = |column: &Vec<f32>| Range {
                low: column.first().copied().unwrap_or(0.0),
                high: column.last().copied().unwrap_or(0.0),
            };
            let extremes: Vec<Range> = columns.iter().map(ends).collect();
            let start: Vec<Range> = match symmetric {
                // Learned ranges say their own bounds.
                true => ranges
                    .iter()
                    .map(|r| {
                        let most = r.low.abs().max(r.high.abs());
                        Range { low: -most, high: most }
                    })
                    .collect(),
                false => ranges.clone(),
            };
            let metric = metric_of(block, &fold.consumers, width);
            let learning = Learning {
                steps: self.parameters.clip_steps,
                rate: self.parameters.clip_rate,
                bits,
                symmetric,
            };
            let learned = learn(rows, &extremes, &start, &metric, learning);
            channels = Channels::unrounded(&learned, bits, symmetric);
        }
        self.note_spread(&channels);
        if norm_scales == NormScales::Channel {
            let Channels { scales, zeros } = channels;
            return Ok(Some(Rounding::Channel { bits, scales, zeros }));
        }
        let Some(Reparam { scale, zero, factors, shift }) =
            reparametrize(&channels, bits, symmetric)
        else {
            return Ok(self.tensor_grid(&mut rows.to_vec()));
        };
        let shift = (!symmetric).then_some(shift);
        let moved = fold.apply(block, &factors, shift.as_deref(), stored)?;
        for row in rows.chunks_mut(width) {
            for (c, x) in row.iter_mut().enumerate() {
                *x = (*x + shift.as_ref().map_or(0.0, |shift| shift[c])) / moved[c];
            }
        }
        Ok(Some(Rounding::Tensor { bits, scale, zero }))
    }

    fn note_spread(&mut self, channels: &Channels) {
        let alive = channels.scales.iter().filter(|scale| **scale > 0.0);
        let (least, most) = alive.fold((f32::INFINITY, 0f32), |(a, b), s| (a.min(*s), b.max(*s)));
        if most > 0.0 {
            self.spreads.push(f64::from(most / least));
        }
    }

    /// Rounds the weights of the linears that read `rows`, which are rounded as `rounding` says.
    fn round_weights(
        &mut self,
        block: &mut Block,
        sites: &[String],
        rows: &[f32],
        rounding: Option<&Rounding>,
        stored: &Stored,
    ) -> Result<()> {
        let (grid, percentiles) = (self.parameters.grid(), &self.parameters.percentiles);
        let mut part = None;
        for module in sites {
            let name = format!("{module}.weight");
            let source = &stored.model.source;
            let site =
                stored.model.artifact.architecture().site(&name).ok_or_else(|| {
                    Error::tensor(source, &name, "the architecture does not list it")
                })?;
            let linear = block
                .linear_mut(module)
                .ok_or_else(|| Error::tensor(source, &name, "the block does not hold it"))?;
            let weight = linear.weight();
            let (width, device) = (weight.dims()[1], weight.device());
            let before = ops::to_vec(&weight);
            let after = if self.parameters.reconstruct {
                if part.is_none() {
                    let mut rounded = rows.to_vec();
                    if let Some(rounding) = rounding {
                        rounding.apply(&mut rounded, width);
                    }
                    let damping = self.parameters.damping;
                    part = Some(Reconstruction::new(site, rows, &rounded, width, damping)?);
                }
                let part = part.as_ref().expect("invariant: it was just made");
                part.round(site, &before, percentiles, &grid, self.parameters.damping)?
            } else {
                snap_rows(&before, width, percentiles, &grid)
            };
            self.record.add(&name, &grid, width, width, &before, &after);
            linear.set_weight(after, &device);
        }
        Ok(())
    }
}

/// Every row on its own grid.
fn snap_rows(weights: &[f32], width: usize, percentiles: &[f64], grid: &Grid) -> Vec<f32> {
    let mut snapped = weights.to_vec();
    let steps = row_steps(weights, width, percentiles, grid);
    for (row, step) in snapped.chunks_mut(width).zip(steps) {
        row.iter_mut().for_each(|w| *w = grid.snap(*w, step));
    }
    snapped
}

/// All values of some activations, one after the other.
fn values_of(inputs: &[Tensor<3>]) -> Vec<f32> {
    let mut all = Vec::new();
    inputs.iter().for_each(|x| ops::with_values(x, |values| all.extend_from_slice(values)));
    all
}

fn width_of(block: &Block, site: &str) -> usize {
    let linear = block.linears().into_iter().find(|linear| linear.site == site);
    linear.map_or(0, |linear| linear.weight().dims()[1])
}

/// `W^T W` summed over linears.
fn metric_of(block: &Block, sites: &[String], width: usize) -> Vec<f32> {
    let mut stats = refit_train::observe::ColumnStats::new(width, StatsRequest::GRAM);
    for linear in block.linears().iter().filter(|linear| sites.contains(&linear.site)) {
        // Weights that are not finite are found when they are written.
        let _ = stats.observe(&ops::to_vec(&linear.weight()));
    }
    let gram = stats.gram().unwrap_or_else(|| vec![0.0; width * width]);
    crate::calibrated::narrow(&gram)
}

impl BlockMethod for Run<'_> {
    fn options(&self) -> calibrate::Options {
        let mut options = calibrate::Options::new(StatsRequest::SUM);
        options.order = Order::WithinBlock;
        options.keep_inputs = true;
        options.attention = self.parameters.rounded == Rounded::All;
        options
    }

    fn change(
        &mut self,
        _: usize,
        block: &mut Block,
        stats: &BlockStats,
        stored: &Stored,
    ) -> Result<()> {
        for group in stats.groups() {
            if group.sites[0].contains(".attn.") {
                self.within_attention(&group.sites[0], group);
                continue;
            }
            let mut rows = values_of(&group.inputs);
            let fold = self.folds.iter().find(|fold| fold.consumers == group.sites).cloned();
            let rounding = match fold {
                Some(fold) => self.behind_norm(&fold, block, &mut rows, stored)?,
                None if self.parameters.rounded == Rounded::Norms => None,
                None => self.tensor_grid(&mut rows.clone()),
            };
            self.round_weights(block, &group.sites, &rows, rounding.as_ref(), stored)?;
            if let Some(rounding) = rounding {
                for site in &group.sites {
                    self.rounder.insert(format!("{site}:in"), rounding.clone());
                }
            }
        }
        Ok(())
    }

    fn tap(&mut self) -> Option<&mut dyn Tap> {
        Some(&mut self.rounder)
    }

    fn outside(&mut self, tensor: &PlannedTensor, values: &mut [f32]) -> Result<bool> {
        if !is_patch(&tensor.name) {
            return Ok(false);
        }
        let inputs = values.len() / tensor.shape[0].max(1);
        let grid = Grid::asymmetric(PATCH_BITS);
        let before = values.to_vec();
        values.copy_from_slice(&snap_rows(&before, inputs, &self.parameters.percentiles, &grid));
        self.record.add(&tensor.name, &grid, inputs, inputs, &before, values);
        Ok(true)
    }

    fn finish(&mut self, inputs: &Inputs) -> Result<(Vec<SideFile>, Value)> {
        let record = self.record.take().with_activations(&self.rounder);
        let (files, mut report) = record.finish(&inputs.models[0])?;
        let widest = self.spreads.iter().copied().fold(0.0, f64::max);
        let mean = self.spreads.iter().sum::<f64>() / self.spreads.len().max(1) as f64;
        report["activation_bits"] = self.parameters.a_bits.into();
        report["activations"] = self.rounder.roundings.len().into();
        report["channel_spread"] = json!({ "mean": mean, "largest": widest });
        Ok((files, report))
    }
}
