//! Error type of the crate: variants by what can be done about them, with their operands and their
//! cause.
//!
//! Every text names the file, key or argument, what was expected and what was found.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Result of every fallible call in the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error below another one, as [`std::error::Error::source`] gives it.
pub type Cause = Arc<dyn std::error::Error + Send + Sync>;

/// What went wrong, and with which file, key or argument.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `config.json` is absent, malformed or describes something unsupported.
    #[error("{}: {what}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Key, expected and found value.
        what: String,
    },
    /// A weight file is absent, malformed, or a tensor in it is missing, misshapen or not finite.
    #[error("{}: {what}", path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// Tensor, expected and found shape or type.
        what: String,
    },
    /// `tokenizer.json` is absent, malformed, or does not fit the model.
    #[error("{}: {what}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        what: String,
        /// The error of the tokenizers library, where there was one.
        source: Option<Cause>,
    },
    /// The request (prompt, length, schedule, sampling parameters) cannot be served as asked.
    #[error("{what}")]
    Request {
        /// Argument, expected and found value.
        what: String,
    },
    /// The page pool cannot hold a request even when empty.
    #[error("request needs {needed} K/V pages, the pool holds {capacity}; raise --kv-pages or shorten the request")]
    OutOfPages {
        /// Pages that the request needs.
        needed: usize,
        /// Pages of the pool.
        capacity: usize,
    },
    /// The asked device is absent or refused.
    #[error("{what}")]
    Device {
        /// The device, and what it or its driver said.
        what: String,
    },
    /// A kernel failed to compile, to launch, or produced numbers that cannot be used (NaN logits).
    #[error("{what}")]
    Kernel {
        /// The kernel or row, and what was found.
        what: String,
    },
    /// The operating system refused a read or a write.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: Arc<std::io::Error>,
    },
    /// The engine of a request is gone: it was dropped, or its thread ended.
    #[error("the engine ended before the request did")]
    EngineGone,
}

/// Errors are equal if they are of one variant and say the same.
impl PartialEq for Error {
    fn eq(&self, other: &Error) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other) && self.to_string() == other.to_string()
    }
}

impl Error {
    /// [`Error::Config`].
    pub fn config(path: &Path, what: impl Into<String>) -> Self {
        Error::Config { path: path.to_path_buf(), what: what.into() }
    }
    /// [`Error::Weights`].
    pub fn weights(path: &Path, what: impl Into<String>) -> Self {
        Error::Weights { path: path.to_path_buf(), what: what.into() }
    }
    /// [`Error::Tokenizer`] without a cause.
    pub fn tokenizer(path: &Path, what: impl Into<String>) -> Self {
        Error::Tokenizer { path: path.to_path_buf(), what: what.into(), source: None }
    }
    /// [`Error::Tokenizer`]: `what` failed because of `cause`.
    pub fn tokenizer_from(path: &Path, what: &str, cause: Box<dyn std::error::Error + Send + Sync>) -> Self {
        Error::Tokenizer { path: path.to_path_buf(), what: format!("{what}: {cause}"), source: Some(cause.into()) }
    }
    /// [`Error::Request`].
    pub fn request(what: impl Into<String>) -> Self {
        Error::Request { what: what.into() }
    }
    /// [`Error::Device`].
    pub fn device(what: impl Into<String>) -> Self {
        Error::Device { what: what.into() }
    }
    /// [`Error::Kernel`].
    pub fn kernel(what: impl Into<String>) -> Self {
        Error::Kernel { what: what.into() }
    }
    /// [`Error::Io`] with a copy of `error`.
    pub fn io(path: &Path, error: &std::io::Error) -> Self {
        // Not `Clone`; the code of the operating system keeps kind and text.
        let copy =
            error.raw_os_error().map_or_else(|| std::io::Error::new(error.kind(), error.to_string()), std::io::Error::from_raw_os_error);
        Error::Io { path: path.to_path_buf(), source: Arc::new(copy) }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn errors_carry_their_cause() {
        let missing = std::io::Error::from_raw_os_error(2);
        let error = Error::io(Path::new("config.json"), &missing);
        assert_eq!(error.to_string(), format!("config.json: {missing}"));
        let cause = error.source().and_then(|cause| cause.downcast_ref::<Arc<std::io::Error>>());
        assert_eq!(cause.map(|cause| cause.kind()), Some(std::io::ErrorKind::NotFound));
        let error = Error::tokenizer_from(Path::new("tokenizer.json"), "not a tokenizer", "expected `,`".into());
        assert_eq!(error.to_string(), "tokenizer.json: not a tokenizer: expected `,`");
        assert_eq!(error.source().map(ToString::to_string), Some("expected `,`".to_owned()));
        assert_ne!(Error::request("a"), Error::device("a"));
        assert_eq!(Error::request("a"), Error::request("a"));
    }
}
