// linear: out (rows, n) <- epilogue(x (rows, k) weight (n, k)^T + bias), x and weight of one type,
// or the weight in groups of GROUP_BITS; sums in f32 in the order of `gemm.cuh`.
//
// Layout: CTA x computes one tile of TILE_ROWS x TILE_COLS (eight row tiles share the columns that
// are in L2 before the next columns come);
// CTA y takes `segments_per_cta` segments of K. Where K is split, every segment's sums go to
// `partials`, in the order of the registers, and the last CTA of a tile adds them in ascending
// order: the same additions that one CTA makes in registers. It leaves its counter at zero.
// Tiles are chosen by the number of rows (`src/cuda/linear.rs`): up to 64 rows the weight is
// streamed once through small tiles and K is split until the machine is full; above that, 128 x
// 128. The choice never changes a bit of the result.
// TILE_CTAS, the CTAs that a multiprocessor should hold, bounds the registers.
// Cost: up to 64 rows, n k weights from memory, once (of 4 bits about four instructions each, which
// memory just covers); above, 2 rows n k operations on the tensor
// cores (bf16) or FMA units (f32).
//
// An adaLN gate has no epilogue: gate * (x W^T + b) is a product with scaled weight rows and a
// scaled bias, which are folded when the model is loaded. `swiglu` pairs neighbouring weight rows,
// so that gate and up of a column meet in one tile.
#include "gemm.cuh"

#define EPILOGUE_STORE 0u   // v
#define EPILOGUE_GELU 1u    // gelu(v), tanh form
#define EPILOGUE_ADD 2u     // out + v, f32 only
#define EPILOGUE_SWIGLU 3u  // out (rows, n / 2): silu(v[2 j]) v[2 j + 1]

struct LinearParams {
    const void* x;       // (rows, k) f32 or bf16
    const void* weight;  // (n, k), the same type or blocks
    const float* bias;   // (n) or null
    void* out;           // (rows, n), or (rows, n / 2) under swiglu; f32 or bf16
    float4* partials;    // (segments, tiles, registers / 4, THREADS) where gridDim.y > 1
    u32* counters;       // (tiles) zeros, the same
    u32 rows;
    u32 n;
    u32 k;
    u32 segments_per_cta;
    u32 epilogue;
    u32 out_bf16;  // 0 or 1
};
FIELD(LinearParams, x, 0);
FIELD(LinearParams, weight, 8);
FIELD(LinearParams, bias, 16);
FIELD(LinearParams, out, 24);
FIELD(LinearParams, partials, 32);
FIELD(LinearParams, counters, 40);
FIELD(LinearParams, rows, 48);
FIELD(LinearParams, n, 52);
FIELD(LinearParams, k, 56);
FIELD(LinearParams, segments_per_cta, 60);
FIELD(LinearParams, epilogue, 64);
FIELD(LinearParams, out_bf16, 68);
LAYOUT(LinearParams, 72);

// v/2 (1 + tanh(u)) as v / (1 + e^(-2u)): no cancellation on the negative side. The constants are
// -2 sqrt(2/pi) and that times 0.044715.
__device__ __forceinline__ float gelu(float v) { return v / (1.0f + expf(v * fmaf(v * v, -0.07135482f, -1.595769f))); }

__device__ __forceinline__ float silu(float v) { return v / (1.0f + expf(-v)); }

// Four neighbouring columns of one row, from `col` on; `wide` if they may be touched as one vector.
template <typename Out>
__device__ __forceinline__ void finish(const LinearParams& p, u32 row, u32 col, float4 sums, bool wide) {
    float v[4] = {sums.x, sums.y, sums.z, sums.w};
    const u32 count = p.n - col < 4 ? p.n - col : 4;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        if (p.bias && i < count) v[i] += p.bias[col + i];
    }
    if (p.epilogue == EPILOGUE_SWIGLU) {
        Out* out = (Out*)p.out + (u64)row * (p.n / 2) + col / 2;
        store1(out, silu(v[0]) * v[1]);
        if (count == 4) store1(out + 1, silu(v[2]) * v[3]);
        return;
    }
    Out* out = (Out*)p.out + (u64)row * p.n + col;
    if (p.epilogue == EPILOGUE_GELU) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) v[i] = gelu(v[i]);
    }
    if (wide) {
        if (p.epilogue == EPILOGUE_ADD) {
            const float4 before = load4(out);
            v[0] += before.x, v[1] += before.y, v[2] += before.z, v[3] += before.w;
        }
        store4(out, make_float4(v[0], v[1], v[2], v[3]));
        return;
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        if (i < count) store1(out + i, p.epilogue == EPILOGUE_ADD ? load1(out + i) + v[i] : v[i]);
    }
}

