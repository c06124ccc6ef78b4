// Test entry: one mma_m16n8k16 a warp, from operands as plain matrices.
#include "common.cuh"

struct MmaParams {
    const u16* a;    // (16, 16) bf16
    const u16* b;    // (8, 16) bf16: columns of the second operand as rows
    const float* c;  // (16, 8)
    float* d;        // (16, 8) out
};

KERNEL(mma, MmaParams) {
    const u32 g = lane_id() / 4, t = lane_id() % 4 * 2;
    const u16* a = p.a + g * 16 + t;
    const u16* b = p.b + g * 16 + t;
    const u32 fragment_a[4] = {*(const u32*)a, *(const u32*)(a + 8 * 16), *(const u32*)(a + 8), *(const u32*)(a + 8 * 16 + 8)};
    const u32 fragment_b[2] = {*(const u32*)b, *(const u32*)(b + 8)};
    float sums[4];
    for (u32 e = 0; e < 4; ++e) sums[e] = p.c[(g + e / 2 * 8) * 8 + t + e % 2];
    mma_m16n8k16(sums, fragment_a, fragment_b);
    for (u32 e = 0; e < 4; ++e) p.d[(g + e / 2 * 8) * 8 + t + e % 2] = sums[e];
}
