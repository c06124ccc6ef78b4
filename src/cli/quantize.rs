//! `redraft quantize`: a checkpoint written again with weights of 8 or 4 bits.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use clap::Args;

use crate::api::quantize;
use crate::cli::flags::WeightsFlag;
use crate::cli::terminal::{Progress, note};
use crate::error::Result;

#[derive(Args)]
pub(super) struct QuantizeFlags {
    /// Directory of the checkpoint
    #[arg(value_name = "DIR")]
    model: PathBuf,
    /// q8 (8.5 bits a value) or q4 (5 bits; table and head keep 8.5)
    #[arg(long, value_enum)]
    weights: WeightsFlag,
    /// New directory to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// CPU threads [default: all cores]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024), allow_negative_numbers = true)]
    threads: Option<u16>,
}

pub(super) fn run(flags: QuantizeFlags) -> Result<()> {
    let mut progress = Progress::on_terminal("quantising");
    let mut show = |done: usize, total: usize| progress.show(|| format!("{:.2} of {:.2} GB", done as f64 / 1e9, total as f64 / 1e9));
    let written = quantize(&flags.model, flags.weights.into(), &flags.out, flags.threads.map(usize::from), &mut show)?;
    drop(progress);
    let [read, wrote] = [written.bytes_read, written.bytes_written].map(|bytes| bytes as f64 / 1e6);
    note(format_args!("{}: {wrote:.1} MB of weights, made of {read:.1} MB", flags.out.display()));
    Ok(())
}
