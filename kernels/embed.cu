// embed: out[t, :] = table[ids[t], :], widened to f32; where positions are learned, +
// position_table[positions[t], :]. Tables are floats of one type, or in groups of GROUP_BITS and
// POSITION_BITS.
//
// Layout: one CTA per row t; threads stride over the row, four elements at a time where the row is
// aligned for it.
// Cost: reads T * width elements of each table and writes T * width f32, once each; bound by
// memory.
// An id outside the vocabulary, or a position outside its table, gives a row of NaN, which the next
// NaN check reports, instead of a read out of bounds.
#include "groups.cuh"

struct EmbedParams {
    const u32* ids;              // (T); a canvas where `index` is given
    const u32* index;            // (T) places in `ids`, or null: row t reads ids[t]
    const void* table;           // (vocab, width) f32 or bf16, or blocks
    float* out;                  // (T, width)
    const u32* positions;        // (T); read where there is a second table
    const void* position_table;  // (num_positions, width) of the same type or blocks, or null
    u32 width;
    u32 vocab;
    u32 num_positions;
    u32 padding;
};
FIELD(EmbedParams, ids, 0);
FIELD(EmbedParams, index, 8);
FIELD(EmbedParams, table, 16);
FIELD(EmbedParams, out, 24);
FIELD(EmbedParams, positions, 32);
FIELD(EmbedParams, position_table, 40);
FIELD(EmbedParams, width, 48);
FIELD(EmbedParams, vocab, 52);
FIELD(EmbedParams, num_positions, 56);
FIELD(EmbedParams, padding, 60);
LAYOUT(EmbedParams, 64);

template <typename T>
__device__ __forceinline__ void embed_row(const EmbedParams& p) {
    const u32 id = p.ids[p.index ? p.index[blockIdx.x] : blockIdx.x];
    float* out = p.out + (u64)blockIdx.x * p.width;
    const bool second = p.position_table != 0;
    const u32 position = second ? p.positions[blockIdx.x] : 0;
    if (id >= p.vocab || (second && position >= p.num_positions)) {
        for (u32 i = threadIdx.x; i < p.width; i += THREADS) out[i] = quiet_nan();
        return;
    }
    const auto row = weight_row<T, GROUP_BITS>(p.table, id, p.width);
    const auto added = weight_row<T, POSITION_BITS>(p.position_table, position, p.width);
    if (p.width % 4 == 0 && has_quads(row) && (!second || has_quads(added)) && (u64)out % sizeof(float4) == 0) {
        for (u32 i = threadIdx.x * 4; i < p.width; i += THREADS * 4) {
            float4 x = quad_at(row, i);
            if (second) {
                const float4 y = quad_at(added, i);
                x = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
            }
            *(float4*)(out + i) = x;
        }
    } else {
        for (u32 i = threadIdx.x; i < p.width; i += THREADS) out[i] = value_at(row, i) + (second ? value_at(added, i) : 0.0f);
    }
}

KERNEL(embed_f32, EmbedParams) { embed_row<float>(p); }
KERNEL(embed_bf16, EmbedParams) { embed_row<u16>(p); }
