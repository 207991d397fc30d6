//! `refit completions SHELL`: the completion script of a shell.

use clap_complete::Shell;
use serde_json::json;

use crate::failure::Result;
use crate::output::Outcome;

/// Print the completion script of a shell
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which shell
    shell: Shell,
}

/// Renders the script.
pub fn run(args: Args) -> Result<Outcome> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::cli::command(), "refit", &mut script);
    let script = String::from_utf8_lossy(&script).into_owned();
    Ok(Outcome::new(json!({"shell": args.shell.to_string(), "script": script}), script))
}
