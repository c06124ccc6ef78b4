// sample_shortlist: the LM head at the ids of each row's shortlist, and the token choice among
// them, as `sampling::sample_row` specifies with -inf elsewhere.
//
// A list is short, so everything after the products happens in shared memory, in f64: the masses of
// the ids, their order by a bitonic sort where a nucleus or top-k needs one (larger logit first,
// ties to the lower id; what is kept is a prefix of it), and the draw as an inverse CDF over
// ascending ids.
// A logit is a dot product of one warp: lane l takes quads l, l + 32, ... of k in ascending order,
// then the lanes meet in a butterfly. It is not the sum of `gemm.cuh`, so its last bits may differ
// from those of `sample`.
//
// Layout: one CTA per row; a warp per id, a thread per few neighbouring ids in the scans. Every sum
// has a fixed order.
// Cost: count k weights per row, gathered; bound by their latency. The sort takes 55 rounds for
// 1,024 ids, each with a barrier.
#include "sample.cuh"
#include "groups.cuh"

struct SampleShortlistParams {
    const void* hidden;         // (rows, k) f32 or bf16
    const void* head;           // (vocab, k), the same type or blocks
    const float* bias;          // (vocab) or null
    const u32* ids;             // (lists, count) ascending, NO_ID at the end of a shorter list
    const u32* which;           // (rows) the list of each row
    const DrawRecord* draws;    // (rows)
    SampledRecord* sampled;  // (rows) out
    u32 count;                  // at most MAX_SHORTLIST
    u32 k;
};
FIELD(SampleShortlistParams, hidden, 0);
FIELD(SampleShortlistParams, head, 8);
FIELD(SampleShortlistParams, bias, 16);
FIELD(SampleShortlistParams, ids, 24);
FIELD(SampleShortlistParams, which, 32);
FIELD(SampleShortlistParams, draws, 40);
FIELD(SampleShortlistParams, sampled, 48);
FIELD(SampleShortlistParams, count, 56);
FIELD(SampleShortlistParams, k, 60);
LAYOUT(SampleShortlistParams, 64);

// CTAs of a multiprocessor that leave a thread 80 registers. Without this bound the assembler aims
// at more and spills.
#define RESIDENT 3
static_assert((MAX_SHORTLIST & (MAX_SHORTLIST - 1)) == 0, "what is sorted is filled up to a power of two");

// Over all k; every lane ends with it.
template <typename T>
__device__ __forceinline__ float dot(const T* x, const WeightRow<T, GROUP_BITS>& w, u32 k, bool aligned) {
    float sum = 0.0f;
    if (aligned) {
#pragma unroll 4
        for (u32 at = lane_id() * 4; at < k; at += 128) {
            const float4 a = load4(x + at), b = quad_at(w, at);
            sum = fmaf(a.x, b.x, sum);
            sum = fmaf(a.y, b.y, sum);
            sum = fmaf(a.z, b.z, sum);
            sum = fmaf(a.w, b.w, sum);
        }
    } else {
        for (u32 at = lane_id() * 4; at < k; at += 128) {
            for (u32 i = at; i < at + 4 && i < k; ++i) sum = fmaf(load1(x + i), value_at(w, i), sum);
        }
    }
    return warp_sum(sum);
}

// Sum of `value` over all lower threads of the CTA; `total` is the sum over all. Two barriers.
__device__ __forceinline__ double exclusive_sum(double value, double& total) {
    __shared__ double partial[WARPS];
    double inclusive = value;
    for (u32 distance = 1; distance < 32; distance *= 2) {
        const double lower = __longlong_as_double((long long)shuffle_up((u64)__double_as_longlong(inclusive), distance));
        if (lane_id() >= distance) inclusive += lower;
    }
    const double below = __longlong_as_double((long long)shuffle_up((u64)__double_as_longlong(inclusive), 1));
    if (lane_id() == 31) partial[warp_id()] = inclusive;
    __syncthreads();
    double before = 0.0;
    total = 0.0;
    for (u32 w = 0; w < WARPS; ++w) {
        if (w == warp_id()) before = total;
        total += partial[w];
    }
    __syncthreads();  // `partial` may be rewritten by the next call
    return before + (lane_id() == 0 ? 0.0 : below);
}

