//! Launcher of `attention`: the work list of a plan, and how much of it runs side by side. No
//! choice made here changes a bit of the result (see the order of operations in
//! `kernels/attention.cu`), so both may follow the machine.
#![forbid(unsafe_code)]

use crate::backend::{DType, HeadShape};
use crate::cuda::context::{COUNTERS, CudaContext};
use crate::cuda::driver::interface::{Address, Build, Launch, Limits};
use crate::cuda::params::params;
use crate::error::{Error, Result};

const THREADS: u32 = 128;

/// Keys of a tile, and of a chunk: the work of a CTA where few queries are at hand.
const TILE_KEYS: u32 = 64;
const CHUNK_KEYS: u32 = 256;

params! {
    /// `attention`: entries `attention_f32`, `attention_bf16_few` and `attention_bf16_many`.
    AttentionParams, 96 bytes {
        /// (T, (H + 2 K) D) f32; queries are the first H D columns.
        qkv: u64 = 0,
        /// (pages, kv heads, page size, D) f32 or bf16.
        keys: u64 = 8,
        /// The same.
        values: u64 = 16,
        /// (T, H D) f32 or bf16.
        out: u64 = 24,
        /// (T) u32.
        visible: u64 = 32,
        /// (tiles) of four words, see [`tiles`].
        tiles: u64 = 40,
        /// (S + 1) u32.
        page_indptr: u64 = 48,
        /// u32.
        pages: u64 = 56,
        /// A record for each tile, K/V head and chunk; unused where chunks is 0.
        partials: u64 = 64,
        /// A zero for each tile and K/V head; unused where chunks is 0.
        counters: u64 = 72,
        num_heads: u32 = 80,
        num_kv_heads: u32 = 84,
        /// Chunks side by side; 0: a CTA walks all of its chunks.
        chunks: u32 = 88,
        /// 0 or 1.
        out_bf16: u32 = 92,
    }
}

/// The builds of this kernel.
pub(in crate::cuda) fn builds() -> Vec<Build> {
    [32, 64, 96, 128].map(|head_dim| build(head_dim, 16)).to_vec()
}

fn build(head_dim: u32, page_size: u32) -> Build {
    Build { stem: "attention", defines: vec![("THREADS", THREADS), ("HEAD_DIM", head_dim), ("PAGE_SIZE", page_size)] }
}

/// How the work is spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Regime {
    /// Small tiles of queries, chunks of keys side by side.
    Few,
    /// Large tiles of queries, each of which walks its keys.
    Many,
}

impl Regime {
    /// The large tiles where they alone give every multiprocessor a CTA.
    pub fn for_batch(limits: &Limits, dtype: DType, heads: HeadShape, indptr: &[u32]) -> Regime {
        let tiles = tiles(indptr, heads, Regime::Many.tile_queries(dtype, heads)).len() as u64;
        if tiles * heads.num_kv_heads as u64 >= u64::from(limits.num_sms) { Regime::Many } else { Regime::Few }
    }

    /// Queries of a tile.
    pub fn tile_queries(self, dtype: DType, heads: HeadShape) -> u32 {
        match (self, dtype) {
            (Regime::Few, _) | (_, DType::F32) => 16,
            // The sums of 64 queries fit into the registers up to D = 128.
            (Regime::Many, DType::Bf16) if heads.head_dim > 128 => 16,
            (Regime::Many, DType::Bf16) => 64,
        }
    }
}

/// The work list of a plan with these row offsets: (sequence, its first row, first query, queries)
/// for each tile. The queries of a sequence are its (row, head of the group) pairs, rows first; a
/// tile never mixes sequences. A list may be padded with zeros.
pub fn tiles(indptr: &[u32], heads: HeadShape, tile_queries: u32) -> Vec<[u32; 4]> {
    let group = (heads.num_heads / heads.num_kv_heads) as u32;
    let of = |(s, rows): (usize, &[u32])| {
        let (first, queries) = (rows[0], (rows[1] - rows[0]) * group);
        (0..queries).step_by(tile_queries as usize).map(move |q| [s as u32, first, q, tile_queries.min(queries - q)])
    };
    indptr.windows(2).enumerate().flat_map(of).collect()
}

/// Tiles of keys or values in shared memory at once, RING of the kernel.
fn ring(head_dim: u32) -> u32 {
    match head_dim {
        ..=64 => 4,
        65..=128 => 3,
        _ => 2,
    }
}

