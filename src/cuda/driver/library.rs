//! Functions of libraries that are opened at run time, and what the loader says without them.

use libloading::Library;

use crate::error::{Error, Result};

/// One function of an opened library.
///
/// # Safety
/// `F` must be the C signature of `name`, and `library` must stay open as long as the function is
/// used.
pub(in crate::cuda) unsafe fn symbol<F: Copy>(library: &Library, name: &str) -> Result<F> {
    // SAFETY: the caller vouches for the signature and the lifetime.
    let found = unsafe { library.get::<F>(name) };
    found.map(|f| *f).map_err(|e| Error::device(format!("{}; the library is too old or is not NVIDIA's", loader_words(&e))))
}

/// What the dynamic loader itself says, which libloading keeps one level below its own sentence.
pub(in crate::cuda) fn loader_words(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |source| source.to_string())
}

/// Declares a struct of foreign functions that are looked up one by one:
/// `field = symbol(arguments);`.
///
/// `sys` must be cudarc's module of the library. The compiler compares the arguments with those of
/// cudarc's binding of the symbol, whose result is `$status`; here it is the plain integer that the
/// library returns (docs/cuda.md, "Why the driver is declared here as well").
macro_rules! function_table {
    ($table:ident, $status:ty; $($(#[$doc:meta])* $field:ident = $symbol:ident ($($arg:ty),* $(,)?);)*) => {
        pub(in crate::cuda) struct $table {
            $($(#[$doc])* pub $field: unsafe extern "C" fn($($arg),*) -> ::std::ffi::c_int,)*
        }

        $(const _: unsafe fn($($arg),*) -> $status = sys::$symbol;)*

        impl $table {
            fn load(library: &'static ::libloading::Library) -> crate::error::Result<$table> {
                use crate::cuda::driver::library::symbol;
                // SAFETY: the arguments are those of cudarc's bindings by the constants above, an
                // int has the size of their result, and the library is never closed.
                unsafe { Ok($table { $($field: symbol(library, stringify!($symbol))?,)* }) }
            }
        }
    };
}
pub(in crate::cuda) use function_table;
