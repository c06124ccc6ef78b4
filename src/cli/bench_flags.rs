//! Flags of `redraft bench`, those of `--quality` included.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use clap::Args;

use crate::cli::device::DeviceFlags;
use crate::cli::flags::Format;
use crate::sampling::valid_top_p;
use crate::schedule::StageSpec;

#[derive(Args)]
pub(super) struct BenchFlags {
    /// Model directory or GGUF file [default: the model that ships]. With --quality, repeat it for
    /// stages with weights=1, 2, ...
    #[arg(long, value_name = "DIR", conflicts_with = "shape")]
    pub(super) model: Vec<PathBuf>,
    /// Random weights of a published shape instead of a checkpoint: bd3lm-owt (170M), sdar-8b or
    /// tiny
    #[arg(long, value_name = "NAME", conflicts_with = "quality")]
    pub(super) shape: Option<String>,
    /// Presets to measure, comma separated [default: draft,did,did-fast]
    #[arg(long, value_delimiter = ',', conflicts_with = "stage")]
    pub(super) preset: Vec<String>,
    /// A schedule of its own, as for generate
    #[arg(long, value_name = "KEY=VAL,...")]
    pub(super) stage: Vec<StageSpec>,
    /// Joint sampler of the (first) model, for stages with sampler=joint [default: joint/ in the
    /// model's directory, where a stage asks for one]
    #[arg(long, value_name = "DIR", conflicts_with = "shape")]
    pub(super) joint: Option<PathBuf>,
    /// Samples in flight together, comma separated [default: 1; with --quality: 64]
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=4096), allow_negative_numbers = true)]
    pub(super) batch: Vec<u32>,
    /// Generated tokens, comma separated [default: what the model was trained for]
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..), allow_negative_numbers = true)]
    pub(super) length: Vec<u32>,
    /// Single forwards to time, comma separated: ROWS@POSITION runs ROWS rows from POSITION on over
    /// cached K/V of the positions before, each sees all positions up to the last row, and all draw
    /// a token [default: a pass over the whole length, and draft steps]
    #[arg(long, value_name = "ROWS@POSITION", value_delimiter = ',', conflicts_with = "quality", value_parser = parse_forward)]
    pub(super) forward: Vec<Forward>,
    /// Nuclei to time the single forwards with, comma separated; 1 draws from the whole
    /// distribution
    #[arg(long, value_name = "P", value_delimiter = ',', default_values_t = [1.0, 0.9], value_parser = parse_top_p, conflicts_with = "quality")]
    pub(super) forward_top_p: Vec<f32>,
    /// Time single forwards and no schedule
    #[arg(long, conflicts_with_all = ["quality", "preset", "stage", "batch", "joint", "plot"])]
    pub(super) no_schedules: bool,
    /// Measured runs per row
    #[arg(long, default_value_t = 3, conflicts_with = "quality", value_parser = clap::value_parser!(u32).range(1..=1000), allow_negative_numbers = true)]
    pub(super) runs: u32,
    /// table or json
    #[arg(long, value_enum, default_value = "table")]
    pub(super) format: Format,
    /// Also draw the stage times as an SVG
    #[arg(long, value_name = "FILE", conflicts_with = "quality")]
    pub(super) plot: Option<PathBuf>,
    #[command(flatten)]
    pub(super) quality: QualityFlags,
    #[command(flatten)]
    pub(super) device: DeviceFlags,
}

/// `--forward`.
#[derive(Clone, Copy)]
pub(super) struct Forward {
    pub(super) rows: usize,
    pub(super) position: usize,
}

impl Forward {
    /// Positions of the sequence: its rows are the last.
    pub(super) fn len(self) -> usize {
        self.position + self.rows
    }
}

fn parse_forward(text: &str) -> Result<Forward, String> {
    let number = |text: &str| text.parse::<u32>().ok().map(|n| n as usize);
    let parts = text.split_once('@').and_then(|(rows, position)| Some((number(rows)?, number(position)?)));
    match parts {
        Some((rows @ 1.., position)) => Ok(Forward { rows, position }),
        _ => Err("expected ROWS@POSITION with at least one row, as in 32@512".into()),
    }
}

fn parse_top_p(text: &str) -> Result<f32, String> {
    text.parse().ok().filter(|p| valid_top_p(*p)).ok_or_else(|| "expected a number above 0, at most 1".into())
}

/// Flags of `bench` that go with `--quality`.
#[derive(Args)]
pub(super) struct QualityFlags {
    /// Measure text instead of time: generate samples of several schedules, and report quality,
    /// variety, coherence and cost
    #[arg(long)]
    pub(super) quality: bool,
    /// Autoregressive checkpoint with the model's vocabulary that scores the samples [default: the
    /// judge that ships]
    #[arg(long, value_name = "DIR", requires = "quality")]
    pub(super) judge: Option<PathBuf>,
    /// Human text to measure the same way: documents with a line <|endoftext|> between them
    #[arg(long, value_name = "FILE", requires = "quality")]
    pub(super) human: Option<PathBuf>,
    /// The model's training text, in the same form: for the trigram judge and the copied runs; may
    /// be repeated
    #[arg(long, value_name = "FILE", requires = "quality")]
    pub(super) train: Vec<PathBuf>,
    /// Samples a row
    #[arg(long, default_value_t = 256, requires = "quality", value_parser = clap::value_parser!(u32).range(1..=100_000), allow_negative_numbers = true)]
    pub(super) samples: u32,
    /// Seed of rows that do not name one
    #[arg(long, default_value_t = 0, requires = "quality", allow_negative_numbers = true)]
    pub(super) seed: u64,
    /// JSON lines, a row each: {"name", "stages": [..] or "preset", and "temperature", "top_p",
    /// "seed", "model" where wanted} [default: draft, a full refine by snapshot, random, post-hoc
    /// and held-out:4, and did-lift]
    #[arg(long, value_name = "FILE", requires = "quality", conflicts_with_all = ["preset", "stage"])]
    pub(super) rows: Option<PathBuf>,
    /// Softmax temperature of stages that do not name one
    #[arg(long, value_name = "T", requires = "quality", allow_negative_numbers = true)]
    pub(super) temperature: Option<f32>,
    /// Nucleus of stages that do not name one
    #[arg(long, value_name = "P", requires = "quality", allow_negative_numbers = true)]
    pub(super) top_p: Option<f32>,
    /// Write every sample with its draft as JSON lines
    #[arg(long, value_name = "FILE", requires = "quality")]
    pub(super) save: Option<PathBuf>,
    /// Also report the values of single samples (json)
    #[arg(long, requires = "quality")]
    pub(super) per_sample: bool,
}
