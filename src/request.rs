//! What callers hand in and get back: requests, their handles, finished samples.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::schedule::Schedule;
use crate::sequence::{DrawSource, Event, Finish, StageReport};
use crate::tokenizer::Tokenizer;

/// What is given of the text.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// [`Request::bos`], then this text, then `length` generated positions.
    Text { text: String, length: usize },
    /// These ids as they are, then `length` generated positions.
    Tokens { tokens: Vec<u32>, length: usize },
    /// [`Request::bos`], then text and holes in turn: infilling.
    Infill(Vec<Segment>),
    /// The canvas itself: `Some(id)` fixed, `None` generated.
    Canvas(Vec<Option<u32>>),
}

/// A piece of an infilling prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Segment {
    /// Given text.
    Text(String),
    /// This many generated positions.
    Hole(usize),
}

/// Whether a token stands before the first of a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bos {
    /// What the family's own script and the post-processor of its tokenizer put there: BOS for
    /// BD3-LM and MDLM; for the others what `tokenizer.json` says, which is mostly nothing. An
    /// autoregressive model predicts no first token: where nothing is given, as [`Bos::Yes`].
    #[default]
    Auto,
    /// The checkpoint's BOS, or where it names none, its end of text.
    Yes,
    /// Nothing.
    No,
}

impl Bos {
    /// Ids before `text`, the given beginning of a sequence.
    ///
    /// Errors: a checkpoint that names neither BOS nor end of text, where one is asked for.
    pub(crate) fn before(self, text: &str, config: &ModelConfig, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let prefix = tokenizer.prefix();
        let starts_from_nothing = config.is_autoregressive() && text.is_empty() && prefix.is_empty();
        match self {
            Bos::No => Ok(Vec::new()),
            Bos::Auto if !config.family.begins_with_bos && !starts_from_nothing => Ok(prefix.to_vec()),
            Bos::Auto | Bos::Yes => Ok(vec![config.first_id()?]),
        }
    }
}

/// When a draft may end before its length.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StopOptions {
    /// Treat the end-of-text token as an ordinary one.
    pub ignore_eos: bool,
    /// The text ends before the first of these.
    pub texts: Vec<String>,
    /// [`crate::sequence::Stop::entropy`].
    pub entropy: Option<f64>,
}

/// One sample to generate.
#[derive(Clone)]
pub struct Request {
    pub prompt: Prompt,
    /// What stands before prompts of text.
    pub bos: Bos,
    pub schedule: Schedule,
    pub seed: u64,
    /// Index of this sample among those of one seed.
    pub sample: u32,
    /// Who goes first: lower values before higher ones. No result depends on it.
    pub priority: i32,
    pub stop: StopOptions,
    /// See [`crate::sequence::SequenceSpec::separate_commit`].
    pub separate_commit: bool,
    /// See [`crate::sequence::SequenceSpec::forced`].
    pub forced: Vec<u32>,
    /// See [`crate::sequence::SequenceSpec::draft`].
    pub draft: Vec<u32>,
    /// See [`crate::sequence::SequenceSpec::draws`].
    pub draws: Option<DrawSource>,
}

impl Request {
    pub fn new(prompt: Prompt, schedule: Schedule, seed: u64, sample: u32) -> Request {
        Request {
            prompt,
            bos: Bos::Auto,
            schedule,
            seed,
            sample,
            priority: 0,
            stop: StopOptions::default(),
            separate_commit: false,
            forced: Vec::new(),
            draft: Vec::new(),
            draws: None,
        }
    }
}

/// Wall times of one sample, in milliseconds from its admission.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// Waiting for admission; not part of the others.
    pub queued_ms: f64,
    /// Until a forward unmasked the first token.
    pub first_token_ms: f64,
    /// Until the last stage had made its first block final.
    pub first_final_ms: f64,
    /// Until the first stage ended.
    pub draft_ms: f64,
    /// From there until the last stage ended.
    pub refine_ms: f64,
    /// Until the text was final.
    pub total_ms: f64,
}

