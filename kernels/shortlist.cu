// shortlist: the ids of the `count` largest finite logits of each row, ascending; ties to the lower
// id.
//
// The logits of a chunk of rows are written by `linear` (f32, with bias) and read here. A radix
// select (`select.cuh`) over their ordered bits finds the count-th largest and how many of its
// equals are wanted; one pass in the order of the ids then writes what lies above it and the first
// of its equals. Banned ids, -inf and NaN are never listed: `sample_shortlist` gives them no
// probability, and a NaN is refused by `sample`.
//
// Layout: one CTA per row, one histogram bin per thread. Integer counts only, so the result does
// not depend on timing.
// Cost: V f32 written and read five times, mostly from L2, and V / 256 scans; beside the product
// bound by latency.
#include "sample.cuh"
static_assert(THREADS == 256, "one histogram bin per thread");

struct ShortlistParams {
    const float* logits;  // (rows, vocab)
    const u32* banned;    // a bit for every id, or null
    u32* ids;             // (rows, count) out: NO_ID after the last where there are fewer
    u32 vocab;
    u32 count;
};
FIELD(ShortlistParams, logits, 0);
FIELD(ShortlistParams, banned, 8);
FIELD(ShortlistParams, ids, 16);
FIELD(ShortlistParams, vocab, 24);
FIELD(ShortlistParams, count, 28);
LAYOUT(ShortlistParams, 32);

KERNEL(shortlist, ShortlistParams) {
    const float* logits = p.logits + (u64)blockIdx.x * p.vocab;
    u32* ids = p.ids + (u64)blockIdx.x * p.count;
    // Ascending as logits fall. Zeros of either sign would be two, but a sum that starts from 0.0f
    // is never -0.
    const auto key = [&](u32 id, u64& k) {
        const float logit = logits[id];
        k = (u32)~ordered_bits(logit);
        return logit > -infinity() && !is_banned(p.banned, id);
    };
    const Cut cut = radix_select(p.vocab, p.count, 32, key);

    u32 above_seen = 0, equal_seen = 0;
    for (u32 tile = 0; tile < p.vocab; tile += THREADS) {
        const u32 id = tile + threadIdx.x;
        u64 mine = 0;
        const bool candidate = id < p.vocab && key(id, mine);
        const bool above = candidate && mine < cut.key;
        const bool equal = candidate && mine == cut.key;
        u32 counts;  // both counts in one scan: a tile holds at most 256 of each
        const u32 before = block_exclusive_sum((u32)above | (u32)equal << 16, counts);
        const u32 equal_before = equal_seen + (before >> 16);
        if (above || (equal && equal_before < cut.equal)) {
            ids[above_seen + (before & 0xffffu) + (equal_before < cut.equal ? equal_before : cut.equal)] = id;
        }
        above_seen += counts & 0xffffu;
        equal_seen += counts >> 16;
    }
    for (u32 i = above_seen + cut.equal + threadIdx.x; i < p.count; i += THREADS) ids[i] = NO_ID;
}
