// attention: out[t, h, :] = softmax(q k^T / sqrt(D)) v over keys [0, visible[t]) of the row's own
// sequence, through its page table.
//
// Idea: online softmax over tiles of 64 keys (FlashAttention-2), with one order of operations for
// every row, independent of the rows that share its tile:
// - keys are counted from position 0 of the sequence, in tiles of 64; four tiles are a chunk;
// - inside a chunk: running maximum, mass and weighted sum, from nothing;
// - chunks are blended in ascending order (`blend_of`, `blend`), as many as the row sees keys of.
// With few queries each CTA takes one chunk and the last one to finish blends what all have left in
// memory; with many a CTA walks its chunks and blends in registers. Both are the same bits, and so
// is a row beside other rows: a tile or chunk that it does not see is a step that changes nothing
// (weight exactly 0, rescaling exactly 1), skipped or not.
//
// Queries of a tile are (row, head) pairs that share a K/V head, so that grouped heads share what
// is loaded. A work list names the tiles.
//
// bf16 (mma.sync m16n8k16): q rounded to bf16 in registers, K and V tiles through cp.async into a
// ring of swizzled shared memory, each of four warps with 16 queries (`many`) or all with the same
// 16 (`few`), where they split the keys of a score tile and the columns of the output between them;
// neither split cuts a sum. Weights are rounded to bf16, and the mass is the same product with a
// column of ones, so that numerator and denominator carry the same rounding.
// f32: plain FMA, a warp to four queries; a lane holds keys, then columns.
//
// What a row must not see: scores past its end become -inf by selection, slots past the tile's
// largest end are filled with zeros instead of read. Between a row's own end and its neighbour's
// lie values that the tensor cores multiply by the row's zeros, and 0 * NaN is NaN: where ends
// differ inside a tile its values are searched, and what is not finite is taken out of the product
// after it has turned the outputs that do see it into NaN. The f32 path ends its loops at the row's
// end.
//
// Cost: K and V of each tile's chunks once per tile of queries, from L2 after the first; 4 D FLOP
// per visible pair, in whole tiles of keys.
#include "common.cuh"
static_assert(THREADS == 128, "four warps");
static_assert(HEAD_DIM >= 1 && HEAD_DIM <= 256, "accumulators in registers");
static_assert((PAGE_SIZE & (PAGE_SIZE - 1)) == 0, "pages hold a power of two of slots");

#define TILE_KEYS 64u
#define CHUNK_TILES 4u
#define CHUNK_KEYS (TILE_KEYS * CHUNK_TILES)
#define NEGATIVE_INFINITY __uint_as_float(0xff800000u)

struct AttentionParams {
    const float* qkv;        // (T, (H + 2 K) D), of which the first H D columns are read
    const void* keys;        // [page][kv head][offset][D] of one layer, f32 or bf16
    const void* values;      // the same
    void* out;               // (T, H D) f32, or bf16 where out_bf16 is 1
    const u32* visible;      // (T)
    const uint4* tiles;      // (gridDim.x): sequence, its first row, first query, queries; no queries: nothing to do
    const u32* page_indptr;  // (S + 1)
    const u32* pages;
    float* partials;         // one record for each tile, kv head and chunk; unused where chunks is 0
    u32* counters;           // (tiles * K) zeros before and after; unused where chunks is 0
    u32 num_heads;           // H
    u32 num_kv_heads;        // K; gridDim.y
    u32 chunks;              // gridDim.z and at least the chunks of any tile; 0: each CTA walks all of its chunks
    u32 out_bf16;
};
FIELD(AttentionParams, qkv, 0);
FIELD(AttentionParams, keys, 8);
FIELD(AttentionParams, values, 16);
FIELD(AttentionParams, out, 24);
FIELD(AttentionParams, visible, 32);
FIELD(AttentionParams, tiles, 40);
FIELD(AttentionParams, page_indptr, 48);
FIELD(AttentionParams, pages, 56);
FIELD(AttentionParams, partials, 64);
FIELD(AttentionParams, counters, 72);
FIELD(AttentionParams, num_heads, 80);
FIELD(AttentionParams, num_kv_heads, 84);
FIELD(AttentionParams, chunks, 88);
FIELD(AttentionParams, out_bf16, 92);
LAYOUT(AttentionParams, 96);

// ---- arithmetic shared by every path ----

// exp((score - max) / sqrt(D)), 0 for a score of -inf even where there is no maximum yet. The
// difference is taken first: it is exact near the maximum, where the weight is large, and never
// overflows for finite scores of one sign.
__device__ __forceinline__ float weight_of(float score, float max) {
    const float from = max == NEGATIVE_INFINITY ? 0.0f : max;
    return exp2f((score - from) * (1.44269504f / sqrtf((float)HEAD_DIM)));
}

