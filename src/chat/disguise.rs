//! Other characters in place of a conversation's own, so that what is rendered shows where each of
//! its characters came from.
//!
//! A letter stands for a letter of its case, a digit for a digit, a sign for a sign, and all else
//! for a private character: a template that changes the case of a message, cuts it, turns it
//! around or measures it does the same to the disguise. Where the two texts differ, a message
//! speaks. A template that looks for something in a message may take another way; then the texts
//! do not match, and less is disguised ([`WAYS`]).
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};

use super::source::is_space;

/// What of a conversation is disguised.
#[derive(Clone, Copy, PartialEq)]
enum Reach {
    /// Everything that is seen, except what is written differently in JSON.
    Seen,
    /// The same without what the template's strings spell.
    SeenButStrings,
    /// Special tokens in any case, and parts of them at the ends.
    Special,
}

/// Characters that are disguised. Where a special token has none of them, all of it is.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    All,
    Words,
    Signs,
}

/// One way to disguise a conversation.
#[derive(Clone, Copy)]
pub(super) struct Way(Reach, Kind);

/// The ways, those that show most first.
pub(super) const WAYS: [Way; 8] = [
    Way(Reach::Seen, Kind::All),
    Way(Reach::SeenButStrings, Kind::All),
    Way(Reach::SeenButStrings, Kind::Words),
    Way(Reach::Special, Kind::All),
    Way(Reach::Special, Kind::Words),
    Way(Reach::SeenButStrings, Kind::Signs),
    Way(Reach::Special, Kind::Signs),
    Way(Reach::Seen, Kind::Words),
];

/// What changes nothing but special tokens.
pub(super) const LEAST: Way = Way(Reach::Special, Kind::All);

/// Where a text of a conversation stands.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Place {
    /// What somebody wrote.
    Words,
    /// A role, a type or the name of a key, which templates compare and complete: `<|{{ role }}|>`
    /// is the template's.
    Name,
}

/// Signs that stand for each other.
const SIGNS: [&str; 3] = ["([{<", ")]}>", "!#$%&*+,./:;=?@^_`|~"];

/// A disguise of one way.
pub(super) struct Disguise<'s, F> {
    way: Way,
    /// Spellings of special tokens, in small letters.
    specials: &'s [String],
    /// What the template's strings spell.
    strings: &'s [String],
    free: F,
    of: BTreeMap<char, char>,
    back: BTreeMap<char, char>,
}

impl<'s, F: Iterator<Item = char>> Disguise<'s, F> {
    pub(super) fn new(way: Way, specials: &'s [String], strings: &'s [String], free: F) -> Self {
        Disguise { way, specials, strings, free, of: BTreeMap::new(), back: BTreeMap::new() }
    }

    pub(super) fn apply(&mut self, text: &str, place: Place) -> String {
        let special = special(text, self.specials, place == Place::Words);
        let Way(reach, kind) = self.way;
        let mut hidden: BTreeSet<usize> = BTreeSet::new();
        if place == Place::Words && reach != Reach::Special {
            let seen = |c: char| !is_space(c) && !c.is_control() && !matches!(c, '"' | '\\' | '\'');
            hidden.extend(text.char_indices().filter(|(_, c)| seen(*c) && kind.has(*c)).map(|(at, _)| at));
            if reach == Reach::SeenButStrings {
                for string in self.strings {
                    for (at, _) in text.match_indices(string.as_str()) {
                        (at..at + string.len()).for_each(|at| _ = hidden.remove(&at));
                    }
                }
            }
        }
        for run in special {
            let chars = || text[run.clone()].char_indices().map(|(at, c)| (run.start + at, c));
            let any = chars().any(|(_, c)| kind.has(c));
            hidden.extend(chars().filter(|(_, c)| !any || kind.has(*c)).map(|(at, _)| at));
        }
        text.char_indices().map(|(at, c)| if hidden.contains(&at) { self.other(c) } else { c }).collect()
    }

    fn other(&mut self, c: char) -> char {
        match turned(c, 1) {
            Some(other) => other,
            None => *self.of.entry(c).or_insert_with(|| {
                // Where no private character is left, it stays.
                let other = self.free.next().unwrap_or(c);
                self.back.insert(other, c);
                other
            }),
        }
    }