/// A finished sample.
#[derive(Clone, Debug)]
pub struct Output {
    /// Index of this sample among those of one seed.
    pub sample: u32,
    /// Why the text ended.
    pub finish: Finish,
    /// Positions before the first generated one.
    pub prompt_tokens: usize,
    /// The whole sequence, fixed positions included.
    pub canvas: Vec<u32>,
    /// Which positions were generated, ascending; the vectors below follow it.
    pub positions: Vec<usize>,
    /// Ids of the generated tokens.
    pub tokens: Vec<u32>,
    /// Their ids when the first stage ended.
    pub draft: Vec<u32>,
    /// Snapshot confidence of each: its probability in the forward that unmasked it.
    pub confidence: Vec<f32>,
    /// Log probability of each token in nats, before temperature, top-k and nucleus.
    pub log_prob: Vec<f32>,
    /// Stage and step that unmasked each.
    pub revealed_at: Vec<(u8, u32)>,
    /// What each stage did and cost.
    pub stages: Vec<StageReport>,
    /// Wall times.
    pub timings: Timings,
}

impl Output {
    /// Generated tokens per second from admission to final text.
    pub fn tokens_per_s(&self) -> f64 {
        self.tokens.len() as f64 / (self.timings.total_ms / 1e3).max(1e-9)
    }
}

/// What travels from the engine to a handle.
pub(crate) enum Message {
    Event(Event),
    Finished(Box<Result<Output>>),
}

/// Who waits for messages without blocking a thread. Several messages may make one call.
#[derive(Default)]
struct Waiting(Mutex<Option<Waker>>);

impl Waiting {
    fn set(&self, waker: &Waker) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(waker.clone());
    }

    fn wake(&self) {
        // Called without the lock: the other side may look at once.
        let waker = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The engine's end of a request. Where it is dropped without a result, the engine is gone.
pub(crate) struct Mailbox {
    messages: Option<Sender<Message>>,
    waiting: Arc<Waiting>,
}

impl Mailbox {
    /// A handle that is gone is noticed at the next tick.
    pub(crate) fn send(&self, message: Message) {
        let _ = self.messages.as_ref().map(|messages| messages.send(message));
        self.waiting.wake();
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        // Closed before the other side is told to look.
        self.messages = None;
        self.waiting.wake();
    }
}

/// The caller's end of a request. Dropping it cancels the request.
pub struct SubmittedRequest {
    pub(crate) messages: Receiver<Message>,
    pub(crate) cancel: Arc<AtomicBool>,
    waiting: Arc<Waiting>,
    pub(crate) outcome: RefCell<Outcome>,
}

/// How far the result of a request has come. Every request has one: where its engine is gone
/// without a word, that is it.
pub(crate) enum Outcome {
    Pending,
    Ready(Box<Result<Output>>),
    Told,
}

impl SubmittedRequest {
    /// Both ends of a request.
    pub(crate) fn new() -> (Mailbox, SubmittedRequest) {
        let (sender, messages) = channel();
        let waiting = Arc::<Waiting>::default();
        let mailbox = Mailbox { messages: Some(sender), waiting: waiting.clone() };
        (mailbox, SubmittedRequest { messages, cancel: Arc::default(), waiting, outcome: RefCell::new(Outcome::Pending) })
    }

    /// Wakes this one, instead of the last one, when the next message comes.
    pub(crate) fn wake_by(&self, waker: &Waker) {
        self.waiting.set(waker);
    }

    /// Events that have happened since the last call; never waits.
    pub fn events(&self) -> impl Iterator<Item = Event> + '_ {
        std::iter::from_fn(|| self.next_event(|| Error::EngineGone))
    }

    /// The next event that is there already. A result is kept for
    /// [`SubmittedRequest::take_output`]; where the engine is gone and left none, `cause` is it.
    pub(crate) fn next_event(&self, cause: impl FnOnce() -> Error) -> Option<Event> {
        match self.messages.try_recv() {
            Ok(message) => self.keep(message),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                self.end(cause);
                None
            }
        }
    }

    /// The event that a message is; a result is kept.
    pub(crate) fn keep(&self, message: Message) -> Option<Event> {
        match message {
            Message::Event(event) => Some(event),
            Message::Finished(result) => {
                *self.outcome.borrow_mut() = Outcome::Ready(result);
                None
            }
        }
    }

    /// The engine is gone: without a result, `cause` is the result. False where it was told before.
    pub(crate) fn end(&self, cause: impl FnOnce() -> Error) -> bool {
        let mut outcome = self.outcome.borrow_mut();
        if matches!(*outcome, Outcome::Pending) {
            *outcome = Outcome::Ready(Box::new(Err(cause())));
        }
        matches!(*outcome, Outcome::Ready(_))
    }

    /// The outcome, once the request is finished and its events were read; given once.
    ///
    /// Errors: the request's own, or the engine's; [`Error::EngineGone`] where the engine was
    /// dropped before the request ended.
    pub fn take_output(&self) -> Option<Result<Output>> {
        let mut outcome = self.outcome.borrow_mut();
        match std::mem::replace(&mut *outcome, Outcome::Told) {
            Outcome::Ready(result) => Some(*result),
            other => {
                *outcome = other;
                None
            }
        }
    }

    /// Ends the request at the next tick; its output then holds the tokens so far.
    pub fn cancel(&self) {
        self.cancel.store(true, Ordering::Relaxed);
    }
}

