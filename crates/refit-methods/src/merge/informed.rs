//! What merges share that look at a little data: which text belongs to which model.

use refit_data::rng::Rng;

use crate::calibrated::Calibration;
use crate::error::{Error, Result};
use crate::inputs::Inputs;
use crate::method::{InputSpec, Need};

/// Two models or more, and text like that which they are good at.
pub const INPUTS: InputSpec = InputSpec {
    min_models: 2,
    max_models: None,
    text: Need::Required,
    data_role: "text that each model is good at: one for every model, in their order, or one for all",
    ..InputSpec::WEIGHTS
};

/// Refuses a number of texts that is neither one nor that of the models.
///
/// # Errors
/// [`Error::Conflict`].
pub fn check(method: &'static str, inputs: &Inputs) -> Result<()> {
    let (texts, models) = (inputs.text.len(), inputs.models.len());
    if texts == 1 || texts == models {
        return Ok(());
    }
    let problem = format!(
        "{texts} texts for {models} models; give one for each, in their order, or one for all"
    );
    Err(Error::Conflict { method, problem })
}

/// The sequences of model `at`.
///
/// # Errors
/// A text shorter than one sequence.
pub fn draw(
    calibration: &Calibration,
    inputs: &Inputs,
    at: usize,
    seed: u64,
) -> Result<Vec<Vec<u32>>> {
    let text = inputs.text.get(at).unwrap_or(&inputs.text[0]);
    let own = Inputs {
        models: vec![inputs.models[at].clone()],
        text: vec![text.clone()],
        ..Inputs::default()
    };
    let seed = Rng::named(seed, &format!("model {at}")).next_u64();
    calibration.draw(&own, seed)
}
