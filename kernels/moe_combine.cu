// moe_combine: out[t, :] += sum over j of weight[t, j] y[place[t, j], :], j ascending: what a row's
// experts made of it, in the order of the experts.
//
// Layout: one flat line of quads (four columns; the last of a row may be shorter), a thread per
// quad, as in `gather`. The sum starts from zero and is added to `out` at its end, so the residual
// is rounded once.
// Cost: reads rows * top_k rows of y once, reads and writes out; bound by memory.
#include "common.cuh"

struct MoeCombineParams {
    const float* y;       // (rows * top_k, width)
    const u32* place;     // (rows, top_k)
    const float* weight;  // (rows, top_k)
    float* out;           // (rows, width)
    u32 rows;
    u32 width;
    u32 top_k;
    u32 vectors;  // 1: every row of y and out starts at a multiple of 16 bytes and is whole quads
};
FIELD(MoeCombineParams, y, 0);
FIELD(MoeCombineParams, place, 8);
FIELD(MoeCombineParams, weight, 16);
FIELD(MoeCombineParams, out, 24);
FIELD(MoeCombineParams, rows, 32);
FIELD(MoeCombineParams, width, 36);
FIELD(MoeCombineParams, top_k, 40);
FIELD(MoeCombineParams, vectors, 44);
LAYOUT(MoeCombineParams, 48);

KERNEL(moe_combine, MoeCombineParams) {
    const u32 quads = (p.width + 3) / 4;
    const u32 quad = blockIdx.x * THREADS + threadIdx.x;
    const u32 row = quad / quads;
    const u32 col = quad % quads * 4;
    if (row >= p.rows) return;
    const u32* place = p.place + (u64)row * p.top_k;
    const float* weight = p.weight + (u64)row * p.top_k;
    float* out = p.out + (u64)row * p.width + col;
    if (p.vectors) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (u32 j = 0; j < p.top_k; ++j) {
            const float4 y = load4(p.y + (u64)place[j] * p.width + col);
            const float w = weight[j];
            sum = make_float4(fmaf(w, y.x, sum.x), fmaf(w, y.y, sum.y), fmaf(w, y.z, sum.z), fmaf(w, y.w, sum.w));
        }
        const float4 before = load4(out);
        store4(out, make_float4(before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w));
        return;
    }
    for (u32 i = 0; i < 4 && col + i < p.width; ++i) {
        float sum = 0.0f;
        for (u32 j = 0; j < p.top_k; ++j) sum = fmaf(weight[j], p.y[(u64)place[j] * p.width + col + i], sum);
        out[i] += sum;
    }
}
