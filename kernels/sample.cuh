// What the kernels of `sample` share: the records of a row, which of the two routes it takes, and
// the sampled token from its sums.
//
// The reference is `sampling::sample_row`. A row's route follows from its own draw alone: a draw
// from a nucleus or from the most probable tokens, or one that wants the statistics of what is left
// of the row, takes route B (`sample_nucleus`), everything else route A (`sample_tiles`, then
// `sample_draw`).
#pragma once
#include "select.cuh"

#define DRAW_CROSSING 1u   // the nucleus includes the token that crosses top_p
#define DRAW_TRUNCATED 2u  // confidence, margin and entropy after temperature, top-k and nucleus
#define DRAW_FORCED 4u     // `forced` instead of a draw
#define DRAW_PADDING 8u    // nothing is sampled
#define DRAW_TOP_K_AFTER 16u  // the nucleus is one of the whole distribution, not of what top-k leaves
#define DRAW_TOP_K_SHIFT 8    // the bits above hold the k of top-k, 0 for none

// How a row is sampled: `backend::Draw`.
struct DrawRecord {
    double u;  // uniform in [0, 1)
    float temperature;
    float top_p;
    u32 flags;  // DRAW_*, and k
    u32 forced;
    u32 position;  // passed on
    u32 sequence;  // passed on
};
FIELD(DrawRecord, u, 0);
FIELD(DrawRecord, temperature, 8);
FIELD(DrawRecord, top_p, 12);
FIELD(DrawRecord, flags, 16);
FIELD(DrawRecord, forced, 20);
FIELD(DrawRecord, position, 24);
FIELD(DrawRecord, sequence, 28);
LAYOUT(DrawRecord, 32);

#define STATUS_BROKEN 1u   // a logit is NaN or +inf
#define STATUS_NOTHING 2u  // no finite logit that is not banned
#define STATUS_FORCED 3u   // the forced token is banned or outside the vocabulary
#define STATUS_CHANGED 4u  // the logits differ between two passes over them
#define NO_ID 0xffffffffu

// The outcome: `backend::SampledToken`. Where `status` is not 0 the statistics are zeros.
struct SampledRecord {
    u32 token;  // under a status: the lowest broken id, 0, or the forced token
    float confidence;
    float log_prob;
    float margin;
    float entropy;
    u32 status;  // 0 or STATUS_*
    u32 position;
    u32 chosen;  // 0; `unmask` sets 1
};
FIELD(SampledRecord, token, 0);
FIELD(SampledRecord, confidence, 4);
FIELD(SampledRecord, log_prob, 8);
FIELD(SampledRecord, margin, 12);
FIELD(SampledRecord, entropy, 16);
FIELD(SampledRecord, status, 20);
FIELD(SampledRecord, position, 24);
FIELD(SampledRecord, chosen, 28);
LAYOUT(SampledRecord, 32);

// Ids of a vocabulary tile, and of a piece of it: the smallest part whose mass route A keeps.
#define IDS 128
#define PIECE_IDS 32
#define PIECES (IDS / PIECE_IDS)

// What route A keeps of a row's logits l in a tile.
struct TileRecord {
    float max;     // -inf if there is no finite logit
    float second;  // the second largest, with its repetitions
    float mass;    // sum exp(l - max); NaN if a logit is NaN or +inf
    float moment;  // sum exp(l - max) (l - max)
    // Rows that draw: sum exp((l - max) / temperature) of each piece. Others: [0] holds the bits of
    // the lowest id with the maximum. A broken tile:
    // [0] holds those of the lowest id whose logit is NaN or +inf.
    float choice[PIECES];
};

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ __forceinline__ bool draws(const DrawRecord& d) { return !(d.flags & DRAW_FORCED) && d.temperature != 0.0f; }
__device__ __forceinline__ u32 top_k(const DrawRecord& d) { return d.flags >> DRAW_TOP_K_SHIFT; }
// Whether anything is taken away from a drawn row.
__device__ __forceinline__ bool is_cut(const DrawRecord& d) { return d.top_p < 1.0f || top_k(d) > 0; }
__device__ __forceinline__ bool is_nucleus(const DrawRecord& d) {
    const bool truncated_statistics = (d.flags & (DRAW_TRUNCATED | DRAW_FORCED)) == DRAW_TRUNCATED;
    const bool tempered = d.temperature != 0.0f && d.temperature != 1.0f;
    return !(d.flags & DRAW_PADDING) && ((truncated_statistics && (tempered || is_cut(d))) || (draws(d) && is_cut(d)));
}
__device__ __forceinline__ bool is_fused(const DrawRecord& d) { return !(d.flags & DRAW_PADDING) && !is_nucleus(d); }

