//! What requests for completions and chat completions ask for.
#![forbid(unsafe_code)]

use serde::Deserialize;
use serde_json::value::RawValue;

use super::app::App;
use super::body::Body;
use super::error::ApiError;
use crate::api::json::OneOrMore;
use crate::api::{Generation, Options, Prompt};
use crate::chat::Conversation;
use crate::request::{Bos, Segment};
use crate::sampling::TopPRule;

/// Tokens of a completion that names no number, as the OpenAI API has it. A chat goes on up to the
/// engine's own default.
const DEFAULT_MAX_TOKENS: usize = 16;
/// Choices of one request.
const MAX_CHOICES: usize = 128;
/// Stop texts of one request.
const MAX_STOPS: usize = 16;

/// Which of the two shapes an answer has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Endpoint {
    Completions,
    Chat,
}

impl Endpoint {
    /// As metrics and logs call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Endpoint::Completions => "completions",
            Endpoint::Chat => "chat",
        }
    }
}

/// Which snapshots of a text a stream shows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Provisional {
    No,
    /// The text as it is, from time to time.
    Now,
    /// Each change.
    EveryStep,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected true, false or \"steps\"")]
enum ProvisionalJson {
    Switch(bool),
    Word(Word),
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Word {
    Steps,
}

/// What the answer shows, and what the engine is asked for it.
pub(super) struct Asked {
    pub(super) endpoint: Endpoint,
    /// One request for each choice, in the order of the choices.
    pub(super) requests: Vec<(Prompt, Options)>,
    /// Text before each choice: the prompt, where `echo` asks for it.
    pub(super) echo: Vec<String>,
    /// The generated tokens are a hole before `suffix`: their text alone is the answer.
    pub(super) hole_alone: bool,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) provisional: Provisional,
    pub(super) logprobs: bool,
    pub(super) details: bool,
    /// vLLM's `token_ids` beside each text.
    pub(super) token_ids: bool,
    /// What is logged where prompts are.
    pub(super) prompt_log: String,
}

/// A text or token ids, or several.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text, a list of texts, a list of token ids, or a list of these")]
enum PromptsJson {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    Lists(Vec<Vec<u32>>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    include_usage: Option<bool>,
    /// Of padding against side channels: there is none.
    #[allow(dead_code)]
    include_obfuscation: Option<bool>,
    /// Of vLLM: usage in every chunk.
    #[allow(dead_code)]
    continuous_usage_stats: Option<bool>,
}

/// Parts of a conversation as they were written: templates may print them, keys in their order.
#[derive(Deserialize)]
struct ConversationJson<'a> {
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
    #[serde(borrow)]
    tools: Option<&'a RawValue>,
    #[serde(borrow)]
    documents: Option<&'a RawValue>,
    #[serde(borrow)]
    add_generation_prompt: Option<&'a RawValue>,
    #[serde(borrow)]
    continue_final_message: Option<&'a RawValue>,
    #[serde(borrow)]
    chat_template: Option<&'a RawValue>,
    #[serde(borrow)]
    chat_template_kwargs: Option<&'a RawValue>,
}

/// Reads the conversation of a body, and its keys off `body`. A content of several texts is one
/// text.
pub(super) fn conversation(bytes: &[u8], body: &mut Body) -> Result<Conversation, ApiError> {
    let messages: Vec<serde_json::Value> =
        body.take("messages")?.ok_or_else(|| ApiError::param("messages", "expected a list of messages"))?;
    let raw: ConversationJson = serde_json::from_slice(bytes).map_err(|e| ApiError::invalid(format!("body: {e}")))?;
    let in_parts = messages.iter().any(|message| message["content"].is_array());
    let joined;
    let text = match raw.messages {
        Some(raw) if !in_parts => raw.get(),
        _ => {
            joined = serde_json::to_string(&messages.into_iter().map(joined_content).collect::<Result<Vec<_>, _>>()?)
                .map_err(|e| ApiError::param("messages", e))?;
            &joined
        }
    };
    let mut object = format!("{{\"messages\":{text}");
    for (key, value) in [
        ("tools", raw.tools),
        ("documents", raw.documents),
        ("add_generation_prompt", raw.add_generation_prompt),
        ("continue_final_message", raw.continue_final_message),
        ("chat_template", raw.chat_template),
        ("chat_template_kwargs", raw.chat_template_kwargs),
    ] {
        body.take::<serde_json::Value>(key)?;
        if let Some(value) = value {
            object += &format!(",\"{key}\":{}", value.get());
        }
    }
    Ok(Conversation::from_json(&(object + "}"))?)
}

