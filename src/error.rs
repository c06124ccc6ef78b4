//! The one error type. Variants are grouped by who can act on them; every text names the file, key or argument,
//! what was expected and what was found.
#![forbid(unsafe_code)]

use std::fmt;
use std::path::{Path, PathBuf};

/// Result of every fallible call in the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, and with which file, key or argument.
#[derive(Debug, Clone, PartialEq)]
pub enum Error {
    /// `config.json` is absent, malformed or describes something unsupported.
    Config { path: PathBuf, what: String },
    /// A weight file is absent, malformed, or a tensor in it is missing, misshapen or not finite.
    Weights { path: PathBuf, what: String },
    /// `tokenizer.json` is absent, malformed, or does not fit the model.
    Tokenizer { path: PathBuf, what: String },
    /// The request (prompt, length, schedule, sampling parameters) cannot be served as asked.
    Request { what: String },
    /// The page pool cannot hold a request even when empty.
    OutOfPages { needed: usize, capacity: usize },
    /// The asked device is absent or refused.
    Device { what: String },
    /// A kernel failed to compile, to launch, or produced numbers that cannot be used (NaN logits).
    Kernel { what: String },
    /// The operating system refused a read or a write.
    Io { path: PathBuf, what: String },
}

impl Error {
    pub fn config(path: &Path, what: impl Into<String>) -> Self {
        Error::Config { path: path.to_path_buf(), what: what.into() }
    }
    pub fn weights(path: &Path, what: impl Into<String>) -> Self {
        Error::Weights { path: path.to_path_buf(), what: what.into() }
    }
    pub fn tokenizer(path: &Path, what: impl Into<String>) -> Self {
        Error::Tokenizer { path: path.to_path_buf(), what: what.into() }
    }
    pub fn request(what: impl Into<String>) -> Self {
        Error::Request { what: what.into() }
    }
    pub fn device(what: impl Into<String>) -> Self {
        Error::Device { what: what.into() }
    }
    pub fn kernel(what: impl Into<String>) -> Self {
        Error::Kernel { what: what.into() }
    }
    pub fn io(path: &Path, error: &std::io::Error) -> Self {
        Error::Io { path: path.to_path_buf(), what: error.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Config { path, what } | Error::Weights { path, what } | Error::Tokenizer { path, what } | Error::Io { path, what } => {
                write!(f, "{}: {what}", path.display())
            }
            Error::Request { what } | Error::Device { what } | Error::Kernel { what } => f.write_str(what),
            Error::OutOfPages { needed, capacity } => {
                write!(f, "request needs {needed} K/V pages, the pool holds {capacity}; raise --kv-pages or shorten the request")
            }
        }
    }
}

impl std::error::Error for Error {}
