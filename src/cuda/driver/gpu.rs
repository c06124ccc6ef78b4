//! The GPU driven through libcuda: memory, modules, launches and graphs on one stream of the
//! device's primary context.
//!
//! Every call makes the context current first, so a [`Gpu`] may move between threads. Writes go
//! through page-locked memory in pieces and return when the source may be reused; the copies run
//! behind. Nothing else waits but `read`, `synchronize` and `free`.
//!
//! A failing kernel is reported by whichever call comes next, and ends the context: [`Gpu`] keeps
//! the first such report and repeats it. Machine code is for the one architecture of this device.
//! It comes from `REDRAFT_KERNELS_DIR`, else from the cache on disk, else from NVRTC, which is
//! opened when the first kernel needs it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CString, c_int, c_uint, c_void};
use std::ptr::null_mut;

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_attribute, CUfunction, CUfunction_attribute, CUgraph, CUgraphExec, CUmodule, CUresult, CUstream,
    CUstream_flags, CUstreamCaptureMode,
};

use crate::cuda::driver::cache::Cache;
use crate::cuda::driver::compile::compiler;
use crate::cuda::driver::device::{DeviceInfo, describe, probe};
use crate::cuda::driver::interface::{Address, Build, Driver, Function, Graph, Launch, Limits};
use crate::cuda::driver::libcuda::{CudaFunctions, functions};
use crate::cuda::driver::prebuilt::Prebuilt;
use crate::cuda::driver::source::{identity, kernel, portable_identity};
use crate::cuda::driver::staging::Staging;
use crate::cuda::driver::{errors, nvtx, prebuilt};
use crate::error::{Error, Result};

/// The driver's limit on the bytes of all parameters of a kernel.
const MAX_PARAMS: usize = 4096;

/// One device with one stream.
pub struct Gpu {
    functions: &'static CudaFunctions,
    prebuilt: Option<Prebuilt>,
    info: DeviceInfo,
    arch: String,
    /// What the driver speaks, as major and minor of CUDA.
    driver_version: (u32, u32),
    limits: Limits,
    device: CUdevice,
    context: CUcontext,
    stream: CUstream,
    /// Page-locked memory for writes; none where the machine has none to give.
    staging: RefCell<Option<Staging>>,
    cache: Cache,
    modules: RefCell<HashMap<Build, CUmodule>>,
    /// Entries of the functions handed out, for errors.
    names: RefCell<HashMap<Function, String>>,
    graphs: RefCell<Vec<Graph>>,
    capturing: Cell<bool>,
    /// Freed while launches were being recorded, when the stream cannot be waited for.
    freed_late: RefCell<Vec<Address>>,
    /// Graphs dropped then, likewise.
    dropped_late: RefCell<Vec<Graph>>,
    /// The first failure that ended the context.
    lost: RefCell<Option<String>>,
}

// SAFETY: the pointers are names that the driver gave. It takes them from any thread on which their
// context is current, and every method makes it current first.
unsafe impl Send for Gpu {}

