//! An engine on its thread.
#![forbid(unsafe_code)]

use std::sync::{Mutex, PoisonError};

use engine::EngineThread;
use futures_channel::oneshot::channel;
use pyo3::prelude::*;

use crate::errors::{closed, exception};
use crate::request::Request;
use crate::wait::wait_for_answer;

/// A loaded model on a thread of its own.
#[pyclass(frozen, module = "redraft._redraft")]
pub(crate) struct Engine {
    /// None once it was closed.
    thread: Mutex<Option<EngineThread>>,
}

impl Engine {
    /// Runs `work` on the engine's thread and waits for its answer.
    fn call<T: Send + 'static>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut engine::Engine) -> engine::Result<T> + Send + 'static,
    ) -> PyResult<T> {
        let (sender, answer) = channel();
        let posted = self.thread()?.post(move |engine| {
            // Nobody may wait any more.
            let _ = sender.send(work(engine));
        });
        posted.map_err(|e| exception(&e))?;
        wait_for_answer(py, answer)?.and_then(|answer| answer).map_err(|e| exception(&e))
    }

    fn thread(&self) -> PyResult<EngineThread> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(closed)
    }
}

#[pymethods]
impl Engine {
    #[new]
    fn new(py: Python<'_>, path: String, settings: String) -> PyResult<Engine> {
        let (sender, answer) = channel();
        // On a thread of its own, so that Ctrl-C ends the wait for a large model.
        std::thread::spawn(move || {
            let opened = engine::Engine::builder(path).json(&settings).and_then(|builder| builder.open());
            let _ = sender.send(opened.map(engine::Engine::spawn));
        });
        let thread = wait_for_answer(py, answer)?.and_then(|opened| opened).map_err(|e| exception(&e))?;
        Ok(Engine { thread: Mutex::new(Some(thread)) })
    }

    /// Queues a request, and never waits: a request that the engine refuses is told by its first
    /// wait.
    fn post(&self, request: &str) -> PyResult<Request> {
        let (prompt, options) = engine::json::request(request).map_err(|e| exception(&e))?;
        let (sender, answer) = channel();
        let posted = self.thread()?.post(move |engine| {
            // A request that nobody waits for is dropped, which cancels it.
            let _ = sender.send(engine.submit(prompt, options));
        });
        posted.map_err(|e| exception(&e))?;
        Ok(Request::new(answer))
    }

    /// Queues a request, and waits until the engine has looked at it, between two forwards.
    fn submit(&self, py: Python<'_>, request: &str) -> PyResult<Request> {
        let request = self.post(request)?;
        request.accepted(py)?;
        Ok(request)
    }

    /// Negative log-likelihood of each token in nats.
    fn score(&self, py: Python<'_>, text: String) -> PyResult<Vec<f64>> {
        self.call(py, move |engine| engine.score(&text))
    }

    fn score_tokens(&self, py: Python<'_>, tokens: Vec<u32>) -> PyResult<Vec<f64>> {
        self.call(py, move |engine| engine.score_tokens(&tokens))
    }

    fn tokenize(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        let thread = self.thread()?;
        py.detach(move || thread.tokenizer()?.encode(text)).map_err(|e| exception(&e))
    }

    fn detokenize(&self, py: Python<'_>, tokens: Vec<u32>) -> PyResult<String> {
        let thread = self.thread()?;
        py.detach(move || Ok(thread.tokenizer()?.decode(&tokens))).map_err(|e: engine::Error| exception(&e))
    }

    /// What the model is, as JSON.
    fn model(&self) -> PyResult<String> {
        Ok(serde_json::to_string(self.thread()?.model()).unwrap_or_default())
    }

    /// What is in flight and what was done, as JSON.
    fn stats(&self) -> PyResult<String> {
        Ok(serde_json::to_string(&self.thread()?.stats()).unwrap_or_default())
    }

    fn device_name(&self) -> PyResult<String> {
        Ok(self.thread()?.device_name().to_owned())
    }

    /// Finishes the requests in flight, and frees the model.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return Ok(()) };
        let (sender, answer) = channel();
        std::thread::spawn(move || {
            drop(thread);
            let _ = sender.send(());
        });
        wait_for_answer(py, answer)?.map_err(|e| exception(&e))
    }
}

impl Drop for Engine {
    /// The last handle of an engine waits for what is in flight; a garbage collector must not.
    fn drop(&mut self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            std::thread::spawn(move || drop(thread));
        }
    }
}
