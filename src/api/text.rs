//! Rules by which token ids become the text of a request.
#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::request::generated_text;
use crate::tokenizer::Tokenizer;

/// How token ids become the text of a request.
#[derive(Clone, Debug)]
pub(crate) struct TextRules {
    /// `None` for models without one: texts are empty.
    pub(crate) tokenizer: Option<Arc<Tokenizer>>,
    /// Given tokens before the first generated one: how a token is spelled depends on them.
    pub(crate) before: Vec<u32>,
    /// Ids that end the text, if the model writes them.
    pub(crate) ends: Vec<u32>,
    pub(crate) stop: Vec<String>,
    /// The generated positions are holes in a given text.
    pub(crate) infills: bool,
}

impl TextRules {
    /// Text of generated tokens: up to the end of text and the first stop text, and whether it ends
    /// there.
    pub(crate) fn text(&self, tokens: &[u32]) -> (String, bool) {
        let Some(tokenizer) = &self.tokenizer else { return (String::new(), false) };
        generated_text(tokenizer, &self.before, tokens, &self.ends, &self.stop)
    }

    /// The part of [`TextRules::text`] that no later token changes, and whether the text ends with
    /// it.
    pub(crate) fn settled(&self, tokens: &[u32]) -> (String, bool) {
        let (text, ended) = self.text(tokens);
        let Some(tokenizer) = self.tokenizer.as_ref().filter(|_| !ended) else { return (text, ended) };
        let mut text = tokenizer.decode_settled(&self.before, tokens);
        // What may begin a stop text.
        let begins = |at: usize| self.stop.iter().any(|stop| stop.starts_with(&text[at..]));
        if let Some(at) = text.char_indices().map(|(at, _)| at).find(|at| begins(*at)) {
            text.truncate(at);
        }
        (text, false)
    }

    /// Text of each token after others; what is left of a character at the end is the last one's.
    pub(crate) fn pieces(&self, before: &[u32], tokens: &[u32]) -> Vec<String> {
        self.tokenizer.as_ref().map_or_else(|| vec![String::new(); tokens.len()], |tokenizer| tokenizer.decode_pieces(before, tokens))
    }

    pub(crate) fn decode(&self, tokens: &[u32]) -> String {
        self.tokenizer.as_ref().map_or_else(String::new, |tokenizer| tokenizer.decode(tokens))
    }
}
