//! `redraft serve`: flags to an engine and a server's settings.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use crate::api::Engine;
use crate::cli::device::DeviceFlags;
use crate::cli::files::model_dir;
use crate::cli::terminal::{Progress, note};
use crate::error::{Error, Result};
use crate::model::registry;
use crate::serve::{self, ServerOptions};

#[derive(Args)]
pub(super) struct ServeFlags {
    /// Model directory or GGUF file [default: the model that ships]. Repeat it for stages with
    /// weights=1, 2, ...
    #[arg(long, value_name = "DIR")]
    model: Vec<PathBuf>,
    /// Address and port; port 0 takes a free one. Only this machine reaches the default
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8080")]
    addr: SocketAddr,
    /// What requests call the model [default: the name of its directory or file]
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// Joint sampler of the (first) model [default: joint/ in the model's directory]
    #[arg(long, value_name = "DIR")]
    joint: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceFlags,
    /// Requests in flight at once; the others wait
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    max_sequences: u32,
    /// Rows that requests share in one forward, unless one needs more: fewer answer short drafts
    /// sooner beside long refining passes
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    max_rows: u32,
    /// Positions, prompt included, that each request in flight has K/V pages for [default: what the
    /// model was trained on, 4096 at most]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_positions: Option<u32>,
    /// Requests that wait; more are answered 429
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_queue: u32,
    /// Tokens that one request may ask for [default: what the model serves]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    /// Bytes of a request's body
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 20, value_parser = clap::value_parser!(u32).range(1024..))]
    max_body: u32,
    /// Seconds that a request may take, its waiting included
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    request_timeout: u32,
    /// Seconds that requests in flight may go on after SIGTERM or Ctrl-C
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=86_400))]
    drain_timeout: u32,
    /// Key that /v1, /tokenize and /detokenize ask for; may be repeated
    #[arg(long, value_name = "KEY", env = "REDRAFT_API_KEY", hide_env_values = true)]
    api_key: Vec<String>,
    /// Origin whose pages may call, * for all; may be repeated [default: none]
    #[arg(long, value_name = "ORIGIN")]
    cors: Vec<String>,
    /// Logs as JSON, one object a line
    #[arg(long)]
    json_logs: bool,
    /// Log prompts and texts
    #[arg(long)]
    log_prompts: bool,
}

pub(super) fn run(flags: ServeFlags) -> Result<()> {
    let dir = model_dir(flags.model.first().map(PathBuf::as_path))?;
    // A directory that holds no model is told before the server starts.
    registry::read_config(&dir)?;
    if flags.api_key.iter().any(|key| key.trim().is_empty()) {
        return Err(Error::request("--api-key: expected a key, found an empty one"));
    }
    let name = dir.canonicalize().ok().and_then(|dir| Some(dir.file_name()?.to_string_lossy().into_owned()));
    let options = ServerOptions {
        addr: flags.addr,
        model_name: flags.model_name.clone().or(name).unwrap_or_else(|| "redraft".into()),
        api_keys: flags.api_key.clone(),
        cors: flags.cors.clone(),
        max_sequences: flags.max_sequences as usize,
        max_queue: flags.max_queue as usize,
        max_tokens: flags.max_tokens.map(|tokens| tokens as usize),
        max_body: flags.max_body as usize,
        request_timeout: Duration::from_secs(flags.request_timeout.into()),
        drain_timeout: Duration::from_secs(flags.drain_timeout.into()),
        json_logs: flags.json_logs,
        log_prompts: flags.log_prompts,
    };
    serve::run(options, || open(&flags, &dir))
}

fn open(flags: &ServeFlags, dir: &Path) -> Result<Engine> {
    let config = registry::read_config(dir)?;
    let mut progress = Progress::on_terminal("loading");
    let shown = dir.display().to_string();
    let types = flags.device.types(Some(dir))?;
    let mut builder = Engine::builder(dir)
        .device(flags.device.device)
        .dtype(types.dtype)
        .tokenizer(flags.device.tokenizer(&config)?)
        .max_sequences(flags.max_sequences as usize)
        .max_rows(flags.max_rows as usize)
        .progress(move |done, total| progress.show(|| format!("{shown}: {:.2} of {:.2} GB", done as f64 / 1e9, total as f64 / 1e9)));
    if let Some(format) = types.weights {
        builder = builder.weights(format);
    }
    if let Some(threads) = flags.device.threads {
        builder = builder.threads(threads.into());
    }
    if let Some(positions) = flags.max_positions {
        builder = builder.max_positions(positions as usize);
    }
    if let Some(joint) = &flags.joint {
        builder = builder.joint_sampler(joint);
    }
    for model in flags.model.iter().skip(1) {
        builder = builder.add_model(model);
    }
    let engine = builder.open()?;
    if let Some(error) = engine.passed_over() {
        note(format_args!("{error}; going on with the CPU"));
    }
    engine.model().warnings.iter().for_each(|warning| note(format_args!("{}: {warning}", dir.display())));
    Ok(engine)
}
