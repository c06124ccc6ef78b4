//! A conversation and everything else that transformers hands to a template.
#![forbid(unsafe_code)]

use minijinja::Value;
use minijinja::value::ValueKind;

use super::disguise::Place;
use super::source::is_space;
use crate::error::{Error, Result};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn of this role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// What a template renders: messages, and the other arguments of transformers'
/// `apply_chat_template`.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    messages: Value,
    pub(super) tools: Option<Value>,
    documents: Option<Value>,
    /// Arguments by name, which hide tokens of the same name.
    arguments: Vec<(String, Value)>,
    generation_prompt: bool,
    /// Key of the last message that the answer goes on with.
    continued: Option<String>,
    /// Name of one of several templates.
    pub(super) template: Option<String>,
}

/// Keys under which messages give the model's reasoning; the first is the one that templates read.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// What transformers puts behind the text that is continued, to find its end.
const TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// Keys whose values templates compare and do not print as a user's words.
const COMPARED: [&str; 2] = ["role", "type"];

impl Conversation {
    /// Turns, followed by the beginning of the assistant's answer.
    pub fn new(messages: &[Message]) -> Conversation {
        let turn = |message: &Message| Value::from_pairs([("role", message.role.as_str()), ("content", message.content.as_str())]);
        Conversation {
            messages: messages.iter().map(turn).collect(),
            tools: None,
            documents: None,
            arguments: Vec::new(),
            generation_prompt: true,
            continued: None,
            template: None,
        }
    }

    /// The same without the beginning of an answer: the text ends where the last message's content
    /// ends, and what is generated goes on with it.
    pub fn continuing_final_message(self) -> Conversation {
        Conversation { generation_prompt: false, continued: Some("content".into()), ..self }
    }

    /// Reads JSON: a list of messages, or an object with `messages` and any of `tools`,
    /// `documents`, `add_generation_prompt`, `continue_final_message` (true, or a key of the last
    /// message), `chat_template` (the name of one of several), and `chat_template_kwargs`, an
    /// object of further arguments. Messages are objects with a role;
    /// everything else in them is the template's business.
    ///
    /// Errors: [`Error::Request`] that names the key, what was expected and what was found.
    pub fn from_json(text: &str) -> Result<Conversation> {
        let fail = |what: String| Error::request(format!("messages: {what}"));
        let value: Value = serde_json::from_str(text).map_err(|e| fail(format!("not JSON: {e}")))?;
        let mut conversation = Conversation::new(&[]);
        let get = |key: &str| value.get_attr(key).ok().filter(|value| !value.is_undefined() && !value.is_none());
        let messages = match value.kind() {
            ValueKind::Seq => value.clone(),
            ValueKind::Map => {
                let known = [
                    "messages",
                    "tools",
                    "documents",
                    "add_generation_prompt",
                    "continue_final_message",
                    "chat_template",
                    "chat_template_kwargs",
                ];
                for (key, _) in pairs(&value) {
                    if !known.contains(&key.as_str()) {
                        return Err(fail(format!("key `{key}` is not one of {}", known.join(", "))));
                    }
                }
                get("messages").ok_or_else(|| fail("expected a list of messages, or an object with the key `messages`".into()))?
            }
            _ => return Err(fail("expected a list of messages, or an object with the key `messages`".into())),
        };
        let list = |key: &str, value: &Value| -> Result<Vec<Value>> {
            let expected = || fail(format!("key `{key}`: expected a list of objects"));
            if value.kind() != ValueKind::Seq {
                return Err(expected());
            }
            let items: Vec<Value> =
                value.try_iter().map_err(|_| expected())?.checked().collect::<std::result::Result<_, _>>().map_err(|_| expected())?;
            if items.iter().any(|item| item.kind() != ValueKind::Map) {
                return Err(expected());
            }
            Ok(items)
        };
        let messages = list("messages", &messages)?;
        if messages.is_empty() {
            return Err(fail("expected at least one message, found none".into()));
        }
        if let Some(i) = messages.iter().position(|message| !message.get_attr("role").is_ok_and(|role| role.as_str().is_some())) {
            return Err(fail(format!("message {i} has no text as its `role`")));
        }
        conversation.messages = messages.iter().map(normalised).collect();
        // transformers hands an empty list on as one.
        conversation.tools = get("tools").map(|tools| list("tools", &tools).map(Value::from)).transpose()?;
        conversation.documents = get("documents").map(|documents| list("documents", &documents).map(Value::from)).transpose()?;
        if let Some(field) = get("continue_final_message") {
            conversation.continued = match (field.kind(), field.as_str()) {
                (ValueKind::Bool, _) => field.is_true().then(|| "content".to_owned()),
                (_, Some(field)) => Some(field.to_owned()).filter(|field| !field.is_empty()),
                _ => return Err(fail(format!("key `continue_final_message`: expected true, false or a key of a message, found {field}"))),
            };
            conversation.generation_prompt = conversation.continued.is_none();
        }
        if let Some(flag) = get("add_generation_prompt") {
            if flag.kind() != ValueKind::Bool {
                return Err(fail(format!("key `add_generation_prompt`: expected true or false, found {flag}")));
            }
            if flag.is_true() && conversation.continued.is_some() {
                let what = "one of them begins an answer, the other goes on with the last message";
                return Err(fail(format!("`continue_final_message` and `add_generation_prompt` exclude each other: {what}")));
            }
            conversation.generation_prompt = flag.is_true();
        }
        if let Some(name) = get("chat_template") {
            let name = name.as_str().map(str::to_owned);
            conversation.template = Some(name.ok_or_else(|| fail("key `chat_template`: expected a name".into()))?);
        }
        if let Some(arguments) = get("chat_template_kwargs") {
            if arguments.kind() != ValueKind::Map {
                return Err(fail("key `chat_template_kwargs`: expected an object".into()));
            }
            conversation.arguments = pairs(&arguments);
        }
        Ok(conversation)
    }

