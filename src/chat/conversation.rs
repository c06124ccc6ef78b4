//! A conversation and everything else that transformers hands to a template.
#![forbid(unsafe_code)]

use minijinja::Value;
use minijinja::value::ValueKind;

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
    /// Name of one of several templates.
    pub(super) template: Option<String>,
}

/// Keys under which messages give the model's reasoning; the first is the one that templates read.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

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
            template: None,
        }
    }

    /// Reads JSON: a list of messages, or an object with `messages` and any of `tools`,
    /// `documents`, `add_generation_prompt`, `chat_template` (the name of one of several), and
    /// `chat_template_kwargs`, an object of further arguments. Messages are objects with a role;
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
                let known = ["messages", "tools", "documents", "add_generation_prompt", "chat_template", "chat_template_kwargs"];
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
        if let Some(flag) = get("add_generation_prompt") {
            if flag.kind() != ValueKind::Bool {
                return Err(fail(format!("key `add_generation_prompt`: expected true or false, found {flag}")));
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
        all.push(("messages".into(), self.messages.clone()));
        all.push(("tools".into(), self.tools.clone().unwrap_or_else(none)));
        all.push(("documents".into(), self.documents.clone().unwrap_or_else(none)));
        all.push(("add_generation_prompt".into(), self.generation_prompt.into()));
        Value::from_pairs(all)
    }

    /// Every value that a caller gave.
    fn values(&self) -> impl Iterator<Item = &Value> {
        [Some(&self.messages), self.tools.as_ref(), self.documents.as_ref()]
            .into_iter()
            .flatten()
            .chain(self.arguments.iter().map(|(_, value)| value))
    }

    /// Whether a text in it, names of keys aside, is such a one.
    pub(super) fn any_text(&self, test: &impl Fn(&str) -> bool) -> bool {
        fn any(value: &Value, test: &impl Fn(&str) -> bool) -> bool {
            match value.kind() {
                ValueKind::String => value.as_str().is_some_and(test),
                ValueKind::Seq => items(value).iter().any(|value| any(value, test)),
                ValueKind::Map => pairs(value).iter().any(|(_, value)| any(value, test)),
                _ => false,
            }
        }
        self.values().any(|value| any(value, test))
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

    /// The same with every text changed. `change` is told whether templates compare the text, as a
    /// role.
    pub(super) fn map_text(&self, change: &mut impl FnMut(&str, bool) -> String) -> Conversation {
        fn map(value: &Value, compared: bool, change: &mut impl FnMut(&str, bool) -> String) -> Value {
            match value.kind() {
                ValueKind::String => change(value.as_str().unwrap_or_default(), compared).into(),
                ValueKind::Seq => items(value).iter().map(|value| map(value, compared, change)).collect(),
                ValueKind::Map => {
                    let pairs = pairs(value).into_iter().map(|(key, value)| {
                        let value = map(&value, COMPARED.contains(&key.as_str()), change);
                        (key, value)
                    });
                    Value::from_pairs(pairs.collect::<Vec<_>>())
                }
                _ => value.clone(),
            }
        }
        Conversation {
            messages: map(&self.messages, false, change),
            tools: self.tools.as_ref().map(|tools| map(tools, false, change)),
            documents: self.documents.as_ref().map(|documents| map(documents, false, change)),
            arguments: self.arguments.iter().map(|(name, value)| (name.clone(), map(value, false, change))).collect(),
            generation_prompt: self.generation_prompt,
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
