//! One sequence's positions: token, state, snapshot confidence, stage and step that unmasked it.
//!
//! Transitions are the only way in: masked -> revealed ([`Canvas::unmask`]), revealed -> masked
//! ([`Canvas::remask`]), and another token where one was revealed ([`Canvas::edit`]). Fixed
//! positions never change. A broken transition is a bug of ours and asserts.
#![forbid(unsafe_code)]

use std::ops::Range;

/// State of a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Given by the user: prompt or infilling context.
    Fixed,
    /// Holds MASK, or [`crate::plan::NO_MASK`].
    Masked,
    /// Chosen by the model.
    Revealed,
}

/// One sequence, positions counted from 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Canvas {
    mask_id: u32,
    tokens: Vec<u32>,
    state: Vec<State>,
    /// Snapshot confidence: probability of the token at the forward that revealed it, or wrote it
    /// over another. 0 where nothing is revealed.
    confidence: Vec<f32>,
    stage: Vec<u8>,
    step: Vec<u32>,
    masks: usize,
}

impl Canvas {
    /// `Some(token)` is fixed, `None` is to be generated.
    pub fn new(fixed: &[Option<u32>], mask_id: u32) -> Self {
        let len = fixed.len();
        Canvas {
            mask_id,
            tokens: fixed.iter().map(|f| f.unwrap_or(mask_id)).collect(),
            state: fixed.iter().map(|f| if f.is_some() { State::Fixed } else { State::Masked }).collect(),
            confidence: vec![0.0; len],
            stage: vec![0; len],
            step: vec![0; len],
            masks: fixed.iter().filter(|f| f.is_none()).count(),
        }
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Token ids, MASK where masked.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub fn state(&self, position: usize) -> State {
        self.state[position]
    }

    /// Snapshot confidence of a revealed position.
    pub fn confidence(&self, position: usize) -> f32 {
        self.confidence[position]
    }

    /// Stage and step that unmasked it (the stage alone, while masked).
    pub fn revealed_at(&self, position: usize) -> (u8, u32) {
        (self.stage[position], self.step[position])
    }

    /// Positions that hold MASK, over the whole sequence.
    pub fn num_masks(&self) -> usize {
        self.masks
    }

    /// Masked positions within `range`, ascending.
    pub fn masked_in(&self, range: Range<usize>) -> impl Iterator<Item = usize> + '_ {
        range.filter(|p| self.state[*p] == State::Masked)
    }

    /// Positions that are not fixed, ascending.
    pub fn generated(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.len()).filter(|p| self.state[*p] != State::Fixed)
    }

    /// Length of the run of fixed positions at the start.
    pub fn fixed_prefix(&self) -> usize {
        self.state.iter().take_while(|s| **s == State::Fixed).count()
    }

    /// First position at or after `from` that holds a MASK.
    pub fn next_masked(&self, from: usize) -> Option<usize> {
        self.masked_in(from..self.len()).next()
    }

    /// Masked -> revealed. The confidence is written once and kept until the position is remasked.
    pub fn unmask(&mut self, position: usize, token: u32, confidence: f32, stage: u8, step: u32) {
        assert_eq!(self.state[position], State::Masked, "unmask of position {position}");
        assert_ne!(token, self.mask_id, "MASK at position {position}");
        self.tokens[position] = token;
        self.state[position] = State::Revealed;
        self.confidence[position] = confidence;
        self.stage[position] = stage;
        self.step[position] = step;
        self.masks -= 1;
    }

    /// Another token at a revealed position, as if it had been revealed now.
    pub fn edit(&mut self, position: usize, token: u32, confidence: f32, stage: u8, step: u32) {
        assert_eq!(self.state[position], State::Revealed, "edit of position {position}");
        assert_ne!(token, self.mask_id, "MASK written at position {position}");
        self.tokens[position] = token;
        self.confidence[position] = confidence;
        self.stage[position] = stage;
        self.step[position] = step;
    }

    /// Revealed -> masked, for `stage`: the snapshot is cleared.
    pub fn remask(&mut self, position: usize, stage: u8) {
        assert_eq!(self.state[position], State::Revealed, "remask of position {position}");
        self.tokens[position] = self.mask_id;
        self.state[position] = State::Masked;
        self.confidence[position] = 0.0;
        self.stage[position] = stage;
        self.step[position] = 0;
        self.masks += 1;
    }

    /// Drops every position from `len` on (end of text, stop conditions). Fixed positions are never
    /// dropped.
    pub fn truncate(&mut self, len: usize) {
        assert!(self.state[len..].iter().all(|s| *s != State::Fixed), "truncation at {len} drops a fixed position");
        self.masks -= self.state[len..].iter().filter(|s| **s == State::Masked).count();
        self.tokens.truncate(len);
        self.state.truncate(len);
        self.confidence.truncate(len);
        self.stage.truncate(len);
        self.step.truncate(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Any mix of transitions keeps the fixed positions, the mask count, and one snapshot per
        /// revealed token.
        #[test]
        fn transitions_keep_the_invariants(fixed in proptest::collection::vec(proptest::option::of(0u32..9), 1..40), moves in proptest::collection::vec((0usize..40, 0u32..9), 0..80)) {
            let mut canvas = Canvas::new(&fixed, 9);
            for (i, (position, token)) in moves.into_iter().enumerate() {
                let position = position % canvas.len();
                match canvas.state(position) {
                    State::Masked => canvas.unmask(position, token, 0.5, 1, i as u32),
                    State::Revealed if token < 3 => {
                        canvas.edit(position, token, 0.25, 1, i as u32);
                        prop_assert_eq!((canvas.tokens()[position], canvas.confidence(position)), (token, 0.25));
                        prop_assert_eq!(canvas.revealed_at(position), (1, i as u32));
                    }
                    State::Revealed => canvas.remask(position, 2),
                    State::Fixed => {}
                }
                for (p, f) in fixed.iter().enumerate() {
                    prop_assert_eq!(f.is_some(), canvas.state(p) == State::Fixed);
                    if let Some(token) = f {
                        prop_assert_eq!(canvas.tokens()[p], *token);
                    }
                    prop_assert_eq!(canvas.tokens()[p] == 9, canvas.state(p) == State::Masked);
                    prop_assert_eq!(canvas.confidence(p) > 0.0, canvas.state(p) == State::Revealed);
                }
                prop_assert_eq!(canvas.num_masks(), canvas.masked_in(0..canvas.len()).count());
            }
        }
    }

    #[test]
    fn masks_and_prefix() {
        let mut canvas = Canvas::new(&[Some(1), Some(2), None, Some(3), None, None], 9);
        assert_eq!((canvas.fixed_prefix(), canvas.num_masks()), (2, 3));
        assert_eq!([0, 2, 3, 4, 5, 6].map(|from| canvas.next_masked(from)), [Some(2), Some(2), Some(4), Some(4), Some(5), None]);
        canvas.truncate(4);
        assert_eq!((canvas.len(), canvas.num_masks(), canvas.generated().collect::<Vec<_>>()), (4, 1, vec![2]));
    }

    #[test]
    #[should_panic(expected = "unmask of position 0")]
    fn a_fixed_position_cannot_be_revealed() {
        Canvas::new(&[Some(1)], 9).unmask(0, 2, 0.5, 0, 0);
    }
}
