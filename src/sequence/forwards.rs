//! What a sequence needs of a forward: rows to sample, foreseen steps, passes of a joint sampler.
#![forbid(unsafe_code)]

use std::ops::Range;

use crate::backend::SequenceStep;
use crate::plan::Visibility;
use crate::sampling::Draw;
use crate::schedule::{Bans, Eos};

/// One row to sample: an index into the step's rows and how it is sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleRow {
    pub row: usize,
    pub position: usize,
    pub draw: Draw,
    pub(super) order: f64,
}

/// A step as far as it is known before the ones in front of it are sampled.
#[derive(Clone, Debug, PartialEq)]
pub struct LookaheadStep {
    pub part: SequenceStep,
    /// Positions of its rows, ascending.
    pub rows: Vec<usize>,
    pub visibility: Visibility,
    pub len: usize,
    /// Where the stage samples jointly.
    pub joint: Option<LookaheadJoint>,
}

/// What a joint sampler does after a forward that was planned ahead.
#[derive(Clone, Debug, PartialEq)]
pub struct LookaheadJoint {
    /// Positions whose states it carries on, all of them among the rows of the forward.
    pub window: Range<usize>,
    /// Its passes over them, each of which unmasks one token.
    pub passes: Vec<SequenceStep>,
}

/// Tokens that a forward still has to unmask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Round {
    pub(super) left: usize,
    /// Calls of the sampler so far.
    pub(super) calls: u32,
}

/// A call of the sampler for one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct JointPass {
    /// (position, token id) of the window, as it is now.
    pub rows: Vec<(usize, u32)>,
    /// `row` counts within the window.
    pub sample_rows: Vec<SampleRow>,
    pub visibility: Visibility,
    /// Sequence length.
    pub len: usize,
    pub eos: Eos,
    pub bans: Bans,
}
