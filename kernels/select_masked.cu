// select_masked: lists the masked positions of each sequence's range, ascending, as rows of the
// plan and as draws.
//
// Runs before a denoising forward whose canvas the host has not seen: it predicts how many
// positions are masked, not which.
// If the count differs, the sequence's summary says so. Rows that exist only in the host's count,
// and those beyond the last sequence's up to `bucket` (a recorded graph has one fixed number of
// rows), become padding: row 0 is computed for them and not read.
//
// Layout: one CTA per sequence and a last one for the padding; a block scan per THREADS positions.
// A draw's uniform is keyed by the sequence's own numbers (`rng.rs`), so it depends on nothing
// beside it.
// Cost: one byte read per position, 36 bytes written per row; bound by latency.
#include "canvas.cuh"
#include "sample.cuh"

struct SelectMaskedParams {
    const StepRecord* sequences;  // (sequences)
    const u8* state;              // canvas
    SequenceSummary* summaries;    // (sequences)
    u32* rows;                    // (bucket) out: plan rows
    DrawRecord* draws;            // (bucket) out
    u32 sequences_count;
    u32 sample_count;    // of all sequences
    u32 bucket;  // rows and draws to fill
    u32 padding;
};
FIELD(SelectMaskedParams, sequences, 0);
FIELD(SelectMaskedParams, state, 8);
FIELD(SelectMaskedParams, summaries, 16);
FIELD(SelectMaskedParams, rows, 24);
FIELD(SelectMaskedParams, draws, 32);
FIELD(SelectMaskedParams, sequences_count, 40);
FIELD(SelectMaskedParams, sample_count, 44);
FIELD(SelectMaskedParams, bucket, 48);
FIELD(SelectMaskedParams, padding, 52);
LAYOUT(SelectMaskedParams, 56);

__device__ __forceinline__ void pad(const SelectMaskedParams& p, u32 begin, u32 end) {
    for (u32 i = begin + threadIdx.x; i < end; i += THREADS) {
        p.rows[i] = 0;
        p.draws[i] = DrawRecord{0.0, 0.0f, 1.0f, DRAW_PADDING, 0, 0, 0};
    }
}

KERNEL(select_masked, SelectMaskedParams) {
    if (blockIdx.x == p.sequences_count) {
        pad(p, p.sample_count, p.bucket);
        return;
    }
    const StepRecord s = p.sequences[blockIdx.x];
    const u8* state = p.state + s.canvas_first;
    u32 seen = 0;
    for (u32 tile = s.range_begin; tile < s.range_end; tile += THREADS) {
        const u32 position = tile + threadIdx.x;
        const bool masked = position < s.range_end && state[position] == STATE_MASKED;
        u32 count;
        const u32 i = seen + block_exclusive_sum(masked, count);
        if (masked && i < s.sample_count) {
            const double u = draw_uniforms(s.seed, s.sample, s.stage, s.block, s.step, position).token;
            p.rows[s.sample_first + i] = s.row_first + position - s.rows_begin;
            p.draws[s.sample_first + i] = DrawRecord{u, s.temperature, s.top_p, s.flags, 0, position, blockIdx.x};
        }
        seen += count;
    }
    if (seen < s.sample_count) pad(p, s.sample_first + seen, s.sample_first + s.sample_count);
    if (threadIdx.x == 0) {
        SequenceSummary* summary = p.summaries + blockIdx.x;
        summary->sampled = seen;
        summary->revealed = 0;
        if (seen != s.sample_count && summary->error == 0) {
            summary->error = ERROR_COUNT;
            summary->detail = seen;
        }
    }
}
