//! Parse, run, exit code.
use std::process::ExitCode;

fn main() -> ExitCode {
    redraft::cli::main().into()
}
