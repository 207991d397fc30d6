//! Ctrl-C: leave at once. Outputs are written under another name and journalled, so stopping at
//! any instant leaves nothing half-written, and the same command resumes.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use crate::failure::{Code, Failure};
use crate::{output, progress, ranks};

/// Whether the verb at work keeps what it has finished for its next run.
static RESUMES: AtomicBool = AtomicBool::new(false);

/// The exit code that several processes have agreed on, once they have; -1 before.
static AGREED: AtomicI32 = AtomicI32::new(-1);

/// Installs the handler for Ctrl-C, hang-up and termination.
pub fn install(as_json: bool) {
    // A second handler in the same process is the only possible error; it changes nothing.
    let _ = ctrlc::set_handler(move || {
        let agreed = AGREED.load(Ordering::Relaxed);
        if agreed >= 0 {
            // Everything has been said: this is `mpirun`, ending those that are slower to leave than the first.
            std::process::exit(agreed);
        }
        let resumes = RESUMES.load(Ordering::Relaxed);
        if !ranks::speaks() {
            std::process::exit(Code::Interrupted as i32);
        }
        let mut err = std::io::stderr();
        // A dashboard clears itself away and says in a line where the training stood.
        if !progress::abandon(!as_json) && !as_json && err.is_terminal() {
            // Below the bar that may stand there.
            let _ = writeln!(err);
        }
        output::print_failure(&failure(resumes), as_json);
        std::process::exit(Code::Interrupted as i32);
    });
}

/// All processes know how the command ends: a signal from now on only ends this one.
pub fn agreed(code: Code) {
    AGREED.store(code as i32, Ordering::Relaxed);
}

/// Says what kind of work begins.
pub fn expect(resumes: bool) {
    RESUMES.store(resumes, Ordering::Relaxed);
}

fn failure(resumes: bool) -> Failure {
    let message = match resumes {
        true => "interrupted: no output is half-written; run the same command again to resume",
        false => "interrupted: nothing was written",
    };
    Failure { code: Code::Interrupted, message: message.to_owned() }
}
