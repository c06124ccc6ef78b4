//! A request: its events, its result, its end.

use std::ffi::{CString, c_char, c_void};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use engine::{Generation, TextEvent, TextStream};

use crate::callback::{Callback, Dispatcher, Registered, Slot, is_calling_thread};
use crate::engine_handle::Engine;
use crate::lock;
use crate::memory::{Out, handle, text};
use crate::status::{Failure, Status, c_string, call};

/// What an event says, and what its text is.
#[allow(clippy::enum_variant_names)] // the names that C sees, where enums have no scope
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// Final text, after all deltas before it: they join to the text of the result.
    RedraftEventDelta = 1,
    /// The text as it is now, which may still change; it replaces the last snapshot. A JSON object:
    /// `stage`, `step`, `text`, and for each position that has held a generated token `positions`,
    /// `tokens` (null while masked), `pieces`, `confidence`; `remasked` are the positions that the
    /// stage at work masked again.
    RedraftEventSnapshot = 2,
    /// The end: the result, as `redraft_result` gives it.
    RedraftEventDone = 3,
    /// The end: the request failed, and the text says why. `redraft_result` gives its status.
    RedraftEventFailed = 4,
}

impl EventKind {
    pub(crate) fn is_last(self) -> bool {
        matches!(self, EventKind::RedraftEventDone | EventKind::RedraftEventFailed)
    }
}

/// A request in flight, or finished. One thread at a time may wait for it; every other call may
/// come from any thread at any time, but none during or after `redraft_request_free`.
pub struct Request {
    shared: Arc<Shared>,
    dispatcher: Arc<Dispatcher>,
}

/// What the handle and the thread of callbacks share.
pub(crate) struct Shared {
    /// Locked for a look and never while waiting.
    stream: Mutex<TextStream>,
    /// Held by the one who waits, and with it the text of the last event.
    waiting: Mutex<CString>,
    pub(crate) callback: Slot,
    outcome: OnceLock<Result<Outcome, Failure>>,
    /// The outcome was told.
    ended: Mutex<bool>,
    told: Condvar,
}

/// A result with its texts as C reads them.
struct Outcome {
    generation: Generation,
    json: CString,
    text: CString,
    draft: CString,
}

impl Outcome {
    fn new(generation: Generation) -> Outcome {
        let json = c_string(&serde_json::to_string(&generation).unwrap_or_default());
        let (text, draft) = (c_string(&generation.text), c_string(&generation.draft));
        Outcome { generation, json, text, draft }
    }
}

impl Shared {
    /// The next event and its text: pending while there is none.
    pub(crate) fn poll(&self, context: &mut Context<'_>) -> Poll<Option<(EventKind, String)>> {
        let event = match lock(&self.stream).poll_next(context) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Ready(Some(event)) => event,
        };
        Poll::Ready(Some(match event {
            TextEvent::Delta(text) => (EventKind::RedraftEventDelta, text),
            TextEvent::Snapshot(snapshot) => (EventKind::RedraftEventSnapshot, serde_json::to_string(&snapshot).unwrap_or_default()),
            TextEvent::Done(result) => match self.keep(*result) {
                Ok(outcome) => (EventKind::RedraftEventDone, outcome.json.to_string_lossy().into_owned()),
                Err(failure) => (EventKind::RedraftEventFailed, failure.text.clone()),
            },
            // A kind that the engine has and this interface does not: nothing it knows is lost.
            _ => return self.poll(context),
        }))
    }

    fn keep(&self, result: engine::Result<Generation>) -> &Result<Outcome, Failure> {
        self.outcome.get_or_init(|| result.map(Outcome::new).map_err(Failure::from))
    }

    /// The outcome was told: whoever waits for it goes on.
    pub(crate) fn end(&self) {
        *lock(&self.ended) = true;
        self.told.notify_all();
    }

    fn outcome(&self) -> Result<&Outcome, Failure> {
        match self.outcome.get() {
            Some(outcome) => outcome.as_ref().map_err(Clone::clone),
            None => Err(Failure::state("the request is not finished: wait for it, or read its events to the end")),
        }
    }
}

