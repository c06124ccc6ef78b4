//! Status of a call, the text of its error, and the one place where panics end.

use std::cell::RefCell;
use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};

use engine::Error;

/// What a call came to. Below zero: an error, of which `redraft_last_error` has the text. Numbers
/// keep their meaning; later versions may add some.
#[allow(clippy::enum_variant_names)] // the names that C sees, where enums have no scope
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    RedraftOk = 0,
    /// Nothing came within the time that the call was given.
    RedraftTimeout = 1,
    /// The request is finished and its last event was told.
    RedraftEnd = 2,
    /// An argument is NULL or no UTF-8.
    RedraftErrorArgument = -1,
    /// The call does not fit the state of its handle: a result before the end, a second waiter.
    RedraftErrorState = -2,
    /// The model's config.json is absent, malformed or describes something unsupported.
    RedraftErrorConfig = -3,
    /// A weight file is absent or malformed.
    RedraftErrorWeights = -4,
    /// The tokenizer is absent, malformed, or does not fit the model.
    RedraftErrorTokenizer = -5,
    /// The request or the settings cannot be served as asked: the text names the key.
    RedraftErrorRequest = -6,
    /// The request is larger than all K/V pages together.
    RedraftErrorOutOfPages = -7,
    /// The device is absent or refused.
    RedraftErrorDevice = -8,
    /// A kernel failed, or produced numbers that cannot be used.
    RedraftErrorKernel = -9,
    /// The operating system refused a read or a write.
    RedraftErrorIo = -10,
    /// The engine was closed, or ended, before the request did.
    RedraftErrorEngineGone = -11,
    /// A fault of the library: a panic was caught, and the text is what it said.
    RedraftErrorPanic = -12,
}

/// An error on its way to the caller.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) status: Status,
    pub(crate) text: String,
}

impl Failure {
    pub(crate) fn argument(text: impl Into<String>) -> Failure {
        Failure { status: Status::RedraftErrorArgument, text: text.into() }
    }

    pub(crate) fn state(text: impl Into<String>) -> Failure {
        Failure { status: Status::RedraftErrorState, text: text.into() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let status = match &error {
            Error::Config { .. } => Status::RedraftErrorConfig,
            Error::Weights { .. } => Status::RedraftErrorWeights,
            Error::Tokenizer { .. } => Status::RedraftErrorTokenizer,
            Error::Request { .. } => Status::RedraftErrorRequest,
            Error::OutOfPages { .. } => Status::RedraftErrorOutOfPages,
            Error::Device { .. } => Status::RedraftErrorDevice,
            Error::Kernel { .. } => Status::RedraftErrorKernel,
            Error::Io { .. } => Status::RedraftErrorIo,
            Error::EngineGone => Status::RedraftErrorEngineGone,
            // None: a test reads that each variant has a row. One without would be our fault.
            _ => Status::RedraftErrorPanic,
        };
        Failure { status, text: error.to_string() }
    }
}

/// `text` for C, which ends at its first zero byte: those within it are shown as U+FFFD.
pub(crate) fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', "\u{fffd}")).unwrap_or_default()
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Text of the last error of this thread. It stays where it is until the thread's next error.
pub(crate) fn last_error() -> *const std::ffi::c_char {
    LAST.with_borrow(|text| text.as_ptr())
}

/// The body of every exported call: an error becomes its status and its text, and a panic one too,
/// since unwinding must not enter C.
pub(crate) fn call(body: impl FnOnce() -> Result<Status, Failure>) -> Status {
    // What a panic leaves half done is behind mutexes, whose poison is seen through: at worst a
    // request has lost an event, and says so by its outcome.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(status)) => return status,
        Ok(Err(failure)) => failure,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
            let text = format!("a fault of the library: {}", text.unwrap_or("it panicked without a word"));
            Failure { status: Status::RedraftErrorPanic, text }
        }
    };
    LAST.set(c_string(&failure.text));
    failure.status
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    fn last() -> String {
        // SAFETY: the thread's own text, which ends with a zero; copied before the next error.
        unsafe { CStr::from_ptr(last_error()) }.to_string_lossy().into_owned()
    }

    #[test]
    fn panics_end_here() {
        assert_eq!((call(|| Ok(Status::RedraftOk)), last().as_str()), (Status::RedraftOk, ""));
        assert_eq!(call(|| panic!("as {}", "planned")), Status::RedraftErrorPanic);
        assert_eq!(last(), "a fault of the library: as planned");
        assert_eq!(call(|| Err(Failure::argument("a\0b"))), Status::RedraftErrorArgument);
        assert_eq!(last(), "a\u{fffd}b");
        // Another thread has its own.
        std::thread::spawn(|| assert_eq!(last(), "")).join().unwrap();
    }
}