impl Gpu {
    /// Opens `cuda:ordinal`: driver and device must be there, and either `REDRAFT_KERNELS_DIR`
    /// holds kernels for the device or NVRTC is there and knows it.
    pub fn open(ordinal: usize) -> Result<Gpu> {
        let info = probe(ordinal)?;
        let (functions, prebuilt) = (functions()?, Prebuilt::named()?);
        let arch = match prebuilt.as_ref().and_then(|prebuilt| prebuilt.arch_for(info.compute_capability)) {
            Some(arch) => arch.to_owned(),
            None => {
                let compiler = compiler().map_err(|error| match &prebuilt {
                    Some(prebuilt) => Error::device(format!("{info}: {}, and {error}", prebuilt.describe())),
                    None => error,
                })?;
                arch_for(&info, compiler.architectures(), compiler.version())?
            }
        };
        let check = |call: &str, code: c_int| checked(ordinal, call, code);

        let (mut version, mut device): (c_int, CUdevice) = (0, 0);
        let (mut context, mut stream): (CUcontext, CUstream) = (null_mut(), null_mut());
        // SAFETY: both results are writable; `probe` has initialised the driver and found the
        // ordinal.
        check("cuDriverGetVersion", unsafe { (functions.driver_get_version)(&mut version) })?;
        // SAFETY: as above; an ordinal that exists fits an int.
        check("cuDeviceGet", unsafe { (functions.device_get)(&mut device, ordinal as c_int) })?;
        let attribute = |which: CUdevice_attribute| -> Result<u32> {
            let mut value: c_int = 0;
            // SAFETY: `value` is writable and `device` came from cuDeviceGet.
            check("cuDeviceGetAttribute", unsafe { (functions.device_get_attribute)(&mut value, which, device) })?;
            u32::try_from(value).map_err(|_| Error::device(format!("cuda:{ordinal}: the driver reports {value} for {which:?}")))
        };
        let num_sms = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared_per_cta = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;

        // SAFETY: `context` is writable and the device exists. Released when the value below is
        // dropped, or on failure here.
        check("cuDevicePrimaryCtxRetain", unsafe { (functions.primary_context_retain)(&mut context, device) })?;
        // SAFETY: the context is live; `stream` is writable.
        let opened = check("cuCtxSetCurrent", unsafe { (functions.context_set_current)(context) }).and_then(|()| {
            // SAFETY: the context is current; `stream` is writable.
            check("cuStreamCreate", unsafe { (functions.stream_create)(&mut stream, CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint) })
        });
        if let Err(error) = opened {
            // SAFETY: retained above, released once.
            unsafe { (functions.primary_context_release)(device) };
            return Err(error);
        }
        let version = version.unsigned_abs();
        let mut gpu = Gpu {
            functions,
            prebuilt,
            info,
            arch,
            driver_version: (version / 1000, version % 1000 / 10),
            limits: Limits { num_sms, shared_per_cta, memory_bytes: 0, free_bytes: 0 },
            device,
            context,
            stream,
            staging: RefCell::new(Staging::new(functions)),
            cache: Cache::open(),
            modules: RefCell::default(),
            names: RefCell::default(),
            graphs: RefCell::default(),
            capturing: Cell::new(false),
            freed_late: RefCell::default(),
            dropped_late: RefCell::default(),
            lost: RefCell::default(),
        };
        (gpu.limits.free_bytes, gpu.limits.memory_bytes) = gpu.memory()?;
        Ok(gpu)
    }

