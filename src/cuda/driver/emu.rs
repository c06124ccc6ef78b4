//! The emulator as a machine: the crate `redraft-emulator` as a driver, with the kernels'
//! sources and the cache on disk.
#![forbid(unsafe_code)]

use redraft_emulator::{self as emulator, BuildCache, EmulatorOptions, SHARED_PER_CTA, Source};

use crate::cuda::driver::cache::Cache;
use crate::cuda::driver::interface::{Address, Build, Driver, Function, Graph, Launch, Limits};
use crate::cuda::driver::prebuilt;
use crate::cuda::driver::source::{headers, kernel};
use crate::error::{Error, Result};

/// The host as a CUDA machine.
pub struct Emulator(emulator::Emulator);

impl Emulator {
    /// A machine of the host's memory and cores. Needs g++ (or what `CXX` names) and an x86-64
    /// Linux.
    ///
    /// Errors: [`Error::Request`] for an unknown architecture, [`Error::Device`] without a
    /// compiler, [`Error::Kernel`] with its words where it fails.
    pub fn new(options: EmulatorOptions) -> Result<Emulator> {
        Ok(Emulator(emulator::Emulator::new(options, headers(), Box::new(Cache::open()))?))
    }

    /// An entry of a source that is not among the kernels, for tests of the runtime.
    pub fn function_in(&self, file: &str, text: &str, defines: &[(&'static str, u32)], entry: &str) -> Result<Function> {
        Ok(Function(self.0.function(&Source { file, text, defines }, entry)?.0))
    }
}

impl From<emulator::Error> for Error {
    fn from(error: emulator::Error) -> Error {
        match error {
            emulator::Error::Architecture { .. } => Error::request(error.to_string()),
            emulator::Error::Kernel { what } => Error::kernel(what),
            emulator::Error::Io { path, source } => Error::Io { path, source },
            other => Error::device(other.to_string()),
        }
    }
}

impl BuildCache for Cache {
    fn get(&self, key: &str, extension: &str) -> Option<Vec<u8>> {
        Cache::get(self, key, extension)
    }

    fn put(&self, key: &str, extension: &str, bytes: &[u8]) {
        Cache::store(self, key, extension, bytes);
    }
}

impl Driver for Emulator {
    fn name(&self) -> String {
        let EmulatorOptions { arch, threads, .. } = self.0.options();
        format!("emu {arch} ({threads} thread{})", if *threads == 1 { "" } else { "s" })
    }

    fn arch(&self) -> String {
        self.0.options().arch.into()
    }

    fn is_emulated(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        Limits { num_sms: 4, shared_per_cta: SHARED_PER_CTA, memory_bytes: 1 << 40, free_bytes: 1 << 40 }
    }

    fn alloc(&self, bytes: usize) -> Result<Address> {
        Ok(self.0.alloc(bytes)?)
    }

    fn free(&self, address: Address) {
        self.0.free(address);
    }

    fn write(&self, dst: Address, src: &[u8]) -> Result<()> {
        Ok(self.0.write(dst, src)?)
    }

    fn read(&self, src: Address, dst: &mut [u8]) -> Result<()> {
        Ok(self.0.read(src, dst)?)
    }

    fn copy(&self, src: Address, dst: Address, bytes: usize) -> Result<()> {
        Ok(self.0.copy(src, dst, bytes)?)
    }

    fn fill(&self, dst: Address, word: u32, words: usize) -> Result<()> {
        Ok(self.0.fill(dst, word, words)?)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(self.0.synchronize()?)
    }

    fn function(&self, build: &Build, entry: &str) -> Result<Function> {
        prebuilt::log(build)?;
        let file = format!("{}.cu", build.stem);
        self.function_in(&file, kernel(build.stem).source, &build.defines, entry)
    }

    fn launch(&self, function: Function, launch: Launch, params: &[u8]) -> Result<()> {
        let Launch { grid, block, shared_bytes } = launch;
        Ok(self.0.launch(emulator::Function(function.0), emulator::Launch { grid, block, shared_bytes }, params)?)
    }

    fn begin_capture(&self) -> Result<()> {
        Ok(self.0.begin_capture()?)
    }

    fn end_capture(&self) -> Result<Graph> {
        Ok(Graph(self.0.end_capture()?.0))
    }

    fn is_capturing(&self) -> bool {
        self.0.is_capturing()
    }

    fn launch_graph(&self, graph: Graph) -> Result<()> {
        Ok(self.0.launch_graph(emulator::Graph(graph.0))?)
    }

    fn drop_graph(&self, graph: Graph) {
        self.0.drop_graph(emulator::Graph(graph.0));
    }
}
