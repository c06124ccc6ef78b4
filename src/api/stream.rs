//! Text of a request while it is written: final text as deltas, provisional text as snapshots.
//!
//! Blocks that the last stage has committed are final: their text comes as deltas, which join to
//! [`Generation::text`]. Tokens of earlier stages, and those that the last stage has unmasked
//! in an open block, may still change: it comes as snapshots of the whole text.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::task::{Context, Poll};

use super::handle::{Generation, RequestHandle};
use crate::error::Result;
use crate::sequence::{Event, EventKind};

/// What a snapshot shows for positions that hold no token.
const MASKED: &str = "·";

/// One piece of a [`TextStream`].
#[derive(Debug)]
#[non_exhaustive]
pub enum TextEvent {
    /// Final text, after all deltas before it.
    Delta(String),
    /// The text as it is now; it replaces the last snapshot.
    Snapshot(Snapshot),
    /// The end: the finished text, or the request's error.
    Done(Box<Result<Generation>>),
}

/// All positions that have held a generated token, as they are now.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Snapshot {
    /// Index of the stage that is at work.
    pub stage: usize,
    /// Denoising forwards of the stage before the last change.
    pub step: u32,
    /// Text of the positions below, a dot for each that is masked again.
    pub text: String,
    /// Positions in the sequence, ascending.
    pub positions: Vec<usize>,
    /// Token of each position; `None` while it is masked.
    pub tokens: Vec<Option<u32>>,
    /// Text of each position, which join to `text`.
    pub pieces: Vec<String>,
    /// Probability of each token when it was revealed; 0 while its position is masked.
    pub confidence: Vec<f32>,
    /// Positions that the stage at work masked again, those that have a new token included.
    pub remasked: Vec<usize>,
}

/// The text of one request as it is written. As an iterator it waits, which needs an
/// [`super::EngineThread`]; [`TextStream::try_next`] never waits.
pub struct TextStream {
    handle: RequestHandle,
    /// (token, confidence) of every position that was revealed.
    cells: BTreeMap<usize, (Option<u32>, f32)>,
    stage: usize,
    step: u32,
    /// What the stage at work masked again.
    remasked: BTreeSet<usize>,
    /// Positions below it are final.
    final_end: usize,
    /// Deltas so far.
    sent: String,
    /// Something provisional changed since the last snapshot.
    changed: bool,
    /// Snapshots are told.
    provisional: bool,
    /// Each change has a snapshot of its own.
    every_step: bool,
    /// `final_end` when the final text was last looked at.
    seen_end: usize,
    /// The result, while its last text is told.
    result: Option<Result<Generation>>,
    finished: bool,
}

impl RequestHandle {
    /// The text as it is written: final text as deltas, provisional text as snapshots.
    pub fn into_text(self) -> TextStream {
        TextStream::new(self)
    }
}

impl TextStream {
    fn new(handle: RequestHandle) -> TextStream {
        TextStream {
            handle,
            cells: BTreeMap::new(),
            stage: 0,
            step: 0,
            remasked: BTreeSet::new(),
            final_end: 0,
            sent: String::new(),
            changed: false,
            provisional: true,
            every_step: false,
            seen_end: 0,
            result: None,
            finished: false,
        }
    }

    /// Final text and the end alone, for readers that do not look at what may change.
    pub fn without_snapshots(mut self) -> TextStream {
        self.provisional = false;
        self
    }

    /// A snapshot for each change, for readers that show or replay all of them. Otherwise a reader
    /// that is slower than the engine gets several changes in one.
    pub fn every_step(mut self) -> TextStream {
        self.every_step = true;
        self
    }

    /// Ends the request at the next tick.
    pub fn cancel(&self) {
        self.handle.cancel();
    }

    /// What has happened since the last call, if anything; never waits. Several changes make one
    /// snapshot.
    pub fn try_next(&mut self) -> Option<TextEvent> {
        if self.finished {
            return None;
        }
        while self.result.is_none() {
            match self.handle.poll() {
                Some(event) => self.apply(&event),
                None => break,
            }
            if self.every_step && self.changed {
                break;
            }
        }
        self.ready()
    }

    /// What is known and was not told yet.
    fn ready(&mut self) -> Option<TextEvent> {
        if let Some(delta) = self.delta() {
            return Some(TextEvent::Delta(delta));
        }
        self.result = self.result.take().or_else(|| self.handle.take());
        if let Some(result) = self.result.take() {
            if let Ok(generation) = &result
                && !self.handle.rules().infills
                && let Some(rest) = generation.text.strip_prefix(&self.sent).filter(|rest| !rest.is_empty())
            {
                let rest = rest.to_owned();
                self.sent.clone_from(&generation.text);
                self.result = Some(result);
                return Some(TextEvent::Delta(rest));
            }
            return Some(self.finish(result));
        }
        (std::mem::take(&mut self.changed) && self.provisional).then(|| TextEvent::Snapshot(self.snapshot()))
    }

