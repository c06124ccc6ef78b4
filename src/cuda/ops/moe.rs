//! Launchers of `moe` and `moe_combine`: the products of all experts as one launch, and
//! their sum for each row; and [`Routing`], what the backend keeps of a routing between them.
#![forbid(unsafe_code)]

use bytemuck::cast_slice_mut;

use crate::backend::group_blocks::Bits;
use crate::backend::{DType, ExpertChoice, ExpertShape, RouterScore};
use crate::cuda::context::{CudaContext, Memory};
use crate::cuda::driver::interface::{Address, Build, Launch};
use crate::cuda::ops::gather::Gather;
use crate::cuda::ops::linear::{ProductBuild, TILES};
use crate::cuda::ops::route::Route;
use crate::cuda::ops::weight::{KINDS, WeightAt};
use crate::cuda::ops::{gather, route};
use crate::cuda::params::params;
use crate::error::Result;

params! {
    /// `moe`: entries `moe_f32` and `moe_bf16` by the type of x.
    MoeParams, 56 bytes {
        /// (places, k) f32 or bf16.
        x: u64 = 0,
        /// (experts, n, k), the same type or blocks.
        weight: u64 = 8,
        /// (places, n), or (places, n / 2) under SwiGLU; f32 or bf16.
        out: u64 = 16,
        /// Four words of each tile: expert, first place, places, 0.
        tiles: u64 = 24,
        /// One u32.
        num_tiles: u64 = 32,
        n: u32 = 40,
        k: u32 = 44,
        /// 0 or 1.
        swiglu: u32 = 48,
        /// 0 or 1.
        out_bf16: u32 = 52,
    }
}

params! {
    /// `moe_combine`.
    MoeCombineParams, 48 bytes {
        /// (rows * top_k, width) f32.
        y: u64 = 0,
        /// (rows, top_k) u32.
        place: u64 = 8,
        /// (rows, top_k) f32.
        weight: u64 = 16,
        /// (rows, width) f32.
        out: u64 = 24,
        rows: u32 = 32,
        width: u32 = 36,
        top_k: u32 = 40,
        /// 0 or 1.
        vectors: u32 = 44,
    }
}

const COMBINE_THREADS: u32 = 256;

/// Of [`TILES`]: 8, 32, 64 and 128 rows.
const GROUPED: [usize; 4] = [0, 2, 3, 4];

fn build(tile: &ProductBuild, bits: Option<Bits>) -> Build {
    Build { stem: "moe", ..tile.build(bits) }
}

fn combine_build() -> Build {
    Build { stem: "moe_combine", defines: vec![("THREADS", COMBINE_THREADS)] }
}

/// The builds of these kernels.
pub(in crate::cuda) fn builds() -> Vec<Build> {
    let of = |bits| GROUPED.iter().map(move |i| build(&TILES[*i], bits));
    KINDS.into_iter().flat_map(of).chain([combine_build()]).collect()
}

/// Rows of the tiles that there are.
pub fn every_tile_rows() -> [u32; 4] {
    GROUPED.map(|i| TILES[i].rows)
}

fn tile_of(tile_rows: u32) -> &'static ProductBuild {
    let found = GROUPED.iter().map(|i| &TILES[*i]).find(|tile| tile.rows == tile_rows);
    found.unwrap_or_else(|| panic!("no tile of {tile_rows} rows"))
}

/// Rows of a tile for `rows` rows: the smallest that holds twice an expert's share, since routing
/// is uneven and a second tile reads the weight again; the largest where none does. No choice
/// changes a bit of the result.
pub(in crate::cuda) fn tile_rows(shape: ExpertShape, rows: u32) -> u32 {
    let share = (rows as usize * shape.top_k).div_ceil(shape.num_experts) as u32;
    let all = every_tile_rows();
    all.into_iter().find(|tile| 2 * share <= *tile).unwrap_or(all[3])
}

/// `out (places, n) <- x (places, k) weight (experts, n, k)^T`, each place by the weight of its
/// expert.
pub struct Grouped {
    pub n: u32,
    pub k: u32,
    /// Of x, and of a weight of floats.
    pub dtype: DType,
    pub x: Address,
    pub weight: WeightAt,
    /// `out (places, n / 2)` is `silu(v[2 j]) v[2 j + 1]`.
    pub swiglu: bool,
    pub out: Address,
    pub out_dtype: DType,
    pub tiles: Address,
    pub num_tiles: Address,
    /// Tiles that there can be.
    pub max_tiles: u32,
    /// One of [`every_tile_rows`].
    pub tile_rows: u32,
}

