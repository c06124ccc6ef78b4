//! Launcher of `rope_append`: norm and rotation of q and k, and where k and v are kept.
#![forbid(unsafe_code)]

use crate::backend::{DType, HeadShape};
use crate::cuda::context::CudaContext;
use crate::cuda::driver::interface::{Address, Build, Launch};
use crate::cuda::params::params;
use crate::error::Result;

const THREADS: u32 = 128;

/// Slot of a row that is padding: it is left alone and writes nothing.
pub const NO_SLOT: u32 = u32::MAX;

params! {
    /// `rope_append`: entries `rope_append_f32` and `rope_append_bf16` by the element type of the
    /// pages.
    RopeAppendParams, 80 bytes {
        /// (T, (H + 2 K) D) f32: queries, keys, values, head-major. Queries are rewritten in place.
        qkv: u64 = 0,
        /// (T) u32.
        positions: u64 = 8,
        /// (T) u32, or [`NO_SLOT`].
        slots: u64 = 16,
        /// (positions, 2 (R / 2)) f32: cosines, then sines.
        rotations: u64 = 24,
        /// (D) f32, or 0 for none.
        q_norm: u64 = 32,
        /// (D) f32, or 0 for none.
        k_norm: u64 = 40,
        /// (pages, kv heads, page size, D) f32 or bf16.
        keys: u64 = 48,
        /// The same.
        values: u64 = 56,
        rows: u32 = 64,
        num_heads: u32 = 68,
        num_kv_heads: u32 = 72,
        eps: f32 = 76,
    }
}

/// The builds of this kernel.
pub(in crate::cuda) fn builds() -> Vec<Build> {
    // Whole heads, and the half heads of LLaDA2.
    let whole = [32, 64, 96, 128].map(|head_dim| build(head_dim, head_dim, 16));
    let half = [64, 128].map(|head_dim| build(head_dim, head_dim / 2, 16));
    [whole.as_slice(), &half].concat()
}

fn build(head_dim: u32, rotary_dim: u32, page_size: u32) -> Build {
    let defines = vec![("THREADS", THREADS), ("HEAD_DIM", head_dim), ("ROTARY_DIM", rotary_dim), ("PAGE_SIZE", page_size)];
    Build { stem: "rope_append", defines }
}

/// Lanes that share a head: a power of two that takes up to four pairs at a time in one go, up to a
/// warp.
fn lanes(head_dim: u32, rotary_dim: u32) -> u32 {
    let by_four = head_dim.is_multiple_of(8) && rotary_dim.is_multiple_of(8);
    let units = head_dim / 2 / if by_four { 4 } else { 1 };
    units.max(1).next_power_of_two().min(32)
}

fn shape(rows: u32, heads: HeadShape, rotary_dim: u32) -> Launch {
    let HeadShape { num_heads, num_kv_heads, head_dim } = heads;
    let threads = u64::from(rows) * (num_heads + 2 * num_kv_heads) as u64 * u64::from(lanes(head_dim as u32, rotary_dim));
    let ctas = threads.div_ceil(u64::from(THREADS));
    Launch::line(u32::try_from(ctas).ok().filter(|ctas| ctas.checked_mul(THREADS).is_some()).expect("rows of a forward"), THREADS)
}

/// RMS norm of each head of q and k: `x / sqrt(mean(x^2) + eps) * weight`, weights (D) f32.
#[derive(Clone, Copy, Debug)]
pub struct HeadNorm {
    pub q: Address,
    pub k: Address,
    pub eps: f32,
}

/// Norm (where there is one) and rotation of q, in place, and of k; k and v to the slots of one
/// layer.
#[derive(Clone, Copy, Debug)]
pub struct RopeAppend {
    pub rows: u32,
    pub heads: HeadShape,
    /// R, at most D: the elements of a head that are rotated, the first ones.
    pub rotary_dim: usize,
    pub page_size: u32,
    /// Of keys and values.
    pub dtype: DType,
    pub norm: Option<HeadNorm>,
    pub qkv: Address,
    pub positions: Address,
    pub slots: Address,
    /// What [`crate::backend::rope::extend_rotations`] makes, for every position that a row may
    /// have.
    pub rotations: Address,
    /// Of the layer.
    pub keys: Address,
    pub values: Address,
}

pub fn rope_append(context: &CudaContext, op: &RopeAppend) -> Result<()> {
    let RopeAppend { rows, heads, rotary_dim, page_size, dtype, norm, qkv, positions, slots, rotations, keys, values } = *op;
    let entry = match dtype {
        DType::F32 => "rope_append_f32",
        DType::Bf16 => "rope_append_bf16",
    };
    let params = RopeAppendParams {
        qkv,
        positions,
        slots,
        rotations,
        q_norm: norm.map_or(0, |norm| norm.q),
        k_norm: norm.map_or(0, |norm| norm.k),
        keys,
        values,
        rows,
        num_heads: heads.num_heads as u32,
        num_kv_heads: heads.num_kv_heads as u32,
        eps: norm.map_or(0.0, |norm| norm.eps),
    };
    let rotary_dim = rotary_dim as u32;
    context.launch(build(heads.head_dim as u32, rotary_dim, page_size), entry, shape(rows, heads, rotary_dim), &params)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_of_a_head() {
        let whole = |head_dim| lanes(head_dim, head_dim);
        assert_eq!([1, 2, 7, 8, 16, 32, 64, 96, 128, 250, 256].map(whole), [1, 1, 4, 1, 2, 4, 8, 16, 16, 32, 32]);
        // A part that is no multiple of 8 goes pair by pair.
        assert_eq!([0, 4, 8, 12, 16].map(|rotary_dim| lanes(16, rotary_dim)), [2, 8, 2, 8, 2]);
    }

    #[test]
    fn every_head_has_its_lanes() {
        let heads = HeadShape { num_heads: 12, num_kv_heads: 4, head_dim: 64 };
        assert_eq!([0, 1, 4, 5].map(|rows| shape(rows, heads, 64).grid[0]), [0, 2, 5, 7]);
        assert_eq!(shape(1024, heads, 64), Launch::line(1280, THREADS));
    }
}
