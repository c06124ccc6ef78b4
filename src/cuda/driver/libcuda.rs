//! Table of driver functions that running kernels needs, looked up one by one in libcuda, with
//! cudarc's types.
//!
//! Result codes are plain integers: a foreign code is never read as an enum.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys;
use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent, CUfunction, CUfunction_attribute, CUgraph, CUgraphExec, CUmodule,
    CUresult, CUstream, CUstreamCaptureMode,
};
use libloading::Library;

use crate::cuda::driver::library::function_table;
use crate::error::{Error, Result};

function_table! { CudaFunctions, CUresult;
    driver_get_version = cuDriverGetVersion(*mut c_int);
    device_get = cuDeviceGet(*mut CUdevice, c_int);
    device_get_attribute = cuDeviceGetAttribute(*mut c_int, CUdevice_attribute, CUdevice);
    primary_context_retain = cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
    primary_context_release = cuDevicePrimaryCtxRelease_v2(CUdevice);
    context_set_current = cuCtxSetCurrent(CUcontext);
    stream_create = cuStreamCreate(*mut CUstream, c_uint);
    stream_destroy = cuStreamDestroy_v2(CUstream);
    stream_synchronize = cuStreamSynchronize(CUstream);
    stream_begin_capture = cuStreamBeginCapture_v2(CUstream, CUstreamCaptureMode);
    stream_end_capture = cuStreamEndCapture(CUstream, *mut CUgraph);
    mem_alloc = cuMemAlloc_v2(*mut CUdeviceptr, usize);
    mem_free = cuMemFree_v2(CUdeviceptr);
    mem_get_info = cuMemGetInfo_v2(*mut usize, *mut usize);
    /// Page-locked host memory, which copies run from without a stop.
    mem_host_alloc = cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
    mem_free_host = cuMemFreeHost(*mut c_void);
    copy_to_device = cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
    copy_to_host = cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream);
    copy_on_device = cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, usize, CUstream);
    /// (address, word, number of words, stream).
    memset_d32 = cuMemsetD32Async(CUdeviceptr, c_uint, usize, CUstream);
    event_create = cuEventCreate(*mut CUevent, c_uint);
    event_destroy = cuEventDestroy_v2(CUevent);
    event_record = cuEventRecord(CUevent, CUstream);
    event_synchronize = cuEventSynchronize(CUevent);
    module_load_data = cuModuleLoadData(*mut CUmodule, *const c_void);
    module_unload = cuModuleUnload(CUmodule);
    module_get_function = cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
    function_get_attribute = cuFuncGetAttribute(*mut c_int, CUfunction_attribute, CUfunction);
    function_set_attribute = cuFuncSetAttribute(CUfunction, CUfunction_attribute, c_int);
    /// (function, grid x y z, block x y z, dynamic shared bytes, stream, pointers to the
    /// parameters, extra).
    launch_kernel = cuLaunchKernel(
        CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream, *mut *mut c_void, *mut *mut c_void,
    );
    graph_instantiate = cuGraphInstantiateWithFlags(*mut CUgraphExec, CUgraph, c_ulonglong);
    graph_destroy = cuGraphDestroy(CUgraph);
    graph_exec_destroy = cuGraphExecDestroy(CUgraphExec);
    graph_launch = cuGraphLaunch(CUgraphExec, CUstream);
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
