//! Command line: typed flags, resolved once into what the commands need, and the exit code.
//!
//! Text goes to stdout and nothing else does; progress, tables meant for reading along and errors
//! go to stderr. Exit codes: 0 done, 1 failed, 2 misused. A closed pipe is success: its
//! reader has seen enough.
#![forbid(unsafe_code)]

mod bench;
mod bench_flags;
mod device;
mod engine;
mod files;
mod flags;
mod generate;
#[cfg(feature = "cuda")]
mod kernels;
mod model;
mod output;
mod quality;
mod quantize;
mod samples;
mod score;
#[cfg(feature = "serve")]
mod serve;
mod terminal;
mod watch;

use clap::{CommandFactory, Parser, Subcommand};

use crate::error::Error;

/// Draft-then-refine inference for diffusion language models.
#[derive(Parser)]
#[command(name = "redraft", version, about, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write text: draft with small blocks, mask the least confident tokens again, regenerate them
    /// globally
    Generate(generate::GenerateFlags),
    /// Run the network once over given tokens and save the logits
    Forward(model::ForwardFlags),
    /// Per-token negative log-likelihood and perplexity of a text
    Score(score::ScoreFlags),
    /// Answer HTTP requests: the OpenAI API with drafts, confidence and infilling, and a page at /
    #[cfg(feature = "serve")]
    Serve(Box<serve::ServeFlags>),
    /// Write a checkpoint again with weights of 8 or 4 bits, which then load at once
    Quantize(quantize::QuantizeFlags),
    /// Say what a model directory or GGUF file holds
    Inspect(model::InspectFlags),
    /// Measure latency by stage, tokens per second, forwards and rows
    Bench(bench_flags::BenchFlags),
    /// List the CUDA kernels, or compile them and report registers, spills and shared memory
    #[cfg(feature = "cuda")]
    #[command(subcommand)]
    Kernels(kernels::Command),
}

/// Names of all long flags of all commands, sorted, without their dashes.
pub fn flag_names() -> Vec<String> {
    fn collect(command: &clap::Command, names: &mut Vec<String>) {
        names.extend(command.get_arguments().filter_map(|flag| flag.get_long()).map(str::to_owned));
        command.get_subcommands().for_each(|command| collect(command, names));
    }
    let mut command = Cli::command();
    command.build();
    let mut names = Vec::new();
    collect(&command, &mut names);
    names.sort();
    names.dedup();
    names
}

/// Parses the arguments, runs, and returns the exit code.
pub fn main() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, not mistakes; clap knows which. A closed pipe is fine
            // here too, a full disk is not.
            let printed = error.print();
            return match printed {
                _ if error.use_stderr() => 2,
                Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => 1,
                _ => 0,
            };
        }
    };
    let outcome = match cli.command {
        Command::Generate(flags) => generate::run(flags),
        Command::Forward(flags) => model::forward(flags),
        Command::Score(flags) => score::run(flags),
        #[cfg(feature = "serve")]
        Command::Serve(flags) => serve::run(*flags),
        Command::Quantize(flags) => quantize::run(flags),
        Command::Inspect(flags) => model::inspect(flags),
        Command::Bench(flags) => bench::run(flags),
        #[cfg(feature = "cuda")]
        Command::Kernels(command) => kernels::run(command),
    };
    match outcome {
        Ok(()) => 0,
        Err(error) => {
            terminal::note(&error);
            if matches!(error, Error::Request { .. }) { 2 } else { 1 }
        }
    }
}
