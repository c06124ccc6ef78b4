//! Chat templates: what a checkpoint makes of a conversation before it is tokenised.
//!
//! A template is the Jinja text that the checkpoint ships, rendered as transformers renders it
//! (`apply_chat_template`). A template is a program from outside: its steps and the bytes that it
//! makes are bounded. What users wrote stays text: special tokens of the template are special, the
//! same letters inside a message are not.
#![forbid(unsafe_code)]

mod conversation;
mod date;
mod environment;
mod format;
mod json;
mod math;
mod python;
mod source;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use minijinja::{Environment, UndefinedBehavior};

pub use self::conversation::{Conversation, Message};
use self::python::Budget;
use crate::error::{Error, Result};
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

/// Ranges of the characters of a text that are replaced, given the spellings of special tokens.
type Hide = fn(&str, &[&str]) -> Vec<Range<usize>>;

impl ChatTemplate {
    /// Reads the templates of a model directory: `chat_template.jinja` and
    /// `chat_templates/*.jinja`, or the key `chat_template` of `tokenizer_config.json` (a string,
    /// or a list of `{name, template}`). Errors name the files that were looked at.
    pub fn load(dir: &Path) -> Result<ChatTemplate> {
        let config_path = dir.join("tokenizer_config.json");
        let object = |path: &Path| -> Result<serde_json::Value> {
            let Some(text) = read(path)? else { return Ok(serde_json::Value::Null) };
            serde_json::from_str(&text).map_err(|e| Error::tokenizer(path, format!("not JSON: {e}")))
        };
        let config = object(&config_path)?;
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
                    let what = "no chat template: expected chat_template.jinja, or the key chat_template in tokenizer_config.json; a base model has none";
                    return Err(Error::tokenizer(dir, what));
                }
                Some(other) => return Err(wrong(format!("expected a string or a list, found {other}"))),
            }
        }
        let template = ChatTemplate { templates, tokens };
        if let Some((source, path)) = template.templates.get("default") {
            environment(source, 0).map_err(|e| failure(path, &e))?;
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
    /// [`Error::Request`] for one that the model does not have.
    pub fn render_conversation(&self, conversation: &Conversation) -> Result<String> {
        let (source, path) = self.choose(conversation)?;
        self.render_with(source, conversation).map_err(|e| failure(path, &e))
    }

    fn render_with(&self, source: &str, conversation: &Conversation) -> std::result::Result<String, String> {
        let env = environment(source, conversation.num_messages())?;
        let template = env.get_template("chat").map_err(|e| shown(&e))?;
        // Minijinja panics on some values.
        let rendered = caught(|| template.render(conversation.context(&self.tokens)))
            .map_err(|panic| format!("fails: the template library failed: {panic}"))?;
        rendered.map_err(|e| format!("fails: {}", shown(&e)))
    }

    /// Ids of the conversation of [`ChatTemplate::encode_conversation`].
    pub fn encode(&self, messages: &[Message], tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        self.encode_conversation(&Conversation::new(messages), tokenizer)
    }

    /// Ids of the conversation. Special tokens that the template writes are those tokens; what the
    /// conversation holds is text, even where it spells one, alone or with what stands beside it.
    pub fn encode_conversation(&self, conversation: &Conversation, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let (source, path) = self.choose(conversation)?;
        let fail = |e: String| failure(path, &e);
        let text = self.render_with(source, conversation).map_err(fail)?;
        let specials: Vec<(u32, &str)> = tokenizer.specials().map(|(id, token)| (id, token.content.as_str())).collect();
        let spelled: Vec<&str> = specials.iter().map(|(_, content)| *content).collect();
        let touches = |text: &str| spelled.iter().any(|special| text.contains(special)) || fragment(text, &spelled);
        if !conversation.any_text(&touches) {
            return tokenizer.encode_with_special(&text);
        }
        // Rendered again with characters in place of the conversation's own: what is left of them
        // afterwards shows where it came from. A template that looks into what users wrote may take
        // another way then, so the result is compared; each way hides less.
        let taken: BTreeSet<char> = source.chars().chain(text.chars()).chain(conversation.chars()).collect();
        let mut free = (0xf_0000..0xf_fffe).chain(0x10_0000..0x10_fffe).filter_map(char::from_u32).filter(|c| !taken.contains(c));
        let ways: [Hide; 3] = [all_visible, only_special, inside_special];
        for hide in ways {
            let mut disguise = Disguise::default();
            let hidden = conversation.map_text(&mut |text: &str, is_role: bool| {
                let ranges = if is_role { only_special(text, &spelled) } else { hide(text, &spelled) };
                disguise.apply(text, &ranges, &mut free)
            });
            let Ok(rendered) = self.render_with(source, &hidden) else { continue };
            let (plain, spans) = disguise.reveal(&rendered, &specials);
            if plain == text {
                return tokenizer.encode_spans(&text, &spans);
            }
        }
        let what = "a message spells a special token, and the template changes the message: it cannot be told apart from the template";
        Err(Error::tokenizer(path, what))
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
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
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

/// The template `chat` under transformers' rules.
fn environment(source: &str, num_messages: usize) -> std::result::Result<Environment<'static>, String> {
    let rewritten = source::rewrite(source).map_err(|e| format!("does not parse: {e}"))?;
    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_fuel(Some(STEPS + STEPS_PER_MESSAGE * num_messages as u64));
    environment::install(&mut env, &Budget::new(MAX_MADE), rewritten.texts);
    env.add_template_owned("chat", rewritten.source).map_err(|e| format!("does not parse: {}", shown(&e)))?;
    Ok(env)
}

/// Whether a text begins, ends or goes on with a part of a special token, which what stands beside
/// it may complete.
fn fragment(text: &str, specials: &[&str]) -> bool {
    !edges(text, specials).is_empty()
}

/// The parts of special tokens at both ends of a text; all of it where it is inside of one.
fn edges(text: &str, specials: &[&str]) -> Vec<Range<usize>> {
    if !text.is_empty() && specials.iter().any(|special| special.contains(text)) {
        return std::iter::once(0..text.len()).collect();
    }
    let ends = |special: &str| {
        let cuts = special.char_indices().map(|(at, _)| at).skip(1);
        let head = cuts.clone().filter(|at| text.starts_with(&special[*at..])).map(|at| special.len() - at).max();
        let tail = cuts.filter(|at| text.ends_with(&special[..*at])).max();
        (head.unwrap_or(0), tail.unwrap_or(0))
    };
    let (head, tail) = specials.iter().map(|special| ends(special)).fold((0, 0), |a, b| (a.0.max(b.0), a.1.max(b.1)));
    let mut ranges = Vec::new();
    if head > 0 {
        ranges.push(0..head);
    }
    if tail > 0 {
        ranges.push((text.len() - tail).max(head)..text.len());
    }
    ranges
}

/// Everything that is seen, except what is written differently in JSON.
fn all_visible(text: &str, _: &[&str]) -> Vec<Range<usize>> {
    let is_hidden = |c: &char| !source::is_space(*c) && !c.is_control() && !matches!(c, '"' | '\\' | '\'');
    text.char_indices().filter(|(_, c)| is_hidden(c)).map(|(at, c)| at..at + c.len_utf8()).collect()
}

/// Special tokens that the text spells, and their parts at its ends.
fn only_special(text: &str, specials: &[&str]) -> Vec<Range<usize>> {
    let mut hidden: BTreeSet<usize> = edges(text, specials).into_iter().flatten().collect();
    for special in specials.iter().filter(|special| !special.is_empty()) {
        // Occurrences may overlap.
        let mut from = 0;
        while let Some(at) = text[from..].find(special).map(|at| from + at) {
            hidden.extend(at..at + special.len());
            from = at + text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.char_indices().filter(|(at, _)| hidden.contains(at)).map(|(at, c)| at..at + c.len_utf8()).collect()
}

/// The same without the first character of each and, of longer ones, the last: templates look at
/// how a message begins and ends.
fn inside_special(text: &str, specials: &[&str]) -> Vec<Range<usize>> {
    let mut runs: Vec<Vec<Range<usize>>> = Vec::new();
    for range in only_special(text, specials) {
        match runs.last_mut().filter(|run| run.last().is_some_and(|last| last.end == range.start)) {
            Some(run) => run.push(range),
            None => runs.push(vec![range]),
        }
    }
    let inside = |run: Vec<Range<usize>>| match run.len() {
        1 => run,
        2 => run[1..].to_vec(),
        len => run[1..len - 1].to_vec(),
    };
    runs.into_iter().flat_map(inside).collect()
}

/// Characters in place of others, each its own.
#[derive(Default)]
struct Disguise {
    of: BTreeMap<char, char>,
    back: BTreeMap<char, char>,
}

impl Disguise {
    /// The text with the characters of `ranges` replaced; where no free character is left, they
    /// stay.
    fn apply(&mut self, text: &str, ranges: &[Range<usize>], free: &mut impl Iterator<Item = char>) -> String {
        let mut hidden = ranges.iter().map(|range| range.start).peekable();
        let mut replace = |c: char| {
            if let Some(other) = self.of.get(&c) {
                return *other;
            }
            let Some(other) = free.next() else { return c };
            self.of.insert(c, other);
            self.back.insert(other, c);
            other
        };
        text.char_indices().map(|(at, c)| if hidden.next_if_eq(&at).is_some() { replace(c) } else { c }).collect()
    }

    /// The text with every character back, and where special tokens stand that no replaced
    /// character is part of.
    fn reveal(&self, text: &str, specials: &[(u32, &str)]) -> (String, Vec<(Range<usize>, u32)>) {
        let mut by_first: BTreeMap<char, Vec<(u32, &str)>> = BTreeMap::new();
        for (id, special) in specials {
            if let Some(first) = special.chars().next() {
                by_first.entry(first).or_default().push((*id, special));
            }
        }
        let (mut plain, mut spans) = (String::with_capacity(text.len()), Vec::new());
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let here = by_first.get(&c).into_iter().flatten().filter(|(_, special)| rest.starts_with(special));
            // The longest of those that begin here, as the tokenizer finds them.
            if let Some((id, special)) = here.max_by_key(|(_, special)| special.len()) {
                spans.push((plain.len()..plain.len() + special.len(), *id));
                plain.push_str(special);
                rest = &rest[special.len()..];
            } else {
                plain.push(self.back.get(&c).copied().unwrap_or(c));
                rest = &rest[c.len_utf8()..];
            }
        }
        (plain, spans)
    }
}
