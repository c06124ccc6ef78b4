// States of a canvas position on the device, and one sequence's part of a step: what
// `select_masked`, `unmask` and `remask` share.
#pragma once
#include "common.cuh"

#define STATE_FIXED 0
#define STATE_MASKED 1
#define STATE_REVEALED 2

#define RULE_BEST 0u       // the best `n` by `rank`
#define RULE_THRESHOLD 1u  // confidence >= bound, and always the most confident
#define RULE_ENTROPY 2u    // lowest entropies first while those before add up to <= bound

#define RANK_UNIFORM 0u     // by the order uniform
#define RANK_CONFIDENCE 1u  // largest first
#define RANK_MARGIN 2u      // largest first
#define RANK_ENTROPY 3u     // smallest first
#define RANK_LEFT 4u        // lowest position first

// One sequence's part of a step. Its plan rows are consecutive positions.
struct StepRecord {
    u64 seed;
    u32 canvas_first;  // place of position 0 in the canvas arrays
    u32 range_begin;   // masked positions in it are sampled: [range_begin, range_end)
    u32 range_end;
    u32 row_first;   // plan row of position rows_begin
    u32 rows_begin;
    u32 sample_first;  // place of its first sampled row among all
    u32 sample_count;  // how many there are, as the host predicts
    u32 sample;
    u32 stage;
    u32 block;
    u32 step;
    float temperature;
    float top_p;
    u32 flags;  // of every draw: DRAW_CROSSING, DRAW_TRUNCATED
    u32 rule;   // RULE_*
    u32 rank;   // RANK_*
    u32 n;
    float bound;
};
FIELD(StepRecord, seed, 0);
FIELD(StepRecord, canvas_first, 8);
FIELD(StepRecord, range_begin, 12);
FIELD(StepRecord, range_end, 16);
FIELD(StepRecord, row_first, 20);
FIELD(StepRecord, rows_begin, 24);
FIELD(StepRecord, sample_first, 28);
FIELD(StepRecord, sample_count, 32);
FIELD(StepRecord, sample, 36);
FIELD(StepRecord, stage, 40);
FIELD(StepRecord, block, 44);
FIELD(StepRecord, step, 48);
FIELD(StepRecord, temperature, 52);
FIELD(StepRecord, top_p, 56);
FIELD(StepRecord, flags, 60);
FIELD(StepRecord, rule, 64);
FIELD(StepRecord, rank, 68);
FIELD(StepRecord, n, 72);
FIELD(StepRecord, bound, 76);
LAYOUT(StepRecord, 80);

#define ERROR_COUNT 1u     // other masks than the host predicted; `detail` is their number
#define ERROR_SAMPLING 2u  // a row could not be sampled; `detail` is the lowest such row of the sequence
#define ERROR_NAN 3u       // a confidence, margin or entropy is NaN; `detail` as above

// What became of a sequence, over the steps of a run. The first error stays, and nothing of the
// sequence is revealed from there on.
struct SequenceSummary {
    u32 error;  // 0 or ERROR_*
    u32 detail;
    u32 sampled;     // in the last step
    u32 revealed;  // in the last step
};
FIELD(SequenceSummary, error, 0);
FIELD(SequenceSummary, detail, 4);
FIELD(SequenceSummary, sampled, 8);
FIELD(SequenceSummary, revealed, 12);
LAYOUT(SequenceSummary, 16);
