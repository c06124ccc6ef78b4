//! Structured logs: one line for each event, as text or as JSON, on stderr.
#![forbid(unsafe_code)]

use tracing_subscriber::EnvFilter;

/// Starts logging; `RUST_LOG` chooses what is logged, `info` by default. A line that cannot be
/// written is dropped.
pub(super) fn start(json: bool) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // A second server in one process keeps the first one's logs.
    let _ = if json { logs.json().flatten_event(true).try_init() } else { logs.try_init() };
}
