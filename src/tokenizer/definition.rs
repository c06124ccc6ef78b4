//! What a directory says of its tokenizer: `tokenizer.json`, the files beside it that name more
//! tokens, or the two files of an older byte-level BPE. Checked before the tokenizers crate sees
//! it.
//!
//! Data enters as files from outside and leaves as one JSON object that the crate numbers as the
//! files do: the crate gives tokens that are not in its vocabulary the next free id, whatever the
//! file says.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::gguf;
use crate::input_file::{self, MAX_JSON_BYTES, MAX_TOKENIZER_BYTES};

/// How many times longer the replacements of a normalizer may make a text. Published ones make a
/// space a character of three bytes; a sequence of them can ask for any amount of memory.
const MAX_GROWTH: usize = 256;
/// How tokenizers spell the token that hides another, in the order in which they are looked for.
pub const MASK_SPELLINGS: [&str; 6] = ["<|MASK|>", "<|mask|>", "|<MASK>|", "<|mdm_mask|>", "[MASK]", "<mask>"];
/// Names under which tokenizer_config.json and special_tokens_map.json give special tokens.
pub const SPECIAL_NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// How Qwen2's tokenizer splits a text (its class `Qwen2Tokenizer`).
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A tokenizer as the crate reads it.
#[derive(Debug)]
pub(super) struct Definition {
    /// The object of `tokenizer.json`.
    pub json: Map<String, Value>,
    /// Added tokens by id.
    pub added: BTreeMap<u32, AddedToken>,
    /// Spellings that fill holes between ids. No text has them.
    pub fillers: BTreeSet<u32>,
    /// Ids that the post-processor puts in front of a text.
    pub prefix: Vec<u32>,
}

/// A token outside the model's own vocabulary, or one that is found before the model sees a text.
#[derive(Clone, Debug, PartialEq)]
pub struct AddedToken {
    /// How it is spelled.
    pub content: String,
    /// No text spells it: it marks a beginning, an end, a turn, a hidden position.
    pub special: bool,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
}

impl AddedToken {
    /// From an object, or a string, which is a special token as transformers reads it.
    fn read(value: &Value, special: bool) -> Option<AddedToken> {
        let content = value.as_str().or_else(|| value.get("content")?.as_str())?;
        let flag = |key: &str, default: bool| value.get(key).and_then(Value::as_bool).unwrap_or(default);
        let special = flag("special", special);
        Some(AddedToken {
            content: content.to_owned(),
            special,
            single_word: flag("single_word", false),
            lstrip: flag("lstrip", false),
            rstrip: flag("rstrip", false),
            normalized: flag("normalized", !special),
        })
    }

    /// A special token of this spelling.
    pub(super) fn special(content: &str) -> AddedToken {
        AddedToken::read(&Value::from(content), true).expect("a string")
    }

    /// This token, special.
    pub(super) fn as_special(&self) -> AddedToken {
        AddedToken { special: true, ..self.clone() }
    }

    /// This token in the spelling `content`, found in any text.
    pub(super) fn spelled(&self, content: &str) -> AddedToken {
        AddedToken { content: content.to_owned(), special: false, ..self.clone() }
    }

    pub(super) fn to_crate(&self) -> tokenizers::AddedToken {
        tokenizers::AddedToken::from(self.content.as_str(), self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized)
    }

    fn json(&self, id: u32) -> Value {
        json!({
            "id": id, "content": self.content, "single_word": self.single_word, "lstrip": self.lstrip, "rstrip": self.rstrip,
            "normalized": self.normalized, "special": self.special,
        })
    }
}

/// A spelling that no text has: noncharacters of Unicode around the id.
pub(super) fn filler(id: u32) -> String {
    format!("\u{10fffe}{id} \u{10ffff}")
}

/// Where a model's tokenizer is: in `tokenizer.json`, or in the GGUF file that the model is.
pub fn place(model: &Path) -> Result<PathBuf> {
    Ok(gguf::file_of(model)?.unwrap_or_else(|| model.join("tokenizer.json")))
}

/// Added tokens of `path` and the files beside it, by id.
pub fn added_tokens(path: &Path) -> Result<BTreeMap<u32, AddedToken>> {
    let json = object(path)?;
    let mut added = listed(path, &json)?;
    merge(path, &vocabulary(&json), &mut added)?;
    Ok(added)
}

