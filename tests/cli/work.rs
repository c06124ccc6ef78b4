//! A fresh directory, the binary, and what a command left.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// A fresh directory and the binary.
pub struct Work {
    pub dir: TempDir,
}

/// What a finished command left.
pub struct Ran {
    pub label: String,
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Work {
    pub fn new() -> Work {
        Work { dir: tempfile::tempdir().expect("a directory") }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).expect("a file");
        self.path(name).display().to_string()
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_redraft"));
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        Ran::new(args, self.command(args).output().expect("the binary starts"))
    }

    /// Runs with `input` on stdin.
    pub fn feed(&self, args: &[&str], input: &str) -> Ran {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().expect("the binary starts");
        // A command that refuses its flags does not read, and its exit code says so.
        if let Err(error) = child.stdin.take().expect("piped").write_all(input.as_bytes()) {
            assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe, "stdin of {args:?}");
        }
        Ran::new(args, child.wait_with_output().expect("the binary ends"))
    }
}

impl Ran {
    pub fn new(args: &[&str], output: Output) -> Ran {
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        let label = format!("redraft {}", args.join(" "));
        let ran = Ran { label, code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
        assert!(!ran.stderr.contains("panicked"), "{}: {}", ran.label, ran.stderr);
        ran
    }

    /// Exit code 0; stdout.
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}: {}", self.label, self.stderr);
        self.stdout
    }

    /// Exit code `code`, nothing on stdout, one line on stderr with all of `words`.
    pub fn fails(self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{}: {}", self.label, self.stderr);
        assert_eq!(self.stdout, "", "{}", self.label);
        for word in words {
            assert!(self.stderr.contains(word), "{}: no `{word}` in: {}", self.label, self.stderr);
        }
    }

    /// One JSON object per line.
    pub fn json(self) -> Vec<Value> {
        let label = self.label.clone();
        self.ok().lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{label}: {e}: {line}"))).collect()
    }
}

pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub fn fixture(name: &str) -> String {
    repository().join("tests/fixtures").join(name).display().to_string()
}

pub fn fixtures() -> Vec<String> {
    let entries = std::fs::read_dir(repository().join("tests/fixtures")).expect("tests/fixtures");
    let mut names: Vec<String> =
        entries.map(|e| e.expect("an entry").path()).filter(|p| p.is_dir()).map(|p| p.display().to_string()).collect();
    names.sort();
    assert!(names.len() >= 7, "{names:?}");
    names
}

pub fn ids(value: &Value) -> Vec<u64> {
    value.as_array().unwrap_or_else(|| panic!("a list: {value}")).iter().map(|v| v.as_u64().expect("a number")).collect()
}
