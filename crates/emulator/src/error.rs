//! Error type of the crate.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Result of every fallible call in the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, and with which architecture, kernel or file.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No architecture of this name can be emulated.
    #[error("architecture {arch}: expected sm_80 or later, such as sm_90a")]
    Architecture {
        /// As it was given.
        arch: String,
    },
    /// The host cannot emulate: no compiler, no memory, or a call that a GPU would refuse.
    #[error("{what}")]
    Device {
        /// What is missing or was refused, and the next move.
        what: String,
    },
    /// A kernel failed to compile or to run.
    #[error("{what}")]
    Kernel {
        /// The kernel, CTA and thread, and what was found.
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
}

impl Error {
    pub(crate) fn device(what: impl Into<String>) -> Error {
        Error::Device { what: what.into() }
    }

    pub(crate) fn kernel(what: impl Into<String>) -> Error {
        Error::Kernel { what: what.into() }
    }

    pub(crate) fn io(path: &Path, error: std::io::Error) -> Error {
        Error::Io { path: path.to_path_buf(), source: Arc::new(error) }
    }
}
