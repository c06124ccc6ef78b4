//! Bodies of requests: JSON objects whose every key is read, known to be without effect, or
//! refused by its name.
#![forbid(unsafe_code)]

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::app::App;
use super::error::ApiError;

/// Keys that no answer depends on.
const WITHOUT_EFFECT: [&str; 12] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "cache_prompt",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "parallel_tool_calls",
    "reasoning_effort",
    "verbosity",
    "spaces_between_special_tokens",
];

/// Whether a value asks for nothing.
type AsksForNothing = fn(&Value) -> bool;

/// Keys of features that this engine does not have, with the value that asks for nothing.
const NEUTRAL: [(&str, AsksForNothing); 16] = [
    ("presence_penalty", is_zero),
    ("frequency_penalty", is_zero),
    ("repetition_penalty", is_one),
    ("length_penalty", is_one),
    ("min_p", is_zero),
    ("logit_bias", is_empty),
    ("use_beam_search", is_false),
    ("include_stop_str_in_output", is_false),
    ("skip_special_tokens", |value| *value == Value::Bool(true)),
    ("response_format", |value| value["type"] == "text"),
    ("modalities", |value| *value == serde_json::json!(["text"])),
    ("tool_choice", |value| value == "none" || value == "auto"),
    ("functions", is_empty),
    ("function_call", |value| value == "none" || value == "auto"),
    ("prediction", Value::is_null),
    ("audio", Value::is_null),
];

fn is_zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn is_one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn is_false(value: &Value) -> bool {
    *value == Value::Bool(false)
}

fn is_empty(value: &Value) -> bool {
    value.as_object().is_some_and(Map::is_empty) || value.as_array().is_some_and(Vec::is_empty)
}

/// The bytes of a body; one that is too large is an error of the API's shape.
pub(super) struct ApiBody(pub(super) Bytes);

impl FromRequest<Arc<App>> for ApiBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<ApiBody, ApiError> {
        let refused = |rejection: BytesRejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => {
                ApiError::body(StatusCode::PAYLOAD_TOO_LARGE, format!("body: expected at most {} bytes", app.options.max_body))
            }
            status => ApiError::body(status, rejection.body_text()),
        };
        Bytes::from_request(request, app).await.map(ApiBody).map_err(refused)
    }
}

/// The keys that were not read yet.
pub(super) struct Body(Map<String, Value>);

impl Body {
    /// Errors: bytes that are no JSON object.
    pub(super) fn parse(bytes: &[u8]) -> Result<Body, ApiError> {
        let wrong = |what: String| ApiError::invalid(format!("body: expected a JSON object: {what}"));
        match serde_json::from_slice(bytes).map_err(|e| wrong(e.to_string()))? {
            Value::Object(map) => Ok(Body(map)),
            other => Err(wrong(format!("found {}", kind(&other)))),
        }
    }

    /// Reads a key; `null` is absent.
    ///
    /// Errors: a value of another type.
    pub(super) fn take<T: DeserializeOwned>(&mut self, key: &str) -> Result<Option<T>, ApiError> {
        match self.0.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => serde_json::from_value(value).map(Some).map_err(|e| ApiError::param(key, e)),
        }
    }

    /// Reads the key `model`, which may be absent.
    ///
    /// Errors: the name of a model that is not served.
    pub(super) fn check_model(&mut self, app: &App) -> Result<(), ApiError> {
        self.take::<String>("model")?.map_or(Ok(()), |name| app.check_name(&name))
    }

    /// Errors: a key that is unknown, or one of a feature that is not there.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        for (key, value) in self.0 {
            let neutral = NEUTRAL.iter().find(|(name, _)| *name == key);
            match neutral {
                _ if WITHOUT_EFFECT.contains(&key.as_str()) => {}
                Some((_, asks_for_nothing)) if value.is_null() || asks_for_nothing(&value) => {}
                Some(_) => return Err(ApiError::param(&key, "this engine does not have it")),
                None => return Err(ApiError::param(&key, "unknown key; README and /openapi.json list those that are known")),
            }
        }
        Ok(())
    }
}

/// What a value is.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_accounted_for() {
        let mut body = Body::parse(br#"{"a": 1, "b": null, "user": "x", "presence_penalty": 0, "logit_bias": {}}"#).unwrap();
        assert_eq!(body.take::<u32>("a").unwrap(), Some(1));
        assert_eq!(body.take::<u32>("b").unwrap(), None);
        body.finish().unwrap();
        for (text, param) in [
            (r#"{"lenght": 1}"#, "lenght"),
            (r#"{"lenght": null}"#, "lenght"),
            (r#"{"presence_penalty": 0.5}"#, "presence_penalty"),
            (r#"{"response_format": {"type": "json_object"}}"#, "response_format"),
        ] {
            let error = Body::parse(text.as_bytes()).unwrap().finish().unwrap_err();
            assert_eq!(error.json()["error"]["param"], param);
        }
        assert!(Body::parse(b"[]").is_err() && Body::parse(b"{").is_err());
        let error = Body::parse(br#"{"a": "x"}"#).unwrap().take::<u32>("a").unwrap_err();
        assert_eq!(error.json()["error"]["param"], "a");
    }
}
