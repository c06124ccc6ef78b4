//! A request that threads wait for, and asyncio tasks are woken for.
#![forbid(unsafe_code)]

use std::future::Future;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use engine::{Error, Generation, RequestHandle, TextEvent, TextStream};
use futures_channel::oneshot::Receiver;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert;
use crate::errors::exception;
use crate::wait::wait_for;
use crate::wake::waker;

/// How far a request has come.
enum State {
    /// The engine's thread has not looked at it.
    Queued(Receiver<engine::Result<RequestHandle>>),
    Running(Box<TextStream>),
    /// It was refused, and whoever waited was told; or it was cancelled before it was looked at.
    Gone,
}

impl State {
    /// The stream, once the engine has accepted the request.
    fn poll_accepted(&mut self, context: &mut Context<'_>) -> Poll<engine::Result<&mut TextStream>> {
        if let State::Queued(answer) = self {
            let answer = match Pin::new(answer).poll(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(answer) => answer.unwrap_or(Err(Error::EngineGone)),
            };
            *self = State::Gone;
            *self = State::Running(Box::new(answer?.into_text()));
        }
        Poll::Ready(match self {
            State::Running(stream) => Ok(stream),
            State::Queued(_) | State::Gone => Err(Error::EngineGone),
        })
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<engine::Result<Option<TextEvent>>> {
        match self.poll_accepted(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(stream)) => stream.poll_next(context).map(Ok),
        }
    }

    fn poll_done(&mut self, context: &mut Context<'_>) -> Poll<engine::Result<Generation>> {
        match self.poll_accepted(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(stream)) => {
                stream.poll_done(context).map(|result| result.unwrap_or_else(|| Err(Error::request("the result was given before"))))
            }
        }
    }
}

/// A request in flight. It is cancelled when it is dropped.
#[pyclass(frozen, module = "redraft._redraft")]
pub(crate) struct Request {
    // Locked for a look and never while waiting: another thread may cancel.
    state: Mutex<State>,
}

impl Request {
    pub(crate) fn new(answer: Receiver<engine::Result<RequestHandle>>) -> Request {
        Request { state: Mutex::new(State::Queued(answer)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the engine has accepted the request.
    ///
    /// Errors: why it refused; what a signal handler raised.
    pub(crate) fn accepted(&self, py: Python<'_>) -> PyResult<()> {
        wait_for(py, |context| self.state().poll_accepted(context).map(|accepted| accepted.map(|_| ())))?.map_err(|e| exception(&e))
    }

    /// What was waited for. Where a signal ended the wait, nobody will ask for the rest.
    fn or_cancel<T>(&self, found: PyResult<engine::Result<T>>) -> PyResult<T> {
        if found.is_err() {
            self.cancel();
        }
        found?.map_err(|error| exception(&error))
    }
}

#[pymethods]
impl Request {
    /// Waits for the next event; None after the last one.
    fn next(&self, py: Python<'_>) -> PyResult<Option<(&'static str, Py<PyAny>)>> {
        loop {
            let found = self.or_cancel(wait_for(py, |context| self.state().poll_next(context)))?;
            let Some(event) = found else { return Ok(None) };
            if let Some(event) = convert::event(py, event)? {
                return Ok(Some(event));
            }
        }
    }

    /// Waits for the finished text; no text is made of what comes before.
    fn wait<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let generation = self.or_cancel(wait_for(py, |context| self.state().poll_done(context)))?;
        convert::result(py, &Ok(generation))
    }

    /// The next event that is there; None where there is none, and then `callback` is called once,
    /// on another thread, when there may be one.
    fn poll(&self, py: Python<'_>, callback: Py<PyAny>) -> PyResult<Option<(&'static str, Py<PyAny>)>> {
        let waker = waker(callback);
        loop {
            let found = py.detach(|| self.state().poll_next(&mut Context::from_waker(&waker)));
            let event = match found {
                Poll::Pending => return Ok(None),
                Poll::Ready(event) => event.map_err(|e| exception(&e))?,
            };
            let Some(event) = event else { return Err(exception(&Error::request("the last event was given before"))) };
            if let Some(event) = convert::event(py, event)? {
                return Ok(Some(event));
            }
        }
    }

    /// The finished text where it is there; None and a callback otherwise, as of `poll`.
    fn poll_done<'py>(&self, py: Python<'py>, callback: Py<PyAny>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let waker = waker(callback);
        match py.detach(|| self.state().poll_done(&mut Context::from_waker(&waker))) {
            Poll::Pending => Ok(None),
            Poll::Ready(result) => convert::result(py, &result).map(Some),
        }
    }

    /// Ends the request at the next forward.
    fn cancel(&self) {
        let mut state = self.state();
        match &*state {
            State::Running(stream) => stream.cancel(),
            // Dropping the answer drops the request with it.
            State::Queued(_) => *state = State::Gone,
            State::Gone => {}
        }
    }
}
