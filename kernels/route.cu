// route: the experts of each row from its router's logits, and the rows in the order of their
// experts.
//
// Three entries, one after the other:
// - route_choose: a warp per row; lane l holds the scores of experts l, l + 32, ... in registers
//   (EXPERTS_PER_LANE of them). Choices are rounds of one warp-wide maximum; they are written in
//   ascending order of their experts.
// - route_count: a warp per expert counts its choices.
// - route_order: a warp per expert gives its choices places in ascending order of their rows, after
//   those of all lower experts, and cuts its places into tiles of `tile_rows`, which `moe`
//   multiplies.
// No atomics: places do not depend on which thread comes first. Scores rank by (key, lower id); NaN
// ranks below every number.
// Cost: reads the logits once and the (rows, k) choices twice for each expert, from L2: at 1,024
// rows of 8 out of 256 experts, 256 loads of a warp each.
#include "common.cuh"

#define SCORE_SOFTMAX 0u      // p
#define SCORE_RENORMALISE 1u  // p / sum of the chosen
#define SCORE_SIGMOID 2u      // s / (sum of the chosen + 1e-20) * scale, chosen by s + bias within groups

struct RouteParams {
    const float* logits;  // (rows, num_experts)
    const float* bias;    // (num_experts) or null
    u32* expert;          // (rows, top_k) ascending
    float* weight;        // (rows, top_k)
    u32* count;           // (num_experts) choices
    u32* token;           // (rows * top_k) the row at each place
    u32* place;           // (rows, top_k) the place of each choice
    uint4* tiles;         // (num_tiles) expert, first place, places, 0
    u32* num_tiles;
    u32 rows;
    u32 num_experts;  // at most 32 * EXPERTS_PER_LANE
    u32 top_k;
    u32 score;
    u32 num_groups;  // at most 32
    u32 top_groups;
    float scale;
    u32 tile_rows;
};
FIELD(RouteParams, logits, 0);
FIELD(RouteParams, bias, 8);
FIELD(RouteParams, expert, 16);
FIELD(RouteParams, weight, 24);
FIELD(RouteParams, count, 32);
FIELD(RouteParams, token, 40);
FIELD(RouteParams, place, 48);
FIELD(RouteParams, tiles, 56);
FIELD(RouteParams, num_tiles, 64);
FIELD(RouteParams, rows, 72);
FIELD(RouteParams, num_experts, 76);
FIELD(RouteParams, top_k, 80);
FIELD(RouteParams, score, 84);
FIELD(RouteParams, num_groups, 88);
FIELD(RouteParams, top_groups, 92);
FIELD(RouteParams, scale, 96);
FIELD(RouteParams, tile_rows, 100);
LAYOUT(RouteParams, 104);

#define NOBODY 0xffffffffu

__device__ __forceinline__ float lowest() { return __uint_as_float(0xff800000u); }  // -inf

// A candidate: its key, and its id or NOBODY.
struct Best {
    float key;
    u32 id;
};

// The better of two: the larger key, then the lower id.
__device__ __forceinline__ Best better(Best a, Best b) {
    const bool take = b.id != NOBODY && (a.id == NOBODY || b.key > a.key || (b.key == a.key && b.id < a.id));
    return take ? b : a;
}

// The best of the warp, in every lane.
__device__ __forceinline__ Best warp_best(Best best) {
    for (u32 distance = 16; distance > 0; distance /= 2) {
        best = better(best, Best{__shfl_xor_sync(FULL_WARP, best.key, distance), __shfl_xor_sync(FULL_WARP, best.id, distance)});
    }
    return best;
}

__device__ __forceinline__ float warp_max(float value) {
    for (u32 distance = 16; distance > 0; distance /= 2) value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, distance));
    return value;
}

