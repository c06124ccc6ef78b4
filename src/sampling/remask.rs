//! Remask rules, one file each: how weak generated tokens are, which are masked again, and the
//! table of rules.
#![forbid(unsafe_code)]

mod held_out;
mod post_hoc;
mod random;
mod rule;
mod score;
mod snapshot;

pub use held_out::HeldOut;
pub use post_hoc::PostHoc;
pub use random::Random;
pub use rule::{GeneratedToken, RemaskBy, RemaskRow, RemaskRule, ScoringForwards};
pub use score::Score;
pub use snapshot::Snapshot;

use crate::error::{Error, Result};

/// Every rule that a stage can name. A new rule is a file beside this one, and its row here.
pub static REMASK_RULES: [RemaskRow; 4] = [snapshot::ROW, post_hoc::ROW, held_out::ROW, random::ROW];

/// The rule that a stage spells: `text` is what follows `by=`.
///
/// Errors: [`Error::Request`] with what is known, where no rule has that name; with what the rule
/// expects, where its value or `score` is wrong.
pub fn parse_remask(text: &str, score: Option<Score>) -> Result<RemaskBy> {
    let (name, value) = text.split_once(':').map_or((text, None), |(name, value)| (name, Some(value)));
    let Some(row) = REMASK_RULES.iter().find(|row| row.name == name && row.argument.is_empty() == value.is_none()) else {
        let known: Vec<_> = REMASK_RULES.iter().map(RemaskRow::usage).collect();
        return Err(Error::request(format!("by wants one of {}; found `{text}`", known.join(", "))));
    };
    let score = score.unwrap_or_default();
    if score != Score::default() && !row.takes_score {
        let takers: Vec<_> = REMASK_RULES.iter().filter(|row| row.takes_score).map(RemaskRow::usage).collect();
        return Err(Error::request(format!("score={score} needs a scoring forward: {}", takers.join(" or "))));
    }
    (row.parse)(value.unwrap_or_default(), score).map_err(|error| match error {
        Error::Request { what } => Error::request(format!("{}: {what}", row.usage())),
        other => other,
    })
}

/// Positions to mask again: the `floor(ratio * N)` lowest of N scores over the whole sequence, ties
/// to the lower position; ascending. A NaN is the highest.
pub fn remask(ratio: f64, scores: &[(usize, f64)]) -> Vec<usize> {
    let count = ((ratio * scores.len() as f64).floor() as usize).min(scores.len());
    let mut order = scores.to_vec();
    order.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
    let mut chosen: Vec<usize> = order[..count].iter().map(|(position, _)| *position).collect();
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remask_takes_the_floor_of_the_lowest_with_stable_ties() {
        let scores = [(5, 0.3), (6, 0.1), (7, 0.3), (8, 0.9), (9, 0.3)];
        assert_eq!(remask(0.5, &scores), [5, 6]);
        assert_eq!(remask(0.6, &scores), [5, 6, 7], "ties at 0.3: lower positions first");
        assert_eq!(remask(0.19, &scores), Vec::<usize>::new());
        assert_eq!(remask(1.0, &scores), [5, 6, 7, 8, 9]);
        assert_eq!(remask(1.0, &[]), Vec::<usize>::new());
    }

    #[test]
    fn rules_print_back_and_mistakes_are_named() {
        for row in &REMASK_RULES {
            for (score, ..) in Score::ALL {
                let text = if row.argument.is_empty() { row.name.to_owned() } else { format!("{}:4", row.name) };
                let Ok(rule) = parse_remask(&text, Some(score)) else {
                    assert!(!row.takes_score, "{text}");
                    continue;
                };
                let printed = rule.to_string();
                let (by, read) =
                    printed.split_once(",score=").map_or((printed.as_str(), None), |(by, score)| (by, Some(score.parse().unwrap())));
                assert_eq!((parse_remask(by, read).unwrap(), row.doc.len() > 10), (rule, true), "{printed}");
            }
        }
        for (text, score, word) in [
            ("best", None, "by=held-out:GROUPS"),
            ("held-out", None, "by=held-out:GROUPS"),
            ("held-out:1", None, "at least 2"),
            ("held-out:x", None, "at least 2"),
            ("snapshot:2", None, "by=snapshot"),
            ("random", Some(Score::Lift), "scoring forward"),
        ] {
            let error = parse_remask(text, score).expect_err(text).to_string();
            assert!(error.contains(word), "`{text}` says: {error}");
        }
    }
}
