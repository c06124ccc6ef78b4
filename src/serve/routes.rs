//! Routes, what guards them, and the handlers.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{DefaultBodyLimit, MatchedPath, Path, Request, State};
use axum::http::{HeaderValue, Method, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router};
use futures_util::future::{FutureExt, try_join_all};
use serde_json::{Value, json};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, Any, CorsLayer};

use super::answer::Answer;
use super::app::App;
use super::body::ApiBody;
use super::completions::{Asked, Endpoint};
use super::error::ApiError;
use super::{sse, tokens};
use crate::api::Generation;

/// The page at `/`.
const PAGE: &str = include_str!("page.html");
/// The description of the API.
const OPENAPI: &str = include_str!("openapi.json");

/// All routes, and what every request passes.
pub(super) fn router(app: Arc<App>) -> Router {
    let or_error = |route: MethodRouter<Arc<App>>| route.fallback(wrong_method);
    let guarded = Router::new()
        .route("/v1/completions", or_error(post(completions)))
        .route("/v1/chat/completions", or_error(post(chat)))
        .route("/v1/models", or_error(get(models)))
        .route("/v1/models/{*name}", or_error(get(model)))
        .route("/tokenize", or_error(post(tokens::tokenize)))
        .route("/detokenize", or_error(post(tokens::detokenize)))
        .route_layer(middleware::from_fn_with_state(app.clone(), authorized));
    let open = Router::new()
        .route("/", or_error(get(page)))
        .route("/health", or_error(get(health)))
        .route("/ready", or_error(get(ready)))
        .route("/metrics", or_error(get(metrics)))
        .route("/openapi.json", or_error(get(openapi)));
    let cors = cors(&app.options.cors);
    let routes = guarded
        .merge(open)
        .fallback(|request: Request| async move { ApiError::not_found(request.uri().path()) })
        .layer(DefaultBodyLimit::max(app.options.max_body))
        .layer(CatchPanicLayer::custom(|_: Box<dyn std::any::Any + Send>| {
            ApiError::internal("a handler panicked: this is a fault of the server").into_response()
        }))
        .layer(middleware::from_fn_with_state(app.clone(), logged));
    match cors {
        Some(cors) => routes.layer(cors),
        None => routes,
    }
    .with_state(app)
}

/// Pages of which origins may call; none where nothing is named.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let allowed = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok())),
    };
    Some(CorsLayer::new().allow_origin(allowed).allow_methods([Method::GET, Method::POST]).allow_headers(Any))
}

/// A key is compared in a time that does not tell how much of it is right.
fn same(given: &[u8], key: &[u8]) -> bool {
    given.len() == key.len() && given.iter().zip(key).fold(0, |different, (a, b)| different | (a ^ b)) == 0
}

async fn authorized(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes).unwrap_or_default();
    let given = given.strip_prefix(b"Bearer ").unwrap_or_default();
    let keys = &app.options.api_keys;
    if keys.is_empty() || keys.iter().fold(false, |found, key| found | same(given, key.as_bytes())) {
        next.run(request).await
    } else {
        ApiError::unauthorized().into_response()
    }
}

/// One line for each response, and its counter.
async fn logged(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    // A path of the client's own choice is no label.
    let route = request.extensions().get::<MatchedPath>().map_or("other", MatchedPath::as_str).to_owned();
    let response = next.run(request).await;
    let status = response.status().as_u16();
    app.metrics.responded(&route, status);
    let ms = (began.elapsed().as_secs_f64() * 1e6).round() / 1e3;
    if matches!(route.as_str(), "/health" | "/ready" | "/metrics") {
        tracing::debug!(%method, path, status, ms, "response");
    } else {
        tracing::info!(%method, path, status, ms, "response");
    }
    response
}

async fn wrong_method(request: Request) -> ApiError {
    ApiError::method_not_allowed(request.method().as_str(), request.uri().path())
}

async fn page() -> Html<&'static str> {
    Html(PAGE)
}

async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI)
}

/// The process lives and its engine serves.
async fn health(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    match app.admission.engine().failure() {
        None => Ok(Json(json!({ "status": "ok" }))),
        Some(error) => Err(ApiError::internal(error.to_string())),
    }
}

/// Whether new requests should be sent here.
async fn ready(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    app.check_open()?;
    match app.admission.engine().failure() {
        None => Ok(Json(json!({ "status": "ready", "requests": app.admission.taken() }))),
        Some(_) => Err(ApiError::draining()),
    }
}

async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    let text = app.metrics.text(&app.admission.engine().stats());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({ "object": "list", "data": [app.model_object()] }))
}

async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    app.check_name(&name)?;
    Ok(Json(app.model_object()))
}

async fn completions(State(app): State<Arc<App>>, body: ApiBody) -> Result<Response, ApiError> {
    answer(app, Endpoint::Completions, body).await
}

async fn chat(State(app): State<Arc<App>>, body: ApiBody) -> Result<Response, ApiError> {
    answer(app, Endpoint::Chat, body).await
}

async fn answer(app: Arc<App>, endpoint: Endpoint, ApiBody(bytes): ApiBody) -> Result<Response, ApiError> {
    app.check_open()?;
    let mut asked = Asked::parse(endpoint, &bytes, &app)?;
    let id = app.admission.id(if endpoint == Endpoint::Chat { "chatcmpl" } else { "cmpl" });
    if app.options.log_prompts {
        tracing::info!(id, prompt = asked.prompt_log, "prompt");
    }
    let choices = app.admission.submit(std::mem::take(&mut asked.requests)).await?;
    if asked.stream {
        return Ok(sse::respond(app, asked, id, choices));
    }
    // Told where hyper drops this because the client is gone.
    let mut gone = Gone { app: &app, endpoint: Some(endpoint) };
    let all = try_join_all(choices.into_iter().map(|choice| {
        let waited = std::future::poll_fn(move |context| {
            // Its place is free when its text is done.
            let _ = &choice.place;
            choice.handle.poll_wait(context)
        });
        waited.map(|result| result.map_err(ApiError::from))
    }));
    let waited = tokio::time::timeout(app.options.request_timeout, all).await;
    gone.endpoint = None;
    let generations: Vec<Generation> = waited
        .unwrap_or_else(|_| Err(ApiError::timed_out(app.options.request_timeout.as_secs_f64())))
        .inspect_err(|error| app.failed(asked.endpoint.name(), &id, error))?;
    generations.iter().for_each(|generation| app.finished(asked.endpoint.name(), &id, generation));
    let answer = Answer { id: &id, created: app.now(), model: &app.options.model_name, asked: &asked };
    Ok(Json(answer.whole(&generations)).into_response())
}

struct Gone<'a> {
    app: &'a App,
    endpoint: Option<Endpoint>,
}

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        if let Some(endpoint) = self.endpoint {
            self.app.metrics.gone(endpoint.name());
        }
    }
}