pub fn grouped(context: &CudaContext, op: &Grouped) -> Result<()> {
    let Grouped { n, k, dtype, x, weight, swiglu, out, out_dtype, tiles, num_tiles, max_tiles, tile_rows } = *op;
    assert!(k > 0 && (!swiglu || n % 2 == 0), "experts of {n} x {k}, gate and up in pairs");
    let tile = tile_of(tile_rows);
    let ctas = u64::from(max_tiles) * u64::from(n.div_ceil(tile.cols));
    let ctas = u32::try_from(ctas).unwrap_or_else(|_| panic!("{max_tiles} tiles of {n} columns: more than a grid holds"));
    let params = MoeParams {
        x,
        weight: weight.address,
        out,
        tiles,
        num_tiles,
        n,
        k,
        swiglu: u32::from(swiglu),
        out_bf16: u32::from(out_dtype == DType::Bf16),
    };
    let entry = match dtype {
        DType::F32 => "moe_f32",
        DType::Bf16 => "moe_bf16",
    };
    let shared_bytes = tile.shared_bytes(dtype, weight.bits);
    context.launch(build(tile, weight.bits), entry, Launch { grid: [ctas, 1, 1], block: tile.threads, shared_bytes }, &params)
}

/// `out (rows, width) += sum over j of weight[t, j] y[place[t, j], :]`.
pub struct Combine {
    pub rows: u32,
    pub width: u32,
    pub top_k: u32,
    pub y: Address,
    pub place: Address,
    pub weight: Address,
    pub out: Address,
}

pub fn combine(context: &CudaContext, op: &Combine) -> Result<()> {
    let Combine { rows, width, top_k, y, place, weight, out } = *op;
    let vectors = u32::from(width % 4 == 0 && y % 16 == 0 && out % 16 == 0);
    let quads = u64::from(rows) * u64::from(width.div_ceil(4));
    assert!(quads <= u64::from(u32::MAX - COMBINE_THREADS), "{rows} rows of {width}: more elements than any machine holds");
    let launch = Launch::line((quads as u32).div_ceil(COMBINE_THREADS), COMBINE_THREADS);
    context.launch(combine_build(), "moe_combine", launch, &MoeCombineParams { y, place, weight, out, rows, width, top_k, vectors })
}

/// Addresses of a routing, and of its rows between the products.
#[derive(Clone, Copy)]
pub(in crate::cuda) struct MoeArrays {
    /// Of the weights, and so of what enters a product.
    pub dtype: DType,
    pub shape: ExpertShape,
    pub rows: u32,
    /// (rows, k) u32 and f32.
    pub expert: Address,
    pub weight: Address,
    /// (E) u32.
    pub count: Address,
    /// (places) u32.
    pub token: Address,
    /// (rows, k) u32.
    pub place: Address,
    pub tiles: Address,
    pub num_tiles: Address,
    /// (places, C) in the weight dtype.
    pub input: Address,
    /// (places, F), the same.
    pub inner: Address,
    /// (places, C) f32.
    pub output: Address,
}

impl MoeArrays {
    /// One after the other from `base` on, for `rows` rows; and the bytes that takes.
    fn lay_out(base: Address, dtype: DType, rows: usize, shape: ExpertShape) -> (MoeArrays, usize) {
        let ExpertShape { num_experts, top_k, hidden_dim, expert_dim } = shape;
        let places = rows * top_k;
        assert!(places <= u32::MAX as usize, "{rows} rows of {shape:?}");
        // Of all tile heights the lowest makes most tiles.
        let tiles = route::max_tiles(shape, rows as u32, every_tile_rows()[0]) as usize;
        let mut bytes = 0;
        let mut take = |len: usize| {
            bytes += len.next_multiple_of(256);
            base + (bytes - len.next_multiple_of(256)) as u64
        };
        let places = MoeArrays {
            dtype,
            shape,
            rows: rows as u32,
            expert: take(4 * places),
            weight: take(4 * places),
            count: take(4 * num_experts),
            token: take(4 * places),
            place: take(4 * places),
            tiles: take(16 * tiles),
            num_tiles: take(4),
            input: take(places * hidden_dim * dtype.bytes()),
            inner: take(places * expert_dim * dtype.bytes()),
            output: take(4 * places * hidden_dim),
        };
        (places, bytes)
    }