// How two partial results with these maxima become one.
struct Blend {
    float max, before, after;
};

__device__ __forceinline__ Blend blend_of(float max_before, float max_after) {
    const float max = fmaxf(max_before, max_after);
    return Blend{max, weight_of(max_before, max), weight_of(max_after, max)};
}

__device__ __forceinline__ float blend(const Blend& by, float before, float after) {
    return fmaf(before, by.before, __fmul_rn(after, by.after));
}

__device__ __forceinline__ u32 chunks_of(u32 visible) { return visible ? (visible + CHUNK_KEYS - 1) / CHUNK_KEYS : 1; }

// ---- a CTA's work ----

// The queries of a CTA: (row, head) pairs of one sequence and K/V head, and how far they see.
struct Queries {
    uint4 tile;
    u32 group;  // query heads of a K/V head
    const u32* pages;
    u32 end;    // largest visible end
    u32 least;  // smallest of those that see anything
};

struct Query {
    u32 row, head, visible;
    bool live;
};

__device__ __forceinline__ Query query_of(const AttentionParams& p, const Queries& queries, u32 index) {
    const u32 place = queries.tile.z + index;
    Query query;
    query.live = index < queries.tile.w;
    query.row = queries.tile.y + place / queries.group;
    query.head = blockIdx.y * queries.group + place % queries.group;
    query.visible = query.live ? p.visible[query.row] : 0;
    return query;
}

template <u32 ROWS>
__device__ __forceinline__ Queries queries_of_cta(const AttentionParams& p) {
    Queries queries;
    queries.tile = p.tiles[blockIdx.x];
    queries.group = p.num_heads / p.num_kv_heads;
    queries.pages = p.pages + p.page_indptr[queries.tile.x];
    u32 end = 0, least = 0xffffffffu;
    for (u32 index = lane_id(); index < ROWS; index += 32) {
        const Query query = query_of(p, queries, index);
        end = end < query.visible ? query.visible : end;
        if (query.visible) least = query.visible < least ? query.visible : least;
    }
    for (u32 distance = 16; distance > 0; distance /= 2) {
        const u32 other_end = __shfl_xor_sync(FULL_WARP, end, distance), other_least = __shfl_xor_sync(FULL_WARP, least, distance);
        end = end < other_end ? other_end : end;
        least = other_least < least ? other_least : least;
    }
    queries.end = end;
    queries.least = least;
    return queries;
}

// Where key or value `position` of this CTA's K/V head lies.
template <typename Element>
__device__ __forceinline__ const Element* slot_of(const AttentionParams& p, const Queries& queries, const void* store, u32 position) {
    const u64 page = queries.pages[position / PAGE_SIZE];
    return (const Element*)store + ((page * p.num_kv_heads + blockIdx.y) * PAGE_SIZE + position % PAGE_SIZE) * HEAD_DIM;
}

// Two neighbouring columns of the result of a query.
__device__ __forceinline__ void write_pair(const AttentionParams& p, const Query& query, u32 column, float a, float b) {
    const u64 place = ((u64)query.row * p.num_heads + query.head) * HEAD_DIM + column;
    if (p.out_bf16) {
        *(u32*)((u16*)p.out + place) = bf16x2_from_f32(a, b);
    } else {
        *(float2*)((float*)p.out + place) = make_float2(a, b);
    }
}

__device__ __forceinline__ void write_one(const AttentionParams& p, const Query& query, u32 column, float a) {
    const u64 place = ((u64)query.row * p.num_heads + query.head) * HEAD_DIM + column;
    if (p.out_bf16) {
        store1((u16*)p.out + place, a);
    } else {
        store1((float*)p.out + place, a);
    }
}

// Adding zero turns -0 into 0: a sum that underflowed keeps its sign or loses it to the zeros of a
// tile that only a neighbour sees.
__device__ __forceinline__ float normalized(const Query& query, float sum, float mass) {
    return query.visible ? sum / mass + 0.0f : 0.0f;
}

// What a chunk leaves in memory: sums (ROWS, D), then maxima (ROWS), then masses (ROWS).
template <u32 ROWS>
__device__ __forceinline__ float* partial_of(const AttentionParams& p, u32 chunk) {
    const u64 tile = (u64)blockIdx.x * p.num_kv_heads + blockIdx.y;
    return p.partials + (tile * p.chunks + chunk) * (ROWS * (HEAD_DIM + 2));
}