__device__ __forceinline__ u32 warp_count(u32 value) {
    for (u32 distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(FULL_WARP, value, distance);
    return value;
}

// Lanes below this one, as a mask.
__device__ __forceinline__ u32 lanes_below() { return (1u << lane_id()) - 1; }

// The groups that are kept, as a mask: those whose two best keys have the largest sums.
__device__ __forceinline__ u32 kept_groups(const RouteParams& p, const float (&keys)[EXPERTS_PER_LANE]) {
    const u32 size = p.num_experts / p.num_groups;
    float sum = lowest();  // of group `lane`
    for (u32 group = 0; group < p.num_groups; ++group) {
        float first = lowest();
        float second = lowest();
#pragma unroll
        for (u32 s = 0; s < EXPERTS_PER_LANE; ++s) {
            const u32 id = s * 32 + lane_id();
            if (id < p.num_experts && id / size == group) {
                second = fmaxf(second, fminf(first, keys[s]));
                first = fmaxf(first, keys[s]);
            }
        }
        for (u32 distance = 16; distance > 0; distance /= 2) {
            const float other_first = __shfl_xor_sync(FULL_WARP, first, distance);
            const float other_second = __shfl_xor_sync(FULL_WARP, second, distance);
            second = fmaxf(fmaxf(second, other_second), fminf(first, other_first));
            first = fmaxf(first, other_first);
        }
        if (lane_id() == group) sum = first + second;
    }
    u32 kept = 0;
    for (u32 i = 0; i < p.top_groups; ++i) {
        const bool open = lane_id() < p.num_groups && !(kept >> lane_id() & 1u);
        const Best best = warp_best(Best{sum, open ? lane_id() : NOBODY});
        kept |= 1u << best.id;
    }
    return kept;
}

KERNEL(route_choose, RouteParams) {
    const u32 row = blockIdx.x * WARPS + warp_id();
    if (row >= p.rows) return;
    const float* logits = p.logits + (u64)row * p.num_experts;
    const bool sigmoid = p.score == SCORE_SIGMOID;
    float scores[EXPERTS_PER_LANE];
    float keys[EXPERTS_PER_LANE];
    u32 open = 0;  // slots that may be chosen
    float max = lowest();
#pragma unroll
    for (u32 s = 0; s < EXPERTS_PER_LANE; ++s) {
        const u32 id = s * 32 + lane_id();
        const bool live = id < p.num_experts;
        scores[s] = live ? logits[id] : lowest();
        open |= live ? 1u << s : 0u;
        max = fmaxf(max, scores[s]);
    }
    max = warp_max(max);
    float total = 0.0f;
#pragma unroll
    for (u32 s = 0; s < EXPERTS_PER_LANE; ++s) {
        keys[s] = scores[s];
        if (open >> s & 1u) {
            if (sigmoid) {
                scores[s] = 1.0f / (1.0f + expf(-scores[s]));
                keys[s] = scores[s] + (p.bias ? p.bias[s * 32 + lane_id()] : 0.0f);
            } else {
                scores[s] = expf(scores[s] - max);
                total += scores[s];
            }
        }
        if (keys[s] != keys[s]) keys[s] = lowest();
    }
    if (sigmoid && p.num_groups > 1) {
        const u32 kept = kept_groups(p, keys);
        const u32 size = p.num_experts / p.num_groups;
#pragma unroll
        for (u32 s = 0; s < EXPERTS_PER_LANE; ++s) {
            const u32 id = s * 32 + lane_id();
            if (id < p.num_experts && !(kept >> (id / size) & 1u)) open &= ~(1u << s);
        }
    }
    if (!sigmoid) {
        total = warp_sum(total);
#pragma unroll
        for (u32 s = 0; s < EXPERTS_PER_LANE; ++s) scores[s] = scores[s] / total;
    }

    u32 chosen = 0;  // slots
    for (u32 i = 0; i < p.top_k; ++i) {
        Best best = Best{lowest(), NOBODY};
#pragma unroll
        for (u32 s = 0; s < EXPERTS_PER_LANE; ++s) {
            if (open >> s & 1u) best = better(best, Best{keys[s], s * 32 + lane_id()});
        }
        best = warp_best(best);
        if (best.id % 32 == lane_id()) {
            open &= ~(1u << (best.id / 32));
            chosen |= 1u << (best.id / 32);
        }
    }
    float sum = 0.0f;
#pragma unroll
    for (u32 s = 0; s < EXPERTS_PER_LANE; ++s) sum += chosen >> s & 1u ? scores[s] : 0.0f;
    sum = warp_sum(sum);
    u32 before = 0;
#pragma unroll
    for (u32 s = 0; s < EXPERTS_PER_LANE; ++s) {
        const bool mine = chosen >> s & 1u;
        const u32 lanes = __ballot_sync(FULL_WARP, mine);
        if (mine) {
            const u64 at = (u64)row * p.top_k + before + __popc(lanes & lanes_below());
            float weight = scores[s];
            if (sigmoid) weight = weight / (sum + 1e-20f) * p.scale;
            if (p.score == SCORE_RENORMALISE) weight = weight / sum;
            p.expert[at] = s * 32 + lane_id();
            p.weight[at] = weight;
        }
        before += __popc(lanes);
    }
}

// Calls on_chunk(index, mine, lanes) for every 32 choices in order: this lane's choice, whether it
// is of `expert`, and in which lanes it is.
template <typename OnChunk>
__device__ __forceinline__ void choices_of(const RouteParams& p, u32 expert, OnChunk on_chunk) {
    const u32 choices = p.rows * p.top_k;
    for (u32 first = 0; first < choices; first += 32) {
        const u32 i = first + lane_id();
        const bool mine = i < choices && p.expert[i] == expert;
        on_chunk(i, mine, __ballot_sync(FULL_WARP, mine));
    }
}

KERNEL(route_count, RouteParams) {
    const u32 expert = blockIdx.x * WARPS + warp_id();
    if (expert >= p.num_experts) return;
    u32 count = 0;
    choices_of(p, expert, [&](u32, bool, u32 lanes) { count += __popc(lanes); });
    if (lane_id() == 0) p.count[expert] = count;
}

KERNEL(route_order, RouteParams) {
    const u32 expert = blockIdx.x * WARPS + warp_id();
    if (expert >= p.num_experts) return;
    u32 place = 0;
    u32 tile = 0;
    for (u32 lower = lane_id(); lower < expert; lower += 32) {
        place += p.count[lower];
        tile += (p.count[lower] + p.tile_rows - 1) / p.tile_rows;
    }
    place = warp_count(place);
    tile = warp_count(tile);
    const u32 count = p.count[expert];
    for (u32 first = lane_id() * p.tile_rows; first < count; first += 32 * p.tile_rows) {
        p.tiles[tile + first / p.tile_rows] = make_uint4(expert, place + first, count - first < p.tile_rows ? count - first : p.tile_rows, 0);
    }
    if (expert + 1 == p.num_experts && lane_id() == 0) *p.num_tiles = tile + (count + p.tile_rows - 1) / p.tile_rows;
    choices_of(p, expert, [&](u32 i, bool mine, u32 lanes) {
        if (mine) {
            const u32 at = place + __popc(lanes & lanes_below());
            p.place[i] = at;
            p.token[at] = i / p.top_k;
        }
        place += __popc(lanes);
    });
}