    /// See [`crate::backend::Backend::route`].
    pub fn route(&self, context: &CudaContext, logits: Address, score: RouterScore, bias: Option<Address>) -> Result<()> {
        let MoeArrays { shape, rows, expert, weight, count, token, place, tiles, num_tiles, .. } = *self;
        let tile_rows = tile_rows(shape, rows);
        route::route(context, &Route { shape, score, rows, tile_rows, logits, bias, expert, weight, count, token, place, tiles, num_tiles })
    }

    /// See [`crate::backend::Backend::moe`]; `x` is f32 or in the weight dtype.
    pub fn moe(&self, context: &CudaContext, x: Address, x_dtype: DType, up: WeightAt, down: WeightAt, out: Address) -> Result<()> {
        let MoeArrays { dtype, shape, rows, weight, token, place, tiles, num_tiles, input, inner, output, .. } = *self;
        let [top_k, c, f] = [shape.top_k, shape.hidden_dim, shape.expert_dim].map(|size| size as u32);
        let gather = Gather { count: rows * top_k, width: c, rows: Some(token), x, x_dtype, out: input, out_dtype: dtype };
        gather::gather(context, &gather)?;
        let tile_rows = tile_rows(shape, rows);
        let max_tiles = route::max_tiles(shape, rows, tile_rows);
        let product = |n: u32, k: u32, x: Address, weight: WeightAt, swiglu: bool, out: Address, out_dtype: DType| {
            grouped(context, &Grouped { n, k, dtype, x, weight, swiglu, out, out_dtype, tiles, num_tiles, max_tiles, tile_rows })
        };
        product(2 * f, c, input, up, true, inner, dtype)?;
        product(c, f, inner, down, false, output, DType::F32)?;
        combine(context, &Combine { rows, width: c, top_k, y: output, place, weight, out })
    }
}

/// The choices of the last routing, and buffers for its rows between the products. Everything lies
/// where it lay before, as recorded graphs need it.
pub struct Routing {
    capacity: usize,
    _memory: Memory,
    /// `rows` of the last routing.
    pub(in crate::cuda) arrays: MoeArrays,
}

impl Routing {
    /// With buffers for `rows` rows.
    pub(in crate::cuda) fn new(context: &CudaContext, dtype: DType, rows: usize, shape: ExpertShape) -> Result<Routing> {
        let memory = context.memory(MoeArrays::lay_out(0, dtype, rows, shape).1)?;
        let (arrays, _) = MoeArrays::lay_out(memory.address(), dtype, rows, shape);
        Ok(Routing { capacity: rows, _memory: memory, arrays: MoeArrays { rows: 0, ..arrays } })
    }

    pub(in crate::cuda) fn route(
        &mut self,
        context: &CudaContext,
        rows: usize,
        logits: Address,
        score: RouterScore,
        bias: Option<Address>,
    ) -> Result<()> {
        assert!(rows <= self.capacity, "{rows} rows where there is room for {}", self.capacity);
        self.arrays.rows = rows as u32;
        self.arrays.route(context, logits, score, bias)
    }

    pub(in crate::cuda) fn expert_choices(&self, context: &CudaContext) -> Result<Vec<ExpertChoice>> {
        let len = self.arrays.rows as usize * self.arrays.shape.top_k;
        let (mut experts, mut weights) = (vec![0u32; len], vec![0.0f32; len]);
        context.driver.read(self.arrays.expert, cast_slice_mut(&mut experts))?;
        context.driver.read(self.arrays.weight, cast_slice_mut(&mut weights))?;
        Ok(experts.into_iter().zip(weights).map(|(expert, weight)| ExpertChoice { expert, weight }).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_grow_with_the_share_of_an_expert() {
        let shape = ExpertShape { num_experts: 256, top_k: 8, hidden_dim: 2048, expert_dim: 512 };
        for (rows, tile) in [(1, 8), (32, 8), (128, 8), (129, 32), (512, 32), (1024, 64), (1025, 128), (100_000, 128)] {
            assert_eq!(tile_rows(shape, rows), tile, "{rows} rows");
        }
    }
}
