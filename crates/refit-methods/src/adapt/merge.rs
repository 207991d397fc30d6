//! Merging adapters into their base: `W' = W + s B A` and its relatives, written as an ordinary model.
//!
//! Tensors stream: one is in memory per thread. A merge that changes nothing is an error, and what rounding to the output's
//! element type swallows of the update is measured and reported. Where the base is quantized, the merged weights go back on
//! its grid (same bits, same groups), so that they can be exported in the same format; a grid's steps are coarse beside an
//! adapter's changes, so what that swallows is reported too, tensor by tensor.

use std::collections::BTreeMap;
use std::sync::Mutex;

use clap::Args;
use refit_store::DType;
use refit_store::adapter::{Adapter, Change};
use refit_store::architecture::Site;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::finetune::nothing;
use crate::error::{Error, Result};
use crate::inputs::{AdapterInput, ModelInput};
use crate::method::{
    Context, Effort, Family, Info, InputSpec, Inputs, Method, Need, Output, OutputKind, Paper,
    Plan, Taxonomy, Touches,
};
use crate::quantize::export::lattices;
use crate::quantize::regrid::Grids;
use crate::rewrite::{self, OutputType, rewrite};

/// What becomes of the merged weights where the base is quantized.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Quantized {
    /// They go back on the grid of the base.
    #[default]
    Keep,
    /// They stay floating-point numbers.
    Float,
}

/// Parameters of merging adapters.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct MergeAdapter {
    /// Factor on the adapters' changes: 1 merges them, 0.5 half of them, -1 takes a merged one out again.
    #[arg(long, default_value_t = 1.0, allow_hyphen_values = true)]
    pub weight: f64,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
    /// Where the base is quantized: put the merged weights back on its grid, or leave them in floating point.
    #[arg(long, value_enum, default_value_t)]
    pub quantized: Quantized,
}

crate::paper_defaults!(MergeAdapter);

impl MergeAdapter {
    fn grids(&self, model: &ModelInput) -> Result<Grids> {
        Grids::of(model, self.quantized == Quantized::Keep)
    }
}

impl Method for MergeAdapter {
    const INFO: Info = Info {
        name: "merge-adapter",
        title: "Merging adapters",
        summary: "Merges one or more adapters into their base and writes an ordinary model",
        family: Family::Adapt,
        paper: Paper { title: "", reference: "", year: 0 },
        inputs: InputSpec { adapters: Need::Required, ..InputSpec::WEIGHTS },
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["adaptation", "merging"],
            needs: Effort::None,
            touches: &[Touches::Weights],
            composes_with: &["model-soups", "rtn", "finequant"],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        if !self.weight.is_finite() || self.weight == 0.0 {
            let expected = "a number other than 0: a merge that changes nothing is no merge";
            return Err(Error::range(Self::INFO.name, "weight", self.weight, expected));
        }
        let model = &inputs.models[0];
        let changes = Changes::of(model, &inputs.adapters)?;
        let sites: Vec<&Site> = changes.sites(model)?;
        let mut plan = rewrite::plan(self, model, &sites, self.dtype);
        for AdapterInput { source, adapter } in &inputs.adapters {
            let parameters: usize = adapter.parts().iter().map(|part| part.form.parameters()).sum();
            plan.steps.push(format!(
                "merge {source}: {parameters} parameters at {} places",
                adapter.parts().len()
            ));
        }
        let on_grids = self.grids(model)?.count(&sites);
        if on_grids > 0 {
            plan.steps.push(format!(
                "put {on_grids} merged matrices back on the grids of the quantized base; --quantized float keeps every bit"
            ));
        }
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let model = &inputs.models[0];
        let changes = Changes::of(model, &inputs.adapters)?;
        let grids = self.grids(model)?;
        let stored: BTreeMap<&str, Option<DType>> = plan
            .tensors
            .iter()
            .map(|tensor| (tensor.name.as_str(), DType::from_safetensors(&tensor.dtype)))
            .collect();
        let totals = Mutex::new(Totals::default());
        let edit = |site: &Site, weights: &mut [f32]| -> Result<()> {
            let base = weights.to_vec();
            // Matrices come `[out, in]`, whatever their layout.
            let shape = site.out_in().map_or(site.shape.clone(), |(out, inputs)| vec![out, inputs]);
            for change in changes.at(&site.name) {
                change.apply(weights, &shape, site.layout)?;
            }
            if self.weight != 1.0 {
                let factor = self.weight as f32;
                weights.iter_mut().zip(&base).for_each(|(w, b)| *w = b + factor * (*w - b));
            }
            let merged = weights.to_vec();
            let source = lattices::rounding(model.artifact.tensor(&site.name)?.dtype);
            let snapped = grids.snap(site, source, &base, weights);
            let one = Totals::of(&base, &merged, weights, stored[site.name.as_str()], snapped);
            totals
                .lock()
                .expect("invariant: no thread panics while holding it")
                .add(&site.name, one);
            Ok(())
        };
        let mut swallowed = None;
        let finally = || {
            let totals = totals.lock().expect("invariant: no thread panics while holding it");
            let sum = totals.sum();
            if sum.changed == 0 {
                let what = "change that survives in the output's element type";
                let advice = match sum.snapped {
                    0 => "the adapters are zero, or too small for it: --dtype f32 keeps them",
                    _ => {
                        "the steps of the quantized base are coarser than the adapters' changes: --quantized float keeps them"
                    }
                };
                return Err(nothing(&model.source, what, advice));
            }
            let lost = sum.relative_loss();
            swallowed = (lost > 0.1).then_some((lost, sum.snapped > 0));
            let mut report = json!({
                "changed_tensors": totals.0.len(),
                "changed_elements": sum.changed,
                "update_norm": sum.update.sqrt(),
                "update_lost_to_rounding": lost,
            });
            let float: Vec<&str> = totals
                .0
                .iter()
                .filter(|(_, one)| one.snapped == 0)
                .map(|(name, _)| &**name)
                .collect();
            let Some((files, summary)) = grids.finish(model, &float)? else {
                return Ok((Vec::new(), report));
            };
            if sum.snapped == 0 {
                return Ok((files, report));
            }
            let by_tensor: BTreeMap<&str, f64> =
                totals.0.iter().map(|(name, one)| (&**name, one.relative_loss())).collect();
            report["requantized_tensors"] = json!(sum.snapped);
            report["update_lost_by_tensor"] = json!(by_tensor);
            report["quantization"] = summary;
            Ok((files, report))
        };
        let mut output = rewrite(inputs, plan, cx, &edit, finally)?;
        if let Some((lost, snapped)) = swallowed {
            let (what, advice) = match snapped {
                true => ("the grid of the quantized base", "--quantized float"),
                false => ("the output's element type", "--dtype f32"),
            };
            output.warnings.push(format!(
                "rounding to {what} moved the weights by {:.0} % of the adapters' update; {advice} keeps all of it",
                100.0 * lost
            ));
        }
        Ok(output)
    }
}

