//! Requests and results as JSON, in one form for the command line, C, Python and the server.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::options::{Options, Prompt};
use super::text::TextRules;
use crate::chat::Conversation;
use crate::error::{Error, Result};
use crate::request::{Bos, Output};
use crate::sampling::TopPRule;
use crate::schedule::Schedule;
use crate::sequence::{Event, EventKind, Forwards};

/// A request as one object. One of `prompt`, `messages`, `infill` and `canvas` says what is given
/// of the text.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestJson {
    prompt: Option<PromptJson>,
    /// A list of messages, or an object as [`Conversation::from_json`] reads it.
    messages: Option<Box<RawValue>>,
    infill: Option<String>,
    canvas: Option<Vec<Option<u32>>>,
    /// A text to refine, after `prompt`.
    draft: Option<String>,
    schedule: Option<OneOrMore>,
    length: Option<usize>,
    seed: Option<u64>,
    sample: Option<u32>,
    priority: Option<i32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_p_rule: Option<TopPRuleJson>,
    top_k: Option<u32>,
    stop: Option<OneOrMore>,
    ignore_eos: Option<bool>,
    stop_entropy: Option<f64>,
    bos: Option<BosJson>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "prompt: expected a text, or a list of token ids")]
enum PromptJson {
    Text(String),
    Tokens(Vec<u32>),
}

