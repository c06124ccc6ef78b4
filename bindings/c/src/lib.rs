//! C interface of redraft: opaque handles, a status from every call, settings and requests as JSON.
//!
//! No layout of a struct crosses: what C sees are pointers, numbers and texts. Every call ends in
//! [`status::call`], which turns errors and panics into a status and the text of
//! `redraft_last_error`. `include/redraft.h` is written from these files by cbindgen; a test
//! compares the two. Events wait in the engine's own stream; whoever waits polls it with a waker
//! and holds no lock meanwhile, so that a request can be cancelled by another thread.

use std::ffi::{c_char, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

mod callback;
mod engine_handle;
mod memory;
mod request;
mod status;

/// Version of the binary interface, which the name of the shared library ends with
/// (`libredraft.so.0`). Calls and numbers are only added while it stays the same.
pub const ABI_VERSION: u32 = 0;

/// The value of REDRAFT_ABI_VERSION that the library was built with.
#[unsafe(no_mangle)]
pub extern "C" fn redraft_abi_version() -> u32 {
    ABI_VERSION
}

/// Version of the library, such as `0.1.0`. Valid for ever.
#[unsafe(no_mangle)]
pub extern "C" fn redraft_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// Text of the last error in this thread, empty before the first: the file, key or argument, what
/// was expected and what was found. Valid until the thread's next error.
#[unsafe(no_mangle)]
pub extern "C" fn redraft_last_error() -> *const c_char {
    status::last_error()
}

/// Frees a text or an array that a call gave to its caller. NULL is fine.
///
/// # Safety
///
/// `memory` is NULL, or came from a call that says so and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_free(memory: *mut c_void) {
    // SAFETY: passed on.
    unsafe { memory::free(memory) }
}

/// Whoever panicked with the lock has told it by the status of its call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
