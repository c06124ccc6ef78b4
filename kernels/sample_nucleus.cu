// sample_nucleus: the sampled token of a row that draws from a nucleus, from its logits in memory,
// as `sampling::sample_row` specifies.
//
// Route B. A nucleus is a prefix of the order (larger logit first, ties to the lower id), and where
// it ends depends on the mass of the whole row, so the logits of a chunk of rows are written by
// `linear` (f32, with bias) and read here several times, mostly from L2.
// Nothing is sorted:
//   1. the maximum;
//   2. masses exp((l - max) / T), and their histogram over 256 depths (max - l) / T up to 29
//      (beyond, e^-29 < 2^-41): the bin in which the nucleus ends;
//   3. inside that bin, four rounds of a radix select weighted by mass, over the ordered bits of
//      the logit: the last logit kept, and how many of its equals, lowest ids first. The bin's keys
//      are first copied to shared memory, where they fit;
//      Top-k has four such rounds of its own, that count: the k-th largest logit, and the mass down
//      to it, of which the nucleus may be one;
//   4. the draw over the kept ids in ascending order: the row is cut into one range per warp, the
//      range that holds the target again, until 32 ids are left;
//   5. margin and entropy of what is kept, where a draw wants them, in one more pass.
// Masses are integers, in units of 2^-41 of the largest: sums are exact in any order (so atomics
// may build them), every boundary is met by the same numbers, and a row's bits depend on nothing
// but the row. The unit is below the rounding of an f32 exponential for any token that a nucleus
// can reach: a kept one weighs at least (1 - p) / V of the row. Without a nucleus (a draw that
// wants margin and entropy at another temperature than 1) tokens below a unit, together less than V
// 2^-41 of the row, are not drawn.
//
// Layout: one CTA per row; the histogram is kept in copies, so that lanes that meet in a bin meet
// less often. A mass is added as two words of 32 bits, the second with the carry of the first:
// shared memory has no 64-bit addition, and a loop of compare-and-swap takes 216 us for a row of
// 50,256 where two additions take 28 (H200). Each thread has UNROLL loads in flight.
// Cost: V f32 written and read four times, three times more where a bin's keys do not fit, five
// times more with top-k; an exponential per logit in step 2 and a few more in the end. Equal logits
// all fall into one bin and then queue at eight addresses.
#include "sample.cuh"

struct SampleNucleusParams {
    const float* logits;        // (rows, vocab)
    const u32* banned;          // a bit for every id, or null
    const DrawRecord* draws;    // (rows)
    SampledRecord* sampled;  // (rows) out, for the rows of route B
    u32 vocab;
    u32 padding;
};
FIELD(SampleNucleusParams, logits, 0);
FIELD(SampleNucleusParams, banned, 8);
FIELD(SampleNucleusParams, draws, 16);
FIELD(SampleNucleusParams, sampled, 24);
FIELD(SampleNucleusParams, vocab, 32);
FIELD(SampleNucleusParams, padding, 36);
LAYOUT(SampleNucleusParams, 40);

#define BINS 256
#define COPIES 8
static_assert(THREADS >= BINS, "a thread sums a bin");
#define UNROLL 4
#define KEYS 2048  // of the bin in which the nucleus ends
#define UNITS 2199023255552.0f  // 2^41: the sum of 4 million largest masses still fits 63 bits

// A mass in [0, 1] in units.
__device__ __forceinline__ u64 units(float mass) { return (u64)(mass * UNITS); }

struct Row {
    const float* logits;
    const u32* banned;
    float max;
    float temperature;
    float depth_scale;  // bins per nat, at temperature 1
};

// -inf where banned. Both loads start at once.
__device__ __forceinline__ float logit_at(const Row& row, u32 id) {
    const float logit = row.logits[id];
    const u32 banned = row.banned ? row.banned[id / 32] >> id % 32 & 1u : 0u;
    return banned ? -infinity() : logit;
}

// visit(id, logit) for each id of this thread in the row, ascending.
template <typename Visit>
__device__ __forceinline__ void for_each(const Row& row, u32 vocab, Visit visit) {
    for (u32 first = threadIdx.x; first < vocab; first += UNROLL * THREADS) {
        float logits[UNROLL];
#pragma unroll
        for (u32 i = 0; i < UNROLL; ++i) {
            const u32 id = first + i * THREADS;
            logits[i] = id < vocab ? logit_at(row, id) : 0.0f;
        }
#pragma unroll
        for (u32 i = 0; i < UNROLL; ++i) {
            const u32 id = first + i * THREADS;
            if (id < vocab) visit(id, logits[i]);
        }
    }
}

