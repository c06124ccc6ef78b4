//! The device of a command: its flags, the backend that they name, and an engine on it.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use crate::api::builder::default_dtype;
use crate::api::device::{AnyBackend, Device};
use crate::backend::{Backend, DType};
use crate::cli::engine::load;
use crate::cli::flags::DTypeFlag;
use crate::cli::terminal::note;
use crate::config::ModelConfig;
use crate::engine::{Engine, EngineOptions};
use crate::error::Result;
use crate::schedule::Schedule;
use crate::scheduler::Budget;
use crate::sequence::Sequence;
use crate::tokenizer::Tokenizer;

/// Where and how the network runs.
#[derive(Args, Clone)]
pub(crate) struct DeviceFlags {
    /// auto, cpu, cuda, cuda:INDEX, or emu[:ARCH]: the CUDA path executed on the CPU, with the
    /// rounding of sm_90a or of ARCH (slow, needs g++)
    #[arg(long, default_value = "auto")]
    pub(super) device: Device,
    /// Weights and K/V in this type [default: f32, or bf16 for 16-bit checkpoints of more than 1
    /// GiB in f32]
    #[arg(long, value_enum)]
    pub(super) dtype: Option<DTypeFlag>,
    /// CPU threads, as many as cores at most [default: all cores]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024), allow_negative_numbers = true)]
    pub(super) threads: Option<u16>,
    /// tokenizer.json, where the model directory has none
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
        let opened = self.device.open(self.dtype(dir)?, threads.map(|threads| threads.min(cores)))?;
        if let Some(error) = opened.passed_over {
            note(format_args!("{error}; going on with the CPU"));
        }
        Ok(opened.backend)
    }

    pub(crate) fn dtype(&self, dir: Option<&Path>) -> Result<DType> {
        match (self.dtype, dir) {
            (Some(dtype), _) => Ok(dtype.into()),
            (None, Some(dir)) => default_dtype(dir),
            (None, None) => Ok(DType::F32),
        }
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
        let path = self.tokenizer.clone().unwrap_or_else(|| config.dir.join("tokenizer.json"));
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
