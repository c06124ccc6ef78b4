//! CUDA C++ kernels on a machine without a GPU: g++ compiles the unmodified source for the host,
//! and `runtime/emulate.cpp` runs it. A CUDA thread is a fiber, and fibers change at barriers and
//! warp operations alone.
//!
//! | module | contains |
//! |---|---|
//! | [`emulator`] | memory between guards, launches, recorded launches |
//! | `compile` | sources to shared libraries, kept in the caller's [`BuildCache`] |
//! | [`tensor_core`] | how bf16 products round, by architecture |
//! | [`error`] | what went wrong |
//!
//! A kernel includes the caller's headers, and one of those includes `emulate.h` where
//! `REDRAFT_EMULATE` is defined. Entries are declared by its macros `KERNEL(name, Params)` and
//! `KERNEL_BOUNDS`, and take one params struct. Needs g++ (or what `CXX` names), objcopy and x86-64
//! Linux.

mod compile;
pub mod emulator;
pub mod error;
pub mod tensor_core;

pub use compile::{BuildCache, Edit, Source};
pub use emulator::{Copies, Emulator, EmulatorOptions, Function, Graph, Launch, SHARED_PER_CTA, Schedule};
pub use error::{Error, Result};
pub use tensor_core::TensorCore;
