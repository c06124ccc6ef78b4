//! `redraft score`: how likely a text is under a model, token by token.
//!
//! An autoregressive checkpoint scores by its own chain rule: every window stands behind a BOS (an end of text, where the checkpoint names no
//! BOS), so the first token of a text has a likelihood like any other. A diffusion model scores by the chain rule of
//! a decoding order it can follow: left to right, each token revealed in turn under block-causal visibility of the chosen
//! block length, exactly as `unmask=left:1` would generate it. Both are proper likelihoods; their values differ.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::model::{Format, native};
use super::{DeviceFlags, Progress};
use crate::backend::Backend;
use crate::config::{Attention, ModelConfig};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::plan::Visibility;
use crate::request::{Prompt, Request};
use crate::schedule::{Defaults, Schedule};

/// Windows handed to the engine together, so that progress shows; how many share a forward is its own choice.
const AT_ONCE: usize = 64;

#[derive(Args)]
pub(super) struct Flags {
    /// Model directory of the judge [default: the model that ships]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Text to score, - for stdin
    #[arg(long, value_name = "FILE", default_value = "-")]
    file: PathBuf,
    /// causal (block length 1), block:N, or full (left to right with everything after the token masked but present) [default: as trained]
    #[arg(long, value_name = "causal|block:N|full", value_parser = parse_visibility)]
    visibility: Option<Visibility>,
    /// table or json
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    #[command(flatten)]
    device: DeviceFlags,
}

fn parse_visibility(text: &str) -> Result<Visibility, String> {
    match text {
        "causal" => Ok(Visibility::BlockCausal(1)),
        "full" => Ok(Visibility::Full),
        _ => text
            .strip_prefix("block:")
            .and_then(|n| n.parse().ok())
            .filter(|n| *n > 0)
            .map(Visibility::BlockCausal)
            .ok_or_else(|| "expected causal, block:N with N at least 1, or full".into()),
    }
}

pub(super) fn run(flags: Flags) -> Result<()> {
    let dir = super::model_dir(flags.model.as_deref())?;
    let config = ModelConfig::load(&dir)?;
    let visibility = flags.visibility.unwrap_or(native(config.attention));
    if config.attention == Attention::Causal && visibility != Visibility::BlockCausal(1) {
        return Err(Error::request("--visibility: this checkpoint is autoregressive, it scores with `causal` only"));
    }
    config.first_id()?;
    let tokenizer = flags.device.tokenizer(&config)?;
    let tokens = tokenizer.encode(&super::read_text(&flags.file)?)?;
    if tokens.is_empty() {
        return Err(Error::request(format!("{}: no text to score", flags.file.display())));
    }
    // Windows stand side by side, each behind a BOS of its own: nothing is scored twice, and a window's first tokens have little context.
    let window = config.model_length.max(2) - 1;
    let windows: Vec<&[u32]> = tokens.chunks(window).collect();
    let nll = super::on_machine!(flags.device.machine()?, |backend| {
        let mut engine = flags.device.engine(backend, &dir, Some(tokenizer.clone()), window.min(tokens.len()) + 1, windows.len())?;
        score(&mut engine, &windows, visibility)?
    });
    let mean = nll.iter().sum::<f64>() / nll.len() as f64;
    let text = if flags.format == Format::Json {
        let object = json!({
            "model": dir.display().to_string(), "visibility": name(visibility), "tokens": tokens, "nll": nll,
            "mean_nll": mean, "perplexity": mean.exp(), "num_tokens": tokens.len(), "window": window,
        });
        format!("{object}\n")
    } else {
        let mut table: String =
            tokens.iter().zip(&nll).map(|(id, nll)| format!("{nll:9.4}  {:?}\n", tokenizer.decode_all(&[*id]))).collect();
        table.push_str(&format!(
            "{mean:9.4}  mean over {} tokens, perplexity {:.3}, visibility {}\n",
            tokens.len(),
            mean.exp(),
            name(visibility)
        ));
        table
    };
    super::print(&text)?;
    Ok(())
}

/// Negative log-likelihood in nats of every token of the windows, in order.
fn score<B: Backend>(engine: &mut Engine<B>, windows: &[&[u32]], visibility: Visibility) -> Result<Vec<f64>> {
    let mut nll = Vec::new();
    let (attention, bos_id) = (engine.config().attention, engine.config().first_id()?);
    if attention == Attention::Causal {
        let mut progress = Progress::new("scoring");
        for (i, part) in windows.chunks(AT_ONCE).enumerate() {
            progress.show(|| format!("{}/{} windows", i * AT_ONCE, windows.len()));
            let with_bos: Vec<Vec<u32>> = part.iter().map(|window| [&[bos_id], *window].concat()).collect();
            let sequences: Vec<&[u32]> = with_bos.iter().map(Vec::as_slice).collect();
            nll.extend(engine.causal_nlls(&sequences)?.concat());
        }
    } else {
        let stage = match visibility {
            Visibility::BlockCausal(block_len) => format!("block={block_len},visible=block,unmask=left:1"),
            Visibility::Full => "block=full,visible=canvas,unmask=left:1".into(),
        };
        let schedule = Schedule::resolve(&[stage.parse()?], &Defaults { top_p: 1.0, ..Defaults::default() })?;
        let mut handles = Vec::new();
        for window in windows {
            let canvas: Vec<Option<u32>> = std::iter::once(Some(bos_id)).chain(window.iter().map(|_| None)).collect();
            let mut request = Request::new(Prompt::Canvas(canvas), schedule.clone(), 0, 0);
            request.stop.ignore_eos = true;
            request.forced = std::iter::once(bos_id).chain(window.iter().copied()).collect();
            handles.push(engine.submit(request)?);
        }
        super::drain(engine, &handles)?;
        for handle in &handles {
            let output = handle.take_output().expect("drained")?;
            nll.extend(output.confidence.iter().map(|p| -f64::from(*p).ln()));
        }
    }
    Ok(nll)
}

fn name(visibility: Visibility) -> String {
    match visibility {
        Visibility::BlockCausal(1) => "causal".into(),
        Visibility::BlockCausal(block_len) => format!("block:{block_len}"),
        Visibility::Full => "full".into(),
    }
}