__device__ __forceinline__ u64 mass_of(const Row& row, float logit) { return units(tempered(logit - row.max, row.temperature)); }
// Not decreasing as logits fall: every operation rounds monotonously.
__device__ __forceinline__ u32 bin_of(const Row& row, float logit) { return (u32)fminf((row.max - logit) * row.depth_scale, (float)(BINS - 1)); }
// Ascending as logits fall. Zeros of either sign are the same logit, but only one of them occurs: a
// sum that starts from 0.0f is never -0.
__device__ __forceinline__ u32 key_of(float logit) { return ~ordered_bits(logit); }

// Where bin `index` begins among all masses that the histogram holds, and its own mass.
struct Bin {
    u64 before, mass;
    u32 index;
};

// Masses of the bins, in copies: sums modulo 2^32, and above them the sums of the upper words and
// the carries. All additions into a word end before it is read, so the order does not matter.
struct Histogram {
    u32 low[COPIES * BINS], high[COPIES * BINS];
};

// Adds mass to a bin, in the copy of this thread.
__device__ __forceinline__ void put(Histogram& histogram, u32 bin, u64 mass) {
    const u32 at = threadIdx.x % COPIES * BINS + bin;
    const u32 low = (u32)mass;
    const u32 before = atomicAdd(histogram.low + at, low);
    const u32 high = (u32)(mass >> 32) + (before + low < before);
    if (high > 0) atomicAdd(histogram.high + at, high);
}

__device__ __forceinline__ void empty(Histogram& histogram) {
    for (u32 i = threadIdx.x; i < COPIES * BINS; i += THREADS) histogram.low[i] = histogram.high[i] = 0;
    __syncthreads();
}

// Sum of this thread's bin; begins and ends with a barrier.
__device__ __forceinline__ u64 collect(const Histogram& histogram) {
    __syncthreads();
    u64 mass = 0;
    if (threadIdx.x < BINS) {
        for (u32 copy = 0; copy < COPIES; ++copy) {
            const u32 at = copy * BINS + threadIdx.x;
            mass += (u64)histogram.high[at] << 32 | histogram.low[at];
        }
    }
    __syncthreads();
    return mass;
}

// The bin that holds unit `limit`, counted from 0 at the first: before <= limit < before + mass.
// There must be one.
__device__ __forceinline__ Bin find_bin(u64 mass, u64 limit) {
    __shared__ Bin found;
    const u64 before = block_exclusive_sum64(mass);
    if (before <= limit && limit < before + mass) found = Bin{before, mass, threadIdx.x};  // one thread
    __syncthreads();
    const Bin bin = found;
    __syncthreads();  // `found` may be rewritten by the next call
    return bin;
}

// The last unit of mass that the nucleus may hold, or reaches into: a token is kept if the mass up
// to it, itself included, is at most `limit` (within), or if the mass before it is (crossing).
__device__ __forceinline__ u64 nucleus_limit(const DrawRecord& draw, u64 total) {
    const double share = (double)draw.top_p * (double)total;
    u64 limit = (u64)share;
    if (draw.flags & DRAW_CROSSING) {  // before < share
        if ((double)limit < share) ++limit;
        --limit;
    }
    return limit;
}

// The key of the k-th largest logit, the last of all where there are fewer.
__device__ __forceinline__ u32 kth_key(const Row& row, Histogram& histogram, u32 vocab, u32 k) {
    u32 prefix = 0, fixed_bits = 0;
    u64 wanted = k - 1;
    for (int shift = 24; shift >= 0; shift -= 8) {
        empty(histogram);
        for_each(row, vocab, [&](u32, float logit) {
            const u32 key = key_of(logit);
            if (logit != -infinity() && (key & fixed_bits) == prefix) put(histogram, key >> shift & 255u, 1);
        });
        const u64 in_bin = collect(histogram);
        if (fixed_bits == 0) {
            const u64 all = block_sum64(in_bin);
            wanted = wanted < all ? wanted : all - 1;
        }
        const Bin digit = find_bin(in_bin, wanted);
        wanted -= digit.before;
        prefix |= digit.index << shift;
        fixed_bits |= 255u << shift;
    }
    return prefix;
}

// The end of what is left: keys below `key` are kept, and the first `equal` ids with that key, of
// `mass` each.
struct Edge {
    u32 key, equal;
    u64 mass;
};

// Kept mass of this warp's ids [begin, end): of keys below the edge, and how many lie on it.
__device__ __forceinline__ void weigh(const Row& row, const Edge& edge, u32 begin, u32 end, u64& above, u32& equals) {
    above = 0;
    equals = 0;
    for (u32 first = begin + lane_id(); first < end; first += UNROLL * 32) {
        float logits[UNROLL];
#pragma unroll
        for (u32 i = 0; i < UNROLL; ++i) logits[i] = first + i * 32 < end ? logit_at(row, first + i * 32) : 0.0f;
#pragma unroll
        for (u32 i = 0; i < UNROLL; ++i) {
            if (first + i * 32 >= end) continue;
            const u32 key = key_of(logits[i]);
            if (key < edge.key) above += mass_of(row, logits[i]);
            equals += key == edge.key;
        }
    }
    above = warp_sum64(above);
    for (u32 distance = 16; distance > 0; distance /= 2) equals += __shfl_xor_sync(FULL_WARP, equals, distance);
}

