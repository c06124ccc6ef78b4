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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::core::AnyCore;
    use crate::api::device::Device;
    use crate::request::Request;

    /// An engine whose every tick is an error: an earlier one panicked.
    fn stopped() -> Engine {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/models/redraft-stories-10m");
        let mut engine = Engine::builder(dir).device(Device::Cpu).threads(1).max_sequences(2).open().expect("the model that ships");
        let AnyCore::Cpu(core) = &mut engine.core else { panic!("asked for the CPU") };
        let prompt = crate::request::Prompt::Tokens { tokens: vec![1], length: 8 };
        let mut request = Request::new(prompt, crate::Schedule::preset("draft", &crate::Defaults::default()).expect("a preset"), 1, 0);
        request.draws = Some(Arc::new(|_| panic!("a source of draws that fails")));
        let handle = core.submit(request).expect("queued");
        assert!(catch_unwind(AssertUnwindSafe(|| core.run())).is_err());
        drop(handle);
        engine
    }

    #[test]
    fn a_tick_that_fails_is_told_to_every_request_and_to_whoever_comes_later() {
        let thread = stopped().spawn();
        // Two would run and the others wait. What is not queued before the tick is told at once.
        let outcomes: Vec<Result<RequestHandle>> = (0..7).map(|_| thread.submit("One day", Options::default().length(24))).collect();
        assert!(outcomes[0].is_ok(), "accepted before the first tick");
        for outcome in outcomes {
            let handle = match outcome {
                Ok(handle) => handle,
                Err(error) => {
                    assert!(error.to_string().contains("panicked"), "{error}");
                    continue;
                }
            };
            let error = loop {
                match handle.try_wait() {
                    Some(outcome) => break outcome.expect_err("the engine failed"),
                    None => std::thread::yield_now(),
                }
            };
            assert!(error.to_string().contains("an earlier tick of this engine panicked"), "{error}");
            assert!(handle.try_wait().is_none(), "told once");
        }
        for thread in [thread.clone(), thread] {
            let error = thread.submit("Later", Options::default()).err().expect("the engine ended");
            assert!(error.to_string().contains("an earlier tick of this engine panicked"), "{error}");
        }
    }
}
