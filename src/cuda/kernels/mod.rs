//! The kernels of this binary: lists and reports, and runs of one kernel alone.
#![forbid(unsafe_code)]

pub(super) mod builds;
pub(super) mod replay;
pub(super) mod replays;
pub(super) mod report;