__device__ __forceinline__ u64 kept_mass(const Edge& edge, u64 above, u32 equals, u32 equals_before) {
    const u32 left = edge.equal > equals_before ? edge.equal - equals_before : 0;
    return above + (equals < left ? equals : left) * edge.mass;
}

// The lowest id up to which the kept mass exceeds `target`, which is below the mass of all; its own
// mass in `mass`. NO_ID, in every thread, if no id does: the logits are not those that the mass of
// all was summed from.
__device__ __forceinline__ u32 draw_id(const Row& row, const Edge& edge, u32 vocab, u64 target, u64& mass) {
    __shared__ u64 above_of[WARPS];
    __shared__ u32 equals_of[WARPS];
    u32 begin = 0, end = vocab, equals_before = 0;
    u64 before = 0;
    while (end - begin > 32) {
        const u32 span = ((end - begin + WARPS - 1) / WARPS + 31) / 32 * 32;
        const u32 first = begin + warp_id() * span < end ? begin + warp_id() * span : end;
        u64 above;
        u32 equals;
        weigh(row, edge, first, first + span < end ? first + span : end, above, equals);
        if (lane_id() == 0) above_of[warp_id()] = above, equals_of[warp_id()] = equals;
        __syncthreads();
        bool found = false;
        for (u32 w = 0; w < WARPS && !found; ++w) {  // the same in every thread
            const u64 part = kept_mass(edge, above_of[w], equals_of[w], equals_before);
            found = before + part > target;
            if (found) {
                begin += w * span;
                end = begin + span < end ? begin + span : end;
            } else {
                before += part;
                equals_before += equals_of[w];
            }
        }
        __syncthreads();  // all have read before the next round writes
        if (!found) return NO_ID;  // the same range again would never end
    }
    const u32 id = begin + lane_id();
    const float logit = id < end ? logit_at(row, id) : -infinity();
    const u32 key = key_of(logit);
    const bool equal = id < end && key == edge.key;
    const u32 equals = __popc(__ballot_sync(FULL_WARP, equal) & ((1u << lane_id()) - 1)) + equals_before;
    const bool kept = id < end && (key < edge.key || (equal && equals < edge.equal));
    const u64 mine = kept ? mass_of(row, logit) : 0;
    u64 inclusive = mine;
    for (u32 distance = 1; distance < 32; distance *= 2) {
        const u64 lower = shuffle_up(inclusive, distance);
        if (lane_id() >= distance) inclusive += lower;
    }
    const u32 reached = __ballot_sync(FULL_WARP, before + inclusive > target);
    if (reached == 0) return NO_ID;
    const u32 lane = __popc(~reached & (reached - 1));  // of the lowest set bit
    mass = shuffle(mine, lane);
    return begin + lane;
}