// `banned` holds a bit for every id, or is null.
__device__ __forceinline__ bool is_banned(const u32* banned, u32 id) { return banned && (banned[id / 32] >> id % 32 & 1u); }

__device__ __forceinline__ bool is_broken(float logit) { return !(logit < infinity()); }

// exp(below / temperature), for a logit `below` a reference that is no less.
__device__ __forceinline__ float tempered(float below, float temperature) {
    if (below == -infinity()) return 0.0f;
    return expf(temperature == 1.0f ? below : below / temperature);
}

// exp(below) below, and 0 where that would be 0 times -inf.
__device__ __forceinline__ float moment_of(float mass, float below) { return mass * fmaxf(below, -100.0f); }

// The largest and second largest logit so far; `at` is where the largest is, the lowest of equals.
struct Top {
    float max, second;
    u32 at;
};

__device__ __forceinline__ Top no_top() { return Top{-infinity(), -infinity(), NO_ID}; }

__device__ __forceinline__ Top join(const Top& a, const Top& b) {
    const bool b_first = b.max > a.max || (b.max == a.max && b.at < a.at);
    return b_first ? Top{b.max, fmaxf(b.second, a.max), b.at} : Top{a.max, fmaxf(a.second, b.max), a.at};
}

__device__ __forceinline__ Top shuffle_xor(const Top& top, u32 distance) {
    return Top{__shfl_xor_sync(FULL_WARP, top.max, distance), __shfl_xor_sync(FULL_WARP, top.second, distance),
               __shfl_xor_sync(FULL_WARP, top.at, distance)};
}

// Over the CTA, in every thread. Two barriers.
__device__ __forceinline__ Top block_join(Top top) {
    __shared__ Top partial[WARPS];
    for (u32 distance = 16; distance > 0; distance /= 2) top = join(top, shuffle_xor(top, distance));
    if (lane_id() == 0) partial[warp_id()] = top;
    __syncthreads();
    top = partial[0];
    for (u32 w = 1; w < WARPS; ++w) top = join(top, partial[w]);
    __syncthreads();  // `partial` may be rewritten by the next call
    return top;
}

__device__ __forceinline__ void refuse(SampledRecord* out, const DrawRecord& draw, u32 status, u32 token) {
    if (threadIdx.x == 0) *out = SampledRecord{token, 0.0f, 0.0f, 0.0f, 0.0f, status, draw.position, 0};
}

// One thread writes the outcome. `logit` is the token's; `share` its mass among what was kept after
// temperature, 1 for the most probable token under temperature 0. `sum` and `moment` are relative
// to `max`, at temperature 1.
__device__ __forceinline__ void write_sampled(SampledRecord* out, const DrawRecord& draw, u32 token, float logit, double share, float max, float second,
                                       double sum, double moment) {
    const double log_sum = log(sum);
    const double log_prob = (double)logit - (double)max - log_sum;
    // The most probable token of a row from which nothing was taken.
    const bool whole = draw.temperature == 0.0f && !is_cut(draw);
    const bool raw = !(draw.flags & DRAW_TRUNCATED) || (draw.flags & DRAW_FORCED) || whole;
    const double inverse = exp(-log_sum);  // of the sum; a division is a call, and costs more registers
    const double margin = (1.0 - exp((double)second - (double)max)) * inverse;
    const double entropy = log_sum - moment * inverse;
    *out = SampledRecord{token,
                          (float)(raw ? exp(log_prob) : share),
                          (float)log_prob,
                          (float)margin,
                          (float)(entropy > 0.0 ? entropy : 0.0),
                          0,
                          draw.position,
                          0};
}