/// What is said about stop texts where the generated positions are holes in a given text.
pub(crate) const STOP_IN_A_HOLE: &str = "stop texts end a text that is continued; the holes of an infilling have their own lengths";

/// Byte offset of the first of `texts` in `text`.
pub fn find_stop(text: &str, texts: &[String]) -> Option<usize> {
    texts.iter().filter_map(|t| text.find(t.as_str())).min()
}

/// Text of the tokens generated after `before`, up to the first of the ids `ends` and the first of
/// the texts in `stop`, and whether it ends at one of them.
pub(crate) fn generated_text(tokenizer: &Tokenizer, before: &[u32], tokens: &[u32], ends: &[u32], stop: &[String]) -> (String, bool) {
    let end = tokens.iter().position(|token| ends.contains(token));
    let mut text = tokenizer.decode_after(before, &tokens[..end.unwrap_or(tokens.len())]);
    let at = find_stop(&text, stop);
    if let Some(at) = at {
        text.truncate(at);
    }
    (text, end.is_some() || at.is_some())
}

/// The fewest tokens after `before` whose text holds a stop text.
pub(crate) fn stop_at(tokenizer: &Tokenizer, texts: &[String], before: &[u32], tokens: &[u32]) -> Option<usize> {
    find_stop(&tokenizer.decode_after(before, tokens), texts)?;
    (1..=tokens.len()).find(|n| find_stop(&tokenizer.decode_after(before, &tokens[..*n]), texts).is_some())
}

/// Splits `"The [____:12] sat."` into text and holes. A hole is `[`, one or more `_`, `:`, a count,
/// `]`; anything else is text. A space before a hole belongs to the hole: vocabularies spell words
/// with the space in front, so the model writes it.
///
/// Errors: [`Error::Request`] where there is no hole, or one of no tokens.
pub fn parse_infill(text: &str) -> Result<Vec<Segment>> {
    let mut segments = Vec::new();
    let mut plain = String::new();
    let mut rest = text;
    while let Some(open) = rest.find('[') {
        let hole = rest[open + 1..].split_once(']').and_then(|(inner, after)| {
            let count = inner.trim_start_matches('_').strip_prefix(':')?;
            (inner.starts_with('_') && !count.is_empty() && count.bytes().all(|b| b.is_ascii_digit())).then_some((count, after))
        });
        match hole {
            Some((count, after)) => {
                plain.push_str(&rest[..open]);
                if plain.ends_with(' ') {
                    plain.pop();
                }
                if !plain.is_empty() {
                    segments.push(Segment::Text(std::mem::take(&mut plain)));
                }
                let length =
                    count.parse().ok().filter(|n| *n > 0).ok_or_else(|| Error::request(format!("--infill: hole of `{count}` tokens")))?;
                segments.push(Segment::Hole(length));
                rest = after;
            }
            None => {
                plain.push_str(&rest[..=open]);
                rest = &rest[open + 1..];
            }
        }
    }
    plain.push_str(rest);
    if !plain.is_empty() {
        segments.push(Segment::Text(plain));
    }
    if !segments.iter().any(|s| matches!(s, Segment::Hole(_))) {
        return Err(Error::request("--infill: no hole found; write one as [____:12] for twelve tokens"));
    }
    Ok(segments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn infill_syntax() {
        let hole = Segment::Hole;
        let text = |t: &str| Segment::Text(t.into());
        assert_eq!(
            parse_infill("The [____:12] sat on the [_:4].").unwrap(),
            [text("The"), hole(12), text(" sat on the"), hole(4), text(".")]
        );
        assert_eq!(parse_infill("[__:3]").unwrap(), [hole(3)]);
        assert_eq!(parse_infill("a [b] [:3] [_] [_:x] [_:2]").unwrap(), [text("a [b] [:3] [_] [_:x]"), hole(2)]);
        assert_eq!(parse_infill("[[_:2]").unwrap(), [text("["), hole(2)]);
        assert!(parse_infill("no hole").is_err());
        assert!(parse_infill("[_:0]").is_err());
        assert!(parse_infill("[_:99999999999999999999999]").is_err());
    }
}