    pub(super) fn num_messages(&self) -> usize {
        self.messages.len().unwrap_or(0)
    }

    /// The variables of a template.
    pub(super) fn context(&self, tokens: &[(String, String)]) -> Value {
        let mut all: Vec<(String, Value)> = tokens.iter().map(|(name, token)| (name.clone(), token.as_str().into())).collect();
        all.extend(self.arguments.iter().cloned());
        let none = || Value::from(());
        all.push(("messages".into(), self.tagged()));
        all.push(("tools".into(), self.tools.clone().unwrap_or_else(none)));
        all.push(("documents".into(), self.documents.clone().unwrap_or_else(none)));
        all.push(("add_generation_prompt".into(), self.generation_prompt.into()));
        Value::from_pairs(all)
    }

    /// What of the last message is continued, and under which keys it stands: reasoning has
    /// several.
    fn final_message(&self, key: &str) -> Option<(Value, Vec<String>)> {
        let message = items(&self.messages).pop()?;
        let value = |key: &str| message.get_attr(key).ok().filter(|value| !value.is_undefined() && !value.is_none());
        let found = value(key)?;
        let keys = if REASONING.contains(&key) {
            REASONING.iter().copied().filter(|key| value(key).as_ref() == Some(&found)).collect()
        } else {
            vec![key]
        };
        Some((found, keys.into_iter().map(str::to_owned).collect()))
    }

    /// The text that is continued: the value itself, or the last text of its parts, which is at
    /// the place that is given too.
    fn final_text(value: &Value) -> Option<(String, Option<usize>)> {
        match value.kind() {
            ValueKind::String => Some((value.as_str()?.to_owned(), None)),
            ValueKind::Seq => {
                let text = |part: &Value| part.get_attr("text").ok().and_then(|text| text.as_str().map(str::to_owned));
                items(value).iter().enumerate().rev().find_map(|(i, part)| Some((text(part)?, Some(i))))
            }
            _ => None,
        }
    }

    /// Refuses a last message that has nothing to continue, or that the template does not read.
    pub(super) fn check_final(&self, source: &str) -> Result<()> {
        let Some(key) = &self.continued else { return Ok(()) };
        let fail = |what: String| Err(Error::request(format!("chat: continue_final_message: {what}")));
        let Some((value, keys)) = self.final_message(key) else { return fail(format!("the last message has no `{key}` to continue")) };
        if !keys.iter().any(|key| source.contains(key.as_str())) {
            return fail(format!("the chat template does not read `{key}`"));
        }
        if Conversation::final_text(&value).is_none() {
            fail(format!("`{key}` of the last message has no text to continue"))
        } else {
            Ok(())
        }
    }

    /// The messages, with [`TAG`] after what is continued.
    fn tagged(&self) -> Value {
        let found = self.continued.as_ref().and_then(|key| self.final_message(key));
        let Some((value, keys)) = found else { return self.messages.clone() };
        let Some((text, part)) = Conversation::final_text(&value) else { return self.messages.clone() };
        let text = Value::from(text + TAG);
        let tagged = match part {
            None => text,
            Some(at) => {
                let mut parts = items(&value);
                parts[at] = with(&parts[at], &["text".to_owned()], &text);
                Value::from(parts)
            }
        };
        let mut messages = items(&self.messages);
        if let Some(last) = messages.last_mut() {
            *last = with(last, &keys, &tagged);
        }
        Value::from(messages)
    }

