//! An engine on a thread of its own: requests come from any thread and wait for their texts there.
#![forbid(unsafe_code)]

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::engine::{Engine, ModelInfo};
use super::handle::{Failure, RequestHandle, cause_of};
use super::options::{Options, Prompt};
use crate::engine::EngineStats;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// What the engine's thread does between two ticks.
type Job = Box<dyn FnOnce(&mut Engine) + Send>;

/// An engine that runs on a thread of its own. Clones share it; it ends with the last of them,
/// after the requests in flight.
#[derive(Clone)]
pub struct EngineThread {
    jobs: Option<Sender<Job>>,
    thread: Arc<Thread>,
}

struct Thread {
    handle: Mutex<Option<JoinHandle<()>>>,
    failure: Failure,
    model: ModelInfo,
    tokenizer: Result<Arc<Tokenizer>>,
    device_name: String,
    stats: Arc<Mutex<EngineStats>>,
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
        let (jobs, inbox) = channel();
        let failure: Failure = Arc::default();
        engine.thread = Some(failure.clone());
        let stats = Arc::new(Mutex::new(engine.stats()));
        let mut thread = Thread {
            handle: Mutex::default(),
            failure: failure.clone(),
            model: engine.model(),
            tokenizer: engine.tokenizer().cloned(),
            device_name: engine.device_name(),
            stats: stats.clone(),
        };
        let handle = std::thread::spawn(move || {
            // A panic is a fault of ours; requests still get an outcome that says so.
            let served = catch_unwind(AssertUnwindSafe(|| serve(&mut engine, &inbox, &stats)));
            let error = match served {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error,
                Err(panic) => panicked(panic.as_ref()),
            };
            // Told before the engine is dropped, which is how handles notice.
            if let Ok(mut failure) = failure.lock() {
                *failure = Some(error.clone());
            }
            engine.abandon(&error);
        });
        thread.handle = Mutex::new(Some(handle));
        EngineThread { jobs: Some(jobs), thread: Arc::new(thread) }
    }

    /// Queues a request; it is batched with those in flight. Waits only until the engine's thread
    /// has looked at it, between two ticks.
    ///
    /// Errors: [`crate::Error::Request`] for a prompt, length or schedule that the model cannot
    /// serve; what ended the engine, or [`crate::Error::EngineGone`], where it ended.
    pub fn submit(&self, prompt: impl Into<Prompt>, options: Options) -> Result<RequestHandle> {
        let prompt = prompt.into();
        self.call(|engine| engine.submit(prompt, options))?
    }

    /// Runs `work` on the engine's thread, between two ticks, and waits for what it returns: to
    /// score a text, or to submit several requests before the next tick. A panic in it ends the
    /// engine.
    ///
    /// Errors: what ended the engine, or [`crate::Error::EngineGone`], where it ended.
    pub fn call<R: Send + 'static>(&self, work: impl FnOnce(&mut Engine) -> R + Send + 'static) -> Result<R> {
        let (reply, answer) = channel();
        self.post(move |engine| match catch_unwind(AssertUnwindSafe(|| work(engine))) {
            // A caller that is gone drops what it asked for: a handle in it cancels its request.
            Ok(value) => drop(reply.send(Ok(value))),
            Err(panic) => {
                // Told from here: the caller may be faster than the end of the thread.
                let _ = reply.send(Err(panicked(panic.as_ref())));
                resume_unwind(panic)
            }
        })?;
        answer.recv().unwrap_or_else(|_| Err(cause_of(&self.thread.failure)))
    }

    /// [`EngineThread::call`] that does not wait: for callers that must not block. Where the engine
    /// ends first, `work` is dropped and not run.
    ///
    /// Errors: what ended the engine, or [`crate::Error::EngineGone`], where it ended before.
    pub fn post(&self, work: impl FnOnce(&mut Engine) + Send + 'static) -> Result<()> {
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(Box::new(work)).is_ok());
        if sent { Ok(()) } else { Err(cause_of(&self.thread.failure)) }
    }

    /// What is in flight, and the work done, after the last tick. Never waits for the engine.
    pub fn stats(&self) -> EngineStats {
        *self.thread.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What ended the engine; `None` while it serves.
    pub fn failure(&self) -> Option<Error> {
        self.thread.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the first model is.
    pub fn model(&self) -> &ModelInfo {
        &self.thread.model
    }

    /// The tokenizer. Errors: [`crate::Error::Tokenizer`] that says why there is none.
    pub fn tokenizer(&self) -> Result<&Arc<Tokenizer>> {
        self.thread.tokenizer.as_ref().map_err(Clone::clone)
    }

    /// See [`Engine::device_name`].
    pub fn device_name(&self) -> &str {
        &self.thread.device_name
    }
}

impl Drop for EngineThread {
    /// The last one waits until the requests in flight are finished.
    fn drop(&mut self) {
        self.jobs = None;
        if Arc::strong_count(&self.thread) == 1
            && let Ok(mut handle) = self.thread.handle.lock()
            && let Some(handle) = handle.take()
        {
            // A panic there has already been printed; here it must not become a second one.
            let _ = handle.join();
        }
    }
}

/// A panic of the engine's thread as an error.
fn panicked(panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    Error::device(format!("the engine's thread panicked: {}", text.unwrap_or("without a word")))
}

/// Serves until all submitters are gone and nothing is in flight.
fn serve(engine: &mut Engine, inbox: &Receiver<Job>, stats: &Mutex<EngineStats>) -> Result<()> {
    let mut open = true;
    loop {
        while open {
            match inbox.try_recv() {
                Ok(job) => job(engine),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => open = false,
            }
        }
        let busy = engine.tick()?;
        *stats.lock().unwrap_or_else(PoisonError::into_inner) = engine.stats();
        if !busy {
            if !open {
                return Ok(());
            }
            match inbox.recv() {
                Ok(job) => job(engine),
                Err(_) => open = false,
            }
        }
    }
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
        #[allow(irrefutable_let_patterns)] // without the feature cuda there is one backend
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
        let mut engine = stopped();
        // Two would run and the others wait. Queued before the thread's first tick, which a busy
        // machine may run before a request gets there.
        let queued = |_| engine.submit("One day", Options::default().length(24)).expect("accepted before the first tick");
        let handles: Vec<RequestHandle> = (0..7).map(queued).collect();
        let thread = engine.spawn();
        for handle in handles {
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
