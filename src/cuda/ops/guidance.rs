//! Launcher of `guidance`: what guidance makes of two rows.
#![forbid(unsafe_code)]

use crate::cuda::context::CudaContext;
use crate::cuda::driver::interface::{Address, Build, Launch};
use crate::cuda::params::params;
use crate::error::Result;

const THREADS: u32 = 256;

params! {
    /// `guidance`: one entry.
    GuidanceParams, 24 bytes {
        /// (len) f32.
        base: u64 = 0,
        /// (len) f32, in and out.
        out: u64 = 8,
        len: u32 = 16,
        scale: f32 = 20,
    }
}

/// The builds of this kernel.
pub(in crate::cuda) fn builds() -> Vec<Build> {
    vec![build()]
}

fn build() -> Build {
    Build { stem: "guidance", defines: vec![("THREADS", THREADS)] }
}

/// `out[i] = base[i] + scale * (out[i] - base[i])` for `len` f32 elements.
pub fn apply_guidance(context: &CudaContext, len: u32, scale: f32, base: Address, out: Address) -> Result<()> {
    assert!(len <= u32::MAX - THREADS, "{len} elements: more than a launch numbers");
    context.launch(build(), "guidance", Launch::line(len.div_ceil(THREADS), THREADS), &GuidanceParams { base, out, len, scale })
}
