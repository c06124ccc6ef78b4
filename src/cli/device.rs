//! The device of a command: its flags, the backend that they name, and an engine on it.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use crate::backend::{Backend, DType};
use crate::batcher::Budget;
use crate::cli::engine::load;
use crate::cli::flags::DTypeFlag;
use crate::config::ModelConfig;
use crate::cpu::Cpu;
use crate::engine::{Engine, EngineOptions};
use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// Where and how the network runs.
#[derive(Args, Clone)]
pub(crate) struct DeviceFlags {
    /// auto, cpu, cuda, cuda:INDEX, or emu[:ARCH]: the CUDA path executed on the CPU, with the
    /// rounding of sm_90a or of ARCH (slow, needs g++)
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    pub(super) device: Device,
    /// Weights and K/V in this type
    #[arg(long, value_enum, default_value = "f32")]
    pub(super) dtype: DTypeFlag,
    /// CPU threads [default: all cores]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(super) threads: Option<u16>,
    /// tokenizer.json, where the model directory has none
    #[arg(long, value_name = "FILE")]
    pub(super) tokenizer: Option<PathBuf>,
}

/// `--device`.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Device {
    Auto,
    Cpu,
    Cuda(usize),
    /// The architecture that is emulated.
    Emu(&'static str),
}

/// Architectures that can be emulated, the default first.
const EMULATED: [&str; 6] = ["sm_90a", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120"];

pub(super) fn parse_device(text: &str) -> Result<Device, String> {
    match text.split_once(':').unwrap_or((text, "0")) {
        ("auto", "0") => Ok(Device::Auto),
        ("cpu", "0") => Ok(Device::Cpu),
        ("cuda", index) => index.parse().map(Device::Cuda).map_err(|_| format!("expected a device index after `cuda:`, found `{index}`")),
        ("emu", "0") => Ok(Device::Emu(EMULATED[0])),
        ("emu", arch) => {
            let known = EMULATED.iter().find(|known| **known == arch);
            known
                .map(|arch| Device::Emu(arch))
                .ok_or_else(|| format!("expected one of {} after `emu:`, found `{arch}`", EMULATED.join(", ")))
        }
        _ => Err("expected auto, cpu, cuda, cuda:INDEX or emu[:ARCH]".into()),
    }
}

impl DeviceFlags {
    fn cpu(&self) -> Result<Cpu> {
        let threads = self.threads.map_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()), usize::from);
        Cpu::new(threads, self.dtype())
    }

    /// The machine asked for. `auto` is the first GPU if there is one that can be used, and says so where there is one that cannot.
    #[cfg(feature = "cuda")]
    pub(crate) fn machine(&self) -> Result<Machine> {
        use crate::cuda::{Cuda, Emulator, EmulatorOptions, Gpu, device_count};
        let gpu = |index| Cuda::new(Box::new(Gpu::open(index)?), self.dtype());
        match self.device {
            Device::Cuda(index) => Ok(Machine::Cuda(gpu(index)?)),
            Device::Emu(arch) => {
                let defaults = EmulatorOptions::default();
                let options = EmulatorOptions { arch, threads: self.threads.map_or(defaults.threads, usize::from), ..defaults };
                Ok(Machine::Cuda(Cuda::new(Box::new(Emulator::new(options)?), self.dtype())?))
            }
            Device::Auto if device_count().is_ok() => match gpu(0) {
                Ok(cuda) => Ok(Machine::Cuda(cuda)),
                Err(error) => {
                    eprintln!("redraft: {error}; going on with the CPU");
                    Ok(Machine::Cpu(self.cpu()?))
                }
            },
            Device::Auto | Device::Cpu => Ok(Machine::Cpu(self.cpu()?)),
        }
    }

    /// The machine asked for.
    #[cfg(not(feature = "cuda"))]
    pub(crate) fn machine(&self) -> Result<Machine> {
        match self.device {
            Device::Cuda(_) | Device::Emu(_) => {
                Err(crate::error::Error::device("this build has no CUDA backend: build with --features cuda, or use --device cpu"))
            }
            Device::Auto | Device::Cpu => Ok(Machine::Cpu(self.cpu()?)),
        }
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype.into()
    }

    /// Loads a model for sequences of `len` positions, `sessions` at a time, with just the pages they need.
    pub(crate) fn engine<B: Backend>(
        &self,
        backend: B,
        dir: &Path,
        tokenizer: Option<Arc<Tokenizer>>,
        len: usize,
        sessions: usize,
    ) -> Result<Engine<B>> {
        let options = EngineOptions { tokenizer, ..self.options(len, sessions) };
        let engine = load(dir, backend, options)?;
        if len > engine.config().model_length {
            eprintln!(
                "redraft: {len} positions, the model was trained on {}: expect the text to fall apart beyond",
                engine.config().model_length
            );
        }
        Ok(engine)
    }

    /// The tokenizer that `--tokenizer` names, or the directory's own; prompts are measured with it before anything large is loaded.
    pub(crate) fn tokenizer(&self, config: &ModelConfig) -> Result<Arc<Tokenizer>> {
        let path = self.tokenizer.clone().unwrap_or_else(|| config.dir.join("tokenizer.json"));
        Tokenizer::load(&path, config.vocab_size).map(Arc::new)
    }

    pub(crate) fn options(&self, len: usize, sessions: usize) -> EngineOptions {
        let defaults = EngineOptions::default();
        let sessions = sessions.clamp(1, defaults.budget.max_sessions);
        let pages = len.div_ceil(defaults.page_size).saturating_mul(sessions);
        EngineOptions { budget: Budget { max_sessions: sessions, ..defaults.budget }, kv_pages: Some(pages), ..defaults }
    }
}

/// A backend, ready. The commands are written once for any of them; [`on_machine`] is the one place that tells them apart.
#[allow(clippy::large_enum_variant)] // one per process, moved once
pub(crate) enum Machine {
    Cpu(Cpu),
    #[cfg(feature = "cuda")]
    Cuda(crate::cuda::Cuda),
}

/// `body` with the backend under the given name, whichever it is.
macro_rules! on_machine {
    ($machine:expr, |$backend:ident| $body:expr) => {
        match $machine {
            crate::cli::device::Machine::Cpu($backend) => $body,
            #[cfg(feature = "cuda")]
            crate::cli::device::Machine::Cuda($backend) => $body,
        }
    };
}
pub(crate) use on_machine;
