//! Text to ids and back: `tokenizer.json` as published, with user text always read as text.
//!
//! Special tokens spelled out in a prompt are encoded letter by letter: a literal `<|mask|>` in
//! user text is text, never a MASK. Every call of the tokenizers crate goes through one guarded
//! door.
#![forbid(unsafe_code)]

mod definition;
mod guard;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::Value;

use self::definition::filler;
pub use self::definition::{AddedToken, MASK_SPELLINGS, SPECIAL_NAMES, added_tokens, place};
pub(crate) use self::guard::caught;
use self::guard::guarded;
use crate::error::{Error, Result};
use crate::gguf;

/// Characters that stand for special tokens inside a text that is encoded in one piece: those of
/// the last private plane.
const MARKS: Range<u32> = 0x10_0000..0x10_fffd;

/// How many tokens before others decide how those are spelled: more than any character has bytes.
const CONTEXT: usize = 64;
/// Tokens that are decoded together where the text of each is asked for.
const PIECES_WINDOW: usize = 8;

/// Bytes that both texts begin with, whole characters.
fn common(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum()
}

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    /// Reads special tokens as text.
    inner: tokenizers::Tokenizer,
    /// The same, reading special tokens where they are spelled: for templates, not for what users
    /// write.
    special: OnceLock<tokenizers::Tokenizer>,
    /// The same without special tokens, even where the model's own vocabulary has them.
    plain: OnceLock<Result<tokenizers::Tokenizer>>,
    /// `plain` with a character of [`MARKS`] for each special token, in the order of their ids.
    marked: OnceLock<Result<tokenizers::Tokenizer>>,
    path: PathBuf,
    /// Added tokens by id.
    added: BTreeMap<u32, AddedToken>,
    /// Ids that have no token in the file.
    fillers: BTreeSet<u32>,
    prefix: Vec<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and what the files beside it add, and checks it against the model's
    /// vocabulary. Where there is none, `vocab.json` and `merges.txt` in its directory are read. A
    /// GGUF file has all of it inside.
    ///
    /// Errors: [`Error::Tokenizer`] with the file and what it lacks.
    pub fn load(path: &Path, vocab_size: usize) -> Result<Tokenizer> {
        let definition::Definition { json, added, fillers, prefix } = definition::define(path, vocab_size)?;
        let mut inner = guarded(path, "not a tokenizer", || Ok(serde_json::from_value::<tokenizers::Tokenizer>(Value::Object(json))?))?;
        inner.set_encode_special_tokens(true);
        if let Some((token, id)) = inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id)
            && id as usize >= vocab_size
        {
            return Err(Error::tokenizer(path, format!("token `{token}` has id {id}, the model's vocabulary has {vocab_size}")));
        }
        for (id, token) in &added {
            let found = inner.token_to_id(&token.content);
            if found != Some(*id) {
                let found = found.map_or("none".to_owned(), |id| id.to_string());
                return Err(Error::tokenizer(
                    path,
                    format!("token `{}` has id {id} in the file, and {found} can be given it", token.content),
                ));
            }
        }
        let unset = OnceLock::new;
        let tokenizer = Tokenizer {
            inner,
            special: unset(),
            plain: OnceLock::new(),
            marked: OnceLock::new(),
            path: path.to_path_buf(),
            added,
            fillers,
            prefix,
        };
        tokenizer.probe()?;
        Ok(tokenizer)
    }

    /// The tokenizer of a model directory or GGUF file. `mask_id`: the id that hides a token, see
    /// [`Tokenizer::masked_by`].
    pub fn of(dir: &Path, vocab_size: usize, mask_id: Option<u32>) -> Result<Tokenizer> {
        Tokenizer::load(&place(dir)?, vocab_size)?.masked_by(mask_id)
    }

    /// Whether a model has a tokenizer of its own.
    pub fn is_in(dir: &Path) -> bool {
        gguf::has_tokenizer(dir) || ["tokenizer.json", "vocab.json"].iter().any(|name| dir.join(name).exists())
    }

    /// Whatever the file says of the token `id`, no text spells it: for the id that hides a token.
    pub fn masked_by(mut self, id: Option<u32>) -> Result<Tokenizer> {
        let Some((id, content)) = id.and_then(|id| Some((id, self.inner.id_to_token(id)?))) else { return Ok(self) };
        if self.fillers.contains(&id) || self.added.get(&id).is_some_and(|token| token.special) {
            return Ok(self);
        }
        let token = match self.added.get(&id) {
            Some(token) => token.as_special(),
            None => AddedToken::special(&content),
        };
        let inner = &mut self.inner;
        guarded(&self.path, "not a tokenizer", || inner.add_special_tokens([token.to_crate()]).map(|_| ()))?;
        self.added.insert(id, token);
        Ok(self)
    }

    /// Tries what every request needs, so that a file whose steps fail on any text is an error of
    /// loading.
    fn probe(&self) -> Result<()> {
        self.encode("A b\n")?;
        let mut ids: Vec<u32> = self.inner.get_vocab(false).into_values().filter(|id| !self.fillers.contains(id)).collect();
        ids.sort_unstable();
        // Steps that fail on a token fail on short ones.
        let short = ids.iter().filter(|id| self.inner.id_to_token(**id).is_some_and(|token| token.len() <= 3));
        for ids in short.map(|id| vec![*id]).chain([Vec::new(), ids.iter().take(512).copied().collect()]) {
            self.try_decode(&ids, true)?;
        }
        Ok(())
    }

    fn encode_by(&self, tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>> {
        guarded(&self.path, "cannot encode the text", || Ok(tokenizer.encode_fast(text, false)?.get_ids().to_vec()))
    }

    /// Ids of `text`, nothing added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        // The vocabulary of some models has the special tokens as words.
        if self.spells_special(text) { self.encode_by(self.plain()?, text) } else { self.encode_by(&self.inner, text) }
    }

    /// Ids of `before` and `text` as one text, nothing added, and how many of them stand before the
    /// first that has a character of `text`: a token may begin in the one and end in the other.
    pub fn encode_after(&self, before: &str, text: &str) -> Result<(Vec<u32>, usize)> {
        let whole = format!("{before}{text}");
        let tokenizer = if self.spells_special(&whole) { self.plain()? } else { &self.inner };
        guarded(&self.path, "cannot encode the text", || {
            let encoding = tokenizer.encode(whole.as_str(), false)?;
            let first = encoding.get_offsets().iter().position(|(_, end)| *end > before.len());
            Ok((encoding.get_ids().to_vec(), first.unwrap_or(encoding.len())))
        })
    }

    /// Ids of `text` in which spelled special tokens are those tokens; nothing added. Not for text
    /// from outside.
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>> {
        let special = self.special.get_or_init(|| {
            let mut special = self.inner.clone();
            special.set_encode_special_tokens(false);
            special
        });
        self.encode_by(special, text)
    }

    /// Ids of `text` in which the bytes of each span are the special token of that id, whatever
    /// they spell, and all else is text. Spans ascend and do not touch a character twice.
    ///
    /// Errors: an id that is no special token, and those of [`Tokenizer::encode`].
    pub fn encode_spans(&self, text: &str, spans: &[(Range<usize>, u32)]) -> Result<Vec<u32>> {
        let specials: Vec<u32> = self.specials().map(|(id, _)| id).collect();
        let count = specials.len() as u32;
        // Characters that the text has itself mean themselves.
        let bases = (0..MARKS.len() as u32 / count.max(1)).map(|i| MARKS.start + i * count);
        let free = |base: &u32| !text.chars().any(|c| (*base..base + count).contains(&u32::from(c)));
        let base = bases.into_iter().find(free).ok_or_else(|| Error::tokenizer(&self.path, "the text has every private character"))?;
        let mark = |index: usize| char::from_u32(base + index as u32).expect("a private character");
        let mut marked = String::with_capacity(text.len());
        let mut rest = 0;
        for (span, id) in spans {
            let index = specials.binary_search(id).map_err(|_| Error::tokenizer(&self.path, format!("id {id} is no special token")))?;
            marked.push_str(&text[rest..span.start]);
            marked.push(mark(index));
            rest = span.end;
        }
        marked.push_str(&text[rest..]);
        let build = || {
            let mut tokenizer = self.plain()?.clone();
            let tokens: Vec<_> = self.specials().enumerate().map(|(i, (_, token))| token.spelled(&mark(i).to_string())).collect();
            guarded(&self.path, "not a tokenizer", || tokenizer.add_tokens(tokens.iter().map(AddedToken::to_crate)).map(|_| ()))?;
            Ok(tokenizer)
        };
        let built;
        let tokenizer = if base == MARKS.start {
            self.marked.get_or_init(build).as_ref().map_err(Clone::clone)?
        } else {
            built = build()?;
            &built
        };
        let first = tokenizer.token_to_id(&mark(0).to_string());
        let ids = self.encode_by(tokenizer, &marked)?;
        // The marks were added last, so their ids follow each other.
        let index = |id: u32| first.and_then(|first| id.checked_sub(first)).map(|index| index as usize);
        Ok(ids.into_iter().map(|id| index(id).and_then(|index| specials.get(index)).copied().unwrap_or(id)).collect())
    }

    /// The tokenizer without special tokens.
    fn plain(&self) -> Result<&tokenizers::Tokenizer> {
        let plain = self.plain.get_or_init(|| {
            guarded(&self.path, "not a tokenizer", || {
                let mut json = serde_json::to_value(&self.inner)?;
                let special = |content: &str| self.added.values().any(|token| token.special && token.content == content);
                // What spells a special token is renamed, so that the others keep their ids.
                for token in json.get_mut("added_tokens").and_then(Value::as_array_mut).into_iter().flatten() {
                    if token["special"] == Value::Bool(true) {
                        token["content"] = filler(token["id"].as_u64().unwrap_or_default() as u32).into();
                    }
                }
                match json.get_mut("model").and_then(|model| model.get_mut("vocab")) {
                    Some(Value::Object(map)) => {
                        let names: Vec<String> = map.keys().filter(|name| special(name)).cloned().collect();
                        for name in names {
                            let id = map.remove(&name).unwrap_or_default();
                            map.insert(filler(id.as_u64().unwrap_or_default() as u32), id);
                        }
                    }
                    Some(Value::Array(list)) => {
                        for (piece, id) in list.iter_mut().zip(0u32..) {
                            if piece.get(0).and_then(Value::as_str).is_some_and(special) {
                                piece[0] = filler(id).into();
                            }
                        }
                    }
                    _ => {}
                }
                // The model names the token of characters that it does not know.
                if let Some(unknown) = json.pointer("/model/unk_token").and_then(Value::as_str).map(str::to_owned)
                    && special(&unknown)
                    && let Some(id) = self.inner.token_to_id(&unknown)
                {
                    json["model"]["unk_token"] = filler(id).into();
                }
                Ok(serde_json::from_value::<tokenizers::Tokenizer>(json)?)
            })
        });
        plain.as_ref().map_err(Clone::clone)
    }

    /// Special tokens by id, the mask token included.
    pub fn specials(&self) -> impl Iterator<Item = (u32, &AddedToken)> {
        self.added.iter().filter(|(_, token)| token.special).map(|(id, token)| (*id, token))
    }

    /// Whether `text` spells a special token out.
    pub fn spells_special(&self, text: &str) -> bool {
        self.specials().any(|(_, token)| text.contains(&token.content))
    }

    /// Ids of each text, nothing added. Texts are encoded side by side, as many as the machine has
    /// cores.
    pub fn encode_each(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(texts.len()).max(1);
        let part = |texts: &[&str]| texts.iter().map(|text| self.encode(text)).collect::<Result<Vec<_>>>();
        let parts: Result<Vec<Vec<Vec<u32>>>> = std::thread::scope(|scope| {
            let parts = texts.chunks(texts.len().div_ceil(threads).max(1)).map(|texts| scope.spawn(move || part(texts)));
            let parts: Vec<_> = parts.collect();
            parts.into_iter().map(|part| part.join().expect("guarded")).collect()
        });
        Ok(parts?.concat())
    }

    /// Ids that the post-processor of `tokenizer.json` puts in front of a text.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// How an id is spelled in the vocabulary, if it is in it.
    pub fn token(&self, id: u32) -> Option<String> {
        if self.fillers.contains(&id) { None } else { self.inner.id_to_token(id) }
    }

    /// The id that is spelled so in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token).filter(|id| !self.fillers.contains(id))
    }

    /// Whether every id is the same token in both.
    pub fn same_vocabulary(&self, other: &Tokenizer) -> bool {
        self.inner.get_vocab(true) == other.inner.get_vocab(true)
    }

    /// The first id whose token differs, with both tokens; none where the vocabularies are the
    /// same.
    pub fn first_difference(&self, other: &Tokenizer) -> Option<(u32, Option<String>, Option<String>)> {
        if self.same_vocabulary(other) {
            return None;
        }
        let largest = |tokenizer: &Tokenizer| tokenizer.inner.get_vocab(true).into_values().max().unwrap_or(0);
        let ids = 0..=largest(self).max(largest(other));
        ids.map(|id| (id, self.token(id), other.token(id))).find(|(_, mine, others)| mine != others)
    }

    /// Ids that are a token in one of the two alone, ascending.
    ///
    /// Errors: the first id that is a token in both and not the same, with both tokens.
    pub fn known_to_one(&self, other: &Tokenizer) -> std::result::Result<Vec<u32>, (u32, String, String)> {
        if self.same_vocabulary(other) {
            return Ok(Vec::new());
        }
        let ids: BTreeSet<u32> = [self, other].iter().flat_map(|tokenizer| tokenizer.inner.get_vocab(true).into_values()).collect();
        let mut alone = Vec::new();
        for id in ids {
            match (self.token(id), other.token(id)) {
                (Some(mine), Some(others)) if mine != others => return Err((id, mine, others)),
                (Some(_), None) | (None, Some(_)) => alone.push(id),
                _ => {}
            }
        }
        Ok(alone)
    }

    fn try_decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        // The crate knows special tokens by what they decode to, which normalizers change.
        let left_out = |id: &u32| self.fillers.contains(id) || skip_special && self.added.get(id).is_some_and(|token| token.special);
        let kept: Vec<u32> = ids.iter().copied().filter(|id| !left_out(id)).collect();
        guarded(&self.path, "cannot decode the tokens", || self.inner.decode(&kept, false))
    }

    /// Where the crate fails on a text, each token that it fails on is a replacement character.
    fn decode_by(&self, ids: &[u32], skip_special: bool) -> String {
        self.try_decode(ids, skip_special).unwrap_or_else(|_| {
            ids.iter().map(|id| self.try_decode(&[*id], skip_special).unwrap_or_else(|_| char::REPLACEMENT_CHARACTER.into())).collect()
        })
    }

    /// Text of `ids`, special tokens left out. Ids without a token give nothing.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.decode_by(ids, true)
    }

    /// Text that `ids` add to that of `before`: both are decoded in one piece, since a decoder may
    /// join words, drop the first space, or make one character of bytes on either side.
    pub fn decode_after(&self, before: &[u32], ids: &[u32]) -> String {
        let (head, whole) = self.around(before, ids);
        whole[common(&head, &whole)..].to_owned()
    }

    /// Text of `before` as far as it stays with `ids` after it: [`Tokenizer::decode_after`] is the
    /// rest.
    pub fn decode_before(&self, before: &[u32], ids: &[u32]) -> String {
        let (head, whole) = self.around(before, ids);
        let mut text = self.decode(before);
        text.truncate(text.len().saturating_sub(head.len() - common(&head, &whole)));
        text
    }

    /// The part of [`Tokenizer::decode_after`] that no later id changes: without bytes of a
    /// character that may still come, which end in replacement characters until it is whole.
    pub fn decode_settled(&self, before: &[u32], ids: &[u32]) -> String {
        let open = ids.iter().rev().take_while(|id| self.is_open(**id)).count();
        let mut text = self.decode_after(before, &ids[..ids.len() - open]);
        text.truncate(text.trim_end_matches(char::REPLACEMENT_CHARACTER).len());
        text
    }

    /// Whether the text of an id may change with those after it. A run of bytes is read as a whole:
    /// one that is none of a character's changes them all, also over what is left out between them.
    fn is_open(&self, id: u32) -> bool {
        let is_byte = || self.inner.id_to_token(id).is_some_and(|token| token.len() == 6 && token.starts_with("<0x"));
        is_byte() || self.token(id).is_none() || self.added.get(&id).is_some_and(|token| token.special)
    }

    /// Text of each of `ids`, which join to [`Tokenizer::decode_after`]: a character of several
    /// tokens belongs to the last of them.
    pub fn decode_pieces(&self, before: &[u32], ids: &[u32]) -> Vec<String> {
        let mut pieces: Vec<String> = Vec::with_capacity(ids.len());
        // Decoded in short windows, each after all that is before it: the time is linear.
        let mut window = 0;
        let mut shown = String::new();
        let mut given = before.to_vec();
        for end in 1..=ids.len() {
            let mut text = self.decode_after(&given, &ids[window..end]);
            let len = text.len();
            if end < ids.len() {
                text.truncate(text.trim_end_matches(char::REPLACEMENT_CHARACTER).len());
            }
            let is_whole = text.len() == len;
            let same = common(&shown, &text);
            // Bytes that turn out to be none of a character's take back what they were.
            let mut extra = shown.len() - same;
            for piece in pieces[window..].iter_mut().rev() {
                let cut = extra.min(piece.len());
                piece.truncate(piece.len() - cut);
                extra -= cut;
            }
            pieces.push(text[same..].to_owned());
            shown = text;
            if is_whole && end - window >= PIECES_WINDOW && !self.is_open(ids[end - 1]) {
                given.extend(&ids[window..end]);
                window = end;
                shown.clear();
            }
        }
        pieces
    }

    /// Text of the end of `before`, and the same with `ids` after it.
    fn around(&self, before: &[u32], ids: &[u32]) -> (String, String) {
        let is_special = |id: &u32| self.added.get(id).is_some_and(|token| token.special);
        let near = before.iter().rev().filter(|id| !is_special(id)).take(CONTEXT);
        let mut context: Vec<u32> = near.copied().collect();
        context.reverse();
        let head = self.decode(&context);
        context.extend(ids);
        (head, self.decode(&context))
    }

    /// Text of `ids` with special tokens spelled out.
    pub fn decode_all(&self, ids: &[u32]) -> String {
        self.decode_by(ids, false)
    }

    /// Ids below `vocab_size` that no token has: padding rows of the embedding.
    pub fn unused_ids(&self, vocab_size: usize) -> Vec<u32> {
        (0..vocab_size as u32).filter(|id| self.token(*id).is_none()).collect()
    }
}