// Sorts `size` words, a power of two, ascending. Begins and ends with a barrier.
__device__ __forceinline__ void sort(u64* words, u32 size) {
    __syncthreads();
    for (u32 width = 2; width <= size; width *= 2) {
        for (u32 distance = width / 2; distance > 0; distance /= 2) {
            for (u32 i = threadIdx.x; i < size / 2; i += THREADS) {
                const u32 low = 2 * i - (i & (distance - 1)), high = low + distance;
                const u64 a = words[low], b = words[high];
                if ((a > b) == ((low & width) == 0)) {
                    words[low] = b;
                    words[high] = a;
                }
            }
            __syncthreads();  // the next round reads what others exchanged
        }
    }
}

// How many of the ids may be drawn, by their `order`: ranks from 0, the place of an id in the lower
// half of its word.
__device__ __forceinline__ u32 cut_of(const DrawRecord& draw, const float* logits, const double* masses, const u64* order, u32 count) {
    u32 kept = count;
    if (top_k(draw) > 0) {  // uniform over the CTA
        const u32 last = top_k(draw) < count ? top_k(draw) : count;
        const float least = logits[(u32)order[last - 1]];
        u64 above = 0;
        for (u32 i = threadIdx.x; i < count; i += THREADS) above += logits[i] >= least;
        kept = (u32)block_sum64(above);
    }
    if (draw.top_p >= 1.0f) return kept;
    const u32 span = (count + THREADS - 1) / THREADS;
    const u32 first = threadIdx.x * span, end = first + span < count ? first + span : count;
    // The nucleus is one of what top-k leaves, or of everything.
    const u32 members = draw.flags & DRAW_TOP_K_AFTER ? count : kept;
    double mine = 0.0, total;
    for (u32 rank = first; rank < end && rank < members; ++rank) mine += masses[(u32)order[rank]];
    double cumulative = exclusive_sum(mine, total);
    u64 outside = count;  // the first rank that is not kept
    for (u32 rank = first; rank < end && outside == count; ++rank) {
        const double before = cumulative;
        cumulative += masses[(u32)order[rank]];
        const bool open = draw.flags & DRAW_CROSSING ? before < (double)draw.top_p * total : cumulative <= (double)draw.top_p * total;
        if (rank > 0 && !open) outside = rank;
    }
    outside = block_min(outside);
    return outside < kept ? (u32)outside : kept;
}

