//! `redraft generate`: flags to requests, requests to text, JSON and trace.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};

use crate::api::device::on_backend;
use crate::api::json;
use crate::api::options::{default_length, default_preset};
use crate::backend::Backend;
use crate::chat::{ChatTemplate, Conversation, Message};
use crate::cli::device::{DeviceFlags, decoded_len, note_length};
use crate::cli::engine::attach_joint;
use crate::cli::files::{model_dir, read_text};
use crate::cli::flags::TopPRuleFlag;
use crate::cli::output::{self, RunFacts};
use crate::cli::terminal::{Piped, Progress, note, note_warnings, print};
use crate::cli::watch::Watch;
use crate::config::ModelConfig;
use crate::cpu::Cpu;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::model::registry;
use crate::request::{Bos, Prompt, Request, Segment, StopOptions, parse_infill};
use crate::sampling::{TopKOrder, top_k_of, valid_temperature, valid_top_p};
use crate::schedule::{Defaults, Schedule, StageSpec};
use crate::tokenizer::Tokenizer;

#[derive(Args)]
pub(super) struct GenerateFlags {
    /// Model: a directory with config.json, model.safetensors and tokenizer.json, or a GGUF file
    /// [default: the model that ships]. Repeat it for stages with weights=1, 2, ...
    #[arg(long, value_name = "DIR")]
    model: Vec<PathBuf>,
    /// Text to continue
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["prompt_file", "infill", "stdin"], allow_hyphen_values = true)]
    prompt: Option<String>,
    /// File with the text to continue, - for stdin
    #[arg(long, value_name = "FILE", conflicts_with_all = ["infill", "stdin"])]
    prompt_file: Option<PathBuf>,
    /// Text with holes of N tokens: "The [____:12] sat on the [____:4]."
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["length", "stdin", "stop"], allow_hyphen_values = true)]
    infill: Option<String>,
    /// `-` reads the prompt from stdin
    #[arg(value_name = "-", value_parser = parse_stdin)]
    stdin: Option<String>,
    /// The prompt is a user's message: it goes through the checkpoint's chat template
    #[arg(long, conflicts_with = "infill")]
    chat: bool,
    /// System message in front of it
    #[arg(long, value_name = "TEXT", requires = "chat", allow_hyphen_values = true)]
    system: Option<String>,
    /// File with a conversation, - for stdin: a JSON list of messages, or an object with messages,
    /// tools, documents and other arguments of the checkpoint's chat template
    #[arg(long, value_name = "FILE.json", conflicts_with_all = ["prompt", "prompt_file", "infill", "stdin", "system", "bos"])]
    messages: Option<PathBuf>,
    /// Whether BOS stands before a prompt: auto is what the family's own script and the tokenizer's
    /// post-processor put there
    #[arg(long, value_enum, default_value = "auto", conflicts_with = "chat")]
    bos: BosFlag,
    /// Tokens to generate
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    length: Option<usize>,
    /// draft, did, did-fast, did-lift, did-joint, ar, global, semi-ar, three, or a published
    /// sampler: llada, dream, sdar, llada2, llada21, fast-dllm-v1, fast-dllm-v2 [default: did-lift,
    /// or ar for an autoregressive checkpoint]
    #[arg(long, conflicts_with = "stage")]
    preset: Option<String>,
    /// A stage, e.g. block=4,unmask=uniform:1 then
    /// block=full,remask=0.35,by=snapshot,unmask=linear:12,order=uniform,kv=exact
    #[arg(long, value_name = "KEY=VAL,...")]
    stage: Vec<StageSpec>,
    /// Joint sampler of the (first) model, for stages with sampler=joint [default: joint/ in the
    /// model's directory, where a stage asks for one]
    #[arg(long, value_name = "DIR")]
    joint: Option<PathBuf>,
    /// Seed of the counter-based generator
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,
    /// Samples to write, sharing the prompt and the batch
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000_000), allow_negative_numbers = true)]
    samples: u32,
    /// Softmax temperature of stages that do not name one; 0 is greedy [default: what the model
    /// recommends, or 1]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Nucleus of stages that do not name one [default: what the model recommends, or 0.9]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Whether the token that crosses p is kept
    #[arg(long, value_enum)]
    top_p_rule: Option<TopPRuleFlag>,
    /// How many of the most probable tokens stages draw from that do not name it, or all [default:
    /// what the model recommends, or all]
    #[arg(long, value_name = "K", value_parser = parse_top_k, allow_negative_numbers = true)]
    top_k: Option<u32>,
    #[command(flatten)]
    device: DeviceFlags,
    /// text, json (one object per sample) or jsonl (the same)
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    /// Show the text being written (on a terminal)
    #[arg(long)]
    watch: bool,
    /// Milliseconds between the pictures of --watch
    #[arg(long, default_value_t = 25, value_name = "MS")]
    watch_delay: u64,
    /// Write every reveal, remask and commit as JSON lines
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// End the text before this string; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "infill")]
    stop: Vec<String>,
    /// Treat the end-of-text token as an ordinary one and always write the full length
    #[arg(long)]
    ignore_eos: bool,
    /// End the draft when the unigram entropy of the last 256 tokens falls below this (BD3-LM stops
    /// at 4.0)
    #[arg(long, value_name = "NATS")]
    stop_entropy: Option<f64>,
    /// Write a finished block's K/V in a forward of its own (same text, more forwards)
    #[arg(long)]
    separate_commit: bool,
}