/// The changes of all adapters by tensor, in the order given.
struct Changes<'a>(BTreeMap<String, Vec<Change<'a>>>);

impl<'a> Changes<'a> {
    fn of(model: &ModelInput, adapters: &'a [AdapterInput]) -> Result<Self> {
        let mut by_tensor: BTreeMap<String, Vec<Change>> = BTreeMap::new();
        for AdapterInput { source, adapter } in adapters {
            check(source, adapter, model)?;
            for (tensor, changes) in adapter.changes(|name| model.artifact.contains(name)) {
                by_tensor.entry(tensor).or_default().extend(changes);
            }
        }
        Ok(Self(by_tensor))
    }

    fn at(&self, tensor: &str) -> &[Change<'a>] {
        self.0.get(tensor).map_or(&[], Vec::as_slice)
    }

    fn sites<'m>(&self, model: &'m ModelInput) -> Result<Vec<&'m Site>> {
        let architecture = model.artifact.architecture();
        self.0
            .keys()
            .map(|tensor| {
                architecture.site(tensor).ok_or_else(|| {
                    Error::tensor(&model.source, tensor, "the architecture does not list it")
                })
            })
            .collect()
    }
}

/// Refuses adapters of another base, and forms that depend on the input.
fn check(source: &str, adapter: &Adapter, model: &ModelInput) -> Result<()> {
    let fixed = adapter.prompt().is_none() && adapter.parts().iter().all(|p| p.form.mergeable());
    if !fixed {
        return Err(Error::Mismatch {
            first: source.to_owned(),
            second: model.source.clone(),
            problem: "what it adds depends on the input (prefix, prompt or bottleneck), so no change of weights is equal to \
                      it; run the model with --adapter instead"
                .into(),
        });
    }
    Ok(adapter.check_base(&model.artifact)?)
}

/// What a merge did to one tensor, or to several.
#[derive(Clone, Copy, Debug, Default)]
struct One {
    /// Elements whose stored value differs.
    changed: u64,
    /// Squared norm of the update.
    update: f64,
    /// Squared norm of what rounding made of it.
    lost: f64,
    /// Tensors that went back on a grid.
    snapped: u64,
}

impl One {
    fn relative_loss(&self) -> f64 {
        (self.lost / self.update.max(f64::MIN_POSITIVE)).sqrt()
    }
}

#[derive(Debug, Default)]
struct Totals(BTreeMap<String, One>);

impl Totals {
    /// `merged` is what was meant, `kept` what will be rounded to `stored` and written.
    fn of(base: &[f32], merged: &[f32], kept: &[f32], stored: Option<DType>, snapped: bool) -> One {
        let round = |x: f32| match stored {
            Some(DType::F16) => half::f16::from_f32(x).to_f32(),
            Some(DType::BF16) => half::bf16::from_f32(x).to_f32(),
            _ => x,
        };
        let mut one = One { snapped: u64::from(snapped), ..One::default() };
        for ((base, merged), kept) in base.iter().zip(merged).zip(kept) {
            let kept = round(*kept);
            one.changed += u64::from(kept != round(*base));
            one.update += f64::from(merged - base).powi(2);
            one.lost += f64::from(kept - merged).powi(2);
        }
        one
    }

    fn add(&mut self, tensor: &str, one: One) {
        self.0.insert(tensor.to_owned(), one);
    }

    /// In the order of names: the same for any number of threads.
    fn sum(&self) -> One {
        self.0.values().fold(One::default(), |sum, one| One {
            changed: sum.changed + one.changed,
            update: sum.update + one.update,
            lost: sum.lost + one.lost,
            snapped: sum.snapped + one.snapped,
        })
    }
}