template <typename T>
__device__ __forceinline__ void sample_shortlist_row(const SampleShortlistParams& p) {
    __shared__ float logits[MAX_SHORTLIST];
    __shared__ u32 ids[MAX_SHORTLIST];
    __shared__ double masses[MAX_SHORTLIST];
    __shared__ u64 order[MAX_SHORTLIST];
    const DrawRecord draw = p.draws[blockIdx.x];
    SampledRecord* out = p.sampled + blockIdx.x;
    const u32* list = p.ids + (u64)p.which[blockIdx.x] * p.count;
    const T* x = (const T*)p.hidden + (u64)blockIdx.x * p.k;
    const bool aligned = (u64)p.hidden % 16 == 0 && (GROUP_BITS != 0 || (u64)p.head % 16 == 0) && p.k % 4 == 0;
    for (u32 i = warp_id(); i < p.count; i += WARPS) {
        const u32 id = list[i];
        float logit = -infinity();
        if (id != NO_ID) {  // uniform over the warp
            logit = dot(x, weight_row<T, GROUP_BITS>(p.head, id, p.k), p.k, aligned);
            if (p.bias) logit += p.bias[id];
        }
        if (lane_id() == 0) {
            logits[i] = logit;
            ids[i] = id;
        }
    }
    __syncthreads();  // all logits are there

    const bool forced = draw.flags & DRAW_FORCED;
    Top top = no_top();
    u64 broken = NO_ID, place = NO_ID;  // the lowest id, and where the forced token is
    for (u32 i = threadIdx.x; i < p.count; i += THREADS) {
        if (is_broken(logits[i]) && broken == NO_ID) broken = ids[i];
        if (forced && ids[i] == draw.forced && ids[i] != NO_ID) place = i;
        top = join(top, Top{logits[i], -infinity(), i});
    }
    broken = block_min(broken);
    if (broken != NO_ID) return refuse(out, draw, STATUS_BROKEN, (u32)broken);
    top = block_join(top);
    if (top.max == -infinity()) return refuse(out, draw, STATUS_NOTHING, 0);
    place = block_min(place);
    if (forced && place == NO_ID) return refuse(out, draw, STATUS_FORCED, draw.forced);

    double sum = 0.0, moment = 0.0;
    for (u32 i = threadIdx.x; i < p.count; i += THREADS) {
        if (logits[i] == -infinity()) continue;
        const double below = (double)logits[i] - (double)top.max;
        const double mass = exp(below);
        sum += mass;
        moment += mass * below;
    }
    sum = block_sum64(sum);
    moment = block_sum64(moment);

    const bool greedy = draw.temperature == 0.0f;  // the first of what temperature 1 leaves
    const bool truncated_statistics = !forced && (draw.flags & DRAW_TRUNCATED);
    if (forced || (greedy && !truncated_statistics)) {
        const u32 chosen = forced ? (u32)place : top.at;
        if (threadIdx.x == 0) write_sampled(out, draw, ids[chosen], logits[chosen], 1.0, top.max, top.second, sum, moment);
        return;
    }

    const double inverse_temperature = greedy ? 1.0 : 1.0 / (double)draw.temperature;
    u32 size = 2;
    while (size < p.count) size *= 2;
    for (u32 i = threadIdx.x; i < size; i += THREADS) {
        const float logit = i < p.count ? logits[i] : -infinity();
        if (i < p.count) masses[i] = logit == -infinity() ? 0.0 : exp(((double)logit - (double)top.max) * inverse_temperature);
        order[i] = (u64)(u32)~ordered_bits(logit) << 32 | i;
    }
    u32 kept = p.count;
    if (is_cut(draw)) {  // uniform over the CTA
        sort(order, size);
        kept = cut_of(draw, logits, masses, order, p.count);
        for (u32 rank = kept + threadIdx.x; rank < p.count; rank += THREADS) masses[(u32)order[rank]] = 0.0;
    }
    __syncthreads();  // what is cut off has no mass any more

    const u32 span = (p.count + THREADS - 1) / THREADS;
    const u32 first = threadIdx.x * span, end = first + span < p.count ? first + span : p.count;
    double mine = 0.0, spread = 0.0, total;
    for (u32 i = first; i < end; ++i) {
        if (!(masses[i] > 0.0)) continue;
        mine += masses[i];
        spread += masses[i] * ((double)logits[i] - (double)top.max) * inverse_temperature;
    }
    double cumulative = exclusive_sum(mine, total);
    // The first place whose cumulative mass exceeds the target; should rounding leave the target
    // out of reach, the last with any mass.
    u64 reached = NO_ID, last = NO_ID;
    for (u32 i = first; i < end; ++i) {
        if (!(masses[i] > 0.0)) continue;
        cumulative += masses[i];
        if (reached == NO_ID && cumulative > draw.u * total) reached = i;
        last = NO_ID - i;
    }
    reached = block_min(reached);
    last = block_min(last);
    spread = block_sum64(spread);
    const u32 chosen = greedy ? top.at : reached != NO_ID ? (u32)reached : NO_ID - (u32)last;
    if (threadIdx.x != 0) return;
    write_sampled(out, draw, ids[chosen], logits[chosen], masses[chosen] / total, top.max, top.second, sum, moment);
    if (truncated_statistics) {
        const double next = kept > 1 ? exp(((double)top.second - (double)top.max) * inverse_temperature) : 0.0;
        const double entropy = log(total) - spread / total;
        out->margin = (float)((1.0 - next) / total);
        out->entropy = (float)(entropy > 0.0 ? entropy : 0.0);
    }
}

KERNEL_BOUNDS(sample_shortlist_f32, SampleShortlistParams, THREADS, RESIDENT) { sample_shortlist_row<float>(p); }
KERNEL_BOUNDS(sample_shortlist_bf16, SampleShortlistParams, THREADS, RESIDENT) { sample_shortlist_row<u16>(p); }