// After a CTA has written its partial result: the last one of the tile blends them all. Every
// thread calls it.
template <u32 ROWS>
__device__ __forceinline__ void blend_partials(const AttentionParams& p, const Queries& queries) {
    __shared__ u32 arrived;
    __threadfence();  // the partial result before the arrival
    __syncthreads();
    u32* counter = p.counters + (u64)blockIdx.x * p.num_kv_heads + blockIdx.y;
    if (threadIdx.x == 0) arrived = atomicAdd(counter, 1u);
    __syncthreads();
    if (arrived + 1 != chunks_of(queries.end)) return;
    if (threadIdx.x == 0) *counter = 0;
    __threadfence();  // the arrivals before the partial results
    for (u32 i = threadIdx.x; i < ROWS * HEAD_DIM; i += THREADS) {
        const u32 index = i / HEAD_DIM, column = i % HEAD_DIM;
        const Query query = query_of(p, queries, index);
        if (!query.live) continue;
        float max = 0.0f, mass = 0.0f, sum = 0.0f;
        for (u32 chunk = 0; chunk < chunks_of(query.visible); ++chunk) {
            const float* partial = partial_of<ROWS>(p, chunk);
            const float chunk_sum = partial[i];
            const float chunk_max = partial[ROWS * HEAD_DIM + index], chunk_mass = partial[ROWS * HEAD_DIM + ROWS + index];
            if (chunk == 0) {
                max = chunk_max, mass = chunk_mass, sum = chunk_sum;
                continue;
            }
            const Blend by = blend_of(max, chunk_max);
            max = by.max;
            mass = blend(by, mass, chunk_mass);
            sum = blend(by, sum, chunk_sum);
        }
        write_one(p, query, column, normalized(query, sum, mass));
    }
}

// The tiles of keys that a CTA goes through; none where another CTA has the work.
struct Span {
    u32 first, end;
    bool partial;  // one chunk of several
};

__device__ __forceinline__ Span span_of(const AttentionParams& p, const Queries& queries) {
    const u32 tiles = (queries.end + TILE_KEYS - 1) / TILE_KEYS;
    if (p.chunks == 0) return Span{0, tiles, false};
    const u32 first = blockIdx.z * CHUNK_TILES;
    return Span{first, tiles < first + CHUNK_TILES ? tiles : first + CHUNK_TILES, tiles > CHUNK_TILES};
}

// True for a CTA without work: an empty tile, or a chunk past the tile's end.
__device__ __forceinline__ bool is_idle(const AttentionParams& p, const Queries& queries) {
    return queries.tile.w == 0 || (p.chunks != 0 && blockIdx.z >= chunks_of(queries.end));
}

// ---- bf16 ----

#if HEAD_DIM % 16 == 0

#define PIECES (HEAD_DIM / 8u)  // of 16 bytes in a key
#define BUFFER_BYTES (TILE_KEYS * HEAD_DIM * 2)
// Tiles in shared memory, of keys and values in turn: what fits twice into the 100 KiB of a small
// multiprocessor (`ring` in the launcher).
#define RING (HEAD_DIM <= 64 ? 4u : HEAD_DIM <= 128 ? 3u : 2u)
// Copies whose addresses a thread holds at once: the registers of more are not there beside the
// sums of a large D.
#define COPIES (HEAD_DIM > 96 ? 2 : 4)
#define TOTAL_BYTES(columns) ((columns) * 4 * THREADS * 4)
#define WEIGHT_STRIDE (TILE_KEYS + 8)  // spreads the rows of a weight tile over the banks

// The place of a piece in a tile: eight keys of one column lie in different banks.
__device__ __forceinline__ u32 piece_at(u32 key, u32 piece) {
    constexpr u32 WAYS = PIECES % 8 == 0 ? 8 : PIECES % 4 == 0 ? 4 : 2;
    return (key * PIECES + (piece ^ (key / (8 / WAYS) % WAYS))) * 16;
}

// Starts the copy of the 64 keys (or values) from `first` on; zeros at or past `end`, where nothing
// is read.
__device__ __forceinline__ void copy_tile(const AttentionParams& p, const Queries& queries, const void* store, u32 first, u8* target) {
#pragma unroll COPIES
    for (u32 i = threadIdx.x; i < TILE_KEYS * PIECES; i += THREADS) {
        const u32 key = i / PIECES, piece = i % PIECES;
        const bool valid = first + key < queries.end;
        const u16* from = valid ? slot_of<u16>(p, queries, store, first + key) + piece * 8 : (const u16*)store;
        cp_async16(target + piece_at(key, piece), from, valid);
    }
}

// What a warp holds of a CTA's work, by how many warps split the queries.
template <u32 ROW_WARPS>
struct Bf16Cta {
    static constexpr u32 ROWS = 16 * ROW_WARPS;
    static constexpr u32 SHARERS = WARPS / ROW_WARPS;  // warps with the same queries
    static constexpr u32 SCORES = TILE_KEYS / 8 / SHARERS;  // fragments of eight keys of a warp
    static constexpr u32 COLUMNS = (HEAD_DIM / 8 + SHARERS - 1) / SHARERS;  // fragments of eight columns of a warp

