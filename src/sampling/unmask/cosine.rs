//! `cosine:STEPS`: MaskGIT's quota, few positions first and many last.
#![forbid(unsafe_code)]

use std::f64::consts::FRAC_PI_2;
use std::num::NonZeroUsize;

use crate::sampling::types::UnmaskStep;
use crate::sampling::unmask::candidate::{BlockProgress, Candidate};
use crate::sampling::unmask::ranking::Ranking;
use crate::sampling::unmask::rule::{Unmask, UnmaskRow, UnmaskRule};
use crate::sampling::unmask::values::count;

/// Leaves `floor(m cos(pi/2 (step + 1) / steps))` of the m masks that a block held at first, and
/// unmasks one position at least (MaskGIT, arXiv 2202.04200, section 3.3).
#[derive(Clone, Copy, Debug)]
pub struct Cosine {
    /// By what positions are ranked.
    pub ranking: Ranking,
    /// Forwards of a block.
    pub steps: NonZeroUsize,
}

/// Row of the table of rules.
pub const ROW: UnmaskRow = UnmaskRow {
    name: "cosine",
    argument: "STEPS",
    keys: &["order", "order_temperature"],
    doc: "MaskGIT's quota: `floor(m * cos(pi/2 * k / STEPS))` of the block's m masks are left after the k-th forward, few positions first \
          and many last",
    parse: |arguments| Ok(Unmask::new(Cosine { ranking: arguments.ranking()?, steps: count(arguments.value.unwrap_or_default())? })),
};

impl Cosine {
    fn count(&self, BlockProgress { masks_at_start, masks, step, .. }: BlockProgress) -> usize {
        let steps = self.steps.get();
        let left = if step + 1 >= steps { 0.0 } else { masks_at_start as f64 * (FRAC_PI_2 * (step + 1) as f64 / steps as f64).cos() };
        masks.saturating_sub(left as usize).max(1)
    }
}

impl UnmaskRule for Cosine {
    fn value(&self) -> String {
        format!("cosine:{}", self.steps)
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

    fn on_device(&self, progress: BlockProgress) -> Option<UnmaskStep> {
        Some(UnmaskStep::Best { rank: self.ranking.rank(), n: self.count(progress) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::types::Rank;
    use crate::sampling::unmask::testing::block;

    /// 256 masks over 8 steps leave 251, 236, 212, 181, 142, 97, 49, 0: the schedule of MaskGIT's
    /// images. 3 masks over 8 steps are one a step.
    #[test]
    fn few_positions_first_and_many_last() {
        let counts = |length: usize, steps: usize| {
            let rule = Cosine { ranking: Rank::Confidence.into(), steps: NonZeroUsize::new(steps).unwrap() };
            let (mut masks, mut counts) = (length, Vec::new());
            while masks > 0 {
                let n = rule.quota(block(length, masks, counts.len())).unwrap();
                masks -= n;
                counts.push(n);
            }
            counts
        };
        assert_eq!(counts(256, 8), [5, 15, 24, 31, 39, 45, 48, 49]);
        assert_eq!(counts(3, 8), [1, 1, 1]);
        assert_eq!(counts(7, 1), [7]);
    }
}
