//! Answers in chunks, as server-sent events. Chunks hold final text; what may still change comes in
//! chunks of its own, where a request asks for it.
#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream, StreamExt};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::admission::Choice;
use super::answer::Answer;
use super::app::App;
use super::completions::{Asked, Provisional};
use super::error::ApiError;
use crate::api::{Generation, TextEvent};

/// Time between two snapshots of a text: what happens in it is told together.
const SNAPSHOT_INTERVAL: Duration = Duration::from_millis(30);
/// Time after its deadline in which a client may take what waits for it.
const STALLED: Duration = Duration::from_secs(10);
/// Chunks that wait for a slow client.
const WAITING_CHUNKS: usize = 64;

/// The answer to come, as a response.
pub(super) fn respond(app: Arc<App>, asked: Asked, id: String, choices: Vec<Choice>) -> Response {
    let (chunks, mut inbox) = mpsc::channel(WAITING_CHUNKS);
    tokio::spawn(async move {
        let deadline = choices[0].taken + app.options.request_timeout;
        tokio::select! {
            // The client is gone: what is in flight is dropped, and so cancelled.
            () = chunks.closed() => app.metrics.gone(asked.endpoint.name()),
            () = write(&app, &asked, &id, choices, &chunks) => {}
            // It is there and takes nothing: the error at the deadline cannot be told either.
            () = tokio::time::sleep_until(Instant::from_std(deadline) + STALLED) => app.metrics.gone(asked.endpoint.name()),
        }
    });
    let events = stream::poll_fn(move |context| inbox.poll_recv(context));
    Sse::new(events.map(Ok::<_, Infallible>)).keep_alive(KeepAlive::default()).into_response()
}

/// Sends all chunks; a client that is gone takes none.
async fn write(app: &App, asked: &Asked, id: &str, choices: Vec<Choice>, chunks: &mpsc::Sender<Event>) {
    let answer = Answer { id, created: app.now(), model: &app.options.model_name, asked };
    let send = async |data: Value| {
        let _ = chunks.send(Event::default().data(data.to_string())).await;
    };
    let deadline = choices[0].taken + app.options.request_timeout;
    let mut sent = vec![String::new(); choices.len()];
    let mut generations: Vec<Option<Generation>> = choices.iter().map(|_| None).collect();
    for index in 0..choices.len() {
        if let Some(chunk) = answer.opening(index) {
            send(chunk).await;
        }
    }
    let mut events = stream::select_all(choices.into_iter().map(|choice| Box::pin(told(choice, asked.provisional))));
    let outcome = loop {
        let next = tokio::time::timeout_at(Instant::from_std(deadline), events.next()).await;
        match next {
            Err(_) => break Err(ApiError::timed_out(app.options.request_timeout.as_secs_f64())),
            Ok(None) => break Ok(()),
            Ok(Some((index, TextEvent::Delta(text)))) => {
                sent[index] += &text;
                send(answer.delta(index, &text)).await;
            }
            Ok(Some((index, TextEvent::Snapshot(snapshot)))) => send(answer.snapshot(index, &snapshot)).await,
            Ok(Some((index, TextEvent::Done(result)))) => match *result {
                Err(error) => break Err(error.into()),
                Ok(generation) => {
                    app.finished(asked.endpoint.name(), id, &generation);
                    // The holes of a given text have no deltas.
                    let text = asked.text(&generation);
                    let rest = text.strip_prefix(sent[index].as_str()).unwrap_or_default();
                    send(answer.closing(index, rest, &generation)).await;
                    generations[index] = Some(generation);
                }
            },
        }
    };
    drop(events);
    match outcome {
        Ok(()) => {
            if asked.include_usage {
                let generations: Vec<Generation> = generations.into_iter().flatten().collect();
                send(answer.usage_chunk(&generations)).await;
            }
            let _ = chunks.send(Event::default().data("[DONE]")).await;
        }
        Err(error) => {
            app.failed(asked.endpoint.name(), id, &error);
            send(error.json()).await;
        }
    }
}

/// What happens to one choice, with its index; dropping the stream cancels it.
fn told(choice: Choice, provisional: Provisional) -> impl Stream<Item = (usize, TextEvent)> {
    let Choice { index, handle, place, .. } = choice;
    let text = handle.into_text();
    let mut text = match provisional {
        Provisional::No => text.without_snapshots(),
        Provisional::Now => text,
        Provisional::EveryStep => text.every_step(),
    };
    let mut pause = Box::pin(tokio::time::sleep(Duration::ZERO));
    stream::poll_fn(move |context| {
        // Its place is free when its text is done.
        let _ = &place;
        if provisional == Provisional::Now && pause.as_mut().poll(context).is_pending() {
            return Poll::Pending;
        }
        let event = std::task::ready!(text.poll_next(context));
        if let Some(TextEvent::Snapshot(_)) = &event {
            pause.as_mut().reset(Instant::now() + SNAPSHOT_INTERVAL);
        }
        Poll::Ready(event.map(|event| (index, event)))
    })
}