/// What the kernel lays out in dynamic shared memory. bf16: the ring; where a CTA walks, the sums
/// of its finished chunks, in whole fragments of eight columns to a warp; where warps share
/// queries, the weights of a tile. f32: one tile of keys or values, the queries, their weights.
fn shared_bytes(dtype: DType, regime: Regime, heads: HeadShape) -> u32 {
    let (head_dim, tile_queries) = (heads.head_dim as u32, regime.tile_queries(dtype, heads));
    match dtype {
        DType::F32 => 4 * (TILE_KEYS * (head_dim | 1) + tile_queries * (head_dim + TILE_KEYS)),
        DType::Bf16 => {
            let sharers = 64 / tile_queries;
            let totals = if regime == Regime::Many { 16 * THREADS * (head_dim / 8).div_ceil(sharers) } else { 0 };
            let weights = if sharers > 1 { tile_queries * (TILE_KEYS + 8) } else { 0 };
            2 * (ring(head_dim) * TILE_KEYS * head_dim + weights) + totals
        }
    }
}

/// Softmax over the visible keys of each row. Rows that no tile names keep what `out` holds.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    pub heads: HeadShape,
    pub page_size: u32,
    /// Of keys and values, and of the arithmetic.
    pub dtype: DType,
    pub regime: Regime,
    /// (num_tiles) of four words: [`tiles`] of the regime's `tile_queries`.
    pub tiles: Address,
    pub num_tiles: u32,
    /// At least the largest visible end. More costs CTAs that end at once in [`Regime::Few`], and
    /// nothing in [`Regime::Many`].
    pub max_visible: u32,
    pub qkv: Address,
    /// Of the layer.
    pub keys: Address,
    pub values: Address,
    pub visible: Address,
    pub page_indptr: Address,
    pub pages: Address,
    pub out: Address,
    pub out_dtype: DType,
}

impl Attention {
    fn tile_queries(&self) -> u32 {
        self.regime.tile_queries(self.dtype, self.heads)
    }

    /// Chunks that run side by side; 0: none.
    fn chunks(&self) -> u32 {
        match self.regime {
            Regime::Few => self.max_visible.div_ceil(CHUNK_KEYS).max(1),
            Regime::Many => 0,
        }
    }

    fn launch(&self) -> Launch {
        Launch {
            grid: [self.num_tiles, self.heads.num_kv_heads as u32, self.chunks().max(1)],
            block: THREADS,
            shared_bytes: shared_bytes(self.dtype, self.regime, self.heads),
        }
    }

    /// Sums, a maximum and a mass of each query, for every chunk.
    fn partial_bytes(&self) -> usize {
        if self.chunks() < 2 {
            return 0;
        }
        let records = self.num_tiles as usize * self.heads.num_kv_heads * self.chunks() as usize;
        4 * records * self.tile_queries() as usize * (self.heads.head_dim + 2)
    }
}

pub fn attention(context: &CudaContext, op: &Attention) -> Result<()> {
    let HeadShape { num_heads, num_kv_heads, head_dim } = op.heads;
    check(op.dtype, head_dim)?;
    assert!(num_heads.is_multiple_of(num_kv_heads), "{num_heads} heads share {num_kv_heads} K/V heads");
    let chunks = op.chunks();
    assert!(chunks < 2 || op.num_tiles as usize * num_kv_heads <= COUNTERS, "{} tiles of {num_kv_heads} K/V heads", op.num_tiles);
    let entry = match (op.dtype, op.regime) {
        (DType::F32, _) => "attention_f32",
        (DType::Bf16, Regime::Few) => "attention_bf16_few",
        (DType::Bf16, Regime::Many) => "attention_bf16_many",
    };
    let params = AttentionParams {
        qkv: op.qkv,
        keys: op.keys,
        values: op.values,
        out: op.out,
        visible: op.visible,
        tiles: op.tiles,
        page_indptr: op.page_indptr,
        pages: op.pages,
        partials: match op.partial_bytes() {
            0 => 0,
            bytes => context.workspace(bytes)?,
        },
        counters: context.counters(),
        num_heads: num_heads as u32,
        num_kv_heads: num_kv_heads as u32,
        chunks,
        out_bf16: u32::from(op.out_dtype == DType::Bf16),
    };
    context.launch(build(head_dim as u32, op.page_size), entry, op.launch(), &params)
}

