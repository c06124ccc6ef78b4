// embed: out[t, :] = table[ids[t], :], widened to f32.
//
// Layout: one CTA per row t; threads stride over the row, four elements at a time where the row is aligned for it.
// Cost: reads T * width table elements and writes T * width f32, once each; bound by memory.
// An id outside the vocabulary gives a row of NaN, which the next NaN check reports, instead of a read out of bounds.
#include "common.cuh"

struct EmbedParams {
    const u32* ids;     // (T); a canvas where `index` is given
    const u32* index;   // (T) places in `ids`, or null: row t reads ids[t]
    const void* table;  // (vocab, width) f32 or bf16
    float* out;         // (T, width)
    u32 width;
    u32 vocab;
};
FIELD(EmbedParams, ids, 0);
FIELD(EmbedParams, index, 8);
FIELD(EmbedParams, table, 16);
FIELD(EmbedParams, out, 24);
FIELD(EmbedParams, width, 32);
FIELD(EmbedParams, vocab, 36);
LAYOUT(EmbedParams, 40);

template <typename Table>
__device__ __forceinline__ void embed_row(const EmbedParams& p) {
    const u32 id = p.ids[p.index ? p.index[blockIdx.x] : blockIdx.x];
    float* out = p.out + (u64)blockIdx.x * p.width;
    if (id >= p.vocab) {
        for (u32 i = threadIdx.x; i < p.width; i += THREADS) out[i] = quiet_nan();
        return;
    }
    const Table* row = (const Table*)p.table + (u64)id * p.width;
    const bool aligned = p.width % 4 == 0 && (u64)row % (4 * sizeof(Table)) == 0 && (u64)out % sizeof(float4) == 0;
    if (aligned) {
        for (u32 i = threadIdx.x * 4; i < p.width; i += THREADS * 4) *(float4*)(out + i) = load4(row + i);
    } else {
        for (u32 i = threadIdx.x; i < p.width; i += THREADS) out[i] = load1(row + i);
    }
}

KERNEL(embed_f32, EmbedParams) { embed_row<float>(p); }
KERNEL(embed_bf16, EmbedParams) { embed_row<u16>(p); }