    // Sums of the fragments (queries g and g + 8; columns 2t, 2t + 1), the mass in every column,
    // maxima of the two queries.
    struct State {
        float sums[COLUMNS][4];
        float mass[4];
        float max[2];
    };
};

// Scores of the warp's share of a tile of keys: fragments (queries g and g + 8; keys 2t, 2t + 1),
// -inf where a query does not see the key, and the maxima of the two queries over all lanes.
template <typename Cta>
__device__ __forceinline__ void score_keys(
    float (&scores)[Cta::SCORES][4], float (&max)[2], const u32 (&q)[HEAD_DIM / 16][4], const u8* keys, u32 sharer, u32 first,
    const u32 (&visible)[2]
) {
    const u32 lane = lane_id();
#pragma unroll
    for (u32 n = 0; n < Cta::SCORES; ++n) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) scores[n][i] = 0.0f;
        const u32 fragment = (sharer * Cta::SCORES + n) * 8, key = fragment + lane % 8;
#pragma unroll
        for (u32 k = 0; k + 1 < HEAD_DIM / 16; k += 2) {
            u32 b[4];
            ldmatrix_x4(b, keys + piece_at(key, 2 * k + lane / 8));
            const u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
            mma_m16n8k16(scores[n], q[k], low);
            mma_m16n8k16(scores[n], q[k + 1], high);
        }
        if (HEAD_DIM % 32 != 0) {
            u32 b[2];
            ldmatrix_x2(b, keys + piece_at(key, PIECES - 2 + lane / 8 % 2));
            mma_m16n8k16(scores[n], q[HEAD_DIM / 16 - 1], b);
        }
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 position = first + fragment + lane % 4 * 2 + i % 2;
            scores[n][i] = position < visible[i / 2] ? scores[n][i] : NEGATIVE_INFINITY;
            max[i / 2] = fmaxf(max[i / 2], scores[n][i]);
        }
    }
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        max[h] = fmaxf(max[h], __shfl_xor_sync(FULL_WARP, max[h], 1));
        max[h] = fmaxf(max[h], __shfl_xor_sync(FULL_WARP, max[h], 2));
    }
}

// Both halves at once: a bf16 without a finite value has all exponent bits set.
__device__ __forceinline__ bool low_is_odd(u32 pair) { return (pair & 0x7f80u) == 0x7f80u; }
__device__ __forceinline__ bool high_is_odd(u32 pair) { return (pair & 0x7f800000u) == 0x7f800000u; }

// Searches a tile of values, some of which a query multiplies by zero, for what is not finite. It
// is clean except after a failure. Otherwise the sums that see such a value become NaN, and it
// becomes zero for all. Every thread calls it.
template <typename Cta>
__device__ __forceinline__ void replace_non_finite(typename Cta::State& state, u8* values, u32 sharer, u32 first, const u32 (&visible)[2]) {
    bool odd = false;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < TILE_KEYS * PIECES; i += THREADS) {
        const uint4 v = *(const uint4*)(values + 16 * i);
        odd |= low_is_odd(v.x) | high_is_odd(v.x) | low_is_odd(v.y) | high_is_odd(v.y);
        odd |= low_is_odd(v.z) | high_is_odd(v.z) | low_is_odd(v.w) | high_is_odd(v.w);
    }
    if (!__syncthreads_or(odd)) return;
#pragma unroll
    for (u32 n = 0; n < Cta::COLUMNS; ++n) {
        const u32 piece = n * Cta::SHARERS + sharer;
        if (piece >= PIECES) continue;
#pragma unroll 1
        for (u32 key = 0; key < TILE_KEYS; ++key) {
            const u32 pair = *(const u32*)(values + piece_at(key, piece) + lane_id() % 4 * 4);
#pragma unroll
            for (u32 h = 0; h < 2; ++h) {
                if (first + key >= visible[h]) continue;
                if (low_is_odd(pair)) state.sums[n][2 * h] = quiet_nan();
                if (high_is_odd(pair)) state.sums[n][2 * h + 1] = quiet_nan();
            }
        }
    }
    __syncthreads();  // all have seen them
#pragma unroll 1
    for (u32 i = threadIdx.x; i < TILE_KEYS * PIECES * 4; i += THREADS) {
        u32* pair = (u32*)values + i;
        *pair = (low_is_odd(*pair) ? 0 : *pair & 0xffffu) | (high_is_odd(*pair) ? 0 : *pair & 0xffff0000u);
    }
    __syncthreads();  // no thread multiplies before they are replaced
}

