//! Round to nearest: every weight goes to the nearest value of its group's grid, and nothing else
//! happens. The baseline that every quantizer must beat.
//!
//! ```text
//! s = 2 max|w| / (2^b - 1),   q = clamp(round(w / s), -2^(b-1), 2^(b-1) - 1),   w_hat = q s
//! ```

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::method::{
    Context, Effort, Family, Info, InputSpec, Inputs, Method, Output, OutputKind, Paper, Plan,
    Taxonomy, Touches,
};
use crate::quantize::chain::Group;
use crate::quantize::grid::{Grid, ScaleRule, Scheme};
use crate::quantize::options::{check_bits, mean_bits};
use crate::quantize::record::{Record, grid_warnings};
use crate::rewrite::{self, OutputType, shape_of};

/// Parameters of round-to-nearest.
#[derive(Args, Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Rtn {
    /// Bits per weight, 2 to 8.
    #[arg(long, default_value_t = 4)]
    pub bits: u8,
    /// Consecutive inputs that share a scale, or `row`.
    #[arg(long, default_value = "row")]
    pub group: Group,
    /// Give every group a zero point of its own, for weights that are not centred on zero.
    #[arg(long)]
    pub asymmetric: bool,
    /// How a symmetric scale follows from the largest weight.
    #[arg(long, value_enum, default_value_t)]
    pub scale_rule: ScaleRule,
    /// Equal steps or powers of two.
    #[arg(long, value_enum, default_value_t)]
    pub scheme: Scheme,
    /// Element type of the weights that are written.
    #[arg(long, value_enum, default_value_t)]
    pub dtype: OutputType,
}

crate::paper_defaults!(Rtn);

impl Rtn {
    fn grid(&self) -> Grid {
        Grid {
            bits: self.bits,
            symmetric: !self.asymmetric,
            rule: self.scale_rule,
            scheme: self.scheme,
        }
    }
}

/// Checks that a scheme and a zero point go together.
///
/// # Errors
/// [`crate::Error::Conflict`].
pub(crate) fn check_scheme(method: &'static str, asymmetric: bool, scheme: Scheme) -> Result<()> {
    if asymmetric && scheme == Scheme::Log2 {
        let problem = "powers of two have no zero point; drop --asymmetric or --scheme log2".into();
        return Err(crate::Error::Conflict { method, problem });
    }
    Ok(())
}

impl Method for Rtn {
    const INFO: Info = Info {
        name: "rtn",
        title: "Round to nearest",
        summary: "Rounds the weights of every linear layer to a few bits, with no data and in seconds",
        family: Family::Quantize,
        paper: Paper { title: "", reference: "", year: 0 },
        inputs: InputSpec::WEIGHTS,
        output: OutputKind::Model,
        taxonomy: Taxonomy {
            path: &["quantization", "post-training", "weight-only"],
            needs: Effort::None,
            touches: &[Touches::Weights],
            composes_with: &[],
        },
    };

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        check_bits(Self::INFO.name, self.bits)?;
        check_scheme(Self::INFO.name, self.asymmetric, self.scheme)?;
        let model = &inputs.models[0];
        let sites = rewrite::linears(model)?;
        let bits = mean_bits(&sites, self.group, |group| self.grid().bits_per_weight(group))?;
        let mut plan = rewrite::plan(self, model, &sites, self.dtype);
        plan.warnings = grid_warnings(model, &self.grid(), self.group.size());
        plan.steps.push(format!(
            "round {} matrices to {} bits, group {}: {:.3} bits per weight with scales",
            sites.len(),
            self.bits,
            self.group,
            bits
        ));
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let (grid, record) = (self.grid(), Record::default());
        let edit = |site: &refit_store::architecture::Site, weights: &mut [f32]| {
            let columns = shape_of(site).1;
            let group = self.group.resolve(&site.name, columns)?;
            let before = weights.to_vec();
            weights.chunks_mut(columns).for_each(|row| grid.snap_row(row, group));
            record.add(&site.name, &grid, columns, group, &before, weights);
            Ok(())
        };
        rewrite::rewrite(inputs, plan, cx, &edit, || record.take().finish(&inputs.models[0]))
    }
}
