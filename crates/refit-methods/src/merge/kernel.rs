//! The seam of the family: what a merge is.
//!
//! A merge method is a struct of parameters that says what it is called ([`Merge::ABOUT`]) and makes a
//! [`Kernel`] for a number of models. The kernel looks at a tensor of all models and answers with a map
//! from pieces of the ingredients to a piece of the result. Reading, writing, threads, resuming, lineage
//! and mergekit's recipes follow from that, so a method's file holds its formula and little else.
//!
//! In a mergekit recipe parameters differ by tensor; there the same struct is filled once per tensor.

use std::fmt::Debug;
use std::sync::Arc;

use clap::Args;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::inputs::Inputs;
use crate::merge::group::{Group, Piece};
use crate::merge::program::Program;
use crate::method::{
    Context, Effort, Family, Info, InputSpec, Method, Need, Output, OutputKind, Paper, Plan,
    Taxonomy, Touches,
};
use crate::rewrite::OutputType;

/// From a piece of every ingredient to a piece of the result.
pub type Map<'k> = Box<dyn Fn(&Piece, &mut [f32]) + Send + Sync + 'k>;

/// How one tensor is merged.
pub trait Kernel: Debug + Send + Sync {
    /// Whether [`prepare`](Self::prepare) looks at the tensor. What does not is read once, piece by piece.
    fn looks(&self) -> bool {
        true
    }

    /// Looks at the whole tensor as often as it must, and says how every piece is merged. All sums are f64.
    ///
    /// # Errors
    /// Files that cannot be read, and tensors that the method is not defined for.
    fn prepare<'k>(&'k self, group: &Group) -> Result<Map<'k>>;
}

/// What is known of a merge method without running it.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// What people type, in kebab case; mergekit's name has `_` for `-`.
    pub name: &'static str,
    /// The name as its authors write it.
    pub title: &'static str,
    /// What a user gets, in one sentence.
    pub summary: &'static str,
    /// Where it comes from.
    pub paper: Paper,
    /// Whether a base model is taken. A method without one treats a base as it treats the others.
    pub base: Need,
    /// Fewest and most models beside the base.
    pub models: (usize, Option<usize>),
    /// From the general to the particular, below `reuse > merging`.
    pub path: &'static [&'static str],
}

impl About {
    /// As the registry has it.
    pub const fn info(self) -> Info {
        Info {
            name: self.name,
            title: self.title,
            summary: self.summary,
            family: Family::Merge,
            paper: self.paper,
            inputs: InputSpec {
                min_models: self.models.0,
                max_models: self.models.1,
                base: self.base,
                ..InputSpec::WEIGHTS
            },
            output: OutputKind::Model,
            taxonomy: Taxonomy {
                path: self.path,
                needs: Effort::None,
                touches: &[Touches::Weights],
                composes_with: &["rtn", "finequant"],
            },
        }
    }
}

/// A merge method: parameters in, a kernel out.
pub trait Merge:
    Args + Serialize + DeserializeOwned + JsonSchema + Default + Clone + Debug + Send + Sync + 'static
{
    /// What it is.
    const ABOUT: About;

    /// The kernel for `count` models beside the base.
    ///
    /// # Errors
    /// Parameters out of range, and lists that do not have one value per model.
    fn kernel(&self, count: usize) -> Result<Arc<dyn Kernel>>;

    /// The element type that is written.
    fn dtype(&self) -> OutputType;
}

impl<M: Merge> Method for M {
    const INFO: Info = M::ABOUT.info();

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        let kernel = self.kernel(inputs.beside_base().count())?;
        let program = Program::of_whole_models(inputs, &kernel, self.dtype())?;
        let mut plan = Plan::of(self);
        program.describe(inputs, &mut plan);
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let kernel = self.kernel(inputs.beside_base().count())?;
        Program::of_whole_models(inputs, &kernel, self.dtype())?.run(inputs, plan, cx)
    }
}

/// A merge method without its type: what recipes pick by name.
#[derive(Clone, Copy)]
pub struct Maker {
    /// What it is.
    pub about: About,
    /// The JSON schema of its parameters.
    pub schema: fn() -> Value,
    make: fn(&Value, usize) -> Result<Arc<dyn Kernel>>,
}

impl Maker {
    /// Of a method: the one line that `mod.rs` needs beside the registry's.
    pub const fn of<M: Merge>() -> Self {
        fn make<M: Merge>(parameters: &Value, count: usize) -> Result<Arc<dyn Kernel>> {
            let method = M::ABOUT.name;
            let filled: M = serde_json::from_value(parameters.clone())
                .map_err(|source| Error::Parameters { method, source })?;
            filled.kernel(count)
        }
        Self { about: M::ABOUT, schema: || schemars::schema_for!(M).to_value(), make: make::<M> }
    }

    /// The kernel for one tensor's parameters.
    ///
    /// # Errors
    /// As [`Merge::kernel`].
    pub fn kernel(&self, parameters: &Value, count: usize) -> Result<Arc<dyn Kernel>> {
        (self.make)(parameters, count)
    }
}

impl Debug for Maker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Maker").field(&self.about.name).finish()
    }
}

/// One value per model: the list as given, a single value for all, or `default` where none was given.
///
/// # Errors
/// A list of another length, and values that are not numbers.
pub fn per_model(
    method: &'static str,
    name: &'static str,
    given: &[f64],
    count: usize,
    default: f64,
) -> Result<Vec<f64>> {
    let list = match given {
        [] => vec![default; count],
        [only] => vec![*only; count],
        list if list.len() == count => list.to_vec(),
        list => {
            let expected =
                format!("one value, or one for each of the {count} models beside the base");
            return Err(Error::range(method, name, format!("{list:?}"), expected));
        }
    };
    match list.iter().find(|value| !value.is_finite()) {
        Some(value) => Err(Error::range(method, name, value, "a number")),
        None => Ok(list),
    }
}

/// Refuses a value outside `low..=high`.
///
/// # Errors
/// [`Error::Range`].
pub fn within(
    method: &'static str,
    name: &'static str,
    values: &[f64],
    (low, high): (f64, f64),
) -> Result<()> {
    match values.iter().find(|value| !(low..=high).contains(*value)) {
        Some(value) => Err(Error::range(method, name, value, format!("from {low} to {high}"))),
        None => Ok(()),
    }
}

/// Refuses what is no number.
///
/// # Errors
/// [`Error::Range`].
pub fn finite(method: &'static str, name: &'static str, value: f64) -> Result<()> {
    match value.is_finite() {
        true => Ok(()),
        false => Err(Error::range(method, name, value, "a number")),
    }
}

/// A list in a recipe may be a single value.
pub(crate) fn one_or_many<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<f64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a number or a list of numbers")]
    enum OneOrMany {
        One(f64),
        Many(Vec<f64>),
    }
    Ok(match OneOrMany::deserialize(from)? {
        OneOrMany::One(one) => vec![one],
        OneOrMany::Many(many) => many,
    })
}
