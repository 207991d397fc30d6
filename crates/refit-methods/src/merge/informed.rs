//! What merges share that look at a little data: which text belongs to which model.

use refit_data::rng::Rng;

use crate::calibrated::Calibration;
use crate::error::Result;
use crate::inputs::Inputs;
use crate::method::{InputSpec, Need};

/// Two models or more, and text like that which they are good at.
pub const INPUTS: InputSpec = InputSpec {
    min_models: 2,
    max_models: None,
    text: Need::Required,
    data_role: "text that each model is good at: one for every model, in their order, or some for all",
    ..InputSpec::WEIGHTS
};

/// Whether every model has a text of its own; otherwise each reads all of them.
pub fn own_texts(inputs: &Inputs) -> bool {
    inputs.text.len() == inputs.models.len()
}

/// Who reads what, for a plan.
pub fn describe(inputs: &Inputs) -> String {
    match own_texts(inputs) {
        true => "every model reads the text in its place".to_owned(),
        false => format!("every model reads all of {} texts", inputs.text.len()),
    }
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
    let text = match own_texts(inputs) {
        true => vec![inputs.text[at].clone()],
        false => inputs.text.clone(),
    };
    let own = Inputs { models: vec![inputs.models[at].clone()], text, ..Inputs::default() };
    let seed = Rng::named(seed, &format!("model {at}")).next_u64();
    calibration.draw(&own, seed)
}
