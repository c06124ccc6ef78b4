//! The one door to the tokenizers crate, and to that of templates: what panics there becomes an
//! error here.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Once;

use crate::error::{Error, Result};

/// What the crate returns.
pub(super) type CrateResult<T> = tokenizers::Result<T>;

thread_local! {
    /// How many calls of [`guarded`] this thread is inside of.
    static INSIDE: Cell<usize> = const { Cell::new(0) };
}

/// What `call` returns. Its error or panic is [`Error::Tokenizer`] with the file: values that the
/// crate does not check make it panic, at load, at encoding or at decoding.
///
/// Programs that abort on panic have no such guard.
pub(super) fn guarded<T>(path: &Path, what: &str, call: impl FnOnce() -> CrateResult<T>) -> Result<T> {
    match caught(call) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Error::tokenizer_from(path, what, error)),
        Err(panic) => Err(Error::tokenizer(path, format!("{what}: the tokenizers library failed: {panic}"))),
    }
}

/// What `call` returns, or the first line of what it panicked with; nothing is printed.
pub(crate) fn caught<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    quiet();
    INSIDE.with(|inside| inside.set(inside.get() + 1));
    // Caches of what panicked hold whole entries, so it may be called again.
    let outcome = catch_unwind(AssertUnwindSafe(call));
    INSIDE.with(|inside| inside.set(inside.get() - 1));
    outcome.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        shortened(text.unwrap_or("it panicked"))
    })
}

/// The first line of a panic's message, at a readable length.
fn shortened(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().take(200).collect()
}

/// Panics that become errors print nothing; all others go on to the hook that was there.
fn quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if INSIDE.try_with(Cell::get).unwrap_or(0) == 0 {
                hook(info);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_and_errors_name_the_file() {
        let path = Path::new("dir/tokenizer.json");
        assert_eq!(guarded(path, "cannot", || Ok(3)), Ok(3));
        let error = guarded::<()>(path, "cannot encode", || Err("no".into())).expect_err("an error");
        assert_eq!(error.to_string(), "dir/tokenizer.json: cannot encode: no");
        let error = guarded::<()>(path, "cannot encode", || panic!("index {}\nand more", 7)).expect_err("a panic");
        assert_eq!(error.to_string(), "dir/tokenizer.json: cannot encode: the tokenizers library failed: index 7");
        assert_eq!(INSIDE.get(), 0);
    }
}
