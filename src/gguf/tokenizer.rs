//! A file's tokenizer as the objects of `tokenizer.json` and `tokenizer_config.json`.
//!
//! `tokenizer.ggml.model` says which of two kinds it is: `gpt2`, byte-level pairs in the order of
//! their merges, or `llama`, pieces of SentencePiece with scores. The second has no merges: the
//! piece of the best score is made first, whichever two pieces make it, and that order is written
//! as merges here, as the converters of Hugging Face do.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::gguf::container::Container;
use crate::gguf::model::special_id;
use crate::gguf::pre_tokenizer::PreTokenizer;

/// Bytes of a piece that merges are looked for in. Pieces of published vocabularies have up to 48.
const MAX_PIECE_BYTES: usize = 512;
/// Tokens at most.
const MAX_TOKENS: usize = 1 << 22;

type Checked<T> = Result<T, String>;

/// What `tokenizer.ggml.token_type` says of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    /// No text spells it.
    Control,
    /// Found in any text before it is cut.
    UserDefined,
    /// A row of the embedding without a token.
    Unused,
    Byte,
}

/// The tokens of a file.
struct Vocabulary<'a> {
    texts: Vec<&'a str>,
    kinds: Vec<Kind>,
    metadata: &'a Container,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a Container) -> Checked<Vocabulary<'a>> {
        let texts = metadata.texts("tokenizer.ggml.tokens")?.ok_or("metadata key `tokenizer.ggml.tokens` is missing")?;
        if texts.len() > MAX_TOKENS {
            return Err(format!("metadata key `tokenizer.ggml.tokens`: {} tokens, at most {MAX_TOKENS} are read", texts.len()));
        }
        let kinds = match metadata.wholes("tokenizer.ggml.token_type")? {
            None => vec![Kind::Normal; texts.len()],
            Some(codes) if codes.len() == texts.len() => codes.into_iter().map(kind).collect::<Checked<_>>()?,
            Some(codes) => {
                let what = format!("expected {} types, one of each token, found {}", texts.len(), codes.len());
                return Err(format!("metadata key `tokenizer.ggml.token_type`: {what}"));
            }
        };
        Ok(Vocabulary { texts, kinds, metadata })
    }

    /// Ids of the tokens that the file has, with their texts and kinds.
    fn tokens(&self) -> impl Iterator<Item = (u32, &'a str, Kind)> {
        let all = (0..).zip(self.texts.iter().copied()).zip(self.kinds.iter().copied());
        // The converter calls rows without a token so.
        all.map(|((id, text), kind)| (id, text, kind)).filter(|(id, text, kind)| *kind != Kind::Unused || *text != format!("[PAD{id}]"))
    }

    /// The key `vocab`, and the id of each text.
    fn ids(&self) -> Checked<BTreeMap<&'a str, u32>> {
        let mut ids = BTreeMap::new();
        for (id, text, _) in self.tokens() {
            if let Some(other) = ids.insert(text, id) {
                return Err(format!("metadata key `tokenizer.ggml.tokens`: ids {other} and {id} are both `{text}`"));
            }
        }
        Ok(ids)
    }

    /// The key `added_tokens`.
    fn added(&self) -> Vec<Value> {
        let added = self.tokens().filter(|(_, text, kind)| is_added(*kind) && !text.is_empty());
        added
            .map(|(id, text, kind)| {
                json!({
                    "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                    "special": kind != Kind::UserDefined,
                })
            })
            .collect()
    }

    /// The text of a special token that the metadata name.
    fn special(&self, name: &str) -> Checked<Option<(u32, &'a str)>> {
        let id = special_id(self.metadata, name)?;
        Ok(id.and_then(|id| Some((id, *self.texts.get(id as usize)?))).filter(|(_, text)| !text.is_empty()))
    }

    /// The key `post_processor`: BOS in front of a text, where there is one.
    fn post_processor(&self, add_bos: bool) -> Checked<Value> {
        let add_bos = self.metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos);
        let Some((id, text)) = self.special("bos")?.filter(|_| add_bos) else { return Ok(Value::Null) };
        let begin = json!({"SpecialToken": {"id": text, "type_id": 0}});
        let [first, second] = [("A", 0), ("B", 1)].map(|(name, kind)| json!({"Sequence": {"id": name, "type_id": kind}}));
        Ok(json!({
            "type": "TemplateProcessing", "single": [begin, first], "pair": [begin, first, begin, second],
            "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]}},
        }))
    }
}

fn kind(code: i64) -> Checked<Kind> {
    Ok(match code {
        1 => Kind::Normal,
        2 => Kind::Unknown,
        3 => Kind::Control,
        4 => Kind::UserDefined,
        // 0 is the type of nothing, which some files have for rows without a token.
        0 | 5 => Kind::Unused,
        6 => Kind::Byte,
        _ => return Err(format!("metadata key `tokenizer.ggml.token_type`: type {code} is not known")),
    })
}

fn is_added(kind: Kind) -> bool {
    matches!(kind, Kind::Control | Kind::UserDefined | Kind::Unknown)
}

/// The object of `tokenizer.json`.
pub fn tokenizer(metadata: &Container) -> Checked<Map<String, Value>> {
    let model = metadata.text("tokenizer.ggml.model")?.ok_or("no tokenizer: metadata key `tokenizer.ggml.model` is missing")?;
    let object = match model {
        "gpt2" => byte_level(metadata)?,
        "llama" => sentence_piece(metadata)?,
        "none" | "no_vocab" => {
            return Err("the file has no tokenizer (`tokenizer.ggml.model` is none): name one with --tokenizer FILE".into());
        }
        other => {
            return Err(format!("metadata key `tokenizer.ggml.model`: `{other}` is not supported; supported: gpt2, llama"));
        }
    };
    let Value::Object(object) = object else { unreachable!("objects are written below") };
    Ok(object)
}

