//! What a finished sample looks like: text, the JSON object of the contract, and trace lines.

use serde::Serialize;
use serde_json::json;

use crate::request::{Output, generated_text};
use crate::schedule::Schedule;
use crate::sequence::{Event, EventKind, Forwards};
use crate::tokenizer::Tokenizer;

/// What is the same for all samples of a run.
pub(super) struct RunFacts {
    /// Directories, the first being the one that names the run.
    pub models: Vec<String>,
    pub device: String,
    pub dtype: &'static str,
    pub seed: u64,
    pub schedule: Schedule,
    pub load_ms: f64,
    /// Ids that end the text, if the model writes them.
    pub ends: Vec<u32>,
    pub stop: Vec<String>,
}

impl RunFacts {
    /// Text of generated tokens: up to the end of text and the first stop text, wherever the last
    /// stage left them.
    fn text(&self, tokenizer: &Tokenizer, before: &[u32], tokens: &[u32]) -> String {
        generated_text(tokenizer, before, tokens, &self.ends, &self.stop).0
    }
}

#[derive(Serialize)]
struct Json<'a> {
    model: &'a str,
    /// Where stages name more than one (`weights=INDEX`).
    #[serde(skip_serializing_if = "Option::is_none")]
    models: Option<&'a Vec<String>>,
    device: &'a str,
    dtype: &'a str,
    seed: u64,
    sample: u32,
    schedule: Vec<String>,
    prompt_tokens: usize,
    /// What precedes the first generated token.
    prompt: CanvasPart<'a>,
    tokens: &'a [u32],
    text: String,
    finish: &'a str,
    draft: CanvasPart<'a>,
    confidence: &'a [f32],
    revealed_at: &'a [(u8, u32)],
    stages: Vec<Stage<'a>>,
    timings: Timings,
    tokens_per_s: f64,
    /// Infilling: positions of the generated tokens, the whole sequence, and its text.
    #[serde(skip_serializing_if = "Option::is_none")]
    positions: Option<&'a [usize]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    canvas: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    filled: Option<String>,
}

#[derive(Serialize)]
struct CanvasPart<'a> {
    tokens: &'a [u32],
    text: String,
}

#[derive(Serialize)]
struct Stage<'a> {
    /// A number, or "full".
    block_len: serde_json::Value,
    remask: Option<f64>,
    by: Option<String>,
    unmask: String,
    kv: String,
    temperature: f32,
    top_p: f32,
    /// Absent where everything is kept.
    top_k: Option<u32>,
    nfe: usize,
    forwards: Counts,
    rows: usize,
    remasked: &'a [usize],
    changed: usize,
    edited: usize,
    ms: f64,
}

#[derive(Serialize)]
pub(super) struct Counts {
    prefill: usize,
    denoise: usize,
    commit: usize,
    joint: usize,
    score: usize,
    guide: usize,
}

impl From<Forwards> for Counts {
    fn from(f: Forwards) -> Self {
        Counts { prefill: f.prefill, denoise: f.denoise, commit: f.commit, joint: f.joint, score: f.score, guide: f.guide }
    }
}

#[derive(Serialize)]
struct Timings {
    load_ms: f64,
    queued_ms: f64,
    first_token_ms: f64,
    draft_ms: f64,
    refine_ms: f64,
    total_ms: f64,
}

/// Microsecond resolution: more digits would only be noise.
fn round_ms(ms: f64) -> f64 {
    (ms * 1e3).round() / 1e3
}

/// The contract's object, on one line.
pub(super) fn json(output: &Output, run: &RunFacts, tokenizer: &Tokenizer, infill: bool) -> String {
    let prompt = &output.canvas[..output.prompt_tokens];
    // In a filled text nothing ends at a hole: all of its tokens are part of it.
    let text = |tokens: &[u32]| if infill { tokenizer.decode(tokens) } else { run.text(tokenizer, prompt, tokens) };
    let object = Json {
        model: &run.models[0],
        models: (run.models.len() > 1).then_some(&run.models),
        device: &run.device,
        dtype: run.dtype,
        seed: run.seed,
        sample: output.sample,
        schedule: run.schedule.stages().iter().map(ToString::to_string).collect(),
        prompt_tokens: output.prompt_tokens,
        prompt: CanvasPart { tokens: prompt, text: tokenizer.decode(prompt) },
        tokens: &output.tokens,
        text: text(&output.tokens),
        finish: output.finish.name(),
        draft: CanvasPart { tokens: &output.draft, text: text(&output.draft) },
        confidence: &output.confidence,
        revealed_at: &output.revealed_at,
        stages: output
            .stages
            .iter()
            .map(|report| Stage {
                block_len: report.stage.block_len().map_or(json!("full"), |b| json!(b)),
                remask: report.stage.remask.as_ref().map(|r| r.ratio),
                by: report.stage.remask.as_ref().map(|r| r.by.value()),
                unmask: report.stage.unmask.to_string(),
                kv: report.stage.kv().to_string(),
                temperature: report.stage.sampling.temperature,
                top_p: report.stage.sampling.top_p,
                top_k: report.stage.sampling.top_k.map(|top_k| top_k.k),
                nfe: report.nfe(),
                forwards: report.forwards.into(),
                rows: report.rows,
                remasked: &report.remasked,
                changed: report.changed,
                edited: report.edited,
                ms: round_ms(report.ms),
            })
            .collect(),
        timings: Timings {
            load_ms: round_ms(run.load_ms),
            queued_ms: round_ms(output.timings.queued_ms),
            first_token_ms: round_ms(output.timings.first_token_ms),
            draft_ms: round_ms(output.timings.draft_ms),
            refine_ms: round_ms(output.timings.refine_ms),
            total_ms: round_ms(output.timings.total_ms),
        },
        tokens_per_s: (output.tokens_per_s() * 10.0).round() / 10.0,
        positions: infill.then_some(&output.positions),
        canvas: infill.then_some(&output.canvas),
        filled: infill.then(|| tokenizer.decode(&output.canvas)),
    };
    serde_json::to_string(&object).expect("plain data") + "\n"
}

/// The whole text, prompt included; samples of a batch are told apart by a header line.
pub(super) fn text(output: &Output, run: &RunFacts, tokenizer: &Tokenizer, many: bool) -> String {
    let prompt = &output.canvas[..output.prompt_tokens];
    let continues = output.positions.len() + output.prompt_tokens == output.canvas.len();
    let body = if continues {
        tokenizer.decode_before(prompt, &output.tokens) + &run.text(tokenizer, prompt, &output.tokens)
    } else {
        tokenizer.decode(&output.canvas)
    };
    if many { format!("=== sample {}\n{body}\n\n", output.sample) } else { format!("{body}\n") }
}

#[derive(Serialize)]
struct TraceLine<'a> {
    sample: u32,
    stage: u8,
    block: usize,
    step: u32,
    event: &'a str,
    positions: &'a [usize],
    tokens: &'a [u32],
    /// As f32, so that the digits are those of the JSON output.
    confidence: &'a [f32],
}

/// One event of `--trace`.
pub(super) fn trace_line(event: &Event) -> String {
    let name = match event.kind {
        EventKind::Unmask => "reveal",
        EventKind::Edit => "edit",
        EventKind::Remask => "remask",
        EventKind::Commit => "commit",
        EventKind::Done => "done",
    };
    let line = TraceLine {
        sample: event.sample,
        stage: event.stage,
        block: event.block,
        step: event.step,
        event: name,
        positions: &event.positions,
        tokens: &event.tokens,
        confidence: &event.confidence,
    };
    serde_json::to_string(&line).expect("plain data")
}
