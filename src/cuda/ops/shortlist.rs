//! Launchers of `shortlist` and `sample_shortlist`: the most probable ids of each row, and the
//! token choice among them.
//!
//! Lists stay on the device. Every one takes the same number of ids; a shorter one ends with
//! [`NO_ID`].
#![forbid(unsafe_code)]

use crate::backend::group_blocks::Bits;
use crate::backend::{DType, Epilogue};
use crate::cuda::context::CudaContext;
use crate::cuda::driver::interface::{Address, Build, Launch};
use crate::cuda::ops::linear;
use crate::cuda::ops::linear::Linear;
use crate::cuda::ops::sample::{CHUNK_BYTES, chunk_rows};
use crate::cuda::ops::weight::{KINDS, WeightAt, bits_define};
use crate::cuda::params::params;
use crate::error::Result;

/// An id that no vocabulary has: the rest of a list, the `NO_ID` of `kernels/sample.cuh`.
pub const NO_ID: u32 = u32::MAX;
/// Ids that a list may hold, MAX_SHORTLIST in `kernels/sample_shortlist.cu`: 24 KiB of shared
/// memory.
pub const MAX_SHORTLIST: u32 = 1024;
/// Threads of both, a row.
const THREADS: u32 = 256;

params! {
    /// `shortlist`: one entry.
    ShortlistParams, 32 bytes {
        /// (rows, vocab) f32.
        logits: u64 = 0,
        /// A bit for every id, or 0 for none.
        banned: u64 = 8,
        /// (rows, count) u32 out.
        ids: u64 = 16,
        vocab: u32 = 24,
        count: u32 = 28,
    }
}

params! {
    /// `sample_shortlist`: entries `sample_shortlist_f32` and `sample_shortlist_bf16` by the type
    /// of hidden.
    SampleShortlistParams, 64 bytes {
        /// (rows, k) f32 or bf16.
        hidden: u64 = 0,
        /// (vocab, k), the same type or blocks.
        head: u64 = 8,
        /// (vocab) f32, or 0 for none.
        bias: u64 = 16,
        /// (lists, count) u32.
        ids: u64 = 24,
        /// (rows) u32.
        which: u64 = 32,
        /// (rows) [`DrawRecord`](crate::cuda::ops::sample::DrawRecord).
        draws: u64 = 40,
        /// (rows) `SampledRecord`.
        sampled: u64 = 48,
        count: u32 = 56,
        k: u32 = 60,
    }
}

fn shortlist_build() -> Build {
    Build { stem: "shortlist", defines: vec![("THREADS", THREADS)] }
}

fn sample_shortlist_build(bits: Option<Bits>) -> Build {
    let defines = vec![("GROUP_BITS", bits_define(bits)), ("THREADS", THREADS), ("MAX_SHORTLIST", MAX_SHORTLIST)];
    Build { stem: "sample_shortlist", defines }
}

/// The builds of these kernels.
pub(in crate::cuda) fn builds() -> Vec<Build> {
    [shortlist_build()].into_iter().chain(KINDS.map(sample_shortlist_build)).collect()
}

/// `ids[r]` = the `count` largest logits of `hidden[r] head^T + bias`.
pub struct ShortlistOp {
    pub rows: u32,
    pub k: u32,
    pub vocab: u32,
    /// (rows, k) of `dtype`.
    pub hidden: Address,
    /// Of hidden, and of a head of floats.
    pub dtype: DType,
    /// (vocab, k).
    pub head: WeightAt,
    /// (vocab) f32.
    pub bias: Option<Address>,
    /// (vocab) bits, in whole words.
    pub banned: Option<Address>,
    /// At most [`MAX_SHORTLIST`].
    pub count: u32,
    /// (rows, count) u32 out.
    pub ids: Address,
}

pub fn shortlist(context: &CudaContext, op: &ShortlistOp) -> Result<()> {
    shortlist_in(context, op, CHUNK_BYTES)
}

/// [`shortlist`] with another bound on the bytes of a chunk, for tests.
pub fn shortlist_in(context: &CudaContext, op: &ShortlistOp, chunk_bytes: usize) -> Result<()> {
    let ShortlistOp { rows, k, vocab, hidden, dtype, head, bias, banned, count, ids } = *op;
    assert!(vocab > 0 && k > 0 && (1..=MAX_SHORTLIST).contains(&count), "lists of {count} from a head of {vocab} rows of {k}");
    let row_bytes = vocab as usize * 4;
    let chunk = chunk_rows(rows, row_bytes, chunk_bytes).max(1);
    // `linear` takes what it needs from the front of the same workspace.
    let front = [chunk.min(rows), rows % chunk].map(|rows| linear::workspace_bytes(context, rows, vocab, k));
    let front = front[0].max(front[1]).next_multiple_of(256);
    let logits = context.workspace(front + chunk.min(rows) as usize * row_bytes)? + front as u64;
    for first in (0..rows).step_by(chunk as usize) {
        let rows = chunk.min(rows - first);
        let x = hidden + u64::from(first) * u64::from(k) * dtype.bytes() as u64;
        let out_dtype = DType::F32;
        let product = Linear { rows, n: vocab, k, dtype, x, weight: head, bias, epilogue: Epilogue::Store, out: logits, out_dtype };
        linear::linear(context, &product)?;
        let ids = ids + 4 * u64::from(first) * u64::from(count);
        let params = ShortlistParams { logits, banned: banned.unwrap_or(0), ids, vocab, count };
        context.launch(shortlist_build(), "shortlist", Launch::line(rows, THREADS), &params)?;
    }
    Ok(())
}

/// `sampled[r] = sample_row` of the logits of list `which[r]`, under `draws[r]`.
pub struct SampleShortlistOp {
    pub rows: u32,
    pub k: u32,
    /// (rows, k) of `dtype`.
    pub hidden: Address,
    /// Of hidden, and of a head of floats.
    pub dtype: DType,
    /// (vocab, k).
    pub head: WeightAt,
    /// (vocab) f32.
    pub bias: Option<Address>,
    /// Capacity of a list in ids, at most [`MAX_SHORTLIST`].
    pub count: u32,
    /// (lists, count) u32.
    pub ids: Address,
    /// (rows) u32.
    pub which: Address,
    /// (rows) [`DrawRecord`](crate::cuda::ops::sample::DrawRecord).
    pub draws: Address,
    /// (rows) `SampledRecord` out.
    pub sampled: Address,
}

pub fn sample_shortlist(context: &CudaContext, op: &SampleShortlistOp) -> Result<()> {
    let SampleShortlistOp { rows, k, hidden, dtype, head, bias, count, ids, which, draws, sampled } = *op;
    assert!(k > 0 && (1..=MAX_SHORTLIST).contains(&count), "lists of {count} of a head of {k} columns");
    let entry = match dtype {
        DType::F32 => "sample_shortlist_f32",
        DType::Bf16 => "sample_shortlist_bf16",
    };
    let params = SampleShortlistParams { hidden, head: head.address, bias: bias.unwrap_or(0), ids, which, draws, sampled, count, k };
    context.launch(sample_shortlist_build(head.bits), entry, Launch::line(rows, THREADS), &params)
}
