//! Seeing what a block's linears read.

use burn::tensor::Tensor;
use refit_nn::block::Block;
use refit_nn::{Tap, ops};

use super::Group;
use crate::error::{Error, Result};
use crate::observe::{ColumnStats, NonFinite, StatsRequest};

/// A tap that feeds the inputs of chosen linears to their statistics, before another tap changes them.
pub(super) struct Watch<'a> {
    pub groups: Vec<Group>,
    keep: bool,
    inner: Option<&'a mut dyn Tap>,
    failure: Option<(String, NonFinite)>,
}

impl<'a> Watch<'a> {
    pub fn new(
        block: &Block,
        groups: &[Vec<String>],
        request: StatsRequest,
        keep: bool,
        inner: Option<&'a mut dyn Tap>,
    ) -> Self {
        // Activations within attention have no columns of their own.
        let group = |sites: &Vec<String>| {
            let linear = block.linears().into_iter().find(|l| l.site == sites[0]);
            let width = linear.map_or(0, |l| l.weight().dims()[1]);
            let request = if linear.is_some() { request } else { StatsRequest::empty() };
            let stats = ColumnStats::new(width, request);
            Group { stats, sites: sites.clone(), inputs: Vec::new() }
        };
        Self { groups: groups.iter().map(group).collect(), keep, inner, failure: None }
    }

    pub fn end_sequence(&mut self, sequence: usize) -> Result<()> {
        if let Some((site, found)) = self.failure.take() {
            return Err(Error::Activation { site, sequence, found });
        }
        self.groups.iter_mut().for_each(|group| group.stats.end_sequence());
        Ok(())
    }
}

impl Tap for Watch<'_> {
    fn visit(&mut self, name: &str, value: Tensor<3>) -> Tensor<3> {
        let site = name.strip_suffix(":in").unwrap_or(name);
        // One observation per group: its first site stands for all of them.
        if let Some(group) = self.groups.iter_mut().find(|g| g.sites[0] == site) {
            if self.keep {
                group.inputs.push(value.clone());
            }
            if group.stats.columns() > 0 {
                let seen = ops::with_values(&value, |rows| group.stats.observe(rows));
                if let (Err(mut found), None) = (seen, &self.failure) {
                    // A pass is a sequence, so this makes the row a position in it.
                    found.row -= group.stats.rows();
                    self.failure = Some((site.to_string(), found));
                }
            }
        }
        match &mut self.inner {
            Some(tap) => tap.visit(name, value),
            None => value,
        }
    }

    fn attention(&self) -> bool {
        let sees = |group: &Group| group.sites[0].contains(".attn.");
        self.groups.iter().any(sees) || self.inner.as_ref().is_some_and(|tap| tap.attention())
    }
}

/// Adds the cosines between the rows of `a` and `b` to a running sum and count.
pub(super) fn add_cosines(a: &Tensor<3>, b: &Tensor<3>, total: &mut (f64, usize)) {
    let width = a.dims()[2];
    ops::with_values(a, |a| {
        ops::with_values(b, |b| {
            for (x, y) in a.chunks_exact(width).zip(b.chunks_exact(width)) {
                let dot = |p: &[f32], q: &[f32]| {
                    p.iter().zip(q).map(|(&p, &q)| f64::from(p) * f64::from(q)).sum::<f64>()
                };
                total.0 += dot(x, y) / (dot(x, x) * dot(y, y)).sqrt().max(1e-300);
                total.1 += 1;
            }
        });
    });
}
