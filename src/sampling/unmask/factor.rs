//! `factor:F`: more confidence for every further position.
#![forbid(unsafe_code)]

use crate::error::Result;
use crate::sampling::types::Rank;
use crate::sampling::unmask::candidate::{BlockProgress, Candidate};
use crate::sampling::unmask::ranking::Ranking;
use crate::sampling::unmask::rule::{Unmask, UnmaskRow, UnmaskRule};
use crate::sampling::unmask::values::{not_negative, number};

/// Unmasks, of the confidences in descending order, the first, and on from there while the r-th is
/// at least `1 - f / (r + 1)` (Fast-dLLM). As in its code, a last mask that alone falls short goes
/// along.
#[derive(Clone, Copy, Debug)]
pub struct Factor(f32);

/// Row of the table of rules.
pub const ROW: UnmaskRow = UnmaskRow {
    name: "factor",
    argument: "F",
    keys: &[],
    doc: "the most confident, and on while the r-th confidence is `1 - F / (r + 1)` or more (Fast-dLLM)",
    parse: |arguments| Ok(Unmask::new(Factor::new(number(arguments.value)?)?)),
};

impl Factor {
    /// Errors: a factor that is negative or not finite.
    pub fn new(factor: f32) -> Result<Factor> {
        not_negative(factor).map(Factor)
    }
}

impl UnmaskRule for Factor {
    fn value(&self) -> String {
        format!("factor:{}", self.0)
    }

    fn select(&self, _progress: BlockProgress, candidates: &[Candidate]) -> Vec<usize> {
        let mut order = Ranking::from(Rank::Confidence).best_first(candidates);
        // Rank r counts from 1, i from 0; the last position of all is never tested.
        let short = |i: &usize| f64::from(candidates[order[*i]].sampled.confidence) < 1.0 - f64::from(self.0) / (*i + 2) as f64;
        if let Some(n) = (1..order.len().saturating_sub(1)).find(short) {
            order.truncate(n);
        }
        order
    }

    fn by_confidence(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::unmask::testing::{block, confident};

    /// Factor 1: ranks 2, 3, 4 need 1 - 1/3, 1 - 1/4, 1 - 1/5.
    #[test]
    fn every_further_position_needs_more_and_none_is_left_alone() {
        let pick = |values: &[f32], factor| {
            let mut chosen = Factor::new(factor).unwrap().select(block(5, 5, 0), &confident(values));
            chosen.sort_unstable();
            chosen
        };
        assert_eq!(pick(&[0.1, 0.99, 0.7, 0.74, 0.2], 1.0), [1, 3], "0.7 is below 3/4");
        assert_eq!(pick(&[0.1, 0.99, 0.76, 0.74, 0.2], 1.0), [1, 2], "0.74 is below 3/4, though above 2/3");
        assert_eq!(pick(&[0.1, 0.3, 0.2], 1.0), [1]);
        assert_eq!(pick(&[0.1, 0.99, 0.76], 1.0), [0, 1, 2], "the last one goes along");
        assert_eq!((pick(&[0.1, 0.2], 1.0), pick(&[0.1], 0.0)), (vec![0, 1], vec![0]));
        assert_eq!(pick(&[0.1, 0.3, 0.2, 0.15], 9.0), [0, 1, 2, 3]);
    }
}
