//! Launcher of `unmask`: which sampled positions take their token now, and their new place on the
//! canvas.
#![forbid(unsafe_code)]

use crate::cuda::context::CudaContext;
use crate::cuda::driver::interface::{Build, Launch};
use crate::cuda::params::params;
use crate::error::Result;

/// One histogram bin per thread.
const THREADS: u32 = 256;

params! {
    /// `unmask`: one entry. S is the number of sequences, N the number of positions of all
    /// sequences.
    UnmaskParams, 64 bytes {
        /// (S) `select_masked::StepRecord`.
        sequences: u64 = 0,
        /// (S) `select_masked::SequenceSummary`.
        summaries: u64 = 8,
        /// `sample::SampledRecord` of all rows; `chosen` is set.
        sampled: u64 = 16,
        /// (N) u32 canvas, as in `remask`.
        token: u64 = 24,
        /// (N) f32.
        confidence: u64 = 32,
        /// (N) u8.
        state: u64 = 40,
        /// (N) u8.
        stage: u64 = 48,
        /// (N) u32.
        step: u64 = 56,
    }
}

/// The builds of this kernel.
pub(in crate::cuda) fn builds() -> Vec<Build> {
    vec![build()]
}

fn build() -> Build {
    Build { stem: "unmask", defines: vec![("THREADS", THREADS)] }
}

/// One CTA for each of `num_sequences`.
pub fn unmask(context: &CudaContext, num_sequences: u32, params: &UnmaskParams) -> Result<()> {
    context.launch(build(), "unmask", Launch::line(num_sequences, THREADS), params)
}
