//! Caller's end of a request: events, cancellation, the finished text.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use super::json::GenerationJson;
use super::text::TextRules;
use crate::error::{Error, Result};
use crate::request::{Output, SubmittedRequest};
use crate::schedule::Schedule;
use crate::sequence::Event;

/// What a request asked for, as far as its result needs it.
pub(super) struct Asked {
    pub(super) rules: TextRules,
    pub(super) seed: u64,
    pub(super) schedule: Schedule,
}

/// A finished text. Serialises as the object that `redraft generate --format json` prints, without
/// what belongs to the engine.
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
    /// Seed of the request.
    pub seed: u64,
    /// Schedule of the request, as it was resolved against the model.
    pub schedule: Schedule,
    rules: TextRules,
}

impl Generation {
    fn new(output: Output, asked: &Asked) -> Generation {
        let Asked { rules, seed, schedule } = asked;
        let text = if rules.infills { rules.decode(&output.canvas) } else { rules.text(&output.tokens).0 };
        Generation { text, draft: rules.text(&output.draft).0, output, seed: *seed, schedule: schedule.clone(), rules: rules.clone() }
    }

    /// Tokens that were given: the prompt, or what stands around the holes.
    pub fn given_tokens(&self) -> usize {
        self.output.canvas.len() - self.output.tokens.len()
    }

    /// Text of each generated token, so that they join to the text of all of them: a character of
    /// several tokens is the last one's.
    pub fn pieces(&self) -> Vec<String> {
        self.rules.pieces(&self.rules.before, &self.output.tokens)
    }
}

impl serde::Serialize for Generation {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        GenerationJson::new(&self.output, &self.rules, self.seed, &self.schedule).serialize(serializer)
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
    asked: Asked,
    /// The engine's thread, where it has one: without, nothing advances while a caller waits.
    thread: Option<Failure>,
}

impl RequestHandle {
    pub(super) fn new(core: SubmittedRequest, asked: Asked, thread: Option<Failure>) -> RequestHandle {
        RequestHandle { core, asked, thread }
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

    /// [`RequestHandle::wait`] for an executor: pending until the text is finished, and the task is
    /// woken then. `std::future::poll_fn` makes a future of it.
    pub fn poll_wait(&self, context: &mut Context<'_>) -> Poll<Result<Generation>> {
        if let Some(result) = self.try_wait() {
            return Poll::Ready(result);
        }
        self.wake_by(context.waker());
        // What came between the two looks woke nobody.
        self.try_wait().map_or(Poll::Pending, Poll::Ready)
    }

    /// Wakes this one, instead of the last one, when something happens.
    pub(super) fn wake_by(&self, waker: &Waker) {
        self.core.wake_by(waker);
    }

    /// Ends the request at the next tick; its output then holds what has been revealed.
    pub fn cancel(&self) {
        self.core.cancel();
    }

    pub(super) fn rules(&self) -> &TextRules {
        &self.asked.rules
    }

    /// Index of the stage whose committed blocks are final.
    pub(super) fn last_stage(&self) -> usize {
        self.asked.schedule.stages().len() - 1
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
        self.core.take_output().map(|output| output.map(|output| Generation::new(output, &self.asked)))
    }
}