/// A message whose content is one text.
fn joined_content(mut message: serde_json::Value) -> Result<serde_json::Value, ApiError> {
    if let Some(parts) = message["content"].as_array() {
        let text = |part: &serde_json::Value| match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text" | "input_text"), Some(text)) => Ok(text.to_owned()),
            (kind, _) => Err(ApiError::param("messages", format!("expected content of type text, found {}", kind.unwrap_or("none")))),
        };
        let texts = parts.iter().map(text).collect::<Result<Vec<_>, _>>()?;
        message["content"] = texts.join("\n").into();
    }
    Ok(message)
}

impl Asked {
    /// Text of a choice: what was generated, or the whole text with its holes filled, but of a hole
    /// before a suffix what fills it.
    pub(super) fn text(&self, generation: &Generation) -> String {
        if self.hole_alone { generation.pieces().concat() } else { generation.text.clone() }
    }

    /// Reads the body of `/v1/completions` or `/v1/chat/completions`.
    ///
    /// Errors: what is wrong, with the key.
    pub(super) fn parse(endpoint: Endpoint, bytes: &[u8], app: &App) -> Result<Asked, ApiError> {
        let mut body = Body::parse(bytes)?;
        body.check_model(app)?;
        let infill: Option<String> = body.take("infill")?;
        let draft: Option<String> = body.take("draft")?;
        let suffix: Option<String> = body.take("suffix")?;
        let echo = body.take::<bool>("echo")?.unwrap_or(false);
        let max_tokens: Option<usize> = match (body.take("max_completion_tokens")?, body.take("max_tokens")?) {
            (Some(max), _) | (None, max) => max,
        };
        let limit = app.options.max_tokens.unwrap_or(usize::MAX);
        if let Some(max) = max_tokens.filter(|max| *max == 0 || *max > limit) {
            return Err(ApiError::param("max_tokens", format!("expected 1 to {limit}, found {max}")));
        }
        let prompts: Vec<Prompt> = match endpoint {
            Endpoint::Chat => {
                if infill.is_some() || draft.is_some() || suffix.is_some() || echo {
                    return Err(ApiError::invalid("infill, draft, suffix and echo are keys of /v1/completions"));
                }
                vec![conversation(bytes, &mut body)?.into()]
            }
            Endpoint::Completions => {
                let given = body.take::<PromptsJson>("prompt")?;
                let length = max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
                prompts(given, infill, draft, suffix.as_ref().map(|suffix| (suffix.as_str(), length)))?
            }
        };
        let hole_alone = suffix.is_some_and(|suffix| !suffix.is_empty());
        let length = match endpoint {
            Endpoint::Completions => Some(max_tokens.unwrap_or(DEFAULT_MAX_TOKENS)),
            Endpoint::Chat => max_tokens.or(app.options.max_tokens.map(|max| max.min(app.default_length()))),
        };
        let options = options(&mut body, length, app)?;
        let n = body.take::<usize>("n")?.unwrap_or(1);
        if n == 0 || n.saturating_mul(prompts.len()) > MAX_CHOICES {
            return Err(ApiError::param(
                "n",
                format!("expected 1 to {} for {} prompts, found {n}", MAX_CHOICES / prompts.len().max(1), prompts.len()),
            ));
        }
        if let Some(best_of) = body.take::<usize>("best_of")?.filter(|best_of| *best_of != n) {
            return Err(ApiError::param("best_of", format!("expected n, which is {n}, found {best_of}")));
        }
        let logprobs = logprobs(endpoint, &mut body)?;
        if echo && logprobs {
            return Err(ApiError::param("echo", "log probabilities of the prompt are not computed; expected echo or logprobs alone"));
        }
        let stream = body.take::<bool>("stream")?.unwrap_or(false);
        let stream_options: Option<StreamOptions> = body.take("stream_options")?;
        if stream_options.is_some() && !stream {
            return Err(ApiError::param("stream_options", "expected stream to be true"));
        }
        let provisional = match body.take("provisional")? {
            None | Some(ProvisionalJson::Switch(false)) => Provisional::No,
            Some(ProvisionalJson::Switch(true)) => Provisional::Now,
            Some(ProvisionalJson::Word(Word::Steps)) => Provisional::EveryStep,
        };
        if provisional != Provisional::No && !stream {
            return Err(ApiError::param("provisional", "expected stream to be true: what may change is told while it is written"));
        }
        let details = body.take::<bool>("details")?.unwrap_or(true);
        let token_ids = body.take::<bool>("return_token_ids")?.unwrap_or(false);
        body.finish()?;
        let prompt_log = if app.options.log_prompts { format!("{prompts:?}") } else { String::new() };
        let before = |prompt: &Prompt| -> Result<String, ApiError> {
            Ok(match prompt {
                Prompt::Text(text) => text.clone(),
                Prompt::Tokens(tokens) => app.admission.engine().tokenizer()?.decode(tokens),
                _ => return Err(ApiError::param("echo", "expected a prompt that is continued")),
            })
        };
        let texts = if echo { prompts.iter().map(before).collect::<Result<Vec<_>, _>>()? } else { vec![String::new(); prompts.len()] };
        let choices = prompts.into_iter().zip(texts).flat_map(|choice| std::iter::repeat_n(choice, n)).enumerate();
        let (requests, echo) = choices.map(|(i, (prompt, text))| ((prompt, options.clone().sample((i % n) as u32)), text)).unzip();
        Ok(Asked {
            endpoint,
            requests,
            echo,
            hole_alone,
            stream,
            include_usage: stream_options.and_then(|options| options.include_usage).unwrap_or(false),
            provisional,
            logprobs,
            details,
            token_ids,
            prompt_log,
        })
    }
}

