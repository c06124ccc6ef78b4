//! `threshold:T`: everything that reaches a confidence.
#![forbid(unsafe_code)]

use crate::error::Result;
use crate::sampling::types::{Rank, UnmaskStep};
use crate::sampling::unmask::candidate::{BlockProgress, Candidate};
use crate::sampling::unmask::ranking::Ranking;
use crate::sampling::unmask::rule::{Unmask, UnmaskRow, UnmaskRule};
use crate::sampling::unmask::values::{number, probability};

/// Unmasks every position with confidence >= the threshold, and always the most confident
/// (Fast-dLLM).
#[derive(Clone, Copy, Debug)]
pub struct Threshold(f32);

/// Row of the table of rules.
pub const ROW: UnmaskRow = UnmaskRow {
    name: "threshold",
    argument: "T",
    keys: &[],
    doc: "every position with confidence T or more, and always the most confident (Fast-dLLM)",
    parse: |arguments| Ok(Unmask::new(Threshold::new(number(arguments.value)?)?)),
};

impl Threshold {
    /// Errors: a threshold outside of 0 to 1.
    pub fn new(threshold: f32) -> Result<Threshold> {
        probability(threshold).map(Threshold)
    }
}

impl UnmaskRule for Threshold {
    fn value(&self) -> String {
        format!("threshold:{}", self.0)
    }

    fn select(&self, _progress: BlockProgress, candidates: &[Candidate]) -> Vec<usize> {
        let order = Ranking::from(Rank::Confidence).best_first(candidates).into_iter().enumerate();
        order.filter(|(i, c)| *i == 0 || candidates[*c].sampled.confidence >= self.0).map(|(_, c)| c).collect()
    }

    fn by_confidence(&self) -> bool {
        true
    }

    fn on_device(&self, _progress: BlockProgress) -> Option<UnmaskStep> {
        Some(UnmaskStep::Threshold(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::unmask::testing::{block, confident};

    #[test]
    fn the_threshold_is_inclusive_and_the_best_always_goes() {
        let pick = |t| Threshold::new(t).unwrap().select(block(3, 3, 0), &confident(&[0.5, 0.8, 0.79]));
        assert_eq!(pick(0.8), [1]);
        assert_eq!(pick(0.79), [1, 2]);
        assert_eq!(pick(0.95), [1]);
        assert_eq!(pick(0.0), [1, 2, 0]);
        assert!([-0.1, 1.1, f32::NAN].iter().all(|t| Threshold::new(*t).is_err()));
    }
}
