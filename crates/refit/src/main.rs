//! refit: give people the model they need from the pretrained models they already have.
//!
//! This binary is thin: [`cli`] reads the command line, one file per verb in [`verbs`] does the
//! work with the crates below, and [`output`] prints what came of it.

mod cli;
mod engine;
mod failure;
mod inputs;
mod interrupt;
mod labelled;
mod machine;
mod output;
mod progress;
mod ranks;
mod recipe;
mod report;
mod suggest;
mod verbs;

use std::process::ExitCode;

fn main() -> ExitCode {
    let code = cli::main();
    ExitCode::from(code as u8)
}