    /// Byte by byte, whether a character of `text` is the conversation's. None where the template
    /// took another way when it was given the disguise, and made `other`.
    pub(super) fn seen_through(&self, text: &str, other: &str) -> Option<Vec<bool>> {
        let (mut theirs, mut others) = (Vec::with_capacity(text.len()), other.chars());
        for c in text.chars() {
            let d = others.next()?;
            let original = self.back.get(&d).copied().or_else(|| turned(d, -1)).unwrap_or(d);
            if c != d && c != original && !c.to_lowercase().eq(original.to_lowercase()) {
                return None;
            }
            theirs.extend(std::iter::repeat_n(c != d, c.len_utf8()));
        }
        if others.next().is_some() { None } else { Some(theirs) }
    }
}

impl Kind {
    fn has(self, c: char) -> bool {
        match self {
            Kind::All => true,
            Kind::Words => c.is_alphanumeric(),
            Kind::Signs => !c.is_alphanumeric(),
        }
    }
}

/// The character of the same kind that is `by` further on. None where it has no such kind.
fn turned(c: char, by: isize) -> Option<char> {
    let within = |at: usize, len: usize| (at as isize + by).rem_euclid(len as isize) as usize;
    let letter = |first: u8| char::from(first + within(c as usize - usize::from(first), 26) as u8);
    match c {
        'a'..='z' => Some(letter(b'a')),
        'A'..='Z' => Some(letter(b'A')),
        '0'..='9' => Some(char::from(b'0' + within(c as usize - '0' as usize, 10) as u8)),
        _ => SIGNS.iter().find_map(|signs| {
            let at = signs.find(c)?;
            signs.as_bytes().get(within(at, signs.len())).map(|other| char::from(*other))
        }),
    }
}

/// Runs of a text that spell special tokens, small letters or not, or parts of them at its ends.
fn special(text: &str, specials: &[String], with_ends: bool) -> Vec<std::ops::Range<usize>> {
    // Changes no length.
    let text = &text.to_ascii_lowercase();
    let mut hidden = vec![false; text.len()];
    if with_ends {
        ends(text, specials).into_iter().for_each(|range| hidden[range].fill(true));
    }
    for special in specials {
        // Occurrences may overlap.
        let mut from = 0;
        while let Some(at) = text[from..].find(special).map(|at| from + at) {
            hidden[at..at + special.len()].fill(true);
            from = at + text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for at in (0..text.len()).filter(|at| hidden[*at]) {
        match runs.last_mut().filter(|run| run.end == at) {
            Some(run) => run.end = at + 1,
            None => runs.push(at..at + 1),
        }
    }
    runs
}

/// The parts of special tokens at both ends of a text; all of it where it is inside of one.
fn ends(text: &str, specials: &[String]) -> Vec<std::ops::Range<usize>> {
    if !text.is_empty() && specials.iter().any(|special| special.contains(text)) {
        return std::iter::once(0..text.len()).collect();
    }
    let (mut head, mut tail) = (0, 0);
    for special in specials {
        let cuts = special.char_indices().map(|(at, _)| at).skip(1);
        head = cuts.clone().filter(|at| text.starts_with(&special[*at..])).map(|at| special.len() - at).fold(head, usize::max);
        tail = cuts.filter(|at| text.ends_with(&special[..*at])).fold(tail, usize::max);
    }
    vec![0..head, text.len() - tail..text.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_stands_for_one_of_its_kind() {
        for c in (0..128u8).map(char::from) {
            let Some(other) = turned(c, 1) else { continue };
            assert!(other != c && turned(other, -1) == Some(c), "{c}");
            assert_eq!(
                (c.is_lowercase(), c.is_uppercase(), c.is_numeric()),
                (other.is_lowercase(), other.is_uppercase(), other.is_numeric())
            );
            assert_eq!(turned(c.to_ascii_uppercase(), 1), Some(other.to_ascii_uppercase()), "{c}");
        }
        assert_eq!(turned('-', 1), None);
    }

    #[test]
    fn runs_of_special_tokens() {
        let specials = ["<|end|>".to_owned(), "</s>".to_owned()];
        assert_eq!(special("a<|END|></s>b<|e", &specials, true), [1..12, 13..16]);
        assert_eq!(special("nd|>é<", &specials, true), [0..4, 6..7]);
        assert_eq!(special("end", &specials, true), std::iter::once(0..3).collect::<Vec<_>>());
        assert!(special("end", &specials, false).is_empty());
    }
}
