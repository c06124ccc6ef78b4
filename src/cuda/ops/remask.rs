//! Launcher of `remask`: the lowest snapshot confidences of each sequence are masked again, on the
//! device.
#![forbid(unsafe_code)]

use crate::cuda::context::CudaContext;
use crate::cuda::driver::interface::{Build, Launch};
use crate::cuda::params::params;
use crate::error::Result;

const THREADS: u32 = 256;

params! {
    /// `remask`: one entry. N is the number of positions of all sequences, S the number of
    /// sequences.
    RemaskParams, 80 bytes {
        /// (S + 1) u32 offsets of the sequences in the canvas arrays.
        indptr: u64 = 0,
        /// (S) u32 positions wanted.
        count: u64 = 8,
        /// (N) u32.
        token: u64 = 16,
        /// (N) f32 snapshot confidence; 0 where nothing is revealed.
        confidence: u64 = 24,
        /// (N) u8, see [`state`].
        state: u64 = 32,
        /// (N) u8 stage that sampled the position.
        stage: u64 = 40,
        /// (N) u32 step that unmasked it; 0 where nothing is revealed.
        step: u64 = 48,
        /// (N) u32 out: positions taken, ascending within each sequence, from its offset.
        positions: u64 = 56,
        /// (S) u32 out: how many were taken.
        taken: u64 = 64,
        mask_id: u32 = 72,
        next_stage: u32 = 76,
    }
}

/// States of a canvas position on the device, the `STATE_*` of `kernels/canvas.cuh` and the
/// variants of `canvas::State`.
pub mod state {
    pub const FIXED: u8 = 0;
    pub const MASKED: u8 = 1;
    pub const REVEALED: u8 = 2;
}

/// The builds of this kernel.
pub(in crate::cuda) fn builds() -> Vec<Build> {
    vec![build()]
}

fn build() -> Build {
    Build { stem: "remask", defines: vec![("THREADS", THREADS)] }
}

/// One CTA for each of `num_sequences`.
pub fn remask(context: &CudaContext, num_sequences: u32, params: &RemaskParams) -> Result<()> {
    context.launch(build(), "remask", Launch::line(num_sequences, THREADS), params)
}
