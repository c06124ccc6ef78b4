//! Error type of the crate: variants by what can be done about them, with their operands and their
//! cause.
//!
//! Every text names the file, key or argument, what was expected and what was found. Much of it
//! comes out of files and requests: what it shows cannot steer a terminal and has a length that can
//! be read (`Shown`).
#![forbid(unsafe_code)]

use std::fmt::{self, Write as _};

use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Result of every fallible call in the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error below another one, as [`std::error::Error::source`] gives it.
pub type Cause = Arc<dyn std::error::Error + Send + Sync>;

/// What went wrong, and with which file, key or argument.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `config.json` is absent, malformed or describes something unsupported.
    #[error("{}: {}", Shown::path(path), Shown::line(what))]
    Config {
        /// The file.
        path: PathBuf,
        /// Key, expected and found value.
        what: String,
    },
    /// A weight file is absent, malformed, or a tensor in it is missing, misshapen or not finite.
    #[error("{}: {}", Shown::path(path), Shown::line(what))]
    Weights {
        /// The file.
        path: PathBuf,
        /// Tensor, expected and found shape or type.
        what: String,
    },
    /// `tokenizer.json` is absent, malformed, or does not fit the model.
    #[error("{}: {}", Shown::path(path), Shown::line(what))]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        what: String,
        /// The error of the tokenizers library, where there was one.
        source: Option<Cause>,
    },
    /// The request (prompt, length, schedule, sampling parameters) cannot be served as asked.
    #[error("{}", Shown::lines(what))]
    Request {
        /// Argument, expected and found value.
        what: String,
    },
    /// The page pool cannot hold a request even when empty.
    #[error("request needs {needed} K/V pages, the pool holds {capacity}; shorten the request, or give the engine more pages (`kv_pages`)")]
    OutOfPages {
        /// Pages that the request needs.
        needed: usize,
        /// Pages of the pool.
        capacity: usize,
    },
    /// The asked device is absent or refused.
    #[error("{}", Shown::lines(what))]
    Device {
        /// The device, and what it or its driver said.
        what: String,
    },
    /// A kernel failed to compile, to launch, or produced numbers that cannot be used (NaN logits).
    #[error("{}", Shown::lines(what))]
    Kernel {
        /// The kernel or row, and what was found.
        what: String,
    },
    /// The operating system refused a read or a write.
    #[error("{}: {source}", Shown::path(path))]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: Arc<std::io::Error>,
    },
    /// The engine of a request is gone: it was dropped, or its thread ended.
    #[error("the engine ended before the request did")]
    EngineGone,
}

/// Characters of an error's text at most, and how many of its end stay where it is longer: what
/// was expected and the next move stand there.
const MAX_CHARS: usize = 1000;
const TAIL_CHARS: usize = 300;

/// The same where a compiler or a template engine speaks in lines.
const MAX_CHARS_OF_LINES: usize = 16_000;
const TAIL_CHARS_OF_LINES: usize = 4_000;

/// Text from outside as an error shows it: control characters, and the marks that turn the
/// direction of writing, are escaped, so that a file cannot clear a screen or set its title; what
/// is too long loses its middle.
pub(crate) struct Shown<'a> {
    text: std::borrow::Cow<'a, str>,
    /// Ends of lines and tabs stay as they are.
    lines: bool,
}

