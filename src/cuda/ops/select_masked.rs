//! Launcher of `select_masked`: the masked positions of each sequence's range as rows of the plan
//! and as draws; and the records of a sequence that `unmask` reads as well.
#![forbid(unsafe_code)]

use crate::cuda::context::CudaContext;
use crate::cuda::driver::interface::{Address, Build, Launch};
use crate::cuda::params::params;
use crate::error::Result;
use crate::sampling::{Rank, UnmaskStep};

const THREADS: u32 = 256;

params! {
    /// One sequence's part of a step on the device. Its plan rows are consecutive positions.
    StepRecord, 80 bytes {
        seed: u64 = 0,
        /// Place of position 0 in the canvas arrays.
        canvas_first: u32 = 8,
        /// Its masked positions are sampled, up to `range_end`.
        range_begin: u32 = 12,
        range_end: u32 = 16,
        /// Plan row with the logits of position `rows_begin`; the next row is that of the next
        /// position.
        row_first: u32 = 20,
        rows_begin: u32 = 24,
        /// Place of its first sampled row among all.
        sample_first: u32 = 28,
        /// How many there are, as the host predicts.
        sample_count: u32 = 32,
        sample: u32 = 36,
        stage: u32 = 40,
        block: u32 = 44,
        step: u32 = 48,
        /// Of every draw, as in `DrawRecord`.
        temperature: f32 = 52,
        top_p: f32 = 56,
        flags: u32 = 60,
        /// See [`StepRecord::unmasking`].
        rule: u32 = 64,
        rank: u32 = 68,
        n: u32 = 72,
        bound: f32 = 76,
    }
}

impl StepRecord {
    /// The same with its unmask rule: the `RULE_*` and `RANK_*` of `kernels/canvas.cuh`.
    pub fn unmasking(self, unmask: &UnmaskStep) -> StepRecord {
        let rank = |rank: Rank| match rank {
            Rank::Uniform => 0,
            Rank::Confidence => 1,
            Rank::Margin => 2,
            Rank::Entropy => 3,
            Rank::Left => 4,
        };
        match *unmask {
            // More than there can be is as good as all.
            UnmaskStep::Best { rank: by, n } => {
                StepRecord { rule: 0, rank: rank(by), n: u32::try_from(n).unwrap_or(u32::MAX), bound: 0.0, ..self }
            }
            UnmaskStep::Threshold(bound) => StepRecord { rule: 1, rank: 0, n: 0, bound, ..self },
            UnmaskStep::EntropyBound(bound) => StepRecord { rule: 2, rank: 0, n: 0, bound, ..self },
        }
    }
}

params! {
    /// What became of a sequence, over the steps of a run. Zeros at its start; the first error
    /// stays, and nothing of the sequence is revealed from there on.
    SequenceSummary, 16 bytes {
        /// See [`step_error`].
        error: u32 = 0,
        detail: u32 = 4,
        /// Rows sampled in the last step.
        sampled: u32 = 8,
        /// How many of them were revealed.
        revealed: u32 = 12,
    }
}

/// Values of [`SequenceSummary::error`], the `ERROR_*` of `kernels/canvas.cuh`.
pub mod step_error {
    pub const NONE: u32 = 0;
    /// Other masks than the host predicted; the detail is their number.
    pub const COUNT: u32 = 1;
    /// A row could not be sampled, see its record; the detail is the lowest such row, counted
    /// within the sequence.
    pub const SAMPLING: u32 = 2;
    /// A confidence, margin or entropy is NaN; the detail as above.
    pub const NAN: u32 = 3;
}

params! {
    /// `select_masked`: one entry. S is the number of sequences.
    SelectMaskedParams, 56 bytes {
        /// (S) [`StepRecord`].
        sequences: u64 = 0,
        /// Canvas, u8: see `remask::state`.
        state: u64 = 8,
        /// (S) [`SequenceSummary`].
        summaries: u64 = 16,
        /// (bucket) u32 out: plan rows.
        rows: u64 = 24,
        /// (bucket) `sample::DrawRecord` out.
        draws: u64 = 32,
        sequences_count: u32 = 40,
        /// Of all sequences, as the host predicts; the rest of the bucket is padding.
        sample_count: u32 = 44,
        bucket: u32 = 48,
        padding: u32 = 52,
    }
}

/// The builds of this kernel.
pub(in crate::cuda) fn builds() -> Vec<Build> {
    vec![build()]
}

fn build() -> Build {
    Build { stem: "select_masked", defines: vec![("THREADS", THREADS)] }
}

/// The sampled rows of `sequences` sequences, `num_sampled` together, and padding up to `bucket`.
pub struct SelectMasked {
    pub sequences: u32,
    pub num_sampled: u32,
    pub bucket: u32,
    /// (sequences) [`StepRecord`].
    pub steps: Address,
    /// (sequences) [`SequenceSummary`].
    pub summaries: Address,
    /// Canvas states.
    pub state: Address,
    /// (bucket) u32 out.
    pub rows: Address,
    /// (bucket) `sample::DrawRecord` out.
    pub draws: Address,
}

pub fn select_masked(context: &CudaContext, op: &SelectMasked) -> Result<()> {
    let SelectMasked { sequences, num_sampled, bucket, steps, summaries, state, rows, draws } = *op;
    assert!(num_sampled <= bucket, "{num_sampled} num_sampled in a bucket of {bucket}");
    let params = SelectMaskedParams {
        sequences: steps,
        state,
        summaries,
        rows,
        draws,
        sequences_count: sequences,
        sample_count: num_sampled,
        bucket,
        padding: 0,
    };
    context.launch(build(), "select_masked", launch(sequences), &params)
}

/// One CTA more than there are sequences: it writes the padding.
fn launch(sequences: u32) -> Launch {
    Launch::line(sequences + 1, THREADS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_padding_has_a_cta_of_its_own() {
        assert_eq!(launch(0).grid, [1, 1, 1]);
        assert_eq!(launch(7).grid, [8, 1, 1]);
    }

    #[test]
    fn rules_keep_their_numbers() {
        let of = |unmask: &UnmaskStep| {
            let step = StepRecord { seed: 9, ..StepRecord::default() }.unmasking(unmask);
            assert_eq!(step.seed, 9);
            (step.rule, step.rank, step.n, step.bound)
        };
        assert_eq!(of(&UnmaskStep::Best { rank: Rank::Left, n: usize::MAX }), (0, 4, u32::MAX, 0.0));
        assert_eq!(of(&UnmaskStep::Best { rank: Rank::Uniform, n: 3 }), (0, 0, 3, 0.0));
        assert_eq!(of(&UnmaskStep::Threshold(0.5)), (1, 0, 0, 0.5));
        assert_eq!(of(&UnmaskStep::EntropyBound(0.25)), (2, 0, 0, 0.25));
    }
}
