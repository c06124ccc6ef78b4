//! `redraft score`: how likely a text is under a model, token by token.
//!
//! An autoregressive checkpoint scores by its own chain rule: every window follows a BOS (an
//! end of text, where the checkpoint names no BOS), so the first token of a text has a likelihood
//! like any other. A diffusion model scores by the chain rule of a decoding order it can follow:
//! left to right, each token revealed in turn under block-causal visibility of the chosen block
//! length, exactly as `unmask=left:1` would generate it. Both are proper likelihoods; their values
//! differ.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};

use crate::api::device::on_backend;
use crate::backend::Backend;
use crate::cli::device::DeviceFlags;
use crate::cli::engine::drain;
use crate::cli::files::{model_dir, read_text};
use crate::cli::flags::Format;
use crate::cli::samples::{self, ReadAs};
use crate::cli::terminal::{Progress, print};
use crate::config::{AttentionMask, ModelConfig};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::model::registry;
use crate::plan::Visibility;
use crate::scoring::scoring_request;
use crate::tokenizer::Tokenizer;

/// Windows handed to the engine together, so that progress shows; how many share a forward is its
/// own choice.
const AT_ONCE: usize = 64;

#[derive(Args)]
pub(super) struct ScoreFlags {
    /// Model directory or GGUF file of the judge [default: the model that ships]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Text to score, - for stdin
    #[arg(long, value_name = "FILE", default_value = "-")]
    file: PathBuf,
    /// Score what `generate --format jsonl` or `bench --quality --save` wrote instead, - for stdin:
    /// generated tokens, with the prompt as context
    #[arg(long, value_name = "FILE.jsonl", conflicts_with = "file")]
    samples: Option<PathBuf>,
    /// causal (block length 1), block:N, or full (left to right with everything after the token
    /// masked but present) [default: as trained]
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

pub(super) fn run(flags: ScoreFlags) -> Result<()> {
    let dir = model_dir(flags.model.as_deref())?;
    let config = registry::read_config(&dir)?;
    let visibility = flags.visibility.unwrap_or(config.attention.visibility());
    if config.attention == AttentionMask::Causal && visibility != Visibility::BlockCausal(1) {
        return Err(Error::request("--visibility: this checkpoint is autoregressive, it scores with `causal` only"));
    }
    config.first_id()?;
    let tokenizer = flags.device.tokenizer(&config)?;
    // Windows lie side by side, each after a BOS of its own: nothing is scored twice, and a
    // window's first tokens have little context.
    let judge = Judge { dir, window: config.model_length.max(2) - 1, config, visibility, tokenizer };
    let text = match &flags.samples {
        Some(path) => samples(path, &judge, &flags)?,
        None => text(&judge, &flags)?,
    };
    print(&text)?;
    Ok(())
}

/// The model that scores, and how.
struct Judge {
    dir: PathBuf,
    config: ModelConfig,
    visibility: Visibility,
    tokenizer: Arc<Tokenizer>,
    /// Tokens of a window, without its BOS.
    window: usize,
}

impl Judge {
    /// Negative log-likelihood in nats of every token of the windows, in order.
    fn score(&self, device: &DeviceFlags, windows: &[&[u32]]) -> Result<Vec<f64>> {
        let longest = windows.iter().map(|window| window.len()).max().unwrap_or(0);
        on_backend!(device.backend(Some(&self.dir))?, |backend| {
            let mut engine = device.engine(backend, &self.dir, Some(self.tokenizer.clone()), longest + 1, windows.len())?;
            score(&mut engine, windows, self.visibility)
        })
    }
}

/// `--file`: the tokens of a text.
fn text(judge: &Judge, flags: &ScoreFlags) -> Result<String> {
    let Judge { dir, visibility, tokenizer, window, .. } = judge;
    let tokens = tokenizer.encode(&read_text(&flags.file)?)?;
    if tokens.is_empty() {
        return Err(Error::request(format!("{}: no text to score", flags.file.display())));
    }
    let nll = judge.score(&flags.device, &tokens.chunks(*window).collect::<Vec<_>>())?;
    let mean = nll.iter().sum::<f64>() / nll.len() as f64;
    if flags.format == Format::Json {
        let object = json!({
            "model": dir.display().to_string(), "visibility": name(*visibility), "tokens": tokens, "nll": nll,
            "mean_nll": mean, "perplexity": mean.exp(), "num_tokens": tokens.len(), "window": window,
        });
        return Ok(format!("{object}\n"));
    }
    let mut table: String = tokens.iter().zip(&nll).map(|(id, nll)| format!("{nll:9.4}  {:?}\n", tokenizer.decode_all(&[*id]))).collect();
    let (count, perplexity) = (tokens.len(), mean.exp());
    writeln!(table, "{mean:9.4}  mean over {count} tokens, perplexity {perplexity:.3}, visibility {}", name(*visibility))
        .expect("a string");
    Ok(table)
}

/// `--samples`: generated tokens, sample by sample, then all of them.
fn samples(path: &Path, judge: &Judge, flags: &ScoreFlags) -> Result<String> {
    let samples = samples::read(path, &judge.config, &judge.tokenizer)?;
    // A window without a generated token has nothing that counts.
    let counts = |counted: &[bool]| counted.contains(&true);
    let windows: Vec<&[u32]> = samples
        .iter()
        .flat_map(|sample| sample.tokens.chunks(judge.window).zip(sample.counted.chunks(judge.window)))
        .filter(|(_, counted)| counts(counted))
        .map(|(tokens, _)| tokens)
        .collect();
    let mut scored = judge.score(&flags.device, &windows)?.into_iter();
    let json = flags.format == Format::Json;
    let mut out = if json { String::new() } else { "  mean nll  perplexity  tokens\n".to_string() };
    let (mut all, mut perplexities) = (Vec::new(), Vec::new());
    for sample in &samples {
        let mut nll: Vec<f64> = Vec::new();
        for counted in sample.counted.chunks(judge.window).filter(|counted| counts(counted)) {
            nll.extend(counted.iter().zip(scored.by_ref()).filter(|(counted, _)| **counted).map(|(_, nll)| nll));
        }
        let mean = (!nll.is_empty()).then(|| nll.iter().sum::<f64>() / nll.len() as f64);
        if json {
            let mut line = sample.label.clone();
            line.insert("num_tokens".into(), json!(nll.len()));
            line.insert("mean_nll".into(), json!(mean));
            line.insert("perplexity".into(), json!(mean.map(f64::exp)));
            line.insert("read_as".into(), json!(sample.read_as.name()));
            line.insert("nll".into(), json!(nll));
            writeln!(out, "{}", Value::Object(line)).expect("a string");
        } else {
            let label: Vec<String> = sample.label.iter().map(|(key, value)| format!("{key} {value}")).collect();
            let figures = mean.map_or(format!("{:>10}  {:>10}", "-", "-"), |mean| format!("{mean:10.4}  {:10.3}", mean.exp()));
            writeln!(out, "{figures}  {:6}  {}", nll.len(), label.join(", ")).expect("a string");
        }
        perplexities.extend(mean.map(f64::exp));
        all.extend(nll);
    }
    if all.is_empty() {
        return Err(Error::request(format!("{}: no generated token to score in {} samples", path.display(), samples.len())));
    }
    let mean = all.iter().sum::<f64>() / all.len() as f64;
    let mean_perplexity = perplexities.iter().sum::<f64>() / perplexities.len() as f64;
    let as_ids = samples.iter().filter(|sample| sample.read_as == ReadAs::Ids).count();
    if json {
        let total = json!({
            "model": judge.dir.display().to_string(), "visibility": name(judge.visibility), "window": judge.window,
            "samples": samples.len(), "read_as_ids": as_ids, "num_tokens": all.len(), "mean_nll": mean, "perplexity": mean.exp(),
            "mean_perplexity": mean_perplexity,
        });
        writeln!(out, "{total}").expect("a string");
    } else {
        let how = match (as_ids, samples.len()) {
            (ids, all) if ids == all => "ids scored as they are".into(),
            (0, _) => "texts encoded again".into(),
            (ids, all) => format!("ids of {ids} samples scored as they are, texts of {} encoded again", all - ids),
        };
        let (tokens, pooled) = (all.len(), mean.exp());
        writeln!(out, "{mean:10.4}  {pooled:10.3}  {tokens:6}  all {} samples together; {how}", samples.len()).expect("a string");
        writeln!(out, "{:>10}  {mean_perplexity:10.3}  {:6}  mean of the samples' perplexities", "", "").expect("a string");
    }
    Ok(out)
}

/// Negative log-likelihood in nats of every token of the windows, in order.
fn score<B: Backend>(engine: &mut Engine<B>, windows: &[&[u32]], visibility: Visibility) -> Result<Vec<f64>> {
    let mut nll = Vec::new();
    let (attention, bos_id) = (engine.config().attention, engine.config().first_id()?);
    if attention == AttentionMask::Causal {
        let mut progress = Progress::new("scoring");
        for (i, part) in windows.chunks(AT_ONCE).enumerate() {
            progress.show(|| format!("{}/{} windows", i * AT_ONCE, windows.len()));
            let with_bos: Vec<Vec<u32>> = part.iter().map(|window| [&[bos_id], *window].concat()).collect();
            let sequences: Vec<&[u32]> = with_bos.iter().map(Vec::as_slice).collect();
            nll.extend(engine.causal_nlls(&sequences)?.concat());
        }
    } else {
        let mut handles = Vec::new();
        for window in windows {
            handles.push(engine.submit(scoring_request([&[bos_id], *window].concat(), visibility)?)?);
        }
        drain(engine, &handles)?;
        for handle in &handles {
            let output = handle.take_output().expect("drained")?;
            nll.extend(output.log_prob.iter().map(|log_prob| -f64::from(*log_prob)));
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