/// What a wait is limited by: `None` is for ever.
fn deadline(timeout_ms: i64) -> Option<Instant> {
    let limit = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
    limit.and_then(|limit| Instant::now().checked_add(limit))
}

/// Polls until something is ready, or until the deadline.
fn wait_for<T>(deadline: Option<Instant>, mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Option<T> {
    let (parker, unparker) = parking::pair();
    let waker = Waker::from(unparker);
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(value) = poll(&mut context) {
            return Some(value);
        }
        match deadline {
            None => parker.park(),
            Some(at) if Instant::now() >= at => return None,
            Some(at) => drop(parker.park_deadline(at)),
        }
    }
}

const SECOND_WAITER: &str = "another thread waits for this request";

/// Queues a request; it is batched with those in flight. `request_json` is an object with one of
/// `prompt` (a text, or token ids), `messages` (a list of `{"role", "content"}`, or an object with
/// `messages`, `tools`, ...), `infill` (a text with holes: `"The [____:3] sat."` has one of three
/// tokens) and `canvas` (token ids, null where the model writes); `draft` is a text to refine after
/// `prompt`. All other keys are optional: `schedule` (a preset, or stages), `length`, `seed`,
/// `sample`, `priority`, `temperature`, `top_p`, `top_p_rule`, `top_k`, `stop` (a text or a list),
/// `ignore_eos`, `stop_entropy`, `bos`. Waits until the engine has looked at it, between two
/// forwards.
///
/// Errors: REDRAFT_ERROR_REQUEST with the key, what was expected and what was found;
/// REDRAFT_ERROR_TOKENIZER where the model has none that can be used; what ended the engine.
///
/// # Safety
///
/// The pointers are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_submit(engine: *const Engine, request_json: *const c_char, request: *mut *mut Request) -> Status {
    call(|| {
        // SAFETY: the contract of this function.
        let (engine, json, place) =
            unsafe { (handle("engine", engine)?, text("request_json", request_json)?, Out::new("request", request)?) };
        place.set(std::ptr::null_mut());
        let (prompt, options) = engine::json::request(json)?;
        let stream = engine.thread().submit(prompt, options)?.into_text();
        let shared = Shared {
            stream: Mutex::new(stream),
            waiting: Mutex::default(),
            callback: Slot::default(),
            outcome: OnceLock::new(),
            ended: Mutex::default(),
            told: Condvar::new(),
        };
        place.set(Box::into_raw(Box::new(Request { shared: Arc::new(shared), dispatcher: engine.dispatcher().clone() })));
        Ok(Status::RedraftOk)
    })
}

/// Waits for the next event, for `timeout_ms` milliseconds at most: 0 only looks, below 0 is for
/// ever. `event`, `event_text` and `len` take its kind, its text (with a zero after it) and the
/// bytes of the text; each may be NULL. The text is valid until the next call of this function for
/// the request, or until the request is freed. REDRAFT_TIMEOUT: nothing came; REDRAFT_END: the last
/// event was told.
///
/// Errors: REDRAFT_ERROR_STATE where another thread waits for the request, or events go to a
/// callback. A request that failed is no error of this call: it is the event REDRAFT_EVENT_FAILED.
///
/// # Safety
///
/// The pointers are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_next(
    request: *mut Request,
    timeout_ms: i64,
    event: *mut EventKind,
    event_text: *mut *const c_char,
    len: *mut usize,
) -> Status {
    call(|| {
        // SAFETY: the contract of this function.
        let (request, event, event_text, len) =
            unsafe { (handle("request", request)?, Out::optional(event), Out::optional(event_text), Out::optional(len)) };
        let shared = &request.shared;
        if shared.callback.is_set() {
            return Err(Failure::state("events of this request go to its callback"));
        }
        let mut last = shared.waiting.try_lock().map_err(|_| Failure::state(SECOND_WAITER))?;
        Ok(match wait_for(deadline(timeout_ms), |context| shared.poll(context)) {
            None => Status::RedraftTimeout,
            Some(None) => Status::RedraftEnd,
            Some(Some((kind, text))) => {
                if kind.is_last() {
                    shared.end();
                }
                *last = c_string(&text);
                event.set(kind);
                event_text.set(last.as_ptr());
                len.set(last.as_bytes().len());
                Status::RedraftOk
            }
        })
    })
}

