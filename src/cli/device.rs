//! The device of a command: its flags, the backend that they name, and an engine on it.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use crate::api::builder::default_dtype;
use crate::api::device::{AnyBackend, Device};
use crate::backend::{Backend, DType, NumberTypes, WeightFormat};
use crate::cli::engine::load;
use crate::cli::flags::{DTypeFlag, WeightsFlag};
use crate::cli::terminal::note;
use crate::config::ModelConfig;
use crate::engine::{Engine, EngineOptions};
use crate::error::Result;
use crate::schedule::Schedule;
use crate::scheduler::Budget;
use crate::sequence::Sequence;
use crate::tokenizer::{self, Tokenizer};

/// Where and how the network runs.
#[derive(Args, Clone)]
pub(crate) struct DeviceFlags {
    /// auto, cpu, cuda, cuda:INDEX, or emu[:ARCH]: the CUDA path executed on the CPU, with the
    /// rounding of sm_90a or of ARCH (slow, needs g++)
    #[arg(long, default_value = "auto")]
    pub(super) device: Device,
    /// K/V, and weights that are floats, in this type [default: f32, or bf16 for 16-bit checkpoints
    /// of more than 1 GiB in f32]
    #[arg(long, value_enum)]
    pub(super) dtype: Option<DTypeFlag>,
    /// Weights in this format, made while they are loaded; q8 and q4 take 8.5 and 5 bits a value
    /// [default: floats of --dtype]
    #[arg(long, value_enum)]
    pub(super) weights: Option<WeightsFlag>,
    /// CPU threads, as many as cores at most [default: all cores]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024), allow_negative_numbers = true)]
    pub(super) threads: Option<u16>,
    /// tokenizer.json or GGUF file, where the model has no tokenizer
    #[arg(long, value_name = "FILE")]
    pub(super) tokenizer: Option<PathBuf>,
}

impl DeviceFlags {
    /// The device asked for. `auto` says so where there is a GPU, or a driver, that cannot be used.
    ///
    /// `dir`: the checkpoint that decides the type of the weights where no flag does.
    pub(crate) fn backend(&self, dir: Option<&Path>) -> Result<AnyBackend> {
        let cores = std::thread::available_parallelism().map_or(usize::MAX, usize::from);
        let threads = self.threads.map(usize::from);
        if let Some(threads) = threads.filter(|threads| *threads > cores) {
            // Threads wait for each other at every product: more than the cores are slower.
            note(format_args!("--threads {threads}: this process may use {cores} cores, and uses as many threads"));
        }
        let opened = self.device.open(self.types(dir)?, threads.map(|threads| threads.min(cores)))?;
        if let Some(error) = opened.passed_over {
            note(format_args!("{error}; going on with the CPU"));
        }
        Ok(opened.backend)
    }

    /// Types of a model's numbers; `dir` as in [`DeviceFlags::backend`].
    pub(crate) fn types(&self, dir: Option<&Path>) -> Result<NumberTypes> {
        NumberTypes::of(self.dtype.map(DType::from), self.weights.map(WeightFormat::from), || dir.map_or(Ok(DType::F32), default_dtype))
    }

    /// Loads a model for sequences of `len` decoded positions, `sequences` at a time, with just
    /// the pages they need.
    pub(crate) fn engine<B: Backend>(
        &self,
        backend: B,
        dir: &Path,
        tokenizer: Option<Arc<Tokenizer>>,
        len: usize,
        sequences: usize,
    ) -> Result<Engine<B>> {
        let options = EngineOptions { tokenizer, ..self.options(len, sequences) };
        load(dir, backend, options)
    }

    /// The tokenizer that `--tokenizer` names, or the directory's own; prompts are measured with it
    /// before anything large is loaded.
    pub(crate) fn tokenizer(&self, config: &ModelConfig) -> Result<Arc<Tokenizer>> {
        let path = self.tokenizer.clone().map_or_else(|| tokenizer::place(&config.dir), Ok)?;
        Tokenizer::load(&path, config.vocab_size)?.masked_by(config.mask_id).map(Arc::new)
    }

    pub(crate) fn options(&self, len: usize, sequences: usize) -> EngineOptions {
        let defaults = EngineOptions::default();
        let sequences = sequences.clamp(1, defaults.budget.max_sequences);
        let budget = Budget { max_sequences: sequences, ..defaults.budget };
        EngineOptions { budget, ..defaults }.with_pages_for(len)
    }
}

/// Positions that a schedule decodes where `len` are asked for, the last of them generated.
pub(crate) fn decoded_len(schedule: &Schedule, len: usize) -> usize {
    Sequence::decoded_len(schedule, &vec![None; len])
}

/// Says so where a text is longer than those of the training.
pub(crate) fn note_length(config: &ModelConfig, len: usize) {
    let trained = config.model_length;
    if len > trained {
        note(format_args!("{len} positions, the model was trained on {trained}: expect the text to fall apart beyond"));
    }
}
