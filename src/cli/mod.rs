//! Owns the command line: typed flags, resolved once into what the commands need, and the exit code.
//!
//! Text goes to stdout and nothing else does; progress, tables meant for reading along and errors go to stderr. Exit codes:
//! 0 done, 1 failed, 2 misused. A closed pipe is success: whoever reads has seen enough.
#![forbid(unsafe_code)]

mod bench;
mod generate;
#[cfg(feature = "cuda")]
mod kernels;
mod model;
mod output;
mod quality;
mod samples;
mod score;
mod watch;

use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::backend::{Backend, DType};
use crate::batcher::Budget;
use crate::config::ModelConfig;
use crate::cpu::Cpu;
use crate::engine::{Engine, EngineOptions};
use crate::error::{Error, Result};
use crate::sampling::TopPRule;
use crate::schedule::Schedule;
use crate::tokenizer::Tokenizer;

/// Directory under `models/` that is used without `--model`.
const SHIPPED_MODEL: &str = "redraft-stories-7m";

/// Directory under `models/` whose model scores text without `--judge`.
const SHIPPED_JUDGE: &str = "redraft-judge";

/// Draft-then-refine inference for diffusion language models.
#[derive(Parser)]
#[command(name = "redraft", version, about, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write text: draft with small blocks, mask the least confident tokens again, regenerate them globally
    Generate(generate::Flags),
    /// Run the network once over given tokens and save the logits
    Forward(model::ForwardFlags),
    /// Per-token negative log-likelihood and perplexity of a text
    Score(score::Flags),
    /// Say what a model directory holds
    Inspect(model::InspectFlags),
    /// Measure latency by stage, tokens per second, forwards and rows
    Bench(bench::Flags),
    /// List the CUDA kernels, or compile them and report registers, spills and shared memory
    #[cfg(feature = "cuda")]
    #[command(subcommand)]
    Kernels(kernels::Command),
}

/// Where and how the network runs.
#[derive(Args, Clone)]
pub(crate) struct DeviceFlags {
    /// auto, cpu, cuda, cuda:INDEX, or emu[:ARCH]: the CUDA path executed on the CPU, with the
    /// rounding of sm_90a or of ARCH (slow, needs g++)
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    device: Device,
    /// Weights and K/V in this type
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DTypeFlag,
    /// CPU threads [default: all cores]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// tokenizer.json, where the model directory has none
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum DTypeFlag {
    F32,
    Bf16,
}

impl From<DTypeFlag> for DType {
    fn from(flag: DTypeFlag) -> DType {
        match flag {
            DTypeFlag::F32 => DType::F32,
            DTypeFlag::Bf16 => DType::Bf16,
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Device {
    Auto,
    Cpu,
    Cuda(usize),
    /// The architecture that is emulated.
    Emu(&'static str),
}

/// Architectures that can be emulated, the default first.
const EMULATED: [&str; 6] = ["sm_90a", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120"];

fn parse_device(text: &str) -> Result<Device, String> {
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
                Err(Error::device("this build has no CUDA backend: build with --features cuda, or use --device cpu"))
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

/// [`Engine::load`] with its progress on a terminal.
pub(crate) fn load<B: Backend>(dir: &Path, backend: B, options: EngineOptions) -> Result<Engine<B>> {
    let mut progress = Progress::on_terminal("loading");
    Engine::load_with_progress(dir, backend, options, &mut |done, total| {
        progress.show(|| format!("{}: {:.2} of {:.2} GB", dir.display(), done as f64 / 1e9, total as f64 / 1e9));
    })
}

/// [`Engine::attach_joint`] of the sampler that was named, or of the model's own where one of its schedules needs it.
pub(crate) fn attach_joint<'a, B: Backend>(
    engine: &mut Engine<B>,
    named: Option<&Path>,
    model: &Path,
    schedules: impl IntoIterator<Item = &'a Schedule>,
) -> Result<()> {
    let own = model.join("joint");
    let wanted = || schedules.into_iter().any(|schedule| schedule.stages.iter().any(|stage| stage.joint && stage.weights == 0));
    match named {
        Some(dir) => engine.attach_joint(dir, &mut |_, _| {}),
        None if own.join("config.json").exists() && wanted() => engine.attach_joint(&own, &mut |_, _| {}),
        None => Ok(()),
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
            crate::cli::Machine::Cpu($backend) => $body,
            #[cfg(feature = "cuda")]
            crate::cli::Machine::Cuda($backend) => $body,
        }
    };
}
pub(crate) use on_machine;

/// `--top-p-rule`.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum TopPRuleFlag {
    /// Keep tokens while the cumulative probability including the token is at most p (BD3-LM)
    Within,
    /// Also keep the token that crosses p (Hugging Face)
    Crossing,
}

impl From<TopPRuleFlag> for TopPRule {
    fn from(flag: TopPRuleFlag) -> Self {
        match flag {
            TopPRuleFlag::Within => TopPRule::Within,
            TopPRuleFlag::Crossing => TopPRule::Crossing,
        }
    }
}

/// The directory asked for, or the model that ships: below the working directory, beside the binary, or where it was built.
pub(crate) fn model_dir(model: Option<&Path>) -> Result<PathBuf> {
    model.map_or_else(
        || shipped(SHIPPED_MODEL, "the model that ships with redraft is not here; run from the repository or give --model DIR"),
        |dir| Ok(dir.to_path_buf()),
    )
}

/// The judge asked for, or the one that ships, which is looked for as the model is.
pub(crate) fn judge_dir(judge: Option<&Path>) -> Result<PathBuf> {
    judge.map_or_else(
        || shipped(SHIPPED_JUDGE, "the judge that ships with redraft is not here; run from the repository or give --judge DIR"),
        |dir| Ok(dir.to_path_buf()),
    )
}

fn shipped(name: &str, missing: &str) -> Result<PathBuf> {
    let relative = Path::new("models").join(name);
    let exe = std::env::current_exe().unwrap_or_default();
    let beside = exe.ancestors().skip(1).map(|dir| dir.join(&relative));
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join(&relative);
    let found = std::iter::once(relative.clone()).chain(beside).chain([built]).find(|dir| dir.join("config.json").exists());
    found.ok_or_else(|| Error::config(&relative, missing))
}

/// Reads a file, or stdin for `-`.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let mut text = String::new();
    let outcome = if path == Path::new("-") {
        std::io::stdin().read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|mut f| f.read_to_string(&mut text))
    };
    outcome.map_err(|e| Error::io(path, &e))?;
    Ok(text)
}

/// Writes through a temporary sibling, so that a full disk or an interruption never leaves half a file under the asked name.
/// Pipes and devices are written as they are: renaming over one would replace it.
pub(crate) fn write_atomically(path: &Path, write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let special = path.metadata().is_ok_and(|m| !m.is_file());
    let target = if special {
        path.to_path_buf()
    } else {
        let mut name = path.file_name().ok_or_else(|| Error::request(format!("{}: not a file name", path.display())))?.to_os_string();
        name.push(format!(".{}.part", std::process::id()));
        path.with_file_name(name)
    };
    let outcome = std::fs::OpenOptions::new().write(true).create(!special).truncate(!special).open(&target).and_then(|file| {
        let mut buffered = std::io::BufWriter::new(file);
        write(&mut buffered)?;
        let file = buffered.into_inner().map_err(|e| e.into_error())?;
        if special { Ok(()) } else { file.sync_all().and_then(|()| std::fs::rename(&target, path)) }
    });
    outcome.map_err(|e| {
        if !special {
            // The error matters, not whether the leftover could be removed.
            let _ = std::fs::remove_file(&target);
        }
        Error::io(path, &e)
    })
}

/// A closed pipe ends the output and is no failure; any other trouble with stdout is.
pub(crate) fn print(text: &str) -> Result<Piped> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Piped::Open),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(Piped::Closed),
        Err(e) => Err(Error::io(Path::new("stdout"), &e)),
    }
}

