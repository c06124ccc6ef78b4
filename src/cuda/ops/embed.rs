//! Launcher of `embed`: table rows of token ids, and of positions where those are learned, widened
//! to f32.
#![forbid(unsafe_code)]

use crate::backend::DType;
use crate::backend::group_blocks::Bits;
use crate::cuda::context::CudaContext;
use crate::cuda::driver::interface::{Address, Build, Launch};
use crate::cuda::ops::weight::{KINDS, WeightAt, bits_define};
use crate::cuda::params::params;
use crate::error::Result;

const THREADS: u32 = 128;

params! {
    /// `embed`: entries `embed_f32` and `embed_bf16` by the type of the tables' values.
    EmbedParams, 64 bytes {
        /// (T) u32 token ids; the canvas where `index` is given.
        ids: u64 = 0,
        /// (T) u32 places in `ids`, or 0: row t reads `ids[t]`.
        index: u64 = 8,
        /// (vocab, width) f32 or bf16, or blocks.
        table: u64 = 16,
        /// (T, width) f32.
        out: u64 = 24,
        /// (T) u32; read where there is a second table.
        positions: u64 = 32,
        /// (num_positions, width) f32 or bf16, or blocks, or 0.
        position_table: u64 = 40,
        width: u32 = 48,
        vocab: u32 = 52,
        num_positions: u32 = 56,
        padding: u32 = 60,
    }
}

/// The builds of this kernel.
pub(in crate::cuda) fn builds() -> Vec<Build> {
    KINDS.into_iter().map(|bits| build(bits, bits)).collect()
}

fn build(bits: Option<Bits>, position_bits: Option<Bits>) -> Build {
    let defines = vec![("GROUP_BITS", bits_define(bits)), ("POSITION_BITS", bits_define(position_bits)), ("THREADS", THREADS)];
    Build { stem: "embed", defines }
}

/// Positions (rows) u32, a second table of rows by position, and how many it has.
pub type Positions = (Address, WeightAt, u32);

/// `out (rows, width) f32 = table[ids]`, ids through `index` if there is one, plus the rows of
/// `positions` if there are any.
pub struct Embed {
    pub rows: u32,
    pub width: u32,
    pub vocab: u32,
    pub dtype: DType,
    pub ids: Address,
    pub index: Option<Address>,
    pub table: WeightAt,
    pub positions: Option<Positions>,
    pub out: Address,
}

pub fn embed(context: &CudaContext, op: &Embed) -> Result<()> {
    let Embed { rows, width, vocab, dtype, ids, index, table, positions, out } = *op;
    let entry = match dtype {
        DType::F32 => "embed_f32",
        DType::Bf16 => "embed_bf16",
    };
    // Without a second table its kind is that of the first: one build less.
    let (positions, added, num_positions) = positions.unwrap_or((0, WeightAt { address: 0, ..table }, 0));
    let index = index.unwrap_or(0);
    let (build, position_table, table) = (build(table.bits, added.bits), added.address, table.address);
    let params = EmbedParams { ids, index, table, out, positions, position_table, width, vocab, num_positions, padding: 0 };
    context.launch(build, entry, Launch::line(rows, THREADS), &params)
}
