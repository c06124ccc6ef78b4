//! Caller's end of a request: events, cancellation, the finished text.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex};

use crate::error::{Error, Result};
use crate::request::{Output, SubmittedRequest, generated_text};
use crate::sequence::Event;
use crate::tokenizer::Tokenizer;

/// How token ids become the text of a request.
#[derive(Clone)]
pub(crate) struct TextRules {
    /// `None` for models without one: texts are empty.
    pub(crate) tokenizer: Option<Arc<Tokenizer>>,
    /// Given tokens before the first generated one: how a token is spelled depends on them.
    pub(crate) before: Vec<u32>,
    /// Ids that end the text, if the model writes them.
    pub(crate) ends: Vec<u32>,
    pub(crate) stop: Vec<String>,
    /// Index of the stage whose committed blocks are final.
    pub(crate) last_stage: usize,
    /// The generated positions are holes in a given text.
    pub(crate) infills: bool,
}

impl TextRules {
    /// Text of generated tokens: up to the end of text and the first stop text, and whether it ends
    /// there.
    pub(crate) fn text(&self, tokens: &[u32]) -> (String, bool) {
        let Some(tokenizer) = &self.tokenizer else { return (String::new(), false) };
        generated_text(tokenizer, &self.before, tokens, &self.ends, &self.stop)
    }

    /// The part of [`TextRules::text`] that no later token changes, and whether the text ends with
    /// it.
    pub(crate) fn settled(&self, tokens: &[u32]) -> (String, bool) {
        let (text, ended) = self.text(tokens);
        let Some(tokenizer) = self.tokenizer.as_ref().filter(|_| !ended) else { return (text, ended) };
        let mut text = tokenizer.decode_settled(&self.before, tokens);
        // What may begin a stop text.
        let begins = |at: usize| self.stop.iter().any(|stop| stop.starts_with(&text[at..]));
        if let Some(at) = text.char_indices().map(|(at, _)| at).find(|at| begins(*at)) {
            text.truncate(at);
        }
        (text, false)
    }

    /// Text of tokens after others, which may be none.
    pub(crate) fn decode_after(&self, before: &[u32], tokens: &[u32]) -> String {
        self.tokenizer.as_ref().map_or_else(String::new, |tokenizer| tokenizer.decode_after(before, tokens))
    }

    pub(crate) fn decode(&self, tokens: &[u32]) -> String {
        self.tokenizer.as_ref().map_or_else(String::new, |tokenizer| tokenizer.decode(tokens))
    }
}

/// A finished text.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Generation {
    /// What was generated, up to the end-of-text token and the first stop text. For prompts with
    /// holes: the whole text with its holes filled.
    pub text: String,
    /// The generated text when the first stage was done.
    pub draft: String,
    /// Tokens, positions, confidence, stages, counters and times.
    pub output: Output,
}

impl Generation {
    pub(crate) fn new(output: Output, rules: &TextRules) -> Generation {
        let text = if rules.infills { rules.decode(&output.canvas) } else { rules.text(&output.tokens).0 };
        Generation { text, draft: rules.text(&output.draft).0, output }
    }
}

/// Why the thread of an engine ended, where it failed.
pub(super) type Failure = Arc<Mutex<Option<Error>>>;

/// What ended the thread of an engine: its failure, where it had one.
pub(super) fn cause_of(failure: &Failure) -> Error {
    failure.lock().ok().and_then(|failure| failure.clone()).unwrap_or(Error::EngineGone)
}

/// A request in flight. Dropping the handle cancels the request.
pub struct RequestHandle {
    core: SubmittedRequest,
    rules: TextRules,
    /// The engine's thread, where it has one: without, nothing advances while a caller waits.
    thread: Option<Failure>,
}

impl RequestHandle {
    pub(super) fn new(core: SubmittedRequest, rules: TextRules) -> RequestHandle {
        RequestHandle { core, rules, thread: None }
    }

    pub(super) fn on_thread(mut self, failure: Failure) -> RequestHandle {
        self.thread = Some(failure);
        self
    }

    /// Events since the last call; never waits. Each gives a stage, a step, positions, tokens and
    /// confidences.
    pub fn events(&self) -> impl Iterator<Item = Event> + '_ {
        std::iter::from_fn(|| self.poll())
    }

    /// The result if the request is finished, given once; never waits. Unread events are dropped.
    pub fn try_wait(&self) -> Option<Result<Generation>> {
        self.events().for_each(drop);
        self.take()
    }

    /// What ended the engine.
    fn cause(&self) -> Error {
        self.thread.as_ref().map_or(Error::EngineGone, cause_of)
    }

    /// Waits for the finished text. For requests of an [`super::EngineThread`]; on an engine that
    /// the caller drives, [`super::Engine::wait`] waits.
    ///
    /// Errors: the request's own; [`Error::EngineGone`], or what ended the engine, where it ended
    /// first; [`Error::Request`] for an engine that has no thread.
    pub fn wait(self) -> Result<Generation> {
        loop {
            if let Some(result) = self.try_wait() {
                return result;
            }
            self.receive()?;
        }
    }

    /// Ends the request at the next tick; its output then holds what has been revealed.
    pub fn cancel(&self) {
        self.core.cancel();
    }

    pub(super) fn rules(&self) -> &TextRules {
        &self.rules
    }

    /// Blocks until a message has come. An event is returned, a result is kept for
    /// [`RequestHandle::try_wait`].
    pub(super) fn receive(&self) -> Result<Option<Event>> {
        if self.thread.is_none() {
            return Err(Error::request("this engine is driven by its caller: use Engine::wait, or tick it between two looks"));
        }
        match self.core.messages.recv() {
            Ok(message) => Ok(self.core.keep(message)),
            Err(_) if self.core.end(|| self.cause()) => Ok(None),
            // The result was told before.
            Err(_) => Err(self.cause()),
        }
    }

    /// The next event that is there already. Where the engine is gone and left no result, what
    /// ended it becomes the result.
    pub(super) fn poll(&self) -> Option<Event> {
        self.core.next_event(|| self.cause())
    }

    /// The result that has come, given once.
    pub(super) fn take(&self) -> Option<Result<Generation>> {
        self.core.take_output().map(|output| output.map(|output| Generation::new(output, &self.rules)))
    }
}
