//! `fixed:STEPS`: SDAR's quota over the length of a block.
#![forbid(unsafe_code)]

use std::num::NonZeroUsize;

use crate::sampling::types::UnmaskStep;
use crate::sampling::unmask::candidate::{BlockProgress, Candidate};
use crate::sampling::unmask::ranking::Ranking;
use crate::sampling::unmask::rule::{Unmask, UnmaskRow, UnmaskRule};
use crate::sampling::unmask::values::{count, next_share, share};

/// Spreads a block of L positions over `steps` forwards, `L / steps` each and one more in the first
/// `L % steps`, however many of them are masked (SDAR, `get_num_transfer_tokens`).
#[derive(Clone, Copy, Debug)]
pub struct Fixed {
    /// By what positions are ranked.
    pub ranking: Ranking,
    /// Forwards of a block.
    pub steps: NonZeroUsize,
}

/// Row of the table of rules.
pub const ROW: UnmaskRow = UnmaskRow {
    name: "fixed",
    argument: "STEPS",
    keys: &["order", "order_temperature"],
    doc: "SDAR's quota: the length of the block spread evenly over STEPS forwards, however many of its positions are masked",
    parse: |arguments| Ok(Unmask::new(Fixed { ranking: arguments.ranking()?, steps: count(arguments.value.unwrap_or_default())? })),
};

impl Fixed {
    fn count(&self, progress: BlockProgress) -> usize {
        share(progress.block_len, self.steps.get(), progress.step)
    }
}

impl UnmaskRule for Fixed {
    fn value(&self) -> String {
        format!("fixed:{}", self.steps)
    }

    fn keys(&self) -> Vec<(&'static str, String)> {
        self.ranking.order_keys()
    }

    fn select(&self, progress: BlockProgress, candidates: &[Candidate]) -> Vec<usize> {
        self.ranking.best(self.count(progress), candidates)
    }

    fn ranking(&self) -> Option<Ranking> {
        Some(self.ranking)
    }

    fn quota(&self, progress: BlockProgress) -> Option<usize> {
        Some(self.count(progress))
    }

    fn next_step(&self, progress: BlockProgress, _times: &mut dyn Iterator<Item = f64>) -> usize {
        next_share(progress.block_len, self.steps.get(), progress.step)
    }

    fn on_device(&self, progress: BlockProgress) -> Option<UnmaskStep> {
        Some(UnmaskStep::Best { rank: self.ranking.rank(), n: self.count(progress).max(1) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::types::Rank;
    use crate::sampling::unmask::testing::block;

    /// 8 positions over 3 steps are 3 3 2, also where only 5 are masked.
    #[test]
    fn the_quota_is_of_the_block() {
        let rule = Fixed { ranking: Rank::Left.into(), steps: NonZeroUsize::new(3).unwrap() };
        assert_eq!([0, 1, 2].map(|step| rule.quota(BlockProgress { block_len: 8, ..block(5, 5, step) }).unwrap()), [3, 3, 2]);
    }
}
