// States of a canvas position on the device, and one session's part of a step: what `select_masked`, `reveal` and `remask` share.
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

// One session's part of a step. Its plan rows are consecutive positions.
struct SessionStep {
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
FIELD(SessionStep, seed, 0);
FIELD(SessionStep, canvas_first, 8);
FIELD(SessionStep, range_begin, 12);
FIELD(SessionStep, range_end, 16);
FIELD(SessionStep, row_first, 20);
FIELD(SessionStep, rows_begin, 24);
FIELD(SessionStep, sample_first, 28);
FIELD(SessionStep, sample_count, 32);
FIELD(SessionStep, sample, 36);
FIELD(SessionStep, stage, 40);
FIELD(SessionStep, block, 44);
FIELD(SessionStep, step, 48);
FIELD(SessionStep, temperature, 52);
FIELD(SessionStep, top_p, 56);
FIELD(SessionStep, flags, 60);
FIELD(SessionStep, rule, 64);
FIELD(SessionStep, rank, 68);
FIELD(SessionStep, n, 72);
FIELD(SessionStep, bound, 76);
LAYOUT(SessionStep, 80);

#define TROUBLE_COUNT 1u     // other masks than the host predicted; `detail` is their number
#define TROUBLE_SAMPLING 2u  // a row could not be sampled; `detail` is the lowest such row of the session
#define TROUBLE_NAN 3u       // a confidence, margin or entropy is NaN; `detail` as above

// What became of a session, over the steps of a run. The first trouble stays, and nothing of the session is revealed from there on.
struct SessionSummary {
    u32 trouble;  // 0 or TROUBLE_*
    u32 detail;
    u32 sampled;     // in the last step
    u32 revealed;  // in the last step
};
FIELD(SessionSummary, trouble, 0);
FIELD(SessionSummary, detail, 4);
FIELD(SessionSummary, sampled, 8);
FIELD(SessionSummary, revealed, 12);
LAYOUT(SessionSummary, 16);
