//! Chat templates: what a checkpoint makes of a conversation before it is tokenised.
//!
//! A template is the Jinja text that the checkpoint ships, rendered as transformers renders it
//! (`apply_chat_template`): blocks trimmed, Python's string and list methods, `raise_exception`.
//! What users wrote stays text: special tokens in the template are special, the same letters inside
//! a message are not.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, context};

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;


/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what the template knows.
    pub role: String,
    /// Text of the turn.
    pub content: String,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// A checkpoint's chat template and the tokens it names.
#[derive(Debug)]
pub struct ChatTemplate {
    source: String,
    /// Where it was read.
    path: PathBuf,
    /// `bos_token`, `eos_token` and their like, by name.
    tokens: Vec<(String, String)>,
}

/// Names under which templates expect special tokens.
const TOKEN_NAMES: [&str; 5] = ["bos_token", "eos_token", "pad_token", "unk_token", "mask_token"];

impl ChatTemplate {
    /// Reads the template of a model directory: `chat_template.jinja`, or the key `chat_template`
    /// of `tokenizer_config.json` (a string, or a list of `{name, template}` of which `default` is
    /// taken). Errors name the files that were looked at.
    pub fn load(dir: &Path) -> Result<ChatTemplate> {
        let config_path = dir.join("tokenizer_config.json");
        let config: serde_json::Value = match read(&config_path)? {
            Some(text) => serde_json::from_str(&text).map_err(|e| Error::tokenizer(&config_path, format!("not JSON: {e}")))?,
            None => serde_json::Value::Null,
        };
        // A token is a string, or an object with its spelling as `content`.
        let token = |name: &str| {
            let value = config.get(name)?;
            Some((name.to_string(), value.as_str().or_else(|| value.get("content")?.as_str())?.to_string()))
        };
        let tokens = TOKEN_NAMES.iter().filter_map(|name| token(name)).collect();
        let file = dir.join("chat_template.jinja");
        let (source, path) = match (read(&file)?, config.get("chat_template")) {
            (Some(source), _) => (source, file),
            (None, Some(serde_json::Value::String(source))) => (source.clone(), config_path),
            (None, Some(serde_json::Value::Array(list))) => {
                let named = list.iter().find(|t| t.get("name").and_then(|n| n.as_str()) == Some("default"));
                let source = named
                    .and_then(|t| t.get("template")?.as_str())
                    .ok_or_else(|| Error::tokenizer(&config_path, "chat_template: expected a template named `default` in the list"))?;
                (source.to_string(), config_path)
            }
            (None, Some(serde_json::Value::Null) | None) => {
                let what = "no chat template: expected chat_template.jinja, or the key chat_template in tokenizer_config.json; a base model has none";
                return Err(Error::tokenizer(dir, what));
            }
            (None, Some(other)) => {
                return Err(Error::tokenizer(&config_path, format!("chat_template: expected a string or a list, found {other}")));
            }
        };
        let template = ChatTemplate { source, path, tokens };
        template.environment()?;
        Ok(template)
    }

    fn environment(&self) -> Result<Environment<'_>> {
        let mut env = Environment::new();
        // As transformers sets Jinja up.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.map_err(|e| self.error("cannot be set up", &e))?);
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        // A template is a program from outside.
        env.set_fuel(Some(10_000_000));
        env.add_function("raise_exception", |message: String| -> std::result::Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_template("chat", &self.source).map_err(|e| self.error("does not parse", &e))?;
        Ok(env)
    }

    fn error(&self, what: &str, error: &minijinja::Error) -> Error {
        Error::tokenizer(&self.path, format!("the chat template {what}: {error:#}"))
    }

    /// The conversation as text, ending where the assistant's reply begins.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let env = self.environment()?;
        let tokens: BTreeMap<String, Value> = self.tokens.iter().map(|(name, token)| (name.clone(), token.as_str().into())).collect();
        let turns: Vec<Value> = messages.iter().map(|m| context! { role => m.role.as_str(), content => m.content.as_str() }).collect();
        let context = context! { messages => turns, add_generation_prompt => true, ..Value::from(tokens) };
        env.get_template("chat").and_then(|t| t.render(context)).map_err(|e| self.error("fails", &e))
    }

    /// Ids of the conversation. Where a message spells a special token, that message is encoded as
    /// text, apart from the template around it; otherwise everything is encoded in one piece, as
    /// transformers does.
    pub fn encode(&self, messages: &[Message], tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let text = self.render(messages)?;
        if !messages.iter().any(|m| tokenizer.spells_special(&m.content)) {
            return tokenizer.encode_with_special(&text);
        }
        let mut ids = Vec::new();
        let mut rest = text.as_str();
        for message in messages.iter().filter(|m| !m.content.trim().is_empty()) {
            // Templates may trim what they are given.
            let content = message.content.trim();
            let at = rest.find(content).ok_or_else(|| {
                let what =
                    "a message spells a special token, and the template changes the message: it cannot be told apart from the template";
                Error::tokenizer(&self.path, what)
            })?;
            ids.extend(tokenizer.encode_with_special(&rest[..at])?);
            ids.extend(tokenizer.encode(content)?);
            rest = &rest[at + content.len()..];
        }
        ids.extend(tokenizer.encode_with_special(rest)?);
        Ok(ids)
    }
}

/// The file's text, if there is such a file.
fn read(path: &Path) -> Result<Option<String>> {
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, &e)),
        Ok(m) if m.len() > MAX_BYTES => Err(Error::tokenizer(path, format!("{} bytes; expected at most {MAX_BYTES}", m.len()))),
        Ok(_) => std::fs::read_to_string(path).map(Some).map_err(|e| Error::io(path, &e)),
    }
}
