//! Counters and histograms in Prometheus' text format.
//!
//! What the engine counts is copied when it is asked for; what requests measure is added when they
//! end. The three counters whose names begin with `vllm:` are those of vLLM's diffusion models:
//! tools that read them print their sections for this server too.
#![forbid(unsafe_code)]

use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder, exponential_buckets,
};

use crate::api::Generation;
use crate::engine::EngineStats;

/// All that `/metrics` shows.
pub(crate) struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    responses: IntCounterVec,
    prompt_tokens: IntCounter,
    generated_tokens: IntCounter,
    queued_seconds: Histogram,
    first_provisional_seconds: Histogram,
    first_final_seconds: Histogram,
    request_seconds: Histogram,
    tokens_per_second: Histogram,
    running: IntGauge,
    waiting: IntGauge,
    kv_pages: IntGauge,
    kv_pages_used: IntGauge,
    forwards: IntCounterVec,
    rows: IntCounter,
    remasked: IntCounter,
    denoising_steps: IntCounter,
    canvas_positions: IntCounter,
    committed_tokens: IntCounter,
}

/// Registers a metric that is declared here, with a name that is free.
fn registered<M: prometheus::core::Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<M>) -> M {
    let metric = metric.expect("a name and labels of the format");
    registry.register(Box::new(metric.clone())).expect("a name of its own");
    metric
}

impl Metrics {
    pub(super) fn new(model_name: &str) -> Metrics {
        let registry = Registry::new();
        let opts = |name: &str, help: &str| Opts::new(name, help).const_label("model_name", model_name);
        let counter = |name: &str, help: &str| registered(&registry, IntCounter::with_opts(opts(name, help)));
        let counters = |name: &str, help: &str, labels: &[&str]| registered(&registry, IntCounterVec::new(opts(name, help), labels));
        let gauge = |name: &str, help: &str| registered(&registry, IntGauge::with_opts(opts(name, help)));
        let histogram = |name: &str, help: &str, first: f64| {
            let buckets = exponential_buckets(first, 2.0, 18).expect("growing buckets");
            registered(&registry, Histogram::with_opts(HistogramOpts { common_opts: opts(name, help), buckets }))
        };
        let vllm = |name: &str, help: &str| registered(&registry, IntCounter::with_opts(opts(name, help).const_label("engine", "0")));
        Metrics {
            requests: counters("redraft_requests_total", "Choices that ended, by endpoint and reason.", &["endpoint", "reason"]),
            responses: counters("redraft_http_responses_total", "HTTP responses by path and status.", &["path", "status"]),
            prompt_tokens: counter("redraft_prompt_tokens_total", "Given tokens of finished requests."),
            generated_tokens: counter("redraft_generated_tokens_total", "Generated tokens of finished requests."),
            queued_seconds: histogram("redraft_queued_seconds", "Time between arrival and admission.", 0.0005),
            first_provisional_seconds: histogram(
                "redraft_first_provisional_token_seconds",
                "Time to the first token that may change.",
                0.001,
            ),
            first_final_seconds: histogram("redraft_first_final_token_seconds", "Time to the first tokens that are final.", 0.001),
            request_seconds: histogram("redraft_request_seconds", "Time to the finished text.", 0.001),
            tokens_per_second: histogram("redraft_request_tokens_per_second", "Generated tokens of a request by its time.", 1.0),
            running: gauge("redraft_requests_running", "Requests in flight."),
            waiting: gauge("redraft_requests_waiting", "Requests that wait for admission."),
            kv_pages: gauge("redraft_kv_pages", "K/V pages of the pool."),
            kv_pages_used: gauge("redraft_kv_pages_used", "K/V pages that requests hold."),
            forwards: counters("redraft_forwards_total", "Forwards of requests by kind.", &["kind"]),
            rows: counter("redraft_rows_total", "Query rows processed."),
            remasked: counter("redraft_remasked_tokens_total", "Positions that were masked again."),
            denoising_steps: vllm("vllm:diffusion_num_denoising_steps_total", "Number of denoising steps."),
            canvas_positions: vllm("vllm:diffusion_num_canvas_positions_total", "Number of canvas positions evaluated."),
            committed_tokens: vllm("vllm:diffusion_num_committed_tokens_total", "Number of committed (finalized) tokens."),
            registry,
        }
    }

    /// A choice is finished.
    pub(super) fn finished(&self, endpoint: &str, generation: &Generation) {
        let output = &generation.output;
        self.requests.with_label_values(&[endpoint, output.finish.name()]).inc();
        self.prompt_tokens.inc_by(generation.given_tokens() as u64);
        self.generated_tokens.inc_by(output.tokens.len() as u64);
        let times = &output.timings;
        let seconds = |ms: f64| (times.queued_ms + ms) / 1e3;
        self.queued_seconds.observe(seconds(0.0));
        self.first_provisional_seconds.observe(seconds(times.first_token_ms));
        self.first_final_seconds.observe(seconds(times.first_final_ms));
        self.request_seconds.observe(seconds(times.total_ms));
        self.tokens_per_second.observe(output.tokens.len() as f64 / seconds(times.total_ms).max(1e-9));
    }

    /// A choice ended with an error.
    pub(super) fn failed(&self, endpoint: &str) {
        self.requests.with_label_values(&[endpoint, "error"]).inc();
    }

    /// A client went away before its answer was whole.
    pub(super) fn gone(&self, endpoint: &str) {
        self.requests.with_label_values(&[endpoint, "client-gone"]).inc();
    }

    /// A response went out. `path` is a route's.
    pub(super) fn responded(&self, path: &str, status: u16) {
        self.responses.with_label_values(&[path, &status.to_string()]).inc();
    }

    /// The text of `/metrics`.
    pub(super) fn text(&self, stats: &EngineStats) -> Vec<u8> {
        let gauge = |gauge: &IntGauge, value: usize| gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        gauge(&self.running, stats.running);
        gauge(&self.waiting, stats.queued);
        gauge(&self.kv_pages, stats.kv_pages);
        gauge(&self.kv_pages_used, stats.kv_pages_used);
        // The engine's numbers grow: what is missing is added.
        let raise = |counter: &IntCounter, value: u64| counter.inc_by(value.saturating_sub(counter.get()));
        let forwards = &stats.forwards;
        for (kind, count) in [
            ("prefill", forwards.prefill),
            ("denoise", forwards.denoise),
            ("commit", forwards.commit),
            ("joint", forwards.joint),
            ("score", forwards.score),
            ("guide", forwards.guide),
        ] {
            raise(&self.forwards.with_label_values(&[kind]), count as u64);
        }
        raise(&self.rows, stats.rows);
        raise(&self.remasked, stats.remasked);
        raise(&self.denoising_steps, forwards.denoise as u64);
        raise(&self.canvas_positions, stats.canvas_positions);
        raise(&self.committed_tokens, stats.tokens);
        let mut text = Vec::new();
        // Writing to memory does not fail.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        text
    }
}
