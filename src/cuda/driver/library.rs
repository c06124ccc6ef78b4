//! Functions of libraries that are opened at run time, and what the loader says without them.

use libloading::Library;

use crate::error::{Error, Result};

/// One function of an opened library.
///
/// # Safety
/// `F` must be the C signature of `name`, and `library` must stay open as long as the function is
/// used.
pub(in crate::cuda) unsafe fn symbol<F: Copy>(library: &Library, name: &str) -> Result<F> {
    // SAFETY: the caller vouches for the signature and the lifetime.
    let found = unsafe { library.get::<F>(name) };
    found.map(|f| *f).map_err(|e| Error::device(format!("{}; the library is too old or is not NVIDIA's", loader_words(&e))))
}

/// What the dynamic loader itself says, which libloading keeps one level below its own sentence.
pub(in crate::cuda) fn loader_words(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |source| source.to_string())
}
