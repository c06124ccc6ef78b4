//! Launcher of `norm`: LayerNorm over rows.
#![forbid(unsafe_code)]

use super::driver::{Address, Build, Launch};
use super::machine::Machine;
use super::params::params;
use crate::backend::DType;
use crate::error::Result;

const THREADS: u32 = 256;

params! {
    /// `norm`: entries `norm_layer_f32` and `norm_layer_bf16` by the element type of the output.
    NormParams, 40 bytes {
        /// (rows, width) f32.
        x: u64 = 0,
        /// (width) f32.
        weight: u64 = 8,
        /// (width) f32, or 0 for none.
        bias: u64 = 16,
        /// (rows, width) f32 or bf16.
        out: u64 = 24,
        width: u32 = 32,
        eps: f32 = 36,
    }
}

/// The builds of this kernel.
pub(super) fn builds() -> Vec<Build> {
    vec![build()]
}

fn build() -> Build {
    Build { stem: "norm", defines: vec![("THREADS", THREADS)] }
}

/// `out (rows, width) = (x - mean) / sqrt(var + eps) * weight + bias`.
pub struct Norm {
    pub rows: u32,
    pub width: u32,
    pub eps: f32,
    pub x: Address,
    pub weight: Address,
    pub bias: Option<Address>,
    pub out: Address,
    pub out_dtype: DType,
}

pub fn norm(machine: &Machine, op: &Norm) -> Result<()> {
    let Norm { rows, width, eps, x, weight, bias, out, out_dtype } = *op;
    let entry = match out_dtype {
        DType::F32 => "norm_layer_f32",
        DType::Bf16 => "norm_layer_bf16",
    };
    let params = NormParams { x, weight, bias: bias.unwrap_or(0), out, width, eps };
    machine.launch(build(), entry, Launch::line(rows, THREADS), &params)
}
