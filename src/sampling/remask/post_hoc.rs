//! `post-hoc`: one forward over the finished text.
#![forbid(unsafe_code)]

use crate::sampling::remask::rule::{GeneratedToken, RemaskBy, RemaskRow, RemaskRule, ScoringForwards};
use crate::sampling::remask::score::Score;

/// Lowest score in one forward over the finished text, in which nothing is masked.
#[derive(Clone, Copy, Debug)]
pub struct PostHoc {
    /// What the forward makes of its distribution.
    pub score: Score,
}

/// Row of the table of rules.
pub const ROW: RemaskRow = RemaskRow {
    name: "post-hoc",
    argument: "",
    takes_score: true,
    doc: "lowest score in one forward over the finished text, in which nothing is masked",
    parse: |_, score| Ok(RemaskBy::new(PostHoc { score })),
};

impl RemaskRule for PostHoc {
    fn value(&self) -> String {
        "post-hoc".into()
    }

    fn keys(&self) -> Vec<(&'static str, String)> {
        self.score.key().into_iter().collect()
    }

    fn score(&self, token: &GeneratedToken, _uniform: &dyn Fn() -> f64) -> f64 {
        self.score.of(&token.scored.expect("a scoring forward ran"), token.snapshot)
    }

    fn forwards(&self) -> ScoringForwards {
        ScoringForwards::Visible
    }
}
