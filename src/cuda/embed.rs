//! Launcher of `embed`: table rows of token ids, widened to f32.
#![forbid(unsafe_code)]

use super::driver::{Address, Build, Launch};
use super::machine::Machine;
use super::params::params;
use crate::backend::DType;
use crate::error::Result;

const THREADS: u32 = 128;

params! {
    /// `embed`: entries `embed_f32` and `embed_bf16` by the element type of the table.
    EmbedParams, 40 bytes {
        /// (T) u32 token ids; the canvas where `index` is given.
        ids: u64 = 0,
        /// (T) u32 places in `ids`, or 0: row t reads `ids[t]`.
        index: u64 = 8,
        /// (vocab, width) f32 or bf16.
        table: u64 = 16,
        /// (T, width) f32.
        out: u64 = 24,
        width: u32 = 32,
        vocab: u32 = 36,
    }
}

/// The builds of this kernel.
pub(super) fn builds() -> Vec<Build> {
    vec![build()]
}

fn build() -> Build {
    Build { stem: "embed", defines: vec![("THREADS", THREADS)] }
}

/// `out (rows, width) f32 = table[ids]`, ids through `index` if there is one.
pub struct Embed {
    pub rows: u32,
    pub width: u32,
    pub vocab: u32,
    pub dtype: DType,
    pub ids: Address,
    pub index: Option<Address>,
    pub table: Address,
    pub out: Address,
}

pub fn embed(machine: &Machine, op: &Embed) -> Result<()> {
    let Embed { rows, width, vocab, dtype, ids, index, table, out } = *op;
    let entry = match dtype {
        DType::F32 => "embed_f32",
        DType::Bf16 => "embed_bf16",
    };
    let params = EmbedParams { ids, index: index.unwrap_or(0), table, out, width, vocab };
    machine.launch(build(), entry, Launch::line(rows, THREADS), &params)
}
