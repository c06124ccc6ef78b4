//! What crosses the border: pointers that C hands in, memory that C owns afterwards.

use std::ffi::{CStr, c_char, c_void};

use crate::status::Failure;

/// The text behind a pointer.
///
/// # Safety
///
/// `text` is NULL, or points to bytes that end with a zero and stay as they are for `'a`.
pub(crate) unsafe fn text<'a>(name: &str, text: *const c_char) -> Result<&'a str, Failure> {
    if text.is_null() {
        return Err(Failure::argument(format!("{name}: expected a text, found NULL")));
    }
    // SAFETY: not NULL, and the caller's contract covers the rest.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|e| Failure::argument(format!("{name}: expected UTF-8, found a byte that is none at {}", e.valid_up_to())))
}

/// [`text`] that may be NULL.
///
/// # Safety
///
/// As of [`text`].
pub(crate) unsafe fn optional_text<'a>(name: &str, pointer: *const c_char) -> Result<Option<&'a str>, Failure> {
    // SAFETY: passed on.
    if pointer.is_null() { Ok(None) } else { unsafe { text(name, pointer) }.map(Some) }
}

/// What a handle points to.
///
/// # Safety
///
/// `pointer` is NULL, or came from this library and was not freed.
pub(crate) unsafe fn handle<'a, T>(name: &str, pointer: *const T) -> Result<&'a T, Failure> {
    // SAFETY: by the contract above; handles are shared, never borrowed mutably.
    unsafe { pointer.as_ref() }.ok_or_else(|| Failure::argument(format!("{name}: expected a handle, found NULL")))
}

/// `len` numbers behind a pointer.
///
/// # Safety
///
/// `pointer` is NULL, or points to `len` numbers that stay as they are for `'a`.
pub(crate) unsafe fn numbers<'a, T>(name: &str, pointer: *const T, len: usize) -> Result<&'a [T], Failure> {
    match (pointer.is_null(), len) {
        (_, 0) => Ok(&[]),
        (true, _) => Err(Failure::argument(format!("{name}: expected {len} numbers, found NULL"))),
        // SAFETY: not NULL, and `len` long by the contract above.
        (false, _) => Ok(unsafe { std::slice::from_raw_parts(pointer, len) }),
    }
}

/// A place for one result of a call.
pub(crate) struct Out<T>(*mut T);

impl<T> Out<T> {
    /// # Safety
    ///
    /// `place` is NULL, or may be written to while the call lasts.
    pub(crate) unsafe fn new(name: &str, place: *mut T) -> Result<Out<T>, Failure> {
        if place.is_null() {
            return Err(Failure::argument(format!("{name}: expected a place for the result, found NULL")));
        }
        Ok(Out(place))
    }

    /// One that callers who do not need it leave out.
    ///
    /// # Safety
    ///
    /// As of [`Out::new`].
    pub(crate) unsafe fn optional(place: *mut T) -> Out<T> {
        Out(place)
    }

    pub(crate) fn set(&self, value: T) {
        if !self.0.is_null() {
            // SAFETY: the contract of the constructors. What was there is the caller's, and is not
            // dropped.
            unsafe { self.0.write(value) };
        }
    }
}

/// A copy that `redraft_free` frees.
pub(crate) fn owned_numbers<T: Copy>(numbers: &[T]) -> Result<*mut T, Failure> {
    // SAFETY: malloc has no preconditions. One byte at least, so that NULL means out of memory.
    let copy = unsafe { libc::malloc(size_of_val(numbers).max(1)) }.cast::<T>();
    if copy.is_null() {
        return Err(Failure::state(format!("out of memory: {} bytes", size_of_val(numbers))));
    }
    // SAFETY: `copy` is new, as long as `numbers`, and malloc aligns for every number.
    unsafe { std::ptr::copy_nonoverlapping(numbers.as_ptr(), copy, numbers.len()) };
    Ok(copy)
}

/// A copy that ends with a zero and that `redraft_free` frees.
pub(crate) fn owned_text(text: &str) -> Result<*mut c_char, Failure> {
    owned_numbers(&[text.as_bytes(), &[0]].concat()).map(<*mut u8>::cast)
}

/// Frees what [`owned_numbers`] made.
///
/// # Safety
///
/// `memory` is NULL, or came from [`owned_numbers`] and was not freed.
pub(crate) unsafe fn free(memory: *mut c_void) {
    // SAFETY: by the contract above it came from malloc.
    unsafe { libc::free(memory) }
}
