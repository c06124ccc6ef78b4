//! Launcher of `linear`: which tile computes a product, and how many CTAs share one along K.
//! Neither changes a bit of the result (see the order of additions in `kernels/gemm.cuh`), so the
//! choice may follow the machine.
#![forbid(unsafe_code)]

use crate::backend::group_blocks::{Bits, COLUMNS};
use crate::backend::groups::GROUP;
use crate::backend::{DType, Epilogue};
use crate::cuda::context::{COUNTERS, CudaContext};
use crate::cuda::driver::interface::{Address, Build, Launch};
use crate::cuda::ops::weight::{KINDS, WeightAt, bits_define};
use crate::cuda::params::params;
use crate::error::Result;

/// k of a segment: sums of segments are added in order, wherever they were made.
const K_SEGMENT: u32 = 256;

params! {
    /// `linear`: entries `linear_f32` and `linear_bf16` by the type of x.
    LinearParams, 72 bytes {
        /// (rows, k) f32 or bf16.
        x: u64 = 0,
        /// (n, k), the same type or blocks.
        weight: u64 = 8,
        /// (n) f32, or 0 for none.
        bias: u64 = 16,
        /// (rows, n), or (rows, n / 2) under SwiGlu; f32 or bf16.
        out: u64 = 24,
        /// Sums of every segment where K is split.
        partials: u64 = 32,
        /// A zero for every tile, the same.
        counters: u64 = 40,
        rows: u32 = 48,
        n: u32 = 52,
        k: u32 = 56,
        segments_per_cta: u32 = 60,
        epilogue: u32 = 64,
        /// 0 or 1.
        out_bf16: u32 = 68,
    }
}

/// One build: the part of the output that a CTA computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) struct ProductBuild {
    pub(in crate::cuda) rows: u32,
    pub(in crate::cuda) cols: u32,
    pub(in crate::cuda) threads: u32,
    /// Warps side by side along the columns.
    col_warps: u32,
    /// Where the weight is of floats, and where it is in groups.
    floats: Pipeline,
    groups: Pipeline,
}

/// How deep a build reads ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) struct Pipeline {
    pub(in crate::cuda) stages: u32,
    /// CTAs that one multiprocessor of an A100 or H100 holds, by shared memory and registers.
    pub(in crate::cuda) resident: u32,
}

/// A [`Pipeline`].
pub(in crate::cuda) const fn pipeline(stages: u32, resident: u32) -> Pipeline {
    Pipeline { stages, resident }
}

/// By rows. The first three stream the weight: a CTA has most of a segment in flight (8 x 32: 20 of
/// 20 KiB and 6 CTAs, so that 132 multiprocessors ask for 16 MB at once). The last fills 96 of the
/// 99 KiB that every machine has.
pub(in crate::cuda) const TILES: [ProductBuild; 5] = [
    ProductBuild { rows: 8, cols: 32, threads: 64, col_warps: 2, floats: pipeline(5, 6), groups: pipeline(8, 6) },
    ProductBuild { rows: 16, cols: 32, threads: 64, col_warps: 2, floats: pipeline(5, 5), groups: pipeline(8, 5) },
    ProductBuild { rows: 32, cols: 64, threads: 128, col_warps: 4, floats: pipeline(4, 4), groups: pipeline(6, 4) },
    ProductBuild { rows: 64, cols: 64, threads: 128, col_warps: 2, floats: pipeline(4, 3), groups: pipeline(4, 3) },
    ProductBuild { rows: 128, cols: 128, threads: 256, col_warps: 2, floats: pipeline(3, 1), groups: pipeline(3, 1) },
];

impl ProductBuild {
    fn pipeline(&self, bits: Option<Bits>) -> Pipeline {
        if bits.is_none() { self.floats } else { self.groups }
    }

    /// Dynamic shared memory of a CTA; `dtype` is the type of x.
    pub(in crate::cuda) fn shared_bytes(&self, dtype: DType, bits: Option<Bits>) -> u32 {
        product_bytes(dtype, bits, self.rows, self.cols, self.threads / 32 / self.col_warps, self.pipeline(bits).stages)
    }

    pub(in crate::cuda) fn build(&self, bits: Option<Bits>) -> Build {
        let defines = vec![
            ("GROUP_BITS", bits_define(bits)),
            ("THREADS", self.threads),
            ("TILE_ROWS", self.rows),
            ("TILE_COLS", self.cols),
            ("TILE_COL_WARPS", self.col_warps),
            ("TILE_STAGES", self.pipeline(bits).stages),
            ("TILE_CTAS", self.pipeline(bits).resident),
        ];
        Build { stem: "linear", defines }
    }
}

