//! What `score --samples` reads: lines that `generate --format jsonl` or `bench --quality --save`
//! wrote, as the judge's ids.
//!
//! A generator whose vocabulary is the judge's wrote ids that mean the same to both: they are
//! scored as they are. Otherwise, or where the generator's directory is not to be found any more,
//! the text is encoded again, prompt and continuation as one.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::cli::files::read_text;
use crate::config::ModelConfig;
use crate::cpu::Cpu;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::model::registry;
use crate::tokenizer::Tokenizer;

/// One line; other keys are ignored.
#[derive(Deserialize)]
struct SampleLine {
    model: Option<String>,
    /// Names of the sample, given back as they are.
    row: Option<Value>,
    seed: Option<Value>,
    sample: Option<Value>,
    prompt: Option<CanvasPart>,
    tokens: Vec<u32>,
    text: Option<String>,
    /// Infilling: the whole sequence, and where in it the generated tokens are.
    canvas: Option<Vec<u32>>,
    positions: Option<Vec<usize>>,
}

#[derive(Deserialize)]
struct CanvasPart {
    tokens: Vec<u32>,
    text: String,
}

/// What the judge is given of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadAs {
    Ids,
    Text,
}

impl ReadAs {
    pub(super) fn name(self) -> &'static str {
        match self {
            ReadAs::Ids => "ids",
            ReadAs::Text => "text",
        }
    }
}

/// A sample in the judge's vocabulary, without a BOS in front.
pub(super) struct Sample {
    /// `row`, `seed` and `sample` of the line, where it has them.
    pub(super) label: serde_json::Map<String, Value>,
    pub(super) tokens: Vec<u32>,
    /// Whether each token was generated; the others are context.
    pub(super) counted: Vec<bool>,
    pub(super) read_as: ReadAs,
}

/// Reads all lines. Errors name the line.
pub(super) fn read(path: &Path, judge: &ModelConfig, tokenizer: &Tokenizer) -> Result<Vec<Sample>> {
    let mut known = HashMap::new();
    let mut samples = Vec::new();
    for (number, line) in read_text(path)?.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |what: String| Error::request(format!("{}: line {}: {what}", path.display(), number + 1));
        let line: SampleLine = serde_json::from_str(line)
            .map_err(|e| wrong(format!("expected a line of `generate --format jsonl` or `bench --quality --save`: {e}")))?;
        let same = match &line.model {
            None => false,
            Some(dir) => *known.entry(dir.clone()).or_insert_with(|| same_vocabulary(Path::new(dir), tokenizer)),
        };
        let label = [("row", &line.row), ("seed", &line.seed), ("sample", &line.sample)];
        let label = label.into_iter().filter_map(|(key, value)| Some((key.to_string(), value.clone()?))).collect();
        let (tokens, counted) = if same { ids(line, judge) } else { encoded(line, tokenizer) }.map_err(|e| match e {
            Error::Request { what } => wrong(what),
            other => other,
        })?;
        if !tokens.is_empty() {
            Engine::<Cpu>::check_tokens(judge, &tokens).map_err(|e| wrong(e.to_string()))?;
        }
        samples.push(Sample { label, tokens, counted, read_as: if same { ReadAs::Ids } else { ReadAs::Text } });
    }
    if samples.is_empty() {
        return Err(Error::request(format!("{}: no samples to score", path.display())));
    }
    Ok(samples)
}

/// Whether the generator's tokenizer is there and spells every id as the judge's does.
fn same_vocabulary(dir: &Path, judge: &Tokenizer) -> bool {
    let generator = registry::read_config(dir).and_then(|config| Tokenizer::of(dir, config.vocab_size, config.mask_id));
    generator.is_ok_and(|generator| generator.same_vocabulary(judge))
}

fn ids(line: SampleLine, judge: &ModelConfig) -> Result<(Vec<u32>, Vec<bool>)> {
    let (mut tokens, mut counted) = match (line.canvas, line.positions) {
        (Some(canvas), Some(positions)) => {
            let mut counted = vec![false; canvas.len()];
            for position in positions {
                *counted
                    .get_mut(position)
                    .ok_or_else(|| Error::request(format!("position {position} is outside the canvas of {} tokens", canvas.len())))? = true;
            }
            (canvas, counted)
        }
        _ => {
            let prompt = line.prompt.map(|prompt| prompt.tokens).unwrap_or_default();
            let counted = (0..prompt.len() + line.tokens.len()).map(|i| i >= prompt.len()).collect();
            ([prompt, line.tokens].concat(), counted)
        }
    };
    // Every window begins with the judge's own BOS.
    if tokens.first().is_some_and(|id| judge.bos_id == Some(*id)) && !counted[0] {
        tokens.remove(0);
        counted.remove(0);
    }
    Ok((tokens, counted))
}

fn encoded(line: SampleLine, tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<bool>)> {
    if line.canvas.is_some() {
        return Err(Error::request(
            "an infilled sample is scored as ids: expected a judge with the generator's vocabulary, and its directory",
        ));
    }
    let Some(text) = line.text else {
        return Err(Error::request("key `text` is missing, and ids alone mean nothing to a judge with another vocabulary"));
    };
    // As one text, since a token may begin in the prompt and end in the continuation; such a one
    // is counted.
    let prompt = line.prompt.map(|prompt| prompt.text).unwrap_or_default();
    let (tokens, first) = tokenizer.encode_after(&prompt, &text)?;
    let counted = (0..tokens.len()).map(|i| i >= first).collect();
    Ok((tokens, counted))
}