/// Waits for the end of the request, for `timeout_ms` milliseconds at most: 0 only looks, below 0
/// is for ever. Events that were not read are dropped, and no text is made for them; with a
/// callback, returns after its last call. REDRAFT_TIMEOUT: not finished.
///
/// Errors: the request's own; REDRAFT_ERROR_STATE where another thread waits for the request, and
/// in a callback for a request with a callback of the same library.
///
/// # Safety
///
/// `request` is NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_wait(request: *mut Request, timeout_ms: i64) -> Status {
    call(|| {
        // SAFETY: the contract of this function.
        let shared = &unsafe { handle("request", request)? }.shared;
        let _waiting = shared.waiting.try_lock().map_err(|_| Failure::state(SECOND_WAITER))?;
        let deadline = deadline(timeout_ms);
        if shared.callback.is_set() {
            if is_calling_thread() && !*lock(&shared.ended) {
                return Err(Failure::state("redraft_wait: a callback waits for a call that comes after its own"));
            }
            let mut ended = lock(&shared.ended);
            while !*ended {
                let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
                ended = match left {
                    None => shared.told.wait(ended).unwrap_or_else(PoisonError::into_inner),
                    Some(Duration::ZERO) => return Ok(Status::RedraftTimeout),
                    Some(left) => shared.told.wait_timeout(ended, left).unwrap_or_else(PoisonError::into_inner).0,
                };
            }
        } else {
            match wait_for(deadline, |context| lock(&shared.stream).poll_done(context)) {
                None => return Ok(Status::RedraftTimeout),
                Some(None) => {}
                Some(Some(result)) => drop(shared.keep(result).is_ok()),
            }
            shared.end();
        }
        shared.outcome().map(|_| Status::RedraftOk)
    })
}

/// From now on events go to `callback`, with `user_data`; those that came before and were not read
/// come first. One thread of the library, which the engine's first callback starts, makes all calls
/// of an engine: a slow callback delays other callbacks, and never a forward. The last call says
/// REDRAFT_EVENT_DONE or REDRAFT_EVENT_FAILED.
///
/// Errors: REDRAFT_ERROR_STATE where the request has a callback or a thread waits for it;
/// REDRAFT_ERROR_ENGINE_GONE after the engine was closed.
///
/// # Safety
///
/// `request` is NULL or valid. `callback` may be called on another thread until the request's last
/// event was told, or until `redraft_request_free` has returned.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_set_callback(request: *mut Request, callback: Callback, user_data: *mut c_void) -> Status {
    call(|| {
        // SAFETY: the contract of this function.
        let request = unsafe { handle("request", request)? };
        let Some(function) = callback else { return Err(Failure::argument("callback: expected a function, found NULL")) };
        let _waiting = request.shared.waiting.try_lock().map_err(|_| Failure::state(SECOND_WAITER))?;
        request.dispatcher.attach(&request.shared, Registered { call: function, user_data })?;
        Ok(Status::RedraftOk)
    })
}

/// Ends the request at the next forward: it finishes as `cancelled`, with what has been revealed.
/// May be called at any time from any thread, also while another one waits.
///
/// # Safety
///
/// `request` is NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_cancel(request: *mut Request) -> Status {
    call(|| {
        // SAFETY: the contract of this function.
        lock(&unsafe { handle("request", request)? }.shared.stream).cancel();
        Ok(Status::RedraftOk)
    })
}