template <typename Out, typename Tile>
__device__ __forceinline__ void finish_tile(const LinearParams& p, u32 row0, u32 col0, const float* tile) {
    const bool wide = p.n % 4 == 0 && (u64)p.out % (4 * sizeof(Out)) == 0;
#pragma unroll 2
    for (u32 i = threadIdx.x; i < Tile::rows * Tile::cols / 4; i += THREADS) {
        const u32 row = i / (Tile::cols / 4);
        const u32 col = i % (Tile::cols / 4) * 4;
        if (row0 + row < p.rows && col0 + col < p.n) {
            finish<Out>(p, row0 + row, col0 + col, *(const float4*)(tile + row * Tile::laid_out_stride + col), wide);
        }
    }
}

// Sums every segment of the tile once all CTAs that share it have written theirs; false for all of
// them but the last.
template <typename Tile>
__device__ __forceinline__ bool gather_segments(const LinearParams& p, u32 segments, typename Tile::Sums& total) {
    __shared__ u32 arrived;
    __threadfence();  // the partials of this thread before the count
    __syncthreads();
    if (threadIdx.x == 0) arrived = atomicAdd(p.counters + blockIdx.x, 1u);
    __syncthreads();
    if (arrived + 1 != gridDim.y) return false;
    __threadfence();  // the count before the partials of the others
    if (threadIdx.x == 0) p.counters[blockIdx.x] = 0;
    constexpr u32 quads = Tile::col_tiles * Tile::row_tiles;
    for (u32 segment = 0; segment < segments; ++segment) {
        const float4* from = p.partials + ((u64)segment * gridDim.x + blockIdx.x) * (quads * THREADS) + threadIdx.x;
#pragma unroll
        for (u32 q = 0; q < quads; ++q) {
            const float4 part = from[q * THREADS];
            float* sum = &total[0][0][0] + q * 4;
            sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
        }
    }
    return true;
}

template <typename T>
__device__ __forceinline__ void linear_tile(const LinearParams& p, u8* shared) {
    typedef ProductTile<T, GROUP_BITS, TILE_ROWS, TILE_COLS, TILE_COL_WARPS, TILE_STAGES> Tile;
    constexpr u32 quads = Tile::col_tiles * Tile::row_tiles;
    const u32 row_tiles = (p.rows + Tile::rows - 1) / Tile::rows;
    const u32 col_tiles = (p.n + Tile::cols - 1) / Tile::cols;
    const u32 group = blockIdx.x / (8 * col_tiles) * 8;
    const u32 height = row_tiles - group < 8 ? row_tiles - group : 8;
    const u32 in_group = blockIdx.x - group * col_tiles;
    const u32 row0 = (group + in_group % height) * Tile::rows;
    const u32 col0 = in_group / height * Tile::cols;

    const u32 segments = num_segments(p.k);
    const u32 first = blockIdx.y * p.segments_per_cta;
    const u32 last = segments - first < p.segments_per_cta ? segments : first + p.segments_per_cta;
    const bool split = gridDim.y > 1;
    typename Tile::Sums total;
    clear<Tile>(total);
    product<Tile>(operands<Tile>(p.x, p.weight, p.rows, p.n, p.k), row0, col0, first, last, shared, [&](u32 segment, typename Tile::Sums& sums) {
        if (!split) {
            accumulate<Tile>(total, sums);
            return;
        }
        float4* to = p.partials + ((u64)segment * gridDim.x + blockIdx.x) * (quads * THREADS) + threadIdx.x;
#pragma unroll
        for (u32 q = 0; q < quads; ++q) {
            const float* sum = &sums[0][0][0] + q * 4;
            to[q * THREADS] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        }
    });
    if (split && !gather_segments<Tile>(p, segments, total)) return;

    float* tile = (float*)shared;
    lay_out<Tile>(total, tile);
    __syncthreads();
    if (p.out_bf16) {
        finish_tile<u16, Tile>(p, row0, col0, tile);
    } else {
        finish_tile<float, Tile>(p, row0, col0, tile);
    }
}

KERNEL_BOUNDS(linear_f32, LinearParams, THREADS, TILE_CTAS) {
    DYNAMIC_SHARED(shared);
    linear_tile<float>(p, shared);
}
KERNEL_BOUNDS(linear_bf16, LinearParams, THREADS, TILE_CTAS) {
    DYNAMIC_SHARED(shared);
    linear_tile<u16>(p, shared);
}