/// Pairs of bytes, in the order of their merges.
fn byte_level(metadata: &Container) -> Checked<Value> {
    // Files of before the key are cut as llama.cpp cuts them.
    let pre_tokenizer = PreTokenizer::named(metadata.text("tokenizer.ggml.pre")?.unwrap_or("default"))?;
    let vocabulary = Vocabulary::read(metadata)?;
    let merges = metadata.texts("tokenizer.ggml.merges")?.ok_or("metadata key `tokenizer.ggml.merges` is missing")?;
    let split = |merge: &&str| {
        // The first may be a space itself.
        let first = merge.chars().next().map_or(0, char::len_utf8);
        let at = merge[first..].find(' ').map(|at| first + at);
        let at = at.ok_or_else(|| format!("metadata key `tokenizer.ggml.merges`: expected two parts, found `{merge}`"))?;
        Ok(json!([merge[..at], merge[at + 1..]]))
    };
    let merges = merges.iter().map(split).collect::<Checked<Vec<Value>>>()?;
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": vocabulary.added(), "normalizer": null,
        "pre_tokenizer": pre_tokenizer.json(), "post_processor": vocabulary.post_processor(pre_tokenizer.add_bos)?, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "byte_fallback": false, "ignore_merges": pre_tokenizer.ignore_merges,
                  "vocab": vocabulary.ids()?, "merges": merges},
    }))
}

/// Pieces of SentencePiece, the best score first.
fn sentence_piece(metadata: &Container) -> Checked<Value> {
    const SPACE: &str = "▁";
    let vocabulary = Vocabulary::read(metadata)?;
    let ids = vocabulary.ids()?;
    let scores = metadata.numbers("tokenizer.ggml.scores")?.ok_or("metadata key `tokenizer.ggml.scores` is missing")?;
    if scores.len() != vocabulary.texts.len() {
        let what = format!("expected {} scores, one of each token, found {}", vocabulary.texts.len(), scores.len());
        return Err(format!("metadata key `tokenizer.ggml.scores`: {what}"));
    }
    // What is special is never pieced together.
    let pieces: BTreeMap<&str, u32> =
        ids.iter().filter(|(_, id)| vocabulary.kinds[**id as usize] == Kind::Normal).map(|(t, i)| (*t, *i)).collect();
    let mut merges = Vec::new();
    for (piece, id) in pieces.iter().filter(|(piece, _)| piece.len() <= MAX_PIECE_BYTES) {
        for (at, _) in piece.char_indices().skip(1) {
            if let (Some(left), Some(right)) = (pieces.get(&piece[..at]), pieces.get(&piece[at..])) {
                merges.push((scores[*id as usize], *id, *left, *right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    let text = |id: u32| vocabulary.texts[id as usize];
    let merges: Vec<Value> = merges.into_iter().map(|(_, _, left, right)| json!([text(left), text(right)])).collect();
    let prefix = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    let normalizer =
        if prefix { json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}) } else { spaces };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = match special_id(metadata, "unknown")? {
        Some(id) => vocabulary.texts.get(id as usize).copied(),
        None => vocabulary.tokens().find(|(_, _, kind)| *kind == Kind::Unknown).map(|(_, text, _)| text),
    };
    let has_bytes = vocabulary.kinds.contains(&Kind::Byte);
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": vocabulary.added(), "normalizer": normalizer,
        "pre_tokenizer": null, "post_processor": vocabulary.post_processor(true)?, "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": true, "byte_fallback": has_bytes, "ignore_merges": false, "vocab": ids, "merges": merges},
    }))
}

/// The object of `tokenizer_config.json`: names of special tokens, tokens beside the model's own,
/// chat templates. A file without a tokenizer has the templates alone.
pub fn tokenizer_config(metadata: &Container) -> Checked<Map<String, Value>> {
    let mut config = Map::new();
    if metadata.has("tokenizer.ggml.tokens") {
        let vocabulary = Vocabulary::read(metadata)?;
        let names = [
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("sep_token", "seperator"),
            ("pad_token", "padding"),
            ("cls_token", "cls"),
            ("mask_token", "mask"),
        ];
        for (key, name) in names {
            // A token that a text may spell is named by its id alone.
            let is_typed = metadata.has("tokenizer.ggml.token_type");
            let named = vocabulary.special(name)?.filter(|(id, _)| !is_typed || is_added(vocabulary.kinds[*id as usize]));
            if let Some((_, text)) = named {
                config.insert(key.into(), text.into());
            }
        }
        let added = vocabulary.added().into_iter().map(|token| (token["id"].to_string(), token));
        config.insert("added_tokens_decoder".into(), Value::Object(added.collect()));
    }
    let default = metadata.text("tokenizer.chat_template")?;
    let mut named = Vec::new();
    for name in metadata.texts("tokenizer.chat_templates")?.unwrap_or_default() {
        if let Some(template) = metadata.text(&format!("tokenizer.chat_template.{name}"))? {
            named.push(json!({"name": name, "template": template}));
        }
    }
    let template = match (default, named.is_empty()) {
        (None, true) => return Ok(config),
        (Some(template), true) => template.into(),
        (default, false) => {
            named.extend(default.map(|template| json!({"name": "default", "template": template})));
            named.into()
        }
    };
    config.insert("chat_template".into(), template);
    Ok(config)
}
