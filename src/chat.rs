//! Chat templates: what a checkpoint makes of a conversation before it is tokenised.
//!
//! A template is the Jinja text that the checkpoint ships, rendered as transformers renders it
//! (`apply_chat_template`). A template is a program from outside: its steps and the bytes that it
//! makes are bounded. What users wrote stays text: special tokens of the template are special, the
//! same letters inside a message are not.
#![forbid(unsafe_code)]

mod conversation;
mod date;
mod disguise;
mod environment;
mod filters;
mod format;
mod json;
mod marks;
mod math;
mod python;
mod source;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::NaiveDateTime;
use minijinja::{Environment, UndefinedBehavior};

pub use self::conversation::{Conversation, Message};
use self::disguise::{Disguise, LEAST, Place, WAYS, Way};
use self::marks::{Marks, Spans, Specials};
use self::python::Budget;
use crate::error::{Error, Result};
use crate::gguf;
use crate::input_file::{self, MAX_JSON_BYTES};
use crate::tokenizer::{SPECIAL_NAMES, Tokenizer, caught};

/// Bytes of text that one rendering may make, all its pieces together.
const MAX_MADE: usize = 64 << 20;
/// Steps of a rendering, and how many more each message may take. Published templates take some
/// hundred a message.
const STEPS: u64 = 1_000_000;
const STEPS_PER_MESSAGE: u64 = 20_000;

/// A checkpoint's chat templates and the tokens they name.
#[derive(Debug)]
pub struct ChatTemplate {
    /// Source and file of each, by name; a single one is `default`.
    templates: BTreeMap<String, (String, PathBuf)>,
    /// `bos_token`, `eos_token` and their like, by name.
    tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Reads the templates of a model directory: `chat_template.jinja` and
    /// `chat_templates/*.jinja`, or the key `chat_template` of `tokenizer_config.json` (a string,
    /// or a list of `{name, template}`), or those of a GGUF file. Errors name the files that were
    /// looked at.
    pub fn load(dir: &Path) -> Result<ChatTemplate> {
        let gguf_file = gguf::file_of(dir)?;
        let config_path = gguf_file.clone().unwrap_or_else(|| dir.join("tokenizer_config.json"));
        let object = |path: &Path| -> Result<serde_json::Value> {
            let Some(text) = read(path)? else { return Ok(serde_json::Value::Null) };
            input_file::parse_json(&text).map_err(|e| Error::tokenizer(path, format!("not JSON: {e}")))
        };
        let config = match &gguf_file {
            Some(file) => gguf::json(file, "tokenizer_config.json")?.unwrap_or_default().into(),
            None => object(&config_path)?,
        };
        let map = object(&dir.join("special_tokens_map.json"))?;
        // A token is a string, or an object with its spelling as `content`.
        let token = |name: &str| {
            let value = [&config, &map].into_iter().filter_map(|from| from.get(name)).find(|value| !value.is_null())?;
            Some((name.to_string(), value.as_str().or_else(|| value.get("content")?.as_str())?.to_string()))
        };
        let tokens = SPECIAL_NAMES.iter().filter_map(|name| token(name)).collect();
        let mut templates = BTreeMap::new();
        let file = dir.join("chat_template.jinja");
        if let Some(source) = read(&file)? {
            templates.insert("default".to_owned(), (source, file));
        }
        for (name, file) in more_templates(&dir.join("chat_templates"))? {
            if let Some(source) = read(&file)? {
                templates.insert(name, (source, file));
            }
        }
        if templates.is_empty() {
            let wrong = |what: String| Error::tokenizer(&config_path, format!("chat_template: {what}"));
            match config.get("chat_template") {
                Some(serde_json::Value::String(source)) => {
                    templates.insert("default".to_owned(), (source.clone(), config_path.clone()));
                }
                Some(serde_json::Value::Array(list)) => {
                    for named in list {
                        let text = |key: &str| named.get(key).and_then(serde_json::Value::as_str).map(str::to_owned);
                        let (Some(name), Some(source)) = (text("name"), text("template")) else {
                            return Err(wrong("expected a list of objects with a name and a template".into()));
                        };
                        templates.insert(name, (source, config_path.clone()));
                    }
                }
                None | Some(serde_json::Value::Null) => {
                    let expected = match &gguf_file {
                        Some(_) => "expected metadata key `tokenizer.chat_template`",
                        None => "expected chat_template.jinja, or the key chat_template in tokenizer_config.json",
                    };
                    return Err(Error::tokenizer(dir, format!("no chat template: {expected}; a base model has none")));
                }
                Some(other) => return Err(wrong(format!("expected a string or a list, found {other}"))),
            }
        }
        let template = ChatTemplate { templates, tokens };
        if let Some((source, path)) = template.templates.get("default") {
            Renderer::new(source, &[], Marks::default()).environment(0).map_err(|e| failure(path, &e))?;
        } else if !template.templates.contains_key("tool_use") {
            let names: Vec<&str> = template.templates.keys().map(String::as_str).collect();
            let what = format!("chat_template: expected a template named `default` in the list, found {}", names.join(", "));
            return Err(Error::tokenizer(&config_path, what));
        }
        Ok(template)
    }

