//! Launcher of `norm`: LayerNorm and RMSNorm over rows, with a residual added first.
#![forbid(unsafe_code)]

use crate::backend::{DType, NormKind};
use crate::cuda::context::CudaContext;
use crate::cuda::driver::interface::{Address, Build, Launch};
use crate::cuda::params::params;
use crate::error::Result;

const THREADS: u32 = 256;

params! {
    /// `norm`: entries `norm_layer_f32`, `norm_layer_bf16`, `norm_rms_f32` and `norm_rms_bf16` by
    /// the type of the output.
    NormParams, 48 bytes {
        /// (rows, width) f32.
        x: u64 = 0,
        /// (rows, width) f32, or 0 for none.
        residual: u64 = 8,
        /// (width) f32.
        weight: u64 = 16,
        /// (width) f32, or 0 for none.
        bias: u64 = 24,
        /// (rows, width) f32 or bf16.
        out: u64 = 32,
        width: u32 = 40,
        eps: f32 = 44,
    }
}

/// The builds of this kernel.
pub(in crate::cuda) fn builds() -> Vec<Build> {
    vec![build()]
}

fn build() -> Build {
    Build { stem: "norm", defines: vec![("THREADS", THREADS)] }
}

/// `out (rows, width) = normalised x * weight + bias`.
pub struct NormOp {
    pub rows: u32,
    pub width: u32,
    pub eps: f32,
    pub x: Address,
    pub weight: Address,
    pub bias: Option<Address>,
    pub out: Address,
    pub out_dtype: DType,
}

/// The norm alone.
pub fn norm(context: &CudaContext, op: &NormOp, kind: NormKind) -> Result<()> {
    add_norm(context, op, kind, None)
}

/// `x += residual (rows, width) f32`, written back, then the norm.
pub fn add_norm(context: &CudaContext, op: &NormOp, kind: NormKind, residual: Option<Address>) -> Result<()> {
    let NormOp { rows, width, eps, x, weight, bias, out, out_dtype } = *op;
    let entry = match (kind, out_dtype) {
        (NormKind::Layer, DType::F32) => "norm_layer_f32",
        (NormKind::Layer, DType::Bf16) => "norm_layer_bf16",
        (NormKind::Rms, DType::F32) => "norm_rms_f32",
        (NormKind::Rms, DType::Bf16) => "norm_rms_bf16",
    };
    let params = NormParams { x, residual: residual.unwrap_or(0), weight, bias: bias.unwrap_or(0), out, width, eps };
    context.launch(build(), entry, Launch::line(rows, THREADS), &params)
}
