//! `above:T`: everything that exceeds a confidence, and a quota at least.
#![forbid(unsafe_code)]

use std::num::NonZeroUsize;

use crate::error::Result;
use crate::sampling::types::{Rank, UnmaskStep};
use crate::sampling::unmask::candidate::{BlockProgress, Candidate};
use crate::sampling::unmask::ranking::Ranking;
use crate::sampling::unmask::rule::{Unmask, UnmaskRow, UnmaskRule};
use crate::sampling::unmask::values::{next_share, number, probability, share};

/// Unmasks every position with confidence > the bound, and at least the most confident ones of the
/// quota of [`Fixed`](crate::sampling::unmask::Fixed) over `steps`, or one without `steps` (SDAR
/// `low_confidence_dynamic`, Fast-dLLM v2).
#[derive(Clone, Copy, Debug)]
pub struct Above {
    bound: f32,
    steps: Option<NonZeroUsize>,
}

/// Row of the table of rules.
pub const ROW: UnmaskRow = UnmaskRow {
    name: "above",
    argument: "T",
    keys: &["steps"],
    doc: "every position with confidence above T, and always the most confident (Fast-dLLM v2); with `steps=S`, at least the quota of `fixed:S` (SDAR)",
    parse: |arguments| Ok(Unmask::new(Above::new(number(arguments.value)?, arguments.steps)?)),
};

impl Above {
    /// Errors: a bound outside of 0 to 1.
    pub fn new(bound: f32, steps: Option<NonZeroUsize>) -> Result<Above> {
        Ok(Above { bound: probability(bound)?, steps })
    }

    fn least(&self, progress: BlockProgress) -> usize {
        self.steps.map_or(1, |steps| share(progress.block_len, steps.get(), progress.step))
    }
}

impl UnmaskRule for Above {
    fn value(&self) -> String {
        format!("above:{}", self.bound)
    }

    fn keys(&self) -> Vec<(&'static str, String)> {
        self.steps.map(|steps| ("steps", steps.to_string())).into_iter().collect()
    }

    fn select(&self, progress: BlockProgress, candidates: &[Candidate]) -> Vec<usize> {
        let least = self.least(progress).max(1);
        let order = Ranking::from(Rank::Confidence).best_first(candidates).into_iter().enumerate();
        order.filter(|(i, c)| *i < least || candidates[*c].sampled.confidence > self.bound).map(|(_, c)| c).collect()
    }

    fn quota(&self, progress: BlockProgress) -> Option<usize> {
        Some(self.least(progress))
    }

    fn by_confidence(&self) -> bool {
        true
    }

    fn next_step(&self, progress: BlockProgress, _times: &mut dyn Iterator<Item = f64>) -> usize {
        self.steps.map_or(progress.step, |steps| next_share(progress.block_len, steps.get(), progress.step))
    }

    fn on_device(&self, progress: BlockProgress) -> Option<UnmaskStep> {
        // The least f32 that is above the bound reaches it.
        (self.least(progress) <= 1).then(|| UnmaskStep::Threshold(self.bound.next_up()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::unmask::testing::{block, confident};

    #[test]
    fn the_bound_is_strict_and_the_quota_is_the_least() {
        let c = confident(&[0.5, 0.8, 0.79, 0.1, 0.9]);
        let pick = |bound, steps: Option<usize>, step| {
            let mut chosen = Above::new(bound, steps.and_then(NonZeroUsize::new))
                .unwrap()
                .select(BlockProgress { block_len: 8, ..block(5, 5, step) }, &c);
            chosen.sort_unstable();
            chosen
        };
        assert_eq!([pick(0.8, None, 0), pick(0.79, None, 0), pick(0.95, None, 7)], [vec![4], vec![1, 4], vec![4]]);
        assert_eq!([pick(0.8, Some(3), 0), pick(0.95, Some(3), 2), pick(0.4, Some(3), 2)], [vec![1, 2, 4], vec![1, 4], vec![0, 1, 2, 4]]);
        assert_eq!(pick(0.95, Some(1), 0), [0, 1, 2, 3, 4], "all that is masked");
    }
}