    /// The template of a conversation, as transformers chooses it: by name, `tool_use` where there
    /// are tools, `default`.
    fn choose(&self, conversation: &Conversation) -> Result<&(String, PathBuf)> {
        let name = match &conversation.template {
            Some(name) => name.as_str(),
            None if conversation.tools.is_some() && self.templates.contains_key("tool_use") => "tool_use",
            None => "default",
        };
        self.templates.get(name).ok_or_else(|| {
            let names: Vec<&str> = self.templates.keys().map(String::as_str).collect();
            Error::request(format!("chat: no template is named `{name}`; the model has {}", names.join(", ")))
        })
    }

    /// The conversation as text, ending where the assistant's reply begins.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        self.render_conversation(&Conversation::new(messages))
    }

    /// The conversation as text.
    ///
    /// Errors: [`Error::Tokenizer`] for a template that fails or asks for too much, and
    /// [`Error::Request`] for one that the model does not have, or a conversation that it cannot
    /// continue.
    pub fn render_conversation(&self, conversation: &Conversation) -> Result<String> {
        let (source, path) = self.choose(conversation)?;
        conversation.check_final(source)?;
        Renderer::new(source, &self.tokens, Marks::default()).render(conversation).map_err(|e| failure(path, &e))
    }

    /// Ids of the conversation of [`ChatTemplate::encode_conversation`].
    pub fn encode(&self, messages: &[Message], tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        self.encode_conversation(&Conversation::new(messages), tokenizer)
    }

    /// Ids of the conversation. Special tokens that the template writes are those tokens; what the
    /// conversation holds is text, even where it spells one, alone or with what stands beside it.
    pub fn encode_conversation(&self, conversation: &Conversation, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let (source, path) = self.choose(conversation)?;
        conversation.check_final(source)?;
        let fail = |e: String| failure(path, &e);
        let plain = Renderer::new(source, &self.tokens, Marks::default());
        let text = plain.render(conversation).map_err(fail)?;
        let specials = Specials::new(tokenizer.specials().map(|(id, token)| (id, token.content.as_str())));
        let all = specials.find(&text, |_| true);
        let own = self.own_specials(&plain, conversation, &text, &specials);
        let what = "a message spells a special token, and the template looks into the message: what it writes itself cannot be told";
        let own = own.ok_or_else(|| Error::tokenizer(path, what))?;
        if own == all {
            // Normalization may spell special tokens too.
            let ids = tokenizer.encode_with_special(&text)?;
            if ids.iter().filter(|id| tokenizer.specials().any(|(special, _)| special == **id)).count() == own.len() {
                return Ok(ids);
            }
        }
        tokenizer.encode_spans(&text, &own)
    }

    /// Which special tokens of `text` the template wrote; none where that cannot be told.
    ///
    /// It is rendered again with marks in place of the special tokens that the template spells as a
    /// whole. Those that are left are a message's, or pieced together; to tell, the conversation is
    /// disguised. Every answer is compared with `text`.
    fn own_specials(&self, plain: &Renderer, conversation: &Conversation, text: &str, specials: &Specials) -> Option<Spans> {
        let taken: BTreeSet<char> = plain.source.chars().chain(text.chars()).chain(conversation.chars()).collect();
        let free = || (0xf_0000..0xf_fffe).chain(0x10_0000..0x10_fffe).filter_map(char::from_u32).filter(|c| !taken.contains(c));
        let mut marks = Marks::default();
        let mut private = free();
        let source = marks.put(plain.source, specials, &mut private);
        let tokens: Vec<_> = self.tokens.iter().map(|(name, token)| (name.clone(), marks.put(token, specials, &mut private))).collect();
        let marked = Renderer { now: plain.now, ..Renderer::new(&source, &tokens, marks) };
        let whole = |conversation: &Conversation| marked.render(conversation).ok().map(|text| marked.marks.reveal(&text));
        // Spans ascend.
        let reaching = |whole: &Spans, at: usize| whole.partition_point(|(own, _)| own.end <= at);
        let pieced = |text: &str, whole: &Spans| {
            let apart = |range: &Range<usize>| whole.get(reaching(whole, range.start)).is_none_or(|(own, _)| range.end <= own.start);
            specials.find(text, apart).len()
        };
        let whole_here = whole(conversation).filter(|(found, _)| found == text).map(|(_, spans)| spans);
        if let Some(spans) = &whole_here
            && pieced(text, spans) == 0
        {
            return whole_here;
        }
        let spellings: Vec<String> = specials.spellings().map(str::to_ascii_lowercase).collect();
        let strings = source::rewrite(plain.source).map(|rewritten| rewritten.literals).unwrap_or_default();
        let strings: Vec<String> = strings.into_iter().filter(|string| !string.is_empty()).collect();
        let disguised = |way: Way| {
            let mut disguise = Disguise::new(way, &spellings, &strings, free());
            let other = conversation.map_text(&mut |text: &str, place: Place| disguise.apply(text, place));
            (disguise, other)
        };
        for way in WAYS {
            let (disguise, other) = disguised(way);
            let Ok(rendered) = plain.render(&other) else { continue };
            let Some(theirs) = disguise.seen_through(text, &rendered) else { continue };
            let is_whole = |range: &Range<usize>| {
                whole_here.as_ref().is_some_and(|whole| whole.get(reaching(whole, range.start)).is_some_and(|(own, _)| own == range))
            };
            return Some(specials.find(text, |range| is_whole(range) || !theirs[range.clone()].contains(&true)));
        }
        // The template looks for special tokens in the message. What it writes to other words shows
        // whether it pieces any together.
        let (other, spans) = whole(&disguised(LEAST).1)?;
        if pieced(&other, &spans) == 0 { whole_here } else { None }
    }
}