/// `shared_bytes` of a tile in `kernels/gemm.cuh`: stages of 128 bytes of K for every row of x and
/// of a weight of floats, or of the blocks of a weight in groups; and the area where the values of
/// these stand, unless every column belongs to one warp and x is bf16.
pub(in crate::cuda) fn product_bytes(dtype: DType, bits: Option<Bits>, rows: u32, cols: u32, row_warps: u32, stages: u32) -> u32 {
    let Some(bits) = bits else { return stages * (rows + cols) * 128 };
    let blocks = 128 / dtype.bytes() / GROUP * cols as usize / COLUMNS;
    let stage = (rows * 128 + (blocks * bits.block_words() * size_of::<u32>()) as u32).next_multiple_of(128);
    let in_registers = dtype == DType::Bf16 && row_warps == 1;
    stages * stage + if in_registers { 0 } else { cols * 128 }
}

/// The builds of this kernel.
pub(in crate::cuda) fn builds() -> Vec<Build> {
    KINDS.into_iter().flat_map(|bits| TILES.iter().map(move |tile| tile.build(bits))).collect()
}

/// How one product is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    tile: ProductBuild,
    tiles: u32,
    segments: u32,
    segments_per_cta: u32,
}

impl Shape {
    fn new(tile: ProductBuild, rows: u32, n: u32, k: u32, num_sms: u32) -> Shape {
        let tiles = rows.div_ceil(tile.rows) * n.div_ceil(tile.cols);
        let segments = k.div_ceil(K_SEGMENT);
        // K is split where it takes more CTAs to fill the machine once, and never beyond that.
        let wanted = (tile.floats.resident * num_sms / tiles.max(1)).clamp(1, segments.max(1));
        Shape { tile, tiles, segments, segments_per_cta: segments.div_ceil(wanted).max(1) }
    }

    fn splits(&self) -> u32 {
        self.segments.div_ceil(self.segments_per_cta).max(1)
    }

    /// Time of the product where arithmetic is what it waits for, in no unit: the work of the
    /// multiprocessor that has most. A small tile reads twice as many operand bytes per product,
    /// taken as two fifths more time.
    fn work(&self, num_sms: u32) -> u64 {
        let ctas = u64::from(self.tiles * self.splits());
        let cta = u64::from(self.tile.rows * self.tile.cols * self.segments_per_cta);
        ctas.div_ceil(u64::from(num_sms.max(1))) * cta * if self.tile.rows < 128 { 7 } else { 5 }
    }

    fn launch(&self, dtype: DType, bits: Option<Bits>) -> Launch {
        Launch { grid: [self.tiles, self.splits(), 1], block: self.tile.threads, shared_bytes: self.tile.shared_bytes(dtype, bits) }
    }

    fn partial_bytes(&self) -> usize {
        if self.splits() == 1 {
            return 0;
        }
        4 * self.segments as usize * self.tiles as usize * (self.tile.rows * self.tile.cols) as usize
    }
}

/// Up to 64 rows the weight should come from memory once: one tile holds all rows. Above, the tile
/// that leaves the least to wait for.
fn shape(rows: u32, n: u32, k: u32, num_sms: u32) -> Shape {
    let of = |tile: &ProductBuild| Shape::new(*tile, rows, n, k, num_sms);
    match TILES.iter().find(|tile| rows <= tile.rows && tile.rows <= 64) {
        Some(tile) => of(tile),
        None => TILES[3..].iter().map(of).min_by_key(|shape| shape.work(num_sms)).expect("two tiles"),
    }
}

/// `out (rows, n) <- epilogue(x (rows, k) weight (n, k)^T + bias)`.
pub struct Linear {
    pub rows: u32,
    pub n: u32,
    pub k: u32,
    /// Of x, and of a weight of floats.
    pub dtype: DType,
    pub x: Address,
    pub weight: WeightAt,
    /// (n) f32.
    pub bias: Option<Address>,
    pub epilogue: Epilogue,
    /// (rows, n), or (rows, n / 2) under [`Epilogue::SwiGlu`]; [`Epilogue::Add`] needs f32.
    pub out: Address,
    pub out_dtype: DType,
}

/// The product, cut as its shape and the machine ask for.
pub fn linear(context: &CudaContext, op: &Linear) -> Result<()> {
    linear_as(context, op, &shape(op.rows, op.n, op.k, context.driver.limits().num_sms))
}

/// What [`linear`] takes of the workspace, from its front, for a product of this shape.
pub(in crate::cuda) fn workspace_bytes(context: &CudaContext, rows: u32, n: u32, k: u32) -> usize {
    shape(rows, n, k, context.driver.limits().num_sms).partial_bytes()
}

