//! Engine of either backend behind one type.
#![forbid(unsafe_code)]

use crate::engine::Engine as EngineCore;

/// The engine on either backend. The emulated GPU is the CUDA backend.
#[allow(clippy::large_enum_variant)] // one per engine, moved rarely
pub(crate) enum AnyCore {
    Cpu(EngineCore<crate::cpu::Cpu>),
    #[cfg(feature = "cuda")]
    Cuda(EngineCore<crate::cuda::Cuda>),
}

/// `body` with the engine of the backend in use.
macro_rules! on_core {
    ($core:expr, |$engine:ident| $body:expr) => {
        match $core {
            crate::api::core::AnyCore::Cpu($engine) => $body,
            #[cfg(feature = "cuda")]
            crate::api::core::AnyCore::Cuda($engine) => $body,
        }
    };
}
pub(super) use on_core;
