// moe: the products of all experts as one: out[i, :] <- epilogue(x[i, :] weight[expert of place
// i]^T), x (places, k) in the order of the experts.
//
// Layout: CTA x computes columns x % col_tiles of tile x / col_tiles of the list that `route_order`
// leaves: up to TILE_ROWS places of one expert. The grid has a CTA for as many tiles as there can
// be; CTAs beyond the list end at once, so a recorded launch serves every routing. Row tiles of an
// expert follow each other, so that its weight, a few MB, is in L2 when the second one comes. K is
// not split: experts by columns fill the machine.
// Sums are in the order of `gemm.cuh`, so how many rows share an expert, and which tile was built,
// never change a bit of a row's result.
// Cost: the weights of the experts that have rows, once for each of their tiles; 2 places n k
// operations.
#include "gemm.cuh"

struct MoeParams {
    const void* x;       // (places, k) f32 or bf16
    const void* weight;  // (experts, n, k), the same type or blocks
    void* out;           // (places, n), or (places, n / 2) under swiglu; f32 or bf16
    const uint4* tiles;  // (num_tiles) expert, first place, places, 0
    const u32* num_tiles;
    u32 n;
    u32 k;
    u32 swiglu;    // 1: silu(v[2 j]) v[2 j + 1], gate and up in neighbouring weight rows
    u32 out_bf16;  // 0 or 1
};
FIELD(MoeParams, x, 0);
FIELD(MoeParams, weight, 8);
FIELD(MoeParams, out, 16);
FIELD(MoeParams, tiles, 24);
FIELD(MoeParams, num_tiles, 32);
FIELD(MoeParams, n, 40);
FIELD(MoeParams, k, 44);
FIELD(MoeParams, swiglu, 48);
FIELD(MoeParams, out_bf16, 52);
LAYOUT(MoeParams, 56);

__device__ __forceinline__ float silu(float v) { return v / (1.0f + expf(-v)); }

// Rows [first, first + count) of the output, columns from `col0` on.
template <typename Out, typename Tile>
__device__ __forceinline__ void finish_tile(const MoeParams& p, u32 first, u32 count, u32 col0, const float* tile) {
    const u32 width = p.swiglu ? p.n / 2 : p.n;
#pragma unroll 2
    for (u32 i = threadIdx.x; i < Tile::rows * Tile::cols / 2; i += THREADS) {
        const u32 row = i / (Tile::cols / 2);
        const u32 within = i % (Tile::cols / 2) * 2;
        const u32 col = col0 + within;
        if (row >= count || col >= p.n) continue;
        const float2 v = *(const float2*)(tile + row * Tile::laid_out_stride + within);
        Out* out = (Out*)p.out + (u64)(first + row) * width;
        if (p.swiglu) {
            store1(out + col / 2, silu(v.x) * v.y);
        } else {
            store1(out + col, v.x);
            if (col + 1 < p.n) store1(out + col + 1, v.y);
        }
    }
}

template <typename T>
__device__ __forceinline__ void moe_tile(const MoeParams& p, u8* shared) {
    typedef ProductTile<T, GROUP_BITS, TILE_ROWS, TILE_COLS, TILE_COL_WARPS, TILE_STAGES> Tile;
    const u32 col_tiles = (p.n + Tile::cols - 1) / Tile::cols;
    const u32 index = blockIdx.x / col_tiles;
    if (index >= *p.num_tiles) return;
    const uint4 of = p.tiles[index];
    const u32 first = of.y;
    const u32 count = of.z;
    const u32 col0 = blockIdx.x % col_tiles * Tile::cols;
    const T* x = (const T*)p.x + (u64)first * p.k;
    const u8* weight = weight_at<T, GROUP_BITS>(p.weight, of.x, p.n, p.k);
    typename Tile::Sums total;
    clear<Tile>(total);
    product<Tile>(operands<Tile>(x, weight, count, p.n, p.k), 0, col0, 0, num_segments(p.k), shared,
                  [&](u32, typename Tile::Sums& sums) { accumulate<Tile>(total, sums); });
    float* tile = (float*)shared;
    lay_out<Tile>(total, tile);
    __syncthreads();
    if (p.out_bf16) {
        finish_tile<u16, Tile>(p, first, count, col0, tile);
    } else {
        finish_tile<float, Tile>(p, first, count, col0, tile);
    }
}

KERNEL_BOUNDS(moe_f32, MoeParams, THREADS, TILE_CTAS) {
    DYNAMIC_SHARED(shared);
    moe_tile<float>(p, shared);
}
KERNEL_BOUNDS(moe_bf16, MoeParams, THREADS, TILE_CTAS) {
    DYNAMIC_SHARED(shared);
    moe_tile<u16>(p, shared);
}
