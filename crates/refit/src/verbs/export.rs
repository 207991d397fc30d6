//! `refit export MODEL --to FORMAT -o OUT`: the method `export` under a name of its own.

use clap::{ArgMatches, Command};
use refit_methods::registry::{self, Entry};

use super::apply;
use crate::cli::App;
use crate::failure::{Failure, Result};
use crate::output::Outcome;

fn entry() -> Option<&'static Entry> {
    registry::all().iter().find(|entry| entry.info.name == "export")
}

/// The command, with the flags of the method.
pub fn command() -> Command {
    let command = entry().map_or_else(|| Command::new("export"), apply::method_command);
    command.about("Write a model as GGUF, compressed-tensors, GPTQ or safetensors, and prove that the weights are the same")
}

/// Runs the method.
pub fn run(app: &App, matches: &ArgMatches) -> Result<Outcome> {
    let entry = entry().ok_or_else(|| Failure::usage("this refit has no method `export`"))?;
    apply::run_method(app, entry, matches)
}
