//! Remask rules: scores of revealed positions, and which of the positions are masked again.
#![forbid(unsafe_code)]

use crate::sampling::types::{SampledToken, Score};

/// Score of a token by the answer of a scoring forward that was forced to it; `snapshot`: its
/// probability when it was revealed.
pub fn score(score: Score, sampled: &SampledToken, snapshot: f32) -> f64 {
    match score {
        // The probability itself, not its logarithm: what events report.
        Score::Probability => f64::from(sampled.confidence),
        Score::Typicality => f64::from(sampled.log_prob) + f64::from(sampled.entropy),
        Score::Lift => f64::from(sampled.log_prob) - f64::from(snapshot).ln(),
    }
}

/// Positions to mask again: the `floor(ratio * N)` lowest of N scores over the whole sequence, ties
/// to the lower position; ascending.
pub fn remask(ratio: f64, scores: &[(usize, f64)]) -> Vec<usize> {
    let count = ((ratio * scores.len() as f64).floor() as usize).min(scores.len());
    let mut order = scores.to_vec();
    order.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
    let mut chosen: Vec<usize> = order[..count].iter().map(|(position, _)| *position).collect();
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remask_takes_the_floor_of_the_lowest_with_stable_ties() {
        let scores = [(5, 0.3), (6, 0.1), (7, 0.3), (8, 0.9), (9, 0.3)];
        assert_eq!(remask(0.5, &scores), [5, 6]);
        assert_eq!(remask(0.6, &scores), [5, 6, 7], "ties at 0.3: lower positions first");
        assert_eq!(remask(0.19, &scores), Vec::<usize>::new());
        assert_eq!(remask(1.0, &scores), [5, 6, 7, 8, 9]);
        assert_eq!(remask(1.0, &[]), Vec::<usize>::new());
    }
}
