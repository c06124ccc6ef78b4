//! Wakers that call Python: asyncio's `call_soon_threadsafe`, by a thread of the module.
//!
//! The engine's thread could make the call itself, and would then wait for the interpreter's lock,
//! up to 5 ms where Python code is busy, before its next forward. So it only puts the callback into
//! a queue; one thread for all engines makes the calls.
#![forbid(unsafe_code)]

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Wake, Waker};

use pyo3::prelude::*;

/// Calls a Python callable once, when it is woken.
struct Callback(Mutex<Option<Py<PyAny>>>);

impl Wake for Callback {
    fn wake(self: Arc<Self>) {
        let callback = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let (Some(callback), Some(queue)) = (callback, QUEUE.get()) {
            // The thread ends only with the interpreter.
            let _ = queue.send(callback);
        }
    }
}

static QUEUE: OnceLock<Sender<Py<PyAny>>> = OnceLock::new();

/// A waker that calls `callback` without arguments, on another thread.
pub(crate) fn waker(callback: Py<PyAny>) -> Waker {
    QUEUE.get_or_init(|| {
        let (queue, callbacks) = channel();
        std::thread::spawn(move || serve(&callbacks));
        queue
    });
    Waker::from(Arc::new(Callback(Mutex::new(Some(callback)))))
}

fn serve(callbacks: &Receiver<Py<PyAny>>) {
    while let Ok(first) = callbacks.recv() {
        let attached = Python::try_attach(|py| {
            for callback in std::iter::once(first).chain(callbacks.try_iter()) {
                if let Err(error) = callback.call0(py) {
                    error.write_unraisable(py, Some(callback.bind(py)));
                }
            }
        });
        // The interpreter is ending.
        if attached.is_none() {
            return;
        }
    }
}
