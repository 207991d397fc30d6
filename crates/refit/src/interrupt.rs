//! Ctrl-C: leave at once. Outputs are written under another name and journalled, so stopping at
//! any instant leaves nothing half-written, and the same command resumes.

use crate::failure::Code;

/// Installs the handler for Ctrl-C, hang-up and termination.
pub fn install() {
    // A second handler in the same process is the only possible error; it changes nothing.
    let _ = ctrlc::set_handler(|| {
        eprintln!("\ninterrupted: no output is half-written; run the same command again to resume");
        std::process::exit(Code::Interrupted as i32);
    });
}
