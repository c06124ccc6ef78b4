//! Public engine: a model directory on a device chosen at run time, which writes, streams and
//! scores text.
//!
//! [`Engine`] wraps the engine that is generic over its backend ([`crate::engine::Engine`]): the
//! type parameter ends here. [`Engine::generate`] serves one request; [`Engine::submit`] with
//! [`Engine::tick`] serves many from the caller's thread; [`Engine::spawn`] serves them from a
//! thread of its own.
#![forbid(unsafe_code)]

pub(crate) mod builder;
mod core;
pub(crate) mod device;
mod engine;
mod handle;
pub mod json;
pub(crate) mod options;
mod quantize;
mod settings;
mod stream;
pub(crate) mod text;
mod thread;

pub use builder::EngineBuilder;
pub use device::Device;
pub use engine::{Engine, ModelInfo};
pub use handle::{Generation, RequestHandle};
pub use options::{Options, Prompt};
pub use quantize::{Quantized, quantize};
pub use stream::{Snapshot, TextEvent, TextStream};
pub use thread::EngineThread;
