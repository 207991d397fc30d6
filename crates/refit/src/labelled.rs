//! Labelled examples, as they are named on the command line.

use refit_methods::labelled::{Labelled, Part};
use refit_methods::method::Family;

use crate::cli::App;
use crate::failure::Result;
use crate::inputs;

/// Opens what `source` names: a path, or a source such as `deb:dataset-fashion-mnist`.
pub fn open(app: &App, source: &str, part: Part) -> Result<Labelled> {
    Ok(Labelled::open(&inputs::pull(app, source, false)?.path, part)?)
}

/// The same for a method: one that learns takes the part that is for learning.
pub fn open_for(app: &App, source: &str, family: Family) -> Result<Labelled> {
    let part = match family {
        Family::Adapt => Part::Train,
        _ => Part::HeldOut,
    };
    open(app, source, part)
}
