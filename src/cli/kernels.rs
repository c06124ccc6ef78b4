//! `redraft kernels`: what the CUDA kernels are, and what NVRTC makes of them.

use clap::Subcommand;

use super::model::Format;
use crate::cuda;
use crate::error::{Error, Result};

#[derive(Subcommand)]
pub(super) enum Command {
    /// The kernels that are built in
    List {
        /// table or json
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
    /// Compile every kernel with NVRTC and fail on any register spill, stack or broken budget
    Check {
        /// Architectures, comma separated
        #[arg(long, value_delimiter = ',', default_value = "sm_80,sm_86,sm_89,sm_90a,sm_100,sm_120")]
        arch: Vec<String>,
        /// Print registers, spills, shared memory and compile time of every entry
        #[arg(long)]
        report: bool,
        /// table or json
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
}

pub(super) fn run(command: Command) -> Result<()> {
    match command {
        Command::List { format } => {
            let kernels = cuda::kernels_list();
            let text = if format == Format::Json { to_json(&kernels) } else { cuda::list_table(&kernels) };
            super::print(&text)?;
        }
        Command::Check { arch, report, format } => {
            let reports = cuda::kernels_check(&arch)?;
            if format == Format::Json {
                super::print(&to_json(&reports))?;
            } else if report {
                super::print(&cuda::report_table(&reports))?;
            } else {
                super::print(&format!("{} entries over {} compile\n", reports.len(), arch.join(", ")))?;
            }
            let over = cuda::over_budget(&reports);
            if !over.is_empty() {
                return Err(Error::kernel(format!("over budget:\n  {}", over.join("\n  "))));
            }
        }
    }
    Ok(())
}

fn to_json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string_pretty(value).expect("plain data") + "\n"
}