/// Reads `path` (`tokenizer.json`), or where it is absent the vocabulary files in its directory.
///
/// Errors: [`Error::Tokenizer`] with the file, and what to do where there is none.
pub(super) fn define(path: &Path, vocab_size: usize) -> Result<Definition> {
    let mut json = object(path)?;
    let fail = |what: String| Error::tokenizer(path, what);
    // Of training and of batches. transformers resets the first two before it encodes, and a
    // tokenizer with dropout has no ids of its own.
    json.insert("truncation".into(), Value::Null);
    json.insert("padding".into(), Value::Null);
    if let Some(model) = json.get_mut("model").and_then(Value::as_object_mut)
        && model.contains_key("dropout")
    {
        model.insert("dropout".into(), Value::Null);
    }
    check(&json).map_err(fail)?;
    let mut added = listed(path, &json)?;
    if let Some((id, token)) = added.iter().find(|(id, _)| **id as usize >= vocab_size) {
        return Err(fail(format!("token `{}` has id {id}, the model's vocabulary has {vocab_size}", token.content)));
    }
    merge(path, &vocabulary(&json), &mut added)?;
    added.retain(|id, _| (*id as usize) < vocab_size);
    let fillers = number(&mut json, &added).map_err(fail)?;
    let prefix = json.get("post_processor").map(prefix).unwrap_or_default();
    if let Some(id) = prefix.iter().find(|id| **id as usize >= vocab_size) {
        return Err(fail(format!("the post-processor adds id {id}, the model's vocabulary has {vocab_size}")));
    }
    Ok(Definition { json, added, fillers, prefix })
}

/// The JSON object of `path`, or one made of the vocabulary files beside it; of a GGUF file, what
/// it has in the place of both.
fn object(path: &Path) -> Result<Map<String, Value>> {
    if let Some(file) = gguf::file_of(path)? {
        return Ok(gguf::json(&file, "tokenizer.json")?.unwrap_or_default());
    }
    let wrong = |error: Error| match error {
        Error::Tokenizer { path, what, .. } => Error::tokenizer(&path, format!("not a tokenizer: {what}")),
        other => other,
    };
    match read(path, MAX_TOKENIZER_BYTES).map_err(wrong)? {
        Some(text) => parse(path, &text).map_err(wrong),
        None => byte_level(path),
    }
}

/// The text of a file, if there is one.
fn read(path: &Path, max_bytes: u64) -> Result<Option<String>> {
    input_file::read_optional_text(path, max_bytes).map_err(|e| Error::tokenizer(path, format!("cannot read: {e}")))
}

fn parse(path: &Path, text: &str) -> Result<Map<String, Value>> {
    match input_file::parse_json(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::tokenizer(path, "expected a JSON object")),
        Err(error) => {
            let kind = input_file::looks_like(text.as_bytes()).map_or(String::new(), |kind| format!(": {kind}"));
            Err(Error::tokenizer(path, format!("not JSON{kind}: {error}")))
        }
    }
}

/// A JSON object beside `path`, if there is such a file, or in a GGUF file.
pub(super) fn side(path: &Path, name: &str) -> Result<Option<(PathBuf, Map<String, Value>)>> {
    if let Some(file) = gguf::file_of(path)? {
        return Ok(gguf::json(&file, name)?.map(|map| (file, map)));
    }
    let file = path.with_file_name(name);
    let text = read(&file, MAX_JSON_BYTES)?;
    text.map(|text| parse(&file, &text).map(|map| (file, map))).transpose()
}