/// [`Bos`].
#[derive(Clone, Copy, ValueEnum)]
enum BosFlag {
    Auto,
    Yes,
    No,
}

impl From<BosFlag> for Bos {
    fn from(flag: BosFlag) -> Bos {
        match flag {
            BosFlag::Auto => Bos::Auto,
            BosFlag::Yes => Bos::Yes,
            BosFlag::No => Bos::No,
        }
    }
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Format {
    Text,
    Json,
    Jsonl,
}

fn parse_stdin(text: &str) -> std::result::Result<String, String> {
    match text {
        "-" => Ok(text.to_owned()),
        _ => Err("expected - for stdin; a text goes into --prompt TEXT".into()),
    }
}

/// 0 for all.
fn parse_top_k(text: &str) -> std::result::Result<u32, String> {
    if text == "all" {
        return Ok(0);
    }
    text.parse().ok().filter(|k| *k > 0).ok_or_else(|| "expected a number of tokens, at least 1, or all".to_owned())
}

/// Sampling flags checked and laid over the model's defaults.
pub(super) fn defaults(
    config: &ModelConfig,
    temperature: Option<f32>,
    top_p: Option<f32>,
    rule: Option<TopPRuleFlag>,
    top_k: Option<u32>,
) -> Result<Defaults> {
    let mut defaults = Engine::<Cpu>::defaults(config);
    if let Some(t) = temperature {
        if !valid_temperature(t) {
            return Err(Error::request(format!("--temperature: expected a finite number of at least 0, found {t}")));
        }
        defaults.temperature = t;
    }
    if let Some(p) = top_p {
        if !valid_top_p(p) {
            return Err(Error::request(format!("--top-p: expected a number above 0, at most 1, found {p}")));
        }
        defaults.top_p = p;
    }
    if let Some(rule) = rule {
        defaults.top_p_rule = rule.into();
    }
    if let Some(k) = top_k {
        defaults.top_k = top_k_of(k, TopKOrder::Before);
    }
    Ok(defaults)
}

impl GenerateFlags {
    fn prompt_text(&self) -> Result<String> {
        match (&self.prompt, &self.prompt_file, &self.stdin) {
            (Some(text), ..) => Ok(text.clone()),
            (_, Some(path), _) => read_text(path),
            (.., Some(_)) => read_text(Path::new("-")),
            _ => Ok(String::new()),
        }
    }

    /// The prompt, and how many positions it makes with what is to be generated.
    fn prompt(&self, config: &ModelConfig, tokenizer: &Tokenizer) -> Result<(Prompt, usize)> {
        let bos = Bos::from(self.bos);
        if let Some(text) = &self.infill {
            let segments = parse_infill(text)?;
            let begins = match segments.first() {
                Some(Segment::Text(text)) => text,
                _ => "",
            };
            let mut len = bos.before(begins, config, tokenizer)?.len();
            for segment in &segments {
                len = len.saturating_add(match segment {
                    Segment::Text(text) => tokenizer.encode(text)?.len(),
                    Segment::Hole(n) => *n,
                });
            }
            return Ok((Prompt::Infill(segments), len));
        }
        let text = self.prompt_text()?;
        let chat = match self.conversation(&text)? {
            Some(conversation) => Some(ChatTemplate::load(&config.dir)?.encode_conversation(&conversation, tokenizer)?),
            None => None,
        };
        let fixed = match &chat {
            Some(tokens) => tokens.len(),
            None => bos.before(&text, config, tokenizer)?.len() + tokenizer.encode(&text)?.len(),
        };
        let length = self.length.unwrap_or_else(|| default_length(config, fixed));
        let prompt = match chat {
            Some(tokens) => Prompt::Tokens { tokens, length },
            None => Prompt::Text { text, length },
        };
        Ok((prompt, fixed.saturating_add(length)))
    }