/// Whether stdout still has a reader.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Piped {
    Open,
    Closed,
}

/// A line on stderr for work that takes long: rewritten in place on a terminal, every ten seconds elsewhere.
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
        Progress { what, start: Instant::now(), last: None, terminal: std::io::stderr().is_terminal(), silent: false }
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
            let end = if self.terminal { '\r' } else { '\n' };
            eprint!("redraft: {} {}          {end}", self.what, state());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.terminal && self.last.is_some() {
            eprintln!();
        }
    }
}

/// Runs the engine to the end, showing progress, for callers that want the outputs alone.
pub(crate) fn drain<B: Backend>(engine: &mut Engine<B>, handles: &[crate::request::Handle]) -> Result<()> {
    let mut progress = Progress::new("generating");
    let mut revealed = 0;
    loop {
        let busy = engine.tick()?;
        for event in handles.iter().flat_map(crate::request::Handle::events) {
            if event.kind == crate::session::EventKind::Reveal {
                revealed += event.positions.len();
            }
        }
        progress.show(|| format!("{revealed} tokens revealed"));
        if !busy {
            return Ok(());
        }
    }
}

/// Parses the arguments, runs, and returns the exit code.
pub fn main() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, not mistakes; clap knows which. A closed pipe is fine here too.
            let _ = error.print();
            return if error.use_stderr() { 2 } else { 0 };
        }
    };
    let outcome = match cli.command {
        Command::Generate(flags) => generate::run(flags),
        Command::Forward(flags) => model::forward(flags),
        Command::Score(flags) => score::run(flags),
        Command::Inspect(flags) => model::inspect(flags),
        Command::Bench(flags) => bench::run(flags),
        #[cfg(feature = "cuda")]
        Command::Kernels(command) => kernels::run(command),
    };
    match outcome {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("redraft: {error}");
            if matches!(error, Error::Request { .. }) { 2 } else { 1 }
        }
    }
}
