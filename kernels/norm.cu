// norm: out[r, :] = (x[r, :] - mean) / sqrt(var + eps) * weight + bias, biased variance, statistics in f32.
//
// Layout: one CTA per row; thread i owns columns i, i + THREADS, ...; two CTA sums (warp shuffles, then one word per warp).
// The mean is subtracted before squaring: the one-pass form E[x^2] - E[x]^2 loses all digits on rows with a large mean.
// Cost: one read of the row from memory and two from L1 (a row of 768 is 3 KiB), one write; four barriers; bound by memory.
// `bias` may be null. `out` may be `x` itself where both are f32: a column is read and written by the same thread only.
#include "common.cuh"

struct NormParams {
    const float* x;       // (rows, width)
    const float* weight;  // (width)
    const float* bias;    // (width) or null
    void* out;            // (rows, width) f32 or bf16
    u32 width;
    float eps;
};
FIELD(NormParams, x, 0);
FIELD(NormParams, weight, 8);
FIELD(NormParams, bias, 16);
FIELD(NormParams, out, 24);
FIELD(NormParams, width, 32);
FIELD(NormParams, eps, 36);
LAYOUT(NormParams, 40);

template <typename Out>
__device__ __forceinline__ void layer_norm_row(const NormParams& p) {
    const float* x = p.x + (u64)blockIdx.x * p.width;
    Out* out = (Out*)p.out + (u64)blockIdx.x * p.width;

    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < p.width; i += THREADS) sum += x[i];
    const float mean = block_sum(sum) / (float)p.width;

    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < p.width; i += THREADS) squares += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / sqrtf(block_sum(squares) / (float)p.width + p.eps);

    for (u32 i = threadIdx.x; i < p.width; i += THREADS) {
        const float shift = p.bias ? p.bias[i] : 0.0f;
        store1(out + i, (x[i] - mean) * scale * p.weight[i] + shift);
    }
}

KERNEL(norm_layer_f32, NormParams) { layer_norm_row<float>(p); }
KERNEL(norm_layer_bf16, NormParams) { layer_norm_row<u16>(p); }