// Adds weights times a tile of values to the sums, and the weights to the mass: times a column of
// ones, in the same order.
template <typename Cta>
__device__ __forceinline__ void add_values(
    typename Cta::State& state, const u32 (&weights)[TILE_KEYS / 16][4], const u8* values, u32 sharer
) {
    const u32 ones[2] = {0x3f803f80u, 0x3f803f80u};
#pragma unroll
    for (u32 k = 0; k < TILE_KEYS / 16; ++k) mma_m16n8k16(state.mass, weights[k], ones);
#pragma unroll
    for (u32 k = 0; k < TILE_KEYS / 16; k += 2) {
#pragma unroll
        for (u32 n = 0; n < Cta::COLUMNS; ++n) {
            const u32 piece = n * Cta::SHARERS + sharer;
            if (piece >= PIECES) continue;
            u32 b[4];
            ldmatrix_x4_trans(b, values + piece_at(16 * k + lane_id(), piece));
            const u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
            mma_m16n8k16(state.sums[n], weights[k], low);
            mma_m16n8k16(state.sums[n], weights[k + 1], high);
        }
    }
}

template <u32 ROW_WARPS, bool WALK>
__device__ __forceinline__ void attention_bf16(const AttentionParams& p, u8* memory) {
    using Cta = Bf16Cta<ROW_WARPS>;
    constexpr u32 ROWS = Cta::ROWS, SHARERS = Cta::SHARERS, SCORES = Cta::SCORES, COLUMNS = Cta::COLUMNS;
    __shared__ float tile_max[SHARERS][ROWS];
    // Of finished chunks, (COLUMNS, 4, THREADS) f32, each thread its own: two sets of sums do not
    // fit into the registers.
    float* total_sums = (float*)(memory + RING * BUFFER_BYTES) + threadIdx.x;
    u16* weights = (u16*)(memory + RING * BUFFER_BYTES + (WALK ? TOTAL_BYTES(COLUMNS) : 0));  // (ROWS, WEIGHT_STRIDE), where warps share queries

    const Queries queries = queries_of_cta<ROWS>(p);
    if (is_idle(p, queries)) return;  // the whole CTA
    const Span span = span_of(p, queries);
    const u32 lane = lane_id(), g = lane / 4, t = lane % 4;
    const u32 row_warp = warp_id() % ROW_WARPS, sharer = warp_id() / ROW_WARPS;

    // Steps of the ring: keys of the first tile, its values, keys of the next, and so on.
    const u32 steps = 2 * (span.end - span.first);
    const auto start = [&](u32 step) {
        if (step < steps) {
            const u32 first = (span.first + step / 2) * TILE_KEYS;
            copy_tile(p, queries, step % 2 ? p.values : p.keys, first, memory + step % RING * BUFFER_BYTES);
        }
        cp_async_commit();  // an empty group where there is nothing, so that the count below holds to the end
    };
    // The step's tile is there for all, and the buffer of the step before is free.
    const auto arrive = [&](u32 step) {
        cp_async_wait<RING - 2>();
        __syncthreads();
        start(step + RING - 1);
        return memory + step % RING * BUFFER_BYTES;
    };
#pragma unroll
    for (u32 step = 0; step + 1 < RING; ++step) start(step);

    u32 visible[2];
#pragma unroll
    for (u32 h = 0; h < 2; ++h) visible[h] = query_of(p, queries, 16 * row_warp + g + 8 * h).visible;
    u32 warp_end = visible[0] < visible[1] ? visible[1] : visible[0];
    for (u32 distance = 4; distance < 32; distance *= 2) {
        const u32 other = __shfl_xor_sync(FULL_WARP, warp_end, distance);
        warp_end = warp_end < other ? other : warp_end;
    }
    u32 q[HEAD_DIM / 16][4];
    const u64 width = (u64)(p.num_heads + 2 * p.num_kv_heads) * HEAD_DIM;
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        const Query query = query_of(p, queries, 16 * row_warp + g + 8 * h);
        const float* source = p.qkv + query.row * width + query.head * HEAD_DIM + 2 * t;
#pragma unroll
        for (u32 k = 0; k < HEAD_DIM / 16; ++k) {
            float2 low = make_float2(0.0f, 0.0f), high = low;
            if (query.live) low = *(const float2*)(source + 16 * k), high = *(const float2*)(source + 16 * k + 8);
            q[k][h] = bf16x2_from_f32(low.x, low.y);
            q[k][h + 2] = bf16x2_from_f32(high.x, high.y);
        }
    }

    typename Cta::State state;
    // The state before the first key of a chunk.
    const auto clear = [&] {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            state.mass[i] = 0.0f;
#pragma unroll
            for (u32 n = 0; n < COLUMNS; ++n) state.sums[n][i] = 0.0f;
        }
        state.max[0] = state.max[1] = NEGATIVE_INFINITY;
    };
    clear();
    float total_max[2] = {0.0f, 0.0f}, total_mass[2] = {0.0f, 0.0f};
    // Blends the chunk that begins at `chunk_first` into the total.
    const auto keep = [&](u32 chunk_first) {
        Blend by[2];
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            by[h] = blend_of(total_max[h], state.max[h]);
            if (chunk_first == 0) {
                total_max[h] = state.max[h];
                total_mass[h] = state.mass[2 * h];
            } else if (visible[h] > chunk_first) {
                total_max[h] = by[h].max;
                total_mass[h] = blend(by[h], total_mass[h], state.mass[2 * h]);
            }
        }
