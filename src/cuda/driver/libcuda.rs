//! Table of driver functions that running kernels needs, looked up one by one in libcuda.
//!
//! Result codes, handles and device addresses are the plain integers they are: a foreign code is
//! never read as an enum, and a value that holds handles crosses threads like any other number.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys;
use libloading::Library;

use crate::cuda::driver::library::symbol;
use crate::error::{Error, Result};

/// A context, stream, module, function, graph or event of the driver: an opaque pointer, 0 for
/// none.
pub(in crate::cuda) type RawHandle = usize;

macro_rules! functions {
    ($($(#[$doc:meta])* $field:ident = $symbol:literal ($($arg:ty),*);)*) => {
        /// Signatures from cuda.h; CUresult and CUdevice are int.
        pub(in crate::cuda) struct CudaFunctions {
            $($(#[$doc])* pub $field: unsafe extern "C" fn($($arg),*) -> c_int,)*
        }

        impl CudaFunctions {
            fn load(library: &'static Library) -> Result<CudaFunctions> {
                // SAFETY: the signatures above are those of cuda.h, and the library is never
                // closed.
                unsafe { Ok(CudaFunctions { $($field: symbol(library, $symbol)?,)* }) }
            }
        }
    };
}

functions! {
    driver_get_version = "cuDriverGetVersion" (*mut c_int);
    device_get = "cuDeviceGet" (*mut c_int, c_int);
    device_get_attribute = "cuDeviceGetAttribute" (*mut c_int, c_int, c_int);
    primary_context_retain = "cuDevicePrimaryCtxRetain" (*mut RawHandle, c_int);
    primary_context_release = "cuDevicePrimaryCtxRelease_v2" (c_int);
    context_set_current = "cuCtxSetCurrent" (RawHandle);
    stream_create = "cuStreamCreate" (*mut RawHandle, c_uint);
    stream_destroy = "cuStreamDestroy_v2" (RawHandle);
    stream_synchronize = "cuStreamSynchronize" (RawHandle);
    stream_begin_capture = "cuStreamBeginCapture_v2" (RawHandle, c_int);
    stream_end_capture = "cuStreamEndCapture" (RawHandle, *mut RawHandle);
    mem_alloc = "cuMemAlloc_v2" (*mut u64, usize);
    mem_free = "cuMemFree_v2" (u64);
    mem_get_info = "cuMemGetInfo_v2" (*mut usize, *mut usize);
    /// Page-locked host memory, which copies run from without a stop.
    mem_host_alloc = "cuMemHostAlloc" (*mut RawHandle, usize, c_uint);
    mem_free_host = "cuMemFreeHost" (RawHandle);
    copy_to_device = "cuMemcpyHtoDAsync_v2" (u64, *const c_void, usize, RawHandle);
    copy_to_host = "cuMemcpyDtoHAsync_v2" (*mut c_void, u64, usize, RawHandle);
    copy_on_device = "cuMemcpyDtoDAsync_v2" (u64, u64, usize, RawHandle);
    /// (address, word, number of words, stream).
    memset_d32 = "cuMemsetD32Async" (u64, c_uint, usize, RawHandle);
    event_create = "cuEventCreate" (*mut RawHandle, c_uint);
    event_destroy = "cuEventDestroy_v2" (RawHandle);
    event_record = "cuEventRecord" (RawHandle, RawHandle);
    event_synchronize = "cuEventSynchronize" (RawHandle);
    module_load_data = "cuModuleLoadData" (*mut RawHandle, *const c_void);
    module_unload = "cuModuleUnload" (RawHandle);
    module_get_function = "cuModuleGetFunction" (*mut RawHandle, RawHandle, *const c_char);
    function_get_attribute = "cuFuncGetAttribute" (*mut c_int, c_int, RawHandle);
    function_set_attribute = "cuFuncSetAttribute" (RawHandle, c_int, c_int);
    /// (function, grid x y z, block x y z, dynamic shared bytes, stream, pointers to the
    /// parameters, extra).
    launch_kernel = "cuLaunchKernel"
        (RawHandle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, RawHandle, *mut *mut c_void, *mut *mut c_void);
    graph_instantiate = "cuGraphInstantiateWithFlags" (*mut RawHandle, RawHandle, u64);
    graph_destroy = "cuGraphDestroy" (RawHandle);
    graph_exec_destroy = "cuGraphExecDestroy" (RawHandle);
    graph_launch = "cuGraphLaunch" (RawHandle, RawHandle);
}

/// The library, opened once.
pub(in crate::cuda) fn library() -> Result<&'static Library> {
    // SAFETY: opens and closes the library by name; the driver's initialisers may run at any time
    // before use.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::device("no CUDA driver: libcuda cannot be opened; install the NVIDIA driver, or use --device cpu"));
    }
    // SAFETY: the library is present by the check above, which is all that keeps this from
    // panicking.
    Ok(unsafe { sys::culib() })
}

/// The table, looked up once.
pub(in crate::cuda) fn functions() -> Result<&'static CudaFunctions> {
    static FUNCTIONS: OnceLock<Result<CudaFunctions>> = OnceLock::new();
    FUNCTIONS.get_or_init(|| CudaFunctions::load(library()?)).as_ref().map_err(Error::clone)
}