    /// The chat so far, where one is asked for. The template says which special tokens it begins
    /// with, so nothing is added.
    fn conversation(&self, text: &str) -> Result<Option<Conversation>> {
        if let Some(path) = &self.messages {
            return Conversation::from_json(&read_text(path)?).map(Some);
        }
        if !self.chat {
            return Ok(None);
        }
        if text.trim().is_empty() {
            return Err(Error::request("--chat: expected a message in --prompt, --prompt-file or stdin, found none"));
        }
        let system = self.system.iter().map(|content| Message::new("system", content));
        let messages: Vec<Message> = system.chain([Message::new("user", text)]).collect();
        Ok(Some(Conversation::new(&messages)))
    }
}

pub(super) fn run(flags: GenerateFlags) -> Result<()> {
    let dir = model_dir(flags.model.first().map(PathBuf::as_path))?;
    let config = registry::read_config(&dir)?;
    let defaults = defaults(&config, flags.temperature, flags.top_p, flags.top_p_rule, flags.top_k)?;
    let schedule = if flags.stage.is_empty() {
        Schedule::preset(flags.preset.as_deref().unwrap_or_else(|| default_preset(&config)), &defaults)?
    } else {
        Schedule::resolve(&flags.stage, &defaults)?
    };
    // Said before anything is loaded.
    let others: Vec<ModelConfig> = flags.model.iter().skip(1).map(|dir| registry::read_config(dir)).collect::<Result<_>>()?;
    let models: Vec<&ModelConfig> = std::iter::once(&config).chain(&others).collect();
    Engine::<Cpu>::check_schedule(&models, &schedule)?;
    if flags.stop_entropy.is_some_and(|h| !h.is_finite() || h < 0.0) {
        return Err(Error::request("--stop-entropy: expected a finite number of nats, at least 0"));
    }
    let tokenizer = flags.device.tokenizer(&config)?;
    let (prompt, len) = flags.prompt(&config, &tokenizer)?;
    if let Prompt::Text { length: 0, .. } = prompt {
        return Err(Error::request("--length: expected at least 1 generated token, found 0"));
    }
    // The engine checks this too, but only once everything is loaded.
    config.check_len(len)?;
    // A last block that is decoded to its end needs pages for all of it.
    let open_end = !matches!(&prompt, Prompt::Infill(segments) if matches!(segments.last(), Some(Segment::Text(_))));
    let decoded = if open_end { decoded_len(&schedule, len) } else { len };
    let job = Job { flags, dir, config, schedule, tokenizer, prompt, len, decoded };
    on_backend!(job.flags.device.backend(Some(&job.dir))?, |backend| generate(backend, &job))
}

/// A request, resolved.
struct Job {
    flags: GenerateFlags,
    dir: PathBuf,
    config: ModelConfig,
    schedule: Schedule,
    tokenizer: Arc<Tokenizer>,
    prompt: Prompt,
    /// Positions that are asked for.
    len: usize,
    /// Positions that are decoded.
    decoded: usize,
}

fn generate<B: Backend>(backend: B, job: &Job) -> Result<()> {
    let Job { flags, dir, config, schedule, tokenizer, prompt, len, decoded } = job;
    let mut trace = flags.trace.as_deref().map(Trace::create).transpose()?;

    let loading = std::time::Instant::now();
    let mut engine = flags.device.engine(backend, dir, Some(tokenizer.clone()), *decoded, flags.samples as usize)?;
    for other in flags.model.iter().skip(1) {
        engine.add_model(other, &mut |_, _| {})?;
    }
    engine.models.iter().skip(1).for_each(|loaded| note_warnings(loaded.model.config()));
    note_length(config, *len);
    attach_joint(&mut engine, flags.joint.as_deref(), dir, [schedule])?;
    let load_ms = loading.elapsed().as_secs_f64() * 1e3;
    let stop = StopOptions { ignore_eos: flags.ignore_eos, texts: flags.stop.clone(), entropy: flags.stop_entropy };
    let run = RunFacts {
        device: engine.backend().name(),
        dtype: engine.backend().dtype().name(),
        seed: flags.seed,
        schedule: schedule.clone(),
        load_ms,
        models: std::iter::once(dir).chain(flags.model.iter().skip(1)).map(|d| d.display().to_string()).collect(),
        // A hole has its own length: what a model writes into it ends nothing.
        ends: if flags.ignore_eos || flags.infill.is_some() { Vec::new() } else { engine.ends(schedule) },
        stop: flags.stop.clone(),
        infills: flags.infill.is_some(),
        tokenizer: tokenizer.clone(),
    };

    let mut watch = (flags.watch && flags.format == Format::Text).then(|| Watch::new(flags.watch_delay)).flatten();
    if let Some(watch) = &mut watch {
        watch.start(&engine.canvas_after(flags.bos.into(), prompt)?, tokenizer, schedule);
    }
    let mut handles = Vec::new();
    for sample in 0..flags.samples {
        let mut request = Request::new(prompt.clone(), schedule.clone(), flags.seed, sample);
        request.stop = stop.clone();
        request.bos = flags.bos.into();
        request.separate_commit = flags.separate_commit;
        handles.push(engine.submit(request)?);
    }

    // Samples are printed in order, each as soon as those before it are out.
    let mut outputs: Vec<Option<String>> = vec![None; handles.len()];
    let mut printed = 0;
    let mut failed = None;
    let mut piped = Piped::Open;
    let mut progress = Progress::new("generating");
    let mut revealed = 0usize;
    loop {
        let busy = engine.tick()?;
        for (i, handle) in handles.iter().enumerate().skip(printed) {
            for event in handle.events() {
                revealed += if event.kind == crate::sequence::EventKind::Unmask { event.positions.len() } else { 0 };
                if let Some(trace) = &mut trace {
                    trace.write(&event);
                }
                if let Some(watch) = watch.as_mut().filter(|_| i == 0) {
                    watch.event(&event, tokenizer);
                }
            }
            if let Some(result) = handle.take_output() {
                let text = result.map(|output| match flags.format {
                    Format::Text => output::text(&output, &run, flags.samples > 1),
                    Format::Json | Format::Jsonl => output::json(&output, &run),
                });
                match text {
                    Ok(text) => outputs[i] = Some(text),
                    Err(error) => {
                        failed.get_or_insert(error);
                        outputs[i] = Some(String::new());
                    }
                }
            }
        }
        if watch.is_none() {
            progress.show(|| format!("{revealed} tokens revealed, {printed} of {} samples done", handles.len()));
        }
        while piped == Piped::Open && printed < outputs.len() && outputs[printed].is_some() {
            if let Some(watch) = watch.as_mut().filter(|_| printed == 0) {
                watch.finish();
            }
            piped = print(&outputs[printed].take().expect("looked at above"))?;
            printed += 1;
        }
        if !busy || piped == Piped::Closed {
            break;
        }
    }
    // A trace that could not be written is a failure, but not a reason to lose the text.
    trace.map_or(Ok(()), Trace::close)?;
    failed.map_or(Ok(()), Err)
}

/// The `--trace` file. The first error is kept and reported at the end; generation goes on without
/// the trace.
struct Trace {
    path: PathBuf,
    out: BufWriter<File>,
    error: Option<std::io::Error>,
}

impl Trace {
    fn create(path: &Path) -> Result<Trace> {
        let file = File::create(path).map_err(|e| Error::io(path, &e))?;
        Ok(Trace { path: path.to_path_buf(), out: BufWriter::new(file), error: None })
    }

    fn write(&mut self, event: &crate::sequence::Event) {
        if self.error.is_none()
            && let Err(error) = writeln!(self.out, "{}", json::event(event))
        {
            note(format_args!("{}: {error}; going on without the trace", self.path.display()));
            self.error = Some(error);
        }
    }

    fn close(mut self) -> Result<()> {
        let outcome = self.error.take().map_or_else(|| self.out.flush(), Err);
        outcome.map_err(|e| Error::io(&self.path, &e))
    }
}