#pragma unroll
        for (u32 n = 0; n < COLUMNS; ++n) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                float* sum = total_sums + (4 * n + i) * THREADS;
                if (chunk_first == 0) {
                    *sum = state.sums[n][i];
                } else if (visible[i / 2] > chunk_first) {
                    *sum = blend(by[i / 2], *sum, state.sums[n][i]);
                }
            }
            __syncwarp(FULL_WARP);  // keeps the compiler from loading all fragments at once, for which there are no registers
        }
    };
    for (u32 tile = span.first; tile < span.end; ++tile) {
        const u32 first = tile * TILE_KEYS;
        const u32 step = 2 * (tile - span.first);
        const bool sees = first < warp_end;  // the same for all warps that share the queries

        const u8* keys = arrive(step);
        float scores[SCORES][4];
        float max[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
        if (sees) score_keys<Cta>(scores, max, q, keys, sharer, first, visible);
        if (SHARERS > 1) {
            if (t == 0) {
                tile_max[sharer][16 * row_warp + g] = max[0];
                tile_max[sharer][16 * row_warp + g + 8] = max[1];
            }
            __syncthreads();
#pragma unroll
            for (u32 w = 0; w < SHARERS; ++w) {
                max[0] = fmaxf(max[0], tile_max[w][16 * row_warp + g]);
                max[1] = fmaxf(max[1], tile_max[w][16 * row_warp + g + 8]);
            }
        }
        u32 a[TILE_KEYS / 16][4];  // weights as the left factor of the second product
        if (sees) {
            float rescale[2];
#pragma unroll
            for (u32 h = 0; h < 2; ++h) {
                max[h] = fmaxf(max[h], state.max[h]);
                rescale[h] = weight_of(state.max[h], max[h]);
                state.max[h] = max[h];
            }
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                state.mass[i] *= rescale[i / 2];
#pragma unroll
                for (u32 n = 0; n < COLUMNS; ++n) state.sums[n][i] *= rescale[i / 2];
            }
#pragma unroll
            for (u32 n = 0; n < SCORES; ++n) {
#pragma unroll
                for (u32 h = 0; h < 2; ++h) {
                    const u32 pair = bf16x2_from_f32(weight_of(scores[n][2 * h], max[h]), weight_of(scores[n][2 * h + 1], max[h]));
                    if (SHARERS > 1) {
                        *(u32*)(weights + (16 * row_warp + g + 8 * h) * WEIGHT_STRIDE + (sharer * SCORES + n) * 8 + 2 * t) = pair;
                    } else {
                        a[n / 2][n % 2 * 2 + h] = pair;
                    }
                }
            }
        }

        u8* values = arrive(step + 1);
        const bool ends_differ = queries.least < queries.end && first + TILE_KEYS > queries.least;
        if (ends_differ) replace_non_finite<Cta>(state, values, sharer, first, visible);
        if (sees) {
            if (SHARERS > 1) {
#pragma unroll
                for (u32 k = 0; k < TILE_KEYS / 16; ++k) {
                    ldmatrix_x4(a[k], weights + (16 * row_warp + lane % 16) * WEIGHT_STRIDE + 16 * k + lane / 16 * 8);
                }
            }
            add_values<Cta>(state, a, values, sharer);
        }

        if (WALK && tile % CHUNK_TILES == CHUNK_TILES - 1 && tile + 1 < span.end) {
            // A chunk is done, and another follows.
            keep(tile / CHUNK_TILES * CHUNK_KEYS);
            clear();
        }
    }
    if (WALK && span.end > CHUNK_TILES) {
        keep((span.end - 1) / CHUNK_TILES * CHUNK_KEYS);
#pragma unroll
        for (u32 n = 0; n < COLUMNS; ++n) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) state.sums[n][i] = total_sums[(4 * n + i) * THREADS];
        }
#pragma unroll
        for (u32 h = 0; h < 2; ++h) state.mass[2 * h] = total_mass[h];
    }

#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        const u32 index = 16 * row_warp + g + 8 * h;
        const Query query = query_of(p, queries, index);
        if (!query.live) continue;
        float* partial = partial_of<ROWS>(p, blockIdx.z);
        if (span.partial && sharer == 0 && t == 0) {
            partial[ROWS * HEAD_DIM + index] = state.max[h];
            partial[ROWS * HEAD_DIM + ROWS + index] = state.mass[2 * h];
        }
