// rope_append: RMS norm of q and k per head (where weights are given), rotary positions on q and k,
// k and v into the pages.
//
// The first R = ROTARY_DIM elements of a head are rotated in pairs (i, i + R / 2): (a, b) becomes
// (a cos - b sin, b cos + a sin), each product and sum rounded once, so that the numbers are those
// of the CPU. The others travel in pairs too, but are not turned. cos and sin come from a table
// that the host makes in f64 from the f32 angle: sines of large arguments in f32 would be the
// largest error of a whole layer, and f64 on a GPU without f64 units the largest cost. q is
// rewritten in place in f32; k and v go to the row's slot as the pages store them, and their place
// in the fused row is left as it is.
//
// Layout: a power of two of lanes per (row, head), each with four pairs at a time; what the head's
// pairs are does not depend on neighbours. D or R that is no multiple of 8 goes pair by pair. A row
// of slot NO_SLOT is padding: it is not touched and writes nothing.
// Cost: one read of the fused rows, one write of q in f32 and of k and v in their dtype; bound by
// memory.
#include "common.cuh"

#define NO_SLOT 0xffffffffu

struct RopeAppendParams {
    float* qkv;               // (T, (H + 2 K) D): queries, keys, values, head-major
    const u32* positions;     // (T)
    const u32* slots;         // (T) page * PAGE_SIZE + offset, or NO_SLOT
    const float* rotations;   // (positions, 2 (R / 2)): cosines, then sines
    const float* q_norm;      // (D) or null
    const float* k_norm;      // (D) or null
    void* keys;               // [page][kv head][offset][D] of one layer, f32 or bf16
    void* values;             // the same
    u32 rows;                 // T
    u32 num_heads;            // H
    u32 num_kv_heads;         // K
    float eps;
};
FIELD(RopeAppendParams, qkv, 0);
FIELD(RopeAppendParams, positions, 8);
FIELD(RopeAppendParams, slots, 16);
FIELD(RopeAppendParams, rotations, 24);
FIELD(RopeAppendParams, q_norm, 32);
FIELD(RopeAppendParams, k_norm, 40);
FIELD(RopeAppendParams, keys, 48);
FIELD(RopeAppendParams, values, 56);
FIELD(RopeAppendParams, rows, 64);
FIELD(RopeAppendParams, num_heads, 68);
FIELD(RopeAppendParams, num_kv_heads, 72);
FIELD(RopeAppendParams, eps, 76);
LAYOUT(RopeAppendParams, 80);

#define HALF (HEAD_DIM / 2)
#define TURNING (ROTARY_DIM / 2)
// Pairs that a lane takes at once, lanes of a head (as the launcher counts them), and how often
// they go round.
#define VECTOR (HEAD_DIM % 8 == 0 && ROTARY_DIM % 8 == 0 ? 4 : 1)
#define UNITS (HALF / VECTOR)
#define LANES (UNITS > 16 ? 32 : UNITS > 8 ? 16 : UNITS > 4 ? 8 : UNITS > 2 ? 4 : UNITS > 1 ? 2 : 1)
#define ROUNDS (UNITS > 0 ? (UNITS + LANES - 1) / LANES : 1)

static_assert(ROTARY_DIM <= HEAD_DIM, "more elements are rotated than a head has");
static_assert(ROTARY_DIM == HEAD_DIM || ROTARY_DIM % 2 == 0, "a part of a head is rotated in whole pairs");

// `VECTOR` elements of both halves of a head.
struct Pairs {
    float low[VECTOR], high[VECTOR];
};

// Where the low and the high elements of unit `unit` begin: in the halves of the rotated part, then
// in those of the rest.
__device__ __forceinline__ u32 low_of(u32 unit) {
    const u32 pair = unit * VECTOR;
    return pair < TURNING ? pair : pair + TURNING;
}

__device__ __forceinline__ u32 high_of(u32 unit) {
    return low_of(unit) + (unit * VECTOR < TURNING ? TURNING : HALF - TURNING);
}

template <u32 COUNT>
__device__ __forceinline__ void load_run(float (&values)[COUNT], const float* source) {
    if constexpr (COUNT == 4) {
        const float4 v = *(const float4*)source;
        values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
    } else {
        values[0] = *source;
    }
}

template <u32 COUNT>
__device__ __forceinline__ void store_run(float* target, const float (&values)[COUNT]) {
    if constexpr (COUNT == 4) {
        *(float4*)target = make_float4(values[0], values[1], values[2], values[3]);
    } else {
        *target = values[0];
    }
}

