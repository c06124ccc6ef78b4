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

pub mod ask;
pub mod attention;
mod backend;
pub mod blend;
pub mod cache;
mod ceilings;
mod compile;
mod cubin;
pub mod decide;
mod device;
pub mod driver;
pub mod embed;
mod emu;
pub mod experts;
pub mod gather;
mod gpu;
mod kernels;
mod layout;
mod libcuda;
pub mod linear;
pub mod machine;
pub mod norm;
mod nvtx;
pub mod params;
mod prebuilt;
pub mod remask;
mod replay;
mod replays;
pub mod reveal;
pub mod rope_append;
pub mod route;
mod run;
pub mod shortlist;
mod staging;
pub mod tensor_core;
mod trouble;
mod words;

pub use backend::{Batch, Buffer, Cuda, KvCache, Matrix, Rows, Vector};
pub use compile::{Compiled, Compiler, EntryUse, compiler};
pub use device::{DeviceInfo, device_count, probe};
pub use driver::{Build, Driver};
pub use emu::{Copies, Edit, Emulator, EmulatorOptions, Schedule};
pub use gpu::Gpu;
pub use kernels::{
    Kernel, KernelInfo, KernelReport, builds, headers, kernels, kernels_check, kernels_list, list_table, over_budget, report_table,
};
pub use prebuilt::{kernels_build, line_of, parse_builds};
pub use replay::{Asked, Report, replay};

use libloading::Library;

use crate::error::{Error, Result};

/// One function of an opened library.
///
/// # Safety
/// `F` must be the C signature of `name`, and `library` must stay open as long as the function is used.
unsafe fn symbol<F: Copy>(library: &Library, name: &str) -> Result<F> {
    // SAFETY: the caller vouches for the signature and the lifetime.
    let found = unsafe { library.get::<F>(name) };
    found.map(|f| *f).map_err(|e| Error::device(format!("{}; the library is too old or is not NVIDIA's", loader_words(&e))))
}

/// What the dynamic loader itself says, which libloading keeps one level below its own sentence.
fn loader_words(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |source| source.to_string())
}
