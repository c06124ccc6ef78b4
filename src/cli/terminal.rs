//! Terminal of the commands: text on stdout, progress on stderr.
#![forbid(unsafe_code)]

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use unicode_width::UnicodeWidthChar;

use crate::config::ModelConfig;
use crate::error::{Error, Result, Shown};

/// A closed pipe ends the output and is no failure; any other trouble with stdout is.
pub(crate) fn print(text: &str) -> Result<Piped> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Piped::Open),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(Piped::Closed),
        Err(e) => Err(Error::io(Path::new("stdout"), &e)),
    }
}

/// A line on stderr. One that cannot be written, because the log's disk is full or its reader is
/// gone, is not worth the text that was asked for.
pub(crate) fn note(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr().lock(), "redraft: {text}");
}

/// Whether stderr is a terminal on which what was drawn can be drawn over.
pub(crate) fn stderr_moves() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb" && !term.is_empty())
}

/// Columns of the window that stderr shows.
fn columns_of_stderr() -> usize {
    terminal_size::terminal_size_of(std::io::stderr()).map_or(80, |(width, _)| usize::from(width.0))
}

/// A line of exactly so many columns: cut, or filled with spaces that hide what was longer before.
fn fitted(line: &str, columns: usize) -> String {
    let mut taken = 0;
    let mut fitted = String::new();
    for c in line.chars() {
        let width = c.width().unwrap_or(0);
        if taken + width > columns {
            break;
        }
        fitted.push(c);
        taken += width;
    }
    fitted + &" ".repeat(columns - taken)
}

/// What is noteworthy about a checkpoint, a line each.
pub(crate) fn note_warnings(config: &ModelConfig) {
    for warning in &config.warnings {
        note(format_args!("{}: {}", Shown::path(&config.dir), Shown::line(warning)));
    }
}

/// Whether stdout still has a reader.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Piped {
    Open,
    Closed,
}

/// A line on stderr for work that takes long: rewritten in place on a terminal, every ten seconds
/// elsewhere.
///
/// Not indicatif: it draws nothing where there is no terminal, so the lines for logs would stay
/// beside it, which are most of this.
pub(crate) struct Progress {
    what: &'static str,
    start: Instant,
    last: Option<Instant>,
    terminal: bool,
    /// Nothing where there is no terminal.
    silent: bool,
}

impl Progress {
    pub(crate) fn new(what: &'static str) -> Self {
        Progress { what, start: Instant::now(), last: None, terminal: stderr_moves(), silent: false }
    }

    /// For loading, which logs need no lines of.
    pub(crate) fn on_terminal(what: &'static str) -> Self {
        let progress = Progress::new(what);
        Progress { silent: !progress.terminal, ..progress }
    }

    pub(crate) fn show(&mut self, state: impl FnOnce() -> String) {
        let (patience, interval) = if self.terminal { (1.0, 0.1) } else { (10.0, 10.0) };
        let due =
            self.last.map_or_else(|| self.start.elapsed().as_secs_f64() > patience, |l| l.elapsed() > Duration::from_secs_f64(interval));
        if due && !self.silent {
            self.last = Some(Instant::now());
            let line = format!("redraft: {} {}", self.what, Shown::line(&state()));
            let mut err = std::io::stderr().lock();
            // As for `note`. A line that was broken could not be rewritten in place.
            let _ = match self.terminal {
                true => write!(err, "{}\r", fitted(&line, columns_of_stderr().saturating_sub(1))),
                false => writeln!(err, "{line}"),
            }
            .and_then(|()| err.flush());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.terminal && self.last.is_some() {
            let _ = writeln!(std::io::stderr().lock());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_fits_its_window() {
        for (line, columns, fit) in [("redraft: loading", 7, "redraft"), ("日本語", 5, "日本 "), ("ab", 4, "ab  "), ("ab", 0, "")] {
            assert_eq!(fitted(line, columns), fit);
        }
    }
}
