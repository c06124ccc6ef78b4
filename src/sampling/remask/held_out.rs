//! `held-out:GROUPS`: every token scored while it is masked.
#![forbid(unsafe_code)]

use std::num::NonZeroUsize;

use crate::error::{Error, Result};
use crate::sampling::remask::rule::{GeneratedToken, RemaskBy, RemaskRow, RemaskRule, ScoringForwards};
use crate::sampling::remask::score::Score;

/// Lowest score while masked: one forward for each of `groups` interleaved groups of generated
/// positions, which it masks.
#[derive(Clone, Copy, Debug)]
pub struct HeldOut {
    groups: NonZeroUsize,
    score: Score,
}

/// Row of the table of rules.
pub const ROW: RemaskRow = RemaskRow {
    name: "held-out",
    argument: "GROUPS",
    takes_score: true,
    doc: "lowest score while masked: GROUPS forwards (2 or more), each masking every GROUPS-th token",
    parse: |groups, score| {
        let groups = groups.parse().map_err(|_| Error::request(format!("expected a number of groups, at least 2, found `{groups}`")))?;
        Ok(RemaskBy::new(HeldOut::new(groups, score)?))
    },
};

impl HeldOut {
    /// Errors: [`Error::Request`] for fewer than 2 groups: one alone would mask the whole text.
    pub fn new(groups: usize, score: Score) -> Result<HeldOut> {
        match NonZeroUsize::new(groups).filter(|groups| (2..=1 << 32).contains(&groups.get())) {
            Some(groups) => Ok(HeldOut { groups, score }),
            None => Err(Error::request(format!("expected a number of groups, at least 2, found {groups}"))),
        }
    }
}

impl RemaskRule for HeldOut {
    fn value(&self) -> String {
        format!("held-out:{}", self.groups)
    }

    fn keys(&self) -> Vec<(&'static str, String)> {
        self.score.key().into_iter().collect()
    }

    fn score(&self, token: &GeneratedToken, _uniform: &dyn Fn() -> f64) -> f64 {
        self.score.of(&token.scored.expect("a scoring forward ran"), token.snapshot)
    }

    fn forwards(&self) -> ScoringForwards {
        ScoringForwards::HeldOut(self.groups)
    }
}
