//! What all handlers share: settings, the engine behind its queue, counters.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use super::admission::Admission;
use super::error::ApiError;
use super::metrics::Metrics;
use crate::api::options::DEFAULT_LENGTH;
use crate::api::{EngineThread, Generation};

/// Settings of a server.
#[derive(Clone, Debug)]
pub(crate) struct ServerOptions {
    /// Where to listen; port 0 takes a free one.
    pub(crate) addr: SocketAddr,
    /// Name of the model in answers, and what requests may call it.
    pub(crate) model_name: String,
    /// Keys of which a request must carry one; none lets everyone in.
    pub(crate) api_keys: Vec<String>,
    /// Origins whose pages may call; `*` for all, none by default.
    pub(crate) cors: Vec<String>,
    /// Requests in flight in the engine; more wait.
    pub(crate) max_sequences: usize,
    /// Requests that wait; more are refused.
    pub(crate) max_queue: usize,
    /// Tokens that one request may ask for.
    pub(crate) max_tokens: Option<usize>,
    /// Bytes of a request's body.
    pub(crate) max_body: usize,
    /// How long a request may take, its waiting included.
    pub(crate) request_timeout: Duration,
    /// How long requests in flight may go on after a signal to end.
    pub(crate) drain_timeout: Duration,
    /// Logs are JSON.
    pub(crate) json_logs: bool,
    /// Prompts and texts are logged.
    pub(crate) log_prompts: bool,
}

/// Shared by all handlers.
pub(crate) struct App {
    pub(crate) options: ServerOptions,
    pub(crate) admission: Admission,
    pub(crate) metrics: Metrics,
    /// Seconds since 1970 when the model was loaded.
    pub(crate) created: u64,
    /// A signal to end came: nothing new is taken.
    pub(crate) draining: AtomicBool,
}

impl App {
    pub(super) fn new(options: ServerOptions, engine: EngineThread) -> App {
        App {
            admission: Admission::new(engine, options.max_sequences.saturating_add(options.max_queue)),
            metrics: Metrics::new(&options.model_name),
            created: std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
            draining: AtomicBool::new(false),
            options,
        }
    }

    /// Seconds since 1970.
    pub(super) fn now(&self) -> u64 {
        std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(self.created, |since| since.as_secs())
    }

    /// Errors: a signal to end came.
    pub(super) fn check_open(&self) -> Result<(), ApiError> {
        if self.draining.load(Ordering::Relaxed) { Err(ApiError::draining()) } else { Ok(()) }
    }

    /// Errors: the name of a model that is not served.
    pub(super) fn check_name(&self, name: &str) -> Result<(), ApiError> {
        if name == self.options.model_name { Ok(()) } else { Err(ApiError::model_not_found(name, &self.options.model_name)) }
    }

    /// Tokens of a chat's answer that names no number.
    pub(super) fn default_length(&self) -> usize {
        DEFAULT_LENGTH
    }

    pub(super) fn model_object(&self) -> Value {
        let model = self.admission.engine().model();
        json!({
            "id": self.options.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "redraft",
            // Where vLLM names the directory; its benchmark wants the key.
            "root": self.options.model_name,
            "max_model_len": model.max_length,
            "redraft": model,
        })
    }

    /// A choice is finished: counters, and a line of the log.
    pub(super) fn finished(&self, endpoint: &str, id: &str, generation: &Generation) {
        self.metrics.finished(endpoint, generation);
        let output = &generation.output;
        let (nfe, rows) = output.stages.iter().fold((0, 0), |(nfe, rows), stage| (nfe + stage.nfe(), rows + stage.rows));
        let times = &output.timings;
        tracing::info!(
            id,
            sample = output.sample,
            finish = output.finish.name(),
            prompt_tokens = generation.given_tokens(),
            tokens = output.tokens.len(),
            nfe,
            rows,
            queued_ms = times.queued_ms,
            first_token_ms = times.first_token_ms,
            total_ms = times.total_ms,
            "finished"
        );
        if self.options.log_prompts {
            tracing::info!(id, sample = output.sample, text = generation.text, "text");
        }
    }

    /// A request ended with an error: a counter, and a line of the log.
    pub(super) fn failed(&self, endpoint: &str, id: &str, error: &ApiError) {
        self.metrics.failed(endpoint);
        tracing::warn!(id, error = %error.json()["error"]["message"], "failed");
    }
}