    /// The functions, with the context current; an error if the context is lost.
    fn enter(&self) -> Result<&'static CudaFunctions> {
        if let Some(first) = self.lost.borrow().as_ref() {
            return Err(errors::lost(first));
        }
        // SAFETY: the context was retained by `open` and lives as long as this value.
        self.check("cuCtxSetCurrent", unsafe { (self.functions.context_set_current)(self.context) })?;
        Ok(self.functions)
    }

    /// As [`Gpu::enter`], for what cannot be recorded.
    fn enter_outside_capture(&self, what: &str) -> Result<&'static CudaFunctions> {
        if self.capturing.get() {
            return Err(Error::device(format!("cuda:{}: {what} between begin_capture and end_capture", self.info.ordinal)));
        }
        self.enter()
    }

    fn check(&self, call: &str, code: c_int) -> Result<()> {
        let outcome = checked(self.info.ordinal, call, code);
        if let Err(error) = &outcome
            && errors::DriverError::from_code(code).is_sticky()
        {
            self.lost.borrow_mut().get_or_insert_with(|| error.to_string());
        }
        outcome
    }

    /// Device memory free and in all.
    fn memory(&self) -> Result<(u64, u64)> {
        let f = self.enter()?;
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: both are writable, and the context is current.
        self.check("cuMemGetInfo", unsafe { (f.mem_get_info)(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }

    /// The module of a build: loaded before, built beforehand, from the cache, or compiled now.
    fn module(&self, build: &Build) -> Result<CUmodule> {
        if let Some(module) = self.modules.borrow().get(build) {
            return Ok(*module);
        }
        prebuilt::log(build)?;
        let module = match self.prebuilt_module(build) {
            Ok(module) => module,
            Err(missing) => self.built_module(build).map_err(|error| match missing {
                Some(missing) => Error::device(format!("{missing}, and {error}")),
                None => error,
            })?,
        };
        self.modules.borrow_mut().insert(build.clone(), module);
        Ok(module)
    }

    /// The module of a cubin of the named directory. Errors: why there is none, where a directory
    /// is named.
    fn prebuilt_module(&self, build: &Build) -> std::result::Result<CUmodule, Option<String>> {
        let prebuilt = self.prebuilt.as_ref().ok_or(None)?;
        let cubin = prebuilt.find(&kernel(build.stem), build, &self.arch).map_err(Some)?;
        self.load(&portable_identity(&kernel(build.stem), build, &self.arch), &cubin, None).map_err(|error| Some(error.to_string()))
    }

    /// The module of a cubin that this machine's NVRTC wrote, earlier or now.
    fn built_module(&self, build: &Build) -> Result<CUmodule> {
        let compiler = compiler()?;
        let identity = identity(&kernel(build.stem), build, &self.arch, compiler.identity());
        let load = |cubin: &[u8]| self.load(&identity, cubin, Some(compiler.version()));
        // An entry that the driver refuses is built again: it is either not what was written, or
        // the error comes again from the fresh one.
        if let Some(module) = self.cache.get(&identity, "cubin").and_then(|cubin| load(&cubin).ok()) {
            return Ok(module);
        }
        let cubin = compiler.compile(&kernel(build.stem), build, &self.arch)?.cubin;
        let module = load(&cubin)?;
        self.cache.store(&identity, "cubin", &cubin);
        Ok(module)
    }

    /// `nvrtc`: major and minor of the compiler that wrote the cubin, where it is known.
    fn load(&self, identity: &str, cubin: &[u8], nvrtc: Option<(u32, u32)>) -> Result<CUmodule> {
        let f = self.enter()?;
        let mut module: CUmodule = null_mut();
        // SAFETY: `cubin` is a whole ELF image from NVRTC, which carries its own size, checked by
        // the cache's checksum where it comes from there; the driver copies it.
        let code = unsafe { (f.module_load_data)(&mut module, cubin.as_ptr().cast()) };
        if let Some(nvrtc) = nvrtc.filter(|_| errors::DriverError::from_code(code) == errors::DriverError::OldDriver) {
            return Err(errors::unusable_code(self.info.ordinal, identity, &describe(code), self.driver_version, nvrtc));
        }
        self.check(&format!("cuModuleLoadData of {identity}"), code)?;
        Ok(module)
    }

    /// Destroys a graph once no launch of it is under way: what the driver promises for one that
    /// still runs differs between versions.
    fn destroy(&self, graph: Graph) {
        if let Ok(f) = self.enter() {
            // SAFETY: the graph came from `end_capture` and is destroyed once, after the wait.
            let codes = unsafe { [(f.stream_synchronize)(self.stream), (f.graph_exec_destroy)(graph.0 as CUgraphExec)] };
            let _ = self.check("cuStreamSynchronize", codes[0]).and_then(|()| self.check("cuGraphExecDestroy", codes[1]));
        }
    }

    /// Frees now. Errors cannot be returned; a sticky one is kept for the next call.
    fn free_now(&self, address: Address) {
        if let Ok(f) = self.enter() {
            // SAFETY: `address` came from `alloc`, is freed once by its owner, and the stream is
            // done with it after the wait.
            let codes = unsafe { [(f.stream_synchronize)(self.stream), (f.mem_free)(address)] };
            let _ = self.check("cuStreamSynchronize", codes[0]).and_then(|()| self.check("cuMemFree", codes[1]));
        }
    }
}

fn checked(ordinal: usize, call: &str, code: c_int) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS as c_int { Ok(()) } else { Err(errors::failed(ordinal, call, &describe(code), code)) }
}

/// The architecture to compile for: the device's own where NVRTC knows it, else the closest older
/// one of the same generation, whose machine code the device also runs. sm_90 gets its `a`, which
/// opens the instructions of that one chip.
fn arch_for(info: &DeviceInfo, known: &[u32], nvrtc: (u32, u32)) -> Result<String> {
    let (major, minor) = info.compute_capability;
    if major < 8 {
        return Err(Error::device(format!("{info}: the kernels need sm_80 or later; use --device cpu")));
    }
    let own = 10 * major + minor;
    match known.iter().filter(|arch| **arch / 10 == major && **arch <= own).max() {
        Some(90) => Ok("sm_90a".into()),
        Some(arch) => Ok(format!("sm_{arch}")),
        None => Err(Error::device(format!(
            "{info}: NVRTC {}.{} is older than this device and knows up to sm_{}; install a newer CUDA toolkit or `pip install \
             --upgrade nvidia-cuda-nvrtc`, and set REDRAFT_NVRTC_DIR to its directory",
            nvrtc.0,
            nvrtc.1,
            known.last().copied().unwrap_or(0)
        ))),
    }
}

impl Driver for Gpu {
    fn name(&self) -> String {
        self.info.to_string()
    }

    fn arch(&self) -> String {
        self.arch.clone()
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn alloc(&self, bytes: usize) -> Result<Address> {
        let f = self.enter()?;
        let mut address: Address = 0;
        // SAFETY: `address` is writable, and the context is current.
        let code = unsafe { (f.mem_alloc)(&mut address, bytes.max(1)) };
        if errors::DriverError::from_code(code) == errors::DriverError::OutOfMemory {
            let (free, total) = self.memory()?;
            return Err(errors::out_of_memory(self.info.ordinal, bytes, free, total));
        }
        self.check("cuMemAlloc", code)?;
        Ok(address)
    }

    fn free(&self, address: Address) {
        if self.capturing.get() {
            self.freed_late.borrow_mut().push(address);
        } else {
            self.free_now(address);
        }
    }

    fn write(&self, dst: Address, src: &[u8]) -> Result<()> {
        let f = self.enter_outside_capture("write")?;
        if let Some(staging) = self.staging.borrow_mut().as_mut() {
            return staging.write(f, self.stream, dst, src, &|call, code| self.check(call, code));
        }
        // SAFETY: the caller's buffer at `dst` holds as many bytes, and `src` is not touched before
        // the copy is over.
        self.check("cuMemcpyHtoDAsync", unsafe { (f.copy_to_device)(dst, src.as_ptr().cast(), src.len(), self.stream) })?;
        self.synchronize()
    }

    fn read(&self, src: Address, dst: &mut [u8]) -> Result<()> {
        let f = self.enter_outside_capture("read")?;
        let mut staging = self.staging.borrow_mut();
        let mut place = staging.as_mut().and_then(|staging| staging.readback(dst.len()));
        let target: *mut c_void = place.as_mut().map_or(dst.as_mut_ptr().cast(), |place| place.as_mut_ptr().cast());
        if !dst.is_empty() {
            // SAFETY: `target` holds `dst.len()` bytes and is not touched before the wait
            // below; the caller's buffer at `src` holds as many.
            self.check("cuMemcpyDtoHAsync", unsafe { (f.copy_to_host)(target, src, dst.len(), self.stream) })?;
        }
        // SAFETY: the stream is this value's own.
        self.check("cuStreamSynchronize", unsafe { (f.stream_synchronize)(self.stream) })?;
        if let Some(place) = place {
            dst.copy_from_slice(place);
        }
        Ok(())
    }

    fn copy(&self, src: Address, dst: Address, bytes: usize) -> Result<()> {
        let f = self.enter_outside_capture("copy")?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's buffers hold `bytes` at both addresses.
        self.check("cuMemcpyDtoDAsync", unsafe { (f.copy_on_device)(dst, src, bytes, self.stream) })
    }

    fn fill(&self, dst: Address, word: u32, words: usize) -> Result<()> {
        let f = self.enter_outside_capture("fill")?;
        if words == 0 {
            return Ok(());
        }
        // SAFETY: the caller's buffer holds `words` words.
        self.check("cuMemsetD32Async", unsafe { (f.memset_d32)(dst, word, words, self.stream) })
    }

    fn synchronize(&self) -> Result<()> {
        let f = self.enter_outside_capture("synchronize")?;
        // SAFETY: the stream is this value's own.
        self.check("cuStreamSynchronize", unsafe { (f.stream_synchronize)(self.stream) })
    }

    fn function(&self, build: &Build, entry: &str) -> Result<Function> {
        let f = self.enter()?;
        let module = self.module(build)?;
        let name = CString::new(entry).map_err(|_| Error::kernel(format!("{entry:?}: a NUL byte in the name of an entry")))?;
        let mut function: CUfunction = null_mut();
        // SAFETY: the module is loaded, the name NUL-terminated, the result writable.
        self.check(&format!("cuModuleGetFunction of {entry}"), unsafe { (f.module_get_function)(&mut function, module, name.as_ptr()) })?;
        let mut fixed: c_int = 0;
        let (shared, dynamic) = (
            CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
            CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        );
        // SAFETY: the function is loaded, the result writable.
        self.check("cuFuncGetAttribute", unsafe { (f.function_get_attribute)(&mut fixed, shared, function) })?;
        let room = (self.limits.shared_per_cta as c_int - fixed).max(0);
        // SAFETY: the function is loaded; the limit is what the device has beside the function's
        // static part.
        self.check("cuFuncSetAttribute", unsafe { (f.function_set_attribute)(function, dynamic, room) })?;
        let function = Function(function as usize);
        self.names.borrow_mut().insert(function, entry.to_owned());
        Ok(function)
    }

    fn launch(&self, function: Function, launch: Launch, params: &[u8]) -> Result<()> {
        let f = self.enter()?;
        assert!(params.len() <= MAX_PARAMS, "{} bytes of parameters", params.len());
        let Launch { grid: [x, y, z], block, shared_bytes } = launch;
        // The driver wants 8-byte alignment for the addresses inside, which a slice of bytes does
        // not promise.
        let mut aligned = [0u64; MAX_PARAMS / 8];
        bytemuck::cast_slice_mut::<u64, u8>(&mut aligned)[..params.len()].copy_from_slice(params);
        let mut pointers: [*mut c_void; 1] = [aligned.as_mut_ptr().cast()];
        let (pointers, none) = (pointers.as_mut_ptr(), null_mut());
        // SAFETY: the function was loaded by `function` and its module lives as long as this value.
        // Its one parameter is a struct of `params.len()` bytes, which the layout checks of
        // `params!` and FIELD/LAYOUT state on both sides; the driver copies it.
        let code = unsafe { (f.launch_kernel)(function.0 as CUfunction, x, y, z, block, 1, 1, shared_bytes, self.stream, pointers, none) };
        if code == CUresult::CUDA_SUCCESS as c_int {
            return Ok(());
        }
        let entry = self.names.borrow().get(&function).cloned().unwrap_or_else(|| "an unknown entry".to_owned());
        self.check(&format!("cuLaunchKernel of {entry} (grid {x} x {y} x {z}, {block} threads, {shared_bytes} B dynamic shared)"), code)
    }

    fn begin_capture(&self) -> Result<()> {
        if self.capturing.get() {
            // An earlier recording broke off in an error and is abandoned here.
            let _ = self.end_capture().map(|graph| self.drop_graph(graph));
        }
        let f = self.enter()?;
        // Relaxed: a kernel that is used for the first time is loaded while others are being
        // recorded.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is this value's own and not recording.
        self.check("cuStreamBeginCapture", unsafe { (f.stream_begin_capture)(self.stream, mode) })?;
        self.capturing.set(true);
        Ok(())
    }

    fn end_capture(&self) -> Result<Graph> {
        let f = self.enter()?;
        assert!(self.capturing.replace(false), "end_capture without begin_capture");
        let (mut recorded, mut runnable): (CUgraph, CUgraphExec) = (null_mut(), null_mut());
        // SAFETY: the stream is recording; the result is writable.
        let outcome = self.check("cuStreamEndCapture", unsafe { (f.stream_end_capture)(self.stream, &mut recorded) }).and_then(|()| {
            // SAFETY: the recording just ended; the result is writable. The recording itself is not
            // needed after.
            let codes = unsafe { [(f.graph_instantiate)(&mut runnable, recorded, 0), (f.graph_destroy)(recorded)] };
            self.check("cuGraphInstantiate", codes[0]).and_then(|()| self.check("cuGraphDestroy", codes[1]))
        });
        self.freed_late.take().into_iter().for_each(|address| self.free_now(address));
        self.dropped_late.take().into_iter().for_each(|graph| self.destroy(graph));
        outcome?;
        let graph = Graph(runnable as usize);
        self.graphs.borrow_mut().push(graph);
        Ok(graph)
    }

    fn is_capturing(&self) -> bool {
        self.capturing.get()
    }

    fn launch_graph(&self, graph: Graph) -> Result<()> {
        let f = self.enter_outside_capture("launch_graph")?;
        // SAFETY: the graph came from `end_capture` and has not been dropped.
        self.check("cuGraphLaunch", unsafe { (f.graph_launch)(graph.0 as CUgraphExec, self.stream) })
    }

    fn drop_graph(&self, graph: Graph) {
        self.graphs.borrow_mut().retain(|known| *known != graph);
        if self.capturing.get() {
            self.dropped_late.borrow_mut().push(graph);
        } else {
            self.destroy(graph);
        }
    }

    fn stream(&self) -> std::result::Result<usize, String> {
        self.enter_outside_capture("a library's call").map_err(|error| error.to_string())?;
        Ok(self.stream as usize)
    }

    fn push_range(&self, name: &str) {
        nvtx::push(name);
    }

    fn pop_range(&self) {
        nvtx::pop();
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        let f = self.functions;
        // SAFETY: everything below was made by this value and is destroyed once. After a lost
        // context the calls fail and do nothing; their codes are dropped.
        unsafe {
            (f.context_set_current)(self.context);
            (f.stream_synchronize)(self.stream);
            for graph in self.graphs.take() {
                (f.graph_exec_destroy)(graph.0 as CUgraphExec);
            }
            for module in self.modules.take().into_values() {
                (f.module_unload)(module);
            }
            if let Some(staging) = self.staging.take() {
                staging.release(f);
            }
            (f.stream_destroy)(self.stream);
            (f.primary_context_release)(self.device);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(major: u32, minor: u32) -> DeviceInfo {
        DeviceInfo { ordinal: 0, name: "Stub".into(), compute_capability: (major, minor), memory_bytes: 1 << 33 }
    }

    #[test]
    fn one_architecture_per_device() {
        let known = [75, 80, 86, 87, 89, 90, 100, 103, 120];
        let arch = |major, minor| arch_for(&device(major, minor), &known, (13, 0));
        for ((major, minor), expected) in
            [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100"), ((12, 1), "sm_120")]
        {
            assert_eq!(arch(major, minor).unwrap(), expected);
        }
        let text = arch(7, 5).unwrap_err().to_string();
        assert!(text.contains("need sm_80 or later"), "{text}");
        let text = arch(13, 0).unwrap_err().to_string();
        assert!(text.contains("NVRTC 13.0 is older than this device and knows up to sm_120; install a newer"), "{text}");
        assert!(arch_for(&device(9, 0), &[75, 80], (11, 2)).is_err());
    }

    #[test]
    fn moves_between_threads() {
        fn moves<T: Send>() {}
        moves::<Gpu>();
    }
}
