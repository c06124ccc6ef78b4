//! `uniform:N`, `confidence:N`, `margin:N`, `entropy:N`, `left:N`: the best N of a ranking.
#![forbid(unsafe_code)]

use std::num::NonZeroUsize;

use crate::error::{Error, Result};
use crate::sampling::types::{Rank, UnmaskStep};
use crate::sampling::unmask::candidate::{BlockProgress, Candidate};
use crate::sampling::unmask::linear::Linear;
use crate::sampling::unmask::ranking::Ranking;
use crate::sampling::unmask::rule::{RuleArguments, Unmask, UnmaskRow, UnmaskRule};
use crate::sampling::unmask::values::count;

/// Unmasks the best `n` of `ranking` in each forward.
#[derive(Clone, Copy, Debug)]
pub struct Count {
    /// By what positions are ranked.
    pub ranking: Ranking,
    /// Positions of a forward.
    pub n: NonZeroUsize,
}

/// One row for each ranking.
pub const ROWS: [UnmaskRow; 5] = [
    row("uniform", |arguments| parse(Rank::Uniform, arguments), "N positions at random; `uniform:1` is BD3-LM's first-hitting sampler"),
    row("confidence", |arguments| parse(Rank::Confidence, arguments), "the N of highest confidence"),
    row("margin", |arguments| parse(Rank::Margin, arguments), "the N of largest margin: highest less second highest probability"),
    row("entropy", |arguments| parse(Rank::Entropy, arguments), "the N of lowest entropy"),
    row("left", |arguments| parse(Rank::Left, arguments), "the N leftmost"),
];

const fn row(name: &'static str, parse: fn(&RuleArguments) -> Result<Unmask>, doc: &'static str) -> UnmaskRow {
    UnmaskRow { name, argument: "N", keys: &["order_temperature", "steps"], doc, parse }
}

/// `RANK:N`, `RANK` alone (N is 1), and `RANK` with `steps=S`, which is `linear:S,order=RANK`.
fn parse(rank: Rank, arguments: &RuleArguments) -> Result<Unmask> {
    let ranking = Ranking::new(rank, arguments.order_temperature.unwrap_or(0.0))?;
    match (arguments.value, arguments.steps) {
        (None, Some(steps)) => Ok(Unmask::new(Linear { ranking, steps })),
        (Some(_), Some(_)) => Err(Error::request("steps goes with a ranking alone, as in unmask=uniform,steps=12")),
        (None, None) => Ok(Unmask::new(Count { ranking, n: NonZeroUsize::MIN })),
        (Some(n), None) => Ok(Unmask::new(Count { ranking, n: count(n)? })),
    }
}

impl UnmaskRule for Count {
    fn value(&self) -> String {
        format!("{}:{}", self.ranking.rank(), self.n)
    }

    fn keys(&self) -> Vec<(&'static str, String)> {
        self.ranking.temperature_key().into_iter().collect()
    }

    fn select(&self, _progress: BlockProgress, candidates: &[Candidate]) -> Vec<usize> {
        self.ranking.best(self.n.get(), candidates)
    }

    fn ranking(&self) -> Option<Ranking> {
        Some(self.ranking)
    }

    fn quota(&self, _progress: BlockProgress) -> Option<usize> {
        Some(self.n.get())
    }

    fn on_device(&self, _progress: BlockProgress) -> Option<UnmaskStep> {
        Some(UnmaskStep::Best { rank: self.ranking.rank(), n: self.n.get() })
    }
}