/// A template with all that does not change from one rendering to the next.
struct Renderer<'t> {
    source: &'t str,
    tokens: &'t [(String, String)],
    marks: Arc<Marks>,
    now: NaiveDateTime,
}

impl<'t> Renderer<'t> {
    fn new(source: &'t str, tokens: &'t [(String, String)], marks: Marks) -> Renderer<'t> {
        Renderer { source, tokens, marks: Arc::new(marks), now: date::now() }
    }

    fn environment(&self, num_messages: usize) -> std::result::Result<Environment<'static>, String> {
        let rewritten = source::rewrite(self.source).map_err(|e| format!("does not parse: {e}"))?;
        let mut env = Environment::new();
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_fuel(Some(STEPS + STEPS_PER_MESSAGE * num_messages as u64));
        environment::install(&mut env, &Budget::new(MAX_MADE), &self.marks, self.now, rewritten.texts);
        env.add_template_owned("chat", rewritten.source).map_err(|e| format!("does not parse: {}", shown(&e)))?;
        Ok(env)
    }

    fn render(&self, conversation: &Conversation) -> std::result::Result<String, String> {
        let env = self.environment(conversation.num_messages())?;
        let template = env.get_template("chat").map_err(|e| shown(&e))?;
        // Minijinja panics on some values.
        let rendered = caught(|| template.render(conversation.context(self.tokens)))
            .map_err(|panic| format!("fails: the template library failed: {panic}"))?;
        conversation.cut(rendered.map_err(|e| format!("fails: {}", shown(&e)))?)
    }
}

/// The text of a file, if there is one.
fn read(path: &Path) -> Result<Option<String>> {
    input_file::read_optional_text(path, MAX_JSON_BYTES).map_err(|e| Error::tokenizer(path, format!("cannot read: {e}")))
}

/// Names and paths of the templates in a directory, which may be absent.
fn more_templates(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        // Nothing is in a file that is a whole model.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(dir, &error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io(dir, &e))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".jinja"));
        if let Some(name) = name {
            found.push((name.to_owned(), path.clone()));
        }
    }
    found.sort();
    Ok(found)
}

fn failure(path: &Path, what: &str) -> Error {
    Error::tokenizer(path, format!("the chat template {what}"))
}

/// An error of minijinja at a readable length, without the place: it read a rewritten source.
fn shown(error: &minijinja::Error) -> String {
    let text = error.detail().map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()));
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().count() > 400 { text.chars().take(400).chain(" ...".chars()).collect() } else { text }
}
