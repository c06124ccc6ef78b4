// sample_tiles: the LM head, tile by tile, of which only the sums that a token choice needs are
// kept; logits stay on the chip.
//
// First kernel of route A (rows that do not draw from a nucleus). A tile of `gemm.cuh`, TILE_ROWS
// rows by IDS = 128 ids, is laid out in shared memory; eight threads share a row of it, 16 ids
// each, and leave its maximum, second maximum, mass, moment and the mass of each 32 ids at the
// draw's temperature, relative to the tile's own maximum. `sample_draw` joins the tiles of a row in
// f64.
// The ids of a tile and of a thread, and the order of every sum, are the same for all tile heights:
// so is every bit.
//
// Layout: CTAs count row tiles first, eight at a time, so that those that share ids run together
// and the head is read from memory once.
// Cost: the product, 2 rows V k operations or V k weights, and 32 bytes written per row and tile (a
// 1 / 16 of the logits in f32).
// Bank conflicts: thread (piece s, half h) of a row takes the quads of its ids in the rotated order
// (q + s) % 4, so that eight threads read eight different groups of four banks.
#include "sample.cuh"
#include "gemm.cuh"

struct SampleTilesParams {
    const void* hidden;        // (rows, k) f32 or bf16
    const void* head;          // (vocab, k), the same type or blocks
    const float* bias;         // (vocab) or null
    const u32* banned;         // a bit for every id, or null
    const DrawRecord* draws;   // (rows)
    TileRecord* tiles;         // (rows, ceil(vocab / IDS)) out, for the rows of route A
    u32 rows;
    u32 vocab;
    u32 k;
    u32 padding;
};
FIELD(SampleTilesParams, hidden, 0);
FIELD(SampleTilesParams, head, 8);
FIELD(SampleTilesParams, bias, 16);
FIELD(SampleTilesParams, banned, 24);
FIELD(SampleTilesParams, draws, 32);
FIELD(SampleTilesParams, tiles, 40);
FIELD(SampleTilesParams, rows, 48);
FIELD(SampleTilesParams, vocab, 52);
FIELD(SampleTilesParams, k, 56);
FIELD(SampleTilesParams, padding, 60);
LAYOUT(SampleTilesParams, 64);

#define SHARERS 8  // threads of a row
static_assert(IDS == SHARERS * 16 && PIECE_IDS == 2 * 16, "two threads to a piece");

// One row of the tile, whose logits without bias start at `logits` in shared memory. All lanes of
// the warp take part.
__device__ __forceinline__ void summarise(const SampleTilesParams& p, const float* logits, u32 first_id, const DrawRecord& draw, TileRecord* out,
                                          bool wanted) {
    const u32 piece = threadIdx.x % SHARERS / 2, half = threadIdx.x % 2;
    float l[16];
    Top top = no_top();
    u32 broken = NO_ID;  // the lowest
#pragma unroll
    for (u32 q = 0; q < 4; ++q) {
        const u32 at = piece * PIECE_IDS + 4 * (half + 2 * ((q + piece) % 4));
        const float4 quad = *(const float4*)(logits + at);
        const float values[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 id = first_id + at + i;
            float logit = -infinity();
            if (id < p.vocab && !is_banned(p.banned, id)) {
                logit = p.bias ? values[i] + p.bias[id] : values[i];
                if (is_broken(logit) && id < broken) broken = id;
            }
            l[4 * q + i] = logit;
            top = join(top, Top{logit, -infinity(), id});
        }
    }
    for (u32 distance = 1; distance < SHARERS; distance *= 2) {
        top = join(top, shuffle_xor(top, distance));
        const u32 other = __shfl_xor_sync(FULL_WARP, broken, distance);
        broken = other < broken ? other : broken;
    }

    const bool none = top.max == -infinity();
    float mass = 0.0f, moment = 0.0f, choice = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 16; ++i) {
        const float below = none ? -infinity() : l[i] - top.max;
        const float e = expf(below);
        mass += e;
        moment += moment_of(e, below);
        if (draw.temperature != 1.0f && draws(draw)) choice += tempered(below, draw.temperature);
    }
    if (draw.temperature == 1.0f) choice = mass;
    choice += __shfl_xor_sync(FULL_WARP, choice, 1);
    for (u32 distance = 1; distance < SHARERS; distance *= 2) {
        mass += __shfl_xor_sync(FULL_WARP, mass, distance);
        moment += __shfl_xor_sync(FULL_WARP, moment, distance);
    }
    if (!wanted) return;
    if (threadIdx.x % SHARERS == 0) {
        out->max = top.max;
        out->second = top.second;
        out->mass = broken == NO_ID ? mass : quiet_nan();
        out->moment = moment;
    }
    if (broken == NO_ID && draws(draw)) {
        if (half == 0) out->choice[piece] = choice;
    } else if (threadIdx.x % SHARERS == 0) {
        out->choice[0] = __uint_as_float(broken == NO_ID ? top.at : broken);
    }
}

template <typename T>
__device__ __forceinline__ void sample_tile(const SampleTilesParams& p, u8* shared) {
    typedef ProductTile<T, GROUP_BITS, TILE_ROWS, IDS, TILE_COL_WARPS, TILE_STAGES> Tile;
    const u32 row_tiles = (p.rows + Tile::rows - 1) / Tile::rows;
    const u32 id_tiles = (p.vocab + IDS - 1) / IDS;
    const u32 group = blockIdx.x / (8 * id_tiles) * 8;
    const u32 height = row_tiles - group < 8 ? row_tiles - group : 8;
    const u32 in_group = blockIdx.x - group * id_tiles;
    const u32 row0 = (group + in_group % height) * Tile::rows;
    const u32 id_tile = in_group / height;

    bool fused = false;
    for (u32 row = row0 + threadIdx.x; row < row0 + Tile::rows && row < p.rows; row += THREADS) fused |= is_fused(p.draws[row]);
    u32 fused_rows;
    block_exclusive_sum(fused, fused_rows);
    if (fused_rows == 0) return;

    typename Tile::Sums total;
    clear<Tile>(total);
    product<Tile>(operands<Tile>(p.hidden, p.head, p.rows, p.vocab, p.k), row0, id_tile * IDS, 0, num_segments(p.k), shared,
                  [&](u32, typename Tile::Sums& sums) { accumulate<Tile>(total, sums); });
    float* tile = (float*)shared;
    lay_out<Tile>(total, tile);
    __syncthreads();
    // Whole warps pass or stay: a warp holds four rows, and the tile has a multiple of eight.
    for (u32 local = threadIdx.x / SHARERS; local < Tile::rows; local += THREADS / SHARERS) {
        const u32 row = row0 + local;
        const bool inside = row < p.rows;
        const DrawRecord draw = p.draws[inside ? row : p.rows - 1];
        summarise(p, tile + local * Tile::laid_out_stride, id_tile * IDS, draw, p.tiles + (u64)row * id_tiles + id_tile, inside && is_fused(draw));
    }
}

KERNEL_BOUNDS(sample_tiles_f32, SampleTilesParams, THREADS, TILE_CTAS) {
    DYNAMIC_SHARED(shared);
    sample_tile<float>(p, shared);
}
KERNEL_BOUNDS(sample_tiles_bf16, SampleTilesParams, THREADS, TILE_CTAS) {
    DYNAMIC_SHARED(shared);
    sample_tile<u16>(p, shared);
}