KERNEL(sample_nucleus, SampleNucleusParams) {
    __shared__ Histogram histogram;
    __shared__ u32 keys[KEYS];
    __shared__ u32 num_keys;
    const DrawRecord draw = p.draws[blockIdx.x];
    if (!is_nucleus(draw)) return;
    SampledRecord* out = p.sampled + blockIdx.x;
    const bool greedy = draw.temperature == 0.0f;  // of the nucleus at temperature 1, its first
    const float temperature = greedy ? 1.0f : draw.temperature;
    Row row = {p.logits + (u64)blockIdx.x * p.vocab, p.banned, 0.0f, temperature, fminf(BINS / 29.0f / temperature, 1e30f)};

    Top top = no_top();
    u64 broken = NO_ID;  // the lowest id
    // A banned logit is -inf here, which is neither broken nor above anything.
    for_each(row, p.vocab, [&](u32 id, float logit) {
        if (is_broken(logit) && broken == NO_ID) broken = id;
        if (logit > -infinity()) top = join(top, Top{logit, -infinity(), id});
    });
    broken = block_min(broken);
    if (broken != NO_ID) return refuse(out, draw, STATUS_BROKEN, (u32)broken);
    top = block_join(top);
    if (top.max == -infinity()) return refuse(out, draw, STATUS_NOTHING, 0);
    row.max = top.max;

    empty(histogram);
    u64 sum = 0, moment = 0;
    for_each(row, p.vocab, [&](u32, float logit) {
        const float below = logit - row.max;
        const float e = expf(below);
        sum += units(e);
        moment += units(-moment_of(e, below));
        const u64 mass = mass_of(row, logit);
        if (mass > 0) put(histogram, bin_of(row, logit), mass);
    });
    const u64 in_bin = collect(histogram);
    const u64 total = block_sum64(in_bin);
    u32 last_key = NO_ID;  // of top-k
    u64 most_probable = total;
    if (top_k(draw) > 0) {  // uniform over the CTA
        last_key = kth_key(row, histogram, p.vocab, top_k(draw));
        u64 mass = 0;
        for_each(row, p.vocab, [&](u32, float logit) {
            if (key_of(logit) <= last_key) mass += mass_of(row, logit);
        });
        most_probable = block_sum64(mass);
    }
    Edge edge = {NO_ID, 0, 0};  // everything
    u64 kept = total;
    if (draw.top_p < 1.0f) {  // uniform over the CTA
        const u64 limit = nucleus_limit(draw, draw.flags & DRAW_TOP_K_AFTER ? total : most_probable);
        if (threadIdx.x == 0) num_keys = 0;
        const Bin depth = find_bin(in_bin, limit);  // with barriers
        // In any order: only sums are made of them.
        for_each(row, p.vocab, [&](u32, float logit) {
            if (logit == -infinity() || bin_of(row, logit) != depth.index) return;
            const u32 at = atomicAdd(&num_keys, 1u);
            if (at < KEYS) keys[at] = key_of(logit);
        });

        u32 prefix = 0, fixed_bits = 0;
        Bin last = {depth.before, 0, 0};
        for (int shift = 24; shift >= 0; shift -= 8) {
            empty(histogram);  // with a barrier: the keys are there
            const u32 count = num_keys;
            if (count <= KEYS) {
                for (u32 i = threadIdx.x; i < count; i += THREADS) {
                    const u32 key = keys[i];
                    if ((key & fixed_bits) == prefix) put(histogram, key >> shift & 255u, mass_of(row, from_ordered_bits(~key)));
                }
            } else {
                for_each(row, p.vocab, [&](u32, float logit) {
                    if (logit == -infinity() || bin_of(row, logit) != depth.index) return;
                    const u32 key = key_of(logit);
                    if ((key & fixed_bits) == prefix) put(histogram, key >> shift & 255u, mass_of(row, logit));
                });
            }
            const Bin digit = find_bin(collect(histogram), limit - last.before);
            last = Bin{last.before + digit.before, digit.mass, 0};
            prefix |= digit.index << shift;
            fixed_bits |= 255u << shift;
        }
        edge = Edge{prefix, 0, mass_of(row, from_ordered_bits(~prefix))};
        edge.equal = (u32)((limit - last.before) / edge.mass) + (draw.flags & DRAW_CROSSING ? 1 : 0);
        if (last.before == 0 && edge.equal == 0) edge.equal = 1;  // the most probable token always stays

        kept = last.before + edge.equal * edge.mass;
    }
    // Both keep a prefix of the same order.
    if (edge.key > last_key) {
        edge = Edge{last_key + 1, 0, 0};
        kept = most_probable;
    }

    u64 target = (u64)(draw.u * (double)kept);
    if (target >= kept) target = kept - 1;
    u64 mass = mass_of(row, top.max);
    u32 token = top.at;
    if (!greedy) token = draw_id(row, edge, p.vocab, target, mass);
    if (token == NO_ID) return refuse(out, draw, STATUS_CHANGED, 0);
    sum = block_sum64(sum);
    moment = block_sum64(moment);
    if (threadIdx.x == 0) {
        const double share = (double)mass / (double)kept;
        write_sampled(out, draw, token, row.logits[token], share, top.max, top.second, (double)sum / UNITS, -(double)moment / UNITS);
    }
    if (!(draw.flags & DRAW_TRUNCATED)) return;

    // Margin and entropy of what is left: tokens below the edge, and its equals, which weigh the
    // same each.
    u64 spread = 0, others = 0;
    for_each(row, p.vocab, [&](u32, float logit) {
        if (logit == -infinity() || key_of(logit) >= edge.key) return;
        const float below = (logit - row.max) / temperature;
        spread += units(-moment_of(tempered(logit - row.max, temperature), below));
        ++others;
    });
    spread = block_sum64(spread);
    others = block_sum64(others) + edge.equal;
    if (threadIdx.x == 0) {
        if (edge.equal > 0) {
            const float below = from_ordered_bits(~edge.key) - row.max;
            spread += edge.equal * units(-moment_of(tempered(below, temperature), below / temperature));
        }
        const double left = (double)kept / UNITS;
        const double next = others > 1 ? exp(((double)top.second - (double)top.max) / temperature) : 0.0;
        const double entropy = log(left) + (double)spread / UNITS / left;
        out->margin = (float)((1.0 - next) / left);
        out->entropy = (float)(entropy > 0.0 ? entropy : 0.0);
    }
}