/// One text or several.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text, or a list of texts")]
pub(crate) enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl OneOrMore {
    pub(crate) fn into_list(self) -> Vec<String> {
        match self {
            OneOrMore::One(text) => vec![text],
            OneOrMore::More(texts) => texts,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum TopPRuleJson {
    Within,
    Crossing,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum BosJson {
    Auto,
    Yes,
    No,
}

/// Reads a request: an object with one of `prompt` (a text, or token ids), `messages` (a list, or
/// an object as [`Conversation::from_json`] reads it), `infill` (a text with holes, as
/// [`Prompt::infill`] reads it) and `canvas` (token ids, null where the model writes); `draft` is a
/// text to refine after `prompt`. All other keys are optional and mean what the methods of
/// [`Options`] of the same names do: `schedule` (a preset, stages with semicolons between them, or
/// a list of stages), `length`, `seed`, `sample`, `priority`, `temperature`, `top_p`, `top_p_rule`
/// (`"within"`, `"crossing"`), `top_k`, `stop` (a text or a list), `ignore_eos`, `stop_entropy`,
/// `bos` (`"auto"`, `"yes"`, `"no"`).
///
/// Errors: [`Error::Request`] that names the key, what was expected and what was found.
pub fn request(text: &str) -> Result<(Prompt, Options)> {
    let mut request: RequestJson = serde_json::from_str(text).map_err(|e| Error::request(format!("request: {e}")))?;
    let RequestJson { prompt, messages, infill, canvas, draft, .. } = &request;
    let given = [prompt.is_some(), messages.is_some(), infill.is_some(), canvas.is_some()].iter().filter(|given| **given).count();
    let refines_alone = given == 0 && draft.is_some();
    if given != 1 && !refines_alone {
        return Err(Error::request("request: expected one of the keys prompt, messages, infill and canvas"));
    }
    let (prompt, draft) = (request.prompt.take(), request.draft.take());
    let (messages, infill, canvas) = (request.messages.take(), request.infill.take(), request.canvas.take());
    let options = request.into_options()?;
    let prompt = match (prompt, draft) {
        (Some(PromptJson::Text(prompt)), Some(draft)) => Prompt::refine(prompt, draft),
        (None, Some(draft)) if refines_alone => Prompt::refine("", draft),
        (_, Some(_)) => return Err(Error::request("draft: expected a prompt of text before it, or none")),
        (Some(PromptJson::Text(prompt)), None) => Prompt::Text(prompt),
        (Some(PromptJson::Tokens(tokens)), None) => Prompt::Tokens(tokens),
        (None, None) => match (messages, infill, canvas) {
            (Some(messages), _, _) => Prompt::Conversation(Conversation::from_json(messages.get())?),
            (_, Some(text), _) => Prompt::infill(&text)?,
            (_, _, canvas) => Prompt::Canvas(canvas.unwrap_or_default()),
        },
    };
    Ok((prompt, options))
}

impl RequestJson {
    fn into_options(self) -> Result<Options> {
        let mut options = Options { stop_entropy: self.stop_entropy, ..Options::default() };
        if let Some(schedule) = self.schedule {
            options = options.schedule_text(&schedule.into_list().join(";"))?;
        }
        options.length = self.length;
        options.seed = self.seed.unwrap_or_default();
        options.sample = self.sample.unwrap_or_default();
        options.priority = self.priority.unwrap_or_default();
        options.temperature = self.temperature;
        options.top_p = self.top_p;
        options.top_p_rule = self.top_p_rule.as_ref().map(|rule| match rule {
            TopPRuleJson::Within => TopPRule::Within,
            TopPRuleJson::Crossing => TopPRule::Crossing,
        });
        options.top_k = self.top_k;
        options.stop = self.stop.map_or_else(Vec::new, OneOrMore::into_list);
        options.ignore_eos = self.ignore_eos.unwrap_or_default();
        options.bos = match self.bos {
            None | Some(BosJson::Auto) => Bos::Auto,
            Some(BosJson::Yes) => Bos::Yes,
            Some(BosJson::No) => Bos::No,
        };
        Ok(options)
    }
}

/// A finished text as an object.
#[derive(Serialize)]
pub(crate) struct GenerationJson<'a> {
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
    log_prob: &'a [f32],
    revealed_at: &'a [(u8, u32)],
    stages: Vec<StageJson<'a>>,
    timings: TimingsJson,
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
struct StageJson<'a> {
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
    forwards: Forwards,
    rows: usize,
    remasked: &'a [usize],
    changed: usize,
    edited: usize,
    ms: f64,
}

#[derive(Serialize)]
struct TimingsJson {
    /// Of the engine that loaded for this text alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    load_ms: Option<f64>,
    queued_ms: f64,
    first_token_ms: f64,
    first_final_ms: f64,
    draft_ms: f64,
    refine_ms: f64,
    total_ms: f64,
}

/// Microsecond resolution: more digits would only be noise.
fn round_ms(ms: f64) -> f64 {
    (ms * 1e3).round() / 1e3
}

impl<'a> GenerationJson<'a> {
    pub(crate) fn new(output: &'a Output, rules: &TextRules, seed: u64, schedule: &Schedule) -> GenerationJson<'a> {
        let prompt = &output.canvas[..output.prompt_tokens];
        GenerationJson {
            seed,
            sample: output.sample,
            schedule: schedule.stages().iter().map(ToString::to_string).collect(),
            prompt_tokens: output.prompt_tokens,
            prompt: CanvasPart { tokens: prompt, text: rules.decode(prompt) },
            tokens: &output.tokens,
            text: rules.text(&output.tokens).0,
            finish: output.finish.name(),
            draft: CanvasPart { tokens: &output.draft, text: rules.text(&output.draft).0 },
            confidence: &output.confidence,
            log_prob: &output.log_prob,
            revealed_at: &output.revealed_at,
            stages: output
                .stages
                .iter()
                .map(|report| StageJson {
                    block_len: report.stage.block_len().map_or("full".into(), Into::into),
                    remask: report.stage.remask.as_ref().map(|r| r.ratio),
                    by: report.stage.remask.as_ref().map(|r| r.by.value()),
                    unmask: report.stage.unmask.to_string(),
                    kv: report.stage.kv().to_string(),
                    temperature: report.stage.sampling.temperature,
                    top_p: report.stage.sampling.top_p,
                    top_k: report.stage.sampling.top_k.map(|top_k| top_k.k),
                    nfe: report.nfe(),
                    forwards: report.forwards,
                    rows: report.rows,
                    remasked: &report.remasked,
                    changed: report.changed,
                    edited: report.edited,
                    ms: round_ms(report.ms),
                })
                .collect(),
            timings: TimingsJson {
                load_ms: None,
                queued_ms: round_ms(output.timings.queued_ms),
                first_token_ms: round_ms(output.timings.first_token_ms),
                first_final_ms: round_ms(output.timings.first_final_ms),
                draft_ms: round_ms(output.timings.draft_ms),
                refine_ms: round_ms(output.timings.refine_ms),
                total_ms: round_ms(output.timings.total_ms),
            },
            tokens_per_s: (output.tokens_per_s() * 10.0).round() / 10.0,
            positions: rules.infills.then_some(&output.positions),
            canvas: rules.infills.then_some(&output.canvas),
            filled: rules.infills.then(|| rules.decode(&output.canvas)),
        }
    }

    /// With the time that loading took, where an engine was loaded for this text alone.
    #[cfg(feature = "cli")]
    pub(crate) fn loaded_in(mut self, ms: f64) -> GenerationJson<'a> {
        self.timings.load_ms = Some(round_ms(ms));
        self
    }
}

#[derive(Serialize)]
struct EventJson<'a> {
    sample: u32,
    stage: u8,
    block: usize,
    step: u32,
    event: &'a str,
    positions: &'a [usize],
    tokens: &'a [u32],
    /// As f32, so that the digits are those of a result.
    confidence: &'a [f32],
}

/// An event on one line: an object with `sample`, `stage`, `block`, `step`, `event` (`"reveal"`,
/// `"edit"`, `"remask"`, `"commit"` or `"done"`), `positions`, `tokens` and `confidence`.
pub fn event(event: &Event) -> String {
    let name = match event.kind {
        EventKind::Unmask => "reveal",
        EventKind::Edit => "edit",
        EventKind::Remask => "remask",
        EventKind::Commit => "commit",
        EventKind::Done => "done",
    };
    let line = EventJson {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reads_every_key() {
        let text = r#"{"prompt": "One day", "schedule": "block=4,unmask=uniform:1; block=full,remask=0.2,by=snapshot,unmask=linear:2",
            "length": 9, "seed": 7, "sample": 2, "priority": -1, "temperature": 0.5, "top_p": 0.8, "top_p_rule": "crossing", "top_k": 5,
            "stop": ["a", "b"], "ignore_eos": true, "stop_entropy": 1.5, "bos": "no"}"#;
        let (prompt, options) = request(text).unwrap();
        assert_eq!(prompt, Prompt::Text("One day".into()));
        let stages = ["block=4,unmask=uniform:1", "block=full,remask=0.2,by=snapshot,unmask=linear:2"];
        let expected = Options::default().stages(stages.map(|stage| stage.parse().unwrap())).length(9).seed(7).sample(2).priority(-1);
        let expected = expected.temperature(0.5).top_p(0.8).top_p_rule(TopPRule::Crossing).top_k(5).stop("a").stop("b");
        let expected = expected.ignore_eos(true).stop_entropy(1.5).bos(Bos::No);
        assert_eq!(format!("{options:?}"), format!("{expected:?}"));
    }

    #[test]
    fn every_kind_of_prompt() {
        let prompt = |text: &str| request(text).unwrap().0;
        assert_eq!(prompt(r#"{"prompt": [1, 2]}"#), Prompt::Tokens(vec![1, 2]));
        assert_eq!(prompt(r#"{"infill": "a [_:2]"}"#), Prompt::infill("a [_:2]").unwrap());
        assert_eq!(prompt(r#"{"canvas": [1, null]}"#), Prompt::Canvas(vec![Some(1), None]));
        assert_eq!(prompt(r#"{"prompt": "a", "draft": "b"}"#), Prompt::refine("a", "b"));
        assert_eq!(prompt(r#"{"draft": "b"}"#), Prompt::refine("", "b"));
        let messages = r#"[{"role": "user", "content": "Hi"}]"#;
        let conversation = Conversation::from_json(messages).unwrap();
        assert_eq!(prompt(&format!(r#"{{"messages": {messages}}}"#)), Prompt::Conversation(conversation.clone()));
        assert_eq!(prompt(&format!(r#"{{"messages": {{"messages": {messages}}}}}"#)), Prompt::Conversation(conversation));
    }

    #[test]
    fn errors_name_the_key() {
        for (text, expected) in [
            ("{", "request: EOF"),
            ("{}", "expected one of the keys prompt, messages, infill and canvas"),
            (r#"{"prompt": "a", "infill": "b [_:2]"}"#, "expected one of the keys"),
            (r#"{"prompt": 3}"#, "prompt: expected a text, or a list of token ids"),
            (r#"{"prompt": "a", "lenght": 3}"#, "unknown field `lenght`, expected one of"),
            (r#"{"prompt": "a", "seed": -1}"#, "expected u64"),
            (r#"{"prompt": [1], "draft": "b"}"#, "draft: expected a prompt of text"),
            (r#"{"prompt": "a", "schedule": "block=x"}"#, "block"),
        ] {
            let error = request(text).map(drop).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
