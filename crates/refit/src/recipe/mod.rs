//! Recipes: YAML files of steps, run one after the other, resumable, with everything recorded.

pub mod made;
pub mod preflight;
pub mod record;
pub mod runner;
pub mod schema;
