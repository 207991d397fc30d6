//! Magnitude pruning: the smallest weights go. The baseline of the field, and all that is possible
//! without data.

use clap::Args;
use refit_store::architecture::Site;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::inputs::ModelInput;
use crate::method::{
    Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper, Plan,
    Taxonomy, Touches, Unit,
};
use crate::prune::mask::{GlobalThreshold, Mask, Pattern, Threshold, pruned_count, select};
use crate::prune::options::{self, Masks, check};
use crate::prune::saliency::magnitude;
use crate::rewrite::{self, OutputType, linears, read_matrix, shape_of};

/// Parameters of magnitude pruning.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Magnitude {
    /// Share of weights to prune, from 0 up to but not including 1.
    #[arg(long, default_value_t = 0.5)]
    pub sparsity: f64,
    /// Which weights compete: those of a `row`, of a `tensor`, all of them (`global`), or N:M, by
    /// which N of every M inputs go.
    #[arg(long, default_value = "row")]
    pub pattern: Pattern,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Magnitude);

impl Magnitude {
    /// What goes under the global pattern, and of the scores that tie with the threshold how many go
    /// in each matrix, in model order.
    fn threshold(
        &self,
        model: &ModelInput,
        sites: &[&Site],
        cx: &Context,
    ) -> Result<(Threshold, Vec<u64>)> {
        let total: usize = sites.iter().map(|site| site.numel()).sum();
        let mut threshold = GlobalThreshold::default();
        cx.progress.begin("finding the threshold", 2 * sites.len() as u64, Unit::Tensors);
        for pass in 0..2 {
            for site in sites {
                threshold.count(&read_matrix(model, site)?);
                cx.progress.advance(1);
            }
            if pass == 0 {
                threshold.narrow(pruned_count(total, self.sparsity) as u64);
            }
        }
        cx.progress.end();
        let found = threshold.finish();
        let mut left = found.ties;
        let mut shares = Vec::new();
        for site in sites {
            let weights = read_matrix(model, site)?;
            let ties = weights.iter().filter(|w| w.abs() == found.value).count() as u64;
            shares.push(ties.min(left));
            left -= ties.min(left);
        }
        Ok((found, shares))
    }
}

/// The mask of one matrix under a global threshold.
fn under(weights: &[f32], columns: usize, threshold: f32, mut ties: u64) -> Mask {
    let mut mask = Mask::dense(weights.len() / columns, columns);
    for (index, weight) in weights.iter().enumerate() {
        let goes = if weight.abs() == threshold && ties > 0 {
            ties -= 1;
            true
        } else {
            weight.abs() < threshold
        };
        if goes {
            mask.set(index / columns, index % columns, false);
        }
    }
    mask
}

impl Method for Magnitude {
    const INFO: Info = Info {
        name: "magnitude",
        title: "Magnitude pruning",
        summary: "Zeroes the smallest weights of every linear layer, with no data",
        family: Family::Prune,
        paper: Paper {
            title: "Learning both Weights and Connections for Efficient Neural Networks",
            reference: "arXiv:1506.02626",
            year: 2015,
        },
        inputs: InputSpec::WEIGHTS,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["pruning", "unstructured"],
            needs: Effort::None,
            touches: &[Touches::Weights],
            composes_with: &["rtn", "finequant"],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        let model = &inputs.models[0];
        let sites = linears(model)?;
        check(Self::INFO.name, &model.source, &sites, self.sparsity, self.pattern)?;
        let mut plan = rewrite::plan(self, model, &sites, self.dtype);
        options::describe(&mut plan, &sites, self.sparsity, self.pattern);
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let model = &inputs.models[0];
        let sites = linears(model)?;
        let global = match self.pattern {
            Pattern::Global => Some(self.threshold(model, &sites, cx)?),
            _ => None,
        };
        let masks = Masks::default();
        let edit = |site: &Site, weights: &mut [f32]| {
            let columns = shape_of(site).1;
            let mask = match &global {
                Some((threshold, shares)) => {
                    let at = sites.iter().position(|other| other.name == site.name);
                    under(weights, columns, threshold.value, at.map_or(0, |at| shares[at]))
                }
                None => select(&magnitude(weights), columns, self.pattern, self.sparsity),
            };
            mask.apply(weights);
            masks.add(&site.name, mask);
            Ok(())
        };
        rewrite::rewrite(inputs, plan, cx, &edit, || masks.finish())
    }
}
