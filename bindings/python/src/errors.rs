//! Errors of the engine as exceptions of `redraft._errors`.
#![forbid(unsafe_code)]

use engine::Error;
use pyo3::PyErr;

/// Classes that Python code declares, so that some have a second base.
mod classes {
    use pyo3::import_exception;

    import_exception!(redraft._errors, RedraftError);
    import_exception!(redraft._errors, ConfigError);
    import_exception!(redraft._errors, WeightsError);
    import_exception!(redraft._errors, TokenizerError);
    import_exception!(redraft._errors, RequestError);
    import_exception!(redraft._errors, OutOfPages);
    import_exception!(redraft._errors, DeviceError);
    import_exception!(redraft._errors, KernelError);
    import_exception!(redraft._errors, FileError);
    import_exception!(redraft._errors, EngineGone);
}

/// The exception of an error, with its text.
pub(crate) fn exception(error: &Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Config { .. } => classes::ConfigError::new_err(text),
        Error::Weights { .. } => classes::WeightsError::new_err(text),
        Error::Tokenizer { .. } => classes::TokenizerError::new_err(text),
        Error::Request { .. } => classes::RequestError::new_err(text),
        Error::OutOfPages { .. } => classes::OutOfPages::new_err(text),
        Error::Device { .. } => classes::DeviceError::new_err(text),
        Error::Kernel { .. } => classes::KernelError::new_err(text),
        Error::Io { .. } => classes::FileError::new_err(text),
        Error::EngineGone => classes::EngineGone::new_err(text),
        _ => classes::RedraftError::new_err(text),
    }
}

/// A call on an engine that was closed.
pub(crate) fn closed() -> PyErr {
    classes::EngineGone::new_err("the engine was closed")
}
