//! Waits of a thread: without the interpreter's lock, and ended by Ctrl-C.
#![forbid(unsafe_code)]

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use engine::Error;
use futures_channel::oneshot::Receiver;
use pyo3::prelude::*;

/// How long Ctrl-C may stay unnoticed.
pub(crate) const SIGNALS_EVERY: Duration = Duration::from_millis(50);

/// Polls until something is ready.
///
/// Errors: what a signal handler raised, such as `KeyboardInterrupt`.
pub(crate) fn wait_for<T: Send>(py: Python<'_>, mut poll: impl FnMut(&mut Context<'_>) -> Poll<T> + Send) -> PyResult<T> {
    let (mut parker, unparker) = parking::pair();
    let waker = Waker::from(unparker);
    loop {
        let (poll, parker, waker) = (&mut poll, &mut parker, &waker);
        let found = py.detach(move || {
            let mut context = Context::from_waker(waker);
            match poll(&mut context) {
                Poll::Ready(value) => Some(value),
                Poll::Pending => {
                    parker.park_timeout(SIGNALS_EVERY);
                    None
                }
            }
        });
        py.check_signals()?;
        if let Some(value) = found {
            return Ok(value);
        }
    }
}

/// Waits for an answer of another thread; [`Error::EngineGone`] where it ended without one.
pub(crate) fn wait_for_answer<T: Send>(py: Python<'_>, mut answer: Receiver<T>) -> PyResult<Result<T, Error>> {
    wait_for(py, |context| Pin::new(&mut answer).poll(context).map(|answer| answer.map_err(|_| Error::EngineGone)))
}
