//! `timestep:STEPS`: Dream's integer schedule.
#![forbid(unsafe_code)]

use crate::sampling::types::UnmaskStep;
use crate::sampling::unmask::candidate::{BlockProgress, Candidate};
use crate::sampling::unmask::ranking::Ranking;
use crate::sampling::unmask::rule::{Unmask, UnmaskRow, UnmaskRule};
use crate::sampling::unmask::times::Times;

/// Unmasks `floor(masks left * (1 - s/t))` positions in the step from time t to time s, and all
/// that are left in the last step (Dream, `generation_utils.py`). Dream runs steps whose count is
/// zero and drops their result; here they run no forward.
#[derive(Clone, Copy, Debug)]
pub struct Timestep {
    /// By what positions are ranked.
    pub ranking: Ranking,
    /// Times of the steps.
    pub times: Times,
}

/// Row of the table of rules.
pub const ROW: UnmaskRow = UnmaskRow {
    name: "timestep",
    argument: "STEPS",
    keys: &["order", "order_temperature", "eps"],
    doc: "Dream's integer schedule: `floor(masks * (1 - s/t))` positions from time t to time s, the rest in the last of STEPS steps",
    parse: |arguments| Ok(Unmask::new(Timestep { ranking: arguments.ranking()?, times: Times::parse(arguments)? })),
};

impl Timestep {
    fn count(&self, BlockProgress { masks, step, .. }: BlockProgress) -> usize {
        if step + 1 >= self.times.steps() { masks } else { (masks as f64 * self.times.unmasked_share(step)) as usize }
    }
}

impl UnmaskRule for Timestep {
    fn value(&self) -> String {
        format!("timestep:{}", self.times.steps())
    }

    fn keys(&self) -> Vec<(&'static str, String)> {
        let order = ("order", self.ranking.rank().to_string());
        std::iter::once(order).chain(self.times.eps_key()).chain(self.ranking.temperature_key()).collect()
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
        let counts = |step: &usize| self.count(BlockProgress { step: *step, ..progress }) > 0;
        if progress.masks == 0 || counts(&progress.step) {
            return progress.step;
        }
        // Shares grow from step to step, so the search need not begin at the first.
        let begin = self.times.before_share(1.0 / progress.masks as f64).min(self.times.steps() - 1).max(progress.step);
        (begin..self.times.steps()).find(counts).unwrap_or(progress.step)
    }

    fn on_device(&self, progress: BlockProgress) -> Option<UnmaskStep> {
        Some(UnmaskStep::Best { rank: self.ranking.rank(), n: self.count(progress).max(1) })
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::sampling::types::Rank;
    use crate::sampling::unmask::testing::block;

    fn rule(steps: usize) -> Timestep {
        Timestep { ranking: Rank::Confidence.into(), times: Times::new(NonZeroUsize::new(steps).unwrap(), 1e-3).unwrap() }
    }

    /// Counts of the integer schedule in Dream's `generation_utils.py`, f32 arithmetic included.
    #[test]
    fn counts_are_dreams() {
        let counts = |length: usize, steps: usize| {
            let mut masks = length;
            (0..steps)
                .map(|step| {
                    let n = rule(steps).quota(block(length, masks, step)).unwrap();
                    masks -= n;
                    n
                })
                .collect::<Vec<_>>()
        };
        for length in [32, 64, 128, 256, 512] {
            let c = counts(length, length);
            assert_eq!((c[0], c[length - 1]), (0, 2), "length {length}");
            assert!(c[1..length - 1].iter().all(|n| *n == 1), "length {length}: {c:?}");
        }
        let c = counts(256, 64);
        assert!(c[0] == 3 && c[63] == 5 && c[1..63].iter().all(|n| *n == 4), "{c:?}");
        let c = counts(127, 32);
        assert_eq!((&c[..3], c[31]), (&[3, 3, 4][..], 5), "{c:?}");
        let c = counts(256, 128);
        assert!(c[0] == 1 && c[127] == 3 && c[1..127].iter().all(|n| *n == 2), "{c:?}");
        // The empty first step runs no forward.
        assert_eq!(rule(32).next_step(block(32, 32, 0), &mut std::iter::empty()), 1);
    }

    /// As a walk over all steps finds it, and for 2^32 steps at once.
    #[test]
    fn empty_steps_are_skipped_without_a_walk() {
        for steps in [1, 2, 5, 33, 1000, 50_000] {
            for masks in [1, 2, 3, 17, 1000] {
                let mut step = 0;
                let mut left: usize = masks;
                while left > 0 {
                    let walked = (step..).find(|step| rule(steps).quota(block(masks, left, *step)) != Some(0)).unwrap();
                    assert_eq!(
                        rule(steps).next_step(block(masks, left, step), &mut std::iter::empty()),
                        walked,
                        "{steps} steps, {left} masks"
                    );
                    left -= rule(steps).quota(block(masks, left, walked)).unwrap();
                    step = walked + 1;
                }
            }
        }
        let last = rule(1 << 32).next_step(block(8, 8, 0), &mut std::iter::empty());
        assert!(last > 4_000_000_000, "{last}");
    }
}