/// What is given of the texts of a completion. `suffix`: text after the hole, and the hole's
/// tokens.
fn prompts(
    given: Option<PromptsJson>,
    infill: Option<String>,
    draft: Option<String>,
    suffix: Option<(&str, usize)>,
) -> Result<Vec<Prompt>, ApiError> {
    let suffix = suffix.filter(|(suffix, _)| !suffix.is_empty());
    let is_empty = match &given {
        None => true,
        Some(PromptsJson::Text(text)) => text.is_empty(),
        Some(_) => false,
    };
    if let Some(text) = infill {
        if !is_empty || draft.is_some() || suffix.is_some() {
            return Err(ApiError::param("infill", "it holds the whole text: expected no prompt, draft or suffix beside it"));
        }
        return Ok(vec![Prompt::infill(&text)?]);
    }
    let given = match given {
        None if draft.is_some() => PromptsJson::Text(String::new()),
        None => return Err(ApiError::param("prompt", "expected a text, or token ids, or infill")),
        Some(given) => given,
    };
    let prompts: Vec<Prompt> = match given {
        PromptsJson::Text(text) => vec![text.into()],
        // An empty list is one of texts.
        PromptsJson::Texts(texts) => texts.into_iter().map(Into::into).collect(),
        PromptsJson::Tokens(tokens) => vec![tokens.into()],
        PromptsJson::Lists(lists) => lists.into_iter().map(Into::into).collect(),
    };
    if prompts.is_empty() {
        return Err(ApiError::param("prompt", "expected at least one, found an empty list"));
    }
    let with = |prompt: Prompt| match (prompt, &draft, suffix) {
        (Prompt::Text(prompt), Some(draft), None) => Ok(Prompt::refine(prompt, draft.clone())),
        (Prompt::Text(prompt), None, Some((suffix, length))) => {
            let before = (!prompt.is_empty()).then_some(Segment::Text(prompt));
            Ok(Prompt::Infill(before.into_iter().chain([Segment::Hole(length), Segment::Text(suffix.to_owned())]).collect()))
        }
        (prompt, None, None) => Ok(prompt),
        (_, Some(_), Some(_)) => Err(ApiError::param("draft", "expected a draft or a suffix")),
        (_, Some(_), _) => Err(ApiError::param("draft", "expected a prompt of text")),
        (_, _, Some(_)) => Err(ApiError::param("suffix", "expected a prompt of text")),
    };
    prompts.into_iter().map(with).collect()
}

