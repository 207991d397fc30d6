use std::path::{Path, PathBuf};

/// What can go wrong while reading data. Every message names the place and says
/// what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's own words.
        source: std::io::Error,
    },
    /// Bytes that are not UTF-8 where text was expected.
    #[error(
        "{}: not valid UTF-8 at byte {offset}; convert the file (for example `iconv -f latin1 -t utf-8`)",
        path.display()
    )]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Offset of the first bad byte.
        offset: usize,
    },
    /// A line of a text format that does not parse.
    #[error("{}:{line}: {message}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What was expected, and what to do.
        message: String,
    },
    /// A file whose structure is wrong as a whole.
    #[error("{}: {message}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What was expected, and what to do.
        message: String,
    },
    /// An image that cannot be cut as asked.
    #[error("{0}")]
    Tiling(String),
    /// A model file that could not be read.
    #[error(transparent)]
    Store(#[from] refit_store::Error),
    /// A request that the data at hand cannot meet.
    #[error("{0}")]
    Invalid(String),
}

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
        move |source| Error::Io { path: path.to_owned(), source }
    }

    pub(crate) fn line(path: &Path, line: usize, message: impl Into<String>) -> Error {
        Error::Line { path: path.to_owned(), line, message: message.into() }
    }

    pub(crate) fn file(path: &Path, message: impl Into<String>) -> Error {
        Error::File { path: path.to_owned(), message: message.into() }
    }
}
