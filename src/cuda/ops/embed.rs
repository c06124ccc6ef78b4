//! Launcher of `embed`: table rows of token ids, and of positions where those are learned, widened
//! to f32.
#![forbid(unsafe_code)]

use crate::backend::DType;
use crate::cuda::context::CudaContext;
use crate::cuda::driver::interface::{Address, Build, Launch};
use crate::cuda::params::params;
use crate::error::Result;

const THREADS: u32 = 128;

params! {
    /// `embed`: entries `embed_f32` and `embed_bf16` by the element type of the table.
    EmbedParams, 64 bytes {
        /// (T) u32 token ids; the canvas where `index` is given.
        ids: u64 = 0,
        /// (T) u32 places in `ids`, or 0: row t reads `ids[t]`.
        index: u64 = 8,
        /// (vocab, width) f32 or bf16.
        table: u64 = 16,
        /// (T, width) f32.
        out: u64 = 24,
        /// (T) u32; read where there is a second table.
        positions: u64 = 32,
        /// (num_positions, width) f32 or bf16, or 0.
        position_table: u64 = 40,
        width: u32 = 48,
        vocab: u32 = 52,
        num_positions: u32 = 56,
        padding: u32 = 60,
    }
}

/// The builds of this kernel.
pub(in crate::cuda) fn builds() -> Vec<Build> {
    vec![build()]
}

fn build() -> Build {
    Build { stem: "embed", defines: vec![("THREADS", THREADS)] }
}

/// Positions (rows) u32, a second table of rows by position, and how many it has.
pub type Positions = (Address, Address, u32);

/// `out (rows, width) f32 = table[ids]`, ids through `index` if there is one, plus the rows of
/// `positions` if there are any.
pub struct Embed {
    pub rows: u32,
    pub width: u32,
    pub vocab: u32,
    pub dtype: DType,
    pub ids: Address,
    pub index: Option<Address>,
    pub table: Address,
    pub positions: Option<Positions>,
    pub out: Address,
}

pub fn embed(context: &CudaContext, op: &Embed) -> Result<()> {
    let Embed { rows, width, vocab, dtype, ids, index, table, positions, out } = *op;
    let entry = match dtype {
        DType::F32 => "embed_f32",
        DType::Bf16 => "embed_bf16",
    };
    let (positions, position_table, num_positions) = positions.unwrap_or((0, 0, 0));
    let index = index.unwrap_or(0);
    let params = EmbedParams { ids, index, table, out, positions, position_table, width, vocab, num_positions, padding: 0 };
    context.launch(build(), entry, Launch::line(rows, THREADS), &params)
}
