//! `linear:STEPS`: LLaDA's quota over the masks of a block.
#![forbid(unsafe_code)]

use std::num::NonZeroUsize;

use crate::sampling::types::UnmaskStep;
use crate::sampling::unmask::candidate::{BlockProgress, Candidate};
use crate::sampling::unmask::ranking::Ranking;
use crate::sampling::unmask::rule::{Unmask, UnmaskRow, UnmaskRule};
use crate::sampling::unmask::values::{count, next_share, share};

/// Spreads the m masks that a block held at first over `steps` forwards: `m / steps` each, and one
/// more in the first `m % steps` (LLaDA, `get_num_transfer_tokens`).
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// By what positions are ranked.
    pub ranking: Ranking,
    /// Forwards of a block.
    pub steps: NonZeroUsize,
}

/// Row of the table of rules.
pub const ROW: UnmaskRow = UnmaskRow {
    name: "linear",
    argument: "STEPS",
    keys: &["order", "order_temperature"],
    doc: "LLaDA's quota: the masks of the block spread evenly over STEPS forwards, the remainder over the first of them",
    parse: |arguments| Ok(Unmask::new(Linear { ranking: arguments.ranking()?, steps: count(arguments.value.unwrap_or_default())? })),
};

impl Linear {
    fn count(&self, progress: BlockProgress) -> usize {
        share(progress.masks_at_start, self.steps.get(), progress.step)
    }
}

impl UnmaskRule for Linear {
    fn value(&self) -> String {
        format!("linear:{}", self.steps)
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
        next_share(progress.masks_at_start, self.steps.get(), progress.step)
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

    /// 10 masks over 4 steps: 3 3 2 2. 3 masks over 5 steps: 1 1 1, and the empty steps are never
    /// reached.
    #[test]
    fn the_remainder_goes_to_the_first_steps() {
        let rule = |steps| Linear { ranking: Rank::Confidence.into(), steps: NonZeroUsize::new(steps).unwrap() };
        assert_eq!([0, 1, 2, 3].map(|step| rule(4).quota(block(10, 10, step)).unwrap()), [3, 3, 2, 2]);
        assert_eq!([0, 1, 2, 3, 4].map(|step| rule(5).quota(block(3, 3, step)).unwrap()), [1, 1, 1, 0, 0]);
        // Masks that a joint sampler left over: no loop over 2^32 empty steps.
        assert_eq!(rule(1 << 32).next_step(block(3, 1, 3), &mut std::iter::empty()), 1 << 32);
    }
}
