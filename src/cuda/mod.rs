//! The CUDA side: the backend and its launchers, and the two machines that run them.
//!
//! | room | owns |
//! |---|---|
//! | `backend`, `run`, `layout` | the contracts of [`crate::Backend`] on device memory; steps that the device decides by itself, and where their arrays lie; recorded graphs |
//! | `embed` ... `remask` | one launcher per kernel: params struct, grid, launch |
//! | [`machine`], [`params`] | what every launcher stands on; the form of a params struct |
//! | [`driver`] | the narrow interface to a machine: [`Gpu`] (libcuda) and [`Emulator`] (g++ and the host) |
//! | `kernels`, `compile`, `cubin`, [`cache`] | the embedded sources, NVRTC, and built code kept on disk |
//! | [`tensor_core`] | how bf16 products round, by architecture |
//! | `prebuilt` | kernels built on one machine for another that has no NVRTC |
//! | `ceilings` | a large copy and a large product, by cuBLASLt where it is there, which bound every forward |
//! | `device`, `trouble`, `nvtx`, `staging`, `libcuda` | the conversation with the driver |
//!
//! Libraries are opened at run time and their absence is an [`Error`] with the next move. docs/cuda.md tells the story.
//!
//! cudarc supplies the search for the libraries and the numbers of the driver's interface. Its own entry points panic when a library
//! or a symbol is absent and read foreign codes as enums; symbols are therefore looked up one by one, as functions that return plain
//! integers. `unsafe` is in this file and in those that call foreign functions: `device.rs`, `compile.rs`, `libcuda.rs`, `gpu.rs`,
//! `staging.rs`, `nvtx.rs`, `ceilings/cublaslt.rs`.

mod backend;
mod ceilings;
pub mod driver;
mod kernels;
mod layout;
pub mod machine;
pub mod ops;
pub mod params;
mod run;
pub mod tensor_core;
mod words;

pub use backend::{Batch, Buffer, Cuda, KvCache, Matrix, Rows, Vector};
pub use driver::compile::{Compiled, Compiler, EntryUse, compiler};
pub use driver::device::{DeviceInfo, device_count, probe};
pub use driver::emu::{Copies, Edit, Emulator, EmulatorOptions, Schedule};
pub use driver::gpu::Gpu;
pub use driver::interface::{Build, Driver};
pub use driver::prebuilt::{kernels_build, line_of, parse_builds};
pub use kernels::replay::{Asked, Report, replay};
pub use kernels::report::{
    Kernel, KernelInfo, KernelReport, builds, headers, kernels, kernels_check, kernels_list, list_table, over_budget, report_table,
};
