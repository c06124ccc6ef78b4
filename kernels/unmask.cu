// unmask: which of a sequence's sampled positions take their token now, as `sampling::select`
// specifies, and their new entry on the canvas.
//
// `RULE_BEST` takes the n smallest of (key, position) by radix select (`select.cuh`): keys are the
// order uniform, the entropy, or the complement of confidence or margin, as integers in the order
// of `total_cmp`. `RULE_THRESHOLD` needs the best alone. `RULE_ENTROPY` adds entropies in ascending
// order in f64, one position per round, exactly as the reference does: a sum in another order could
// end elsewhere.
// At least one position is revealed. A sequence with an error, a row that could not be sampled, or
// a statistic that is NaN unmasks nothing.
//
// Layout: one CTA per sequence, rows in position order. Integer sums only, but for that one in f64.
// Cost: 32 bytes read per row and pass; 4 passes (8 for the uniform's 64 bits) of 5 barriers, or 2
// barriers per revealed position under `RULE_ENTROPY`. Bound by latency.
#include "canvas.cuh"
#include "sample.cuh"
#include "select.cuh"
static_assert(THREADS == 256, "one histogram bin per thread");

struct UnmaskParams {
    const StepRecord* sequences;  // (sequences)
    SequenceSummary* summaries;    // (sequences)
    SampledRecord* sampled;    // (rows of all sequences); `chosen` is set here
    u32* token;                   // canvas, as in `remask`
    float* confidence;
    u8* state;
    u8* stage;
    u32* step;
};
FIELD(UnmaskParams, sequences, 0);
FIELD(UnmaskParams, summaries, 8);
FIELD(UnmaskParams, sampled, 16);
FIELD(UnmaskParams, token, 24);
FIELD(UnmaskParams, confidence, 32);
FIELD(UnmaskParams, state, 40);
FIELD(UnmaskParams, stage, 48);
FIELD(UnmaskParams, step, 56);
LAYOUT(UnmaskParams, 64);

// Place of a position in its sequence's order: smaller goes first, equals by position.
__device__ __forceinline__ u64 rank_key(const StepRecord& s, u32 rank, const SampledRecord& d) {
    switch (rank) {
        case RANK_UNIFORM:  // not negative, so its bits are in order
            return (u64)__double_as_longlong(draw_uniforms(s.seed, s.sample, s.stage, s.block, s.step, d.position).order);
        case RANK_CONFIDENCE:
            return (u32)~ordered_bits(d.confidence);
        case RANK_MARGIN:
            return (u32)~ordered_bits(d.margin);
        case RANK_ENTROPY:
            return ordered_bits(d.entropy);
        default:
            return 0;
    }
}

__device__ __forceinline__ void take(const UnmaskParams& p, const StepRecord& s, SampledRecord& d) {
    const u32 at = s.canvas_first + d.position;
    d.chosen = 1;
    p.token[at] = d.token;
    // Below f32's normal range a probability is still not zero.
    const float confidence = d.confidence < 1.17549435e-38f ? 1.17549435e-38f : d.confidence;
    p.confidence[at] = confidence > 1.0f ? 1.0f : confidence;
    p.state[at] = STATE_REVEALED;
    p.stage[at] = (u8)s.stage;
    p.step[at] = s.step;
}

// The smallest key << 32 | row that is not below `from`, or all ones: the next in the order of a
// 32-bit rank.
__device__ __forceinline__ u64 next_best(const StepRecord& s, u32 rank, const SampledRecord* sampled, u64 from) {
    u64 best = ~0ull;
    for (u32 i = threadIdx.x; i < s.sample_count; i += THREADS) {
        const u64 key = rank_key(s, rank, sampled[i]) << 32 | i;
        if (key >= from && key < best) best = key;
    }
    return block_min(best);
}

KERNEL(unmask, UnmaskParams) {
    const StepRecord s = p.sequences[blockIdx.x];
    SequenceSummary* summary = p.summaries + blockIdx.x;
    SampledRecord* sampled = p.sampled + s.sample_first;
    if (summary->error != 0 || s.sample_count == 0) return;  // uniform over the CTA

    u64 broken = ~0ull;  // the lowest row that cannot be used, with its error in the low half
    for (u32 i = threadIdx.x; i < s.sample_count; i += THREADS) {
        const SampledRecord& d = sampled[i];
        const bool nan = d.confidence != d.confidence || d.margin != d.margin || d.entropy != d.entropy;
        if ((d.status != 0 || nan) && broken == ~0ull) broken = (u64)i << 32 | (d.status != 0 ? ERROR_SAMPLING : ERROR_NAN);
    }
    broken = block_min(broken);  // its barriers also separate the read of `error` above and the write below
    if (broken != ~0ull) {
        if (threadIdx.x == 0) {
            summary->error = (u32)broken;
            summary->detail = (u32)(broken >> 32);
        }
        return;
    }

    u32 revealed = 0;
    if (s.rule == RULE_BEST) {
        const u32 at_least = s.n < 1 ? 1 : s.n;
        const u32 wanted = at_least < s.sample_count ? at_least : s.sample_count;
        const auto key = [&](u32 i, u64& k) {
            k = rank_key(s, s.rank, sampled[i]);
            return true;
        };
        const Cut cut = radix_select(s.sample_count, wanted, s.rank == RANK_UNIFORM ? 64 : 32, key);
        u32 equal_seen = 0;
        for (u32 tile = 0; tile < s.sample_count; tile += THREADS) {
            const u32 i = tile + threadIdx.x;
            u64 mine;
            const bool candidate = i < s.sample_count && key(i, mine);
            u32 equals;
            const u32 equal_before = equal_seen + block_exclusive_sum(candidate && mine == cut.key, equals);
            if (candidate && (mine < cut.key || (mine == cut.key && equal_before < cut.equal))) take(p, s, sampled[i]);
            equal_seen += equals;
        }
        revealed = wanted;
    } else if (s.rule == RULE_THRESHOLD) {
        const u32 best = (u32)next_best(s, RANK_CONFIDENCE, sampled, 0);
        u32 mine = 0;
        for (u32 i = threadIdx.x; i < s.sample_count; i += THREADS) {
            if (i == best || sampled[i].confidence >= s.bound) {
                take(p, s, sampled[i]);
                ++mine;
            }
        }
        block_exclusive_sum(mine, revealed);
    } else {
        double sum = 0.0;
        u64 next = 0;
        while (revealed < s.sample_count) {
            const u64 best = next_best(s, RANK_ENTROPY, sampled, next);
            SampledRecord& d = sampled[(u32)best];
            const double entropy = d.entropy;
            sum += entropy;
            // In ascending order the largest so far is the newest.
            if (revealed > 0 && !(sum - entropy <= (double)s.bound)) break;
            if (threadIdx.x == 0) take(p, s, d);
            ++revealed;
            next = best + 1;
        }
    }
    if (threadIdx.x == 0) summary->revealed = revealed;
}
