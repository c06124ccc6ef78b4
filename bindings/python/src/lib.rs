//! Native half of the Python package `redraft`: an engine on its thread, and requests that threads
//! and asyncio tasks wait for. The Python half (`python/redraft`) gives them their shape.
//!
//! Two rules. Nothing waits with the interpreter's lock held, and no wait is longer than
//! [`wait::SIGNALS_EVERY`] without a look at Python's signals. The engine's thread never takes the
//! interpreter's lock: a busy interpreter must not delay a forward (`wake`).
#![forbid(unsafe_code)]

use pyo3::prelude::*;

mod convert;
mod engine_object;
mod errors;
mod request;
mod wait;
mod wake;

/// Native half of the package `redraft`.
#[pymodule]
mod _redraft {
    #[pymodule_export]
    use super::engine_object::Engine;
    #[pymodule_export]
    use super::request::Request;
}