    /// What was rendered, up to the end of what is continued; its white space at the end stays if
    /// the template kept it.
    ///
    /// Errors: the template left out a part of it.
    pub(super) fn cut(&self, mut rendered: String) -> std::result::Result<String, String> {
        let Some((value, _)) = self.continued.as_ref().and_then(|key| self.final_message(key)) else { return Ok(rendered) };
        let text = Conversation::final_text(&value).map(|(text, _)| text).unwrap_or_default();
        match rendered.rfind(TAG.trim_end()) {
            Some(at) if rendered.contains(text.trim_matches(is_space)) => {
                let kept = rendered[at..].starts_with(TAG);
                rendered.truncate(at);
                if !kept {
                    rendered.truncate(rendered.trim_end_matches(is_space).len());
                }
                Ok(rendered)
            }
            _ => Err("leaves out a part of the final message, which can then not be continued (continue_final_message)".into()),
        }
    }

    /// Every value that a caller gave.
    fn values(&self) -> impl Iterator<Item = &Value> {
        [Some(&self.messages), self.tools.as_ref(), self.documents.as_ref()]
            .into_iter()
            .flatten()
            .chain(self.arguments.iter().map(|(_, value)| value))
    }

    /// Every character of its texts and keys.
    pub(super) fn chars(&self) -> Vec<char> {
        fn collect(value: &Value, out: &mut Vec<char>) {
            match value.kind() {
                ValueKind::String => out.extend(value.as_str().unwrap_or_default().chars()),
                ValueKind::Seq => items(value).iter().for_each(|value| collect(value, out)),
                ValueKind::Map => pairs(value).iter().for_each(|(key, value)| {
                    out.extend(key.chars());
                    collect(value, out);
                }),
                _ => {}
            }
        }
        let mut out = Vec::new();
        self.values().for_each(|value| collect(value, &mut out));
        out
    }

    /// The same with every text and every key changed. `change` is told where the text stands.
    pub(super) fn map_text(&self, change: &mut impl FnMut(&str, Place) -> String) -> Conversation {
        fn map(value: &Value, place: Place, change: &mut impl FnMut(&str, Place) -> String) -> Value {
            match value.kind() {
                ValueKind::String => change(value.as_str().unwrap_or_default(), place).into(),
                ValueKind::Seq => items(value).iter().map(|value| map(value, place, change)).collect(),
                ValueKind::Map => {
                    let pairs = pairs(value).into_iter().map(|(key, value)| {
                        let place = if COMPARED.contains(&key.as_str()) { Place::Name } else { Place::Words };
                        let value = map(&value, place, change);
                        (change(&key, Place::Name), value)
                    });
                    Value::from_pairs(pairs.collect::<Vec<_>>())
                }
                _ => value.clone(),
            }
        }
        Conversation {
            messages: map(&self.messages, Place::Words, change),
            tools: self.tools.as_ref().map(|tools| map(tools, Place::Words, change)),
            documents: self.documents.as_ref().map(|documents| map(documents, Place::Words, change)),
            arguments: self.arguments.iter().map(|(name, value)| (name.clone(), map(value, Place::Words, change))).collect(),
            generation_prompt: self.generation_prompt,
            continued: self.continued.clone(),
            template: self.template.clone(),
        }
    }
}

fn items(value: &Value) -> Vec<Value> {
    value.try_iter().into_iter().flat_map(|items| items.checked().flatten().collect::<Vec<_>>()).collect()
}

/// Keys and values, in their order.
fn pairs(value: &Value) -> Vec<(String, Value)> {
    let keys = items(value).into_iter().filter_map(|key| Some((key.as_str()?.to_owned(), key)));
    keys.map(|(name, key)| (name, value.get_item(&key).unwrap_or_default())).collect()
}

/// An object with other values under the keys.
fn with(object: &Value, keys: &[String], value: &Value) -> Value {
    let changed = pairs(object).into_iter().map(|(key, old)| if keys.contains(&key) { (key, value.clone()) } else { (key, old) });
    Value::from_pairs(changed.collect::<Vec<_>>())
}

/// A message as transformers normalises it: keys without a value are absent, and reasoning stands
/// under the name that templates read.
fn normalised(message: &Value) -> Value {
    let mut all: Vec<(String, Value)> = pairs(message).into_iter().filter(|(_, value)| !value.is_none()).collect();
    let found = |name: &str| all.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    if let Some(reasoning) = REASONING.iter().find_map(|name| found(name)) {
        if found("thinking").is_none() {
            all.insert(0, ("thinking".into(), reasoning.clone()));
        }
        match all.iter_mut().find(|(key, _)| key == REASONING[0]) {
            Some((_, value)) => *value = reasoning,
            None => all.push((REASONING[0].into(), reasoning)),
        }
    }
    Value::from_pairs(all)
}
