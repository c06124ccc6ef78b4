//! Named ranges for profilers through NVTX. Where no NVTX library is installed, a range costs one
//! load and one branch.

use std::ffi::{CString, c_char, c_int};
use std::sync::OnceLock;

use libloading::Library;

/// CUDA 13 ships the second name only, older toolkits the first. The bare names exist where
/// development files are installed.
const NAMES: [&str; 4] = ["libnvToolsExt.so.1", "libnvtx3interop.so.1", "libnvToolsExt.so", "libnvtx3interop.so"];

struct Nvtx {
    push: unsafe extern "C" fn(*const c_char) -> c_int,
    pop: unsafe extern "C" fn() -> c_int,
}

fn nvtx() -> Option<&'static Nvtx> {
    static NVTX: OnceLock<Option<Nvtx>> = OnceLock::new();
    NVTX.get_or_init(|| NAMES.iter().find_map(|name| open(name))).as_ref()
}

fn open(name: &str) -> Option<Nvtx> {
    // SAFETY: NVIDIA's library by its own name; its initialisers may run at any time.
    let library = unsafe { Library::new(name) }.ok()?;
    // SAFETY: the signatures are those of nvToolsExt.h, and the library is kept open below.
    let (push, pop) = unsafe { (*library.get(b"nvtxRangePushA\0").ok()?, *library.get(b"nvtxRangePop\0").ok()?) };
    // Functions of it are kept for the life of the process.
    Box::leak(Box::new(library));
    Some(Nvtx { push, pop })
}

/// Opens a range on this thread.
pub(in crate::cuda) fn push(name: &str) {
    if let Some(nvtx) = nvtx() {
        // A name with a NUL byte still opens a range, so that pops match.
        let name = CString::new(name).unwrap_or_default();
        // SAFETY: the string is NUL-terminated and copied by the call.
        unsafe { (nvtx.push)(name.as_ptr()) };
    }
}

/// Closes the innermost range of this thread.
pub(in crate::cuda) fn pop() {
    if let Some(nvtx) = nvtx() {
        // SAFETY: takes nothing; without an open range it returns a negative number.
        unsafe { (nvtx.pop)() };
    }
}
