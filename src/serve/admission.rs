//! Admission: how many requests may be in the engine, and how they get there without blocking.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;
use crate::api::{Engine, EngineThread, Options, Prompt, RequestHandle};
use crate::error::Error;

/// The engine behind a bounded queue.
pub(crate) struct Admission {
    engine: EngineThread,
    places: Arc<Semaphore>,
    capacity: usize,
    next_id: AtomicU64,
    /// Tells ids of this process from those of another.
    salt: u64,
}

/// One choice of an answer on its way. Dropping it cancels the request and frees its place.
pub(super) struct Choice {
    pub(super) index: usize,
    pub(super) handle: RequestHandle,
    /// When the HTTP request was taken.
    pub(super) taken: Instant,
    pub(super) place: OwnedSemaphorePermit,
}

impl Admission {
    pub(super) fn new(engine: EngineThread, capacity: usize) -> Admission {
        let since = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos() as u64);
        let salt = since ^ (u64::from(std::process::id()) << 40);
        let capacity = capacity.min(Semaphore::MAX_PERMITS);
        Admission { engine, places: Arc::new(Semaphore::new(capacity)), capacity, next_id: AtomicU64::new(0), salt }
    }

    pub(super) fn engine(&self) -> &EngineThread {
        &self.engine
    }

    /// Requests that have a place now.
    pub(super) fn taken(&self) -> usize {
        self.capacity - self.places.available_permits()
    }

    /// An id that no other answer has.
    pub(super) fn id(&self, prefix: &str) -> String {
        let number = self.next_id.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}-{:016x}{number:08x}", self.salt)
    }

    /// A seed for requests that name none; small enough for every reader of JSON.
    pub(super) fn seed(&self) -> u64 {
        let number = self.next_id.fetch_add(1, Ordering::Relaxed);
        // Knuth's generator: the high bits of neighbours differ.
        self.salt.wrapping_add(number).wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407) >> 33
    }

    /// Hands requests to the engine together, so that the first tick that sees one sees all.
    ///
    /// Errors: a full queue; what the engine refuses, of the first that is refused, and then none
    /// is in it; what ended the engine.
    pub(super) async fn submit(&self, requests: Vec<(Prompt, Options)>) -> Result<Vec<Choice>, ApiError> {
        let taken = Instant::now();
        let count = requests.len();
        if count > self.capacity {
            return Err(ApiError::invalid(format!("{count} choices: this server takes {} at once", self.capacity)));
        }
        let permits = u32::try_from(count).map_err(|_| ApiError::overloaded())?;
        let mut places = self.places.clone().try_acquire_many_owned(permits).map_err(|_| ApiError::overloaded())?;
        let submit = move |engine: &mut Engine| {
            requests.into_iter().map(|(prompt, options)| engine.submit(prompt, options)).collect::<Result<Vec<_>, Error>>()
        };
        let handles = self.ask(submit).await??;
        let choice = |(index, handle)| {
            let place = places.split(1).expect("one for each");
            Choice { index, handle, taken, place }
        };
        Ok(handles.into_iter().enumerate().map(choice).collect())
    }

    /// What `work` returns on the engine's thread.
    pub(super) async fn ask<R: Send + 'static>(&self, work: impl FnOnce(&mut Engine) -> R + Send + 'static) -> Result<R, ApiError> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        self.engine.post(move |engine| {
            // A client that is gone wants no answer; handles in it cancel their requests.
            let _ = reply.send(work(engine));
        })?;
        let gone = |_| self.engine.failure().unwrap_or(Error::EngineGone);
        Ok(answer.await.map_err(gone)?)
    }
}
