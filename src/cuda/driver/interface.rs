//! The narrow interface between the launchers and a machine that runs kernels: memory, modules,
//! launches, graphs.
//!
//! Two machines implement it: the GPU through libcuda (`gpu.rs`) and the host that executes the
//! same kernel sources through g++ (`emu.rs`). Everything above this trait (params structs, grids,
//! launch order, graph replay) is the same code for both, which is what makes a machine without a
//! GPU able to test it.
//!
//! There is one stream: everything that is enqueued runs in the order of the calls. `write`,
//! `copy`, `fill`, `launch` and `replay` enqueue; `read` and `synchronize` wait, and report what
//! went wrong in anything enqueued before.
#![forbid(unsafe_code)]

use crate::error::Result;

/// An address in device memory. 0 is "none" where a params struct allows it.
pub type Address = u64;

/// How a launch is cut: CTAs in up to three dimensions, threads of a CTA in one, and the dynamic
/// shared memory of a CTA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    /// No dimension is ever 0 at the driver: an empty launch is dropped by the caller. y and z are
    /// at most 65,535.
    pub grid: [u32; 3],
    pub block: u32,
    /// Bytes of `extern __shared__`, beside the static ones.
    pub shared_bytes: u32,
}

impl Launch {
    /// `count` CTAs of `block` threads without dynamic shared memory.
    pub fn line(count: u32, block: u32) -> Launch {
        Launch { grid: [count, 1, 1], block, shared_bytes: 0 }
    }

    /// True if there is nothing to launch.
    pub fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }
}

/// One specialised build of `kernels/<stem>.cu`: the stem and the preprocessor constants that make
/// it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Build {
    pub stem: &'static str,
    /// In the order in which they are passed; part of the identity.
    pub defines: Vec<(&'static str, u32)>,
}

/// A loaded `extern "C"` entry; the number means something to its driver alone. Valid as long as
/// the driver lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Function(pub usize);

/// A recorded sequence of launches that runs with one call; the number means something to its
/// driver alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Graph(pub usize);

/// What launch shapes depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub num_sms: u32,
    /// Dynamic plus static shared memory that one CTA may ask for.
    pub shared_per_cta: u32,
    /// Device memory in all, and free when the driver was opened.
    pub memory_bytes: u64,
    pub free_bytes: u64,
}

/// A machine that runs kernels. Addresses, functions and graphs belong to the driver that made
/// them.
pub trait Driver: Send {
    /// For reports: `cuda:0 NVIDIA H200 (sm_90, 139.8 GiB)`, or `emu sm_90a (2 threads)`.
    fn name(&self) -> String;
    /// The architecture whose code or whose arithmetic the machine has, such as `sm_90a`.
    fn arch(&self) -> String;
    /// True where the host executes the kernels.
    fn is_emulated(&self) -> bool {
        false
    }
    /// Free of cost: launchers ask at every launch.
    fn limits(&self) -> Limits;

    /// At least `bytes` bytes (never 0 at the driver), aligned to 256, of undefined content.
    ///
    /// Errors: [`crate::Error::Device`] that says how much was asked for and how much is free.
    fn alloc(&self, bytes: usize) -> Result<Address>;
    /// Gives back what [`Driver::alloc`] gave, after everything enqueued is done with it.
    fn free(&self, address: Address);
    /// Enqueues a copy to the device; `src` may be reused when the call returns.
    fn write(&self, dst: Address, src: &[u8]) -> Result<()>;
    /// Waits for everything enqueued, then copies from the device.
    fn read(&self, src: Address, dst: &mut [u8]) -> Result<()>;
    /// Enqueues a copy within the device; the ranges do not overlap.
    fn copy(&self, src: Address, dst: Address, bytes: usize) -> Result<()>;
    /// Enqueues a fill of `words` 32-bit words.
    fn fill(&self, dst: Address, word: u32, words: usize) -> Result<()>;
    fn synchronize(&self) -> Result<()>;

    /// Compiles and loads a build, or finds it in the cache, and looks up one entry. The entry's
    /// dynamic shared memory limit is raised to what a CTA of this machine may have.
    fn function(&self, build: &Build, entry: &str) -> Result<Function>;
    /// Enqueues one launch. `params` are the bytes of the kernel's one params struct.
    fn launch(&self, function: Function, launch: Launch, params: &[u8]) -> Result<()>;

    /// From here on launches are recorded instead of run, until [`Driver::end_capture`]. Nothing
    /// but `launch` may be called between.
    fn begin_capture(&self) -> Result<()>;
    fn end_capture(&self) -> Result<Graph>;
    /// True from [`Driver::begin_capture`] to [`Driver::end_capture`].
    fn is_capturing(&self) -> bool;
    /// Enqueues a recorded sequence.
    fn launch_graph(&self, graph: Graph) -> Result<()>;
    /// Forgets a graph.
    fn drop_graph(&self, graph: Graph);

    /// The stream, with its context current on this thread, for a call of a vendor's library; or
    /// why there is none.
    fn stream(&self) -> std::result::Result<usize, String> {
        Err("this machine has none".to_owned())
    }

    /// Names what is enqueued until the matching [`Driver::pop_range`], for profilers. Free where
    /// no profiler listens.
    fn push_range(&self, _name: &str) {}
    fn pop_range(&self) {}
}
