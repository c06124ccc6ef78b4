//! `/tokenize` and `/detokenize`, in the shape that vLLM gave them.
#![forbid(unsafe_code)]

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::app::App;
use super::body::{ApiBody, Body};
use super::completions::conversation;
use super::error::ApiError;
use crate::api::Engine;
use crate::request::Bos;

/// Ids of a text or of a conversation.
pub(super) async fn tokenize(State(app): State<Arc<App>>, ApiBody(bytes): ApiBody) -> Result<Json<Value>, ApiError> {
    let mut body = Body::parse(&bytes)?;
    body.check_model(&app)?;
    let prompt: Option<String> = body.take("prompt")?;
    let add_special = body.take::<bool>("add_special_tokens")?.unwrap_or(true);
    let with_texts = body.take::<bool>("return_token_strs")?.unwrap_or(false);
    let conversation = match prompt {
        None => Some(conversation(&bytes, &mut body)?),
        Some(_) => None,
    };
    body.finish()?;
    let encode = move |engine: &mut Engine| match (prompt, conversation) {
        (Some(text), _) => engine.encode_text(&text, if add_special { Bos::Auto } else { Bos::No }),
        (None, Some(conversation)) => engine.encode_chat(&conversation),
        (None, None) => Ok(Vec::new()),
    };
    let tokens = app.admission.ask(encode).await??;
    let mut answer = json!({ "count": tokens.len(), "max_model_len": app.admission.engine().model().max_length, "tokens": tokens });
    if with_texts {
        let tokenizer = app.admission.engine().tokenizer()?;
        answer["token_strs"] = tokens.iter().map(|id| tokenizer.token(*id)).collect::<Vec<_>>().into();
    }
    Ok(Json(answer))
}

/// Text of ids.
pub(super) async fn detokenize(State(app): State<Arc<App>>, ApiBody(bytes): ApiBody) -> Result<Json<Value>, ApiError> {
    let mut body = Body::parse(&bytes)?;
    body.check_model(&app)?;
    let tokens: Vec<u32> = body.take("tokens")?.ok_or_else(|| ApiError::param("tokens", "expected a list of token ids"))?;
    body.finish()?;
    let vocab_size = app.admission.engine().model().vocab_size;
    if let Some(id) = tokens.iter().find(|id| **id as usize >= vocab_size) {
        return Err(ApiError::param("tokens", format!("token id {id} is outside the vocabulary of {vocab_size}")));
    }
    Ok(Json(json!({ "prompt": app.admission.engine().tokenizer()?.decode_all(&tokens) })))
}
