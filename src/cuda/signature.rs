//! What the launches of a step depend on beside the contents of memory: the key of its graph.
#![forbid(unsafe_code)]

use crate::cuda::ops::attention::Regime;
use crate::plan::Plan;

/// Attention's work list for a batch under some heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct TileShape {
    pub regime: Regime,
    pub num_tiles: u32,
}

/// Rows of a step, rounded up so that few graphs serve many lengths: exact where a step is small,
/// as a draft's always are.
pub(super) fn padded(rows: usize) -> usize {
    match rows {
        0..=16 => rows,
        17..=128 => rows.next_multiple_of(8),
        _ => rows.next_multiple_of(32),
    }
}

/// Everything that the launches of a step depend on beside the contents of memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Signature {
    pub forward: PartShape,
    /// The sampled rows alone.
    pub selected: BatchShape,
    pub selected_tiles: TileShape,
    /// Every row is sampled, so none is picked.
    pub all: bool,
    pub joint: Option<JointShape>,
}

/// What the grids depend on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct BatchShape {
    /// Rows that are computed, padding included.
    pub rows: u32,
    pub num_sequences: u32,
    /// How far the longest row sees, in whole chunks of keys.
    pub max_visible: u32,
}

/// A forward, or a pass of a sampler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PartShape {
    pub batch: BatchShape,
    pub tiles: TileShape,
    /// Padded.
    pub num_sampled: u32,
    pub any_fused: bool,
    pub any_nucleus: bool,
    /// Rows of the part before it that it keeps, padded, where it does not keep all.
    pub kept: Option<u32>,
}

/// What a joint sampler does after a forward.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct JointShape {
    /// Padded.
    pub inside: u32,
    pub outside: BatchShape,
    pub passes: Vec<PartShape>,
}

impl BatchShape {
    /// What the launches of a batch depend on.
    pub fn for_plan(plan: &Plan, rows: u32) -> BatchShape {
        let longest = plan.visible.iter().max().copied().unwrap_or(0);
        BatchShape { rows, num_sequences: plan.num_sequences() as u32, max_visible: longest.next_multiple_of(256) }
    }
}
