// guidance: out[i] = base[i] + scale * (out[i] - base[i]) over f32: the guidance of rows that are
// sampled.
//
// Layout: one flat line of elements, a thread each.
// Cost: 12 bytes moved per element; few rows are sampled, so it is bound by its launch.
#include "common.cuh"

struct GuidanceParams {
    const float* base;  // (len)
    float* out;         // (len) in and out
    u32 len;
    float scale;
};
FIELD(GuidanceParams, base, 0);
FIELD(GuidanceParams, out, 8);
FIELD(GuidanceParams, len, 16);
FIELD(GuidanceParams, scale, 20);
LAYOUT(GuidanceParams, 24);

KERNEL(guidance, GuidanceParams) {
    const u32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= p.len) return;
    const float base = p.base[i];
    p.out[i] = base + p.scale * (p.out[i] - base);
}