/// How the texts are made.
fn options(body: &mut Body, length: Option<usize>, app: &App) -> Result<Options, ApiError> {
    let mut options = Options::default();
    if let Some(schedule) = body.take::<OneOrMore>("schedule")? {
        options = options.schedule_text(&schedule.into_list().join(";")).map_err(|e| ApiError::param("schedule", e))?;
    }
    if let Some(length) = length {
        options = options.length(length);
    }
    if let Some(temperature) = body.take("temperature")? {
        options = options.temperature(temperature);
    }
    if let Some(p) = body.take("top_p")? {
        options = options.top_p(p);
    }
    if let Some(k) = body.take::<i64>("top_k")? {
        // vLLM's -1 is all, as 0.
        let k = if k == -1 { 0 } else { k };
        options = options.top_k(
            u32::try_from(k).map_err(|_| ApiError::param("top_k", format!("expected a number of tokens, 0 or -1 for all, found {k}")))?,
        );
    }
    match body.take::<String>("top_p_rule")?.as_deref() {
        None => {}
        Some("within") => options = options.top_p_rule(TopPRule::Within),
        Some("crossing") => options = options.top_p_rule(TopPRule::Crossing),
        Some(other) => return Err(ApiError::param("top_p_rule", format!("expected within or crossing, found {other}"))),
    }
    let stop = body.take::<OneOrMore>("stop")?.map_or_else(Vec::new, OneOrMore::into_list);
    if stop.len() > MAX_STOPS {
        return Err(ApiError::param("stop", format!("expected at most {MAX_STOPS} texts, found {}", stop.len())));
    }
    options = stop.into_iter().fold(options, Options::stop);
    // Any 64 bits are a seed; a negative one is read by its bits.
    let seed = body.take::<serde_json::Number>("seed")?;
    let seed = seed.map(|seed| {
        let bits = seed.as_u64().or_else(|| seed.as_i64().map(i64::cast_unsigned));
        bits.ok_or_else(|| ApiError::param("seed", format!("expected a whole number of 64 bits, found {seed}")))
    });
    options = options.seed(seed.transpose()?.unwrap_or_else(|| app.admission.seed()));
    let ignore_eos = body.take("ignore_eos")?.unwrap_or(false);
    if !ignore_eos && body.take::<usize>("min_tokens")?.is_some_and(|min| min > 0) {
        return Err(ApiError::param("min_tokens", "expected 0, or ignore_eos beside it, which writes the full length"));
    }
    body.take::<usize>("min_tokens")?;
    options = options.ignore_eos(ignore_eos);
    options = options.priority(body.take("priority")?.unwrap_or(0));
    if let Some(nats) = body.take("stop_entropy")? {
        options = options.stop_entropy(nats);
    }
    let bos = match body.take::<String>("bos")?.as_deref() {
        None => body.take::<bool>("add_special_tokens")?.filter(|add| !add).map(|_| Bos::No).unwrap_or_default(),
        Some("auto") => Bos::Auto,
        Some("yes") => Bos::Yes,
        Some("no") => Bos::No,
        Some(other) => return Err(ApiError::param("bos", format!("expected auto, yes or no, found {other}"))),
    };
    Ok(options.bos(bos))
}

/// Whether log probabilities are asked for: those of the tokens that were written. Others are not
/// kept.
fn logprobs(endpoint: Endpoint, body: &mut Body) -> Result<bool, ApiError> {
    let expected = "log probabilities are those of the written tokens alone";
    if endpoint == Endpoint::Completions {
        let count: Option<u32> = body.take("logprobs")?;
        return match count {
            Some(count) if count > 1 => Err(ApiError::param("logprobs", format!("{expected}: expected 0 or 1, found {count}"))),
            count => Ok(count.is_some()),
        };
    }
    if let Some(count) = body.take::<u32>("top_logprobs")?.filter(|count| *count > 0) {
        return Err(ApiError::param("top_logprobs", format!("{expected}: expected 0, found {count}")));
    }
    Ok(body.take("logprobs")?.unwrap_or(false))
}