template <u32 COUNT>
__device__ __forceinline__ void store_run(u16* target, const float (&values)[COUNT]) {
    if constexpr (COUNT == 4) {
        *(uint2*)target = make_uint2(bf16x2_from_f32(values[0], values[1]), bf16x2_from_f32(values[2], values[3]));
    } else {
        *target = bf16_from_f32(values[0]);
    }
}

template <typename Element>
__device__ __forceinline__ void rope_append_head(const RopeAppendParams& p) {
    const u32 heads = p.num_heads + 2 * p.num_kv_heads;
    const u32 index = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    const u32 lane = threadIdx.x % LANES;
    const u32 row = index / heads, head = index % heads;
    // Lanes without work stay for the exchange of the norm.
    const u32 slot = row < p.rows ? p.slots[row] : NO_SLOT;
    const bool live = slot != NO_SLOT;
    const bool is_query = head < p.num_heads, is_value = head >= p.num_heads + p.num_kv_heads;
    float* x = p.qkv + (u64)index * HEAD_DIM;

    Pairs pairs[ROUNDS];
    float last = 0.0f;  // of an odd D, which no pair holds
    float squares = 0.0f;
#pragma unroll
    for (u32 round = 0; round < ROUNDS; ++round) {
        const u32 unit = round * LANES + lane;
        if (!live || unit >= UNITS) continue;
        load_run(pairs[round].low, x + low_of(unit));
        load_run(pairs[round].high, x + high_of(unit));
#pragma unroll
        for (u32 i = 0; i < VECTOR; ++i) {
            squares = fmaf(pairs[round].low[i], pairs[round].low[i], squares);
            squares = fmaf(pairs[round].high[i], pairs[round].high[i], squares);
        }
    }
    if (HEAD_DIM % 2 == 1 && live && lane == 0) {
        last = x[HEAD_DIM - 1];
        squares = fmaf(last, last, squares);
    }
    for (u32 distance = LANES / 2; distance > 0; distance /= 2) squares += __shfl_xor_sync(FULL_WARP, squares, distance);
    if (!live) return;

    const float* weight = is_query ? p.q_norm : is_value ? nullptr : p.k_norm;
    const float scale = 1.0f / sqrtf(squares / (float)HEAD_DIM + p.eps);
    const float* rotation = p.rotations + (u64)p.positions[row] * (2 * TURNING);
    const u32 kv_head = (head - p.num_heads) % p.num_kv_heads;
    const u64 place = (((u64)(slot / PAGE_SIZE) * p.num_kv_heads + kv_head) * PAGE_SIZE + slot % PAGE_SIZE) * HEAD_DIM;
    Element* stored = (Element*)(is_value ? p.values : p.keys) + place;
#pragma unroll
    for (u32 round = 0; round < ROUNDS; ++round) {
        const u32 unit = round * LANES + lane;
        if (unit >= UNITS) continue;
        Pairs out = pairs[round];
        if (weight) {
            float low[VECTOR], high[VECTOR];
            load_run(low, weight + low_of(unit));
            load_run(high, weight + high_of(unit));
#pragma unroll
            for (u32 i = 0; i < VECTOR; ++i) {
                out.low[i] = __fmul_rn(__fmul_rn(out.low[i], scale), low[i]);
                out.high[i] = __fmul_rn(__fmul_rn(out.high[i], scale), high[i]);
            }
        }
        if (!is_value && unit * VECTOR < TURNING) {
            float cosine[VECTOR], sine[VECTOR];
            load_run(cosine, rotation + unit * VECTOR);
            load_run(sine, rotation + TURNING + unit * VECTOR);
#pragma unroll
            for (u32 i = 0; i < VECTOR; ++i) {
                const float a = out.low[i], b = out.high[i];
                out.low[i] = __fadd_rn(__fmul_rn(a, cosine[i]), -__fmul_rn(b, sine[i]));
                out.high[i] = __fadd_rn(__fmul_rn(b, cosine[i]), __fmul_rn(a, sine[i]));
            }
        }
        if (is_query) {
            store_run(x + low_of(unit), out.low);
            store_run(x + high_of(unit), out.high);
        } else {
            store_run(stored + low_of(unit), out.low);
            store_run(stored + high_of(unit), out.high);
        }
    }
    if (HEAD_DIM % 2 == 1 && lane == 0) {
        if (weight) last = __fmul_rn(__fmul_rn(last, scale), weight[HEAD_DIM - 1]);
        if (is_query) {
            x[HEAD_DIM - 1] = last;
        } else {
            store1(stored + HEAD_DIM - 1, last);
        }
    }
}

KERNEL(rope_append_f32, RopeAppendParams) { rope_append_head<float>(p); }
KERNEL(rope_append_bf16, RopeAppendParams) { rope_append_head<u16>(p); }