/// Every way to cut a product: each tile, with K whole and with K split as far as it goes. The same
/// bits come out of all of them.
pub fn every_shape(rows: u32, n: u32, k: u32) -> Vec<Shape> {
    TILES.iter().flat_map(|tile| [1, 1 << 16].map(|num_sms| Shape::new(*tile, rows, n, k, num_sms))).collect()
}

/// [`linear`] cut as one is told, for tests and measurements.
pub fn linear_as(context: &CudaContext, op: &Linear, shape: &Shape) -> Result<()> {
    let Linear { rows, n, k, dtype, x, weight, bias, epilogue, out, out_dtype } = *op;
    assert!(k > 0, "a product over no k");
    assert!(epilogue != Epilogue::Add || out_dtype == DType::F32, "a residual is f32");
    assert!(epilogue != Epilogue::SwiGlu || n % 2 == 0, "gate and up in pairs of {n} rows");
    let split = shape.splits() > 1;
    assert!(!split || shape.tiles as usize <= COUNTERS, "{} counters", shape.tiles);
    let params = LinearParams {
        x,
        weight: weight.address,
        bias: bias.unwrap_or(0),
        out,
        partials: if split { context.workspace(shape.partial_bytes())? } else { 0 },
        counters: if split { context.counters() } else { 0 },
        rows,
        n,
        k,
        segments_per_cta: shape.segments_per_cta,
        epilogue: match epilogue {
            Epilogue::Store => 0,
            Epilogue::Gelu => 1,
            Epilogue::Add => 2,
            Epilogue::SwiGlu => 3,
        },
        out_bf16: u32::from(out_dtype == DType::Bf16),
    };
    let entry = match dtype {
        DType::F32 => "linear_f32",
        DType::Bf16 => "linear_bf16",
    };
    context.launch(shape.tile.build(weight.bits), entry, shape.launch(dtype, weight.bits), &params)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMS: u32 = 132;

    #[test]
    fn few_rows_stream_the_weight_once() {
        for (rows, tile) in [(1, 0), (8, 0), (9, 1), (16, 1), (17, 2), (33, 3), (64, 3)] {
            let shape = shape(rows, 4096, 4096, SMS);
            assert_eq!(shape.tile, TILES[tile], "{rows} rows");
            assert_eq!(shape.tiles, 4096 / shape.tile.cols, "{rows} rows: one tile holds all rows");
        }
    }

    #[test]
    fn many_rows_take_the_large_tile_where_it_fills_the_machine() {
        assert_eq!(shape(1024, 12288, 4096, SMS).tile.rows, 128);
        assert_eq!(shape(1024, 12288, 4096, SMS).splits(), 1);
        // 6 of 132 multiprocessors would work at 128 x 128, and 18 at three segments.
        assert_eq!(shape(128, 768, 768, SMS).tile.rows, 64);
    }

    #[test]
    fn every_segment_is_summed_once_and_splitting_stops_at_a_full_machine() {
        for rows in [1, 8, 20, 64, 65, 128, 500, 1024, 8192] {
            for (n, k) in [(1, 1), (768, 768), (2304, 768), (768, 3072), (4096, 12288), (50_258, 768), (152_000, 4096)] {
                let shape = shape(rows, n, k, SMS);
                let Shape { tile, tiles, segments, segments_per_cta } = shape;
                assert!(segments_per_cta * shape.splits() >= segments && segments_per_cta * (shape.splits() - 1) < segments, "{shape:?}");
                assert!(shape.splits() == 1 || tiles * shape.splits() <= tile.floats.resident * SMS, "{shape:?}");
                assert!(tiles * tile.rows * tile.cols >= rows * n, "{shape:?}");
                for (dtype, bits) in [DType::F32, DType::Bf16].into_iter().flat_map(|dtype| KINDS.map(|bits| (dtype, bits))) {
                    assert!(shape.launch(dtype, bits).shared_bytes + 128 <= 101_376, "{shape:?}");
                }
            }
        }
        assert!(shape(0, 768, 768, SMS).launch(DType::F32, None).is_empty());
    }

    /// Half as many multiprocessors never ask for more splits.
    #[test]
    fn small_machines_split_less() {
        for (n, k) in [(768, 768), (768, 3072), (4096, 4096)] {
            assert!(shape(8, n, k, 66).splits() <= shape(8, n, k, 132).splits());
        }
        assert_eq!(shape(8, 768, 768, 132).splits(), 3);
        assert_eq!(shape(8, 768, 768, 24).splits(), 3);
        assert_eq!(shape(8, 768, 768, 4).splits(), 1);
    }
}
