//! An engine: opening, closing, what it says of itself, tokens and scores.

use std::ffi::c_char;
use std::sync::Arc;

use engine::EngineThread;

use crate::callback::Dispatcher;
use crate::memory::{Out, handle, numbers, optional_text, owned_numbers, owned_text, text};
use crate::status::{Failure, Status, call};

/// A loaded model on a thread of its own. Every call but `redraft_engine_close` may come from any
/// thread at any time.
pub struct Engine {
    thread: EngineThread,
    dispatcher: Arc<Dispatcher>,
}

impl Engine {
    pub(crate) fn thread(&self) -> &EngineThread {
        &self.thread
    }

    pub(crate) fn dispatcher(&self) -> &Arc<Dispatcher> {
        &self.dispatcher
    }
}

/// Opens a Hugging Face directory (`config.json`, `*.safetensors`, `tokenizer.json`) or a GGUF
/// file.
/// `settings_json` is NULL, or an object with any of `device` ("auto", "cpu", "cuda:0"), `dtype`
/// ("f32", "bf16"), `weights` ("f32", "bf16", "q8", "q4"), `threads`, `max_sequences` (requests
/// in flight at once, 8), `max_rows` (512), `max_positions` (of one sequence), `kv_pages`,
/// `page_size`, `tokenizer` (path of a tokenizer.json), `models` (paths of more models for
/// stages that name them), `joint` (a directory with a joint sampler).
///
/// Errors: REDRAFT_ERROR_CONFIG, _WEIGHTS, _TOKENIZER or _IO with the file and what it lacks;
/// REDRAFT_ERROR_DEVICE; REDRAFT_ERROR_REQUEST for settings, with the key.
///
/// # Safety
///
/// The pointers are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_engine_open(dir: *const c_char, settings_json: *const c_char, engine: *mut *mut Engine) -> Status {
    call(|| {
        // SAFETY: the contract of this function.
        let (dir, settings, place) =
            unsafe { (text("dir", dir)?, optional_text("settings_json", settings_json)?, Out::new("engine", engine)?) };
        place.set(std::ptr::null_mut());
        let builder = engine::Engine::builder(dir).json(settings.unwrap_or("{}"))?;
        let opened = Engine { thread: builder.open()?.spawn(), dispatcher: Arc::default() };
        place.set(Box::into_raw(Box::new(opened)));
        Ok(Status::RedraftOk)
    })
}

/// Finishes the requests in flight (cancel them to end sooner), tells their events, and frees the
/// engine. Requests stay valid until each is freed. NULL is fine.
///
/// # Safety
///
/// `engine` is NULL, or valid and used by no other thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_engine_close(engine: *mut Engine) -> Status {
    call(|| {
        if !engine.is_null() {
            // SAFETY: by the contract it came from `redraft_engine_open` and goes now.
            let engine = unsafe { Box::from_raw(engine) };
            let Engine { thread, dispatcher } = *engine;
            drop(thread);
            dispatcher.close();
        }
        Ok(Status::RedraftOk)
    })
}

/// What the model is: a JSON object with `architecture`, `vocab_size`, `max_length`,
/// `trained_length`, `block_len`, `generates`, `autoregressive`, `warnings`. `redraft_free` frees
/// it.
///
/// # Safety
///
/// The pointers are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_model_info(engine: *const Engine, json: *mut *mut c_char) -> Status {
    // SAFETY: passed on.
    unsafe { give_text(engine, json, |engine| Ok(to_json(engine.thread.model()))) }
}

/// What is in flight and what was done, after the last forward: a JSON object. Never waits for the
/// engine. `redraft_free` frees it.
///
/// # Safety
///
/// The pointers are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_stats(engine: *const Engine, json: *mut *mut c_char) -> Status {
    // SAFETY: passed on.
    unsafe { give_text(engine, json, |engine| Ok(to_json(&engine.thread.stats()))) }
}

/// Device, instruction set or GPU, and threads: `cpu (avx2, 2 threads)`. `redraft_free` frees it.
///
/// # Safety
///
/// The pointers are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_device_name(engine: *const Engine, name: *mut *mut c_char) -> Status {
    // SAFETY: passed on.
    unsafe { give_text(engine, name, |engine| Ok(engine.thread.device_name().to_owned())) }
}

/// Ids of the tokens of a text, without a first token of the model's own. `redraft_free` frees
/// them.
///
/// Errors: REDRAFT_ERROR_TOKENIZER.
///
/// # Safety
///
/// The pointers are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_tokenize(engine: *const Engine, text: *const c_char, tokens: *mut *mut u32, len: *mut usize) -> Status {
    // SAFETY: passed on.
    unsafe { give_numbers(engine, text, tokens, len, |engine, text| Ok(engine.thread.tokenizer()?.encode(text)?)) }
}

/// The text of tokens; special tokens have none. A zero byte in it is shown as U+FFFD.
/// `redraft_free` frees it.
///
/// Errors: REDRAFT_ERROR_TOKENIZER.
///
/// # Safety
///
/// The pointers are NULL or valid, and `tokens` has `len` ids.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_detokenize(engine: *const Engine, tokens: *const u32, len: usize, text: *mut *mut c_char) -> Status {
    // SAFETY: passed on.
    unsafe { give_text(engine, text, |engine| Ok(engine.thread.tokenizer()?.decode(numbers("tokens", tokens, len)?))) }
}

/// Negative log-likelihood of each token of a text in nats, under the model's own factorisation.
/// Waits for it; requests in flight advance meanwhile. `redraft_free` frees the numbers.
///
/// Errors: REDRAFT_ERROR_REQUEST for an empty text or one that is longer than the model serves.
///
/// # Safety
///
/// The pointers are NULL or valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn redraft_score(engine: *const Engine, text: *const c_char, nll: *mut *mut f64, len: *mut usize) -> Status {
    let score = |engine: &Engine, text: &str| {
        let text = text.to_owned();
        Ok(engine.thread.call(move |engine| engine.score(&text))??)
    };
    // SAFETY: passed on.
    unsafe { give_numbers(engine, text, nll, len, score) }
}

fn to_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// # Safety
///
/// The pointers are NULL or valid.
unsafe fn give_text(engine: *const Engine, place: *mut *mut c_char, of: impl FnOnce(&Engine) -> Result<String, Failure>) -> Status {
    call(|| {
        // SAFETY: the contract of this function.
        let (engine, place) = unsafe { (handle("engine", engine)?, Out::new("text", place)?) };
        place.set(std::ptr::null_mut());
        place.set(owned_text(&of(engine)?.replace('\0', "\u{fffd}"))?);
        Ok(Status::RedraftOk)
    })
}

/// # Safety
///
/// The pointers are NULL or valid.
unsafe fn give_numbers<T: Copy>(
    engine: *const Engine,
    words: *const c_char,
    place: *mut *mut T,
    len: *mut usize,
    of: impl FnOnce(&Engine, &str) -> Result<Vec<T>, Failure>,
) -> Status {
    call(|| {
        // SAFETY: the contract of this function.
        let (engine, words, place, len) =
            unsafe { (handle("engine", engine)?, text("text", words)?, Out::new("numbers", place)?, Out::new("len", len)?) };
        place.set(std::ptr::null_mut());
        len.set(0);
        let found = of(engine, words)?;
        place.set(owned_numbers(&found)?);
        len.set(found.len());
        Ok(Status::RedraftOk)
    })
}
