//! Machines that run kernels: the interface, the GPU through libcuda, and the emulator.

pub mod cache;
pub(super) mod compile;
pub(super) mod device;
mod elf;
#[cfg(feature = "emulator")]
pub(super) mod emu;
mod errors;
pub(super) mod gpu;
pub(super) mod interface;
pub(super) mod libcuda;
pub(super) mod library;
mod nvtx;
pub(super) mod prebuilt;
pub(super) mod source;
mod staging;

pub use interface::{Address, Build, Driver, Function, Graph, Launch, Limits};
