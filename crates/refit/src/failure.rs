//! What can end a command early, and the exit code that says so.

use std::fmt;
use std::path::Path;

use refit_store::Error as Store;

/// Result of every verb.
pub type Result<T = (), E = Failure> = std::result::Result<T, E>;

/// Exit codes: a promise to scripts, printed by `refit --help`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Everything asked for was done, and every check held.
    Ok = 0,
    /// The work was done and the answer is no: a check failed, a claim is not shown.
    No = 1,
    /// The command line or an input is wrong; nothing was written.
    Usage = 2,
    /// The system failed: a file, the disk, memory, the network.
    System = 3,
    /// Interrupted; the same command resumes.
    Interrupted = 4,
}

impl Code {
    /// The code of this number; what no code has is a failure of the system.
    pub fn of(number: u8) -> Self {
        let all = [Self::Ok, Self::No, Self::Usage, Self::System, Self::Interrupted];
        all.into_iter().find(|code| *code as u8 == number).unwrap_or(Self::System)
    }
}

/// An error with its exit code, ready to be shown.
#[derive(Debug)]
pub struct Failure {
    /// How the process ends.
    pub code: Code,
    /// What is wrong, where, what was expected and what to do.
    pub message: String,
}

impl Failure {
    /// Something the user can mend.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { code: Code::Usage, message: message.into() }
    }

    /// Something the system refused.
    pub fn system(message: impl Into<String>) -> Self {
        Self { code: Code::System, message: message.into() }
    }

    /// A failed operation on a file.
    pub fn io(path: &Path, action: &str, source: &std::io::Error) -> Self {
        Self::system(format!("{}: cannot {action}: {source}", path.display()))
    }

    /// The same failure, with the place it happened in front.
    pub fn within(self, place: impl fmt::Display) -> Self {
        Self { message: format!("{place}: {}", self.message), ..self }
    }

    /// The same failure, with the file that it is about in front unless the message names it already.
    pub fn about(self, path: &Path) -> Self {
        let path = path.display().to_string();
        if self.message.contains(&path) { self } else { self.within(path) }
    }

    /// Wraps a library's error: exit code 3 when an I/O error is at its root, else 2.
    pub fn from_error(error: &(dyn std::error::Error + 'static)) -> Self {
        Self { code: code_of(error), message: chain(error) }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

fn code_of(error: &(dyn std::error::Error + 'static)) -> Code {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            // A file that is not there is a wrong argument, not a failing system.
            return match io.kind() {
                std::io::ErrorKind::NotFound => Code::Usage,
                _ => Code::System,
            };
        }
        if let Some(
            Store::DiskFull { .. }
            | Store::FileTooLarge { .. }
            | Store::Busy { .. }
            | Store::Unreachable { .. },
        ) = store_error(error)
        {
            return Code::System;
        }
        next = error.source();
    }
    Code::Usage
}

/// The store's error inside one of the crates above it, whose wrappers are transparent.
fn store_error<'e>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e Store> {
    use {refit_data::Error as Data, refit_methods::Error as Methods};
    use {refit_nn::Error as Nn, refit_train::Error as Train};
    let inner: &(dyn std::error::Error + 'static) = if let Some(error) = error.downcast_ref() {
        match error {
            Methods::Store(inner) => return Some(inner),
            Methods::Data(inner) => inner,
            Methods::Model(inner) => inner,
            Methods::Train(inner) => inner,
            _ => return None,
        }
    } else if let Some(error) = error.downcast_ref() {
        match error {
            Train::Store(inner) => return Some(inner),
            Train::Model(inner) => inner,
            _ => return None,
        }
    } else if let Some(error) = error.downcast_ref() {
        match error {
            Nn::Store(inner) => return Some(inner),
            Nn::Data(inner) => inner,
            _ => return None,
        }
    } else if let Some(Data::Store(inner)) = error.downcast_ref() {
        return Some(inner);
    } else {
        return error.downcast_ref();
    };
    store_error(inner)
}

/// The message of an error, with those causes whose text it does not already contain.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut message = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !message.contains(&text) {
            message.push_str(": ");
            message.push_str(&text);
        }
        next = cause.source();
    }
    message
}

impl From<refit_store::Error> for Failure {
    fn from(error: refit_store::Error) -> Self {
        Self::from_error(&error)
    }
}

/// Libraries whose errors say everything; only the exit code is ours.
macro_rules! from_library {
    ($($error:ty),+ $(,)?) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::from_error(&error)
            }
        }
    )+};
}

from_library!(
    refit_data::Error,
    refit_nn::Error,
    refit_train::Error,
    refit_train::train::TrainError,
    refit_methods::Error,
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_a_failure_of_the_system_however_deep_it_lies() {
        let full = || Store::DiskFull { path: "out".into(), need: 9, available: 1 };
        let wrapped: refit_methods::Error = refit_train::Error::Model(full().into()).into();
        assert_eq!(Failure::from(wrapped).code, Code::System);
        assert_eq!(Failure::from(full()).code, Code::System);
        let exists = Store::OutputExists { path: "out".into() };
        assert_eq!(Failure::from(refit_methods::Error::from(exists)).code, Code::Usage);
        let denied = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        assert_eq!(Failure::from(Store::io("out", "write", denied)).code, Code::System);
    }
}