/// Which head dimensions the kernel has.
pub fn check(dtype: DType, head_dim: usize) -> Result<()> {
    match dtype {
        DType::F32 if (1..=256).contains(&head_dim) => Ok(()),
        DType::F32 => Err(Error::request(format!("head_dim {head_dim} on a GPU: supported are 1 to 256"))),
        DType::Bf16 if head_dim.is_multiple_of(16) && (16..=256).contains(&head_dim) => Ok(()),
        DType::Bf16 => Err(Error::request(format!(
            "head_dim {head_dim} in bf16 on a GPU: supported are multiples of 16 up to 256; --dtype f32 takes every head_dim up to 256"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GQA: HeadShape = HeadShape { num_heads: 6, num_kv_heads: 2, head_dim: 64 };

    #[test]
    fn tiles_cover_every_query_once_and_never_mix_sequences() {
        assert_eq!(tiles(&[0, 7, 7, 8], GQA, 16), [[0, 0, 0, 16], [0, 0, 16, 5], [2, 7, 0, 3]]);
        assert!(tiles(&[0], GQA, 16).is_empty() && tiles(&[0, 0], GQA, 64).is_empty());
        let indptr = [0, 1, 18, 100, 100, 1000];
        for tile_queries in [16, 64] {
            let mut covered = vec![0; 3000];
            for [s, first, query, queries] in tiles(&indptr, GQA, tile_queries) {
                assert!(first == indptr[s as usize] && queries >= 1 && queries <= tile_queries);
                let end = indptr[s as usize + 1] * 3;
                for i in first * 3 + query..first * 3 + query + queries {
                    assert!(i < end);
                    covered[i as usize] += 1;
                }
            }
            assert!(covered.iter().all(|times| *times == 1));
        }
    }

    #[test]
    fn large_tiles_where_they_fill_the_machine() {
        let limits = Limits { num_sms: 132, shared_per_cta: 0, memory_bytes: 0, free_bytes: 0 };
        let of = |rows: u32, heads: HeadShape| Regime::for_batch(&limits, DType::Bf16, heads, &[0, rows]);
        let heads = |num_heads, num_kv_heads, head_dim| HeadShape { num_heads, num_kv_heads, head_dim };
        // A block of a small model, its full pass; a block of an 8B model, its full pass.
        assert_eq!(of(16, heads(12, 12, 64)), Regime::Few);
        assert_eq!(of(1024, heads(12, 12, 64)), Regime::Many);
        assert_eq!(of(32, heads(32, 8, 128)), Regime::Few);
        assert_eq!(of(1024, heads(32, 8, 128)), Regime::Many);
    }

    #[test]
    fn a_cta_fits_on_the_smallest_machine() {
        let of = |dtype, regime, head_dim| shared_bytes(dtype, regime, HeadShape { num_heads: 1, num_kv_heads: 1, head_dim });
        // 99 KiB, of which a few hundred bytes are static.
        for regime in [Regime::Few, Regime::Many] {
            assert!((1..=256).all(|head_dim| of(DType::F32, regime, head_dim) <= 98 << 10));
            assert!((1..=16).all(|k| of(DType::Bf16, regime, 16 * k) <= 98 << 10));
        }
        assert_eq!(of(DType::Bf16, Regime::Many, 128), (48 + 32) << 10);
        assert_eq!(of(DType::Bf16, Regime::Many, 256), ((64 + 16) << 10) + 16 * 72 * 2);
        assert_eq!(of(DType::Bf16, Regime::Few, 64), (32 << 10) + 16 * 72 * 2);
    }

    #[test]
    fn chunks_run_side_by_side_for_few_queries_only() {
        let op = |regime, max_visible| Attention {
            heads: GQA,
            page_size: 16,
            dtype: DType::Bf16,
            regime,
            tiles: 0,
            num_tiles: 5,
            max_visible,
            qkv: 0,
            keys: 0,
            values: 0,
            visible: 0,
            page_indptr: 0,
            pages: 0,
            out: 0,
            out_dtype: DType::F32,
        };
        assert_eq!(
            [0, 1, 256, 257, 1024].map(|end| op(Regime::Few, end).launch().grid),
            [[5, 2, 1], [5, 2, 1], [5, 2, 1], [5, 2, 2], [5, 2, 4]]
        );
        assert_eq!(op(Regime::Many, 5000).launch().grid, [5, 2, 1]);
        assert_eq!([256, 257].map(|end| op(Regime::Few, end).partial_bytes()), [0, 4 * 5 * 2 * 2 * 16 * 66]);
        assert_eq!(op(Regime::Many, 5000).partial_bytes(), 0);
    }

    #[test]
    fn head_dims_that_are_refused() {
        assert!([1, 7, 64, 256].iter().all(|d| check(DType::F32, *d).is_ok()));
        assert!([16, 48, 96, 256].iter().all(|d| check(DType::Bf16, *d).is_ok()));
        for (dtype, head_dim) in [(DType::F32, 0), (DType::F32, 257), (DType::Bf16, 0), (DType::Bf16, 72), (DType::Bf16, 272)] {
            assert!(check(dtype, head_dim).unwrap_err().to_string().contains(&head_dim.to_string()));
        }
    }
}