/// The key `added_tokens`.
fn listed(path: &Path, json: &Map<String, Value>) -> Result<BTreeMap<u32, AddedToken>> {
    let mut added = BTreeMap::new();
    let list = match json.get("added_tokens") {
        None | Some(Value::Null) => return Ok(added),
        Some(list) => list.as_array().ok_or_else(|| Error::tokenizer(path, "key `added_tokens`: expected a list"))?,
    };
    for value in list {
        let token = AddedToken::read(value, false);
        let id = value.get("id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
        let (Some(token), Some(id)) = (token, id) else {
            return Err(Error::tokenizer(path, format!("key `added_tokens`: expected an id and a content, found {value}")));
        };
        let content = token.content.clone();
        if content.is_empty() {
            continue;
        }
        if let Some(other) = added.insert(id, token).filter(|other| other.content != content) {
            return Err(Error::tokenizer(path, format!("id {id} is that of two added tokens, `{}` and `{content}`", other.content)));
        }
    }
    Ok(added)
}

/// Adds what tokenizer_config.json, special_tokens_map.json and added_tokens.json say of tokens, as
/// transformers does: tokens with their ids, the flags of those that are there, and that named
/// tokens are special. The mask token is special whatever the files say: no text spells it.
fn merge(path: &Path, vocabulary: &BTreeMap<String, u32>, added: &mut BTreeMap<u32, AddedToken>) -> Result<()> {
    let mut more: Vec<(u32, AddedToken)> = Vec::new();
    let mut named = BTreeSet::new();
    let mut name_tokens = |map: &Map<String, Value>| {
        let tokens = SPECIAL_NAMES.iter().filter_map(|name| map.get(*name));
        let lists = ["additional_special_tokens", "extra_special_tokens"].into_iter().filter_map(|name| map.get(name));
        let lists = lists.flat_map(|list| match list {
            Value::Array(list) => list.iter().collect::<Vec<_>>(),
            Value::Object(map) => map.values().collect(),
            _ => Vec::new(),
        });
        named.extend(tokens.chain(lists).filter_map(|token| AddedToken::read(token, true)).map(|token| token.content));
    };
    let mut decoder = false;
    if let Some((file, map)) = side(path, "tokenizer_config.json")? {
        name_tokens(&map);
        if let Some(Value::Object(tokens)) = map.get("added_tokens_decoder") {
            decoder = true;
            for (id, token) in tokens {
                let id = id.parse().ok();
                let (Some(id), Some(token)) = (id, AddedToken::read(token, false)) else {
                    return Err(Error::tokenizer(&file, format!("key `added_tokens_decoder`: expected ids and tokens, found {token}")));
                };
                more.push((id, token));
            }
        }
    }
    if !decoder {
        if let Some((_, map)) = side(path, "special_tokens_map.json")? {
            name_tokens(&map);
        }
        if let Some((file, map)) = side(path, "added_tokens.json")? {
            for (content, id) in map {
                let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
                let id = id.ok_or_else(|| Error::tokenizer(&file, format!("`{content}`: expected a token id")))?;
                let special = named.contains(&content);
                more.push((id, AddedToken::read(&json!({ "content": content, "special": special }), special).expect("has a content")));
            }
        }
    }
    let taken: BTreeMap<u32, &String> = vocabulary.iter().map(|(token, id)| (*id, token)).collect();
    let mut ids: BTreeMap<String, u32> = added.iter().map(|(id, token)| (token.content.clone(), *id)).collect();
    for (id, token) in more {
        // A token that has an id keeps it; only its flags are news.
        let id = ids.get(&token.content).or_else(|| vocabulary.get(&token.content)).copied().unwrap_or(id);
        let free = taken.get(&id).is_none_or(|other| **other == token.content);
        // An id that another token has is none for this one.
        if !token.content.is_empty() && free && added.get(&id).is_none_or(|other| other.content == token.content) {
            ids.insert(token.content.clone(), id);
            added.insert(id, token);
        }
    }
    for content in named.iter().map(String::as_str).chain(MASK_SPELLINGS) {
        match ids.get(content).and_then(|id| added.get_mut(id)) {
            Some(token) => token.special = true,
            None => {
                if let Some(id) = vocabulary.get(content)
                    && !added.contains_key(id)
                {
                    added.insert(*id, AddedToken::special(content));
                }
            }
        }
    }
    Ok(())
}

/// The model's own vocabulary.
fn vocabulary(json: &Map<String, Value>) -> BTreeMap<String, u32> {
    let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
    match json.get("model").and_then(|model| model.get("vocab")) {
        Some(Value::Object(map)) => map.iter().filter_map(|(token, value)| Some((token.clone(), id(value)?))).collect(),
        Some(Value::Array(list)) => {
            list.iter().zip(0u32..).filter_map(|(piece, id)| Some((piece.get(0)?.as_str()?.to_owned(), id))).collect()
        }
        _ => BTreeMap::new(),
    }
}

/// Writes `added` into the object so that the crate gives every token the id that it has here, and
/// returns the ids of the fillers that this takes.
fn number(json: &mut Map<String, Value>, added: &BTreeMap<u32, AddedToken>) -> Result<BTreeSet<u32>, String> {
    let own = vocabulary(json);
    let by_id: BTreeMap<u32, &String> = own.iter().map(|(token, id)| (*id, token)).collect();
    let mut unplaced = Vec::new();
    for (id, token) in added {
        match (own.get(&token.content), by_id.get(id)) {
            (Some(found), _) if found == id => {}
            (Some(found), _) => {
                return Err(format!("token `{}` has id {id} among the added tokens and id {found} in the vocabulary", token.content));
            }
            (None, Some(other)) => {
                return Err(format!("added token `{}` has id {id}, which the vocabulary gives to `{other}`", token.content));
            }
            (None, None) => unplaced.push((*id, token)),
        }
    }
    let mut fillers = BTreeSet::new();
    let mut list: BTreeMap<u32, Value> = added.iter().map(|(id, token)| (*id, token.json(*id))).collect();
    let next = own.len() as u32;
    if unplaced.iter().zip(next..).any(|((id, _), next)| *id != next) {
        // One after the largest id of the vocabulary: below it, holes of the vocabulary are filled.
        let top = by_id.last_key_value().map_or(0, |(id, _)| id + 1);
        if let Some(Value::Object(map)) = json.get_mut("model").and_then(|model| model.get_mut("vocab")) {
            for (id, token) in unplaced.iter().filter(|(id, _)| *id < top) {
                map.insert(token.content.clone(), (*id).into());
            }
            for id in (0..top).filter(|id| !by_id.contains_key(id) && !added.contains_key(id)) {
                map.insert(filler(id), id.into());
                fillers.insert(id);
            }
        }
        let last = unplaced.last().map_or(top, |(id, _)| *id);
        for id in (top..last).filter(|id| !added.contains_key(id)) {
            let token = AddedToken::special(&filler(id));
            list.insert(id, token.json(id));
            fillers.insert(id);
        }
    }
    json.insert("added_tokens".into(), list.into_values().collect());
    Ok(fillers)
}

/// Ids before the text where one sequence is processed.
fn prefix(processor: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match processor.get("type").and_then(Value::as_str) {
        Some("TemplateProcessing") => {
            let mut ids = Vec::new();
            for piece in processor.get("single").and_then(Value::as_array).into_iter().flatten() {
                let Some(name) = piece.get("SpecialToken").and_then(|token| token.get("id")?.as_str()) else { break };
                let token = processor.get("special_tokens").and_then(|tokens| tokens.get(name)?.get("ids")?.as_array());
                ids.extend(token.into_iter().flatten().filter_map(id));
            }
            ids
        }
        Some("BertProcessing" | "RobertaProcessing") => processor.get("cls").and_then(|cls| id(cls.get(1)?)).into_iter().collect(),
        Some("Sequence") => {
            // The last one stands in front.
            let parts = processor.get("processors").and_then(Value::as_array);
            parts.into_iter().flatten().rev().flat_map(prefix).collect()
        }
        _ => Vec::new(),
    }
}

/// Values that make the crate ask for memory that no text needs: an allocation that fails cannot be
/// caught.
fn check(json: &Map<String, Value>) -> Result<(), String> {
    for part in ["normalizer", "pre_tokenizer", "decoder"] {
        if let Some(value) = json.get(part) {
            let growth = growth(value)?;
            if growth > MAX_GROWTH {
                return Err(format!(
                    "key `{part}`: its replacements make a text up to {growth} times longer; expected at most {MAX_GROWTH}"
                ));
            }
        }
    }
    Ok(())
}

/// How many times longer a step makes a text at most, over all of its parts.
fn growth(step: &Value) -> Result<usize, String> {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map_or(0, str::len);
    let own = match step.get("type").and_then(Value::as_str) {
        Some("Replace") => {
            let pattern = step.get("pattern").and_then(|pattern| pattern.get("String"));
            if pattern.is_some_and(|pattern| pattern.as_str() == Some("")) {
                return Err("a step of type Replace: expected a pattern, found an empty one".into());
            }
            text(step.get("content")).div_ceil(text(pattern).max(1)).max(1)
        }
        Some("FixedLength") if step.get("length").and_then(Value::as_u64) == Some(0) => {
            return Err("a step of type FixedLength: expected a length of at least 1, found 0".into());
        }
        Some("Precompiled") => {
            let map = step.get("precompiled_charsmap").and_then(Value::as_str).unwrap_or_default();
            if trie_bytes(map).is_none_or(|bytes| bytes > map.len() as u64) {
                return Err("a step of type Precompiled: expected a map that holds what it says, found a shorter one".into());
            }
            1
        }
        _ => 1,
    };
    let parts = ["normalizers", "pretokenizers", "decoders"].into_iter().filter_map(|key| step.get(key)?.as_array()).flatten();
    parts.map(growth).try_fold(own, |product, factor| Ok(product.saturating_mul(factor?)))
}

/// Bytes of the trie at the beginning of a SentencePiece map in base64: a little-endian u32.
fn trie_bytes(base64: &str) -> Option<u64> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => Some(u64::from(c - b'A')),
        b'a'..=b'z' => Some(u64::from(c - b'a') + 26),
        b'0'..=b'9' => Some(u64::from(c - b'0') + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    // Six digits of six bits: the first 32 bits are the number's bytes in order.
    let bits = base64.as_bytes().get(..6)?.iter().try_fold(0u64, |bits, c| Some(bits << 6 | digit(*c)?))?;
    Some(u64::from(((bits >> 4) as u32).swap_bytes()))
}

/// The tokenizer of a directory with vocab.json and merges.txt, as the class that it names builds
/// it.
fn byte_level(path: &Path) -> Result<Map<String, Value>> {
    let dir = path.parent().unwrap_or(Path::new(""));
    let make = |found: &str| {
        let shown = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        let shown = shown.display();
        let what = format!(
            "no tokenizer.json{found}; make it with: python3 -c \"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('{shown}', trust_remote_code=True).backend_tokenizer.save('{shown}/tokenizer.json')\", or name another with --tokenizer FILE"
        );
        Error::tokenizer(path, what)
    };
    let (vocab, merges) = (path.with_file_name("vocab.json"), path.with_file_name("merges.txt"));
    let (Some(vocab_text), Some(merges_text)) = (read(&vocab, MAX_TOKENIZER_BYTES)?, read(&merges, MAX_TOKENIZER_BYTES)?) else {
        let names = ["tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "tiktoken.model", "tekken.json"];
        return Err(match names.into_iter().find(|name| path.with_file_name(name).exists()) {
            Some(name) => make(&format!(", only {name}")),
            None => Error::tokenizer(
                path,
                "no tokenizer: expected tokenizer.json, or vocab.json and merges.txt, in the model directory (BD3-LM and MDLM checkpoints use the GPT-2 one), or --tokenizer FILE",
            ),
        });
    };
    let vocab = parse(&vocab, &vocab_text)?;
    let lines = merges_text.lines().filter(|line| !line.starts_with("#version") && !line.trim().is_empty());
    let merges: Vec<Value> = lines.map(Value::from).collect();
    let text = |map: &Map<String, Value>, key: &str| map.get(key).and_then(Value::as_str).map(str::to_owned);
    let config = side(path, "tokenizer_config.json")?.map(|(_, map)| map).unwrap_or_default();
    let class = text(&config, "tokenizer_class");
    let class = match class {
        Some(class) => class,
        None => side(path, "config.json")?.and_then(|(_, map)| text(&map, "model_type")).unwrap_or_default(),
    };
    let space = config.get("add_prefix_space").and_then(Value::as_bool).unwrap_or(false);
    let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": true, "use_regex": regex});
    // The classes of transformers, and the model types of directories that name none.
    let (normalizer, pre_tokenizer) = match class.trim_end_matches("Fast") {
        "Qwen2Tokenizer" | "DreamTokenizer" | "Dream" | "qwen2" | "qwen2_moe" | "qwen3" | "qwen3_moe" | "sdar" | "sdar_moe" | "rnd1" => {
            let split = json!({"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": false});
            (json!({"type": "NFC"}), json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]}))
        }
        "GPT2Tokenizer" | "gpt2" | "bd3lm" | "mdlm" => (Value::Null, bytes(true)),
        "" => return Err(make(", and vocab.json and merges.txt belong to no class that the directory names")),
        other => return Err(make(&format!(", and `{other}` reads vocab.json and merges.txt in a way of its own"))),
    };
    let object = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": bytes(true),
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges},
    });
    let Value::Object(object) = object else { unreachable!("an object is written above") };
    Ok(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_of_a_map_are_its_size() {
        assert_eq!(trie_bytes("AAAA"), None);
        assert_eq!(trie_bytes("AAQAAAAA"), Some(1024));
        assert_eq!(trie_bytes("/////////////w=="), Some(u64::from(u32::MAX)));
        assert_eq!(trie_bytes("ALQCAACEAAA"), Some(0x2b400));
    }

    #[test]
    fn post_processors_say_what_stands_first() {
        let template = json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}, "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}});
        let bytes = json!({"type": "ByteLevel"});
        assert_eq!(prefix(&template), [1]);
        assert_eq!(prefix(&json!({"type": "Sequence", "processors": [bytes, template]})), [1]);
        assert_eq!(prefix(&json!({"type": "BertProcessing", "sep": ["[SEP]", 102], "cls": ["[CLS]", 101]})), [101]);
        assert!(prefix(&bytes).is_empty());
        assert!(prefix(&Value::Null).is_empty());
    }

    #[test]
    fn growth_multiplies_over_a_sequence() {
        let double = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        let sequence = |n| json!({"type": "Sequence", "normalizers": vec![double.clone(); n]});
        assert_eq!(growth(&sequence(3)), Ok(8));
        assert_eq!(growth(&json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})), Ok(3));
        assert!(growth(&sequence(100)).is_ok_and(|growth| growth > MAX_GROWTH));
        assert!(growth(&json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"})).is_err());
    }
}
