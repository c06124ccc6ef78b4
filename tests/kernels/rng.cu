// Test entry: the Philox words and the uniforms of one draw per thread, and the bf16 rounding, as
// the kernels compute them.
#include "common.cuh"

struct RngParams {
    const u32* counters;  // (n, 6): counter words, key words
    u32* words;           // (n, 4)
    double* uniforms;     // (n, 2): token, order of (seed = key, sample = c3, stage and block = c2, step = c1, position = c0)
    u16* rounded;         // (n): counter word 0, read as f32, rounded to bf16
    u32 n;
};

KERNEL(rng_probe, RngParams) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= p.n) return;
    const u32* c = p.counters + 6 * i;
    const uint4 w = philox4x32_10(make_uint4(c[0], c[1], c[2], c[3]), make_uint2(c[4], c[5]));
    p.words[4 * i] = w.x;
    p.words[4 * i + 1] = w.y;
    p.words[4 * i + 2] = w.z;
    p.words[4 * i + 3] = w.w;
    const Uniforms u = draw_uniforms((u64)c[5] << 32 | c[4], c[3], c[2] >> 24, c[2] & 0xffffffu, c[1], c[0]);
    p.uniforms[2 * i] = u.token;
    p.uniforms[2 * i + 1] = u.order;
    p.rounded[i] = bf16_from_f32(__uint_as_float(c[0]));
}
