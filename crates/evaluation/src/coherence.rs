//! Two measures that read words rather than tokens: whether names are kept, whether
//! quotation marks pair up.
//!
//! A sample comes as its documents: the text between end-of-text tokens, the last one cut off by
//! the sample's length. A word is a run of letters with single apostrophes inside; what follows its
//! first apostrophe does not count (`Tim's` is `Tim`).
#![forbid(unsafe_code)]

use std::collections::HashMap;

use super::bootstrap::Part;

/// Words with whether they stand in mid-sentence: only spaces, commas and hyphens between a word
/// and the one before it.
fn words(text: &str) -> Vec<(&str, bool)> {
    let apostrophe = |c: char| c == '\'' || c == '\u{2019}';
    let mut found = Vec::new();
    let (mut at, mut inside) = (0, false);
    while at < text.len() {
        let rest = &text[at..];
        let gap = rest.find(char::is_alphabetic).unwrap_or(rest.len());
        inside &= gap > 0 && rest[..gap].chars().all(|c| matches!(c, ' ' | ',' | '-'));
        let word = &rest[gap..];
        let base = word.find(|c: char| !c.is_alphabetic()).unwrap_or(word.len());
        let mut end = base;
        // An apostrophe followed by a letter goes on with the word.
        while let Some(mark) = word[end..].chars().next().filter(|c| apostrophe(*c)) {
            let after = end + mark.len_utf8();
            let letters = word[after..].find(|c: char| !c.is_alphabetic()).unwrap_or(word.len() - after);
            if letters == 0 {
                break;
            }
            end = after + letters;
        }
        if base > 0 {
            found.push((&word[..base], inside));
            inside = true;
        }
        at += gap + end;
    }
    found
}

/// Whether names are kept: capitalised words of two letters or more in mid-sentence (so neither `I`
/// nor what only begins a sentence), and how many of them are of a word that the sample uses at
/// least twice, mid-sentence or not: (kept, all). A text that invents a new name at every turn
/// scores low, one that stays with its characters high.
pub fn names(documents: &[String]) -> Part {
    let words: Vec<(&str, bool)> = documents.iter().flat_map(|text| words(text)).collect();
    let mut uses: HashMap<&str, usize> = HashMap::new();
    words.iter().for_each(|(word, _)| *uses.entry(word).or_insert(0) += 1);
    let name = |word: &str| word.starts_with(char::is_uppercase) && word.chars().nth(1).is_some();
    let mentions = words.iter().filter(|(word, inside)| *inside && name(word));
    mentions.fold((0.0, 0.0), |(kept, all), (word, _)| (kept + f64::from(uses[word] >= 2), all + 1.0))
}

/// Paragraphs (lines that are not blank) with an even number of `"`: (even, all). The paragraph
/// that the sample's length cuts off does not count.
pub fn quotes(documents: &[String]) -> Part {
    let last = documents.len().saturating_sub(1);
    let paragraphs = documents.iter().enumerate().flat_map(|(i, text)| {
        let finished = if i == last { text.rfind('\n').unwrap_or(0) } else { text.len() };
        text[..finished].lines().filter(|line| !line.trim().is_empty())
    });
    paragraphs.fold((0.0, 0.0), |(even, all), line| (even + f64::from(line.matches('"').count() % 2 == 0), all + 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(documents: &[&str]) -> Vec<String> {
        documents.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn words_know_their_place() {
        assert_eq!(
            words("One day, Tim's dog - Rex - ran. He didn't \"Stop\" the 3 Bears"),
            [
                ("One", false),
                ("day", true),
                ("Tim", true),
                ("dog", true),
                ("Rex", true),
                ("ran", true),
                ("He", false),
                ("didn", true),
                ("Stop", false),
                ("the", false),
                ("Bears", false)
            ]
        );
        assert_eq!(words("the boys' 'Élan"), [("the", false), ("boys", true), ("Élan", false)]);
        assert_eq!(words(" ,-'"), []);
    }

    #[test]
    fn names_that_come_back_are_kept() {
        // Mid-sentence capitals: Tim (3 uses in all), Sue (1), Tim. `I`, `He` and `Sam` (after a
        // quotation mark) are none.
        let text = texts(&["One day Tim met Sue and I saw Tim. He said \"Sam is here.\" Tim left."]);
        assert_eq!(names(&text), (2.0, 3.0));
        // The second use may stand in another document of the sample.
        assert_eq!(names(&texts(&["A boy, Max, ran.", "Max sat."])), (1.0, 1.0));
        assert_eq!(names(&texts(&["The end."])), (0.0, 0.0));
    }

    #[test]
    fn quotes_pair_up_in_finished_paragraphs() {
        assert_eq!(quotes(&texts(&["\"Hi,\" he said.\n\n\"Oh no.\nAnd \"so"])), (1.0, 2.0));
        assert_eq!(quotes(&texts(&["\"Oh no.", "cut off"])), (0.0, 1.0));
        assert_eq!(quotes(&texts(&["only one line, cut off"])), (0.0, 0.0));
        assert_eq!(quotes(&[]), (0.0, 0.0));
    }
}
