//! HTTP server: the OpenAI API and what diffusion adds to it, over the public engine.
//!
//! A request becomes one engine request for each choice. The engine has a thread of its own;
//! handlers wait for it without blocking a thread, and dropping one, as hyper does when a client
//! goes away, cancels its requests.
#![forbid(unsafe_code)]

mod admission;
mod answer;
mod app;
mod body;
mod completions;
mod error;
mod logs;
mod metrics;
mod routes;
mod sse;
mod tokens;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::serve::ListenerExt;
use tokio::net::TcpListener;

use crate::api::Engine;
use crate::error::{Error, Result};
use app::App;
pub(crate) use app::ServerOptions;

/// Listens, loads, and serves until a signal to end; requests in flight are finished then.
///
/// Errors: an address that cannot be had, before anything is loaded; those of `open`; those of the
/// socket.
pub(crate) fn run(options: ServerOptions, open: impl FnOnce() -> Result<Engine>) -> Result<()> {
    logs::start(options.json_logs);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Handlers wait; the work is the engine's.
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| Error::io(Path::new("runtime"), &e))?;
    let asked = options.addr;
    let failed = |e: std::io::Error| Error::io(Path::new(&format!("--addr {asked}")), &e);
    let listener = runtime.block_on(TcpListener::bind(options.addr)).map_err(failed)?;
    let addr = listener.local_addr().map_err(failed)?;
    let engine = open()?;
    let app = Arc::new(App::new(options, engine.spawn()));
    let engine = app.admission.engine();
    tracing::info!(addr = %addr, model = app.options.model_name, device = engine.device_name(), "listening on http://{addr}");
    let served = runtime.block_on(serve(listener, app.clone()));
    // Connections that outlived the drain are cut; what they waited for is cancelled.
    runtime.shutdown_timeout(Duration::from_secs(1));
    tracing::info!("stopped");
    served.map_err(failed)
}

async fn serve(listener: TcpListener, app: Arc<App>) -> std::io::Result<()> {
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let routes = routes::router(app.clone());
    // Chunks are small: without this each waits until the last one is acknowledged, which clients
    // put off for 40 ms.
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    let server = axum::serve(listener, routes).with_graceful_shutdown(async move {
        let _ = stopped.await;
    });
    let mut server = tokio::spawn(server.into_future());
    tokio::select! {
        ended = &mut server => return ended.map_err(std::io::Error::other)?,
        signal = ended_by_signal() => tracing::info!(signal = signal?, "draining"),
    }
    app.draining.store(true, Ordering::Relaxed);
    let _ = stop.send(());
    tokio::select! {
        ended = server => ended.map_err(std::io::Error::other)?,
        () = tokio::time::sleep(app.options.drain_timeout) => {
            tracing::warn!("requests in flight were cut: --drain-timeout");
            Ok(())
        }
    }
}

/// Name of the signal that came.
async fn ended_by_signal() -> std::io::Result<&'static str> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        tokio::select! {
            _ = terminate.recv() => Ok("SIGTERM"),
            _ = interrupt.recv() => Ok("SIGINT"),
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await.map(|()| "Ctrl-C")
}
