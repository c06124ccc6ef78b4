//! Events by callback: one thread per engine tells them, so that a slow callback delays other
//! callbacks and never a forward.

use std::cell::Cell;
use std::ffi::{c_char, c_void};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{JoinHandle, ThreadId};

use crate::lock;
use crate::request::{EventKind, Shared};
use crate::status::{Failure, Status};

/// Is told every event of a request, in order, on a thread of the library; calls for the requests
/// of one engine never overlap. `text` (of `len` bytes, and a zero after them) is valid during the
/// call. The callback may make any call of this library, `redraft_request_free` of its own request
/// included; it must not throw or jump out.
pub type Callback = Option<unsafe extern "C" fn(user_data: *mut c_void, kind: EventKind, text: *const c_char, len: usize)>;

/// A callback and what it is given.
#[derive(Clone, Copy)]
pub(crate) struct Registered {
    pub(crate) call: unsafe extern "C" fn(*mut c_void, EventKind, *const c_char, usize),
    pub(crate) user_data: *mut c_void,
}

// SAFETY: the pointer is only handed back to the caller's own function, on a thread that
// `redraft_set_callback` documents.
unsafe impl Send for Registered {}

/// The callback of a request, and the thread that is in it.
#[derive(Default)]
pub(crate) struct Slot {
    state: Mutex<SlotState>,
    left: Condvar,
}

#[derive(Default)]
struct SlotState {
    registered: Option<Registered>,
    inside: Option<ThreadId>,
}

impl Slot {
    pub(crate) fn is_set(&self) -> bool {
        lock(&self.state).registered.is_some()
    }

    fn set(&self, registered: Registered) -> Result<(), Failure> {
        let mut state = lock(&self.state);
        if state.registered.is_some() {
            return Err(Failure::state("redraft_set_callback: the request has a callback"));
        }
        state.registered = Some(registered);
        Ok(())
    }

    /// Calls it, where it was not taken away meanwhile.
    fn tell(&self, kind: EventKind, text: &str) {
        let registered = {
            let mut state = lock(&self.state);
            let Some(registered) = state.registered else { return };
            state.inside = Some(std::thread::current().id());
            registered
        };
        let bytes = [text.as_bytes(), &[0]].concat();
        // SAFETY: the caller's function, by the contract of `redraft_set_callback`; the text lives
        // through the call.
        unsafe { (registered.call)(registered.user_data, kind, bytes.as_ptr().cast(), text.len()) };
        lock(&self.state).inside = None;
        self.left.notify_all();
    }

    /// Takes it away. It is not running when this returns, unless it is the one who asks.
    pub(crate) fn clear(&self) {
        let mut state = lock(&self.state);
        state.registered = None;
        let own = std::thread::current().id();
        while state.inside.is_some_and(|thread| thread != own) {
            state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The thread that calls, started by the first callback of an engine.
#[derive(Default)]
pub(crate) struct Dispatcher {
    state: Mutex<DispatcherState>,
}

#[derive(Default)]
struct DispatcherState {
    running: Option<(Sender<Work>, JoinHandle<()>)>,
    closed: bool,
}

enum Work {
    Look(Arc<Shared>),
    Stop,
}

impl Dispatcher {
    /// From now on the events of `request` go to the callback.
    pub(crate) fn attach(&self, request: &Arc<Shared>, registered: Registered) -> Result<(), Failure> {
        let mut state = lock(&self.state);
        if state.closed {
            return Err(Failure { status: Status::RedraftErrorEngineGone, text: "redraft_set_callback: the engine was closed".into() });
        }
        if state.running.is_none() {
            let (sender, work) = channel();
            let own = sender.clone();
            let thread = std::thread::Builder::new().name("redraft-callbacks".into()).spawn(move || serve(&work, &own));
            let thread = thread.map_err(|e| Failure::state(format!("redraft_set_callback: no thread to call from: {e}")))?;
            state.running = Some((sender, thread));
        }
        request.callback.set(registered)?;
        if let Some((sender, _)) = &state.running {
            // Its thread lives until `close`.
            let _ = sender.send(Work::Look(request.clone()));
        }
        Ok(())
    }

    /// Ends the thread when all that has happened was told. Called after the engine's own thread
    /// has ended: then every request has its outcome, and was looked at or is in the queue.
    pub(crate) fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        let running = state.running.take();
        drop(state);
        if let Some((sender, thread)) = running {
            let _ = sender.send(Work::Stop);
            // An engine that is closed by a callback: the thread ends after it.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

/// Asks for a look at the request when the engine has something for it.
struct Bell {
    request: Weak<Shared>,
    work: Mutex<Sender<Work>>,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        if let Some(request) = self.request.upgrade() {
            let _ = lock(&self.work).send(Work::Look(request));
        }
    }
}

thread_local! {
    static CALLS: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread makes the calls: it cannot wait for a call that it would make itself.
pub(crate) fn is_calling_thread() -> bool {
    CALLS.get()
}

fn serve(work: &Receiver<Work>, own: &Sender<Work>) {
    CALLS.set(true);
    while let Ok(Work::Look(request)) = work.recv() {
        let bell = Arc::new(Bell { request: Arc::downgrade(&request), work: Mutex::new(own.clone()) });
        let waker = Waker::from(bell);
        while let Poll::Ready(Some((kind, text))) = request.poll(&mut Context::from_waker(&waker)) {
            request.callback.tell(kind, &text);
            if kind.is_last() {
                request.end();
            }
        }
    }
}