#pragma unroll
        for (u32 n = 0; n < COLUMNS; ++n) {
            const u32 piece = n * SHARERS + sharer;
            if (piece >= PIECES) continue;
            const u32 column = 8 * piece + 2 * t;
            if (span.partial) {
                *(float2*)(partial + index * HEAD_DIM + column) = make_float2(state.sums[n][2 * h], state.sums[n][2 * h + 1]);
            } else {
                const float a = normalized(query, state.sums[n][2 * h], state.mass[2 * h]);
                const float b = normalized(query, state.sums[n][2 * h + 1], state.mass[2 * h]);
                write_pair(p, query, column, a, b);
            }
        }
    }
    if (span.partial) blend_partials<ROWS>(p, queries);
}

// Tiles of 16 queries, one chunk to a CTA.
KERNEL(attention_bf16_few, AttentionParams) {
    DYNAMIC_SHARED(memory);
    attention_bf16<1, false>(p, memory);
}

// Tiles of 64 queries, 16 where the sums of so many would not fit into the registers; a CTA walks
// its chunks.
// The 1 is needed: without it the assembler spills a few bytes to get under the registers of one
// more resident CTA.
KERNEL_BOUNDS(attention_bf16_many, AttentionParams, THREADS, 1) {
    DYNAMIC_SHARED(memory);
    attention_bf16<(HEAD_DIM <= 128 ? 4 : 1), true>(p, memory);
}

#endif

// ---- f32 ----

#define F32_ROWS 16u  // queries of a CTA
#define F32_WARP_ROWS (F32_ROWS / WARPS)
#define F32_STRIDE (HEAD_DIM | 1)  // of a key or value in shared memory: lanes that read different keys meet different banks
#define F32_COLUMNS ((HEAD_DIM + 31) / 32)  // of a lane

struct F32State {
    float sums[F32_WARP_ROWS][F32_COLUMNS];
    float mass[F32_WARP_ROWS], max[F32_WARP_ROWS];
};

// The state before the first key of a chunk.
__device__ __forceinline__ void clear(F32State& state) {
#pragma unroll
    for (u32 r = 0; r < F32_WARP_ROWS; ++r) {
#pragma unroll
        for (u32 c = 0; c < F32_COLUMNS; ++c) state.sums[r][c] = 0.0f;
        state.mass[r] = 0.0f;
        state.max[r] = NEGATIVE_INFINITY;
    }
}

// 64 keys or values; elements at or past `end` are not written.
__device__ __forceinline__ void load_f32_tile(const AttentionParams& p, const Queries& queries, const void* store, u32 first, float* target) {
    const u32 keys = queries.end - first < TILE_KEYS ? queries.end - first : TILE_KEYS;
    for (u32 i = threadIdx.x; i < keys * HEAD_DIM; i += THREADS) {
        const u32 key = i / HEAD_DIM, column = i % HEAD_DIM;
        target[key * F32_STRIDE + column] = slot_of<float>(p, queries, store, first + key)[column];
    }
}