    fn finish(&mut self, result: Result<Generation>) -> TextEvent {
        self.finished = true;
        TextEvent::Done(Box::new(result))
    }

    fn apply(&mut self, event: &Event) {
        if self.stage != usize::from(event.stage) {
            self.stage = usize::from(event.stage);
            self.remasked.clear();
        }
        self.step = event.step;
        match event.kind {
            EventKind::Unmask | EventKind::Edit => {
                for ((position, token), confidence) in event.positions.iter().zip(&event.tokens).zip(&event.confidence) {
                    self.cells.insert(*position, (Some(*token), *confidence));
                }
                self.changed = true;
            }
            EventKind::Remask => {
                for position in &event.positions {
                    self.cells.insert(*position, (None, 0.0));
                }
                self.remasked.extend(&event.positions);
                self.changed = true;
            }
            EventKind::Commit if self.stage == self.handle.last_stage() => {
                self.final_end = self.final_end.max(event.positions.last().map_or(0, |position| position + 1));
            }
            EventKind::Commit | EventKind::Done => {}
        }
    }

    /// Final text that was not sent yet. Held back: an incomplete character, and what may begin a
    /// stop text.
    fn delta(&mut self) -> Option<String> {
        let rules = self.handle.rules();
        // Nothing became final since the last time: the text of what is final is the same.
        if rules.infills || self.final_end == self.seen_end {
            return None;
        }
        self.seen_end = self.final_end;
        let tokens: Vec<u32> = self.cells.range(..self.final_end).map_while(|(_, (token, _))| *token).collect();
        let (text, _) = rules.settled(&tokens);
        let delta = text.strip_prefix(&self.sent).filter(|delta| !delta.is_empty())?.to_owned();
        self.sent = text;
        Some(delta)
    }

    fn snapshot(&self) -> Snapshot {
        let rules = self.handle.rules();
        let mut pieces = Vec::with_capacity(self.cells.len());
        // Tokens before the run, masked positions left out.
        let mut before = rules.before.clone();
        let mut run = Vec::new();
        for (token, _) in self.cells.values() {
            match token {
                Some(token) => run.push(*token),
                None => {
                    pieces.extend(rules.pieces(&before, &run));
                    before.append(&mut run);
                    pieces.push(MASKED.to_owned());
                }
            }
        }
        pieces.extend(rules.pieces(&before, &run));
        Snapshot {
            stage: self.stage,
            step: self.step,
            text: pieces.concat(),
            positions: self.cells.keys().copied().collect(),
            tokens: self.cells.values().map(|(token, _)| *token).collect(),
            pieces,
            confidence: self.cells.values().map(|(_, confidence)| *confidence).collect(),
            remasked: self.remasked.iter().copied().collect(),
        }
    }

    /// The next piece for an executor: pending while there is none, and the task is woken when
    /// something happens. `futures::stream::poll_fn` makes a stream of it. `None` after
    /// [`TextEvent::Done`].
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<TextEvent>> {
        if let Some(event) = self.try_next() {
            return Poll::Ready(Some(event));
        }
        if self.finished {
            return Poll::Ready(None);
        }
        self.handle.wake_by(context.waker());
        // What came between the two looks woke nobody.
        self.try_next().map_or(Poll::Pending, |event| Poll::Ready(Some(event)))
    }

    /// The result for an executor, without the text on the way: pending while there is none, and
    /// the task is woken when something happens. `None` where the result was told before. A stream
    /// that goes on with [`TextStream::poll_next`] has missed nothing.
    pub fn poll_done(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Generation>>> {
        if self.finished {
            return Poll::Ready(None);
        }
        if let Some(result) = self.look_for_result() {
            return Poll::Ready(Some(result));
        }
        self.handle.wake_by(context.waker());
        // What came between the two looks woke nobody.
        self.look_for_result().map_or(Poll::Pending, |result| Poll::Ready(Some(result)))
    }

    fn look_for_result(&mut self) -> Option<Result<Generation>> {
        while self.result.is_none()
            && let Some(event) = self.handle.poll()
        {
            self.apply(&event);
        }
        let result = self.result.take().or_else(|| self.handle.take());
        self.finished = result.is_some();
        result
    }
}

impl Iterator for TextStream {
    type Item = TextEvent;

    /// Waits for the next piece. `None` after [`TextEvent::Done`].
    fn next(&mut self) -> Option<TextEvent> {
        while !self.finished {
            if let Some(event) = self.try_next() {
                return Some(event);
            }
            match self.handle.receive() {
                Ok(Some(event)) => self.apply(&event),
                Ok(None) => {}
                Err(error) => return Some(self.finish(Err(error))),
            }
        }
        None
    }
}
