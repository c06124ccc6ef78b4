//! The CUDA side: the backend and its launchers, and the two machines that run them.
//!
//! | module | content |
//! |---|---|
//! | `backend`, `shortlists` | the contracts of [`crate::Backend`] on device memory |
//! | `state` | the backend's state: weights, buffers, batches, recorded graphs |
//! | `device_steps` | the runner of steps that the device samples by itself |
//! | `run`, `layout`, `packed_arrays`, `signature`, `step_buffers` | one run of such steps, and where its arrays lie |
//! | `emulated` | opens the emulator, where this build has it |
//! | `ceilings` | a large copy and a large product, which bound every forward |
//! | [`ops`] | one launcher per kernel: params struct, grid, launch |
//! | [`context`], [`params`] | what every launcher needs; the form of a params struct |
//! | `kernels` | lists, reports and runs of the kernels of this binary |
//! | [`driver`] | the interface to a machine; [`Gpu`] (libcuda, NVRTC) and the emulator, which is the crate `redraft-emulator` (g++) |
//!
//! Libraries are opened at run time and their absence is an [`Error`](crate::Error) with the next
//! move. docs/cuda.md tells the story.
//!
//! cudarc supplies the search for the libraries and the types of their interfaces. Its functions
//! panic when a library or a symbol is absent and read foreign codes as enums; symbols are
//! therefore looked up one by one, as functions of the same arguments that return plain integers.
//! `unsafe` is in the files that call foreign functions: in `driver/`, and in
//! `ceilings/cublaslt.rs`.

mod backend;
mod ceilings;
pub mod context;
mod device_steps;
pub mod driver;
mod emulated;
mod kernels;
mod layout;
pub mod ops;
mod packed_arrays;
pub mod params;
mod run;
mod shortlists;
mod signature;
mod state;
mod step_buffers;

pub use device_steps::DeviceSteps;
pub use driver::compile::{Compiled, Compiler, EntryUse, compiler};
pub use driver::device::{DeviceInfo, device_count, is_there, probe};
#[cfg(feature = "emulator")]
pub use driver::emu::Emulator;
pub use driver::gpu::Gpu;
pub use driver::interface::{Build, Driver};
pub use driver::prebuilt::line_of;
pub use driver::source::{Kernel, headers, kernels};
pub use emulated::emulated;
pub use kernels::builds::{builds, kernels_build, parse_builds};
pub use kernels::kernel_bench::{BenchRequest, Report};
pub use kernels::kernel_benches::bench_kernel;
pub use kernels::report::{KernelInfo, KernelReport, kernels_check, kernels_list, list_table, over_budget, report_table};
#[cfg(feature = "emulator")]
pub use redraft_emulator::{Copies, Edit, EmulatorOptions, Schedule, tensor_core};
pub use state::{Batch, Buffer, Cuda, KvCache, Rows, Weight};
