//! An engine on a thread of its own: requests come from any thread and wait for their texts there.
#![forbid(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::engine::Engine;
use super::handle::{Failure, RequestHandle, cause_of};
use super::options::{Options, Prompt};
use crate::error::{Error, Result};

/// A request on its way to the engine's thread, and where its handle goes.
struct Submission {
    prompt: Prompt,
    options: Options,
    reply: Sender<Result<RequestHandle>>,
}

/// An engine that runs on a thread of its own. Clones share it; it ends with the last of them,
/// after the requests in flight.
#[derive(Clone)]
pub struct EngineThread {
    submissions: Option<Sender<Submission>>,
    thread: Arc<Thread>,
}

struct Thread {
    handle: Mutex<Option<JoinHandle<()>>>,
    failure: Failure,
}

impl Engine {
    /// Hands the engine to a thread of its own, which serves requests until the last
    /// [`EngineThread`] is gone.
    pub fn spawn(self) -> EngineThread {
        EngineThread::start(self)
    }
}

impl EngineThread {
    pub(super) fn start(mut engine: Engine) -> EngineThread {
        let (submissions, inbox) = channel();
        let failure: Failure = Arc::default();
        let kept = failure.clone();
        let handle = std::thread::spawn(move || {
            // A panic is a fault of ours; requests still get an outcome that says so.
            let served = catch_unwind(AssertUnwindSafe(|| serve(&mut engine, &inbox, &kept)));
            let error = match served {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error,
                Err(panic) => {
                    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
                    Error::device(format!("the engine's thread panicked: {}", text.unwrap_or("without a word")))
                }
            };
            // Told before the engine is dropped, which is how handles notice.
            if let Ok(mut failure) = kept.lock() {
                *failure = Some(error.clone());
            }
            engine.abandon(&error);
        });
        EngineThread { submissions: Some(submissions), thread: Arc::new(Thread { handle: Mutex::new(Some(handle)), failure }) }
    }

    /// Queues a request; it is batched with those in flight. Waits only until the engine's thread
    /// has looked at it, between two ticks.
    ///
    /// Errors: [`crate::Error::Request`] for a prompt, length or schedule that the model cannot
    /// serve; what ended the engine, or [`crate::Error::EngineGone`], where it ended.
    pub fn submit(&self, prompt: impl Into<Prompt>, options: Options) -> Result<RequestHandle> {
        let (reply, answer) = channel();
        let submission = Submission { prompt: prompt.into(), options, reply };
        let sent = self.submissions.as_ref().is_some_and(|submissions| submissions.send(submission).is_ok());
        let answer = if sent { answer.recv().ok() } else { None };
        answer.unwrap_or_else(|| Err(cause_of(&self.thread.failure)))
    }
}

impl Drop for EngineThread {
    /// The last one waits until the requests in flight are finished.
    fn drop(&mut self) {
        self.submissions = None;
        if Arc::strong_count(&self.thread) == 1
            && let Ok(mut handle) = self.thread.handle.lock()
            && let Some(handle) = handle.take()
        {
            // A panic there has already been printed; here it must not become a second one.
            let _ = handle.join();
        }
    }
}

/// Serves until all submitters are gone and nothing is in flight.
fn serve(engine: &mut Engine, inbox: &Receiver<Submission>, failure: &Failure) -> Result<()> {
    let mut open = true;
    loop {
        while open {
            match inbox.try_recv() {
                Ok(submission) => accept(engine, submission, failure),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => open = false,
            }
        }
        if !engine.tick()? {
            if !open {
                return Ok(());
            }
            match inbox.recv() {
                Ok(submission) => accept(engine, submission, failure),
                Err(_) => open = false,
            }
        }
    }
}

fn accept(engine: &mut Engine, submission: Submission, failure: &Failure) {
    let Submission { prompt, options, reply } = submission;
    let handle = engine.submit(prompt, options).map(|handle| handle.on_thread(failure.clone()));
    // A caller that is gone drops its handle, which cancels the request.
    let _ = reply.send(handle);
}