// Tiles of 16 queries; one chunk to a CTA, or a CTA walks its chunks.
KERNEL_BOUNDS(attention_f32, AttentionParams, THREADS, 1) {
    DYNAMIC_SHARED(memory);
    float* shared_tile = (float*)memory;                      // (TILE_KEYS, F32_STRIDE): keys, then values
    float* shared_q = shared_tile + TILE_KEYS * F32_STRIDE;   // (F32_ROWS, HEAD_DIM)
    float* shared_weights = shared_q + F32_ROWS * HEAD_DIM;   // (F32_ROWS, TILE_KEYS)
    const Queries queries = queries_of_cta<F32_ROWS>(p);
    if (is_idle(p, queries)) return;  // the whole CTA
    const Span span = span_of(p, queries);
    const u32 lane = lane_id(), warp_row = warp_id() * F32_WARP_ROWS;

    u32 visible[F32_WARP_ROWS];
    const u64 width = (u64)(p.num_heads + 2 * p.num_kv_heads) * HEAD_DIM;
#pragma unroll
    for (u32 r = 0; r < F32_WARP_ROWS; ++r) {
        const Query query = query_of(p, queries, warp_row + r);
        visible[r] = query.visible;
        const float* source = p.qkv + query.row * width + query.head * HEAD_DIM;
        for (u32 i = lane; i < HEAD_DIM; i += 32) shared_q[(warp_row + r) * HEAD_DIM + i] = query.live ? source[i] : 0.0f;
    }

    F32State state, total;
    clear(state);
    for (u32 tile = span.first; tile < span.end; ++tile) {
        const u32 first = tile * TILE_KEYS;
        __syncthreads();  // the values of the tile before have been read
        load_f32_tile(p, queries, p.keys, first, shared_tile);
        __syncthreads();

        float scores[F32_WARP_ROWS][2];  // keys `lane` and `lane + 32`
#pragma unroll
        for (u32 r = 0; r < F32_WARP_ROWS; ++r) scores[r][0] = scores[r][1] = 0.0f;
#pragma unroll 4
        for (u32 i = 0; i < HEAD_DIM; ++i) {
            const float low = shared_tile[lane * F32_STRIDE + i], high = shared_tile[(lane + 32) * F32_STRIDE + i];
#pragma unroll
            for (u32 r = 0; r < F32_WARP_ROWS; ++r) {
                const float x = shared_q[(warp_row + r) * HEAD_DIM + i];
                scores[r][0] = fmaf(x, low, scores[r][0]);
                scores[r][1] = fmaf(x, high, scores[r][1]);
            }
        }
        u32 most = 0;  // keys that some row of the warp sees
#pragma unroll
        for (u32 r = 0; r < F32_WARP_ROWS; ++r) {
            if (visible[r] <= first) continue;
            const u32 count = visible[r] - first < TILE_KEYS ? visible[r] - first : TILE_KEYS;
            most = most < count ? count : most;
            const float low = lane < count ? scores[r][0] : NEGATIVE_INFINITY;
            const float high = lane + 32 < count ? scores[r][1] : NEGATIVE_INFINITY;
            float max = fmaxf(state.max[r], fmaxf(low, high));
            for (u32 distance = 16; distance > 0; distance /= 2) max = fmaxf(max, __shfl_xor_sync(FULL_WARP, max, distance));
            const float rescale = weight_of(state.max[r], max);
            const float low_weight = weight_of(low, max), high_weight = weight_of(high, max);
            state.max[r] = max;
            state.mass[r] = fmaf(state.mass[r], rescale, warp_sum(low_weight + high_weight));
#pragma unroll
            for (u32 c = 0; c < F32_COLUMNS; ++c) state.sums[r][c] *= rescale;
            shared_weights[(warp_row + r) * TILE_KEYS + lane] = low_weight;
            shared_weights[(warp_row + r) * TILE_KEYS + lane + 32] = high_weight;
        }
        __syncthreads();  // the keys have been read, and the warp's weights are written
        load_f32_tile(p, queries, p.values, first, shared_tile);
        __syncthreads();
        for (u32 key = 0; key < most; ++key) {
#pragma unroll
            for (u32 c = 0; c < F32_COLUMNS; ++c) {
                const u32 column = lane + 32 * c;
                if (column >= HEAD_DIM) continue;
                const float value = shared_tile[key * F32_STRIDE + column];
#pragma unroll
                for (u32 r = 0; r < F32_WARP_ROWS; ++r) {
                    if (first + key < visible[r]) {
                        state.sums[r][c] = fmaf(shared_weights[(warp_row + r) * TILE_KEYS + key], value, state.sums[r][c]);
                    }
                }
            }
        }

        if (p.chunks == 0 && (tile % CHUNK_TILES == CHUNK_TILES - 1 || tile + 1 == span.end)) {
            // The chunk is done.
            const u32 chunk_first = tile / CHUNK_TILES * CHUNK_KEYS;
            if (chunk_first == 0) {
                total = state;
            } else {
#pragma unroll
                for (u32 r = 0; r < F32_WARP_ROWS; ++r) {
                    if (visible[r] <= chunk_first) continue;
                    const Blend by = blend_of(total.max[r], state.max[r]);
                    total.max[r] = by.max;
                    total.mass[r] = blend(by, total.mass[r], state.mass[r]);
#pragma unroll
                    for (u32 c = 0; c < F32_COLUMNS; ++c) total.sums[r][c] = blend(by, total.sums[r][c], state.sums[r][c]);
                }
            }
            clear(state);
        }
    }

    if (p.chunks != 0 && !span.partial) total = state;
#pragma unroll
    for (u32 r = 0; r < F32_WARP_ROWS; ++r) {
        const Query query = query_of(p, queries, warp_row + r);
        if (!query.live) continue;
        float* partial = partial_of<F32_ROWS>(p, blockIdx.z);
        if (span.partial && lane == 0) {
            partial[F32_ROWS * HEAD_DIM + warp_row + r] = state.max[r];
            partial[F32_ROWS * HEAD_DIM + F32_ROWS + warp_row + r] = state.mass[r];
        }
#pragma unroll
        for (u32 c = 0; c < F32_COLUMNS; ++c) {
            const u32 column = lane + 32 * c;
            if (column >= HEAD_DIM) continue;
            if (span.partial) {
                partial[(warp_row + r) * HEAD_DIM + column] = state.sums[r][c];
            } else {
                write_one(p, query, column, normalized(query, total.sums[r][c], total.mass[r]));
            }
        }
    }
    if (span.partial) blend_partials<F32_ROWS>(p, queries);
}
