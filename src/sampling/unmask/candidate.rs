//! What an unmask rule sees: masked positions with their sampled tokens, and the block's progress.
#![forbid(unsafe_code)]

use crate::sampling::types::SampledToken;

/// A masked position of the current block, and the token that this forward sampled for it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Index into the sequence.
    pub position: usize,
    /// Token, confidence, margin and entropy of the position.
    pub sampled: SampledToken,
    /// Uniform in [0, 1) that orders positions at random: one for the position and step, or one for
    /// the position alone where [`draws_times`](crate::sampling::UnmaskRule::draws_times) holds.
    pub order: f64,
}

/// Progress of a block when a forward chooses the positions to unmask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockProgress {
    /// Positions of a whole block, or of a part where the stage decodes blocks in parts (`sub`).
    pub block_len: usize,
    /// Masks that the block held when the stage reached it.
    pub masks_at_start: usize,
    /// Masks that it holds now, at least 1.
    pub masks: usize,
    /// Step of the rule's schedule within the block, from 0.
    pub step: usize,
}
