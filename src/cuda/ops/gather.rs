//! Launcher of `gather`: chosen rows, or all of them, from and to f32 or bf16.
#![forbid(unsafe_code)]

use crate::backend::DType;
use crate::cuda::context::CudaContext;
use crate::cuda::driver::interface::{Address, Build, Launch};
use crate::cuda::params::params;
use crate::error::Result;

const THREADS: u32 = 256;

params! {
    /// `gather`: entries `gather_<from>_<to>` by the types of x and out.
    GatherParams, 32 bytes {
        /// (count) u32 rows of x, or 0: row r.
        rows: u64 = 0,
        /// (.., width) f32 or bf16.
        x: u64 = 8,
        /// (count, width) f32 or bf16.
        out: u64 = 16,
        count: u32 = 24,
        width: u32 = 28,
    }
}

/// The builds of this kernel.
pub(in crate::cuda) fn builds() -> Vec<Build> {
    vec![build()]
}

fn build() -> Build {
    Build { stem: "gather", defines: vec![("THREADS", THREADS)] }
}

/// `out[r, :] = x[rows[r], :]`, or `x[r, :]` without `rows`. Between equal types the bits are
/// copied, so that other 32-bit words pass as f32.
pub struct Gather {
    pub count: u32,
    pub width: u32,
    pub rows: Option<Address>,
    pub x: Address,
    pub x_dtype: DType,
    pub out: Address,
    pub out_dtype: DType,
}

pub fn gather(context: &CudaContext, op: &Gather) -> Result<()> {
    let Gather { count, width, rows, x, x_dtype, out, out_dtype } = *op;
    let entry = match (x_dtype, out_dtype) {
        (DType::F32, DType::F32) => "gather_f32_f32",
        (DType::F32, DType::Bf16) => "gather_f32_bf16",
        (DType::Bf16, DType::F32) => "gather_bf16_f32",
        (DType::Bf16, DType::Bf16) => "gather_bf16_bf16",
    };
    let params = GatherParams { rows: rows.unwrap_or(0), x, out, count, width };
    context.launch(build(), entry, Launch::line(ctas(count, width), THREADS), &params)
}

/// A thread for every four elements of a row.
fn ctas(count: u32, width: u32) -> u32 {
    let quads = u64::from(count) * u64::from(width.div_ceil(4));
    assert!(quads <= u64::from(u32::MAX - THREADS), "{count} rows of {width}: more elements than any machine holds");
    (quads as u32).div_ceil(THREADS)
}

#[cfg(test)]
mod tests {
    use crate::cuda::ops::gather::ctas;

    #[test]
    fn every_quad_has_a_thread() {
        assert_eq!([ctas(0, 768), ctas(3, 0), ctas(1, 1), ctas(256, 1), ctas(257, 4), ctas(4, 768)], [0, 0, 1, 1, 2, 3]);
        assert_eq!(ctas(1 << 18, 1 << 15), 1 << 23);
    }
}
