//! Answers as the OpenAI API shapes them, whole or in chunks, with what diffusion adds in the field
//! `redraft`.
#![forbid(unsafe_code)]

use serde_json::{Value, json};

use super::completions::{Asked, Endpoint};
use crate::api::{Generation, Snapshot};
use crate::sequence::Finish;

/// What all objects of one answer have in common.
pub(super) struct Answer<'a> {
    pub(super) id: &'a str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    pub(super) asked: &'a Asked,
}

/// `stop` or `length`, as the API has it.
pub(super) fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Length | Finish::Cancelled => "length",
        Finish::EndOfText | Finish::StopText | Finish::LowEntropy => "stop",
    }
}

impl Answer<'_> {
    fn object(&self, streamed: bool) -> &'static str {
        match (self.asked.endpoint, streamed) {
            (Endpoint::Completions, _) => "text_completion",
            (Endpoint::Chat, false) => "chat.completion",
            (Endpoint::Chat, true) => "chat.completion.chunk",
        }
    }

    fn envelope(&self, streamed: bool, choices: Vec<Value>) -> Value {
        json!({ "id": self.id, "object": self.object(streamed), "created": self.created, "model": self.model, "choices": choices })
    }

    /// The whole answer.
    pub(super) fn whole(&self, generations: &[Generation]) -> Value {
        let choices = generations.iter().enumerate().map(|(index, generation)| {
            let text = self.text(index, generation);
            let mut choice = match self.asked.endpoint {
                Endpoint::Completions => json!({ "index": index, "text": text }),
                Endpoint::Chat => json!({ "index": index, "message": { "role": "assistant", "content": text } }),
            };
            self.close(&mut choice, index, generation);
            choice
        });
        let mut answer = self.envelope(false, choices.collect());
        answer["usage"] = self.usage(generations);
        answer
    }

    /// Text of a choice, with the prompt in front where that was asked for.
    fn text(&self, index: usize, generation: &Generation) -> String {
        format!("{}{}", self.asked.echo[index], self.asked.text(generation))
    }

    /// What stands at the end of a choice: why it ended, and its tokens.
    fn close(&self, choice: &mut Value, index: usize, generation: &Generation) {
        choice["finish_reason"] = finish_reason(generation.output.finish).into();
        choice["logprobs"] = if self.asked.logprobs { self.logprobs(index, generation) } else { Value::Null };
        if self.asked.token_ids {
            choice["token_ids"] = generation.output.tokens.clone().into();
        }
        if self.asked.details {
            choice["redraft"] = details(generation);
        }
    }

    /// Log probability of each token in the forward that wrote it, before temperature and nucleus.
    fn logprobs(&self, index: usize, generation: &Generation) -> Value {
        let pieces = generation.pieces();
        let log_probs = exact(&generation.output.log_prob);
        match self.asked.endpoint {
            Endpoint::Chat => {
                let content = pieces
                    .iter()
                    .zip(log_probs.as_array().into_iter().flatten())
                    .map(|(piece, log_prob)| json!({ "token": piece, "logprob": log_prob, "bytes": piece.as_bytes(), "top_logprobs": [] }));
                json!({ "content": content.collect::<Vec<_>>(), "refusal": null })
            }
            Endpoint::Completions => {
                let mut offset = self.asked.echo[index].chars().count();
                let offsets = pieces.iter().map(|piece| {
                    let at = offset;
                    offset += piece.chars().count();
                    at
                });
                let text_offset: Vec<usize> = offsets.collect();
                json!({ "tokens": pieces, "token_logprobs": log_probs, "top_logprobs": null, "text_offset": text_offset })
            }
        }
    }

    /// Tokens of the answer.
    pub(super) fn usage(&self, generations: &[Generation]) -> Value {
        // Choices of one prompt share it: each prompt has one that is its sample 0.
        let prompts = generations.iter().filter(|generation| generation.output.sample == 0).count().max(1);
        let n = generations.len().div_ceil(prompts).max(1);
        let prompt: usize = generations.iter().step_by(n).map(Generation::given_tokens).sum();
        let completion: usize = generations.iter().map(|generation| generation.output.tokens.len()).sum();
        json!({ "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion })
    }

    /// The chunk before the first text of a choice, where there is one.
    pub(super) fn opening(&self, index: usize) -> Option<Value> {
        match self.asked.endpoint {
            Endpoint::Chat => {
                let delta = json!({ "role": "assistant", "content": "" });
                Some(self.envelope(true, vec![json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": null })]))
            }
            Endpoint::Completions => {
                let echo = &self.asked.echo[index];
                (!echo.is_empty()).then(|| self.delta(index, echo))
            }
        }
    }

    /// A chunk of final text.
    pub(super) fn delta(&self, index: usize, text: &str) -> Value {
        let choice = match self.asked.endpoint {
            Endpoint::Completions => json!({ "index": index, "text": text, "logprobs": null, "finish_reason": null }),
            Endpoint::Chat => json!({ "index": index, "delta": { "content": text }, "logprobs": null, "finish_reason": null }),
        };
        self.envelope(true, vec![choice])
    }

    /// A chunk without choices that shows text which may change.
    pub(super) fn snapshot(&self, index: usize, snapshot: &Snapshot) -> Value {
        let mut chunk = self.envelope(true, Vec::new());
        chunk["redraft"] = json!({ "index": index, "snapshot": exact(snapshot) });
        chunk
    }

    /// The last chunk of a choice; `rest` is text that no chunk had.
    pub(super) fn closing(&self, index: usize, rest: &str, generation: &Generation) -> Value {
        let mut choice = match self.asked.endpoint {
            Endpoint::Completions => json!({ "index": index, "text": rest }),
            Endpoint::Chat if rest.is_empty() => json!({ "index": index, "delta": {} }),
            Endpoint::Chat => json!({ "index": index, "delta": { "content": rest } }),
        };
        self.close(&mut choice, index, generation);
        self.envelope(true, vec![choice])
    }

    /// The chunk of `stream_options.include_usage`.
    pub(super) fn usage_chunk(&self, generations: &[Generation]) -> Value {
        let mut chunk = self.envelope(true, Vec::new());
        chunk["usage"] = self.usage(generations);
        chunk
    }
}

/// A value of JSON whose numbers have the digits that they have in every other door: f32 would be
/// widened on the direct way.
fn exact(value: &impl serde::Serialize) -> Value {
    serde_json::to_string(value).and_then(|text| serde_json::from_str(&text)).unwrap_or_default()
}

/// The object of `redraft generate --format json` without the prompt, and the text of each token.
fn details(generation: &Generation) -> Value {
    let mut details = exact(generation);
    if let Some(object) = details.as_object_mut() {
        object.remove("prompt");
        object.insert("pieces".into(), generation.pieces().into());
    }
    details
}
