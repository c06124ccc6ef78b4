//! Candidates and blocks for the tests of the rules.

use crate::sampling::types::SampledToken;
use crate::sampling::unmask::candidate::{BlockProgress, Candidate};

/// Of (confidence, margin, entropy, order), at the positions from 10 on.
pub fn candidates(rows: &[(f32, f32, f32, f64)]) -> Vec<Candidate> {
    let of = |(i, &(confidence, margin, entropy, order)): (usize, &(f32, f32, f32, f64))| Candidate {
        position: 10 + i,
        sampled: SampledToken { token: 0, confidence, log_prob: confidence.ln(), margin, entropy },
        order,
    };
    rows.iter().enumerate().map(of).collect()
}

/// Of confidences alone.
pub fn confident(values: &[f32]) -> Vec<Candidate> {
    candidates(&values.iter().map(|c| (*c, 0.0, 0.0, 0.0)).collect::<Vec<_>>())
}

/// A block that is as long as its masks were at first.
pub fn block(masks_at_start: usize, masks: usize, step: usize) -> BlockProgress {
    BlockProgress { block_len: masks_at_start, masks_at_start, masks, step }
}
