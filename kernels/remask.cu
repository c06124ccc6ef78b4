// remask: masks again the `count` revealed positions of a sequence whose snapshot confidence is
// lowest, ties to the lower position, and lists them in ascending order.
//
// Idea: a radix select (`select.cuh`) over the ordered bits of the confidence finds the count-th
// smallest value and how many positions equal to it are still wanted; one pass in position order
// then takes everything below it and the first of its equals.
// The order is `f32::total_cmp`, as in `policy::remask`. Fixed and already masked positions are
// never taken; if fewer than `count` positions qualify, all of them are.
//
// Layout: one CTA per sequence, one histogram bin per thread. Integer counts only, so the result
// does not depend on timing.
// Cost: five reads of (confidence, state) per position, the last four from cache, and 4 * 5 + 2 *
// ceil(len / 256) barriers; bound by latency. A bitonic sort of 1,024 positions would take 55
// exchange rounds, each with a barrier.
#include "canvas.cuh"
#include "select.cuh"
static_assert(THREADS == 256, "one histogram bin per thread");

struct RemaskParams {
    const u32* indptr;  // (S + 1) offsets of the sequences in the canvas arrays
    const u32* count;   // (S) positions wanted
    u32* token;         // (N) canvas
    float* confidence;  // (N) snapshot; 0 where nothing is revealed
    u8* state;          // (N) STATE_*
    u8* stage;          // (N) stage that sampled the position
    u32* step;          // (N) step that unmasked it; 0 where nothing is revealed
    u32* positions;     // (N) out: positions taken, within the sequence, ascending from indptr[s]
    u32* taken;         // (S) out: how many
    u32 mask_id;
    u32 next_stage;
};
FIELD(RemaskParams, indptr, 0);
FIELD(RemaskParams, count, 8);
FIELD(RemaskParams, token, 16);
FIELD(RemaskParams, confidence, 24);
FIELD(RemaskParams, state, 32);
FIELD(RemaskParams, stage, 40);
FIELD(RemaskParams, step, 48);
FIELD(RemaskParams, positions, 56);
FIELD(RemaskParams, taken, 64);
FIELD(RemaskParams, mask_id, 72);
FIELD(RemaskParams, next_stage, 76);
LAYOUT(RemaskParams, 80);

KERNEL(remask, RemaskParams) {
    const u32 first = p.indptr[blockIdx.x];
    const u32 len = p.indptr[blockIdx.x + 1] - first;
    const float* confidence = p.confidence + first;
    const u8* state = p.state + first;
    const auto key = [&](u32 i, u64& k) {
        k = ordered_bits(confidence[i]);
        return state[i] == STATE_REVEALED;
    };
    const Cut cut = radix_select(len, p.count[blockIdx.x], 32, key);

    u32 below_seen = 0, equal_seen = 0;
    for (u32 tile = 0; tile < len; tile += THREADS) {
        const u32 i = tile + threadIdx.x;
        u64 mine;
        const bool candidate = i < len && key(i, mine);
        const bool below = candidate && mine < cut.key;
        const bool equal = candidate && mine == cut.key;
        u32 counts;  // both counts in one scan: a tile holds at most 256 of each
        const u32 before = block_exclusive_sum((u32)below | (u32)equal << 16, counts);
        const u32 below_before = below_seen + (before & 0xffffu);
        const u32 equal_before = equal_seen + (before >> 16);
        if (below || (equal && equal_before < cut.equal)) {
            p.positions[first + below_before + (equal_before < cut.equal ? equal_before : cut.equal)] = i;
            p.token[first + i] = p.mask_id;
            p.confidence[first + i] = 0.0f;
            p.state[first + i] = STATE_MASKED;
            p.stage[first + i] = (u8)p.next_stage;
            p.step[first + i] = 0;
        }
        below_seen += counts & 0xffffu;
        equal_seen += counts >> 16;
    }
    if (threadIdx.x == 0) p.taken[blockIdx.x] = below_seen + cut.equal;
}
