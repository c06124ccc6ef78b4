//! `entropy-bound:NATS`: lowest entropies first, within a budget.
#![forbid(unsafe_code)]

use crate::error::Result;
use crate::sampling::types::{Rank, UnmaskStep};
use crate::sampling::unmask::candidate::{BlockProgress, Candidate};
use crate::sampling::unmask::ranking::Ranking;
use crate::sampling::unmask::rule::{Unmask, UnmaskRow, UnmaskRule};
use crate::sampling::unmask::values::{not_negative, number};

/// Unmasks lowest entropies first while the sum of all but the largest so far is at most the bound,
/// in nats.
#[derive(Clone, Copy, Debug)]
pub struct EntropyBound(f32);

/// Row of the table of rules.
pub const ROW: UnmaskRow = UnmaskRow {
    name: "entropy-bound",
    argument: "NATS",
    keys: &[],
    doc: "lowest entropies first while the sum of all but the largest is at most NATS",
    parse: |arguments| Ok(Unmask::new(EntropyBound::new(number(arguments.value)?)?)),
};

impl EntropyBound {
    /// Errors: a bound that is negative or not finite.
    pub fn new(nats: f32) -> Result<EntropyBound> {
        not_negative(nats).map(EntropyBound)
    }
}

impl UnmaskRule for EntropyBound {
    fn value(&self) -> String {
        format!("entropy-bound:{}", self.0)
    }

    fn select(&self, _progress: BlockProgress, candidates: &[Candidate]) -> Vec<usize> {
        let order = Ranking::from(Rank::Entropy).best_first(candidates);
        let mut sum = 0.0;
        let mut within = |c: &usize| {
            let entropy = f64::from(candidates[*c].sampled.entropy);
            sum += entropy;
            // In ascending order the largest so far is the newest.
            sum - entropy <= f64::from(self.0)
        };
        order.into_iter().enumerate().take_while(|(i, c)| within(c) || *i == 0).map(|(_, c)| c).collect()
    }

    fn on_device(&self, _progress: BlockProgress) -> Option<UnmaskStep> {
        Some(UnmaskStep::EntropyBound(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::unmask::testing::{block, candidates};

    /// Entropies 0.1 0.2 0.4: cumulative minus largest is 0, 0.1, 0.3.
    #[test]
    fn the_bound_is_on_all_but_the_largest() {
        let c = candidates(&[(0.5, 0.0, 0.4, 0.0), (0.5, 0.0, 0.1, 0.0), (0.5, 0.0, 0.2, 0.0)]);
        let pick = |bound| EntropyBound::new(bound).unwrap().select(block(3, 3, 0), &c);
        assert_eq!(pick(0.0), [1]);
        assert_eq!(pick(0.15), [1, 2]);
        assert_eq!(pick(0.35), [1, 2, 0]);
    }
}
