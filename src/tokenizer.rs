//! Text to ids and back: `tokenizer.json` as published, with user text always read as text.
//!
//! Special tokens spelled out in a prompt are encoded letter by letter: a literal `<|mask|>` in
//! user text is text, never a MASK.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::error::{Error, Result};

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The same, reading special tokens where they are spelled: for templates, not for what users
    /// write.
    special: OnceLock<tokenizers::Tokenizer>,
    path: PathBuf,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and checks it against the model's vocabulary.
    pub fn load(path: &Path, vocab_size: usize) -> Result<Tokenizer> {
        if !path.exists() {
            let what = "no tokenizer: expected tokenizer.json in the model directory (BD3-LM and MDLM checkpoints use the GPT-2 one), or --tokenizer FILE";
            return Err(Error::tokenizer(path, what));
        }
        let mut inner = tokenizers::Tokenizer::from_file(path).map_err(|e| Error::tokenizer_from(path, "not a tokenizer", e))?;
        inner.set_encode_special_tokens(true);
        if let Some((token, id)) = inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id)
            && id as usize >= vocab_size
        {
            return Err(Error::tokenizer(path, format!("token `{token}` has id {id}, the model's vocabulary has {vocab_size}")));
        }
        Ok(Tokenizer { inner, special: OnceLock::new(), path: path.to_path_buf() })
    }

    /// Ids of `text`, nothing added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(|e| Error::tokenizer_from(&self.path, "cannot encode the text", e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of `text` in which spelled special tokens are those tokens; nothing added. Not for text
    /// from outside.
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>> {
        let special = self.special.get_or_init(|| {
            let mut special = self.inner.clone();
            special.set_encode_special_tokens(false);
            special
        });
        let encoding = special.encode_fast(text, false).map_err(|e| Error::tokenizer_from(&self.path, "cannot encode the text", e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Whether `text` spells a special token out.
    pub fn spells_special(&self, text: &str) -> bool {
        self.inner.get_added_tokens_decoder().values().any(|token| token.special && text.contains(&token.content))
    }

    /// Ids of each text, nothing added. Texts are encoded side by side, as many as the machine has
    /// cores.
    pub fn encode_each(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>> {
        let encodings = self
            .inner
            .encode_batch_fast(texts.to_vec(), false)
            .map_err(|e| Error::tokenizer_from(&self.path, "cannot encode the texts", e))?;
        Ok(encodings.iter().map(|encoding| encoding.get_ids().to_vec()).collect())
    }

    /// How an id is spelled in the vocabulary, if it is in it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id that is spelled so in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether every id is the same token in both.
    pub fn same_vocabulary(&self, other: &Tokenizer) -> bool {
        self.inner.get_vocab(true) == other.inner.get_vocab(true)
    }

    /// Text of `ids`, special tokens left out. Ids without a token give nothing.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, true).unwrap_or_default()
    }

    /// Text of `ids` with special tokens spelled out.
    pub fn decode_all(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, false).unwrap_or_default()
    }

    /// Ids below `vocab_size` that no token has: padding rows of the embedding.
    pub fn unused_ids(&self, vocab_size: usize) -> Vec<u32> {
        (0..vocab_size as u32).filter(|id| self.inner.id_to_token(*id).is_none()).collect()
    }
}
