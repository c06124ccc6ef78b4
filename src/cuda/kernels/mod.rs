//! The kernels of this binary: lists and reports, and runs of one kernel alone.
#![forbid(unsafe_code)]

pub(super) mod builds;
pub(super) mod kernel_bench;
pub(super) mod kernel_benches;
pub(super) mod report;