impl<'a> Shown<'a> {
    /// On one line.
    pub(crate) fn line(text: &'a str) -> Shown<'a> {
        Shown { text: text.into(), lines: false }
    }

    /// On the lines that it has.
    pub(crate) fn lines(text: &'a str) -> Shown<'a> {
        Shown { text: text.into(), lines: true }
    }

    /// A path, on one line.
    pub(crate) fn path(path: &'a Path) -> Shown<'a> {
        Shown { text: path.to_string_lossy(), lines: false }
    }

    fn write(&self, text: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in text.chars() {
            match c {
                '\n' | '\t' if self.lines => f.write_char(c)?,
                c if c.is_control() || turns_writing(c) => write!(f, "{}", c.escape_default())?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// Separators of lines, and marks after which a terminal may write in another direction.
fn turns_writing(c: char) -> bool {
    matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (most, tail) =
            if self.lines && self.text.contains('\n') { (MAX_CHARS_OF_LINES, TAIL_CHARS_OF_LINES) } else { (MAX_CHARS, TAIL_CHARS) };
        let count = self.text.chars().count();
        if count <= most {
            return self.write(&self.text, f);
        }
        let byte = |at: usize| self.text.char_indices().nth(at).map_or(self.text.len(), |(byte, _)| byte);
        self.write(&self.text[..byte(most - tail)], f)?;
        write!(f, " … ({} characters left out) … ", count - most)?;
        self.write(&self.text[byte(count - tail)..], f)
    }
}

/// Errors are equal if they are of one variant and say the same.
impl PartialEq for Error {
    fn eq(&self, other: &Error) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other) && self.to_string() == other.to_string()
    }
}

impl Error {
    /// [`Error::Config`].
    pub fn config(path: &Path, what: impl Into<String>) -> Self {
        Error::Config { path: path.to_path_buf(), what: what.into() }
    }
    /// [`Error::Weights`].
    pub fn weights(path: &Path, what: impl Into<String>) -> Self {
        Error::Weights { path: path.to_path_buf(), what: what.into() }
    }
    /// [`Error::Tokenizer`] without a cause.
    pub fn tokenizer(path: &Path, what: impl Into<String>) -> Self {
        Error::Tokenizer { path: path.to_path_buf(), what: what.into(), source: None }
    }
    /// [`Error::Tokenizer`]: `what` failed because of `cause`.
    pub fn tokenizer_from(path: &Path, what: &str, cause: Box<dyn std::error::Error + Send + Sync>) -> Self {
        Error::Tokenizer { path: path.to_path_buf(), what: format!("{what}: {cause}"), source: Some(cause.into()) }
    }
    /// [`Error::Request`].
    pub fn request(what: impl Into<String>) -> Self {
        Error::Request { what: what.into() }
    }
    /// [`Error::Device`].
    pub fn device(what: impl Into<String>) -> Self {
        Error::Device { what: what.into() }
    }
    /// [`Error::Kernel`].
    pub fn kernel(what: impl Into<String>) -> Self {
        Error::Kernel { what: what.into() }
    }
    /// An error of numbers, with the model's directory and the type in which it computed; any other
    /// as it is.
    pub(crate) fn in_model(self, dir: &Path, dtype: &str) -> Self {
        match self {
            Error::Kernel { what } => Error::kernel(format!("{} in {dtype}: {what}", dir.display())),
            other => other,
        }
    }
    /// [`Error::Io`] with a copy of `error`.
    pub fn io(path: &Path, error: &std::io::Error) -> Self {
        // Not `Clone`; the code of the operating system keeps kind and text.
        let copy =
            error.raw_os_error().map_or_else(|| std::io::Error::new(error.kind(), error.to_string()), std::io::Error::from_raw_os_error);
        Error::Io { path: path.to_path_buf(), source: Arc::new(copy) }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn what_comes_from_outside_cannot_steer_a_terminal() {
        let error = Error::config(Path::new("a\x1b[2J/config.json"), "model_type `\x1b]0;owned\x07\r\n\u{9b}2J\u{202e}é`");
        let text = error.to_string();
        assert!(!text.contains(|c: char| c.is_control() || c == '\u{202e}'), "{text:?}");
        assert!(text.contains(r"a\u{1b}[2J") && text.contains(r"\u{1b}]0;owned\u{7}\r\n\u{9b}2J\u{202e}é"), "{text}");
        // A compiler's log keeps its lines and loses its colours.
        let text = Error::kernel("linear: error\n\tat line 3\n\x1b[31mred").to_string();
        assert_eq!(text, "linear: error\n\tat line 3\n\\u{1b}[31mred");
    }

    #[test]
    fn long_texts_lose_their_middle() {
        for count in [0, 1, 999, 1000, 1001, 100_000] {
            let what = format!("key `a`: found {}, expected a number", "ü".repeat(count));
            let text = Error::request(what.clone()).to_string();
            assert!(text.chars().count() < MAX_CHARS + 40, "{count}: {} characters", text.chars().count());
            assert!(text.starts_with("key `a`: found") && text.ends_with("expected a number"), "{count}");
            assert_eq!(text == what, what.chars().count() <= MAX_CHARS, "{count}");
        }
        let log = "error: no\n".repeat(10_000);
        assert!(Error::kernel(log).to_string().chars().count() < MAX_CHARS_OF_LINES + 40);
    }

    #[test]
    fn errors_carry_their_cause() {
        let missing = std::io::Error::from_raw_os_error(2);
        let error = Error::io(Path::new("config.json"), &missing);
        assert_eq!(error.to_string(), format!("config.json: {missing}"));
        let cause = error.source().and_then(|cause| cause.downcast_ref::<Arc<std::io::Error>>());
        assert_eq!(cause.map(|cause| cause.kind()), Some(std::io::ErrorKind::NotFound));
        let error = Error::tokenizer_from(Path::new("tokenizer.json"), "not a tokenizer", "expected `,`".into());
        assert_eq!(error.to_string(), "tokenizer.json: not a tokenizer: expected `,`");
        assert_eq!(error.source().map(ToString::to_string), Some("expected `,`".to_owned()));
        assert_ne!(Error::request("a"), Error::device("a"));
        assert_eq!(Error::request("a"), Error::request("a"));
    }
}