/// The result as the JSON object that `redraft generate --format json` prints, without what belongs
/// to the engine. Valid until the request is freed.
///
/// Errors, here and of the calls below: REDRAFT_ERROR_STATE before the end; the request's own where
/// it failed.
///
/// # Safety
///
/// The pointers are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_result(request: *const Request, json: *mut *const c_char, len: *mut usize) -> Status {
    // SAFETY: passed on.
    unsafe { result_text(request, json, len, |outcome| &outcome.json) }
}

/// The generated text, up to the end-of-text token and the first stop text; for prompts with holes
/// the whole text. `len`, which may be NULL, takes its bytes. Valid until the request is freed. A
/// zero byte in the text is shown as U+FFFD.
///
/// # Safety
///
/// The pointers are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_result_text(request: *const Request, text: *mut *const c_char, len: *mut usize) -> Status {
    // SAFETY: passed on.
    unsafe { result_text(request, text, len, |outcome| &outcome.text) }
}

/// The generated text when the first stage was done; as `redraft_result_text` otherwise.
///
/// # Safety
///
/// The pointers are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_result_draft(request: *const Request, text: *mut *const c_char, len: *mut usize) -> Status {
    // SAFETY: passed on.
    unsafe { result_text(request, text, len, |outcome| &outcome.draft) }
}

/// Ids of the generated tokens. Valid until the request is freed.
///
/// # Safety
///
/// The pointers are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_result_tokens(request: *const Request, tokens: *mut *const u32, len: *mut usize) -> Status {
    // SAFETY: passed on.
    unsafe { result_numbers(request, tokens, len, |outcome| &outcome.generation.output.tokens) }
}

/// For each generated token its probability in the forward that revealed it. Valid until the
/// request is freed.
///
/// # Safety
///
/// The pointers are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_result_confidence(request: *const Request, confidence: *mut *const f32, len: *mut usize) -> Status {
    // SAFETY: passed on.
    unsafe { result_numbers(request, confidence, len, |outcome| &outcome.generation.output.confidence) }
}

/// For each generated token its log probability in nats, before temperature, top-k and nucleus.
/// Valid until the request is freed.
///
/// # Safety
///
/// The pointers are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_result_log_prob(request: *const Request, log_prob: *mut *const f32, len: *mut usize) -> Status {
    // SAFETY: passed on.
    unsafe { result_numbers(request, log_prob, len, |outcome| &outcome.generation.output.log_prob) }
}

/// Cancels the request if it is in flight, and frees it with every text and array that it gave
/// out. Its callback is not running when this returns, unless it made the call. NULL is fine.
///
/// # Safety
///
/// `request` is NULL, or valid and used by no other thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_request_free(request: *mut Request) -> Status {
    call(|| {
        if !request.is_null() {
            // SAFETY: by the contract it came from `redraft_submit` and goes now.
            let request = unsafe { Box::from_raw(request) };
            lock(&request.shared.stream).cancel();
            request.shared.callback.clear();
        }
        Ok(Status::RedraftOk)
    })
}

/// # Safety
///
/// The pointers are NULL or valid.
unsafe fn result_text(request: *const Request, text: *mut *const c_char, len: *mut usize, of: impl FnOnce(&Outcome) -> &CString) -> Status {
    call(|| {
        // SAFETY: the contract of this function.
        let (request, text, len) = unsafe { (handle("request", request)?, Out::new("text", text)?, Out::optional(len)) };
        let found = of(request.shared.outcome()?);
        text.set(found.as_ptr());
        len.set(found.as_bytes().len());
        Ok(Status::RedraftOk)
    })
}

/// # Safety
///
/// The pointers are NULL or valid.
unsafe fn result_numbers<T>(
    request: *const Request,
    numbers: *mut *const T,
    len: *mut usize,
    of: impl FnOnce(&Outcome) -> &Vec<T>,
) -> Status {
    call(|| {
        // SAFETY: the contract of this function.
        let (request, numbers, len) = unsafe { (handle("request", request)?, Out::new("numbers", numbers)?, Out::new("len", len)?) };
        let found = of(request.shared.outcome()?);
        numbers.set(found.as_ptr());
        len.set(found.len());
        Ok(Status::RedraftOk)
    })
}
