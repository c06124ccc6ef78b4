//! Private characters in place of the special tokens that a template spells.
//!
//! A mark in what was rendered is the template's: a message cannot write one. What the template
//! looks for in a message, or compares with it, is spelled again before it is looked for.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ops::Range;

use minijinja::Value;
use minijinja::value::{Tuple, ValueKind};

use super::python::{MAX_DEPTH, Outcome, fail, items};

/// Spans of a text and the special token that each is.
pub(super) type Spans = Vec<(Range<usize>, u32)>;

/// The special tokens of a tokenizer.
pub(super) struct Specials<'t> {
    by_first: BTreeMap<char, Vec<(u32, &'t str)>>,
}

impl<'t> Specials<'t> {
    pub(super) fn new(all: impl Iterator<Item = (u32, &'t str)>) -> Specials<'t> {
        let mut by_first: BTreeMap<char, Vec<(u32, &str)>> = BTreeMap::new();
        for (id, special) in all {
            if let Some(first) = special.chars().next() {
                by_first.entry(first).or_default().push((id, special));
            }
        }
        // The longest of those that begin at a place, as the tokenizer finds them.
        by_first.values_mut().for_each(|list| list.sort_by_key(|(_, special)| std::cmp::Reverse(special.len())));
        Specials { by_first }
    }

    pub(super) fn spellings(&self) -> impl Iterator<Item = &'t str> {
        self.by_first.values().flatten().map(|(_, special)| *special)
    }

    /// Where special tokens are spelled in a text, as far as `allowed` says of their range.
    pub(super) fn find(&self, text: &str, allowed: impl Fn(&Range<usize>) -> bool) -> Spans {
        let (mut spans, mut at) = (Vec::new(), 0);
        while let Some(c) = text[at..].chars().next() {
            let here = self.by_first.get(&c).into_iter().flatten().filter(|(_, special)| text[at..].starts_with(special));
            let found = here.map(|(id, special)| (at..at + special.len(), *id)).find(|(range, _)| allowed(range));
            at = found.as_ref().map_or(at + c.len_utf8(), |(range, _)| range.end);
            spans.extend(found);
        }
        spans
    }
}

/// The mark of each special token.
#[derive(Default)]
pub(super) struct Marks {
    of: BTreeMap<u32, char>,
    back: BTreeMap<char, (u32, String)>,
}

impl Marks {
    /// `text` with marks of the characters that `free` gives.
    pub(super) fn put(&mut self, text: &str, specials: &Specials, free: &mut impl Iterator<Item = char>) -> String {
        let (mut out, mut rest) = (String::with_capacity(text.len()), 0);
        for (range, id) in specials.find(text, |_| true) {
            let Some(mark) = self.of.get(&id).copied().or_else(|| free.next()) else { continue };
            self.of.insert(id, mark);
            self.back.insert(mark, (id, text[range.clone()].to_owned()));
            out.push_str(&text[rest..range.start]);
            out.push(mark);
            rest = range.end;
        }
        out.push_str(&text[rest..]);
        out
    }

    /// The text as it is spelled, and where its marks stood.
    pub(super) fn reveal(&self, text: &str) -> (String, Spans) {
        let (mut plain, mut spans) = (String::with_capacity(text.len()), Vec::new());
        for c in text.chars() {
            match self.back.get(&c) {
                Some((id, special)) => {
                    spans.push((plain.len()..plain.len() + special.len(), *id));
                    plain.push_str(special);
                }
                None => plain.push(c),
            }
        }
        (plain, spans)
    }

    fn are_in(&self, text: &str) -> bool {
        !self.back.is_empty() && text.chars().any(|c| self.back.contains_key(&c))
    }

    /// A value as it is spelled.
    pub(super) fn spelled(&self, value: &Value) -> Outcome {
        fn spelled(marks: &Marks, value: &Value, depth: usize) -> Outcome {
            if depth > MAX_DEPTH {
                return fail("values inside values without an end");
            }
            match value.kind() {
                ValueKind::String => {
                    let text = value.as_str().unwrap_or_default();
                    Ok(if marks.are_in(text) { Value::from(marks.reveal(text).0) } else { value.clone() })
                }
                ValueKind::Seq => {
                    let all = items(value)?.iter().map(|item| spelled(marks, item, depth + 1)).collect::<Outcome<Vec<Value>>>()?;
                    Ok(if value.is_tuple() { Value::from(Tuple::from(all)) } else { Value::from(all) })
                }
                _ => Ok(value.clone()),
            }
        }
        if self.back.is_empty() { Ok(value.clone()) } else { spelled(self, value, 0) }
    }

    /// The arguments with the first as it is spelled, where it has marks and the text has none.
    pub(super) fn needle(&self, text: &Value, arguments: &[Value]) -> Option<Vec<Value>> {
        if self.back.is_empty() || text.as_str().is_some_and(|text| self.are_in(text)) {
            return None;
        }
        let mut arguments = arguments.to_vec();
        let first = arguments.first_mut()?;
        *first = self.spelled(first).ok()?;
        Some(arguments)
    }
}
